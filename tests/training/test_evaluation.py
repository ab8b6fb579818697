"""Validation during training leaves every bit as it is; early stopping ends at the best weights of the final masks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import Watch, same, tiny
from sparsesoup.core.errors import UserError
from sparsesoup.core.masks import sparsity
from sparsesoup.core.ticket import Ticket
from sparsesoup.methods import METHODS, TABLE
from sparsesoup.training.batching import Batch
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.cost import CostTracker
from sparsesoup.training.driver import run_plan
from sparsesoup.training.evaluation import EarlyStopping
from sparsesoup.training.plan import Phase, count_evaluations, early_stopping_of
from sparsesoup.training.problem import Problem
from tiny_runs import method, run

TRAINING = TrainingConfig(learning_rate=1e-2, batch_size=16, weight_decay=0.1)
SEVERAL = {"lottery-pools", "sparse-model-soup", "model-soup"}  # whose result is made of several trainings
# Step of the last pruning, of 60.
LAST_PRUNING = {
    "gradual": 42,
    "gmp-star": 41,
    "power-propagation": 42,
    "ticket": 42,
    "sparse-progressive-distillation": 30,
}


def costs(ticket: Ticket) -> dict[str, dict[str, float]]:
    return {label: {k: v for k, v in c.items() if k != "seconds"} for label, c in ticket.cost.items()}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tickets")


def test_a_sparsity_stands_beside_each_score() -> None:
    watch = Watch()
    METHODS["gradual"].run(tiny(training=replace(TRAINING, eval_steps=20), observer=watch), 0.5)
    by_step = {r["step"]: r["sparsity"] for r in watch.records}
    assert [(row["step"], row["sparsity"]) for row in watch.evaluations] == [(s, by_step[s]) for s in (20, 40, 60)]
    assert watch.evaluations[-1]["sparsity"] == 0.5


class Scripted:
    """A problem whose validations score as they are told, and which keeps the weights that each one saw."""

    def __init__(self, scores: Sequence[float], **changes: Any) -> None:
        self.scores, self.seen = iter(scores), list[dict[str, Tensor]]()
        training = replace(TRAINING, eval_steps=5, early_stopping_patience=2)
        self.problem = tiny(**{"training": training, "predict": self.predict, "metric": self.metric} | changes)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        if not model.training and len(batch["x"]) == 32 and self.fresh:
            self.seen.append({n: t.detach().clone() for n, t in model.named_parameters()})
            self.fresh = False
        out: Tensor = model(batch["x"])
        return out

    fresh = True

    def metric(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        self.fresh = True
        return {"score": next(self.scores)}


def ups(*last: float) -> Iterator[float]:
    """Scores that fall while the masks still change (steps 5 to 40 of 60), and then as given."""
    yield from (2.0 - 0.1 * i for i in range(8))
    yield from last


def test_it_stops_after_patience_and_returns_the_best_weights_at_the_final_sparsity() -> None:
    found = Scripted([*ups(0.5, 0.4, 0.3), 0.7])
    ticket = METHODS["gradual"].run(found.problem, 0.6)
    assert ticket.notes["early_stopping"] == {
        "metric": "score", "best": 0.5, "step": 45, "waited": 2, "stopped": 55,
    }  # fmt: skip
    assert ticket.cost["main"]["steps"] == 55
    assert same({n: ticket.weights[n] for n in found.seen[8]}, found.seen[8])  # the ninth validation, of step 45
    assert sparsity(ticket.masks) == 0.6
    assert all(not ticket.weights[n][~m].any() for n, m in ticket.masks.items())
    assert ticket.metrics == {"score": 0.7}  # of one more validation, of the result


def test_a_better_score_starts_the_count_anew_and_equal_is_no_better() -> None:
    found = Scripted([*ups(0.5, 0.5, 0.6, 0.6), 0.6])
    ticket = METHODS["gradual"].run(found.problem, 0.6)
    assert ticket.notes["early_stopping"] == {
        "metric": "score", "best": 0.6, "step": 55, "waited": 1, "stopped": None,
    }  # fmt: skip
    assert ticket.cost["main"]["steps"] == 60
    assert same({n: ticket.weights[n] for n in found.seen[10]}, found.seen[10])


def test_a_score_that_is_no_number_is_never_the_best() -> None:
    found = Scripted([*ups(float("nan"), 0.1, float("nan"), float("nan")), 0.1])
    assert METHODS["gradual"].run(found.problem, 0.6).notes["early_stopping"]["best"] == 0.1


def test_the_end_of_the_training_is_validated_too() -> None:
    found = Scripted([0.1 * i for i in range(11)], steps=47)
    ticket = METHODS["gradual"].run(found.problem, 0.6)
    assert [row["step"] for row in ticket.notes["evaluations"]] == [*range(5, 46, 5), 47]


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_end_with_one_training_at_final_masks_may_stop_and_others_refuse(name: str, folder: Path) -> None:
    problem = tiny(training=replace(TRAINING, eval_steps=1, early_stopping_patience=1), steps=60)
    share = 0.0 if TABLE[name].dense else 0.6
    if name in SEVERAL:
        with pytest.raises(UserError, match="cannot stop early") as caught:
            method(name, folder).run(problem, share)
        assert caught.value.field == "train.early_stopping_patience"
        assert problem.meter.costs == {}
        return
    phases = method(name, folder).plan(problem.size, share)
    stopping = early_stopping_of(phases, problem.training)
    assert stopping == EarlyStopping(1, LAST_PRUNING.get(name, 0))


@pytest.mark.parametrize("name", ["gradual", "imp-rewind", "isp", "movement", "hybrid-filled", "platon", "dense"])
def test_masks_are_final_from_the_step_that_the_plan_names(name: str, folder: Path) -> None:
    """With a patience of 1 and scores that only fall, it stops at the second validation of the final masks."""
    share, watch = 0.0 if TABLE[name].dense else 0.6, Watch()
    scores = iter(-float(i) for i in range(1000))
    problem = tiny(
        training=replace(TRAINING, eval_steps=1, early_stopping_patience=1), observer=watch,
        metric=lambda outputs, labels: {"score": next(scores)},
    )  # fmt: skip
    own = method(name, folder)
    ticket = own.run(problem, share)
    found = ticket.notes["early_stopping"]
    assert found["stopped"] == found["step"] + 1
    plain = run(name, share, folder)
    assert same(ticket.masks, plain.ticket.masks)


class Killed(BaseException):
    """Stands for the end of a process."""


@pytest.mark.parametrize("at", [44, 45, 46, 50, 52, 54])
@pytest.mark.parametrize("every", [0.0, 1e9])
def test_a_run_that_dies_resumes_to_the_same_stop_and_the_same_bits(
    at: int, every: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsesoup.training.checkpoint.SHARE", 0)
    training = replace(TRAINING, eval_steps=5, early_stopping_patience=2, learning_rate=3e-2)
    whole = METHODS["gradual"].run(tiny(training=training, steps=60), 0.6)

    class Dying(Watch):
        def step(self, record: Mapping[str, Any]) -> None:
            if record and record["step"] == at:
                raise Killed

        def evaluation(self, record: Mapping[str, Any]) -> None:
            if record["step"] == at:
                raise Killed

    def life(**more: Any) -> Problem:
        meter = CostTracker()
        return tiny(training=training, steps=60, meter=meter, checkpointer=Checkpointer(meter, tmp_path, every), **more)

    if every:
        (tmp_path / "checkpoint.json").unlink(missing_ok=True)
    with pytest.raises(Killed):
        METHODS["gradual"].run(life(observer=Dying()), 0.6)
    again = METHODS["gradual"].run(life(), 0.6)
    assert same(again.masks, whole.masks)
    assert same(again.weights, whole.weights)
    assert again.notes == whole.notes
    assert {k: v for k, v in costs(again).items() if k != "validation"} == {
        k: v for k, v in costs(whole).items() if k != "validation"
    }


def test_plans_count_their_validations() -> None:
    training = TrainingConfig(eval_steps=10)
    assert count_evaluations(Phase(name="train", steps=25), 8, training) == 3  # 10, 20, 30
    assert count_evaluations(Phase(name="train", steps=25), 8, training, may_stop=True) == 4  # and 33
    assert count_evaluations(Phase(name="train", steps=22), 8, training, may_stop=True) == 3
    assert count_evaluations(Phase(name="round", steps=25, label="search"), 8, training) == 0
    assert count_evaluations(Phase(name="train", steps=25), 8, TrainingConfig()) == 0


def test_settings_that_make_no_sense_are_refused() -> None:
    for given in ({"eval_steps": 0}, {"eval_steps": 5, "early_stopping_patience": 0}):
        with pytest.raises(UserError, match="at least 1"):
            TrainingConfig(**given)
    with pytest.raises(UserError, match="set eval_steps too"):
        TrainingConfig(early_stopping_patience=3)


def test_a_cached_training_is_not_taken_where_it_is_validated(tmp_path: Path) -> None:
    from sparsesoup.training.train_cache import TrainingCache

    for training in (TRAINING, TRAINING, replace(TRAINING, eval_steps=20)):
        ticket = run_plan(METHODS["dense"], tiny(training=training, cache=TrainingCache(tmp_path)), 0.0)
    assert [row["step"] for row in ticket.notes["evaluations"]] == [20, 40, 60]
    assert ticket.cost["main"]["shared"] == 0
    imp = replace(METHODS["imp"], cut=0.5)
    run_plan(imp, tiny(training=TRAINING, cache=TrainingCache(tmp_path)), 0.5)
    found = run_plan(imp, tiny(training=replace(TRAINING, eval_steps=20), cache=TrainingCache(tmp_path)), 0.5)
    assert found.cost["search"]["shared"] == 60  # the round that is not validated
    assert torch.equal(found.weights["head.bias"], run_plan(imp, tiny(training=TRAINING), 0.5).weights["head.bias"])
