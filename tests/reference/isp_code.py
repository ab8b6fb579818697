"""A slow twin of `isp-code`, written in plain torch from what docs/papers.md says of the released scripts."""

import copy
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import get_linear_schedule_with_warmup

from reference import slow

Rate = Callable[[int], float]


def optimizer_of(model: nn.Module, rate: float, decay: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}], rate
    )


def scores(model: nn.Module, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: model.get_parameter(name).detach().abs() for name in masks}


def gone(masks: dict[str, Tensor]) -> float:
    return 1 - sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


def best(model: nn.Module, masks: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    count = round((1 - sparsity) * sum(m.numel() for m in masks.values()))
    return slow.keep(scores(model, masks), count, within=masks)


def hold(model: nn.Module, masks: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)


def step(model: nn.Module, batch: dict[str, Tensor], optimizer: Any, masks: dict[str, Tensor], clip: float) -> None:
    cross_entropy(model(batch["x"]), batch["labels"]).backward()
    for name, mask in masks.items():
        model.get_parameter(name).grad.mul_(mask)
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
    hold(model, masks)


def batches(problem: Any, start: int, count: int, *stream: object) -> Iterator[dict[str, Tensor]]:
    """The rows in the library's own order: which rows a run sees is not what this twin is for."""
    order = problem.train.train_batches(problem.training.batch_size, start, problem.seed, *stream)
    return (problem.train.batch(indices) for indices in islice(order, count))


def run(problem: Any, sparsity: float, method: Any) -> tuple[list[dict[str, Tensor]], nn.Module]:
    """(the masks after each pruning, the model at the end). The problem's model has no dropout."""
    training, epoch, done = problem.training, problem.steps_per_epoch, 0
    model = copy.deepcopy(problem.pretrained).train()
    main, rate = optimizer_of(model, 0.0, training.weight_decay), problem.rate_schedule()
    masks = {name: torch.ones(target.shape, dtype=torch.bool) for name, target in problem.targets.items()}
    taken: list[dict[str, Tensor]] = []

    def train(count: int) -> None:
        nonlocal done
        for batch in batches(problem, done, count):
            for group in main.param_groups:
                group["lr"] = rate(done)
            step(model, batch, main, masks, training.max_grad_norm)
            done += 1

    def prune(new: dict[str, Tensor]) -> None:
        nonlocal masks
        masks = new
        taken.append(masks)
        hold(model, masks)
        for name, mask in masks.items():
            for value in (main.state[model.get_parameter(name)][key] for key in ("exp_avg", "exp_avg_sq")):
                value.mul_(mask)

    stage = 0
    while True:
        train(round(method.stage * epoch * (stage + 1 if method.growing else 1)))
        if sparsity - gone(masks) < method.near:
            break
        weak, looks = [], []
        for number in range(method.weak_masks):
            fork = copy.deepcopy(model)
            fresh = optimizer_of(fork, rate(done), training.weight_decay)
            schedule = get_linear_schedule_with_warmup(fresh, method.warmup, method.schedule)
            for batch in batches(problem, done, round(method.weak * epoch), "weak", stage, number):
                step(fork, batch, fresh, masks, training.max_grad_norm)
                schedule.step()
            weak.append(best(fork, masks, gone(masks) + method.cut * (1 - gone(masks))))
            looks.append(scores(fork, masks))
        votes = {name: torch.stack([mask[name] for mask in weak]).sum(0) for name in masks}
        merged = {name: count >= (1 if method.merge == "union" else len(weak)) for name, count in votes.items()}
        if gone(merged) > sparsity:  # what this library does where the scripts end sparser than asked
            look = {name: torch.stack([each[name] for each in looks]).sum(0) for name in masks}
            count = round((1 - sparsity) * sum(m.numel() for m in masks.values()))
            merged = slow.keep(votes, count, look, masks)
        prune(merged)
        stage += 1
    if gone(masks) < sparsity:
        prune(best(model, masks, sparsity))
    train(problem.steps - done)
    return taken, model
