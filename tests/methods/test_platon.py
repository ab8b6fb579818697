"""PLATON: the averages against a slow twin, for PINS too, and weights that return until the masks are final."""

from collections.abc import Callable

import pytest
import torch

from conftest import Watch, climb, same, tiny, watched
from reference import averages as twin
from sparsesoup.core.errors import UserError
from sparsesoup.core.masks import dense_masks, sparsity
from sparsesoup.core.schedules import CubicSchedule
from sparsesoup.methods.platon import Platon, pruning_ramp
from sparsesoup.methods.scores.averages import ImportanceAverages, after_step, first_order_sensitivity
from sparsesoup.training.loop import train
from sparsesoup.training.state import TrainState

BY_HAND: dict[str, Callable[[float, float, float], float]] = {
    "platon": lambda w, g, rate: abs(g * w),
    "pins": lambda w, g, rate: abs(g * (w - rate * g)),
}
OURS = {"platon": first_order_sensitivity, "pins": after_step}
FAST, SLOW = 0.85, 0.95


def watched_averages(
    name: str, window: int, origin: int, steps: int = 23
) -> tuple[ImportanceAverages, TrainState, dict[str, list[list[float]]]]:
    """Averages after a training, the state, and the sensitivities by hand: parameter -> weight -> step."""
    averages = ImportanceAverages(sensitivity=OURS[name], fast=FAST, slow=SLOW, window=window, origin=origin)
    problem, by_hand = tiny(), {n: [[] for _ in range(400 if "blocks" in n else 1200)] for n in tiny().targets}

    def observe(state: TrainState) -> None:
        averages.observe_gradients(state)
        rate = problem.rate_schedule()(state.step)
        for n, p in state.prunable_parameters().items():
            pairs = zip(p.detach().double().flatten().tolist(), p.grad.double().flatten().tolist(), strict=True)
            for history, (w, g) in zip(by_hand[n], pairs, strict=True):
                history.append(BY_HAND[name](w, g, rate))

    return averages, train(problem.start_run(), problem, steps, observe=observe), by_hand


@pytest.mark.parametrize(("window", "origin"), [(1, 0), (5, 3), (5, 20)])
@pytest.mark.parametrize("name", ["platon", "pins"])
def test_the_averages_are_those_of_the_slow_twin(name: str, window: int, origin: int) -> None:
    averages, state, by_hand = watched_averages(name, window, origin)
    scores = averages.current_scores(state)
    for n, histories in by_hand.items():
        pairs = [twin.averages(h, window, origin, FAST, SLOW) for h in histories]
        importance, uncertainty = (torch.tensor(t, dtype=torch.float64) for t in zip(*pairs, strict=True))
        found = {k: state.memory[f"{k}/{n}"].double().flatten() for k in ("importance", "uncertainty")}
        largest = importance.max()
        assert largest > 0
        assert found["importance"].allclose(importance, rtol=1e-4, atol=1e-7 * largest)
        assert found["uncertainty"].allclose(uncertainty, rtol=1e-3, atol=1e-6 * largest)
        assert scores[n].double().flatten().allclose(importance * uncertainty, rtol=2e-3, atol=1e-6 * largest**2)


def test_the_two_sensitivities_differ_by_the_step_that_is_about_to_be_made() -> None:
    w, g = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 0.25, 2.0])
    assert first_order_sensitivity(w, g, 0.1).tolist() == [0.5, 0.5, 0.0]
    assert after_step(w, g, 0.1).tolist() == pytest.approx([0.475, 0.50625, 0.4])


def test_the_averages_cost_two_tensors_a_weight_and_are_gone_after_the_last_pruning() -> None:
    averages, state, _ = watched_averages("platon", 1, 0)
    assert sorted(state.memory) == sorted(f"{k}/{n}" for k in ("importance", "uncertainty") for n in state.targets)
    _, between, _ = watched_averages("platon", 5, 20)
    assert len(between.memory) == 3 * len(between.targets)
    averages.clear_averages_(between)
    assert between.memory == {}
    with watched() as watch:
        Platon(every_steps=5, window=5).run(tiny(), 0.7)
    assert watch.state is not None
    assert watch.state.memory == {}


def climbed(plan: CubicSchedule, until: int, share: float = 0.7) -> tuple[ImportanceAverages, TrainState]:
    problem = tiny()
    averages = ImportanceAverages(
        sensitivity=first_order_sensitivity, fast=FAST, slow=SLOW, window=5, origin=plan.start
    )
    state = problem.start_run()
    climb(problem, state, plan, until, share, averages)
    return averages, state


