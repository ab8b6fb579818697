"""What labels, columns and folders are called is shown, and commands neither a terminal, nor a card, nor a page."""

import csv
import html
import os
import re
import shutil
import subprocess

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.table import Table
from rich.text import Text

from sparsesoup.cli.main import main
from sparsesoup.report.escaping import (
    CONTROL,
    SafeConsole,
    command_line,
    escape_markdown,
    fenced_code,
    markdown_code,
    markdown_prose,
    printable_line,
    shell_command,
)
from sparsesoup.report.model_card import render_model_card
from sparsesoup.study.results.scores import score_table
from sparsesoup.study.results.tables import latex_table
from sparsesoup.study.results.tables import markdown_table as study_table
from tiny_hub import run_of, sentences

pytestmark = pytest.mark.integration

ESCAPE = "\x1b[31m"
HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(2)>", f"{ESCAPE}red", "\x9b31mred", "a | b || c",
    "neg\n# head", "neg\r\n\r\n---\nlicense: mit\n---", "```\n# out", "`` a `", "[l](javascript:alert(1))",
    "![i](http://x/y.png)", "&lt;b&gt; &#60;", "\\| \\` \\", "\u202egnp.exe", "**x** __y__ ~~z~~", "a\u2028b", "\x00",
    "- x", "# x", "1. x", "> x", "$x$", "    four", "</code><b>", "<!-- -->", "\x07\x08",
]  # fmt: skip
CELLS = {"table", "thead", "tbody", "tr", "th", "td"}
TABLES = MarkdownIt("commonmark").enable(["table", "strikethrough"])
names = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=20), st.lists(st.sampled_from(HOSTILE)).map(" ".join))


def shown(rendered):
    """The text of a piece of HTML as a reader sees it."""
    return bare(html.unescape(rendered))


def bare(text):
    return re.sub(r"[\s`]", "", text)


def tags(rendered):
    return set(re.findall(r"<\s*[/!]?\s*(\w+)", rendered))


@given(names)
def test_a_cell_of_a_table_shows_its_text_and_nothing_else(text):
    for cell, inside in (
        (escape_markdown(text), set()),
        (markdown_code(text), {"code"}),
        (markdown_prose(text), {"code"}),
    ):
        assert not CONTROL.search(cell)
        rendered = TABLES.render(f"| x | y |\n|---|---|\n| a{cell}z | b |\n")
        assert tags(rendered) <= CELLS | inside
        found = re.findall(r"<td>(.*?)</td>", rendered, re.S)
        assert len(found) == 2, rendered
        plain = re.sub(r"</?code>", "", found[0])
        assert shown(plain) == bare(f"a{printable_line(text)}z")


@given(names)
def test_a_line_of_its_own_is_no_heading_list_or_page_of_another(text):
    rendered = TABLES.render(f"- {escape_markdown(text)}.\n\nx {escape_markdown(text)} y\n")
    assert tags(rendered) <= {"ul", "li", "p"} | ({"ol", "pre", "code"} if re.match(r"\s|\d+[.)]", text) else set())


@given(names)
def test_nothing_ends_a_block_of_code(text):
    rendered = TABLES.render(f"{fenced_code(text, 'sh')}\n\nafter\n")
    assert rendered.count("<pre>") == 1
    assert rendered.endswith("</pre>\n<p>after</p>\n")


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_a_command_line_is_one_line_that_a_shell_reads_back():
    words = [*(text for text in HOSTILE if "\0" not in text), "it's", "caf\xe9", os.fsdecode(b"\xff\xfe")]
    line = shell_command(words)
    assert not CONTROL.search(line)
    assert not re.search("[`<]", line)
    said = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True).stdout
    assert said.split(b"\0")[:-1] == [os.fsencode(word) for word in words]
    assert command_line("sparsesoup show 'a b'") == "sparsesoup show 'a b'"
    assert command_line(f"show '{ESCAPE}") == "show '\\x1b[31m"  # no command line, as of a damaged report


