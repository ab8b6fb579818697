"""YAML 1.2 by ruamel.yaml, for recipes: no key twice, no value within itself, and a size limit."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver

LARGEST = 1_000_000  # bytes of a file: a recipe has a few thousand
MOST = 100_000  # values of a text with every alias expanded: a few hundred bytes may stand for 10^9


class BadYaml(ValueError):
    """A text that is not the YAML of a recipe: what is wrong, and the line."""


class TooManyValues(BadYaml):
    """A text that stands for too many values."""


class _PlainResolver(VersionedResolver):
    """Leave dates as text, as YAML 1.2's core schema does."""

    def add_version_implicit_resolver(self, version: Any, tag: Any, regexp: Any, first: Any) -> None:
        if not tag.endswith(":timestamp"):
            super().add_version_implicit_resolver(version, tag, regexp, first)


class _LineConstructor(SafeConstructor):
    """Report the line of a value that does not match its tag."""

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:  # of !!int x, !!bool x
            kind, line = str(node.tag).rpartition(":")[2], line_of_node(node)
            raise YAMLError(f"{node.value!r:.40} is no {kind}, line {line}; correct it, or put it in quotes") from error


def read_yaml(text: str) -> Any:
    """Parse YAML 1.2.

    Raises: BadYaml, also for a key that is there twice, a value that contains itself, or too many values.

    >>> read_yaml("{flops: 2e15, precision: no}")
    {'flops': 2000000000000000.0, 'precision': 'no'}
    """
    return construct_yaml(compose_yaml(text))


def compose_yaml(text: str) -> Node | None:
    """Return the node tree of a YAML text, with the line of each node; None for an empty text.

    Raises: BadYaml as `read_yaml`.
    """
    with _in_one_line():
        tree = _make_parser().compose(text)
        if tree is not None and (count := _count_values(tree, {})) > MOST:
            shown = f"{count:,}" if count < 10**15 else "more than 10^15"
            raise TooManyValues(f"it stands for {shown} values with its aliases (*) written out, allowed are {MOST:,}")
        return tree


def construct_yaml(tree: Node | None) -> Any:
    """Return the value of a node tree, in which tables are merged by `<<`."""
    with _in_one_line():
        return None if tree is None else _make_parser().constructor.construct_document(tree)


def read_text(path: Path) -> str:
    """Read the text of a YAML file.

    Raises: OSError; BadYaml if it is too large for a recipe, or not text.
    """
    with open(path, "rb") as file:
        text = file.read(LARGEST + 1)  # a device file may be endless
    if len(text) > LARGEST:
        raise BadYaml(f"it has more than {LARGEST:,} bytes, which no recipe needs")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadYaml(f"it is no text in UTF-8, by its byte {error.start + 1:,}") from error


class _QuotingRepresenter(SafeRepresenter):
    """Quote the texts that YAML 1.1, which other programs read, takes for true or false, such as `no`."""

    def represent_str(self, data: str) -> Node:
        style = "'" if data.lower() in ("y", "n", "yes", "no", "on", "off") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_QuotingRepresenter.add_representer(str, _QuotingRepresenter.represent_str)


def dump_yaml(table: Any) -> str:
    """Return plain values as YAML, tables in their own order.

    >>> print(dump_yaml({"precision": "no", "steps": 3}), end="")
    precision: 'no'
    steps: 3
    """
    writer, stream = YAML(typ="safe", pure=True), io.StringIO()
    writer.Representer = _QuotingRepresenter
    writer.default_flow_style = writer.representer.sort_base_mapping_type_on_output = False
    writer.dump(table, stream)
    return stream.getvalue()


def line_of_node(node: Node) -> int:
    """Return the line of a node in its text, counted from 1."""
    return int(node.start_mark.line) + 1


def child_nodes(node: Node) -> list[Node]:
    """Return the parts of a list, keys and values of a table, nothing for others."""
    if isinstance(node, MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, SequenceNode) else []


def _make_parser() -> YAML:
    parser = YAML(typ="safe", pure=True)
    parser.Resolver, parser.Constructor = _PlainResolver, _LineConstructor
    return parser


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    """Turn the errors of ruamel.yaml into a BadYaml with one line."""
    try:
        yield
    except RecursionError as error:
        raise BadYaml("lists and tables are nested too deep; leave some out") from error
    except MarkedYAMLError as error:
        raise BadYaml(f"{error.problem}, line {error.problem_mark.line + 1}") from error
    except YAMLError as error:
        raise BadYaml(" ".join(str(error).split())) from error


def _count_values(node: Node, counts: dict[Node, int]) -> int:
    """Return the number of values that a node stands for; what an alias stands for is counted once and multiplied."""
    if node in counts and not counts[node]:
        raise BadYaml(f"what begins in line {line_of_node(node)} holds itself by an alias (*); leave that out")
    if node not in counts:
        counts[node] = 0
        counts[node] = 1 + sum(_count_values(child, counts) for child in child_nodes(node))
    return counts[node]


def line_of_keys(tree: Node | None, keys: Sequence[str]) -> int:
    """Return the line of the last existing key of a path, with dashes or underscores; 0 if the first is missing.

    >>> line_of_keys(compose_yaml("steps: 3\\ntrain:\\n  batch-size: 2"), ["train", "batch_size"])
    3
    """
    line = 0
    for key in keys:
        pairs = tree.value if isinstance(tree, MappingNode) else []
        plain = str(key).replace("-", "_")
        found = [(name, value) for name, value in pairs if str(name.value).replace("-", "_") == plain]
        if not found:
            break
        line, tree = line_of_node(found[-1][0]), found[-1][1]
    return line
