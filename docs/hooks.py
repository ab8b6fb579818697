"""Hooks of mkdocs."""

import re


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the marks of generated tables by empty lines: behind a comment Markdown would see no table."""
    return re.sub(r"^<!-- [\w-]+ -->$", "", markdown, flags=re.M)
