"""What pruning costs in a loop that is not ours: seconds of a step with it over those of the same loop without.

`make bench` prints it and writes benchmarks/results/attach.json. A BERT of MiniLM's size (6 blocks of
384) with random weights, 16 rows of 32 tokens, AdamW; all plans are of T = 1,000 and in the ramp of the sparsity.
With `attach`, steps of the two loops alternate in one process. With `PruningCallback`, Trainers with and without it
alternate: the time is that of steps inside `train()`, from one step's begin to that of a later one, without set-up
and end. `--only trainer` measures these alone; `--cpu`, on a machine that has other work, measures CPU seconds of one
thread.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from sparsesoup import METHODS, PruningCallback, attach
from sparsesoup.loops.pruner import Pruner
from sparsesoup.runs.results import machine_name

RESULT = Path(__file__).parent / "results" / "attach.json"
STEPS = 1_000  # T of the plan; `gradual` prunes at every tenth step of its ramp
CASES = {"masked": "magnitude", "gradual": "gradual", "platon": "platon", "movement": "movement"}
TRAINER = {"trainer-masked": "magnitude", "trainer-gradual": "gradual"}
WARM = 2  # steps of a Trainer before its clock starts; after the first one the plan goes to step FIRST
FIRST = 150  # of the plan: within the ramp of the sparsity


def now() -> float:
    """Return seconds of the wall clock; with one thread those of the CPU."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def make_loop() -> tuple[Any, Any, Callable[[], None]]:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=30522
    )
    model = BertForSequenceClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = {"input_ids": torch.randint(5, 30000, (16, 32)), "labels": torch.randint(0, 2, (16,))}

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def ratio(name: str, first: int, rounds: int, each: int) -> dict[str, float]:
    """Time blocks of steps, from step `first` of the plan on, alternately without and with pruning."""
    _, _, plain = make_loop()
    model, optimizer, pruned = make_loop()
    pruner = attach(model, optimizer, METHODS[name], 0.5, steps=STEPS)
    pruned(), plain()
    go_to(pruner, first)
    works = {True: pruned, False: plain}

    def seconds(with_pruning: bool) -> float:
        began = now()
        for _ in range(each):
            works[with_pruning]()
        return now() - began

    return alternate(seconds, rounds)


def go_to(pruner: Pruner, step: int) -> None:
    pruner.load_state_dict(pruner.state_dict() | {"facts": {"step": step, "masked": 0.0, "notes": {}}})


def alternate(seconds: Callable[[bool], float], rounds: int) -> dict[str, float]:
    """Return median and quartiles of (seconds with pruning / without), the one or the other first."""
    ratios = []
    for i in range(rounds):
        found = {pruned: seconds(pruned) for pruned in (i % 2 == 0, i % 2 == 1)}
        ratios.append(found[True] / found[False])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": middle, "low": low, "high": high}


class Clock(TrainerCallback):
    """Time `steps` steps of a Trainer's loop, then stop it."""

    def __init__(self, pruning: PruningCallback | None, steps: int) -> None:
        self.pruning, self.steps, self.began, self.seconds = pruning, steps, 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and self.pruning is not None and self.pruning.pruner is not None:
            go_to(self.pruning.pruner, FIRST)
        if state.global_step == WARM:
            self.began = now()
        elif state.global_step == WARM + self.steps:
            self.seconds = now() - self.began

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step > WARM + self.steps


def trainer_seconds(name: str, steps: int, folder: str) -> float:
    """Return the seconds of steps inside a Trainer's loop; `name` is the method of its callback, or empty."""
    model, _, _ = make_loop()
    rows = [{"input_ids": torch.randint(5, 30000, (32,)), "labels": i % 2} for i in range(512)]
    args = TrainingArguments(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=16, report_to="none", use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    pruning = PruningCallback(name, 0.5) if name else None
    clock = Clock(pruning, steps)
    callbacks = [clock] if pruning is None else [pruning, clock]
    trainer = Trainer(model, args, train_dataset=rows, callbacks=callbacks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is stopped before T
        trainer.train()
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--each", type=int, default=10, help="steps of a block: a pruning falls into each")
    parser.add_argument("--only", default="", help="cases whose names begin so; the others stay as they are")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds of one thread")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.cpu else 2)
    found: dict[str, Any] = {"command": "make bench", "machine": f"{machine_name()}, torch {torch.__version__}"}
    found = json.loads(RESULT.read_text(encoding="utf-8")) if options.only else found | {"attach": {}}
    for case, name in itertools.chain(CASES.items(), TRAINER.items()):
        if not case.startswith(options.only):
            continue
        if case in CASES:
            row = ratio(name, FIRST, options.rounds, options.each)
        else:
            with tempfile.TemporaryDirectory() as folder:
                row = alternate(partial(_with_or_without, name, options.each, folder), options.rounds)
        found["attach"][case] = row | ({"cpu": True} if options.cpu else {})
        print(case, {k: round(v, 3) for k, v in row.items()}, flush=True)
        RESULT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _with_or_without(name: str, steps: int, folder: str, pruned: bool) -> float:
    return trainer_seconds(name if pruned else "", steps, folder)


if __name__ == "__main__":
    main()
