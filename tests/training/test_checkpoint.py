"""A killed run goes on where it was: no piece done twice, no step lost or counted twice, the same bits in the end."""

import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import same, tiny
from processes import FORKS
from sparsesoup.core.errors import UserError
from sparsesoup.core.files import atomic_write, write_json, write_text
from sparsesoup.core.granularity import Block
from sparsesoup.core.masks import count_kept
from sparsesoup.core.ticket import Ticket
from sparsesoup.methods import METHODS, TABLE, Method
from sparsesoup.training.batching import Batch
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.config import TrainingOverrides
from sparsesoup.training.cost import Cost, CostTracker
from sparsesoup.training.loop import train
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState
from sparsesoup.training.state_files import open_state

pytestmark = pytest.mark.integration

STEPS = 240
LONG: dict[str, Method] = {
    "imp-rewind": replace(METHODS["imp-rewind"], cut=0.4),
    "isp": METHODS["isp"],
    "gradual": METHODS["gradual"],
    "isp-code": replace(METHODS["isp-code"], cut=0.2, weak=0.5, weak_masks=3),
    "pins": METHODS["pins"],
    "power-propagation": METHODS["power-propagation"],
    "gradient-flow": METHODS["gradient-flow"],
    "lottery-pools": replace(METHODS["lottery-pools"], cut=0.6, neighbours=2),
}
STEPPED: dict[str, tuple[int, dict[str, Any]]] = {  # steps and settings in which every kind of piece is short
    "dense": (60, {}),
    "magnitude": (60, {}),
    "imp": (40, {"cut": 0.5}),
    "imp-rewind": (40, {"cut": 0.5}),
    "lr-rewind": (40, {"cut": 0.5}),
    "isp": (60, {}),
    "isp afresh": (
        60,
        {"moments": "fresh", "merge": "intersection", "protocols": (TrainingOverrides(rate=(0.0, 10.0)),)},
    ),
    "isp-paper": (60, {"stage": 0.05, "cut": 0.4, "weak_steps": 2}),
    "isp-code": (60, {"stage": 0.2, "cut": 0.3}),
    "isp-code growing": (60, {"stage": 0.1, "cut": 0.3, "growing": True, "warmup": 1}),
    "isp-code wide": (
        60,
        {"stage": 0.2, "warmup": 1, "merge": "intersection", "protocols": (TrainingOverrides(rate=(0, 10)),)},
    ),
    "gmp-star": (60, {}),
    "gradual": (60, {}),
    "early-bird": (60, {"threshold": 0.0, "search": 0.4}),
    "lottery-pools": (30, {"cut": 0.5, "neighbours": 3}),
    "model-soup": (30, {}),
    "instant-model-soup": (60, {"look_ahead": 0.1}),
    "sparse-model-soup": (30, {"phases": 2, "retrain": 0.4}),
    "snip": (60, {"batches": 4, "warmup": 0.2}),  # what is not trained is done anew: it must fit between two deaths
    "grasp": (60, {"batches": 4}),
    "wanda": (60, {"batches": 4}),
    "gradient-flow": (60, {"measure": "norm", "batches": 4}),
    "power-propagation": (60, {}),
    "platon": (60, {}),
    "gradual-obs": (60, {"prunings": 4, "batches": 2}),
    "grain": (60, {"structure": "rows"}),
    "pins": (60, {}),
    "sparse-progressive-distillation": (60, {}),
    "movement": (60, {}),
    "soft-movement": (60, {"score_rate": 0.5}),
    "l0": (60, {"score_rate": 1.0}),
    "magnitude-ste": (60, {}),
    "block-movement": (60, {"score_rate": 0.5, "pattern": Block(5, 4)}),
    "mlpruning": (60, {"tile": Block(1, 4), "blocks": 0.5}),
    "hybrid-movement": (60, {"score_rate": 0.5, "tile": Block(5, 4)}),
    "hybrid-filled": (60, {"score_rate": 0.5, "tile": Block(5, 4), "refill": 0.5}),
}


class Killed(BaseException):
    """Stands for the end of a process."""


def checkpointed(folder: Path, **changes: Any) -> Problem:
    meter = CostTracker()
    return tiny(meter=meter, checkpointer=Checkpointer(meter, folder, every=0.0), **changes)


def costs(ticket: Ticket) -> dict[str, dict[str, float]]:
    """What the meter says, the clock and the one validation at the end aside."""
    return {label: {k: v for k, v in c.items() if k != "seconds"} for label, c in ticket.cost.items()}


def bits(state: TrainState) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in state.tensors().items()}


def always(patch: pytest.MonkeyPatch) -> None:
    """Save whenever it may be time, however long the last save took."""
    patch.setattr("sparsesoup.training.checkpoint.SHARE", 0)


