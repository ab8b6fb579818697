"""First lines of a run: what is read. Last lines: what the score is worth."""

from pathlib import Path

import pytest

from sparsesoup.cli.main import main
from sparsesoup.runs.summary import describe_guessing


def test_a_run_says_what_it_reads_and_what_its_score_is_worth(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["--model", str(place / "bert"), "--dataset", str(place / "reviews"), "--steps", "4"]
    assert main(["prune", "magnitude", *line, "--sparsity", "0.5", "--train.batch-size", "8"]) == 0
    alone, said = capsys.readouterr()
    (run,) = Path("runs").rglob("seed-0")
    read = [words for words in said.splitlines() if words.startswith(("data: ", "model: ", "run: "))]
    assert "training and 8 validation rows" in read[0]
    assert "2 classes (0, 1) in column label from column text" in read[1]
    assert read[2] == f"model: {place / 'bert'}, 4,096 prunable weights in 12 matrices"
    assert read[3].startswith("run: magnitude to sparsity 0.5, T = 4 steps of 8 rows (")
    assert read[3].endswith(f" epochs), on cpu, in {run}")
    kept, guess, report, model = alone.splitlines()
    assert kept.startswith("magnitude: 2,048 of 4,096 weights kept, 50.0 % pruned, validation accuracy ")
    assert guess.startswith("guess   right for ")
    assert "validation rows; always the commonest class, for " in guess
    assert (report, model) == (f"report  {run / 'report.html'}", f"model   {run / 'model'}")
    assert main(["prune", "dense", *line, "--train.batch-size", "8"]) == 0
    assert "\ndense   " not in capsys.readouterr().out
    (dense,) = Path("runs").rglob("dense-*/seed-0")
    assert main(["prune", "magnitude", *line, "--sparsity", "0.5", "--train.batch-size", "8"]) == 0
    beside = capsys.readouterr().out.splitlines()
    assert [words for words in beside if words not in alone.splitlines()] == [beside[2]]
    assert beside[2].startswith("dense   validation accuracy ")
    assert beside[2].endswith(f", in {dense}")


def test_guessing_is_described_for_numbers_and_for_spans() -> None:
    numbers = {"rows": 20, "chance": 1.0, "spread": 0.5, "answer": 2.0, "explained": 0.25}
    assert (
        describe_guessing(numbers) == "explains 25.0 % of the variance of 20 validation labels; always their mean, 0 %"
    )
    spans = {"rows": 8, "chance": 1.0, "answers": 3, "labels": 8, "answer": 0, "right": 0.5, "commonest": 0.125}
    assert describe_guessing(spans).endswith("; always the commonest place, for 12.5 %")
    assert describe_guessing({}) == ""
