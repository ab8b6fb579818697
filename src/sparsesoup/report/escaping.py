"""Terminal output, HTML and Markdown in which names and file contents cannot act as control sequences or markup."""

import html
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup
from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

# Controls (C0, DEL, C1), line separators, bidirectional marks, invisible tags, and surrogates, as which Python keeps
# path bytes that are not UTF-8.
CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
ACTIVE = re.compile(
    r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])|^#|^[+-](?=\s)"
)  # in Markdown; an underscore inside a word needs no escape


def printable_line(text: str) -> str:
    r"""Return a text as one printable line: control characters as Python escapes.

    >>> printable_line("neg\x1b[31m\n# head")
    'neg\\x1b[31m\\n# head'
    """
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_lines(text: str) -> str:
    """Return a text of several lines with control characters escaped."""
    return "\n".join(map(printable_line, text.split("\n")))


def escape_markdown(text: str) -> str:
    r"""Escape a text as one line of Markdown, also in a table: no tag, link, heading or code.

    >>> escape_markdown("<b> | [x](y)\n# z"), escape_markdown("macro_f1")
    ('&lt;b&gt; \\| \\[x\\](y)\\\\n# z', 'macro_f1')
    """
    return ACTIVE.sub(r"\\\g<0>", html.escape(printable_line(text), quote=False))


def markdown_code(text: str) -> str:
    """Return a text as inline code in Markdown.

    >>> markdown_code("bert"), markdown_code("a`b")
    ('`bert`', '<code>a\\\\`b</code>')
    """
    plain = re.fullmatch(r"[^`|<>&\\]+", text) and text == text.strip() and not CONTROL.search(text)
    return f"`{text}`" if plain else f"<code>{escape_markdown(text)}</code>"


def markdown_prose(text: str) -> str:
    """Escape a sentence that contains our own code spans; its other parts may be anything."""
    parts = re.split(r"`([^`]*)`", text)
    return "".join(markdown_code(part) if i % 2 and part else escape_markdown(part) for i, part in enumerate(parts))


def fenced_code(text: str, language: str) -> Markup:
    """Return a code block in Markdown that its content cannot end."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`{3,}", text))])
    return Markup(f"{fence}{language}\n{printable_lines(text)}\n{fence}")


def shell_command(words: Iterable[str]) -> str:
    r"""Return a command line as one printable line, which bash and zsh parse into these words.

    >>> print(shell_command(["show", "two words", "neg\x1b[31m"]))
    show 'two words' $'neg\x1b[31m'
    """
    return " ".join(_shell_quoted(word) for word in words)


def command_line(line: str) -> str:
    """Return a command line with control characters escaped."""
    if not CONTROL.search(line):
        return line
    try:
        return shell_command(shlex.split(line))
    except ValueError:  # not a valid command line
        return printable_line(line)


def _shell_quoted(word: str) -> str:
    if not CONTROL.search(word) and not re.search("[`<]", word):
        return shlex.quote(word)
    return "$'" + "".join(_escape_character(sign) for sign in word) + "'"


def _escape_character(sign: str) -> str:
    if sign in "\\'":
        return f"\\{sign}"
    if not CONTROL.match(sign) and sign not in "`<":
        return sign
    return "".join(f"\\x{byte:02x}" for byte in sign.encode("utf-8", "surrogateescape"))


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
