"""RunSize: T, the length of an epoch, and whether a schedule fits them."""

from collections.abc import Callable
from dataclasses import dataclass, field

from sparsesoup.core.errors import UserError
from sparsesoup.core.schedules import LinearWarmupDecay, min_feasible_steps
from sparsesoup.training.config import TrainingConfig


@dataclass(frozen=True)
class RunSize:
    """The quantities that a schedule depends on.

    Args:
        steps: T, the steps of one normal fine-tuning.
        steps_per_epoch: steps of one pass over the training rows.
        training: training settings.
        seed: seed of all random choices.
    """

    steps: int
    steps_per_epoch: int = 1
    training: TrainingConfig = field(default_factory=TrainingConfig)
    seed: int = 0

    def rate_schedule(self, total: int | None = None) -> LinearWarmupDecay:
        """Return the learning rate schedule for `total` steps (default T): warm-up, then linear decay to 0."""
        total = self.steps if total is None else total
        return LinearWarmupDecay(self.training.learning_rate, round(self.training.warmup_ratio * total), total)

    def require_steps(self, least: int, why: str) -> None:
        """Raise a UserError if T is less than a method's schedule needs."""
        if self.steps < least:
            raise UserError(f"{self.steps} steps are too few: {why} needs at least {least}; raise --steps or --epochs")

    def require_fit(self, fits: Callable[[int], object], why: str) -> None:
        """Raise a UserError if a method's schedule does not fit T; the message says from which T on it does."""
        if not fits(self.steps):
            least = min_feasible_steps(fits, self.steps)
            if least is None:
                raise UserError(f"no number of steps is enough for {why}; choose less extreme settings")
            self.require_steps(least, why)
