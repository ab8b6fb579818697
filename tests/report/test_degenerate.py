"""A run that has learnt nothing, or has nothing left in a part of the model, says so; an ordinary one does not."""

import csv
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsesoup.cli.main import main
from sparsesoup.report.degenerate import degenerate_warnings
from sparsesoup.training.answer_stats import FEW, answer_statistics
from tiny_hub import run_of, sentences

RATE = ["--train.learning-rate", "0.003"]


def facts(answers=None, teacher=None, matrices=None, **method):
    """Of a report, those that matter here."""
    train = {"learning_rate": 1e-4, "distill": {"teacher": teacher}}
    kept = matrices or {"encoder.layer.0.query": 5}
    rows = [{"name": f"{name}.weight", "role": name.split(".")[-1], "kept": k, "total": 10} for name, k in kept.items()]
    return {
        "answers": answers or {}, "settings": {"train": train, "method": {"scope": "global", **method}},
        "matrices": rows, "sparsity": {"kept": sum(kept.values()), "total": 10 * len(kept)},
    }  # fmt: skip


@pytest.fixture
def pruned(place, tmp_path, capsys):
    """(the notes that `prune` prints, the run) of a command line."""

    def prune(*words, method="magnitude", data="reviews"):
        line = ["prune", method, "--model", place / "bert", "--dataset", data if "/" in str(data) else place / data]
        capsys.readouterr()
        assert main([*map(str, line), "--train.batch-size", "8", "--out", str(tmp_path / "out"), *words]) == 0
        notes = [text for text in capsys.readouterr().err.splitlines() if "what may help" in text]
        return notes, run_of(tmp_path / "out")

    return prune


def test_a_run_that_predicts_one_class_says_so_everywhere(pruned, tmp_path, capsys):
    notes, run = pruned("--sparsity", "0.7", "--steps", "40", "--train.learning-rate", "1e-8")
    (note,) = notes
    assert (
        "the model predicts '1' for all 8 validation rows, the most frequent class, correct for 75.0 % of them" in note
    )
    assert "the training loss stayed at 0.6" in note
    advices = ("more --steps", "a lower --sparsity", "--method.scope row or tensor", "another --train.learning-rate")
    for advice in advices:
        assert advice in note
    report = json.loads((run / "report.json").read_text())
    assert note == f"note: {report['notes']['degenerate'][0]}"
    assert (report["answers"]["answers"], report["answers"]["called"]) == (1, "1")
    assert main(["show", str(run)]) == 0
    assert "The model predicts '1' for all 8 validation rows" in capsys.readouterr().out
    assert "for all 8 validation rows, the most" in (run / "report.html").read_text()
    assert main(["push", str(run), "me/x", "--dry-run", "--out", str(tmp_path / "card")]) == 0
    assert "**Note**: the model predicts '1' for all 8" in (tmp_path / "card" / "README.md").read_text()
    assert main(["test", str(run)]) == 0  # which draws the page once more
    assert "for all 8 validation rows, the most" in (run / "report.html").read_text()


@pytest.mark.parametrize("method", ["dense", "magnitude", "gradual", "isp"])
def test_an_ordinary_run_says_nothing_of_the_kind(pruned, method):
    sparsity = [] if method == "dense" else ["--sparsity", "0.5"]
    notes, run = pruned(*sparsity, "--steps", "100", *RATE, method=method)
    assert notes == []
    assert "degenerate" not in json.loads((run / "report.json").read_text())["notes"]


def test_a_layer_without_a_head_and_a_matrix_without_a_weight_are_named(pruned):
    (*_, heads), _ = pruned(
        "--sparsity", "0.4", "--steps", "30", *RATE, "--method.structure", "heads", method="gradual"
    )
    assert (
        "8 of 12 matrices have no weight left (layer 0 (no head): query, key, value, output; layer 1 (no head)" in heads
    )
    assert "what may help: a lower --sparsity" in heads
    assert "--method.scope" not in heads  # heads have none


