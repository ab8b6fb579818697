"""Train the masks of a given ticket: again, on another dataset, or as the start of further pruning."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.core.groups import need_groups
from sparsesoup.core.masks import Masks
from sparsesoup.core.masks import sparsity as sparsity_of
from sparsesoup.core.schedules import Cubic
from sparsesoup.core.targets import Targets, fingerprint, parameters
from sparsesoup.core.ticket import Ticket, fit, load_masks
from sparsesoup.methods.gradual import Gradual, pruning, train_with
from sparsesoup.methods.scores import magnitude
from sparsesoup.methods.select_masks import choose
from sparsesoup.training.loop import train
from sparsesoup.training.problem import Problem, need_steps


@dataclass(frozen=True, kw_only=True)
class FromTicket:
    """Put a ticket's masks on the pre-trained weights and train; if more sparsity is asked, prune on gradually.

    With --model RUN/model the weights are the ticket's own instead of the checkpoint's. Chen et al. 2020, sec. 4
    (transfer of subnetworks).

    Args:
        ticket: run directory, model folder or pruning folder that holds the masks.
        further: the schedule by which it is pruned on, where the sparsity asked for is above the ticket's.
    """

    ticket: str = ""
    further: Gradual = field(default_factory=Gradual)

    def given(self) -> tuple[Masks, dict[str, Any]]:
        """The ticket's masks as they were saved, and the facts about them.

        Raises: UserError if none is named, or it is not there or damaged.
        """
        if not self.ticket:
            raise UserError("method ticket needs --method.ticket PATH: a run directory or its model folder")
        return load_masks(Path(self.ticket))

    def masks(self, problem: Problem) -> Masks:
        """The ticket's masks under the problem's names.

        Raises: UserError if the ticket is damaged, of other shapes or of another base model.
        """
        return self.fitted(problem.pretrained, problem.targets)

    def fitted(self, pretrained: nn.Module, targets: Targets) -> Masks:
        """The ticket's masks for a model; refuses what `masks` refuses."""
        masks, facts = self.given()
        params = parameters(pretrained, targets)
        fitted = fit(masks, {n: p.shape for n, p in params.items()}, getattr(pretrained, "base_model_prefix", ""))
        # The ticket's own weights are no copy of the base model, but are zero where the masks are.
        own = all(not bool(params[n].detach()[~m].any()) for n, m in fitted.items())
        if not own and facts.get("origin") != fingerprint(params):
            raise UserError(
                f"foreign ticket: {self.ticket} was drawn from {facts.get('model', 'another model')}, whose prunable "
                f"weights differ from this model's; take its base model"
            )
        if fitted.keys() != params.keys():
            raise UserError(f"foreign ticket: it says nothing of {min(params.keys() - fitted.keys())}")
        return {name: fitted[name] for name in params}

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """The ticket after T steps."""
        need_steps(problem, 4, "training a ticket")
        masks, state = self.masks(problem), problem.start()
        need_sparse(masks, sparsity)
        device = next(iter(state.params().values())).device
        state.prune_({name: m.to(device) for name, m in masks.items()})
        if round((1 - sparsity) * algebra.total(masks)) == algebra.kept(masks):
            problem.journal.piece("train", state, train, state, problem, problem.steps)
            return problem.ticket(state, ticket=self.ticket)
        further = self.further
        pattern = need_groups(problem.targets, further.structure, sparsity, further.pattern, further.scope)
        plan = Cubic(
            round(further.start * problem.steps),
            round(further.stop * problem.steps),
            max(1, round(further.every * problem.steps)),
            initial=sparsity_of(masks),
        )
        # What masks that were drawn in another scope or pattern cannot hold is refused before the first step.
        choose(state, magnitude(state.params()), plan.initial, pattern=pattern, scope=further.scope, within=state.masks)
        hook = pruning(plan, sparsity, pattern, further.scope)
        problem.journal.piece("train", state, train_with, state, problem, hook)
        return problem.ticket(state, ticket=self.ticket)


def need_sparse(masks: Masks, sparsity: float) -> None:
    """Raise a UserError if less sparsity is asked for than a ticket has."""
    if round((1 - sparsity) * algebra.total(masks)) > algebra.kept(masks):
        raise UserError(f"sparsity {sparsity:g} is below the ticket's {sparsity_of(masks):.4f}; ask for that or more")