@pytest.fixture(scope="module")
def hostile(place, tmp_path_factory):
    """A finished run whose labels, column and folders are called so."""
    folder = tmp_path_factory.mktemp(f"in{ESCAPE}")
    (folder / "rows").mkdir()
    for name, count in (("train", 60), ("test", 24)):
        with open(folder / "rows" / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            rows = [
                (text, "\n".join(HOSTILE[4 * good : 8 + 4 * good]).replace("\r", "")) for text, good in sentences(count)
            ]
            csv.writer(file).writerows([(f"te{ESCAPE}<b>", "label"), *rows])
    line = ["prune", "magnitude", "--model", place / "bert", "--dataset", folder / "rows", "--sparsity", "0.7"]
    assert main([*map(str, line), "--steps", "8", "--train.batch-size", "8", "--out", str(folder / "out")]) == 0
    return run_of(folder / "out")


def test_a_card_of_hostile_labels_has_its_own_sections_and_tables_alone(hostile, tmp_path):
    assert main(["push", str(hostile), "me/x", "--dry-run", "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert not CONTROL.search(text.replace("\n", ""))
    rendered = TABLES.render(ModelCard(text).text)
    assert tags(rendered) <= {"h1", "h2", "p", "code", "pre", "em", "strong", "ul", "li", *CELLS}
    assert re.findall(r"<h[12]>(.*)</h", rendered) == ["x", "Scores", "Cost", "Load", "Masks", "Repeat"]
    assert "&lt;script&gt;" in text
    assert all(row.count("<td") == 2 for row in re.findall(r"<tr>.*?</tr>", rendered.split("<h2>")[0], re.S)[1:])


@given(text=names)
def test_a_card_stays_itself_whatever_its_facts_are_called(text):
    facts = {
        "model": text, "method": text, "dataset": text, "task": text, "validation": {text or "x": 0.5}, "local": [text],
        "test": {text or "x": 0.5}, "versions": {text: text}, "command": shell_command(["sparsesoup", text]),
        "settings": {},
    }  # fmt: skip
    form = {"to": text, "notes": [text], "sizes": {}, "load": text, "files": []}
    made = render_model_card(facts, form, {"architectures": [text]}, "me/x", text)
    assert not CONTROL.search(made.replace("\n", ""))
    rendered = TABLES.render(ModelCard(made).text)
    assert re.findall(r"<h[1-6]>(.*)</h", rendered) == ["x", "Scores", "Cost", "Load", "Masks", "Repeat"]
    assert not {"script", "img", "a", "b", "blockquote"} & tags(rendered)
    assert {"license", "tags", "model-index"} <= ModelCard(made).data.to_dict().keys()
    assert ModelCard(made).data.license == printable_line(text)


def test_no_escape_sequence_reaches_the_terminal(hostile, capsys, tmp_path):
    for line in (["show", hostile], ["test", hostile], ["show", f"no{ESCAPE}\n\udcff"], [f"bad{ESCAPE}"],
                 ["prune", f"x{ESCAPE}"], ["prune", "magnitude", f"--x{ESCAPE}=1"], ["methods", f"y{ESCAPE}"],
                 ["push", hostile, f"me/{ESCAPE}"], ["compare", "--config", f"{ESCAPE}.yaml"], ["export", "x", ESCAPE],
                 ["prune", "magnitude", "--model", tmp_path / ESCAPE],
                 ["benchmark", "--backends", ESCAPE, "x"]):  # fmt: skip
        main([str(word) for word in line])
        said = capsys.readouterr()
        assert not CONTROL.search((said.out + said.err).replace("\n", "")), line


def test_a_terminal_has_its_own_colours_and_nobody_elses(hostile, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["show", str(hostile)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b[1m" in shown  # ours: bold
    assert "\x1b[31m" not in shown
    assert "\\x1b[31m" in shown


def test_a_table_on_a_terminal_shows_all_of_a_cell(capsys):
    table = Table(box=None)
    table.add_column("name", overflow="fold")
    table.add_row(Text(f"{ESCAPE}abcdef"))
    SafeConsole(width=40).print(table)
    assert "".join(capsys.readouterr().out.split()) == "name\\x1b[31mabcdef"


def test_pages_have_no_control_characters_and_no_tags_of_others(hostile):
    page = (hostile / "report.html").read_text(encoding="utf-8")
    assert not CONTROL.search(page.replace("\n", ""))
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_tables_of_a_study_show_rows_and_datasets_as_they_are_called():
    cost = {"main": {"flops": 1.0}}
    records = [
        {"model": "m", "dataset": name, "target": 0.5, "row": name, "seed": 0, "method": "isp", "cost": cost,
         "test": {"accuracy": 0.5}, "validation": {"accuracy": 0.5}}
        for name in HOSTILE
    ]  # fmt: skip
    found = score_table(records)
    text = study_table(found)
    assert not CONTROL.search(text.replace("\n", ""))
    rendered = TABLES.render(text)
    assert tags(rendered) <= CELLS | {"p", "strong"}
    assert rendered.count("<tr>") == 1 + len(HOSTILE)
    assert len(latex_table(found).splitlines()) == 7 + len(HOSTILE)
