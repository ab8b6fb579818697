"""Second-order gradual pruning: averages and fits against other roads, weights that return, groups and N:M."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import Watch, same, tiny, watched
from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.methods.gradual_obs import GradualOBS
from sparsesoup.methods.scores.activation import LayerInputs
from sparsesoup.methods.scores.calibration import calibration_batches
from sparsesoup.methods.scores.fisher import FisherAverage
from sparsesoup.methods.scores.least_squares import fit_flops, fit_kept_weights
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.cost import CountFlops
from sparsesoup.training.driver import carry_out_plan
from sparsesoup.training.loop import train
from sparsesoup.training.overrides import find_dropouts
from sparsesoup.training.state import TrainState
from tiny_bert import bert
from tiny_hub import gpt2


def draw(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weight, Gram matrix, mask, inputs) of a layer with correlated inputs."""
    rng = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, 12, generator=rng) @ torch.randn(12, 12, generator=rng)
    weight, mask = torch.randn(7, 12, generator=rng), torch.rand(7, 12, generator=rng) < 0.4
    return weight, inputs.T @ inputs, mask, inputs


def layer_error(weight: Tensor, new: Tensor, inputs: Tensor) -> float:
    return float(((inputs.double() @ (weight - new).double().T) ** 2).sum())


@pytest.mark.parametrize("seed", range(5))
def test_the_fit_converges_to_the_least_squares_of_each_row(seed: int) -> None:
    weight, gram, mask, inputs = draw(seed)
    found = fit_kept_weights(weight, gram, mask, 60, damp=0.0)
    for i, row in enumerate(mask):
        best = torch.linalg.lstsq(inputs[:, row].double(), inputs.double() @ weight[i].double()).solution
        assert found[i, row].double().allclose(best, rtol=1e-2, atol=1e-3)
    assert not found[~mask].any()


@pytest.mark.parametrize("seed", range(5))
def test_every_iteration_lowers_the_error_of_the_layer(seed: int) -> None:
    weight, gram, mask, inputs = draw(seed)
    errors = [layer_error(weight, fit_kept_weights(weight, gram, mask, n, damp=0.0), inputs) for n in range(9)]
    assert errors[0] == pytest.approx(layer_error(weight, weight * mask, inputs))
    assert all(after < 1.0001 * before for before, after in pairwise(errors))
    assert errors[8] < errors[2] < errors[1] < errors[0]


def test_a_fit_leaves_dead_inputs_and_dense_rows_alone() -> None:
    weight, gram, mask, _ = draw()
    gram[3], gram[:, 3], mask[0] = 0.0, 0.0, True
    found = fit_kept_weights(weight, gram, mask, 20)
    assert found[0].equal(weight[0])
    assert found[mask[:, 3], 3].equal(weight[mask[:, 3], 3])
    nothing = fit_kept_weights(weight, torch.zeros(12, 12), mask, 20)
    assert nothing.equal(weight * mask)


def test_the_flops_of_a_fit_are_those_of_its_products() -> None:
    problem, iterations = tiny(), 5
    with CountFlops() as count:
        for name, target in problem.targets.items():
            weight = problem.pretrained.get_parameter(name)
            fit_kept_weights(weight, torch.eye(target.shape[1]), torch.ones(weight.shape).bool(), iterations)
    assert count.flops == fit_flops(problem.targets, iterations)


def test_the_average_is_that_of_squared_gradients() -> None:
    fisher, problem, by_hand = FisherAverage(decay=0.9), tiny(), dict[str, Tensor]()

    def observe(state: TrainState) -> None:
        fisher.observe_gradients(state)
        for name, p in state.prunable_parameters().items():
            assert p.grad is not None
            before = by_hand.get(name, torch.zeros(p.shape, dtype=torch.float64))
            by_hand[name] = 0.9 * before + 0.1 * p.grad.double() ** 2

    state = train(problem.start_run(), problem, 12, observe=observe)
    assert len(state.memory) == len(state.targets)
    for name, score in fisher.scores(state).items():
        weight = state.prunable_parameters()[name].detach().double()
        assert score.double().allclose(weight**2 * by_hand[name], rtol=1e-4, atol=1e-12)
    fisher.clear_(state)
    assert state.memory == {}


def test_a_pruning_takes_the_lowest_scores_and_fits_what_stays() -> None:
    """The first pruning of a run against the same by hand: the lowest w^2 F, and the outputs of every layer."""
    method, problem = GradualOBS(prunings=3, batches=4), tiny()
    first = method.plan(problem.size, 0.7)[0]
    state, fisher = problem.start_run(), FisherAverage(decay=1 - 1 / (0.2 * 60))
    calm = replace(problem, training=replace(problem.training, dropout=0.0))
    train(state, calm, first.steps, observe=fisher.observe_gradients)
    goal = 0.7 * (1 - (1 - 1 / 3) ** 3)
    scores = torch.cat([s.flatten() for s in fisher.scores(state).values()])
    threshold = scores.sort().values[round(goal * scores.numel())]
    before = {n: p.detach().clone() for n, p in state.prunable_parameters().items()}
    rows = calibration_batches(problem, 4, "prune", 1)
    grams = LayerInputs(problem, state.model, rows, full=True).inputs_of(state.targets)

    stopped = carry_out_plan(_OnlyFirst(method), tiny(), 0.7).state
    for name, weight in stopped.prunable_parameters().items():
        kept = fisher.scores(state)[name] >= threshold
        assert (weight != 0).equal(kept)
        change, plain = ((w - before[name]).detach().double() for w in (weight, before[name] * kept))
        gram = grams[name].double()
        assert torch.trace(change @ gram @ change.T) < torch.trace(plain @ gram @ plain.T)


