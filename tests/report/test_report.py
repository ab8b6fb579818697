"""The report: self-contained, true to its input, safe with any name, the same for the same run."""

import html
import io
import json
import re
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparsesoup.core.errors import UserError
from sparsesoup.methods import METHODS
from sparsesoup.report.format import describe_notes, run_warnings
from sparsesoup.report.run_page import write_report
from sparsesoup.report.terminal import (
    format_main_score,
    read_report,
    run_headline,
    show_run,
    sparsity_grid,
)
from sparsesoup.training.cost import label_name
from tiny_reports import cost, write_run


def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def shown(run: Path, **settings: Any) -> str:
    out = io.StringIO()
    show_run(run, Console(file=out, width=80, **settings))
    return out.getvalue()


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and the ones left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("method", ["isp", "imp", "dense"])
def test_a_page_needs_nothing_but_itself(tmp_path: Path, method: str) -> None:
    write_run(tmp_path, method)
    text = page(tmp_path)
    assert not re.findall(r"(?:https?:)?//[a-z]\S*", re.sub(r'xmlns(:\w+)?="[^"]*"', "", text))
    tags = Tags(text)
    assert not tags.open + [tag for tag, _ in tags.tags if tag in ("link", "img", "image", "iframe", "object")]
    links = [v for _, a in tags.tags for k, v in a.items() if k in ("src", "href", "xlink:href") and v]
    assert all(link.startswith("#") for link in links)
    ids = [a["id"] for _, a in tags.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links} | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)


def test_the_page_shows_the_numbers_of_its_input(tmp_path: Path) -> None:
    facts = write_run(tmp_path, test={"matthews": 0.3914})
    text = page(tmp_path)
    tables = html.unescape(re.sub(r"<[^>]+>", " ", text))
    for number in (90, facts["cost"]["weak"]["examples"], facts["cost"]["main"]["tokens"], facts["sparsity"]["kept"]):
        assert re.search(rf"(?<![\d,.]){number:,}(?![\d,.])", tables), number
    assert {"7696", "0.000325"} <= set(re.findall("<dd>(.*)</dd>", text))
    for words in ("0.413 matthews on validation, 0.391 matthews on test", "25.0 %", "94.2 %", "1.41 %", "24.0 % of T"):
        assert words in tables, words
    # 90 main and 24 weak steps cost the same each, and T = 120: 114 / 120.
    assert "training cost 0.95 times a dense run" in tables
    assert re.search(r"main training\s+90\s.*\s630 GFLOP\s+27.9 s", tables, re.DOTALL)
    assert "840 GFLOP, 1.00 \N{MULTIPLICATION SIGN}" in tables
    assert "IMP, 12 trainings, estimated" in tables
    assert "10.1 TFLOP, 12.00 \N{MULTIPLICATION SIGN}" in tables


def test_every_matrix_is_in_the_heat_map_and_the_sparsest_is_named(tmp_path: Path) -> None:
    facts = write_run(tmp_path)
    text = page(tmp_path)
    for matrix in facts["matrices"]:
        assert f">{100 * (1 - matrix['kept'] / matrix['total']):.1f}</text>" in text
    assert "Of the sparsest matrix, bert.encoder.layer.2.attention.self.query.weight, 92.0 % are pruned" in text


def test_matrices_without_layer_or_role_become_bars(tmp_path: Path) -> None:
    parts = [{"name": f"block{i}.weight", "role": "other", "kept": i, "total": 100} for i in range(1, 61)]
    write_run(tmp_path, matrices=parts)
    text = page(tmp_path)
    assert sparsity_grid(parts) == {}
    assert "93.0 %</span>" in text
    assert "40 of 60 are shown" in text
    assert 'aria-label="Sparsity by layer and role"' not in text
    write_run(tmp_path, matrices=[parts[0] | {"name": "deep." * 30 + "weight"}])
    assert "".join(shown(tmp_path).replace("99.0 %", "").split()).count("deep.") == 30  # folded, not cut


def test_towers_are_kept_apart_and_experts_together() -> None:
    rows = {"text.layers.0.q": 1, "vision.layers.0.q": 2, "vision.layers.1.e.0.q": 3, "vision.layers.1.e.1.q": 5}
    table = sparsity_grid([{"name": name, "role": "query", "kept": kept, "total": 10} for name, kept in rows.items()])
    assert table == {"text 0": {"query": 0.9}, "vision 0": {"query": 0.8}, "vision 1": {"query": 0.6}}