def live(folder: Path, name: str) -> None:
    """One life of a run, in a process of its own."""
    ticket = LONG[name].run(checkpointed(folder, steps=STEPS), 0.6)
    save_file({**{f"m/{n}": m for n, m in ticket.masks.items()}, **ticket.weights}, folder / "product")
    write_json(folder / "cost.json", costs(ticket))


@pytest.mark.parametrize("name", list(LONG))
def test_a_run_killed_at_random_moments_ends_as_if_it_never_was(name: str, tmp_path: Path) -> None:
    draw, killed, record = random.Random(name), 0, tmp_path / "checkpoint.json"
    while not (tmp_path / "cost.json").exists():
        written = record.stat().st_mtime_ns if record.exists() else 0
        process = FORKS.Process(target=live, args=(tmp_path, name))
        process.start()
        while process.is_alive() and killed < 4:
            if record.exists() and record.stat().st_mtime_ns != written:
                time.sleep(draw.uniform(0.0, 0.1))
                process.kill()  # SIGKILL
                break
            time.sleep(0.002)
        process.join()
        assert process.exitcode in (0, -9)
        killed += process.exitcode == -9
    assert killed >= 2
    plain = LONG[name].run(tiny(steps=STEPS), 0.6)
    product = load_file(tmp_path / "product")
    assert same(product, {**{f"m/{n}": m for n, m in plain.masks.items()}, **plain.weights})
    assert json.loads((tmp_path / "cost.json").read_text()) == costs(plain)


