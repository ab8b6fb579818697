"""Host work of a training step beside a bare loop: BERT of 72 matrices, so narrow that arithmetic is free."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from sparsesoup.core.masking import topk_masks
from sparsesoup.core.rng import cpu_generator
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.methods.movement import MovementPruning
from sparsesoup.methods.scores import magnitude
from sparsesoup.methods.soft_movement_and_l0 import HardConcreteL0
from sparsesoup.training.batching import Batch, RowBatches
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.loop import train
from sparsesoup.training.problem import Problem, to_device

STEPS = 40  # the start of a training is spread over these
BOUNDS = {"dense": 0.5, "masked": 1.0, "movement": 8.0, "l0": 8.0}  # milliseconds beside a bare loop's step


def narrow_bert() -> Problem:
    """Return the problem: 12 layers of width 32, rows of 16 tokens."""
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=12, num_attention_heads=2
    )
    return bert_problem(config, 16, TrainingConfig(batch_size=8))


def bert_problem(config: transformers.BertConfig, tokens: int, training: TrainingConfig) -> Problem:
    """Return the problem of a BERT of random weights, with rows of random words."""
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    rows = torch.randint(5, 64, (512, tokens), generator=cpu_generator(0, "rows"))

    def collate(chosen: Any) -> Batch:
        ids = torch.stack(list(chosen))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}

    data = RowBatches(list(rows), collate, (tokens,) * len(rows))
    return Problem(
        pretrained=model,
        targets=find_prunable(model),
        train=data,
        validation=data,
        predict=lambda model, batch: model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
        criterion=lambda logits, batch: torch.nn.functional.cross_entropy(logits, batch["labels"]),
        metric=lambda logits, labels: {"accuracy": float((logits.argmax(1) == labels).float().mean())},
        steps=1000,
        training=training,
    )


def plain_loop(problem: Problem, model: Any, optimizer: Any, steps: int, start: int = 0) -> None:
    """A bare dense loop without anything of ours: what a masked step is compared with."""
    model.train()
    batches = problem.train.train_batches(problem.training.batch_size, start, problem.seed)
    for _ in range(steps):
        batch = to_device(problem.train.batch(next(batches)), problem.accelerator.device)
        loss = problem.training_loss(model, batch)
        loss.backward()
        float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), problem.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def host_work(rounds: int) -> dict[str, Any]:
    """Milliseconds of CPU that a step takes beside that of a bare loop: median over rounds, run alternately."""
    problem = narrow_bert()
    bare = problem.start_run()
    works = {name: _loop_of(name, problem) for name in BOUNDS}
    taken: dict[str, list[float]] = {name: [] for name in ["bare", *works]}
    for number in range(rounds + 1):
        for name, work in {"bare": lambda: plain_loop(problem, bare.model, bare.optimizer, STEPS), **works}.items():
            began = time.process_time()
            work()
            if number:  # the first round warms up
                taken[name].append(1e3 * (time.process_time() - began) / STEPS)
    plain = statistics.median(taken["bare"])
    more = {
        name: {
            "milliseconds": statistics.median(a - b for a, b in zip(taken[name], taken["bare"], strict=True)),
            "bound": bound,
        }
        for name, bound in BOUNDS.items()
    }
    return {"bare_milliseconds": plain, "matrices": len(problem.targets), "more": more}


def _loop_of(name: str, problem: Problem) -> Callable[[], None]:
    method = {"movement": MovementPruning(), "l0": HardConcreteL0()}.get(name)
    run = None if method is None else method.start_run(problem, 0.9)
    state = problem.start_run() if run is None else run.state
    ramp = problem.steps // 3
    if name == "masked":
        state.set_masks_(topk_masks(magnitude(state.prunable_parameters()), 0.9))
    if run is not None:
        state.step = ramp
        run.own.hook(state)

    def work() -> None:
        state.step = ramp
        hooks = [] if run is None else [run.own.hook]
        penalty = None if run is None else run.own.penalty
        train(state, problem, STEPS, rate=lambda step: 1e-5, hooks=hooks, penalty=penalty)

    return work
