"""Scores from the inputs of a layer, and its inputs behind blocks that are pruned already."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from torch import Tensor, nn, no_grad

from sparsesoup.core.errors import UserError
from sparsesoup.core.targets import Targets, block_of, target_parameters
from sparsesoup.methods.scores.calibration import Rows, for_each_batch, require_finite
from sparsesoup.training.batching import Batch
from sparsesoup.training.problem import Problem


def wanda_scores(problem: Problem, model: nn.Module, rows: Rows) -> dict[str, Tensor]:
    """Return |w_ij| ||x_j||_2 in the layout of each target. Wanda: Sun et al. 2024, sec. 3."""
    return weigh_by_inputs(model, problem.targets, input_norms(problem, model, rows))


def weigh_by_inputs(model: nn.Module, targets: Targets, norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return |w_ij| ||x_j||_2 from the norms of the inputs, in the layout of each target."""
    turned = {name for name, target in targets.items() if target.transposed}
    return {
        name: p.detach().abs() * (norms[name][:, None] if name in turned else norms[name])
        for name, p in target_parameters(model, targets).items()
    }


def input_norms(problem: Problem, model: nn.Module, rows: Rows) -> dict[str, Tensor]:
    """Return ||x_j||_2, the norm of each input feature over all tokens of `rows`, for each target: [in].

    Padding is excluded by the batch's `attention_mask`. Inputs that are not tokens (a pooled vector per row, DeBERTa's
    relative positions) count if a layer receives no tokens. Without a mask everything counts.

    Raises: UserError if the module of a target is not called with rows of its inputs, or a norm is not finite.
    """
    found = LayerInputs(problem, model, rows, full=False).inputs_of(problem.targets)
    return {name: squares.sqrt() for name, squares in found.items()}


def for_each_block(
    problem: Problem, model: nn.Module, rows: Rows, full: bool, work: Callable[[Targets, dict[str, Tensor]], object]
) -> None:
    """Call `work(targets, their inputs)` for each repeated block in turn, behind the blocks as it has left them.

    Args:
        full: inputs are sum x x^T [in, in]; else its diagonal [in].
    """
    passes, blocks = LayerInputs(problem, model, rows, full), dict[str, Targets]()
    for name, target in problem.targets.items():
        blocks.setdefault(block_of(name) or name, {})[name] = target
    for targets in blocks.values():
        work(targets, passes.inputs_of(targets))


class _PassEnded(Exception):
    """Ends a forward pass whose remaining part is not needed."""


class LayerInputs:
    """Forward passes of calibration batches that sum up the inputs of layers, in float32.

    If the first of several calls no module twice, the others end behind the layers that they are for.

    Args:
        rows: the calibration batches.
        full: sum x x^T; else its diagonal.
    """

    def __init__(self, problem: Problem, model: nn.Module, rows: Rows, full: bool) -> None:
        self.problem, self.model, self.rows, self.full = problem, model, rows, full
        self.modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in problem.targets}
        self.may_end: bool | None = None  # unknown before the first pass

    def inputs_of(self, targets: Targets) -> dict[str, Tensor]:
        """Return the sums over the inputs of each target, [in] or [in, in]."""
        ears = {name: _InputHook(name, t.shape, t.transposed, self.full) for name, t in targets.items()}
        most = 0

        def work(batch: Batch, share: float) -> None:
            nonlocal most
            for ear in ears.values():
                ear.mask = batch.get("attention_mask")
            with no_grad(), suppress(_PassEnded), self._listen(ears) as calls:
                self.problem.predict(self.model, batch)
            most = max([most, *calls.values()])

        for_each_batch(self.problem, self.model, self.rows, f"inputs of {next(iter(targets))}", work)
        if self.may_end is None:
            self.may_end = most == 1
        return require_finite({name: ear.total() for name, ear in ears.items()}, "the inputs' norm")

    @contextmanager
    def _listen(self, ears: Mapping[str, "_InputHook"]) -> Iterator[Counter[str]]:
        calls: Counter[str] = Counter()

        def listener(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def listen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                if name in ears:
                    ears[name](module, inputs)
                elif self.may_end and calls.keys() >= ears.keys():
                    raise _PassEnded
                calls[name] += 1

            return listen

        handles = [module.register_forward_pre_hook(listener(name)) for name, module in self.modules.items()]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()


class _InputHook:
    """Record the inputs of a module and sum their squares or products, separately for tokens and other inputs."""

    def __init__(self, name: str, shape: tuple[int, ...], transposed: bool, full: bool) -> None:
        self.name, self.sides, self.width, self.full = name, len(shape), shape[0 if transposed else -1], full
        self.mask: Tensor | None = None
        self.sums: dict[bool, Tensor] = {}

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.sides != 2 or not inputs or inputs[0].shape[-1] != self.width:
            raise self._never_called_error()
        before, vectors = inputs[0].shape[:-1], inputs[0].detach().reshape(-1, self.width).float()
        tokens = self.mask is None or before in (self.mask.shape, (self.mask.numel(),))
        if self.mask is not None and tokens and self.full:  # of one size, so that a shape has one count of FLOPs
            vectors = vectors.masked_fill(self.mask.reshape(-1, 1) == 0, 0.0)
        elif self.mask is not None and tokens:
            vectors = vectors[self.mask.reshape(-1).bool()]
        found = vectors.T @ vectors if self.full else vectors.square().sum(0)
        self.sums[tokens] = self.sums[tokens] + found if tokens in self.sums else found

    def total(self) -> Tensor:
        if not self.sums:
            raise self._never_called_error()
        return self.sums[max(self.sums)]

    def _never_called_error(self) -> UserError:
        return UserError(
            f"the inputs of {self.name} cannot be seen: its module is not called with rows of {self.width} features; "
            f"use a method that needs none, such as magnitude or snip"
        )
