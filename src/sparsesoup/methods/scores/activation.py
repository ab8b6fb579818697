"""Scores from the inputs of a layer."""

from torch import Tensor, nn, no_grad

from sparsesoup.core.errors import UserError
from sparsesoup.core.targets import target_parameters
from sparsesoup.methods.scores.calibration import Rows, for_each_batch, require_finite
from sparsesoup.training.batching import Batch
from sparsesoup.training.problem import Problem


def wanda_scores(problem: Problem, model: nn.Module, rows: Rows) -> dict[str, Tensor]:
    """Return |w_ij| ||x_j||_2 in the layout of each target. Wanda: Sun et al. 2024, sec. 3."""
    norms = input_norms(problem, model, rows)
    turned = {name for name, target in problem.targets.items() if target.transposed}
    return {
        name: p.detach().abs() * (norms[name][:, None] if name in turned else norms[name])
        for name, p in target_parameters(model, problem.targets).items()
    }


def input_norms(problem: Problem, model: nn.Module, rows: Rows) -> dict[str, Tensor]:
    """Return ||x_j||_2, the norm of each input feature over all tokens of `rows`, for each target: [in].

    Padding is excluded by the batch's `attention_mask`. Inputs that are not tokens (a pooled vector per row, DeBERTa's
    relative positions) count if a layer receives no tokens. Without a mask everything counts.

    Raises: UserError if the module of a target is not called with rows of its inputs, or a norm is not finite.
    """
    ears = {name: _InputNormHook(name, target.shape, target.transposed) for name, target in problem.targets.items()}

    def work(batch: Batch, share: float) -> None:
        for ear in ears.values():
            ear.mask = batch.get("attention_mask")
        with no_grad():
            problem.predict(model, batch)

    owners = [model.get_submodule(name.rpartition(".")[0]) for name in ears]
    handles = [owner.register_forward_pre_hook(ear) for owner, ear in zip(owners, ears.values(), strict=True)]
    try:
        for_each_batch(problem, model, rows, "forward", work)
    finally:
        for handle in handles:
            handle.remove()
    return require_finite({name: ear.input_norms() for name, ear in ears.items()}, "the inputs' norm")


class _InputNormHook:
    """Record the inputs of a module and sum their squares, separately for tokens and other inputs."""

    def __init__(self, name: str, shape: tuple[int, ...], transposed: bool) -> None:
        self.name, self.sides, self.width = name, len(shape), shape[0 if transposed else -1]
        self.mask: Tensor | None = None
        self.squares: dict[bool, Tensor] = {}

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.sides != 2 or not inputs or inputs[0].shape[-1] != self.width:
            raise self._never_called_error()
        before, vectors = inputs[0].shape[:-1], inputs[0].detach().reshape(-1, self.width)
        tokens = self.mask is None or before in (self.mask.shape, (self.mask.numel(),))
        if self.mask is not None and tokens:
            vectors = vectors[self.mask.reshape(-1).bool()]
        found = vectors.square().sum(0)
        self.squares[tokens] = self.squares[tokens] + found if tokens in self.squares else found

    def input_norms(self) -> Tensor:
        if not self.squares:
            raise self._never_called_error()
        return self.squares[max(self.squares)].sqrt()

    def _never_called_error(self) -> UserError:
        return UserError(
            f"wanda cannot see the inputs of {self.name}: its module is not called with rows of {self.width} features; "
            f"take magnitude or snip for this model"
        )
