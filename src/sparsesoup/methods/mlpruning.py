"""MLPruning: heads and rows, then blocks, with learned shares to keep. Yao et al. 2021."""

import math
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sparsesoup.core.errors import UserError, require
from sparsesoup.core.granularity import Block, CoupledGroups
from sparsesoup.core.groups import block_groups
from sparsesoup.core.masks import sparsity as sparsity_of
from sparsesoup.core.schedules import ScaledRate
from sparsesoup.methods.gates.attach import Make, attach_gates
from sparsesoup.methods.gates.kept_share import KeptShareGate, ShareController
from sparsesoup.methods.heads_and_rows import (
    TileSizes,
    block_penalty,
    follow_schedule,
    head_and_row_groups,
    kept_weights,
    matrix_shares,
    rank_heads_and_rows,
    trim_blocks,
    trim_heads_and_rows,
)
from sparsesoup.methods.learned_masks import GateSetup, LearnedMasks, PhaseShares, check_rate, settle_hooks
from sparsesoup.training.hooks import Hook
from sparsesoup.training.plan import ActiveRun, LoopHooks, Phase
from sparsesoup.training.problem import Problem
from sparsesoup.training.size import RunSize
from sparsesoup.training.state import TrainState

PHASES, START = PhaseShares(warmup=0.1, cooldown=0.4, settle=0.2), 10.0
REACH = 2.0  # what a logit can move by against the others in a search


