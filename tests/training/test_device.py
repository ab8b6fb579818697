"""The device of a run, and faults of mixed devices found without an accelerator."""

from collections.abc import Callable, Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import Parameter

from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Block, CoupledGroups, Element
from sparsesoup.core.masks import Masks, apply_masks_
from sparsesoup.core.targets import Target
from sparsesoup.core.topk import _best_first
from sparsesoup.core.topk_tensors import TensorPasses
from sparsesoup.methods.gates.attach import attach_gates
from sparsesoup.methods.gates.hard_concrete import HardConcrete, SharedNoise
from sparsesoup.methods.gates.straight_through import StraightThroughGate
from sparsesoup.training import device as devices
from sparsesoup.training.state import TrainState
from sparsesoup.training.zero_hooks import zero_gradients

AWAY = torch.device("meta")  # tensors without data, which are refused beside those of the CPU


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(devices.VARIABLE, "cpu")
    yield
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("restored")
def test_the_chosen_device_is_that_of_accelerate() -> None:
    assert devices.choose_device("cpu") == torch.device("cpu")
    assert Accelerator().device == torch.device("cpu")


@pytest.mark.usefixtures("restored")
def test_a_gpu_by_its_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert devices.choose_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]
    assert devices.choose_device("cuda").type == "cuda"


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", "", "cpu:0", "cuda:1234", "meta"])
def test_a_name_that_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^device: must be cpu, cuda, cuda:<number> or mps, got"):
        devices.check_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:2", "mps"])
def test_a_device_that_is_not_there_is_refused_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 if name == "cuda:2" else 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert main(["prune", "magnitude", "--device", name]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    assert f"--device: torch {torch.__version__} finds no {name} here, but cpu" in said
    assert ("cuda:0, cuda:1" in said) == (name == "cuda:2")


def two_layers() -> tuple[nn.Sequential, dict[str, Target], Masks]:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(AWAY)
    targets = {name: Target("other", (8, 8)) for name in ("0.weight", "1.weight")}
    return net, targets, {name: torch.ones(8, 8, dtype=torch.bool, device=AWAY) for name in targets}


def test_mixed_devices_are_found() -> None:
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device=AWAY) + torch.ones(3)


def test_masks_gradients_and_moments_stay_on_their_device() -> None:
    net, targets, masks = two_layers()
    state = TrainState(model=net, optimizer=torch.optim.SGD(net.parameters(), 0.1), targets=targets, masks=masks)
    stop = zero_gradients(state.prunable_parameters(), lambda: state.masks)
    net(torch.ones(2, 8, device=AWAY)).sum().backward()
    for parameter in state.prunable_parameters().values():
        state.optimizer.state[parameter] = {"exp_avg": torch.ones(8, 8, device=AWAY)}
    state.enforce_masks_()
    apply_masks_(state.prunable_parameters(), masks)
    snapshot = state.take_snapshot()
    state.restore_snapshot_(snapshot)
    stop()
    assert {t.device for t in state.tensors().values()} == {AWAY}


GATES: dict[str, Callable[[Parameter, SharedNoise, int, int], StraightThroughGate]] = {
    "hard concrete": lambda score, noise, tie, member: HardConcrete(score, noise, tie),
    "penalised": lambda score, noise, tie, member: StraightThroughGate(score, Element, tie, member, 0.5),
    "plain": lambda score, noise, tie, member: StraightThroughGate(score, Element, tie, member),
}


@pytest.mark.parametrize("kind", GATES)
def test_gates_and_their_gradients_stay_on_their_device(kind: str) -> None:
    net, targets, _ = two_layers()
    ties = tuple(CoupledGroups(((name, Block()),)) for name in targets)
    noise = SharedNoise(torch.zeros(200))

    def make(number: int, place: int, tie: CoupledGroups) -> nn.Module:
        return GATES[kind](Parameter(torch.zeros(8, 8)), noise, number, place)

    learnt = attach_gates(net, ties, make)
    net.to(AWAY)
    net(torch.ones(2, 8, device=AWAY)).sum().backward()
    assert len(learnt) == 2
    assert {p.grad.device for p in net.parameters() if p.grad is not None} == {AWAY}


@pytest.mark.parametrize("bound", [False, True])
def test_the_selection_of_whole_tensors_stays_on_the_device(bound: bool) -> None:
    scores = [torch.ones(30, 40, device=AWAY), torch.ones(20, 5, device=AWAY)]
    alive = [torch.ones_like(s, dtype=torch.bool) for s in scores] if bound else None
    passes = TensorPasses(scores, alive)
    low, high = passes.bracket(None, 0.3, 1300, True)
    assert {low.device, high.device} == {AWAY}
    assert {m.device for m in passes.equal_to(low)} == {AWAY}
    masks: list[Tensor] = passes.equal_to(low)
    passes.keep_first_(masks, 3)
    assert {w.device for w in (*passes.window_above(None, low), *passes.window_below(None, low))} == {AWAY}
    assert _best_first(torch.ones(9, device=AWAY), None, 3).device == AWAY
    assert _best_first(torch.ones(9, device=AWAY), torch.ones(9, device=AWAY), 3).device == AWAY