def test_names_are_text_not_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>[red]&amp;"
    parts = [{"name": f"{evil}.{i}.w", "role": f"{evil}$", "kept": i, "total": 9} for i in range(2)]
    notes = {"stages": [], evil: [evil], "budget": [evil]}
    facts = {"dataset": evil, "model": evil, "method": evil, "head": evil, "command": evil, "machine": evil}
    write_run(tmp_path, **facts, matrices=parts, notes=notes, settings={evil: evil}, validation={evil: 0.5})
    text = page(tmp_path)
    assert len(re.findall("<script", text)) == 1  # the copy button's own
    assert "alert(1)" in text
    assert Tags(text).open == []
    assert "".join(run_headline(read_report(tmp_path)).split()) in "".join(shown(tmp_path).split())


def test_a_dense_run_has_no_soup_no_heat_map_and_no_comparison(tmp_path: Path) -> None:
    write_run(tmp_path / "isp")
    write_run(tmp_path / "dense", "dense")
    soup, dense = page(tmp_path / "isp"), page(tmp_path / "dense")
    for words in ("<h2>The soup</h2>", "Sparsity by layer and role", "estimated</span>"):
        assert words in soup
        assert words not in dense
    assert "Nothing is pruned: all 2,654,208 prunable weights are kept." in dense
    assert "eak masks" not in shown(tmp_path / "dense")


EARLY = {"method": {"measure": "hamming", "threshold": 0.1}}
CHECKS = [{"step": 9, "hamming": [], "kept-sets": []}, {"step": 18, "hamming": [0.012, 0.034], "kept-sets": [0.2, 0.3]}]
POOL = [{"sparsity": 0.488, "share": 0.3, "score": 0.8, "accepted": True},
        {"sparsity": 0.92, "share": 0.1, "score": 0.7, "accepted": False}]  # fmt: skip
UNTAUGHT = {"teacher": "", "alpha": 0.5, "temperature": 2.0, "hidden": 0.0, "attention": 0.0}
TAUGHT = {"teacher": "dense", "alpha": 0.9, "temperature": 2.0, "hidden": 0.5}


@pytest.mark.parametrize(
    ("notes", "settings", "said"),
    [
        ({"threshold_sparsity": 0.7561}, {}, "alone gave a sparsity of 75.6 %; the masks were then trimmed to"),
        (
            {"threshold_sparsity": 0.523, "refill": {"before": 0.602, "after": 0.445, "steps": 24}},
            {},
            "alone gave a sparsity of 52.3 %; the masks were then trimmed to 60.2 %.",
        ),
        (
            {"early_bird": {"fired": 18, "checks": CHECKS}},
            EARLY,
            "settled at step 18 of the search, at its check number 2",
        ),
        ({"early_bird": {"fired": None, "checks": CHECKS}}, EARLY, "The budget of the search ended after 2 masks"),
        ({"pool": {"own": 0.7, "score": 0.8, "visited": POOL}}, {}, "1 accepted (0.3 of the one at 48.8 %)"),
        ({"soup": {"members": [0.5, 0.75], "taken": [1]}}, {}, "0.5000, 0.7500; averaged: number 2."),
        ({"soup": {"score": 0.8, "forks": [{"sparsity": 0.1, "share": 0.3, "score": 0.8}]}}, {}, "0.3 (10 % pruned)"),
        (
            {"teachers": [{"step": 6, "sparsity": 0.0, "f1": 0.8, "teaches": True}]},
            {},
            "step 6 (0.0 % pruned, f1 0.8000)",
        ),
        ({"phases": [0.5, 0.75]}, {}, "Sparsity of the phases: 50.0 %, 75.0 %."),
        (
            {"heads_and_rows": 0.4375},
            {},
            "43.8 % of the weights are pruned as whole heads and rows, which can be cut out",
        ),
        ({}, {"train": {"distill": TAUGHT}}, "Distilled from a dense run with the same settings: 90.0 % of the loss"),
    ],
)
def test_what_a_method_noted_is_said_in_a_sentence(tmp_path: Path, notes: Any, settings: Any, said: str) -> None:
    write_run(tmp_path, notes=notes, settings=settings)
    text = html.unescape(page(tmp_path))
    assert said in text
    assert "<dt>" + next(iter(notes), "none") not in text  # not a second time, as a bare fact
    assert said in " ".join(shown(tmp_path).split())
    if "early_bird" in notes:
        assert re.findall(r"<td>18</td><td>(.*?)</td><td>(.*?)</td>", text) == [("0.0340", "0.3000")]