def test_a_pruning_zeroes_the_lowest_products_of_importance_and_uncertainty_and_leaves_the_moments() -> None:
    plan = CubicSchedule(5, 25, 5)
    averages, state = climbed(plan, 15)
    goal, scores, params = plan.sparsity_at(15, 0.7), averages.current_scores(state), state.prunable_parameters()
    kept = {n: p.detach() != 0 for n, p in params.items()}
    assert sparsity(kept) == pytest.approx(goal, abs=1e-3)
    lowest = min(float(scores[n][m].min()) for n, m in kept.items())
    assert lowest >= max(float(scores[n][~m].max()) for n, m in kept.items())
    assert same(state.masks, dense_masks(params))  # until the last one nothing is final
    for n, p in params.items():
        moment = state.optimizer.state[p]["exp_avg"][~kept[n]]
        assert (moment != 0).float().mean() > 0.9


def test_weights_return_between_prunings_and_not_after_the_last() -> None:
    plan, problem = CubicSchedule(5, 25, 5), tiny()
    averages, state = climbed(plan, 20)
    gone = {n: p.detach() == 0 for n, p in state.prunable_parameters().items()}
    assert sum(int(m.sum()) for m in gone.values()) > 1000
    _, later = climbed(plan, 22)  # the same run two steps later: nearly all of them move again
    assert sum(int((p == 0).sum()) for p in later.prunable_parameters().values()) < 400
    for n, m in gone.items():  # let some of them have been the most important all along
        m &= torch.arange(m.shape[1]) < 4
        state.memory[f"importance/{n}"][m] = state.memory[f"uncertainty/{n}"][m] = 1.0
    climb(problem, state, plan, 25, 0.7, averages)
    assert all(state.masks[n][m].all() for n, m in gone.items())
    assert sum(int(m.sum()) for m in gone.values()) > 100
    final = {n: m.clone() for n, m in state.masks.items()}
    assert sparsity(final) == pytest.approx(0.7)
    train(state, problem, 10)
    assert same(state.masks, final)
    assert not any(p[~final[n]].any() for n, p in state.prunable_parameters().items())


def test_a_run_ranks_by_the_sensitivity_and_the_decays_it_was_given() -> None:
    ticket = Platon(fast=0.3, slow=0.6, every_steps=6, window=3, start=0.2, stop=0.6).run(tiny(), 0.7)
    plan, problem = CubicSchedule(12, 36, 6), tiny()
    masks = []
    for fast, slow in [(0.3, 0.6), (0.6, 0.3)]:
        state = problem.start_run()
        averages = ImportanceAverages(sensitivity=first_order_sensitivity, fast=fast, slow=slow, window=3, origin=12)
        climb(problem, state, plan, 36, 0.7, averages)
        masks.append(state.masks)
    assert same(ticket.masks, masks[0])
    assert not same(ticket.masks, masks[1])


def test_the_log_shows_the_ramp_and_then_the_final_masks() -> None:
    watch = Watch()
    Platon(every_steps=5, window=5).run(tiny(observer=watch), 0.7)
    curve = watch.curve("sparsity")
    goals = [0.7 * (1 - (1 - i / 7) ** 3) for i in range(8)]  # at 6, 11, ... 41: the last whole interval before 42
    steps = [0.0] * 5 + [goal for goal in goals[:-1] for _ in range(5)] + [0.7] * 20
    assert curve == [pytest.approx(goal, abs=1e-12) for goal in steps]


def test_every_pruning_of_the_ramp_ends_a_window() -> None:
    for steps in (17, 60, 101, 200, 333):
        plan = pruning_ramp(tiny(steps=steps).size, 0.1, 0.7, 10)
        assert (plan.stop - plan.start) % 10 == 0
        assert plan.start < plan.stop <= round(0.7 * steps) + 1
        assert plan.start == round(0.1 * steps)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: Platon(start=0.7, stop=0.5),
            r"^start: must be below stop, got 0\.7, with stop at 0\.5; lower start or raise stop$",
        ),
        (lambda: Platon(stop=1.0), r"^stop: must be a share of T, below 1, got 1\.0$"),
        (lambda: Platon(fast=1.0), r"^fast: must be in \[0, 1\), got 1\.0$"),
        (lambda: Platon(slow=-0.1), r"^slow: must be in \[0, 1\), got -0\.1$"),
        (lambda: Platon(every_steps=0), r"^every_steps: must be a multiple of window \(10\), got 0$"),
        (lambda: Platon(window=4), r"^every_steps: must be a multiple of window \(4\), got 10$"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)
