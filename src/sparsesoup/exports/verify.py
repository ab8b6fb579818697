"""Verify that an export predicts as its run does, in a fresh process on the whole test split."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import torch
from torch import Tensor

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import read_table, write_table
from sparsesoup.exports import WrittenExport, write_export
from sparsesoup.exports import subprocess_runner as alone
from sparsesoup.exports.source import PrunedSource, open_source
from sparsesoup.hub.build import ModelAndDataConfig, OpenedTask, open_task, score_test
from sparsesoup.hub.tasks.registry import task_type_of
from sparsesoup.hub.tasks.splits import test_splits
from sparsesoup.hub.tasks.zero_shot import TowerWithHead, ZeroShot, load_saved_head
from sparsesoup.runs.config import config_from_dict
from sparsesoup.training.batching import RowBatches
from sparsesoup.training.problem import Problem

NEAR = 1e-3  # largest difference of numbers (regression) that count as the same prediction


class SubprocessModel:
    """An export loaded in a fresh process, by the line in its export.json.

    Args:
        folder: folder of the export.
        line: line of Python that loads it.
    Raises: UserError if it does not load, or stops responding.
    """

    def __init__(self, folder: Path, line: str) -> None:
        self.folder = folder
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process runs
        self._process = subprocess.Popen(
            [sys.executable, "-P", alone.__file__, line], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._said, env={**os.environ, "CI": "true"},  # disables OpenVINO's telemetry
        )  # fmt: skip
        self.ours = bool(self._receive_answer()["sparsesoup"])

    def __enter__(self) -> "SubprocessModel":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if not self._said.closed:
            self._process.communicate()  # closes its pipes and waits for it to end
            self._said.close()

    def __call__(self, **inputs: Tensor) -> SimpleNamespace:
        """Return the outputs for these inputs, by name."""
        assert self._process.stdin is not None
        alone.write_arrays(self._process.stdin, {name: t.numpy() for name, t in inputs.items()})
        return SimpleNamespace(**{name: torch.from_numpy(array) for name, array in self._receive_answer().items()})

    def _receive_answer(self) -> alone.Arrays:
        assert self._process.stdout is not None
        if (found := alone.read_arrays(self._process.stdout)) is not None:
            return found
        self._process.wait()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
        self.close()
        raise UserError(f"the export at {self.folder} does not answer in a fresh process: {lines[-1][:200]}")


def verified_export(run: Path, to: str, out: Path, settings: Mapping[str, Any] | None = None) -> WrittenExport:
    """Export a model, run the export in a fresh process on the whole test split, and compare with the source's outputs.

    The result is stored under `verified` in export.json: rows, equal predictions, the scores of both.

    Args:
        run, to, out, settings: as in `export`.
    Raises: UserError as `export` does, and if the model's training data is unknown; nothing is written then.
    """
    if to == "semi-structured":
        raise UserError(
            "--verify asks an export on the CPU, where 2:4 matrices cannot answer; leave it out (where there is a GPU, "
            "answers are compared anyway), or verify --to dense, which has the same weights"
        )
    source = open_source(run)
    place, opened = _data_of(source)
    written = write_export(run, to, out, settings)
    with SubprocessModel(written.path, written.facts["load"]) as asked:
        found = _compare_predictions(*(_score_answers(source, place, opened, ask) for ask in (source.model, asked)))
        found |= {"without_sparsesoup": not asked.ours, "test_splits": test_splits(opened.source, opened.task)}
        facts = {**written.facts, "verified": found}
    on_disk = read_table(out / "export.json")
    write_table(out / "export.json", {**on_disk, "verified": facts["verified"]})
    return WrittenExport(out, facts)


def _data_of(source: PrunedSource) -> tuple[ModelAndDataConfig, OpenedTask]:
    """Return the dataset that the source was trained on."""
    table = source.facts.get("settings")
    table = dict(table) if isinstance(table, Mapping) else {}
    method = table.pop("method", None)
    method = dict(method) if isinstance(method, Mapping) else {}
    if "name" not in method:
        raise UserError(
            f"it is not known what data {source.folder} was trained on (no settings in its ticket.json), so there is "
            f"no test split to verify on; leave --verify out"
        )
    settings = config_from_dict(str(method.pop("name")), {**table, "method": method})
    place = replace(settings.place, model=str(source.folder), prompts=None, class_names=None)
    return place, open_task(place)


def _score_answers(
    source: PrunedSource, place: ModelAndDataConfig, opened: OpenedTask, ask: Callable[..., Any]
) -> tuple[dict[str, Any], Tensor]:
    """Return (scores, outputs [rows, ...]) of a model on the test split."""
    kind, outputs, nothing = task_type_of(opened.task), [], RowBatches([], lambda rows: {})
    if isinstance(opened.task, ZeroShot):
        ask = TowerWithHead(ask, load_saved_head(source.folder, opened.task))

    def predict(model: Any, batch: Any) -> Tensor:
        on_cpu = {name: t.cpu() for name, t in batch.items()}  # both models are on the CPU
        outputs.append(kind.predict(ask, on_cpu))  # type: ignore[arg-type]  # not a module, but callable like one
        return outputs[-1]

    problem = Problem(
        pretrained=source.model, targets={}, train=nothing, validation=nothing, predict=predict,
        criterion=kind.criterion(opened.task), metric=lambda outputs, labels: {}, steps=1,
    )  # fmt: skip
    return score_test(problem, place, opened), torch.cat([t.double() for t in outputs])


def _compare_predictions(one: tuple[dict[str, Any], Tensor], other: tuple[dict[str, Any], Tensor]) -> dict[str, Any]:
    """Compare the predictions of an export and its source.

    Equal predictions: the same class; for questions the same best start and end in a window; numbers within `NEAR`.
    """
    (scores, outputs), (found, answers) = one, other
    apart = (outputs - answers).abs()
    if outputs.shape[-1] == 1:
        same = apart.squeeze(-1) <= NEAR
    else:
        same = (outputs.argmax(-1) == answers.argmax(-1)).reshape(len(outputs), -1).all(-1)
    return {
        "rows": len(same),
        "same": int(same.sum()),
        "largest_difference": float(apart.max()),
        "scores": found,
        "scores_of_source": scores,
    }
