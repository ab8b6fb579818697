"""What a plan promises of a run: its phases, where they begin, their steps and extra batches, and a T that fits."""

import functools
import pickle
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from conftest import Watch, same, tiny
from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from sparsesoup.methods import METHODS, TABLE, Method
from sparsesoup.training.batching import Batch
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.cost import CostTracker
from sparsesoup.training.driver import dry_run, run_fork
from sparsesoup.training.plan import Phase, first_steps, planned_steps
from tiny_runs import method

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # rows with settings that change what their plan consists of
    "snip, head first": ("snip", {"batches": 4, "warmup": 0.2}),
    "gradient-flow, norm": ("gradient-flow", {"measure": "norm", "batches": 3}),
    "model-soup, uniform": ("model-soup", {"combine": "uniform"}),
}
CASES = [*METHODS, *VARIANTS]
DATA_DECIDE = {"early-bird", "isp-code"}  # the search ends when masks settle; the stages near the sparsity
BLOCKS = 3  # of the tiny net, for which sparsegpt passes all its batches one by one
UNTRAINED = ["dense", "random", "magnitude", "snip", "grasp", "wanda", "sparsegpt", "one-shot-structured", "ticket"]
NEEDS = {
    "own loss": {"pins", "pela", "sparse-progressive-distillation"},
    "own rate": {
        "gmp-star", "isp", "isp-no-soup", "isp-paper", "isp-code", "hybrid-filled", "mlpruning", "model-soup",
        "instant-model-soup", "sparse-model-soup",
    },
    "rewinding": {
        "imp", "imp-rewind", "lr-rewind", "lottery-pools", "early-bird", "hybrid-filled", "mlpruning", "model-soup",
        "instant-model-soup", "sparse-model-soup", "sparse-progressive-distillation",
    },
    "extra batches": {
        "isp", "isp-paper", "isp-code", "snip", "grasp", "wanda", "sparsegpt", "gradual-obs", "gradient-flow", "pins",
        "lottery-pools", "model-soup", "instant-model-soup",
    },
}  # fmt: skip


class Begins(Checkpointer):
    """A Checkpointer that remembers the step of the state at which each phase began."""

    def run_stage(self, name: str, state: Any, work: Callable[..., object], *args: Any, hold: bool = False) -> None:
        self.begins = {**getattr(self, "begins", {}), name: state.step}
        super().run_stage(name, state, work, *args, hold=hold)


