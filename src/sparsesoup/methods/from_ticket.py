"""Train the masks of a given ticket: again, on another dataset, or as the start of further pruning."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.core.low_rank import refuse_low_rank
from sparsesoup.core.masks import Masks
from sparsesoup.core.masks import sparsity as sparsity_of
from sparsesoup.core.targets import Targets, target_parameters, weights_fingerprint
from sparsesoup.core.ticket import load_masks, match_parameter_names
from sparsesoup.methods.base import Method
from sparsesoup.methods.gradual import GradualPruning, pruning_hook
from sparsesoup.training.plan import ActiveRun, LoopHooks, Phase
from sparsesoup.training.problem import Problem
from sparsesoup.training.size import RunSize


@dataclass(frozen=True, kw_only=True)
class FromTicket(Method):
    """Apply a ticket's masks to the pre-trained weights and train; prune further if a higher sparsity is requested.

    With --model RUN/model the weights are the ticket's own instead of the checkpoint's. Chen et al. 2020, sec. 4
    (transfer of subnetworks).

    Args:
        ticket: run directory, model folder or pruning folder that holds the masks.
        further: gradual pruning schedule if the requested sparsity exceeds the ticket's.
    """

    ticket: str = ""
    further: GradualPruning = field(default_factory=GradualPruning)

    def load_given(self) -> tuple[Masks, dict[str, Any]]:
        """Return the ticket's masks as saved, and their metadata.

        Raises: UserError if no ticket is set, or it is missing or damaged, or of low rank and so without masks.
        """
        if not self.ticket:
            raise UserError("method ticket needs --method.ticket PATH: a run directory or its model folder")
        masks, facts = load_masks(Path(self.ticket))
        refuse_low_rank(facts, Path(self.ticket), "train")
        return masks, facts

    def masks_for_problem(self, problem: Problem) -> Masks:
        """Return the ticket's masks under the problem's parameter names.

        Raises: UserError if the ticket is damaged, of other shapes or of another base model.
        """
        return self.masks_for_model(problem.pretrained, problem.targets)

    def masks_for_model(self, pretrained: nn.Module, targets: Targets) -> Masks:
        """Return the ticket's masks for a model; raise as `masks_for_problem` does."""
        masks, facts = self.load_given()
        params = target_parameters(pretrained, targets)
        fitted = match_parameter_names(
            masks, {n: p.shape for n, p in params.items()}, getattr(pretrained, "base_model_prefix", "")
        )
        # The ticket's own weights differ from the base model's, but are zero where the masks are.
        own = all(not bool(params[n].detach()[~m].any()) for n, m in fitted.items())
        if not own and facts.get("origin") != weights_fingerprint(params):
            raise UserError(
                f"foreign ticket: {self.ticket} was made from {facts.get('model', 'another model')}, whose prunable "
                f"weights differ from this model's; use its base model"
            )
        if fitted.keys() != params.keys():
            raise UserError(f"foreign ticket: it says nothing of {min(params.keys() - fitted.keys())}")
        return {name: fitted[name] for name in params}

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return a single training, which prunes further if the ticket is denser than the sparsity."""
        if size.steps:
            size.require_steps(4, "training a ticket")
        # At the latest: the ticket may be at the sparsity.
        final = self.further.pruning_schedule(size.steps).stop if size.steps else None
        return [Phase(name="train", steps=size.steps, loop=partial(self._prune_further, sparsity), masks_final=final)]

    def check(self, problem: Problem, sparsity: float) -> None:
        """Leave it to `start_run`, which reads the ticket."""

    def start_run(self, problem: Problem, sparsity: float) -> ActiveRun:
        """Start a run with the ticket's masks.

        Raises: UserError if the ticket is of another model, is sparser than the sparsity, or has masks that the scope
            or pattern of further pruning cannot contain.
        """
        masks = self.masks_for_problem(problem)
        require_sparser(masks, sparsity)
        run = super().start_run(problem, sparsity)
        device = next(iter(run.state.prunable_parameters().values())).device
        run.state.set_masks_({name: m.to(device) for name, m in masks.items()})
        run.own = None if _is_at(masks, sparsity) else sparsity_of(masks)
        if run.own is not None and not problem.steps:
            raise UserError(f"0 steps are too few to prune the ticket further, to {sparsity:g}; leave --sparsity out")
        if run.own is not None:
            self.further.groups_of(problem.targets, sparsity)
            self.further.select_masks(run.state, run.own, within=run.state.masks)
        return run

    def notes(self, run: ActiveRun) -> dict[str, Any]:
        """Return the ticket's path."""
        return {"ticket": self.ticket}

    def _prune_further(self, sparsity: float, run: ActiveRun) -> LoopHooks:
        if run.own is None:
            return LoopHooks()
        schedule = self.further.pruning_schedule(run.problem.steps, initial=run.own)
        return LoopHooks([pruning_hook(self.further, schedule, sparsity)], at_start=True)


def _is_at(masks: Masks, sparsity: float) -> bool:
    return round((1 - sparsity) * algebra.count_total(masks)) == algebra.count_kept(masks)


def require_sparser(masks: Masks, sparsity: float) -> None:
    """Raise a UserError if the requested sparsity is below the ticket's."""
    if round((1 - sparsity) * algebra.count_total(masks)) > algebra.count_kept(masks):
        raise UserError(f"sparsity {sparsity:g} is below the ticket's {sparsity_of(masks):.4f}; ask for that or more")
