"""Terminal output in which names and file contents cannot act as control sequences."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from sparsesoup.report.escaping import printable_line, printable_lines


def print_line(text: str, file: Any = None) -> None:
    """Print one line to stdout, or to another file."""
    print(printable_line(text), file=file or sys.stdout)


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> Table:
    """Return a table: the first `left` columns are texts, the others numbers; a column without entries is left out."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    shown = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    for i in shown:
        table.add_column(Text(columns[i]), justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable_line(row[i])) for i in shown))
    return table


class SafeConsole(Console):
    """rich's console, which passes no control characters except its own."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render an object, with its texts made printable before they are split into lines."""
        if isinstance(renderable, Text) and (plain := printable_lines(renderable.plain)) != renderable.plain:
            known = renderable
            renderable = Text(plain, known.style, justify=known.justify, overflow=known.overflow, end=known.end)
            renderable.no_wrap = known.no_wrap
        return super().render(renderable, options)
