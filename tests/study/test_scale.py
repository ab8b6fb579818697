"""Studies of thousands of trials: what each event and each table costs grows no faster than their number."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pandas
import pytest
from rich.console import Console

import sparsesoup.study
from sparsesoup.study import compare
from sparsesoup.study.compare import GrowingTables, flatten_record
from sparsesoup.study.execute.progress import StudyProgress
from sparsesoup.study.results.scores import score_table
from sparsesoup.study.results.tables import latex_table, markdown_table

SOURCES = str(Path(sparsesoup.study.__file__).parent)


def operations(work: Callable[[], Any]) -> int:
    """Bytecode instructions carried out in the code of studies."""
    count = [0]

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(SOURCES):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count[0] += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count[0]


def fake_jobs(number: int) -> list[Any]:
    """Jobs of a study of 10 rows, 20 columns and as many seeds as are needed."""
    where = [(f"row {i % 10}", ("bert", "reviews", i // 10 % 20 / 20), i // 200) for i in range(number)]
    trials = [
        SimpleNamespace(trial_key=f"{row}-{column[2]}-{seed}", row=row, column_of=column, describe_trial="a trial")
        for row, column, seed in where
    ]
    fixed = {"describe_job": "training a trial", "run": Path("none"), "failure_path": Path("none")}
    return [SimpleNamespace(trial=t, **fixed) for t in trials]


def run_with_table(number: int) -> int:
    jobs = fake_jobs(number)

    def work() -> None:
        board = StudyProgress(Console(quiet=True), jobs)
        for one, other in zip(jobs[::2], jobs[1::2], strict=True):
            for job in (one, other):
                board.begin(job)
                board._render_table()
            board.restart_job(other, "was killed")
            board.begin(other)
            for job in (one, other):
                board.end(job)
                board._render_table()
        assert board.done == number
        assert board.seconds_left(1) == pytest.approx(0.0, abs=1e-9)

    return operations(work)


def test_the_live_table_costs_the_same_per_trial_whatever_their_number() -> None:
    assert run_with_table(2000) < 2.2 * run_with_table(1000)


def fake_record(row: str, column: tuple[str, str, float], seed: int) -> dict[str, Any]:
    cost = {"steps": 10, "examples": 80, "tokens": 800, "padding": 0, "flops": 1e9, "seconds": 1.0}
    return {
        "row": row, "model": column[0], "dataset": column[1], "target": column[2], "seed": seed, "run": f"{row}/{seed}",
        "method": "magnitude", "validation": {"accuracy": 0.5 + seed / 1e4}, "test": {"accuracy": 0.5 + seed / 1e4},
        "sparsity": {"target": column[2], "reached": column[2], "kept": 50, "total": 100}, "cost": {"main": cost},
        "steps": 10, "seconds": 1.0, "notes": {}, "matrices": [], "command": "sparsesoup prune",
    }  # fmt: skip


def write_tables(number: int) -> int:
    records = [fake_record(j.trial.row, j.trial.column_of, i // 200) for i, j in enumerate(fake_jobs(number))]
    planned = [(r["row"], (r["model"], r["dataset"], r["target"]), r["seed"]) for r in records]

    def work() -> None:
        scores = score_table(records, planned)
        assert markdown_table(scores)
        assert latex_table(scores)
        assert [flatten_record(record) for record in records]

    return operations(work)


def test_tables_cost_the_same_per_trial_whatever_their_number() -> None:
    assert write_tables(4000) < 2.2 * write_tables(2000)


def test_tables_are_written_while_a_study_goes_on_and_all_writes_cost_as_much_as_a_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare.time, "monotonic", lambda: 0.0)  # writing takes no time here
    rows = [0, 0]
    done = [0, 0]
    for i, number in enumerate((1000, 8000)):

        def write(i: int = i) -> None:
            rows[i] += done[i]

        tables = GrowingTables(write)
        for _ in range(number):
            done[i] += 1
            tables.count_job()
    assert rows[0] < 12 * 1000
    assert rows[1] < 12 * 8000
    assert rows[0] > 1000


def test_tables_take_a_small_share_of_the_time_of_a_study(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, written = [1000.0], list[float]()

    def write() -> None:
        written.append(clock[0])
        clock[0] += 3.0  # seconds

    monkeypatch.setattr(compare.time, "monotonic", lambda: clock[0])
    tables = GrowingTables(write)
    for _ in range(10_000):
        clock[0] += 0.1
        tables.count_job()
    assert len(written) > 3
    assert 3.0 * len(written) < 0.03 * (clock[0] - 1000.0) + 3.0


def test_records_load_at_once_from_parquet(tmp_path: Path) -> None:
    records = [fake_record(job.trial.row, job.trial.column_of, i // 200) for i, job in enumerate(fake_jobs(300))]
    for record in records:
        record["matrices"] = [{"name": "layer.0.query", "role": "query", "shape": [4, 5], "kept": 9, "total": 20}]
    records[7]["notes"] = {"evaluations": [{"step": 3, "scores": {"accuracy": 0.1 + 0.2}}], "doubts": ["none\n"]}
    compare._write_tables(tmp_path, {"name": "many", "failed": []}, records, tmp_path)
    table = pandas.read_parquet(tmp_path / "study.parquet")
    assert [json.loads(text) for text in table["record"]] == records
    assert [*table.columns[:-1]] == [*pandas.read_csv(tmp_path / "study.csv").columns]
    assert json.loads((tmp_path / "study.json").read_text()) == {"name": "many", "failed": [], "runs": records}


def test_a_study_under_way_has_tables_of_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen = []
    jobs = fake_jobs(3)
    board = StudyProgress(Console(quiet=True), jobs, lambda job: seen.append(board.done))
    for job in jobs:
        board.begin(job)
        board.end(job)
    assert seen == [1, 2, 3]
