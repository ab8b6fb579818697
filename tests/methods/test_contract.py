"""What every method promises (DESIGN.md, Contracts), for every row of the table of methods."""

import contextlib
import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import Watch, same, tiny
from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Block, Column, Row
from sparsesoup.core.masks import Masks
from sparsesoup.methods import METHODS, TABLE
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.config import TrainingOverrides
from sparsesoup.training.cost import CostTracker
from tiny_runs import method, run

SPARSE = [name for name, row in TABLE.items() if not row.dense]
DENSE = [name for name, row in TABLE.items() if row.dense]
FIRST = {row.family: name for name, row in reversed(TABLE.items())}.values()  # one of each family, for `make fast`


def cases(names: list[str], *sparsities: float) -> list[Any]:
    """(name, sparsity) of each; `make fast` runs one method a family, and that at one sparsity."""
    return [
        pytest.param(name, sparsity, marks=[] if name in FIRST and sparsity in (0.5, 0.0) else pytest.mark.integration)
        for name in names
        for sparsity in sparsities
    ]


EVERY = cases(SPARSE, 0.5) + cases(DENSE, 0.0)
CHANGING = [name for name in SPARSE if name not in ("random", "magnitude", "one-shot-structured", "imp")]
CLASSES = {type(METHODS[name]): name for name in reversed(CHANGING)}.values()  # one row of each class
OPTIMIZED = [
    pytest.param(*case.values, optimizer, marks=case.marks)
    for optimizer in ("adamw", "adam", "sgd", "rmsprop")
    for case in cases(CHANGING, 0.5)
    if optimizer == "adamw" or case.values[0] in CLASSES
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tickets")


def least_sparsity(name: str, sparsity: float) -> float:
    return max(sparsity, 0.2) if name == "ticket" else sparsity  # its ticket is 20 % sparse, and cannot go back


@pytest.mark.parametrize(("name", "sparsity"), cases(SPARSE, 0.0, 0.317, 0.5, 0.9))
def test_the_ticket_keeps_exactly_the_asked_number_and_the_rest_is_plus_zero(
    name: str, sparsity: float, folder: Path
) -> None:
    sparsity = least_sparsity(name, sparsity)
    ticket = run(name, sparsity, folder).ticket
    most = round((1 - sparsity) * 2000)
    # Groups of the tiny net have at most 80 weights: the nearest boundary that keeps no more is within one of them.
    assert most - (80 if TABLE[name].grouped else 0) <= algebra.count_kept(ticket.masks) <= most
    for target, mask in ticket.masks.items():
        assert mask.dtype == torch.bool
        gone = ticket.weights[target][~mask]
        assert not gone.any(), f"{target} holds pruned weights"
        assert not gone.signbit().any(), f"{target} holds -0.0"
        assert ticket.weights[target][mask].all(), f"{target} holds a kept weight of exactly 0"


@pytest.mark.parametrize(("name", "sparsity"), EVERY)
def test_what_is_kept_and_what_it_costs_stay_as_they_were(name: str, sparsity: float, folder: Path) -> None:
    """Numbers of tests/golden/make_fingerprints.py: whoever changes them changes every run, and says so."""
    golden = Path(__file__).parents[1] / "golden" / "fingerprints.json"
    expected = json.loads(golden.read_text(encoding="utf-8"))[name]
    done = run(name, sparsity, folder)
    if not TABLE[name].grouped:  # which groups go, and so how many weights, may differ between CPUs
        assert algebra.count_kept(done.ticket.masks) == expected["kept"]
    if name != "early-bird":  # its search ends when masks settle, which may differ too
        cost = {
            label: {k: v for k, v in each.items() if k != "seconds"}
            for label, each in done.problem.meter.to_json().items()
        }
        assert cost == expected["cost"]


@pytest.mark.parametrize(("name", "sparsity"), cases(SPARSE, 0.5))
def test_the_masks_follow_the_order_and_shapes_of_the_targets(name: str, sparsity: float, folder: Path) -> None:
    done = run(name, sparsity, folder)
    assert [(n, tuple(m.shape)) for n, m in done.ticket.masks.items()] == [
        (n, t.shape) for n, t in done.problem.targets.items()
    ]
    assert done.ticket.weights.keys() == done.problem.pretrained.state_dict().keys()


@pytest.mark.parametrize(("name", "sparsity"), EVERY)
def test_the_pretrained_model_is_never_written_to(name: str, sparsity: float, folder: Path) -> None:
    done = run(name, sparsity, folder)
    assert same(done.problem.pretrained.state_dict(), done.before)
    assert not any(
        t.data_ptr() in {p.data_ptr() for p in done.problem.pretrained.parameters()}
        for t in done.ticket.weights.values()
    )
    moved = [n for n, t in done.ticket.weights.items() if not t.equal(done.before[n])]
    assert "head.weight" in moved  # the ticket's weights were trained


@pytest.mark.parametrize(("name", "sparsity"), EVERY)
def test_the_same_seed_gives_the_same_bits(name: str, sparsity: float, folder: Path) -> None:
    torch.manual_seed(5)
    one = run(name, sparsity, folder)
    torch.manual_seed(6)
    torch.rand(7)
    two = run(name, sparsity, folder, copy=1)
    assert same(one.ticket.masks, two.ticket.masks)
    assert same(one.ticket.weights, two.ticket.weights)
    assert one.ticket.metrics == two.ticket.metrics
    assert one.ticket.notes == two.ticket.notes


@pytest.mark.parametrize(("name", "sparsity"), EVERY)
def test_another_seed_gives_another_run(name: str, sparsity: float, folder: Path) -> None:
    one, two = run(name, sparsity, folder).ticket, run(name, sparsity, folder, seed=1).ticket
    assert not same(one.weights, two.weights)
    by_weights_alone = TABLE[name].dense or getattr(TABLE[name].method, "score", "") == "magnitude"
    assert same(one.masks, two.masks) == by_weights_alone


@pytest.mark.parametrize(("name", "sparsity"), EVERY)
def test_every_step_is_on_the_meter(name: str, sparsity: float, folder: Path) -> None:
    done = run(name, sparsity, folder)
    stepless = {"validation", "score"}
    steps = {label: cost["steps"] for label, cost in done.ticket.cost.items() if label not in stepless}
    assert not any(done.ticket.cost[label]["steps"] for label in stepless & done.ticket.cost.keys())
    seen = [r["label"] for r in done.watch.records]
    assert steps == {label: seen.count(label) for label in set(seen)}
    assert sum(steps.values()) == done.losses
    rows = {label: cost["examples"] for label, cost in done.ticket.cost.items()}
    assert all(rows[label] == 16 * count for label, count in steps.items())
    with_teacher = TABLE[name].with_teacher
    assert rows["validation"] >= 96
    looked = rows["validation"] + rows.get("score", 0)  # a teacher looks at the rows of its steps too
    assert looked < done.seen if with_teacher else looked == done.seen
    # One step of the tiny net: forward once, backward twice, less the gradient that nobody asks of the input.
    # Where the blocks alone are trained, none for the first layer and the head, nor of the first block's input.
    each = {
        "train": 16 * (6 * (8 * 20 + 20 * 20 * 2 + 20 * 60 + 60 * 3) - 2 * 8 * 20),
        "blocks": 16 * (2 * 8 * 20 + 6 * 2000 - 2 * 20 * 20 + 4 * 60 * 3),
    }
    phases = method(name, folder).plan(done.problem.size, sparsity)
    for label, count in steps.items() if TABLE[name].family != "low rank" else ():  # its layers are thinner
        kind = "blocks" if any(phase.kind == "blocks" and phase.label == label for phase in phases) else "train"
        forward = 16 * 2 * (8 * 20 + 2000 + 60 * 3)
        teacher, rest = divmod(done.ticket.cost[label]["flops"] - each[kind] * count, forward)
        assert rest == 0
        assert teacher == sum(phase.steps for phase in phases if phase.own_loss and phase.label == label)
    assert with_teacher == any(phase.own_loss for phase in phases)
    assert all(cost["seconds"] > 0 for cost in done.ticket.cost.values())


@pytest.mark.parametrize(("name", "sparsity"), cases(SPARSE, 0.5, 0.9))
def test_a_mask_only_shrinks(name: str, sparsity: float, folder: Path) -> None:
    watch = run(name, sparsity, folder).watch
    assert watch.pruned
    if TABLE[name].returns:
        watch.pruned[:-1] = []
    for early, late in zip(watch.pruned, watch.pruned[1:], strict=False):
        assert all(not (late[n] & ~early[n]).any() for n in early)
    assert same(watch.pruned[-1], run(name, sparsity, folder).ticket.masks)


@pytest.mark.parametrize(("name", "sparsity", "optimizer"), OPTIMIZED)
def test_no_optimizer_revives_a_pruned_weight_or_its_moments(
    name: str, sparsity: float, optimizer: str, folder: Path
) -> None:
    """Of the methods that prune while an optimizer has momentum."""
    done = run(name, sparsity, folder, optimizer=optimizer)
    state, masks = done.watch.state, done.ticket.masks
    assert state is not None
    assert algebra.count_kept(masks) == 1000
    phases = method(name, folder).plan(done.problem.size, sparsity)
    trained = [p for p in phases if p.kind in ("train", "blocks") and p.steps]
    params, moments = state.prunable_parameters(), 0
    for target, mask in masks.items():
        assert not done.ticket.weights[target][~mask].any()
        for value in state.optimizer.state[params[target]].values():
            if isinstance(value, Tensor) and value.shape == mask.shape:
                moments += 1
                assert not value[~mask].any()
                assert value[mask].any() or not mask.any()
    of_each = {"adamw": 2, "adam": 2, "sgd": 1, "rmsprop": 2}[optimizer] if trained[-1].keeps_moments else 0
    assert moments == len(masks) * of_each


@pytest.mark.parametrize(("name", "sparsity"), EVERY)
def test_no_run_asks_for_more_than_it_was_given(name: str, sparsity: float, folder: Path) -> None:
    done = run(name, sparsity, folder)
    last = [r for r in done.watch.records if r["label"] == "main"][-1]
    assert last["sparsity"] == pytest.approx(done.ticket.sparsity)
    weak = [r for r in done.watch.records if r["label"] == "weak"]
    charged = len(weak) if done.ticket.notes.get("budget") == "included" else 0
    assert last["step"] == done.problem.steps - charged


@pytest.mark.parametrize(("name", "sparsity"), EVERY)
def test_validation_during_training_changes_no_bit(name: str, sparsity: float, folder: Path) -> None:
    plain, watch = run(name, sparsity, folder), Watch()
    problem = replace(plain.problem, training=replace(plain.problem.training, eval_steps=7), observer=watch,
                      meter=CostTracker(), checkpointer=Checkpointer(CostTracker()))  # fmt: skip
    found = method(name, folder).run(problem, sparsity)
    assert same(found.masks, plain.ticket.masks)
    assert same(found.weights, plain.ticket.weights)
    assert found.metrics == plain.ticket.metrics
    notes = dict(found.notes)
    curve = notes.pop("evaluations")
    assert notes == plain.ticket.notes
    assert [{"label": "evaluation", **row} for row in curve] == watch.evaluations
    steps = [r["step"] for r in watch.records if r["label"] == "main" and r["step"] % 7 == 0]
    assert [row["step"] for row in curve] == steps
    assert steps
    mine, others = (
        {label: {k: v for k, v in cost.items() if k != "seconds"} for label, cost in ticket.cost.items()}
        for ticket in (found, plain.ticket)
    )
    extra = mine.pop("evaluation")
    assert mine == others
    assert extra["examples"] == len(curve) * len(problem.validation)
    assert extra["steps"] == 0


@pytest.mark.parametrize(("name", "sparsity"), cases(DENSE, 0.0))
def test_a_dense_product_is_dense(name: str, sparsity: float, folder: Path) -> None:
    ticket = run(name, sparsity, folder).ticket
    assert algebra.count_kept(ticket.masks) == algebra.count_total(ticket.masks) == 2000
    assert ticket.sparsity == 0.0
    assert all(ticket.weights[n].all() for n in ticket.masks)
    with pytest.raises(ValueError, match=rf"^{name} keeps every weight: sparsity must be 0, got 0\.5($|;)"):
        METHODS[name].run(tiny(), 0.5)


NEEDY: dict[str, dict[str, Any]] = {
    "isp": {},
    "isp-no-soup": {},
    "isp-paper": {},
    "isp-code": {},
    "gmp-star": {},
    "imp-rewind": {},
    "gradual": {},
    "power-propagation": {},
    "gradual-obs": {"batches": 1},
    "platon": {},
    "pins": {},
    "gradient-flow": {},
    "early-bird": {},
    "lottery-pools": {"neighbours": 1},
    "instant-model-soup": {},
}
ODD: list[tuple[str, dict[str, Any]]] = [
    ("isp", {"stages": 1, "weak_masks": 0}),
    ("isp", {"stages": 2, "weak_masks": 1, "finish": 0.9}),
    ("isp", {"budget": "extra"}),
    ("isp", {"stages": 3, "finish": 0.05}),
    ("gmp-star", {"stop": 0.9}),
    ("gmp-star", {"prunings": 2}),
    ("gmp-star", {"start": 0.6, "prunings": 5}),
    ("gradual-obs", {"start": 0.0, "stop": 0.97, "prunings": 3, "batches": 1}),
    ("imp-rewind", {"rewind": 0.9}),
    ("early-bird", {"every_epochs": 0.5, "masks": 2, "search": 0.2}),
    ("instant-model-soup", {"weak_models": 3, "look_ahead": 0.3}),
    ("instant-model-soup", {"weak_models": 5, "look_ahead": 0.19}),
    ("isp-paper", {"cut": 0.4}),
    ("isp-code", {"cut": 0.5, "near": 0.0}),
    ("isp-code", {"warmup": 0}),
    ("platon", {"start": 0.0, "stop": 0.99, "every_steps": 3, "window": 1}),
    ("pins", {"start": 0.5, "stop": 0.6, "checks": 9}),
    ("gradient-flow", {"rounds": 3, "finish": 0.05, "batches": 1}),
]


@pytest.mark.parametrize(("name", "settings"), [*NEEDY.items(), *ODD])
def test_too_few_steps_are_refused_with_the_least_number_that_runs(name: str, settings: dict[str, Any]) -> None:
    chosen, sparsity = replace(METHODS[name], **settings), 0.0 if TABLE[name].dense else 0.7

    def least(steps: int) -> int:
        with pytest.raises(UserError, match=r"^\d+ steps are too few: .* needs at least \d+; raise steps") as caught:
            chosen.run(tiny(steps=steps), sparsity)
        assert "\n" not in str(caught.value)
        return int(re.findall(r"needs at least (\d+)", str(caught.value))[0])

    number = least(0)
    assert least(number - 1) == number
    ticket = chosen.run(tiny(steps=number), sparsity)
    assert algebra.count_kept(ticket.masks) == round(2000 * (1 - sparsity))
    assert ticket.cost["main"]["steps"] >= 1


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gmp-star", {}),
        ("gmp-star", {"stop": 0.9}),
        ("gradual", {"start": 0.45, "stop": 0.5}),
        ("gradual-obs", {"iterations": 0}),
        ("isp", {"look_ahead": 0.035}),
        ("platon", {"stop": 0.9, "every_steps": 4, "window": 2}),
        ("pins", {"every_steps": 7, "window": 7}),
        ("gradient-flow", {"rounds": 3, "finish": 0.2, "batches": 1}),
    ],
)
def test_every_number_of_steps_either_runs_to_the_asked_sparsity_or_is_refused(
    name: str, settings: dict[str, Any]
) -> None:
    chosen, ran = replace(METHODS[name], **settings), 0
    for steps in [*range(4, 20), 36, 43, 52, 59]:
        problem = tiny(steps=steps)
        with contextlib.suppress(UserError):
            ticket = chosen.run(problem, 0.7)
            ran += 1
            assert algebra.count_kept(ticket.masks) == 600, f"at {steps} steps"
            assert sum(c["steps"] for c in ticket.cost.values()) == steps
    assert ran > 0


