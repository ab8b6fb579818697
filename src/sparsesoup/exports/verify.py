"""Verify that an export predicts as its run does, in a fresh process on the whole test split."""

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import read_table, write_table
from sparsesoup.exports import WrittenExport, subprocess_runner, write_export
from sparsesoup.exports.source import PrunedSource, open_source
from sparsesoup.hub.build import ModelAndDataConfig, OpenedTask, open_task, score_test
from sparsesoup.hub.tasks.registry import task_type_of
from sparsesoup.hub.tasks.splits import test_splits
from sparsesoup.hub.tasks.zero_shot import TowerWithHead, ZeroShot, load_saved_head
from sparsesoup.runs.config import config_from_dict, refuse_objects
from sparsesoup.training.batching import RowBatches
from sparsesoup.training.problem import Problem

NEAR = 1e-3  # largest difference of numbers (regression) that count as the same prediction


@contextlib.contextmanager
def model_in_subprocess(folder: Path, line: str) -> Iterator[tuple[Callable[..., SimpleNamespace], bool]]:
    """Load an export in a fresh process, by the line in its export.json, for the block.

    Yields: (function that returns the outputs for inputs, both by name; True if the process has imported sparsesoup)
    """
    call = [sys.executable, "-P", subprocess_runner.__file__, line]
    environment = {**os.environ, "CI": "true"}  # disables OpenVINO's telemetry
    with (
        tempfile.TemporaryFile() as stderr,
        subprocess.Popen(call, cwd=folder, env=environment, stdin=PIPE, stdout=PIPE, stderr=stderr) as process,
    ):
        given, answers = process.stdin, process.stdout
        assert given is not None
        assert answers is not None

        def receive() -> Any:
            with contextlib.suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):
                given.flush()
                return pickle.load(answers)
            with contextlib.suppress(BrokenPipeError):
                given.close()
            process.wait()
            stderr.seek(0)
            lines = stderr.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise UserError(f"the export at {folder} does not answer in a fresh process: {lines[-1][:200]}")

        def infer(**inputs: Tensor) -> SimpleNamespace:
            with contextlib.suppress(BrokenPipeError):
                pickle.dump({name: t.numpy() for name, t in inputs.items()}, given)
            return SimpleNamespace(**{name: torch.from_numpy(array) for name, array in receive().items()})

        yield infer, receive()


def verified_export(run: Path, to: str, out: Path, settings: Mapping[str, Any] | None = None) -> WrittenExport:
    """Export a model, run the export in a fresh process on the whole test split, and compare with the source's outputs.

    The result is stored under `verified` in export.json: rows, equal predictions, the scores of both.

    Raises: UserError as `write_export` does, and if the model's training data is unknown; nothing is written then.
    """
    if to == "semi-structured":
        raise UserError(
            "--verify runs an export on the CPU, which has no 2:4 kernels; leave it out (where there is a GPU, "
            "answers are compared anyway), or verify --to dense, which has the same weights"
        )
    source = open_source(run)
    model_data, opened = _data_of(source)
    written = write_export(run, to, out, settings)
    with model_in_subprocess(written.path, written.facts["load"]) as (exported, ours):
        found = _compare_predictions(
            *(_score_answers(source, model_data, opened, infer) for infer in (source.model, exported))
        )
    found |= {"without_sparsesoup": not ours, "test_splits": test_splits(opened.source, opened.task)}
    write_table(out / "export.json", {**read_table(out / "export.json"), "verified": found})
    return WrittenExport(out, {**written.facts, "verified": found})


def _data_of(source: PrunedSource) -> tuple[ModelAndDataConfig, OpenedTask]:
    """Return the dataset that the source was trained on."""
    try:
        table = dict(source.facts["settings"])
        method = dict(table.pop("method"))
        name = str(method.pop("name"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"it is not known what data {source.folder} was trained on (no settings in its ticket.json), so there is "
            f"no test split to verify on; leave --verify out"
        ) from error
    refuse_objects(table, str(source.folder))
    settings = config_from_dict(name, {**table, "method": method})
    model_data = replace(settings.model_data, model=str(source.folder), prompts=None, class_names=None)
    return model_data, open_task(model_data)


def _score_answers(
    source: PrunedSource, model_data: ModelAndDataConfig, opened: OpenedTask, infer: Callable[..., Any]
) -> tuple[dict[str, Any], Tensor]:
    """Return (scores, outputs [rows, ...]) of a model on the test split."""
    kind, outputs, nothing = task_type_of(opened.task), [], RowBatches([], lambda rows: {})
    if isinstance(opened.task, ZeroShot):
        infer = TowerWithHead(infer, load_saved_head(source.folder, opened.task))

    def predict(model: Any, batch: Any) -> Tensor:
        on_cpu = {name: t.cpu() for name, t in batch.items()}  # both models are on the CPU
        outputs.append(kind.predict(infer, on_cpu))  # type: ignore[arg-type]  # not a module, but callable like one
        return outputs[-1]

    problem = Problem(
        pretrained=source.model, targets={}, train=nothing, validation=nothing, predict=predict,
        criterion=kind.criterion(opened.task), metric=lambda outputs, labels: {}, steps=1,
    )  # fmt: skip
    return score_test(problem, model_data, opened), torch.cat([t.double() for t in outputs])


def _compare_predictions(one: tuple[dict[str, Any], Tensor], other: tuple[dict[str, Any], Tensor]) -> dict[str, Any]:
    """Compare the predictions of an export and its source.

    Equal predictions: the same class; for questions the same best start and end in a window; numbers within `NEAR`.
    """
    (scores, outputs), (found, answers) = one, other
    difference = (outputs - answers).abs()
    if outputs.shape[-1] == 1:
        same = difference.squeeze(-1) <= NEAR
    else:
        same = (outputs.argmax(-1) == answers.argmax(-1)).reshape(len(outputs), -1).all(-1)
    return {
        "rows": len(same),
        "same": int(same.sum()),
        "largest_difference": float(difference.max()),
        "scores": found,
        "scores_of_source": scores,
    }