def progressive(teacher: str, **settings: float) -> str:
    method = {
        "name": "sparse-progressive-distillation",
        **asdict(METHODS["sparse-progressive-distillation"]),
        **settings,
    }
    train = {"distill": UNTAUGHT | {"teacher": teacher}}
    (line,) = describe_notes({"notes": {}, "cost": {}, "settings": {"method": method, "train": train}})[0]
    return line


def test_the_loss_of_progressive_distillation_is_its_own_not_that_of_the_settings_of_distillation() -> None:
    line = progressive("dense", temperature=4.0, hidden=3.0)
    assert line.startswith("Distilled from a dense run with the same settings, without labels: ")
    assert "divergence from its outputs at temperature 4, plus 3 times the squared error of the block outputs" in line
    assert "plus 1 times the squared error of the attention maps" in line
    assert "50.0 %" not in line
    assert "task loss" not in line
    bare = progressive("", hidden=0.0, attention=0.0)
    assert "Distilled from the model that the run fine-tuned before" in bare
    assert "at temperature 1. " in bare


GATES = {
    "mlpruning": ("leave out --method.strength, so that the shares follow the sparsity",) * 2,
    "l0": (
        "raise --steps, or lower --method.score-rate (now 0.1)",
        "raise --method.score-rate (now 0.1) or --steps",
    ),
    "magnitude-ste": ("set a lower --method.every-steps (now 10)",) * 2,
}


@pytest.mark.parametrize("name", GATES)
def test_the_remedy_for_gates_goes_the_way_that_they_missed(name: str) -> None:
    train = {"batch_size": 8, "gradient_accumulation_steps": 1}
    method = asdict(METHODS[name]) | ({"strength": 20_000.0} if name == "mlpruning" else {})
    facts = {"settings": {"method": method, "train": train}, "sparsity": {"target": 0.5, "reached": 0.5}}
    much, little = (run_warnings(facts | {"notes": {"threshold_sparsity": alone}}) for alone in (0.764, 0.404))
    assert len(much) == len(little) == 1
    assert "closed 76.4 % of the weights instead of 50.0 %, and trimming restored weights that" in much[0]
    assert much[0].endswith(f": {GATES[name][0]}")
    assert little[0].endswith(f"and the rest of the mask was made by trimming: {GATES[name][1]}")
    assert not run_warnings(facts | {"notes": {"threshold_sparsity": 0.51}})
    facts["settings"]["method"]["penalty"] = 400.0
    for alone in (0.764, 0.404):
        (line,) = run_warnings(facts | {"notes": {"threshold_sparsity": alone}})
        assert line.endswith("leave out --method.penalty, so that it is adapted to the sparsity")


@pytest.mark.parametrize("key", ["early_bird", "pool", "soup", "teachers", "threshold_sparsity", "heads_and_rows"])
def test_a_note_of_another_form_is_shown_as_it_is(tmp_path: Path, key: str) -> None:
    for value in ({"at": 77}, {"checks": [], "fired": 1}, [77], [], "77", None):
        write_run(tmp_path, notes={key: value})
        assert f"<dt>{key}" in page(tmp_path)
        assert shown(tmp_path)


def test_every_label_of_the_cost_has_a_name_and_a_colour_of_its_own(tmp_path: Path) -> None:
    labels = ("main", "weak", "search", "score", "teacher")
    write_run(tmp_path, cost={label: cost(60) for label in (*labels, "validation")})
    text = page(tmp_path)
    for label in labels:
        assert f'class="{label}"' in text
        assert f"<b>{label_name(label)}</b>: " in text
        assert text.count(f"--{label}: #") == 2  # light and dark
    assert 'class="other"' not in text


def test_a_dense_teacher_is_the_measure_of_a_dense_run(tmp_path: Path) -> None:
    """A student's step has the teacher's forward pass in it, which no dense run has."""
    write_run(tmp_path, cost={"main": cost(120) | {"flops": 120 * 9e9}, "teacher": cost(120)})
    assert "training cost 2.29 times a dense run" in run_headline(read_report(tmp_path))


