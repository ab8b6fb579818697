"""Experiment trackers: tensorboard, wandb, trackio and mlflow, by the trackers of accelerate."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from sparsesoup.core.errors import UserError, cause_line
from sparsesoup.core.settings import TypedSettings
from sparsesoup.training.observer import Observer

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
PROJECT = "sparsesoup"  # of wandb and trackio; the experiment of mlflow
GROUPS = {"main": "train", "evaluation": "eval"}  # label of the cost -> group of curves, as the Trainer names them


@dataclass(frozen=True, kw_only=True)
class TrackerConfig(TypedSettings):
    """Trackers of a run.

    Args:
        report_to: where to report loss, learning rate, sparsity and scores, as A,B: tensorboard (in the run's folder),
            wandb, trackio, mlflow; default none. The result of the run does not depend on it.
    """

    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := [name for name in self.report_to if name not in TRACKERS]:
            raise UserError(f"unknown tracker {unknown[0]!r}; allowed: {', '.join(TRACKERS)}", "report_to")


def check_installed(names: Sequence[str]) -> None:
    """Raise a UserError if the library of a tracker is missing."""
    found = {str(tracker) for tracker in get_available_trackers()}
    if missing := [name for name in names if name not in found]:
        raise UserError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; pip install "
            f"{' '.join(missing)}, or leave it out",
            "report_to",
        )


class TrackerObserver(Observer):
    """An observer that reports to trackers: `train/loss`, `train/learning_rate`, `train/sparsity`, `eval/accuracy`.

    The x axis counts the training steps of the whole run, weak ones included, since a run may go back to an earlier
    step. Short trainings have groups of their own, such as `weak/loss`. A tracker that fails in the middle of a run is
    left out from then on, with a warning; the run continues.

    Args:
        report_to: names of trackers.
        folder: folder for what tensorboard writes, in its subfolder tensorboard.
        name: name of the run at the others.
        settings: settings to show with the run, by name.
        done: steps that were reported before, by a run that is resumed.
    Raises: UserError if a library is missing, or a tracker cannot start.
    """

    def __init__(
        self,
        report_to: Sequence[str],
        folder: str | Path,
        name: str = "",
        settings: Mapping[str, Any] | None = None,
        done: int = 0,
    ) -> None:
        TrackerConfig(report_to=tuple(report_to))
        check_installed(report_to)
        PartialState()  # the trackers write to accelerate's log, which needs it
        self.done, self.trackers = done, dict[str, Any]()
        for tracker in report_to:
            try:
                self.trackers[tracker] = _start_tracker(tracker, Path(folder), name, done)
                if not done and settings:
                    self.trackers[tracker].store_init_configuration(
                        {key: _plain_setting(value) for key, value in settings.items()}
                    )
            except Exception as error:
                self.close()
                raise UserError(f"{tracker} cannot start ({cause_line(error)}); leave it out", "report_to") from error

    def step(self, record: Mapping[str, Any]) -> None:
        """Report loss, learning rate and sparsity of a step."""
        if record:
            self.done += 1
            values = {"loss": record["loss"], "learning_rate": record["rate"], "sparsity": record["sparsity"]}
            self._log_values(str(record["label"]), values)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Report the scores of a validation."""
        self._log_values(str(record["label"]), {**record["scores"], "sparsity": record["sparsity"]})

    def log_final(self, scores: Mapping[str, Any], sparsity: float) -> None:
        """Report the scores and the sparsity of the result."""
        self._log_values("final", {**scores, "sparsity": sparsity})

    def close(self) -> None:
        """End all trackers."""
        for name in [*self.trackers]:
            try:
                self.trackers[name].finish()
            except Exception as error:
                warnings.warn(f"{name} did not end well ({cause_line(error)})", stacklevel=2)
        self.trackers.clear()

    def _log_values(self, label: str, values: Mapping[str, Any]) -> None:
        group = GROUPS.get(label, label)
        for name in [*self.trackers]:
            try:
                self.trackers[name].log({f"{group}/{key}": value for key, value in values.items()}, step=self.done)
            except Exception as error:
                warnings.warn(f"{name} gets no more reports ({cause_line(error)})", stacklevel=2)
                del self.trackers[name]


def _start_tracker(name: str, folder: Path, run: str, done: int) -> Any:
    """Return a tracker that is ready to log; tensorboard drops what a killed run has written beyond `done` steps."""
    made: Any = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        tracker = made(name, str(folder), **({"purge_step": done + 1} if done else {}))
    elif name == "mlflow":
        tracker = made(PROJECT, run_name=run or None)
    else:
        tracker = made(PROJECT, name=run or None)
    tracker.start()
    return tracker


def _plain_setting(value: Any) -> Any:
    """Return a setting as a number or a text, which all trackers take."""
    return value if isinstance(value, (int, float, str)) else "" if value is None else json.dumps(value)
