"""Train the masks of a given ticket: again, on another dataset, or as the start of further pruning."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.core.groups import validate_groups
from sparsesoup.core.masks import Masks
from sparsesoup.core.masks import sparsity as sparsity_of
from sparsesoup.core.schedules import CubicSchedule
from sparsesoup.core.targets import Targets, target_parameters, weights_fingerprint
from sparsesoup.core.ticket import Ticket, load_masks, match_parameter_names
from sparsesoup.methods.gradual import GradualPruning, pruning_hook, train_with
from sparsesoup.methods.scores import magnitude
from sparsesoup.methods.select_masks import select_masks
from sparsesoup.training.loop import train
from sparsesoup.training.problem import Problem, require_steps


@dataclass(frozen=True, kw_only=True)
class FromTicket:
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

        Raises: UserError if no ticket is set, or it is missing or damaged.
        """
        if not self.ticket:
            raise UserError("method ticket needs --method.ticket PATH: a run directory or its model folder")
        return load_masks(Path(self.ticket))

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
                f"foreign ticket: {self.ticket} was drawn from {facts.get('model', 'another model')}, whose prunable "
                f"weights differ from this model's; take its base model"
            )
        if fitted.keys() != params.keys():
            raise UserError(f"foreign ticket: it says nothing of {min(params.keys() - fitted.keys())}")
        return {name: fitted[name] for name in params}

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """Return the ticket after T steps."""
        require_steps(problem, 4, "training a ticket")
        masks, state = self.masks_for_problem(problem), problem.start_run()
        require_sparser(masks, sparsity)
        device = next(iter(state.prunable_parameters().values())).device
        state.set_masks_({name: m.to(device) for name, m in masks.items()})
        if round((1 - sparsity) * algebra.count_total(masks)) == algebra.count_kept(masks):
            problem.journal.run_stage("train", state, train, state, problem, problem.steps)
            return problem.finish_run(state, ticket=self.ticket)
        further = self.further
        pattern = validate_groups(problem.targets, further.structure, sparsity, further.pattern, further.scope)
        plan = CubicSchedule(
            round(further.start * problem.steps),
            round(further.stop * problem.steps),
            max(1, round(further.every * problem.steps)),
            initial=sparsity_of(masks),
        )
        # Refuse masks that another scope or pattern cannot contain before the first step.
        select_masks(
            state,
            magnitude(state.prunable_parameters()),
            plan.initial,
            pattern=pattern,
            scope=further.scope,
            within=state.masks,
        )
        hook = pruning_hook(plan, sparsity, pattern, further.scope)
        problem.journal.run_stage("train", state, train_with, state, problem, hook)
        return problem.finish_run(state, ticket=self.ticket)


def require_sparser(masks: Masks, sparsity: float) -> None:
    """Raise a UserError if the requested sparsity is below the ticket's."""
    if round((1 - sparsity) * algebra.count_total(masks)) > algebra.count_kept(masks):
        raise UserError(f"sparsity {sparsity:g} is below the ticket's {sparsity_of(masks):.4f}; ask for that or more")