class Left(Watch):
    """An observer that remembers what it heard of the steps that are left."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[int] = []

    def steps_left(self, steps: int) -> None:
        self.left.append(steps)


@dataclass(frozen=True)
class Done:
    phases: Sequence[Phase]
    costs: dict[str, Any]
    begins: dict[str, int]
    left: list[int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tickets")


def made(case: str, folder: Path) -> tuple[Method, float]:
    """A method that fits the tiny problem, and a sparsity for it."""
    name, settings = VARIANTS.get(case, (case, None))
    chosen = method(name, folder) if settings is None else replace(METHODS[name], **settings)
    return chosen, 0.0 if TABLE[name].dense else 0.5


@functools.lru_cache
def plan(case: str, folder: Path) -> Sequence[Phase]:
    chosen, sparsity = made(case, folder)
    return chosen.plan(tiny().size, sparsity)


@functools.lru_cache
def run(case: str, folder: Path) -> Done:
    (chosen, sparsity), meter, left = made(case, folder), CostTracker(), Left()
    checkpointer = Begins(meter)
    chosen.run(tiny(meter=meter, checkpointer=checkpointer, observer=left), sparsity)
    return Done(plan(case, folder), meter.costs, checkpointer.begins, left.left)


@pytest.mark.parametrize("case", CASES)
def test_the_steps_of_a_run_are_those_of_its_plan_and_where_data_decide_no_more(case: str, folder: Path) -> None:
    done = run(case, folder)
    most, least, bounded = (
        Counter[str](),
        Counter[str](),
        {phase.label for phase in done.phases if phase.at_most and phase.steps},
    )
    for phase in done.phases:
        most[phase.label] += phase.steps
        least[phase.label] += 0 if phase.at_most else phase.steps
    real = {label: cost.steps for label, cost in done.costs.items() if cost.steps}
    assert real.keys() == {label for label, steps in most.items() if steps}
    assert {label: n for label, n in real.items() if label not in bounded} == {
        label: n for label, n in most.items() if n and label not in bounded
    }
    assert all(least[label] <= real[label] <= most[label] for label in bounded)
    assert bool(bounded) == (case in DATA_DECIDE)


@pytest.mark.parametrize("case", CASES)
def test_the_extra_batches_of_a_run_are_those_of_its_plan(case: str, folder: Path) -> None:
    done = run(case, folder)
    rows = {label: cost.examples for label, cost in done.costs.items()}
    assert rows["validation"] == 96 * (1 + sum(phase.validations for phase in done.phases))  # and the ticket's own
    each = [(BLOCKS if phase.per_block else 1) * count for phase in done.phases for _, count in phase.scores]
    assert rows.get("score", 0) == 16 * sum(each)


@pytest.mark.parametrize("case", CASES)
def test_a_run_has_every_phase_of_its_plan_once_and_in_order(case: str, folder: Path) -> None:
    done = run(case, folder)
    names = [phase.name for phase in done.phases]
    assert len({*names}) == len(names)
    assert [*done.begins] == names


@pytest.mark.parametrize("case", [case for case in CASES if case not in DATA_DECIDE])
def test_a_phase_begins_at_the_step_that_the_plan_says(case: str, folder: Path) -> None:
    done = run(case, folder)
    assert done.begins == {phase.name: step for phase, step in first_steps(done.phases)}


@pytest.mark.parametrize("case", CASES)
def test_the_observer_knows_the_steps_that_are_left_before_every_phase(case: str, folder: Path) -> None:
    done = run(case, folder)
    assert done.left == [planned_steps(done.phases[i:]) for i in range(len(done.phases))]


@pytest.mark.parametrize("need", NEEDS)
def test_a_plan_says_what_its_phases_need_beyond_plain_steps(need: str, folder: Path) -> None:
    assert {name for name in METHODS if any(need in phase.needs for phase in plan(name, folder))} == NEEDS[need]


def test_a_fork_goes_to_another_process_and_does_the_same_there(folder: Path) -> None:
    forked = set()
    for name in METHODS:
        forks = [(phase, step) for phase, step in first_steps(plan(name, folder)) if phase.kind == "fork"]
        sent = [pickle.loads(pickle.dumps(phase)) for phase, _ in forks]
        assert [phase.name for phase in sent] == [phase.name for phase, _ in forks]
        if not forks:
            continue
        forked.add(name)
        found, (here, step) = [], forks[0]
        for phase in (here, sent[0]):
            problem = tiny()
            state = problem.start_run()
            state.step = step
            found.append(run_fork(problem, state, phase))
            assert problem.meter.costs["weak"].steps == phase.steps > 0
        assert same(*found)
    assert forked == {"isp", "isp-paper", "isp-code"}


@pytest.mark.parametrize("case", UNTRAINED)
def test_a_plan_without_training_has_no_steps(case: str, folder: Path) -> None:
    chosen, sparsity = made(case, folder)
    assert planned_steps(chosen.plan(replace(tiny().size, steps=0), sparsity)) == 0


@pytest.mark.parametrize("case", [case for case in CASES if case not in UNTRAINED])
def test_a_plan_refuses_a_t_that_is_too_small_with_one_that_fits(case: str, folder: Path) -> None:
    chosen, sparsity = made(case, folder)
    if getattr(chosen, "score_rate", None) is not None:
        chosen = replace(chosen, score_rate=1e3)  # at which gates close in any T; too low a rate is another refusal

    def least(steps: int) -> int:
        with pytest.raises(UserError, match=rf"^{steps} steps are too few: .* needs at least \d+; raise ste") as said:
            chosen.plan(replace(tiny().size, steps=steps), sparsity)
        return int(re.findall(r"needs at least (\d+)", str(said.value))[0])

    number = least(0)
    assert number == 1 or least(number - 1) == number
    assert planned_steps(chosen.plan(replace(tiny().size, steps=number), sparsity)) >= 1


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_ends_before_the_first_pass_through_the_model(case: str, folder: Path) -> None:
    def predict(model: nn.Module, batch: Batch) -> Tensor:
        raise AssertionError("a pass")

    (chosen, sparsity), meter, left = made(case, folder), CostTracker(), Left()
    checkpointer = Begins(meter)
    problem = tiny(meter=meter, checkpointer=checkpointer, observer=left, predict=predict, objective=predict)
    dry_run(chosen, problem, sparsity)
    assert not meter.costs
    assert not checkpointer.finished
    assert not left.left


def test_a_dry_run_refuses_what_the_run_would_refuse_of_the_model() -> None:
    for name in ("one-shot-structured", "ticket"):  # the tiny net has no heads; and no ticket is given
        said = []
        for go in (METHODS[name].run, functools.partial(dry_run, METHODS[name])):
            with pytest.raises(UserError) as caught:
                go(tiny(), 0.5)
            said.append(str(caught.value))
        assert said[0] == said[1]


def test_a_dry_run_of_prune_prints_the_phases_and_trains_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prune", "isp", "--model", str(place / "bert"), "--dataset", str(place / "reviews"), "--steps", "200"]
    assert main([*words, "--train.batch-size", "8", "--out", str(tmp_path / "runs"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^stage-1-train +18 ", said, re.M)
    assert re.search(r"^stage-5-weak-1 to 4 +4 x 1 ", said, re.M)
    assert "T = 200: 200 steps" in said
    assert not (tmp_path / "runs").exists()
