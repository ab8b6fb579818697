"""Jobs of a study: run a trial, score it on the test split, and record the result."""

import gc
import io
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sparsesoup.core.errors import UserError, one_line
from sparsesoup.core.files import read_table, remove_path, write_table
from sparsesoup.core.threads import check_threads
from sparsesoup.hub.build import ModelAndDataConfig
from sparsesoup.hub.model_data_cache import ModelDataCache
from sparsesoup.report.terminal import read_report
from sparsesoup.runs.run import RuntimeOptions, masks_of, run_method, score_finished_run
from sparsesoup.study.recipe.trial import Trial

KEPT = ("method", "dataset_fingerprint", "validation", "test", "sparsity", "cost", "steps", "seconds", "notes",
        "matrices", "command", "machine", "versions")  # fmt: skip
NEEDED = ("row", "model", "dataset", "target", "seed", "run", "method", "validation", "test", "sparsity", "cost",
          "steps", "seconds", "matrices", "command")  # required by tables and page  # fmt: skip
FAILED = ("run", "error")  # required in the record of a failure
AGAIN = "remove it, and the study does that run again"


@dataclass(frozen=True)
class TrialOptions:
    """Options of the trials of a study that change no result.

    Args:
        threads: torch threads; None keeps the current number.
        workers: processes for weak masks, if the method has any.
        cache_size: most GiB of trainings that trials share.
        snapshots: where forks and rewinding points are kept: device, host or disk.
    """

    threads: int | None = None
    workers: int = 1
    cache_size: float = 32.0
    snapshots: str = "device"


DEFAULT_OPTIONS = TrialOptions()


@dataclass(frozen=True)
class TrialJob:
    """A trial to run and to score, in any process."""

    trial: Trial  # the trial
    out: Path  # folder of all runs
    folder: Path  # folder of the study
    options: TrialOptions = DEFAULT_OPTIONS

    @property
    def describe_job(self) -> str:
        """The description of the job, such as `training isp on glue/cola, sparsity 0.5, seed 0 (minilm)`."""
        return f"training {self.trial.describe_trial}"

    @property
    def load_key(self) -> tuple[ModelAndDataConfig, str]:
        """The model and data that a process loads for the job and keeps for the next one."""
        return self.trial.settings.model_data, self.trial.settings.train.mixed_precision

    @property
    def run(self) -> Path:
        """The directory of the trial's run."""
        return self.out / self.trial.path

    @property
    def record_path(self) -> Path:
        """The path of the trial's record."""
        return self.folder / "runs" / f"{self.trial.trial_key}.json"

    @property
    def failure_path(self) -> Path:
        """The path of the trial's failure record; it exists only after a failure."""
        return self.folder / "runs" / f"{self.trial.trial_key}.failed.json"


class JobRunner:
    """Runs one job after another in a process, and keeps model and data for the next job that needs the same."""

    def __init__(self) -> None:
        self._load_cache = ModelDataCache()
        gc.freeze()  # the libraries: a collection after each job passes them over

    def __call__(self, job: TrialJob, console: Console | None = None) -> None:
        """Run a job and record it; a failure is recorded and does not affect other jobs.

        The test rows are scored once the run is complete and written, with its final masks; a killed job resumes.
        """
        console = console or Console(file=io.StringIO())
        try:
            if threads := job.options.threads:
                check_threads(threads)  # again: a node of a cluster may have fewer cores than its head
                torch.set_num_threads(threads)
            workers = job.options.workers if masks_of(job.trial.settings) else 1
            outside = RuntimeOptions(
                console, cache=job.folder / "cache", cache_size=job.options.cache_size, wait=True, page=False,
                workers=workers, snapshots=job.options.snapshots, load_cache=self._load_cache,
            )  # fmt: skip
            run_method(job.trial.settings, job.out, outside, job.trial.path)
            try:
                score_finished_run(job.run, console, load_cache=self._load_cache)
            finally:  # where the test split cannot be scored, the validation scores count
                write_table(job.record_path, trial_record(job.trial, job.run))
            remove_path(job.failure_path)
        except UserError as error:
            record_failure(job, str(error))
        except Exception as error:
            record_failure(job, f"{type(error).__name__}: {one_line(error)}", traceback.format_exc())
        finally:
            gc.collect()  # models that reference cycles keep alive, with which the next one would not fit


def trial_record(trial: Trial, run: Path) -> dict[str, Any]:
    """Return the facts of a run that tables need, under the names of its trial."""
    report = read_report(run)
    model, dataset, sparsity = trial.column_of
    head = {
        "row": trial.row,
        "model": model,
        "dataset": dataset,
        "target": sparsity,
        "seed": trial.settings.model_data.seed,
    }
    return {**head, "run": str(trial.path), **{key: report.get(key) for key in KEPT}}


def record_failure(job: TrialJob, why: str, trace: str = "") -> None:
    """Record the failure of a job."""
    write_table(job.failure_path, {"run": job.trial.describe_trial, "error": why, "trace": trace, "when": time.time()})


def read_record(path: Path, needed: Sequence[str] = NEEDED) -> dict[str, Any] | None:
    """Read a record; return None if there is none."""
    if not path.exists():
        return None
    record = read_table(path, "record", AGAIN)
    if lacking := [key for key in needed if key not in record]:
        raise UserError(f"damaged record: {path} lacks {', '.join(lacking)}; {AGAIN}")
    return record
