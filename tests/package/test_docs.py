"""What the documents say can be run: Python compiles and finds its names, command lines parse, run paths exist."""

import ast
import contextlib
import importlib
import inspect
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

import sparsesoup
from sparsesoup.cli.main import load_command
from sparsesoup.cli.prune import parse_arguments
from sparsesoup.methods import TABLE
from sparsesoup.runs.config import method_named
from sparsesoup.runs.run import fill_default_sparsity
from sparsesoup.study.recipe.plan import read_plan

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md",
                    *(ROOT / "docs").rglob("*.md")])  # fmt: skip
GENERATED = ("api.md", "cli.md", "changelog.md")  # pages that docs/gen_pages.py writes
EXAMPLES = {"methods/two_step.py", "tests/methods/test_two_step.py"}  # files that a reader would write
WIDTH = 100  # of a line of prose; tables, code and generated tables are as wide as they are
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def blocks(text):
    """(language, code) of every block, fenced or indented."""
    yield from FENCE.findall(text)
    for indented in re.findall(r"(?:^(?: {4}|\t).*\n|^\n)+", FENCE.sub("", text), re.M):
        if indented.strip():
            yield "", re.sub(r"^(?: {4}|\t)", "", indented, flags=re.M)


def snippets():
    found = []
    for path in DOCUMENTS:
        code = [code for language, code in blocks(path.read_text(encoding="utf-8")) if language in ("python", "py")]
        found += [pytest.param(snippet, id=f"{path.name}-{i}") for i, snippet in enumerate(code)]
    return found


def commands():
    found = []
    for path in DOCUMENTS:
        text = "\n".join(code for _, code in blocks(path.read_text(encoding="utf-8"))).replace("\\\n", " ")
        for line in re.findall(r"^\s*(?:\$ )?(sparsesoup .*)$", text, re.M):
            # A synopsis shows what may be left out in brackets; that is no command.
            if not re.search(r"[\[\]…]|\.\.\.| \| ", line):
                found.append(pytest.param(line, id=f"{path.name}: {' '.join(line.split())[:60]}"))
    return found


def test_the_readme_has_python_and_commands():
    ids = [str(p.id) for p in snippets() + commands()]
    assert any(name.startswith("README.md-") for name in ids)
    assert sum(name.startswith("README.md: sparsesoup prune") for name in ids) >= 2


@pytest.mark.parametrize("code", snippets())
def test_python_in_the_documents_compiles_and_imports_what_there_is(code):
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("sparsesoup", "transformers"):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("line", commands())
def test_command_lines_in_the_documents_parse(line):
    line = line.partition(" > ")[0]  # where a shell writes what the command prints
    words = [word for word in shlex.split(line, comments=True)[1:] if word != "METHOD"]
    with pytest.raises(SystemExit) if "--help" in words else contextlib.nullcontext():
        command = load_command(words[0])
        # Not `parse` of compare, which looks for the cluster that a command names.
        parse = command.parser().parse_args if words[0] == "compare" else command.parse_words
        found = parse(words[1:])
        if words[0] == "methods" and found.NAME:
            method_named(found.NAME)


def test_every_make_command_that_the_documents_name_is_there():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    named = {name for text in texts for name in re.findall(r"(?:`|^ {4})make ([\w-]+)", text, re.M)}
    assert {"demo", "test", "bench", "tables"} <= named <= targets


def test_the_run_directories_in_the_documents_are_those_that_the_commands_write():
    written = set()
    for param in commands():
        words = shlex.split(str(param.values[0]), comments=True)[1:]
        if words[0] == "prune" and "--help" not in words and "METHOD" not in words and "--config" not in words:
            settings = fill_default_sparsity(parse_arguments(words[1:])[0])
            written.add(f"{settings.name}-{settings.run_key()}")
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        assert {*re.findall(r"runs/[\w./-]*?/([a-z-]+-[0-9a-f]{10})/seed-\d+", text)} <= written, path


