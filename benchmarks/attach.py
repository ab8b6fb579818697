"""What pruning costs in a loop that is not ours: seconds of a step with `attach` over those of the same loop without.

`make bench` prints it and writes benchmarks/results/attach.json. A BERT of MiniLM's size (6 blocks of
384) with random weights, 16 rows of 32 tokens, AdamW; steps of the two loops alternate in one process.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from sparsesoup import METHODS, PruningCallback, attach
from sparsesoup.runs.results import machine_name

RESULT = Path(__file__).parent / "results" / "attach.json"
STEPS = 1_000  # T of the plan; `gradual` prunes at every tenth step of its ramp
CASES = {"masked": "magnitude", "gradual": "gradual", "platon": "platon", "movement": "movement"}
FIRST = 150  # of the plan: within the ramp of the sparsity


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
    pruner.load_state_dict(pruner.state_dict() | {"facts": {"step": first, "masked": 0.0, "notes": {}}})
    ratios = []
    for i in range(rounds):
        works = (plain, pruned) if i % 2 else (pruned, plain)
        seconds = {}
        for work in works:
            began = time.perf_counter()
            for _ in range(each):
                work()
            seconds[work] = time.perf_counter() - began
        ratios.append(seconds[pruned] / seconds[plain])
    quartiles = statistics.quantiles(ratios, n=4)
    return {"median": statistics.median(ratios), "low": quartiles[0], "high": quartiles[2]}


def trainer_seconds(callbacks: list[Any], steps: int, folder: str) -> float:
    model, _, _ = make_loop()
    rows = [{"input_ids": torch.randint(5, 30000, (32,)), "labels": i % 2} for i in range(64)]
    args = TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=16, report_to="none", use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows, callbacks=callbacks)
    began = time.perf_counter()
    trainer.train()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--each", type=int, default=10, help="steps of a block: a pruning falls into each")
    options = parser.parse_args()
    torch.set_num_threads(2)
    found: dict[str, Any] = {"command": "make bench", "machine": f"{machine_name()}, torch {torch.__version__}"}
    found["attach"] = {}
    for case, name in CASES.items():
        found["attach"][case] = ratio(name, FIRST, options.rounds, options.each)
        print(case, {k: round(v, 3) for k, v in found["attach"][case].items()}, flush=True)
    pairs = []
    for i in range(4):
        seconds = {}
        for pruned in (i % 2 == 0, i % 2 == 1):
            callbacks = [PruningCallback("gradual", 0.5)] if pruned else []
            seconds[pruned] = trainer_seconds(callbacks, 40, tempfile.mkdtemp())
        pairs.append(seconds[True] / seconds[False])
    low, middle, high = statistics.quantiles(pairs, n=4)
    found["attach"]["trainer"] = {"median": middle, "low": low, "high": high}
    print("trainer", round(statistics.median(pairs), 3))
    RESULT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
