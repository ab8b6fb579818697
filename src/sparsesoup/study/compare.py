"""Run a study from its recipe to its tables and page, or tabulate existing runs."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas
from rich.console import Console

from sparsesoup.core.errors import UserError, mark_saved
from sparsesoup.core.files import atomic_writes, file_lock, read_table, remove_path, write_text
from sparsesoup.core.low_rank import low_rank_of
from sparsesoup.core.single_process import require_single_process
from sparsesoup.hub.build import open_task
from sparsesoup.hub.tasks.overview import data_overview
from sparsesoup.hub.tasks.splits import LoadedDataset, open_splits
from sparsesoup.report.escaping import printable_line
from sparsesoup.report.terminal import REPORT, flatten_scores, read_report
from sparsesoup.runs.results import library_versions, machine_name
from sparsesoup.runs.resume_checks import check_data
from sparsesoup.runs.run_folder import is_saved
from sparsesoup.runs.yaml_text import dump_yaml
from sparsesoup.study.equal_budget import match_budget
from sparsesoup.study.execute.executors import JobExecutor, local_executor
from sparsesoup.study.execute.jobs import DEFAULT_OPTIONS, TrialJob, TrialOptions, read_record
from sparsesoup.study.execute.progress import StudyProgress
from sparsesoup.study.execute.records import StudyRecords
from sparsesoup.study.recipe.budget import read_budget
from sparsesoup.study.recipe.plan import StudyPlan, read_plan
from sparsesoup.study.results.from_runs import records_of, run_paths
from sparsesoup.study.results.html import draw_page
from sparsesoup.study.results.scores import Record, score_table
from sparsesoup.study.results.tables import latex_table, markdown_table

STUDIES = "studies"
WRITING = 0.01  # largest share of the time of a study that goes to its tables


@dataclass(frozen=True)
class StudyResult:
    """The folder of a study, with its tables and page, and its study.json."""

    path: Path
    facts: dict[str, Any] = field(repr=False)

    @property
    def table(self) -> str:
        """The scores by method, as a table in Markdown."""
        return (self.path / "study.md").read_text(encoding="utf-8")


def compare_recipe(
    recipe: str | Path | Mapping[str, Any],
    out: Path,
    name: str | None,
    console: Console,
    workers: int = 1,
    retry_failed: bool = False,
    options: TrialOptions = DEFAULT_OPTIONS,
) -> StudyResult:
    """Run the study of a recipe (a file, the name of a shipped one, or a table) on this machine."""
    require_single_process()
    given = dict(recipe) if isinstance(recipe, Mapping) else Path(recipe)
    plan = match_budget(read_plan(given, None, name, out, True))
    check_devices(plan)
    made = run_study(plan, out, console, local_executor(workers), options, retry_failed)
    return StudyResult(made, read_table(made / "study.json"))


def check_devices(plan: StudyPlan) -> None:
    """Raise a UserError if the device of the runs on this machine lacks what a trial needs."""
    for training in {trial.settings.train for trial in plan.trials}:
        training.check_device()


def run_study(
    plan: StudyPlan,
    out: Path,
    console: Console,
    executor: JobExecutor,
    options: TrialOptions = DEFAULT_OPTIONS,
    retry_failed: bool = False,
) -> Path:
    """Run every missing trial of a study, and score each once on the test split; tables grow meanwhile.

    Args:
        out: folder of all runs; the study's own is studies/<name> in it.
        options: how each trial is run; its threads are by default the cores that the executor has for it.
        retry_failed: retry trials that failed before.
    Returns: the study's folder, with study.html, study.md, study.tex, study.csv, study.parquet and study.json.
    """
    folder = folder_of(out, plan.name)
    if options.threads is None and executor.cores is not None:
        options = replace(options, threads=max(1, int(executor.cores / options.workers)))
    jobs = [TrialJob(trial, out, folder, options) for trial in plan.trials]
    _check_same_study(folder, plan, jobs)
    records = StudyRecords(jobs)
    _check_same_data(records)
    saved = mark_saved(lambda: any(job.record_path.exists() or is_saved(job.run) for job in jobs))
    with saved, file_lock(folder / ".lock", wait=False):
        records.reload_pending()  # another process may have worked on them meanwhile
        write_text(folder / "study.yaml", dump_yaml(plan.recipe))
        shown: set[str] = set()
        study = {"name": plan.name, "command": plan.command, "recipe": plan.recipe}

        def write(final: bool = False) -> None:
            if records.found or final:
                _write_tables(folder, study | {"failed": records.failed}, records.found, out, jobs, records.failed_jobs)

        tables = GrowingTables(write)

        def count_job(job: TrialJob) -> None:
            records.reload(job)
            tables.count_job()

        for later in (False, True):  # tickets are found before the trials that start from them
            wave = [job for job in records.pending(retry_failed) if bool(job.trial.needs) == later]
            _print_overviews(wave, shown, console)
            if wave:
                with StudyProgress(console, wave, count_job) as board:
                    executor.run(wave, board)
        failed = records.failed
        if not failed:
            remove_path(folder / "cache")
        write(final=True)
    if failed:  # including failures of an earlier command, which this one would not mention
        summary = f"{len(failed)} of {len(jobs)} runs failed; the page says why, and --retry-failed does them again"
        console.print(summary, highlight=False, markup=False, soft_wrap=True)
    return folder


def compare_results(results: Sequence[Any], name: str | None, out: Path) -> StudyResult:
    """Tabulate existing runs: directories, or what `prune` returned."""
    made = table_of_runs(run_paths(results), name or "runs", out)
    return StudyResult(made, read_table(made / "study.json"))


def table_of_runs(runs: Sequence[Path], name: str, out: Path) -> Path:
    """Write the tables and page of existing runs, with a row for each method and its settings."""
    folder, found = folder_of(out, name), records_of(runs)
    if (folder / "study.yaml").exists():
        raise UserError(f"{folder} holds a study with a recipe; give another --name")
    _check_same_runs(folder, found)
    _write_tables(folder, {"name": name, "failed": []}, found, Path())
    return folder


def _check_same_runs(folder: Path, found: Sequence[Record]) -> None:
    """Refuse a folder with a table of other runs: a table may only grow."""
    if not (folder / "study.json").exists():
        return
    before = read_table(folder / "study.json", "study", "give another --name").get("runs", [])
    given = {Path(record["run"]).resolve() for record in found}
    if lost := [record["run"] for record in before if Path(record["run"]).resolve() not in given]:
        raise UserError(
            f"{folder} holds a table of other runs ({lost[0]} is not among these), which this one would replace; give "
            f"another --name, or remove it"
        )


def folder_of(out: Path, name: str) -> Path:
    """Return the study's own folder, to which no other study writes."""
    if name in ("", "..") or Path(name).name != name:
        raise UserError(f"a study is called by the name of one folder, got {name!r}; use another --name")
    return out / STUDIES / name


