"""Instant Model Soup: the dense variant of Instant Soup Pruning."""

from dataclasses import dataclass
from typing import Literal

from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.ticket import Ticket
from sparsesoup.methods.isp import PROTOCOLS
from sparsesoup.methods.model_soup import scaled_rate
from sparsesoup.methods.scores import magnitude
from sparsesoup.training import weight_averaging as soups
from sparsesoup.training.loop import TrainingOverrides, train
from sparsesoup.training.problem import Problem, need_dense, require_schedule_fits
from sparsesoup.training.state import TrainState, named_weights


@dataclass(frozen=True, kw_only=True)
class InstantModelSoup:
    """Interpolate short trainings of pruned copies of theta_0 into it, then fine-tune. Jaiswal et al. 2023.

    The model is dense. Every copy is mixed in with the share that is best on validation; a share of 0 leaves it out.

    Args:
        weak_models: number of copies.
        look_ahead: training steps of each, as a share of T.
        sparsities: one-shot magnitude sparsities of the copies; used in turn.
        shares: shares of a copy in the mixture to try, besides 0.
        budget: charged (main and weak steps together are T) or extra (the main run has T, weak steps are additional).
        protocols: training settings of the copies; used in turn.
    """

    weak_models: int = 4
    look_ahead: float = 0.025
    sparsities: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)
    shares: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    budget: Literal["charged", "extra"] = "charged"
    protocols: tuple[TrainingOverrides, ...] = PROTOCOLS

    def __post_init__(self) -> None:
        if self.weak_models < 1 or not 0 < self.look_ahead * self.weak_models < 1 or not self.protocols:
            raise UserError(
                f"instant-model-soup needs weak_models >= 1, weak_models * look_ahead in (0, 1) and at least one "
                f"protocol, got {self.weak_models}, {self.look_ahead:g} and {len(self.protocols)}"
            )
        if not self.sparsities or not all(0 <= s < 1 for s in self.sparsities):
            raise UserError(f"instant-model-soup needs sparsities in [0, 1), at least one, got {self.sparsities}")
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise UserError(f"instant-model-soup needs shares in (0, 1), at least one, got {self.shares}")

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """Return the fine-tuned soup with all of its weights; the sparsity must be 0."""
        need_dense(sparsity, "instant-model-soup")
        require_schedule_fits(
            problem,
            lambda total: self._main_steps(total) >= 1,
            f"instant-model-soup with {self.weak_models} weak models",
        )
        state, steps, main = problem.start_run(), self._weak_steps(problem.steps), self._main_steps(problem.steps)
        problem.journal.run_stage("origin", state, self._store_origin, problem, state)
        for number in range(self.weak_models):
            problem.journal.run_stage(f"fork-{number}", state, self._train_fork, problem, state, number)
            problem.journal.run_stage(f"weak-{number}", state, self._look_ahead, problem, state, steps, number)
            problem.journal.run_stage(f"soup-{number}", state, self._mix_fork, problem, state, number)
        problem.journal.run_stage("begin", state, self._begin_soup, problem, state)
        problem.journal.run_stage("finish", state, self._finish_training, problem, state, main)
        share = self.weak_models * steps / problem.steps
        return problem.finish_run(state, budget=self.budget, weak_share=share)

    def _weak_steps(self, total: int) -> int:
        return max(1, round(self.look_ahead * total))

    def _main_steps(self, total: int) -> int:
        return total - (self.weak_models * self._weak_steps(total) if self.budget == "charged" else 0)

    def _store_origin(self, problem: Problem, state: TrainState) -> None:
        state.notes["soup"] = {"score": soups.validation_score(problem, state), "forks": []}
        problem.journal.put_artifact("soup-0", named_weights(state.model))

    def _train_fork(self, problem: Problem, state: TrainState, number: int) -> None:
        problem.reset_to_pretrained_(state)
        sparsity = self.sparsities[number % len(self.sparsities)]
        state.set_masks_(topk_masks(magnitude(state.prunable_parameters()), sparsity))

    def _look_ahead(self, problem: Problem, state: TrainState, steps: int, number: int) -> None:
        protocol = self.protocols[number % len(self.protocols)]
        rate = scaled_rate(problem.rate_schedule(steps), protocol.rate_factor(problem.seed, "weak", number))
        train(state, problem, steps, stream=("weak", number), rate=rate, label="weak", protocol=protocol)

    def _mix_fork(self, problem: Problem, state: TrainState, number: int) -> None:
        """Mix a copy into the soup with its best share."""
        fork, soup = soups.clone_weights(state.model), problem.journal.get_artifact(f"soup-{number}")
        found, sparsity = {0.0: float(state.notes["soup"]["score"])}, algebra.sparsity(state.masks)
        for share in self.shares:
            soups.load_weights_(state.model, soups.interpolate_weights(soup, fork, share))
            found[share] = soups.validation_score(problem, state)
        best = max(found, key=lambda share: found[share])  # the first of equals
        problem.journal.put_artifact(f"soup-{number + 1}", soups.interpolate_weights(soup, fork, best))
        state.notes["soup"]["score"] = found[best]
        state.notes["soup"]["forks"].append({"sparsity": sparsity, "share": best, "score": found[best]})

    def _begin_soup(self, problem: Problem, state: TrainState) -> None:
        """Load the soup at step 0, with a fresh optimizer."""
        problem.reset_to_pretrained_(state)
        soups.load_weights_(state.model, problem.journal.get_artifact(f"soup-{self.weak_models}"))

    def _finish_training(self, problem: Problem, state: TrainState, main: int) -> None:
        train(state, problem, main, rate=problem.rate_schedule(main))
