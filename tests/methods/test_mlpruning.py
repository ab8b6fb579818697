"""MLPruning: learnt kept shares, gradients by hand, the paper's count, exact trimming in both stages."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch.nn import Parameter

from conftest import tiny, watched
from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Block, Row
from sparsesoup.core.masks import count_kept, count_total, sparsity
from sparsesoup.hub.models.cut_layers import layer_widths
from sparsesoup.hub.models.layer_layouts import prunable_layers
from sparsesoup.methods import learned_masks
from sparsesoup.methods.gates.attach import attach_gates, gates_of
from sparsesoup.methods.gates.kept_share import KeptShareGate, MatrixShare, ShareController
from sparsesoup.methods.heads_and_rows import head_and_row_groups, kept_weights, matrix_shares
from sparsesoup.methods.learned_masks import PhaseShares
from sparsesoup.methods.live_features import close_dead_inputs
from sparsesoup.methods.mlpruning import MlPruning
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.observer import Observer
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState
from tiny_bert import bert
from tiny_exports import narrow_model

ALONE = {"structured": 1.0}


def gate_of(scores: list[float], logit: float, block: Block = Row, alive: list[bool] | None = None) -> KeptShareGate:
    living = torch.ones(len(scores), dtype=torch.bool) if alive is None else torch.tensor(alive)
    values = Parameter(torch.tensor(scores, dtype=torch.float64))
    return KeptShareGate(values, Parameter(torch.tensor(logit, dtype=torch.float64)), block, 0, 0, living)


@pytest.mark.parametrize("seed", range(8))
def test_a_gate_keeps_the_best_of_its_groups_as_many_as_its_share_says(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(23, generator=draw).tolist()
    for logit in (*torch.empty(9).uniform_(-6, 6, generator=draw).tolist(), -50.0, 50.0):
        gate = gate_of(scores, logit)
        share = 1 / (1 + math.exp(-logit))
        best = sorted(range(23), key=lambda i: -scores[i])[: max(1, math.ceil(share * 23))]
        assert gate.open_groups().nonzero().flatten().tolist() == sorted(best)
        weight = torch.randn(23, 4, generator=draw, dtype=torch.float64)
        kept = torch.zeros_like(weight).index_copy(0, torch.tensor(sorted(best)), weight[sorted(best)])
        assert gate(weight).equal(kept)


def test_equal_scores_open_together_and_groups_without_weights_never() -> None:
    assert gate_of([0.0] * 5, -1.0).open_groups().all()  # as at the start, where an order by place would say which
    gate = gate_of([3.0, 2.0, 1.0, 0.0], 0.0, alive=[False, True, True, True])
    assert gate.open_groups().tolist() == [False, True, True, False]  # ceil(3 / 2) of three
    assert gate.kept_share().item() == 0.5


def test_gradients_of_scores_and_logit_are_those_by_hand() -> None:
    gate, weight = gate_of([1.0, -1.0], 0.0), torch.tensor([[2.0, 3.0], [5.0, 7.0]], dtype=torch.float64)
    weight.requires_grad_(True)
    slope = torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=torch.float64)
    (gate(weight) * slope).sum().backward()  # the first row is open: ceil(1 / 2 of two)
    assert weight.grad.tolist() == [[0.1, 0.2], [0.0, 0.0]]
    assert gate.score.grad.tolist() == pytest.approx([2 * 0.1 + 3 * 0.2, 5 * 0.3 + 7 * 0.4])
    assert gate.logit.grad.item() == pytest.approx(2 * 0.1 + 3 * 0.2)  # of the open row alone


def controlled(first: float, second: float, target: float) -> tuple[Any, ShareController]:
    problem = bert()
    ties = head_and_row_groups(problem.targets)
    found = MlPruning(**ALONE, strength=20_000.0)
    gates = found.make_gates(problem, 1.0 - target)
    state = problem.start_run(lambda model: (attach_gates(model, gates.groups, gates.make), 1.0))
    for number, gate in enumerate(_gates(state.model, ties)):
        gate.logit.data.fill_(first if number % 2 else second)
    return state, gates.hook


def _gates(model: torch.nn.Module, ties: Any) -> list[KeptShareGate]:
    found = {gate.coupled: gate for gate in model.modules() if isinstance(gate, KeptShareGate)}
    return [found[tie] for tie in range(len(ties))]


def test_the_kept_share_is_that_of_the_paper_and_of_the_counted_masks() -> None:
    """Per block 3 a + a o + 2 c + 2 c w, in units of the hidden width squared, at a width of 32 units over 16."""
    state, lead = controlled(0.5, 1.5, 0.3)
    gates = _gates(state.model, head_and_row_groups(state.targets))
    share = [gate.kept_share().item() for gate in gates]
    names, ties = list(state.targets), head_and_row_groups(state.targets)
    owner = dict(zip(names, [m.rows for m in lead.matrices], strict=True))
    total = 0.0
    for layer in range(2):
        at = {role: share[owner[next(n for n, t in state.targets.items() if t.role == role and f".{layer}." in n)]]
              for role in ("query", "output", "feed-forward in", "feed-forward out")}  # fmt: skip
        a, o, c, w = at.values()
        total += 3 * a + a * o + 2 * c + 2 * c * w
    excess = max(total / 16 - 0.3, 0.0)
    assert excess > 0.05
    weight = max(20_000 * excess**2 / 0.49, 50.0)
    assert lead.penalty_term(state).item() == pytest.approx(weight * excess**2, rel=1e-5)
    # With shares of 0 and 1 the same formula counts the weights that the masks keep.
    counts = [len(gate.alive) for gate in gates]
    left = [int(gate.open_groups().sum()) for gate in gates]
    masks = {}
    for tie, gate in zip(head_and_row_groups(state.targets), gates, strict=True):
        shapes = {name: t.shape for name, t in state.targets.items()}
        some = torch.zeros(len(gate.alive), dtype=torch.bool)
        some[: left[gate.coupled]] = True
        masks |= tie.expand_to_weights(some, shapes)
    closed = close_dead_inputs({name: masks[name] for name in state.targets}, state.targets)
    assert kept_weights(matrix_shares(ties, state.targets), counts, left) == count_kept(closed)


def test_below_the_target_nothing_pulls_and_close_above_it_a_constant_does() -> None:
    state, lead = controlled(-3.0, -3.0, 0.5)
    pull = lead.penalty_term(state)
    pull.backward()
    gates = _gates(state.model, head_and_row_groups(state.targets))
    assert pull.item() == 0.0
    assert all(gate.logit.grad is None or not gate.logit.grad.any() for gate in gates)
    near = ShareController(sparsity=0.5, strength=20_000.0, matrices=[MatrixShare(100, 0)])
    for gate in gates:
        gate.logit.data.fill_(math.log(0.51 / 0.49))
    assert near.penalty_term(state).item() == pytest.approx(10 * 0.01**2, rel=1e-3)


def wide_bert(steps: int) -> Problem:
    """Eight heads of four features and 64 units, in each of two blocks."""
    shape = {"hidden_size": 32, "num_attention_heads": 8, "intermediate_size": 64, "num_hidden_layers": 2}
    return bert(family=transformers.BertConfig(vocab_size=64, max_position_embeddings=16, **shape), steps=steps)


@pytest.mark.parametrize(
    ("settings", "steps", "sparsity"),
    [(ALONE, 150, 0.35), (ALONE, 150, 0.75), (ALONE, 300, 0.5), ({"tile": Block(8, 8)}, 150, 0.5)],
)
def test_the_learnt_shares_end_at_the_target_and_no_kept_weight_is_scaled_down(
    settings: dict[str, Any], steps: int, sparsity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A penalty to a constant target, as published, goes on to fall by its momentum: 15 to 20 points below."""
    scales, plain = list[float](), learned_masks.fold_gates_

    def fold_(state: TrainState) -> None:
        kept = [gate.mean_gate(state.masks[name])[state.masks[name]] for name, gate in gates_of(state.model)]
        scales.append(float(torch.cat(kept).float().mean()))
        plain(state)

    monkeypatch.setattr(learned_masks, "fold_gates_", fold_)
    ticket = MlPruning(**settings).run(wide_bert(steps), sparsity)
    assert ticket.notes["threshold_sparsity"] == pytest.approx(ticket.sparsity, abs=0.005)
    assert ticket.sparsity == pytest.approx(sparsity, abs=512 / 16_384)  # a head, with what reads it
    assert scales == pytest.approx([1.0] * len(scales), abs=0.005)
    assert len(scales) == (1 if settings is ALONE else 2)