@pytest.mark.parametrize("name", STEPPED)
def test_a_run_that_dies_at_any_step_resumes_to_the_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every eleventh forward kills it, so that the end falls into every kind of piece."""
    always(monkeypatch)
    (steps, short), kind = STEPPED[name], name.partition(" ")[0]
    method, sparsity, count = replace(METHODS[kind], **short), 0.0 if TABLE[kind].dense else 0.6, 0

    def predict(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal count
        count += torch.is_grad_enabled()  # a validation is done anew as a whole
        if torch.is_grad_enabled() and count % 11 == 0:
            raise Killed
        return model(batch["x"])

    resumed = []
    while True:
        problem = checkpointed(tmp_path, predict=predict, steps=steps)
        resumed.append(problem.checkpointer.resumed_stage)
        try:
            ticket = method.run(problem, sparsity)
            break
        except Killed:
            assert len(resumed) < 60
    plain = method.run(tiny(steps=steps), sparsity)
    assert same(ticket.masks, plain.masks)
    assert same(ticket.weights, plain.weights)
    assert ticket.notes == plain.notes
    assert costs(ticket) == costs(plain)
    assert resumed[0] is None
    assert len(resumed) > 3
    assert any(r and r.startswith("the middle of ") for r in resumed)


def test_finished_pieces_are_skipped_and_the_last_state_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch)
    first = checkpointed(tmp_path)
    state = first.start_run()
    first.checkpointer.run_stage("one", state, train, state, first, 3)
    first.checkpointer.run_stage("two", state, train, state, first, 4)
    assert first.checkpointer.finished == ["one", "two"]

    second = checkpointed(tmp_path)
    other, done = second.start_run(), []
    assert second.checkpointer.resumed_stage == "two"
    assert second.meter.costs == first.meter.costs
    for name in ("one", "two"):
        second.checkpointer.run_stage(name, other, done.append, name)
    assert done == []
    assert same(bits(other), bits(state))
    second.checkpointer.run_stage("three", other, train, other, second, 5)
    first.checkpointer.run_stage("three", state, train, state, first, 5)
    assert same(bits(other), bits(state))
    assert second.meter.costs["main"].steps == 12


def test_a_held_piece_is_restored_on_every_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    first = checkpointed(tmp_path)
    state = first.start_run()
    first.checkpointer.run_stage("origin", state, train, state, first, 3, hold=True)
    origin = bits(state)
    for i in range(3):
        first.checkpointer.run_stage(f"round-{i}", state, train, state, first, 2)
    for _ in range(2):
        again = checkpointed(tmp_path)
        other = again.start_run()
        again.checkpointer.run_stage("origin", other, train, other, again, 3, hold=True)
        assert same(bits(other), origin)
        for i in range(3):
            again.checkpointer.run_stage(f"round-{i}", other, train, other, again, 2)
        assert same(bits(other), bits(state))
    files = {f.name for f in tmp_path.iterdir()}
    assert files == {"held-origin.safetensors", "checkpoint.json", "state-a.safetensors"}


def test_a_run_whose_loss_breaks_keeps_its_finished_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)

    def objective(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["x"]).sum() * (torch.nan if flaw else 1e-3)

    broken = checkpointed(tmp_path, objective=objective)
    state, flaw = broken.start_run(), False
    broken.checkpointer.run_stage("good", state, train, state, broken, 3)
    flaw = True
    with pytest.raises(UserError, match=r"at step 4 of the main training; what was finished is kept"):
        broken.checkpointer.run_stage("bad", state, train, state, broken, 3)
    after = checkpointed(tmp_path)
    assert after.checkpointer.finished == ["good"]
    assert after.meter.costs["main"].steps == 3


def test_a_fork_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    problem = checkpointed(tmp_path)
    state = problem.start_run()

    def look() -> None:
        here = state.take_snapshot()
        with problem.checkpointer.without_saving():
            train(state, problem, 4, label="weak")
            assert not list(tmp_path.glob("*"))
        state.restore_snapshot_(here)

    problem.checkpointer.run_stage("weak", state, look)
    with open_state(tmp_path / "state-a.safetensors") as (tensors, _):
        assert tensors.keys() == state.tensors().keys()


@pytest.mark.parametrize(("name", "every"), [("lottery-pools", 37), ("model-soup", 7), ("instant-model-soup", 20)])
def test_a_run_that_dies_while_it_validates_resumes_to_the_bit(
    name: str, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of validation rows now and then kills it; a piece that selects has fewer, or it would never end."""
    always(monkeypatch)
    steps, short = STEPPED[name]
    method, sparsity, count, attempts = replace(METHODS[name], **short), 0.0 if TABLE[name].dense else 0.6, 0, 0

    def predict(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal count
        count += 1 - int(model.training)
        if not model.training and count % every == 0:
            raise Killed
        return model(batch["x"])

    while True:
        attempts += 1
        try:
            ticket = method.run(checkpointed(tmp_path, predict=predict, steps=steps), sparsity)
            break
        except Killed:
            assert attempts < 60
    plain = method.run(tiny(steps=steps), sparsity)
    assert attempts > 2
    assert same(ticket.weights, plain.weights)
    assert (ticket.notes, costs(ticket)) == (plain.notes, costs(plain))


@pytest.mark.parametrize("folder", [True, False])
def test_a_product_comes_back_as_it_was_when_it_was_stored(folder: bool, tmp_path: Path) -> None:
    checkpointer = Checkpointer(CostTracker(), tmp_path if folder else None)
    weights = {"w": torch.arange(6.0).view(2, 3).t(), "count": torch.tensor(3)}
    before = {n: t.clone() for n, t in weights.items()}
    checkpointer.put_artifact("round-1", weights)
    weights["w"].zero_()
    again = Checkpointer(CostTracker(), tmp_path) if folder else checkpointer
    assert same(again.get_artifact("round-1"), before)
    again.put_artifact("round-1", weights)
    assert same(again.get_artifact("round-1"), weights)
    assert [f.name for f in tmp_path.iterdir()] == (["stored-round-1.safetensors"] if folder else [])
    again.close()
    assert not list(tmp_path.iterdir())
    assert not again._stored


def test_a_product_is_stored_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = Checkpointer(CostTracker(), tmp_path)
    checkpointer.put_artifact("soup", {"w": torch.ones(3)})

    def die(tensor: Tensor) -> None:
        raise Killed

    monkeypatch.setattr("sparsesoup.core.tensor_files._bytes_of", die)
    with pytest.raises(Killed):
        checkpointer.put_artifact("soup", {"w": torch.zeros(3)})
    assert same(checkpointer.get_artifact("soup"), {"w": torch.ones(3)})
    assert [f.name for f in tmp_path.iterdir()] == ["stored-soup.safetensors"]


@pytest.mark.parametrize("damage", [b"", b"half", None])
def test_a_damaged_product_is_refused_in_one_line(damage: bytes | None, tmp_path: Path) -> None:
    if damage is not None:
        (tmp_path / "stored-soup.safetensors").write_bytes(damage)
    with pytest.raises(UserError, match=r"^damaged artifact .*\.safetensors \(.*remove .* to start over$") as caught:
        Checkpointer(CostTracker(), tmp_path).get_artifact("soup")
    assert "\n" not in str(caught.value)


def test_saves_cost_a_fiftieth_of_the_time_at_most(tmp_path: Path) -> None:
    problem = checkpointed(tmp_path)
    state = problem.start_run()
    problem.checkpointer.run_stage("one", state, train, state, problem, 1)
    saved = (tmp_path / "checkpoint.json").stat().st_mtime_ns
    problem.checkpointer._took = 1e6
    problem.checkpointer.run_stage("two", state, train, state, problem, 5)
    assert (tmp_path / "checkpoint.json").stat().st_mtime_ns == saved


def test_without_a_folder_nothing_is_kept_and_all_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    monkeypatch.chdir(tmp_path)
    problem, done = tiny(), []
    problem.checkpointer.every = 0.0
    problem.checkpointer.run_stage("one", problem.start_run(), done.append, 1, hold=True)
    assert done == [1]
    assert not list(tmp_path.iterdir())


def test_closing_removes_the_states_and_leaves_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    problem = checkpointed(tmp_path)
    state = problem.start_run()
    problem.checkpointer.run_stage("one", state, train, state, problem, 2, hold=True)
    problem.checkpointer.close()
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint.json"]


def test_the_position_is_saved_and_returned_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    returned: list[int] = []
    meter = CostTracker()
    checkpointer = Checkpointer(meter, tmp_path, 0.0, position=lambda: 41, rewind=returned.append)
    problem = tiny(meter=meter, checkpointer=checkpointer)
    state = problem.start_run()
    checkpointer.run_stage("one", state, train, state, problem, 1)
    Checkpointer(CostTracker(), tmp_path, rewind=returned.append)
    assert returned == [0, 41]


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"finished": []}', "null"])
def test_a_damaged_checkpoint_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.json").write_text(damage)
    said = r"^damaged checkpoint .*checkpoint\.json \(.*remove .* to start over$"
    with pytest.raises(UserError, match=said) as caught:
        Checkpointer(CostTracker(), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "foreign"])
