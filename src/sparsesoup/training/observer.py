"""Observer: what sees the progress of a run, such as a bar, a log or a tracker."""

from collections.abc import Mapping
from typing import Any


class Observer:
    """Receives the progress of a run; subclass it and override what you need. It cannot change the run.

    Labels are those of the cost: main (the main training), weak, search; see the guide to cost.

    >>> class LastLoss(Observer):
    ...     def step(self, record):
    ...         if record:
    ...             self.loss = record["loss"]
    """

    def steps_left(self, steps: int) -> None:
        """Take the number of training steps that are left of the whole run, at most."""

    def begin(self, label: str, step: int, until: int) -> None:
        """Begin a training, or a pass over the validation rows, that goes from `step` to `until`."""

    def step(self, record: Mapping[str, Any]) -> None:
        """Take a step that was made.

        Args:
            record: step, label, loss, rate and sparsity; empty for a batch of a validation.
        """

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Take the scores of a validation in the middle of a training.

        Args:
            record: step, label, sparsity, and scores by name.
        """

    def end(self) -> None:
        """End the training or the pass that began last."""


class ObserverGroup(Observer):
    """Several observers as one, called in their order."""

    def __init__(self, *members: Observer) -> None:
        self.members = members

    def steps_left(self, steps: int) -> None:
        """Pass it on."""
        for member in self.members:
            member.steps_left(steps)

    def begin(self, label: str, step: int, until: int) -> None:
        """Pass it on."""
        for member in self.members:
            member.begin(label, step, until)

    def step(self, record: Mapping[str, Any]) -> None:
        """Pass it on."""
        for member in self.members:
            member.step(record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Pass it on."""
        for member in self.members:
            member.evaluation(record)

    def end(self) -> None:
        """Pass it on."""
        for member in self.members:
            member.end()