MARKED = re.compile(r"<!-- (?!end )([\w-]+) -->\n(.*?)<!-- end -->", re.DOTALL)


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if "<!-- end -->" in p.read_text(encoding="utf-8")])
def test_every_table_is_what_the_committed_results_give(path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    found, text = importlib.import_module("tables").pieces(), path.read_text(encoding="utf-8")
    marked = dict(MARKED.findall(text))
    assert len(marked) == text.count("<!-- end -->")
    assert {name: shown.rstrip("\n") for name, shown in marked.items()} == {name: found[name] for name in marked}
    assert all(shown.strip() for shown in marked.values())


def test_the_recipe_in_the_guide_to_studies_is_one(tmp_path, monkeypatch, place):
    """Its data and model are replaced by ones that are here; all else is read as it stands."""
    code = next(
        c for n, c in blocks((ROOT / "docs" / "guides" / "studies.md").read_text(encoding="utf-8")) if n == "yaml"
    )
    (tmp_path / "study.yaml").write_text(code)
    changes = {"models": str(place / "bert"), "datasets": [str(place / "reviews")]}
    plan = read_plan(tmp_path / "study.yaml", changes)
    assert len(plan.trials) == 3 * (2 + 3 * 2)


def test_scripts_and_extras_that_the_documents_name_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        scripts = re.findall(r"python (?:-m )?((?:benchmarks|examples|tests)/[\w/]+\.py)", text)
        assert all((ROOT / script).is_file() for script in scripts), (path.name, scripts)
        named = {name for names in re.findall(r"(?:sparsesoup|'\.)\[([\w,]+)\]", text) for name in names.split(",")}
        assert named <= extras.keys(), (path.name, named)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_prose_is_wrapped_and_tables_of_settings_parse(path):
    text = path.read_text(encoding="utf-8")
    for language, code in blocks(text):
        if language in ("toml", "yaml"):
            assert tomllib.loads(code) if language == "toml" else yaml.safe_load(code)
    prose = MARKED.sub("", FENCE.sub("", text))
    assert [line for line in prose.splitlines() if len(line) > WIDTH and not line.startswith(("|", "    "))] == []


def test_source_files_that_the_documents_name_exist():
    packages = "|".join(path.name for path in (ROOT / "src" / "sparsesoup").iterdir() if path.is_dir())
    for path in DOCUMENTS:
        text = re.sub(r"\s+", " ", FENCE.sub("", path.read_text(encoding="utf-8")))
        named = re.findall(rf"`(?:src/sparsesoup/)?((?:{packages})/[\w/]+\.py)`", text)
        missing = [name for name in named if not (ROOT / "src" / "sparsesoup" / name).exists()]
        missing += [name for name in re.findall(r"`((?:tests|docs)/[\w/]+\.\w+)`", text) if not (ROOT / name).exists()]
        assert {*missing} <= EXAMPLES, path.name


def test_every_public_name_is_in_the_api_page():
    script = ast.parse((ROOT / "docs" / "gen_pages.py").read_text(encoding="utf-8"))
    (groups,) = (n.value for n in script.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "API")
    named = [name for names in ast.literal_eval(groups).values() for name in names.split()]
    methods = {type(row.method).__name__ for row in TABLE.values()}
    assert sorted({*named} | (methods & {*sparsesoup.__all__}) | {"__version__"}) == sorted(sparsesoup.__all__)


def test_the_documents_count_the_methods():
    for name in ("README.md", "docs/index.md"):
        text = " ".join((ROOT / name).read_text(encoding="utf-8").split())
        assert f"and {len(TABLE) - 1} other methods and baselines" in text, name
    assert f"{len(TABLE)} pruning methods and baselines" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_links_between_the_documents_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if "://" not in target and target not in GENERATED:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_no_example_of_the_reference_reads_as_a_link() -> None:
    """A list below a list in brackets is a reference to mkdocstrings, at which a strict build stops."""
    public = [getattr(sparsesoup, name) for name in sparsesoup.__all__]
    members = [m for each in public if isinstance(each, type) for m in vars(each).values() if callable(m)]
    texts = [(each, inspect.getdoc(each) or "") for each in (*public, *members)]
    assert sum(">>>" in text for _, text in texts) > 10
    assert [each for each, text in texts if re.search(r">>> \[.*\]\n\[", text)] == []
