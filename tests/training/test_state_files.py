"""Saved states: small, read back as they were, and never a second time in memory."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conftest import same, tiny
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.tensor_files import LazyTensor, load_tensors, save_tensors
from sparsesoup.methods.scores import magnitude
from sparsesoup.training.loop import train
from sparsesoup.training.state import TrainState
from sparsesoup.training.state_files import open_state, save_state

KINDS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def trained(sparsity: float) -> TrainState:
    problem = tiny()
    state = problem.start_run()
    state.set_masks_(topk_masks(magnitude(state.prunable_parameters()), sparsity))
    state.memory["votes/wide"] = torch.arange(6, dtype=torch.uint8)
    return train(state, problem, 5)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_a_saved_state_is_read_back_as_it_was(sparsity: float, tmp_path: Path) -> None:
    state, other = trained(sparsity), tiny().start_run()
    save_state(tmp_path / "s.safetensors", state.tensors(), state.facts())
    with open_state(tmp_path / "s.safetensors") as (tensors, facts):
        assert same(dict(tensors), state.tensors())
        other.load_state_(tensors, facts)
    assert same(other.tensors(), state.tensors())
    assert other.facts() == state.facts()


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_a_saved_state_holds_the_kept_weights_and_their_moments_and_a_bit_for_each_mask(
    sparsity: float, tmp_path: Path
) -> None:
    state = trained(sparsity)
    del state.memory["votes/wide"]
    save_state(tmp_path / "s.safetensors", state.tensors(), state.facts())
    held = sum(t.numel() * t.itemsize for t in load_file(tmp_path / "s.safetensors").values())
    total = sum(p.numel() for p in state.model.parameters())
    kept = total - sum(int((~mask).sum()) for mask in state.masks.values())
    bits = sum(-(-mask.numel() // 8) for mask in state.masks.values())
    steps = 4 * sum("/step/" in name for name in state.tensors())
    assert held == 12 * kept + bits + steps


def test_values_at_pruned_weights_are_kept_where_they_are_not_zero(tmp_path: Path) -> None:
    state = trained(0.5)
    with torch.no_grad():
        state.prunable_parameters()["wide.weight"].add_(1.0)
    save_state(tmp_path / "s.safetensors", state.tensors(), state.facts())
    with open_state(tmp_path / "s.safetensors") as (tensors, _):
        assert same(dict(tensors), state.tensors())


def test_a_state_of_an_older_version_is_read(tmp_path: Path) -> None:
    state = trained(0.5)
    save_tensors(tmp_path / "s.safetensors", state.tensors(), state.facts())
    with open_state(tmp_path / "s.safetensors") as (tensors, facts):
        assert same(dict(tensors), state.tensors())
        assert facts == state.facts()


class Living:
    """The most tensors of a file that live at a time."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def watch(self, tensor: Tensor) -> Tensor:
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(tensor, self._gone)
        return tensor

    def _gone(self) -> None:
        self.now -= 1


def test_tensors_are_written_one_after_the_other(tmp_path: Path) -> None:
    living = Living()
    lazy = {str(i): LazyTensor(torch.float32, (50,), lambda: living.watch(torch.ones(50))) for i in range(20)}
    save_tensors(tmp_path / "t.safetensors", lazy)
    assert living.most <= 2
    assert len(load_file(tmp_path / "t.safetensors")) == 20


def test_a_state_is_loaded_one_tensor_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, other, living = trained(0.5), trained(0.9), Living()
    state.memory.clear()
    save_state(tmp_path / "s.safetensors", state.tensors(), state.facts())
    with open_state(tmp_path / "s.safetensors") as (tensors, facts):
        real = type(tensors).__getitem__
        monkeypatch.setattr(type(tensors), "__getitem__", lambda file, name: living.watch(real(file, name)))
        gc.collect()
        other.load_state_(tensors, facts)
    assert living.most <= 2 + len(state.masks)  # masks are part of the state itself
    assert same(other.tensors(), state.tensors())


def test_a_file_is_that_of_safetensors_for_every_dtype_and_shape(tmp_path: Path) -> None:
    table: dict[str, Any] = {str(kind): (torch.arange(6).reshape(2, 3) % 2).to(kind) for kind in KINDS}
    table |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "turned": torch.arange(6.0).reshape(2, 3).t()}
    save_tensors(tmp_path / "t.safetensors", table, {"a": 1})
    assert same(load_file(tmp_path / "t.safetensors"), table)
    found, facts = load_tensors(tmp_path / "t.safetensors")
    assert same(found, table)
    assert facts == {"a": 1}


def test_a_write_that_fails_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.ones(3)})

    def fail() -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        save_tensors(path, {"a": torch.zeros(3), "b": LazyTensor(torch.float32, (3,), fail)})
    assert load_file(path)["a"].tolist() == [1, 1, 1]
    assert [f.name for f in tmp_path.iterdir()] == ["t.safetensors"]