def test_stages_without_weak_masks_are_no_soup_and_unknown_notes_are_listed(tmp_path: Path) -> None:
    stage = {"step": 5, "sparsity": 0.5, "weak_masks": 0, "changed": 0.0}
    write_run(tmp_path, notes={"stages": [stage], "stopped_early": {"at": 77}})
    assert "<h2>The soup</h2>" not in page(tmp_path)
    assert "<dt>stopped_early</dt><dd>{&#34;at&#34;: 77}</dd>" in page(tmp_path)
    write_run(tmp_path, notes={"stages": [stage | {"weak_masks": 1}]})
    assert "<h2>The soup</h2>" in page(tmp_path)


def test_the_same_run_gives_the_same_bytes_in_another_process_that_needs_no_matplotlib(tmp_path: Path) -> None:
    """Another process has other hash seeds, and it is another time."""
    runs = [tmp_path / method for method in ("isp", "imp")]
    for run in runs:
        run.mkdir()
        write_run(run, run.name)
    pages = [write_report(run).read_bytes() for run in runs]
    code = (
        "import pathlib, sys, sparsesoup.report.run_page as r\nassert 'matplotlib' not in sys.modules\n"
        "for name in sys.argv[1:]: r.write_report(pathlib.Path(name))"
    )
    subprocess.run([sys.executable, "-c", code, *map(str, runs)], check=True)
    assert [(run / "report.html").read_bytes() for run in runs] == pages


def test_a_torn_or_missing_log_is_said_not_fatal(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "log.jsonl").write_text((tmp_path / "log.jsonl").read_text() + '{"step": 1, "la')
    assert "1 lines of log.jsonl could not be read" in page(tmp_path)
    (tmp_path / "log.jsonl").unlink()
    assert "There is no log of the steps." in page(tmp_path)


def test_several_test_sets_are_all_shown(tmp_path: Path) -> None:
    scores = {"matched": {"accuracy": 0.7123}, "mismatched": {"accuracy": 0.7051}}
    facts = write_run(tmp_path, validation={"accuracy": 0.72}, test=scores)
    assert format_main_score(scores) == "0.712 accuracy (matched) and 0.705 accuracy (mismatched)"
    assert format_main_score({"accuracy": 0.8, "f1": 0.9}) == "0.800 accuracy"
    assert format_main_score(scores) in run_headline(facts)
    assert "0.7051" in page(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff", "{}", '{"format": 2}', "null", "1e999"])
def test_a_damaged_report_is_one_line_that_names_path_and_remedy(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text, errors="surrogateescape")
    for act in (read_report, write_report, shown):
        with pytest.raises(UserError) as caught:
            act(tmp_path)
        assert str(tmp_path / "report.json") in str(caught.value)
        assert "run `prune` again" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2}, {"sparsity": {"target": 0.9}}, {"cost": {"main": {"steps": 1}}}, {"matrices": []},
        {"matrices": [{"name": "w", "role": "other", "kept": 0, "total": 0}]}, {"validation": {}}, {"steps": "many"},
        {"validation": {"matthews": None}}, {"test": {"matched": {"accuracy": "good"}}}, {"notes": {"stages": [1]}},
    ],
)  # fmt: skip
def test_a_report_that_lacks_something_is_damaged(tmp_path: Path, changes: dict[str, Any]) -> None:
    facts = write_run(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(facts | changes))
    with pytest.raises(UserError, match="damaged report"):
        read_report(tmp_path)


def test_no_report_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^no .*report\.json: give the directory of a finished run"):
        show_run(tmp_path / "nowhere", Console(file=io.StringIO()))


@pytest.mark.parametrize("method", ["isp", "imp", "dense"])
def test_the_terminal_fits_80_columns_and_a_pipe_has_no_colours(tmp_path: Path, method: str) -> None:
    facts = write_run(tmp_path, method, layers=12, cost={"main": cost(123_456, 512), "validation": cost(0)})
    out = shown(tmp_path)
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert "123,456" in out
    assert "…" not in out
    for matrix in facts["matrices"] if method != "dense" else []:
        assert f"{100 * (1 - matrix['kept'] / matrix['total']):.1f}" in out
    assert "\x1b" in shown(tmp_path, force_terminal=True)
