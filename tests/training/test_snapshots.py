"""Snapshots beside the state, in host memory and on disk bring back the same bits, and leave nothing behind."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import same, tiny
from processes import kill_after
from sparsesoup.cli.main import main
from sparsesoup.core import tensor_files
from sparsesoup.core.errors import UserError
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.tensor_files import TensorFile, save_tensors
from sparsesoup.methods.imp import IterativeMagnitudePruning
from sparsesoup.methods.isp import InstantSoup
from sparsesoup.methods.scores import magnitude
from sparsesoup.training.loop import train
from sparsesoup.training.problem import Problem
from sparsesoup.training.snapshots import STORAGES, SnapshotStore
from sparsesoup.training.state import TrainState
from tiny_hub import arguments, masks_of, run_of, weights_of
from tiny_loops import BATCHES, Loop

METHODS = {
    "isp": InstantSoup(stages=2, weak_masks=3, look_ahead=0.05),
    "imp": IterativeMagnitudePruning(cut=0.5),
    "imp-rewind": IterativeMagnitudePruning(cut=0.5, rewind=0.1),
    "imp-rate": IterativeMagnitudePruning(cut=0.5, rewind=0.1, back="rate"),
}


def pruned(problem: Problem) -> TrainState:
    state = train(problem.start_run(), problem, 5)
    state.set_masks_(topk_masks(magnitude(state.prunable_parameters()), 0.5))
    with torch.no_grad():
        state.prunable_parameters()["wide.weight"].mul_(-1)  # zeros of both signs
    return state


def bits(state: TrainState) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in state.tensors().items()}


class Counted(SnapshotStore):
    """A store that counts its snapshots, and the memory in them."""

    def __init__(self, *of: Any) -> None:
        super().__init__(*of)
        self.taken: list[list[str]] = []

    def take(self, state: TrainState) -> Any:
        self.taken.append([name for name in state.tensors() if name.startswith("memory/")])
        return super().take(state)


@pytest.mark.parametrize("place", STORAGES)
def test_a_snapshot_brings_back_the_same_bits_as_often_as_wanted(place: str, tmp_path: Path) -> None:
    problem = tiny()
    state = pruned(problem)
    state.memory["votes"] = torch.arange(3)
    before, facts = bits(state), state.facts()
    snapshot = SnapshotStore(place, tmp_path).take(state)
    for _ in range(2):
        train(state, problem, 3, stream=("fork",))
        state.memory["votes"] += 1
        assert not same(bits(state), before)
        state.restore_snapshot_(snapshot)
        assert same(bits(state), before)
        assert state.facts() == facts


def test_a_snapshot_on_disk_is_gone_with_its_last_reference(tmp_path: Path) -> None:
    state = pruned(tiny())
    snapshot = SnapshotStore("disk", tmp_path / "new").take(state)
    (file,) = (tmp_path / "new").iterdir()
    assert file.stat().st_size > sum(t.nbytes for t in state.tensors().values())
    del snapshot
    gc.collect()
    assert not list((tmp_path / "new").iterdir())


def test_a_snapshot_without_room_on_the_disk_says_so_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsesoup.training.snapshots.write_tensors", full)
    with pytest.raises(UserError, match=r"the disk is full \(.*No space left"):
        SnapshotStore("disk", tmp_path).take(pruned(tiny()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", METHODS)
def test_runs_end_at_the_same_bits_wherever_their_snapshots_are(name: str, tmp_path: Path) -> None:
    tickets = [METHODS[name].run(tiny(steps=40, snapshots=SnapshotStore(place, tmp_path)), 0.7) for place in STORAGES]
    for ticket in tickets[1:]:
        assert same(ticket.masks, tickets[0].masks)
        assert same(ticket.weights, tickets[0].weights)
        assert ticket.notes == tickets[0].notes
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_the_forks_of_a_stage_share_one_snapshot_without_the_memory() -> None:
    store = Counted()
    METHODS["isp"].run(tiny(steps=40, snapshots=store), 0.7)
    assert store.taken == [[], []]  # one a stage, though the votes of the first are in the memory by the second


def test_a_run_that_rewinds_to_the_checkpoint_keeps_no_copy_of_it() -> None:
    store = Counted()
    METHODS["imp"].run(tiny(steps=10, snapshots=store), 0.7)
    assert not store.taken
    METHODS["imp-rewind"].run(tiny(steps=10, snapshots=store), 0.7)
    assert len(store.taken) == 1


def test_a_loop_of_ones_own_keeps_the_way_back_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ended, sizes = [], []
    for place in ("device", "disk"):
        loop = Loop()
        pruner = loop.attach(replace(METHODS["isp"], budget="extra"), batches=BATCHES, snapshots=place)  # type: ignore[type-var]
        loop.train(after=lambda step: sizes.append(len(list(tmp_path.iterdir()))))
        ended.append((pruner.finish(), {name: t.clone() for name, t in loop.model.state_dict().items()}))
    assert same(ended[0][0], ended[1][0])
    assert same(ended[0][1], ended[1][1])
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.integration
def test_a_run_killed_with_snapshots_on_disk_ends_the_same_and_leaves_no_file(place: Path, tmp_path: Path) -> None:
    plain, other = tmp_path / "plain", tmp_path / "other"
    assert main(arguments(place, "imp-rewind", plain)) == 0
    line = [*arguments(place, "imp-rewind", other), "--snapshots", "disk"]
    assert kill_after(line, other, 9) == -9
    assert list(other.rglob(".snapshot-*.part"))
    assert main(line) == 0
    assert not list(other.rglob(".*.part"))
    assert same(masks_of(run_of(other)), masks_of(run_of(plain)))
    assert same(weights_of(run_of(other) / "model"), weights_of(run_of(plain) / "model"))


@pytest.mark.integration
def test_a_place_that_is_none_is_refused_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["prune", "isp", "--snapshots", "tape", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "sparsesoup: --snapshots: expected device, host, disk, got 'tape'\n"
    with pytest.raises(UserError, match="expected device, host, disk, got 'tape'"):
        Loop().attach("gradual", snapshots="tape")


def test_little_of_a_file_is_mapped_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {f"w{i}": torch.full((100,), float(i)) for i in range(10)}
    save_tensors(tmp_path / "t.safetensors", table)
    opened, real = [], tensor_files.safe_open

    def open_file(*args: Any, **more: Any) -> Any:
        opened.append(args)
        return real(*args, **more)

    monkeypatch.setattr(tensor_files, "safe_open", open_file)
    monkeypatch.setattr(tensor_files, "MAPPED", 1000)
    assert same(dict(TensorFile(tmp_path / "t.safetensors")), table)
    assert len(opened) == 4  # after every three tensors of 400 bytes