def test_shares_follow_the_schedule_from_the_warm_up_on() -> None:
    phases, shares = PhaseShares(warmup=0.25, cooldown=0.5, settle=0.25), dict[int, float]()

    class Log(Observer):
        def step(self, record: Any) -> None:
            if record and record["label"] == "main":
                shares[record["step"]] = record["sparsity"]

    problem = replace(wide_bert(80), observer=Log())
    MlPruning(**ALONE, phases=phases).run(problem, 0.6)
    wanted = phases.pruning_schedule(80)
    assert all(shares[step] == pytest.approx(wanted.sparsity_at(step, 0.6), abs=0.05) for step in range(1, 81))
    assert shares[20] == 0.0


def learnt(sparsity: float, **more: Any) -> tuple[Any, Any, Any]:
    with watched() as watch:
        training = TrainingConfig(learning_rate=3e-3, batch_size=8)
        problem = bert(torch.float64, steps=40, training=training, observer=watch)
        return MlPruning(**{"tile": Block(4, 4), **more}).run(problem, sparsity), problem, watch


@pytest.mark.parametrize("share", [0.2, 0.45, 0.8])
def test_heads_and_rows_are_whole_and_cut_out_to_the_same_answers(share: float) -> None:
    ticket, problem, _ = learnt(share, **ALONE)
    goal = round((1 - share) * 4096)
    assert goal - 512 < count_kept(ticket.masks) <= goal  # the largest group is a head
    for name, target in problem.targets.items():
        mask, bias = ticket.masks[name], ticket.weights[name.removesuffix("weight") + "bias"]
        rows = mask.any(1)
        assert not bias[~rows].any()
        if target.role in ("query", "key", "value"):
            assert all(len(set(band.tolist())) == 1 for band in rows.split(8))
        columns = mask.any(0)
        assert mask.equal(rows[:, None] & columns)
    narrow = narrow_model(problem, ticket)
    parts = [layer.module_of(part).weight.numel() for layer in prunable_layers(narrow)
             for part in ("query", "key", "value", "output", "up", "down")]  # fmt: skip
    assert sum(parts) == count_kept(ticket.masks)
    if share > 0.4:
        assert any("output_rows" in row.get("narrow", {}) for row in layer_widths(narrow).values())