class _OnlyFirst:
    """A method that ends after its first phase."""

    def __init__(self, method: GradualOBS) -> None:
        self.method = method

    def __getattr__(self, name: str) -> object:
        return getattr(self.method, name)

    def plan(self, size: object, sparsity: float) -> list[object]:
        return list(self.method.plan(size, sparsity)[:1])  # type: ignore[arg-type]


def test_weights_return_until_the_masks_are_final() -> None:
    watch = Watch()
    with watched() as final:
        ticket = GradualOBS(prunings=4).run(tiny(observer=watch), 0.7)
    assert len(final.pruned) == 1  # masks are set once, by the last pruning
    assert algebra.sparsity(ticket.masks) == pytest.approx(0.7)
    goals = [0.7 * (1 - (1 - i / 4) ** 3) for i in range(5)]
    assert sorted(set(watch.curve("sparsity"))) == [pytest.approx(goal, abs=1e-12) for goal in goals]
    assert final.state is not None
    assert final.state.memory == {}
    first = carry_out_plan(_OnlyFirst(GradualOBS(prunings=4)), tiny(), 0.7).state.prunable_parameters()
    returned = sum(int((ticket.masks[n] & (p == 0)).sum()) for n, p in first.items())
    assert returned > 0


def test_dropout_is_off_during_the_run_and_the_models_own_after_it() -> None:
    problem, seen = bert(steps=30), set[float]()

    class See(Watch):
        def step(self, record: dict[str, Any]) -> None:
            assert run is not None
            if record.get("label") == "main":  # not the batches that the layers are fitted to
                seen.update(value for _, _, value in find_dropouts(run))

    run: nn.Module | None = None
    plain = problem.start_run

    def start(*args: object) -> TrainState:
        nonlocal run
        state = plain()
        run = state.model
        return state

    watching = replace(problem, observer=See())
    object.__setattr__(watching, "start_run", start)
    GradualOBS(prunings=2, batches=1).run(watching, 0.5)
    assert seen == {0.0}
    assert run is not None
    assert {value for _, _, value in find_dropouts(run)} == {value for _, _, value in find_dropouts(problem.pretrained)}
    assert {value for _, _, value in find_dropouts(run)} == {0.1}


BERT = partial(bert, steps=150, training=TrainingConfig(learning_rate=1e-3, batch_size=8))


@pytest.mark.parametrize("scope", ["2:4", "4:8"])
def test_n_of_m_is_reached_by_prunings_inside_it(scope: str) -> None:
    width = int(scope[-1])
    method = GradualOBS(scope=scope)  # type: ignore[arg-type]
    ticket = method.run(BERT(), 0.5)
    for mask in ticket.masks.values():
        assert (mask.reshape(-1, width).sum(1) == width // 2).all()
    between = carry_out_plan(_OnlyFirst(method), BERT(), 0.5).state
    weights = between.prunable_parameters()
    for weight in weights.values():
        assert ((weight != 0).reshape(-1, width).sum(1) >= width // 2).all()
    assert 0.0 < float(sum((w == 0).sum() for w in weights.values())) / between.masks.__len__() / 4096 < 0.5


def test_n_of_m_runs_along_the_inputs_of_a_matrix_that_is_stored_the_other_way_round() -> None:
    ticket = GradualOBS(scope="2:4", prunings=2, batches=1).run(bert(family=gpt2(), steps=20), 0.5)
    stored = {name: mask for name, mask in ticket.masks.items() if "c_" in name}
    assert stored  # Conv1D: [in, out]
    for mask in stored.values():
        assert (mask.T.reshape(-1, 4).sum(1) == 2).all()


def test_heads_and_units_are_cut_whole_at_the_smallest_t_it_is_meant_for() -> None:
    ticket = GradualOBS(structure="heads-and-units").run(BERT(), 0.5)
    gone = 1 - algebra.count_kept(ticket.masks) / sum(m.numel() for m in ticket.masks.values())
    assert 0.5 <= gone < 0.63  # the nearest boundary: a head is an eighth of all
    for name, mask in ticket.masks.items():
        lines = (
            mask
            if name.endswith(("query.weight", "key.weight", "value.weight", "intermediate.dense.weight"))
            else mask.T
        )
        assert set(lines.float().mean(1).tolist()) <= {0.0, 1.0}


def test_the_same_run_in_two_halves_and_without_a_fit() -> None:
    whole, again = (GradualOBS(prunings=3).run(tiny(), 0.7) for _ in range(2))
    assert same(whole.weights, again.weights)
    plain = GradualOBS(prunings=3, iterations=0)
    problem = tiny()
    ticket = plain.run(problem, 0.7)
    assert "score" not in problem.meter.costs
    assert not same(ticket.weights, whole.weights)
    assert plain.run(tiny(), 0.0).masks.keys() == ticket.masks.keys()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: GradualOBS(start=0.9),
            r"^start: must be below stop, got 0\.9, with stop at 0\.85; lower start or raise stop$",
        ),
        (lambda: GradualOBS(stop=1.0), r"^stop: must be a share of T, below 1, got 1\.0$"),
        (lambda: GradualOBS(prunings=0), r"^prunings: must be at least 1, got 0$"),
        (lambda: GradualOBS(average=0.0), r"^average: must be in \(0, 1\], got 0\.0$"),
        (lambda: GradualOBS(batches=0), r"^batches: must be at least 1, got 0$"),
        (lambda: GradualOBS(iterations=-1), r"^iterations: must be at least 0, got -1$"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make()


def test_too_few_steps_are_refused_with_the_number_that_is_enough() -> None:
    with pytest.raises(UserError, match=r"6 steps are too few: gradual-obs with 8 prunings needs at least \d+"):
        GradualOBS().run(tiny(steps=6), 0.5)