@dataclass(frozen=True, kw_only=True)
class MlPruning(LearnedMasks):
    """Heads and rows, then blocks, with learned scores and learned shares to keep. Yao et al. 2021 ("MLPruning").

    First stage, T steps: a gate for the heads of each attention, shared by query, key and value, and one for the rows
    of each other matrix, with their biases. Each keeps the best sigmoid(logit) of its groups. After each step all
    logits are raised or lowered alike, so that the kept share of all weights, columns without input left out, is that
    of a cubic schedule; how they differ is learned. Second stage, `blocks` T steps more: gates on the tiles of each
    matrix, among what is left. Both end by trimming to exactly the sparsity, or the nearest group boundary that keeps
    no more.

    With `strength`, as published, a penalty with feedback moves the logits instead, to a constant target. In a short
    run that ends far below it (docs/papers.md).

    Published with train.distill of alpha 0.9 and, for L blocks, hidden and attention 0.9 L: 10.8 for 12, 5.4 for 6.

    Args:
        structured: share of the pruning done in heads and rows, of the logarithm of the kept share; 1: all of it, so
            that it can be cut out, and there is no second stage.
        blocks: share of T of the second stage.
        tile: tile masked as one group in the second stage.
        phases: schedule of either stage, as shares of its steps; with `strength` all but `settle` as by default.
        score_rate: peak learning rate of scores and logits (published: 0.01); default: one with which a logit can move
            by 2 in the stage's search; with `strength`, fall from `start` to 0 in the first third of the stage.
        strength: strength of the penalty's feedback (published: 20,000); None: no penalty.
        start: initial logit of the kept shares, for the penalty.
    """

    structured: float = 0.37
    blocks: float = 1.0
    tile: Block = field(default_factory=lambda: Block(32, 32))
    phases: PhaseShares = PHASES
    score_rate: float | None = None
    strength: float | None = None
    start: float = START

    def __post_init__(self) -> None:
        if self.score_rate is not None:
            check_rate(self.score_rate)
        require(0.0 < self.structured <= 1.0, "structured", "in (0, 1]", self.structured)
        require(0.0 < self.blocks < math.inf, "blocks", "a share of T above 0", self.blocks)
        require(0.0 < self.start < 100.0, "start", "a logit above 0, below 100", self.start)
        if self.strength is None:
            require(
                self.start == START, "start", f"{START:g} without strength, since all logits move alike", self.start
            )
            return
        require(0.0 <= self.strength < math.inf, "strength", "0 or more", self.strength)
        for name in ("warmup", "cooldown"):
            usual = getattr(PHASES, name)
            if getattr(self.phases, name) != usual:
                raise UserError(f"with strength the target is constant; leave {name} at {usual:g}", f"phases.{name}")

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return the phases of both stages: T + `blocks` T steps, or T if all is done in heads and rows."""
        first = super().plan(size, sparsity)
        if self.structured == 1.0:
            return first
        steps = max(1, round(self.blocks * size.steps))
        rest = replace(size, steps=steps)
        rest.require_fit(self.phases.fits_steps, "the second stage of mlpruning")
        settled = self.phases.check_settled(steps)
        start = max(size.steps - steps, 0)
        rate = ScaledRate(size.rate_schedule(steps), start=start)
        return [
            *first,
            Phase(name="blocks", end=partial(_go_back, start), always=partial(self._start_blocks, rest),
                  rewinds_to=start),
            Phase(name="search-blocks", steps=steps - settled, stream=("blocks",), rate=rate, copies=1.0,
                  loop=_search_blocks_hooks),
            Phase(name="trim-blocks", end=first[1].end, always=first[1].always),
            Phase(name="settle-blocks", steps=settled, stream=("blocks",), rate=rate, loop=settle_hooks, masks_final=0),
        ]  # fmt: skip

    def peak_score_rate(self, size: RunSize) -> float:
        """Return the peak learning rate of the scores."""
        if self.score_rate is not None:
            return self.score_rate
        rate, peak = size.rate_schedule(), size.training.learning_rate
        if self.strength is None:
            return REACH * peak / max(sum(map(rate, range(self.phases.pruning_end(size.steps)))), 1e-12)
        return self.start * peak / max(sum(map(rate, range(max(1, size.steps // 3)))), 1e-12)

    def fall_to_close(self) -> float:
        """Return the distance that a logit has to fall before half of its groups are closed."""
        return 0.0 if self.strength is None else self.start

    def make_gates(self, problem: Problem, sparsity: float) -> GateSetup:
        """Return the gates of the first stage, with their penalty."""
        targets, shapes = problem.targets, {name: target.shape for name, target in problem.targets.items()}
        groups = head_and_row_groups(targets)
        matrices, goal = matrix_shares(groups, targets), 1.0 - (1.0 - sparsity) ** self.structured
        counts = [coupled.num_groups(shapes) for coupled in groups]
        if kept_weights(matrices, counts, [1] * len(groups)) > (1.0 - goal) * sum(m.size for m in matrices):
            raise UserError(
                f"cannot prune to sparsity {goal:.4f} in heads and rows: one of each matrix stays; ask for less, or "
                f"set a lower structured"
            )
        alive = [torch.ones(count, dtype=torch.bool) for count in counts]
        trim = partial(trim_heads_and_rows, groups, matrices, goal)
        lead = ShareController(sparsity=goal, strength=self.strength or 0.0, matrices=matrices)
        hook: Hook = lead
        if self.strength is None:
            rank = partial(rank_heads_and_rows, groups, matrices, goal)
            hook = partial(follow_schedule, self.phases.pruning_schedule(problem.steps), 0, rank, lead.masked)
        return GateSetup(
            groups, self._gates(alive), hook, penalty=None if self.strength is None else lead.penalty_term, biases=True,
            trim=trim, masked=lead.masked,
        )  # fmt: skip

    def _gates(self, alive: list[Tensor]) -> Make:
        scores = [Parameter(torch.zeros(len(groups))) for groups in alive]
        logits = [Parameter(torch.tensor(self.start)) for _ in alive]

        def make(number: int, member: int, coupled: CoupledGroups) -> nn.Module:
            return KeptShareGate(
                scores[number], logits[number], coupled.members[member][1], number, member, alive[number]
            )

        return make

    def _start_blocks(self, size: RunSize, run: ActiveRun) -> None:
        """Put gates on the tiles; after a restart too, when the masks, and so what is alive, are not loaded yet."""
        state = run.state
        groups = block_groups(state.targets, self.tile)
        alive = [
            coupled.sum_over_groups({n: state.masks[n].float() for n, _ in coupled.members}) > 0 for coupled in groups
        ]
        learned = attach_gates(state.model, groups, self._gates(alive))
        device = next(iter(state.masks.values())).device
        for parameter in learned:
            parameter.data = parameter.data.to(device)
        factor = self.peak_score_rate(size) / (size.training.learning_rate or 1.0)
        group = {"params": learned, "weight_decay": 0.0, "decays": False, "factor": factor, "lr": 0.0}
        state.optimizer.add_param_group(group)
        tiles = TileSizes(groups, run.sparsity)
        schedule, start = self.phases.pruning_schedule(size.steps), run.problem.steps - size.steps
        hook = partial(follow_schedule, schedule, max(start, 0), tiles.rank, tiles.masked)
        penalty = None if self.strength is None else partial(block_penalty, self.strength, run.sparsity)
        run.own = GateSetup(
            groups, self._gates(alive), hook if penalty is None else _no_hook, penalty=penalty, biases=True,
            trim=partial(trim_blocks, groups, run.sparsity), masked=tiles.masked,
        )  # fmt: skip


def _go_back(start: int, run: ActiveRun) -> None:
    """Begin the second stage: fresh moments, and the step at which its schedule begins."""
    run.state.notes["heads_and_rows"] = sparsity_of(run.state.masks)
    run.state.reset_optimizer_()
    run.state.step = start


def _search_blocks_hooks(run: ActiveRun) -> LoopHooks:
    return LoopHooks([run.own.hook, *settle_hooks(run).hooks], penalty=run.own.penalty)


def _no_hook(state: TrainState) -> None:
    """Do nothing: the masks of the first stage are logged."""