def test_blocks_are_pruned_among_what_heads_and_rows_left() -> None:
    ticket, problem, watch = learnt(0.7)
    first = ticket.notes["heads_and_rows"]
    assert first == pytest.approx(1 - 0.3**0.37, abs=512 / 4096)
    assert round(0.3 * 4096) - 16 < count_kept(ticket.masks) <= round(0.3 * 4096)
    stages = [masks for masks in watch.pruned if abs(sparsity(masks) - first) < 1e-9]
    assert stages
    for name, mask in ticket.masks.items():
        assert not (mask & ~stages[0][name]).any()
        tiles, left = (m.view(m.shape[0] // 4, 4, -1, 4).float().sum((1, 3)) for m in (mask, stages[0][name]))
        assert bool(((tiles == 0) | (tiles == left)).all())  # whole tiles of what was left
    assert problem.meter.costs["main"].steps == 80
    assert count_total(ticket.masks) == 4096


def test_where_one_tile_of_each_matrix_is_too_much_the_best_of_them_stay() -> None:
    """Tiles of 32 x 32 in matrices of 32 x 32 and 64 x 32: the first ones hold more than the sparsity leaves."""
    ticket = MlPruning(structured=0.1, score_rate=0.05).run(wide_bert(40), 0.7)
    assert 0.3 * 16_384 - 1024 < count_kept(ticket.masks) <= 0.3 * 16_384
    assert all(weight.isfinite().all() for weight in ticket.weights.values())
    alive = [name for name, mask in ticket.masks.items() if mask.any()]
    assert any(".1." in name for name in alive)  # chosen by the logits, not by the order of the matrices


def test_settings_that_make_no_sense_are_refused() -> None:
    for name, value in (("structured", 0.0), ("blocks", 0.0), ("start", 0.0), ("score_rate", 0.0)):
        with pytest.raises(UserError, match=name):
            MlPruning(**{name: value})
    with pytest.raises(UserError, match=r"^start: must be 10 without strength"):
        MlPruning(start=5.0)
    with pytest.raises(UserError, match=r"^phases\.warmup: with strength the target is constant"):
        MlPruning(strength=20_000.0, phases=PhaseShares(warmup=0.3))
    with pytest.raises(UserError, match="one of each matrix stays"):
        MlPruning(**ALONE).run(bert(steps=40), 0.99)
    with pytest.raises(UserError, match="does not tile"):
        MlPruning(tile=Block(32, 32)).run(tiny(), 0.5)
