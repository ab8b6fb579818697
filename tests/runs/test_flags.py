"""Every flag that a message names is one that its command takes."""

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparsesoup
from sparsesoup.cli.main import COMMANDS, load_command, main
from sparsesoup.cli.prune import parse_arguments, settings_parser
from sparsesoup.core.errors import UserError
from sparsesoup.core.settings import flag_of
from sparsesoup.methods import METHODS

ROOT = Path(sparsesoup.__file__).parent
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_.-]*(?![\w\0{])")
OTHERS = {"--force-reinstall", "--head", "--font"}  # of pip and ray; a property of the page's style


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


FLAGS = {name: flags_of(load_command(name).parser()) for name in COMMANDS if name != "prune"}
FLAGS["prune"] = set().union(*(flags_of(settings_parser(name)) for name in METHODS))


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
    known = set().union(*FLAGS.values()) | {"--version"}
    found = {path.relative_to(ROOT).as_posix(): named(path) for path in ROOT.rglob("*.py")}
    assert "--to" in found["cli/exports.py"]
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
        others = {flag for flag in named(path) if flag not in FLAGS[command] | OTHERS}
        prunes = {
            flag for line in re.findall(r"sparsesoup prune[^`]*`|as --train", text) for flag in FLAG.findall(line)
        }
        assert others <= prunes | {"--train", "--data-root"}, path


@pytest.mark.parametrize("wrong", ["--model-name", "--method.stage", "--save-ever", "--methd.stages", "--train.distil"])
def test_a_flag_that_is_suggested_is_a_flag(wrong):
    with pytest.raises(UserError, match="unknown setting") as error:
        parse_arguments(["isp", f"{wrong}=1"])
    assert error.value.near
    assert {flag_of(name) for name in error.value.near} <= flags_of(settings_parser("isp"))


def test_the_column_of_images_is_suggested():
    with pytest.raises(UserError, match="did you mean image_column "):
        parse_arguments(["isp", "--image-colum=x"])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err.removeprefix("sparsesoup: ")


def test_an_error_calls_its_setting_as_the_front_end_does(tmp_path, capsys):
    """A flag on the command line, line and key in a recipe, a keyword in Python."""
    (tmp_path / "recipe.yaml").write_text("method: isp\ntrain:\n  batch-size: 0\n")
    said = "must be at least 1, got 0\n"
    assert refused(capsys, "prune", "isp", "--train.batch-size", 0) == f"--train.batch-size: {said}"
    place = f"{tmp_path / 'recipe.yaml'}, line 3: train.batch_size: "
    assert refused(capsys, "prune", "--config", tmp_path / "recipe.yaml") == place + said
    with pytest.raises(UserError, match=r"^train\.batch_size: must be at least 1, got 0$") as error:
        sparsesoup.prune("isp", train={"batch_size": 0})
    assert error.value.field == "train.batch_size"
    both = ["--config", tmp_path / "recipe.yaml", "--train.batch-size", -1]  # what is wrong is the flag
    assert refused(capsys, "prune", *both) == "--train.batch-size: must be at least 1, got -1\n"
    (tmp_path / "study.yaml").write_text("methods: [dense]\nmodels: minilm\nsteps: 1\nmax_length: 4000\n")
    line = refused(capsys, "compare", "--config", tmp_path / "study.yaml", "--out", tmp_path / "runs")
    assert line.startswith(f"{tmp_path / 'study.yaml'}, line 4: max_length: 4000 is above")


def test_a_value_of_another_type_is_told_from_python_by_its_keyword():
    for given, field in (
        ({"steps": "5"}, "steps"),
        ({"method": {"protocols": [{"rate": "x"}]}}, "method.protocols[0].rate"),
    ):
        with pytest.raises(UserError, match=r"expected a (whole )?number") as error:
            sparsesoup.prune("isp", **given)
        assert error.value.field == field