def _check_same_study(folder: Path, plan: StudyPlan, jobs: list[TrialJob]) -> None:
    """Refuse a folder with a table of runs, or with trials that are not in this plan: a study may only grow.

    Failed trials do not count: a wrong recipe may be corrected under its name.
    """
    records = [path for path in (folder / "runs").glob("*.json") if not path.stem.endswith(".failed")]
    if (folder / "study.json").exists() and not (folder / "study.yaml").exists() and not records:
        raise UserError(f"{folder} holds a table of given runs, which this study would replace; give another --name")
    known = {job.record_path for job in jobs}
    if strange := [path for path in records if path not in known]:
        why = next(filter(None, (_other_length(record, plan) for path in strange if (record := read_record(path)))), "")
        raise UserError(
            f"{folder} holds another study ({len(strange)} of its runs are not in this recipe{why}); give another "
            f"--name, or remove it"
        )


def _check_same_data(records: StudyRecords) -> None:
    """Refuse a dataset with other rows than those of finished trials."""
    sources: dict[Any, LoadedDataset] = {}
    for job, facts in records.items():
        if "dataset_fingerprint" not in facts and (job.run / REPORT).is_file():  # a record of an older version
            facts = read_report(job.run)
        model_data = job.trial.settings.model_data
        where = (model_data.dataset, model_data.data_root, model_data.dataset_config)
        if where not in sources:
            sources[where] = open_splits(where[0], data_root=where[1], config=where[2])
        check_data(job.run, facts, model_data.dataset, sources[where])


def _print_overviews(jobs: Sequence[TrialJob], shown: set[str], console: Console) -> None:
    """Print what is read of each dataset, except lines that were shown before."""
    own = [job.trial.settings.model_data for job in jobs]
    model_data = {replace(each, model="", seed=0): each for each in own}
    for line in (line for p in model_data.values() for line in data_overview(open_task(p), p.seed).lines()):
        if line not in shown:
            console.print(printable_line(line), highlight=False, markup=False, soft_wrap=True)
        shown.add(line)