def test_numbers_that_are_one_number_are_told(pruned, tmp_path):
    for name, count in (("train", 200), ("test", 30)):
        with open(tmp_path / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            rows = [(text, f"{good + len(text) / 100:.2f}") for text, good in sentences(count, len(name))]
            csv.writer(file).writerows([("text", "score"), *rows])
    notes, _ = pruned("--sparsity", "0.7", "--steps", "20", "--train.learning-rate", "1e-7", data=tmp_path)
    assert " for all 20 validation rows" in notes[0]


def test_spans_are_told_by_their_loss(pruned):
    steps = ["--sparsity", "0.7", "--steps", "20", "--max-length", "64"]
    (note,), _ = pruned(*steps, "--train.learning-rate", "1e-8", data="questions")
    assert "the training loss stayed at 2.8" in note


def test_answers_of_each_kind_are_seen():
    labels = torch.tensor([0, 1, 1, 2])
    same = answer_statistics(torch.tensor([[0.0, 1.0, 0.0]]).expand(4, 3), labels)
    assert (same["answers"], same["labels"], same["answer"], same["right"], same["commonest"]) == (1, 3, 1, 0.5, 0.5)
    assert same["chance"] == pytest.approx(math.log(3))  # of four rows nobody knows how often each occurs
    many = answer_statistics(torch.eye(2)[torch.zeros(2 * FEW, dtype=torch.long)], torch.arange(2 * FEW) % 10 // 9)
    assert many["chance"] == pytest.approx(-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)))
    numbers = answer_statistics(torch.full((4, 1), 2.5), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (numbers["spread"], numbers["answer"], numbers["explained"], numbers["chance"]) == (0, 2.5, 0, 1.25)
    outputs = torch.full((3, 2, 5), -1e4)
    outputs[:, :, 1:4] = torch.tensor([3.0, 1.0, 2.0])
    spans = answer_statistics(outputs, torch.tensor([[0, 1, 1], [1, 2, 3], [2, 1, 2]]))
    assert (spans["answers"], spans["labels"], spans["right"]) == (1, 3, pytest.approx(1 / 3))
    assert spans["chance"] == pytest.approx(math.log(3))
    told = degenerate_warnings(facts(spans), [])
    assert "the same position, or none, for all 3 validation rows" in told[0]
    assert answer_statistics(torch.zeros(4, 7, 3), torch.zeros(4, 7)) == {}  # of a form that is not known here
    assert degenerate_warnings(facts(), [1.0] * 40) == []


@given(st.integers(2, 5), st.lists(st.integers(0, 4), min_size=2, max_size=30), st.randoms(use_true_random=False))
def test_right_answers_are_never_taken_for_a_degenerate_run(classes, drawn, random):
    labels = torch.tensor([label % classes for label in drawn])
    outputs = torch.nn.functional.one_hot(labels, classes).float()
    losses = [random.uniform(0.5, 0.8) for _ in range(40)]  # high, since dropout is
    assert not [
        said
        for said in degenerate_warnings(facts(answer_statistics(outputs, labels)), losses)
        if len(labels.unique()) > 1
    ]


def test_other_runs_are_not_degenerate():
    answers = {"rows": 100, "chance": 0.69, "answers": 2, "labels": 2, "right": 0.52, "commonest": 0.5, "called": "a"}
    assert "no better than guessing" in degenerate_warnings(facts(answers), [0.70] * 40)[0]
    assert degenerate_warnings(facts(answers), [0.70] * 5) == []  # too short to tell
    assert degenerate_warnings(facts(answers), [0.70] * 20 + [0.60] * 20) == []
    assert (
        degenerate_warnings(facts(answers, teacher="dense"), [0.70] * 40) == []
    )  # the distance from a teacher is another loss
    assert degenerate_warnings(facts(answers | {"right": 0.8}), [0.70] * 40) == []
    assert degenerate_warnings(facts({**answers, "answers": 1, "labels": 1}), []) == []  # so do the labels
    one = facts(matrices={"encoder.layer.3.key": 0, "encoder.layer.3.query": 4, "pooler.other": 0})
    (told,) = degenerate_warnings(one, [])
    assert "2 of 3 matrices have no weight left (layer 3: key; pooler.other.weight)" in told


def test_a_long_list_of_layers_is_cut():
    (told,) = degenerate_warnings(facts(matrices={f"h.{i}.value": 0 for i in range(9)} | {"h.9.value": 1}), [])
    assert "layer 5 (no head): value; and 3 layers more" in told