@pytest.mark.parametrize("pattern", [Block(4, 4), Row, Column, Block(0, 0)])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_groups_are_pruned_step_by_step_to_the_boundary_next_to_the_goal(pattern: Block, scope: Any) -> None:
    """A goal of the curve may lie in the group at which the last one stopped."""
    problem = tiny(steps=40)
    ticket = replace(METHODS["gradual"], pattern=pattern, scope=scope, every=0.02).run(problem, 0.7)
    matrices = {name: target.shape for name, target in problem.targets.items()}
    largest = max((pattern.rows or rows) * (pattern.cols or cols) for rows, cols in matrices.values())
    pools = 1 if scope == "global" else len(matrices)
    goal = round(0.3 * algebra.count_total(ticket.masks))
    assert goal - pools * largest < algebra.count_kept(ticket.masks) <= goal


NUMBERS = [
    (name, f.name) for name, made in METHODS.items() for f in fields(made) if isinstance(getattr(made, f.name), float)
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "setting"), NUMBERS)
def test_a_setting_that_is_no_finite_number_is_refused(name: str, setting: str, value: float) -> None:
    with pytest.raises(UserError) as caught:
        replace(METHODS[name], **{setting: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "setting", [{"warmup": -3}, {"near": -0.5}, {"warmup": 1000}, {"schedule": 500}, {"protocols": ()}]
)
def test_a_published_isp_that_cannot_be_is_refused(setting: dict[str, Any]) -> None:
    name = "schedule" if setting == {"warmup": 1000} else next(iter(setting))
    with pytest.raises(UserError, match=rf"^{name}: must be ") as caught:
        replace(METHODS["isp-code"], **setting)
    assert str(caught.value).endswith(f", got {setting.get(name, METHODS['isp-code'].schedule)}")


@pytest.mark.parametrize("setting", [{"rate": math.nan}, {"weight_decay": -5.0}, {"weight_decay": math.inf}])
def test_a_protocol_that_cannot_be_is_refused(setting: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"of a protocol|a protocol has rate >= 0"):
        TrainingOverrides(**setting)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5])
@pytest.mark.parametrize("name", SPARSE)
def test_an_impossible_sparsity_is_refused(name: str, sparsity: float, folder: Path) -> None:
    with pytest.raises(ValueError, match="sparsity"):
        method(name, folder).run(tiny(), sparsity)


def test_a_subset_of_masks_is_told_from_another() -> None:
    masks: Masks = {"w": torch.tensor([True, False])}
    assert not same(masks, {"w": torch.tensor([False, False])})
    assert not same({"w": torch.tensor([0.0])}, {"w": torch.tensor([-0.0])})