def test_a_damaged_state_is_refused_in_one_line(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    problem = checkpointed(tmp_path)
    state = problem.start_run()
    problem.checkpointer.run_stage("one", state, train, state, problem, 1)
    (file,) = tmp_path.glob("*.safetensors")
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "foreign":
        save_file({"model/other": torch.zeros(1)}, file)
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
    again = checkpointed(tmp_path)
    with pytest.raises(UserError, match=r"^damaged state .*\.safetensors \(.*remove .* to start over$") as caught:
        again.checkpointer.run_stage("one", again.start_run(), train)
    assert "\n" not in str(caught.value)


def test_a_half_written_file_counts_as_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    problem = checkpointed(tmp_path)
    state = problem.start_run()
    problem.checkpointer.run_stage("one", state, train, state, problem, 2)
    before, good = bits(state), (tmp_path / "checkpoint.json").read_text()

    def die(*args: object, **more: object) -> None:
        raise Killed

    for point in (
        "sparsesoup.core.tensor_files._bytes_of",
        "sparsesoup.training.checkpoint.write_table",
        "sparsesoup.core.files.os.replace",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(point, die)
            with pytest.raises(Killed):
                problem.checkpointer._save_state(train(state, problem, 1))
        assert (tmp_path / "checkpoint.json").read_text() == good
        (tmp_path / ".checkpoint.json.1.part").write_text("{")
        (tmp_path / ".state-b.safetensors.1.part").write_bytes(b"half")
        problem = checkpointed(tmp_path)
        state = problem.start_run()
        problem.checkpointer.run_stage("one", state, train)
        assert same(bits(state), before)
        assert problem.meter.costs["main"].steps == 2


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "report.txt"
    write_text(target, "old")

    def die() -> None:
        with atomic_write(target) as temporary:
            temporary.write_text("ne")
            assert target.read_text() == "old"
            raise Killed

    with pytest.raises(Killed):
        die()
    assert target.read_text() == "old"
    assert [f.name for f in target.parent.iterdir()] == ["report.txt"]
    write_text(target, "new")
    assert target.read_text() == "new"
    with pytest.raises(ValueError, match="JSON"):
        write_json(target, {"loss": float("nan")})
    assert target.read_text() == "new"


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for words in ("one", "two"):
        with atomic_write(target) as temporary:
            temporary.mkdir()
            (temporary / words).write_text(words)
        assert [f.name for f in target.iterdir()] == [words]
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_a_link_to_a_folder_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk" / "there").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "there")
    with atomic_write(tmp_path / "link") as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert [p.name for p in (tmp_path / "disk").rglob("*")] == ["there", "new"]


def test_the_meter_goes_into_the_checkpoint_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    problem = checkpointed(tmp_path)
    problem.meter.add_cost("search", Cost(steps=3, tokens=7, flops=11, seconds=0.5))
    state = problem.start_run()
    problem.checkpointer.run_stage("one", state, train, state, problem, 2)
    again = CostTracker()
    again.add_cost("weak", Cost(steps=99))  # of the life that is taken back
    Checkpointer(again, tmp_path)
    assert again.costs == problem.meter.costs
    assert count_kept(state.masks) == 2000
