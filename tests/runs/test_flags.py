"""Every flag that a message names is one that its command takes."""

import argparse
import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import sparsesoup
from sparsesoup.cli import benchmark as measuring
from sparsesoup.cli import export as exporting
from sparsesoup.cli import main as cli
from sparsesoup.cli import study_flags as study
from sparsesoup.cli.messages import DATA, as_settings
from sparsesoup.core.errors import UserError
from sparsesoup.exports import push as pushing
from sparsesoup.hub.build import ModelAndDataConfig
from sparsesoup.methods import METHODS
from sparsesoup.runs.config import parse_arguments, parser_for

ROOT = Path(sparsesoup.__file__).parent
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_.-]*(?![\w\0{])")
OTHERS = {"--force-reinstall", "--head", "--font"}  # of pip and ray; a property of the page's style
APPLY = {"--model", "--out", "--other-weights"}


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


PRUNE = set().union(*(parser_for(name).list_flags() for name in METHODS))
COMMANDS = {
    "prune": PRUNE,
    "compare": flags_of(study.study_parser()),
    "export": flags_of(exporting.export_parser()),
    "benchmark": flags_of(measuring.benchmark_parser()),
    "push": flags_of(pushing.push_parser()),
    "apply": APPLY,
    "test": {"--help"},
}


def texts(node: ast.AST) -> Iterator[str]:
    """Every string below a node but documentation; what an f-string fills in is a NUL."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for child in ast.iter_child_nodes(node):
        yield from texts(child)


def named(path: Path) -> set[str]:
    """The flags that the strings of a module name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:]
    return {flag.rstrip(".-") for text in texts(tree) for flag in FLAG.findall(text)}


def test_every_flag_that_a_message_names_exists():
    known = {flag.replace("_", "-") for flag in set().union(*COMMANDS.values())} | {"--version", "--method", "--train"}
    found = {path.relative_to(ROOT).as_posix(): named(path) for path in ROOT.rglob("*.py")}
    assert "--text-columns" in found["hub/tasks/columns.py"]
    strange = {
        name: bad
        for name, flags in found.items()
        if (bad := {flag for flag in flags if flag.replace("_", "-") not in known | OTHERS})
    }
    assert strange == {}


@pytest.mark.parametrize(
    ("folder", "command"),
    [("study", "compare"), ("exports/benchmark", "benchmark"), ("exports", "export"), ("exports/push.py", "push")],
)
def test_a_command_names_its_own_flags(folder, command):
    """And those of prune where it says so: `sparsesoup prune`."""
    for path in (
        [ROOT / folder]
        if folder.endswith(".py")
        else (ROOT / folder).rglob("*.py")
        if folder == "study"
        else (ROOT / folder).glob("*.py")
    ):
        if (folder, path.name) == ("exports", "push.py"):
            continue  # a command of its own
        text = path.read_text(encoding="utf-8")
        others = {flag for flag in named(path) if flag not in COMMANDS[command] | OTHERS}
        prunes = {
            flag for line in re.findall(r"sparsesoup prune[^`]*`|as --train", text) for flag in FLAG.findall(line)
        }
        assert others <= prunes | {"--train", "--data-root"}, path


@pytest.mark.parametrize(
    "wrong", ["--trian", "--train.help", "--methods", "--print", "--methd.scope", "--train.distil"]
)
def test_a_flag_that_is_suggested_is_a_flag(wrong):
    shown = {word for word in re.split(r"[\s\[\]]+", parser_for("isp").format_help()) if word.startswith("--")}
    with pytest.raises(UserError, match="unknown setting") as error:
        parse_arguments(["isp", f"{wrong}=1"])
    near = re.search(r"did you mean (.*?)\?", str(error.value))
    assert near
    assert {*near[1].split(" or ")} <= shown | {"--image-column"}


def test_the_column_of_images_is_suggested():
    with pytest.raises(UserError, match="did you mean --image-column "):
        parse_arguments(["isp", "--image-colum=x"])


def test_commands_without_a_flag_call_the_setting_as_a_recipe_does():
    own = {f.name for f in fields(ModelAndDataConfig)} - {"model", "dataset", "seed", "trust_remote_code"} | {
        "image_column"
    }
    assert {name.replace("-", "_") for name in DATA} == own
    said = "say --max-length 8, --label-column x, --train.learning-rate 1 or --method.scope 2:4; drop --force-reinstall"
    assert as_settings("prune", said) == as_settings("apply", said) == said
    assert as_settings("compare", said) == said.replace("--max-length", "max_length")
    assert as_settings("test", said) == said.replace("--max-length", "max_length").replace("--label-c", "label_c")


def test_the_command_line_does_so(tmp_path, capsys):
    recipe = tmp_path / "study.yaml"
    recipe.write_text("models: minilm\nmethods: [dense]\nsteps: 1\nmax_length: 4000\n")
    assert cli.main(["compare", "--config", str(recipe), "--out", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert "line 4" in said
    assert "say max_length" in said
    assert "--max-length" not in said
