"""Terminal output in which names and file contents cannot act as control sequences."""

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from sparsesoup.report.escaping import printable_line, printable_lines


def print_line(text: str, file: Any = None) -> None:
    """Print one line to stdout, or to another file."""
    print(printable_line(text), file=file or sys.stdout)


class SafeConsole(Console):
    """rich's console, which passes no control characters except its own."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render an object, with its texts made printable before they are split into lines."""
        if isinstance(renderable, Text) and (plain := printable_lines(renderable.plain)) != renderable.plain:
            known = renderable
            renderable = Text(plain, known.style, justify=known.justify, overflow=known.overflow, end=known.end)
            renderable.no_wrap = known.no_wrap
        return super().render(renderable, options)