def _other_length(record: Record, plan: StudyPlan) -> str:
    """Explain that a trial is in the plan with another T, and why; '' if it is not."""
    where = record["row"], (record["model"], record["dataset"], record["target"]), record["seed"]
    trial = next((trial for trial in plan.trials if (trial.row, trial.column_of, trial.seed) == where), None)
    if trial is None or trial.settings.budget.steps in (None, record["steps"]):
        return ""
    budget = read_budget(plan.recipe.get("budget")) is not None
    because = ", which a budget sets by all seeds of a row, so that another seed can change it" if budget else ""
    return f": T of {trial.describe_trial} was {record['steps']} and is {trial.settings.budget.steps}{because}"


class GrowingTables:
    """Write the tables while a study runs: after each tenth more jobs, and for at most a share of the time.

    Args:
        write: writes all tables from the records so far.
    """

    def __init__(self, write: Callable[[], None]) -> None:
        self._write, self._done, self._next, self._earliest = write, 0, 1, 0.0

    def count_job(self) -> None:
        """Count a finished job, and write the tables if it is time."""
        self._done += 1
        if self._done >= self._next and (began := time.monotonic()) >= self._earliest:
            self._next = self._done + 1 + self._done // 10
            self._write()
            self._earliest = time.monotonic() + (time.monotonic() - began) / WRITING


def _write_tables(
    folder: Path, study: dict[str, Any], runs: Sequence[Record], out: Path, planned: Sequence[TrialJob] = (),
    failed: Sequence[TrialJob] = (),
) -> None:  # fmt: skip
    """Write every form of the table, or none; existing ones are replaced."""
    name, failures = study["name"], study["failed"]
    if not runs:
        first = f"{failures[0]['run']}: {failures[0]['error']}" if failures else "none"
        again = "; --retry-failed does them again" if failures else ""
        raise UserError(f"no run of study {name} is done; {len(failures)} failed{again}; first: {first}")
    scores = score_table(runs, *([job.trial.planned_run for job in jobs] for jobs in (planned, failed)))
    facts = {"runs": len(planned) or len(runs)} | {key: study[key] for key in ("failed", "command") if key in study}
    facts |= library_versions() | {"machine": machine_name()}
    table = pandas.DataFrame([flatten_record(record) for record in runs])
    whole = table.assign(record=[json.dumps(record, allow_nan=False) for record in runs])
    texts = {
        "study.json": study_json(study, runs),
        "study.md": markdown_table(scores),
        "study.tex": latex_table(scores),
        "study.csv": table.to_csv(index=False),
        "study.html": draw_page(name, scores, runs, out, facts),
    }
    with atomic_writes([folder / file for file in (*texts, "study.parquet")]) as (*files, parquet):
        for file, text in zip(files, texts.values(), strict=True):
            file.write_text(text, encoding="utf-8")
        whole.to_parquet(parquet, index=False, compression="zstd")


def study_json(study: Mapping[str, Any], runs: Sequence[Record]) -> str:
    """Return the content of study.json: the facts of the study, and each record of a run on its own line.

    >>> runs = [{"row": "isp", "seed": 0}, {"row": "isp", "seed": 1}]
    >>> print(study_json({"name": "small", "failed": []}, runs), end="")
    {
      "name": "small",
      "failed": [],
      "runs": [
        {"row": "isp", "seed": 0},
        {"row": "isp", "seed": 1}
      ]
    }
    """
    head = json.dumps(dict(study), indent=2, allow_nan=False, default=str).removesuffix("\n}")
    lines = ",\n".join(f"    {json.dumps(record, allow_nan=False, default=str)}" for record in runs)
    return f'{head},\n  "runs": [\n{lines}\n  ]\n}}\n'


def flatten_record(record: Record) -> dict[str, Any]:
    """Return a record as one row of a flat table: every column is a number or a string."""
    kept = ("row", "method", "model", "dataset", "target", "seed", "steps")
    line: dict[str, Any] = {key: record[key] for key in kept}
    line |= {"sparsity": record["sparsity"]["reached"], "kept": record["sparsity"]["kept"]}
    if low := low_rank_of(record):
        line["removed_by_rank"] = low["removed"]
    for split in ("validation", "test"):
        line |= {f"{split} {name}": value for name, value in flatten_scores(record[split]).items()}
    for unit in ("steps", "flops", "seconds"):
        line |= {f"{label} {unit}": cost[unit] for label, cost in record["cost"].items()}
    return line | {"run": record["run"], "command": record["command"]}
