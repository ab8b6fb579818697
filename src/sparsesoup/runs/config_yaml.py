"""Strict YAML for recipes: unique keys, no cycles, and a size limit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

NO_VALUE = (ValueError, LookupError, AttributeError)  # raised by PyYAML for 2024-13-45, !!bool x and !!timestamp x
TOO_DEEP = "lists and tables are nested too deep; leave some out"
LARGEST = 1_000_000  # bytes of a file: a recipe has a few thousand
MOST = 100_000  # values of a text with every alias expanded: a few hundred bytes may stand for 10^9


class TooMany(yaml.YAMLError):
    """A text that expands to too many values."""


class _PlainLoader(yaml.SafeLoader):
    """A SafeLoader that reports the line of a value that does not match its tag."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except NO_VALUE as error:
            kind, line = node.tag.rpartition(":")[2], node.start_mark.line + 1
            raise yaml.YAMLError(
                f"{node.value!r:.40} is no {kind}, line {line}; correct it, or write it in quotes without a tag"
            ) from error


def text_of(path: Path) -> str:
    """Read the text of a YAML file.

    Raises: OSError; yaml.YAMLError if it is too large for a recipe, or not text.
    """
    with open(path, "rb") as file:
        text = file.read(LARGEST + 1)  # a device file may be endless
    if len(text) > LARGEST:
        raise yaml.YAMLError(f"it has more than {LARGEST:,} bytes, which no recipe needs")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise yaml.YAMLError(f"it is no text in UTF-8, by its byte {error.start + 1:,}") from error


def read_yaml(text: str) -> Any:
    """Parse YAML.

    Raises: yaml.YAMLError, also if a table repeats a key, a value contains itself, or aliases (*) expand to more than
        `MOST` values.

    >>> read_yaml("sparsity: 0.5")
    {'sparsity': 0.5}
    """
    return construct_yaml(compose_yaml(text))


def compose_yaml(text: str) -> yaml.Node | None:
    """Return the node tree of a YAML text without merging tables; None for an empty text.

    Raises: yaml.YAMLError as `read_yaml`.
    """
    try:
        tree = yaml.compose(text, yaml.SafeLoader)
        for node in walk_nodes(tree):
            if isinstance(node, yaml.MappingNode):
                _need_once(node)
        _need_few(tree)
        return tree
    except RecursionError as error:
        raise yaml.YAMLError(TOO_DEEP) from error


def construct_yaml(tree: yaml.Node | None) -> Any:
    """Return the value of a node tree, with merge keys applied.

    Raises: yaml.YAMLError for a value that does not match its tag.
    """
    try:
        return None if tree is None else _PlainLoader("").construct_document(tree)
    except RecursionError as error:
        raise yaml.YAMLError(TOO_DEEP) from error


def walk_nodes(tree: yaml.Node | None) -> Iterator[yaml.Node]:
    """Yield every node of a tree once.

    Raises: yaml.YAMLError if a node contains itself.
    """
    return iter(()) if tree is None else _walk_below(tree, (), set())


def _walk_below(node: yaml.Node, within: tuple[yaml.Node, ...], known: set[yaml.Node]) -> Iterator[yaml.Node]:
    if node in within:
        raise yaml.YAMLError(
            f"what begins in line {node.start_mark.line + 1} holds itself by an alias (*); leave that out"
        )
    if node not in known:
        known.add(node)
        yield node
        for part in _child_nodes(node):
            yield from _walk_below(part, (*within, node), known)


def _child_nodes(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _need_few(tree: yaml.Node | None) -> None:
    """Raise a TooMany error for multiplying aliases, whose values could not all be visited."""
    counts: dict[yaml.Node, int] = {}

    def count(node: yaml.Node) -> int:
        if node not in counts:
            counts[node] = 1 + sum(map(count, _child_nodes(node)))
        return counts[node]

    if tree is not None and count(tree) > MOST:
        told = f"{counts[tree]:,}" if counts[tree] < 10**15 else "more than 10^15"
        raise TooMany(f"it stands for {told} values with its aliases (*) written out, allowed are {MOST:,}")


def _need_once(table: yaml.MappingNode) -> None:
    """Raise a YAMLError for a repeated key, of which PyYAML would silently take the last."""
    said = [key.value for key, _ in table.value]
    if twice := [key for i, key in enumerate(said) if key in said[:i]]:
        raise yaml.YAMLError(f"{twice[0]} stands there twice, line {table.start_mark.line + 1} on; leave one")
