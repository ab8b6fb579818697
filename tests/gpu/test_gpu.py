"""What has to be on a GPU to be seen; skipped by name where there is none. Run them all by benchmarks/gpu.sh."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from conftest import same, tiny
from killed_runs import finish_killed_run
from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Block
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.masks import count_kept, count_total
from sparsesoup.methods import METHODS, TABLE
from sparsesoup.methods.scores import magnitude
from sparsesoup.training.batching import Batch
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.device import device_chosen
from sparsesoup.training.loop import train
from sparsesoup.training.observer import Observer
from sparsesoup.training.optimizers import BITSANDBYTES, OPTIMIZERS
from tiny_bert import bert
from tiny_runs import method

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is there"),
]
BASE = TrainingConfig(learning_rate=1e-2, batch_size=16, precision="no", full_determinism=True)
FAMILIES = {row.family: name for name, row in reversed(TABLE.items()) if name != "ticket"}  # the first of each


@pytest.fixture(autouse=True)
def _on_the_gpu() -> Iterator[None]:
    with device_chosen("cuda:0"):
        yield


@pytest.mark.parametrize("name", METHODS)
def test_every_method_reaches_its_sparsity(name: str, tmp_path: Path) -> None:
    sparsity = 0.0 if TABLE[name].dense else 0.5
    found = method(name, tmp_path).run(tiny(training=BASE), sparsity)
    total = count_total(found.masks)
    assert abs(total - count_kept(found.masks) - sparsity * total) < 0.02 * total
    assert all((found.weights[n][~mask] == 0).all() for n, mask in found.masks.items())
    assert all(t.isfinite().all() for t in found.weights.values())


@pytest.mark.parametrize("name", sorted(FAMILIES.values()))
def test_a_killed_run_ends_with_the_masks_of_a_whole_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, chosen = partial(tiny, training=BASE), method(name, tmp_path)
    sparsity = 0.0 if TABLE[name].dense else 0.5
    whole = chosen.run(make(), sparsity)
    folder = tmp_path / "stages"
    folder.mkdir()
    resumed = finish_killed_run(chosen, make, sparsity, folder, monkeypatch, kills=1, steps=33)
    assert same(resumed.masks, whole.masks)
    assert same(resumed.weights, whole.weights)


@pytest.mark.parametrize("scope", ["global", "tensor", "row", "2:4"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_masks_of_given_scores_are_those_of_the_cpu(scope: Any, kind: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(512, 1024, generator=draw).to(kind) for name in ("a", "b")}
    here = topk_masks(scores, 0.5, scope=scope)
    there = topk_masks({name: score.cuda() for name, score in scores.items()}, 0.5, scope=scope)
    assert same({name: mask.cpu() for name, mask in there.items()}, here)


def test_the_blocks_of_given_scores_are_those_of_the_cpu() -> None:
    scores = {"a": torch.rand(512, 1024, generator=torch.Generator().manual_seed(0))}
    here = topk_masks(scores, 0.5, pattern=Block(32, 32))
    there = topk_masks({"a": scores["a"].cuda()}, 0.5, pattern=Block(32, 32))
    assert same({"a": there["a"].cpu()}, here)


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"precision": "fp16"}, {"tf32": True}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_transformer_trains_in_every_precision(settings: dict[str, Any], checkpointing: bool) -> None:
    training = TrainingConfig(learning_rate=1e-3, batch_size=8, gradient_checkpointing=checkpointing, **settings)
    found = METHODS["gradual"].run(bert(training=training, steps=40), 0.5)
    assert found.sparsity == pytest.approx(0.5, abs=1e-3)
    assert all(t.isfinite().all() for t in found.weights.values() if t.is_floating_point())


def test_a_compiled_transformer_trains() -> None:
    training = TrainingConfig(learning_rate=1e-3, batch_size=8, torch_compile=True)
    found = METHODS["gradual"].run(bert(training=training, steps=12), 0.5)
    assert found.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("name", [*OPTIMIZERS, *BITSANDBYTES])
def test_masks_hold_with_every_optimizer(name: Any) -> None:
    if name in BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
    problem = tiny(training=replace(BASE, optimizer=name, weight_decay=0.1, full_determinism=False))
    state = train(problem.start_run(), problem, 3)
    state.set_masks_(topk_masks(magnitude(state.prunable_parameters()), 0.5))
    for _ in range(5):
        train(state, problem, 1)
        params = state.prunable_parameters()
        assert all(not params[n][~mask].any() for n, mask in state.masks.items())


def test_a_step_makes_the_host_wait_for_nothing() -> None:
    """torch refuses every operation that waits, from the second step of a training to its last but one."""
    seen = []

    class Watch(Observer):
        def step(self, record: Mapping[str, Any]) -> None:
            if record:
                seen.append(record["step"])
                torch.cuda.set_sync_debug_mode("error" if 2 <= record["step"] < 18 else "default")

    problem = tiny(training=TrainingConfig(learning_rate=1e-2, batch_size=16), observer=Watch())
    state = problem.start_run()
    state.set_masks_(topk_masks(magnitude(state.prunable_parameters()), 0.5))
    try:
        train(state, problem, 20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen == [*range(1, 21)]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_loss_that_is_not_finite_changes_nothing(precision: Any) -> None:
    count = 0

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal count
        count += 1
        return functional.cross_entropy(model(batch["x"]), batch["labels"]) * (math.nan if count == 8 else 1.0)

    problem = tiny(objective=loss, training=replace(BASE, precision=precision))
    state = train(problem.start_run(), problem, 7)
    before = {name: t.detach().clone() for name, t in state.tensors().items()}
    with pytest.raises(UserError, match=r"^the loss is nan at step 8 "):
        train(state, problem, 7)
    assert state.step == 7
    assert same({n: t.cpu() for n, t in state.tensors().items()}, {n: t.cpu() for n, t in before.items()})
