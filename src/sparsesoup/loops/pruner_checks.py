"""Checks of a pruner: of a state that is to be loaded, and of the sparsity at the end."""

import warnings
from collections.abc import Mapping
from typing import Any

from sparsesoup.core.errors import UserError
from sparsesoup.core.targets import Targets

STATE = {"plan", "position", "facts", "costs", "tensors"}  # the keys of a pruner's state_dict
NEAR = 0.02  # deviation from the target sparsity that is worth a warning


def check_state(saved: Any, plan: str, targets: Targets) -> None:
    """Raise a UserError if a state is none of a pruner, or of another method, T, sparsity or model."""
    if not isinstance(saved, Mapping) or not saved.keys() >= STATE:
        raise UserError("this is no state of a pruner; give what pruner.state_dict() returned")
    if saved["plan"] != plan:
        raise UserError(f"this state is of {saved['plan']}, and the pruner of {plan}; attach as before")
    there = {name: tuple(t.shape) for name, t in saved["tensors"].items() if name.startswith("masks/")}
    own = {f"masks/{name}": target.shape for name, target in targets.items()}
    if there != own:
        other = min(name for name, _ in there.items() ^ own.items()).removeprefix("masks/")
        raise UserError(f"this state is of another model, which differs in {other}; load that, and attach as before")


def warn_of_missed_sparsity(pruner: str, reached: float, target: float) -> None:
    """Warn if the masks at the end of T steps miss the target sparsity."""
    if abs(reached - target) > NEAR:
        warnings.warn(
            f"{pruner} ended at sparsity {reached:.3f}: its plan has not reached {target:g} by then, or this is the "
            f"nearest whole number of groups; set more steps, or smaller groups",
            stacklevel=3,
        )
