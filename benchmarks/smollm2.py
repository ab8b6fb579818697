"""SmolLM2-135M, pruned once without training and during a fine-tuning by TRL's SFTTrainer: perplexity of held-out text.

    python benchmarks/smollm2.py --model FOLDER

FOLDER holds SmolLM2-135M-Instruct as `save_pretrained` writes it; `--gguf FILE` reads such a file in FOLDER instead
(its values are of 4 bits, read back as float32). The text is prose of Python's own reference, `pydoc_data.topics`:
paragraphs without code, each once, whole topics for training and calibration or held out. What stands in the result
for the same settings is not measured again, so a stopped command goes on.
"""

import argparse
import hashlib
import json
import math
import platform
import random
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsesoup import prune, prune_once
from sparsesoup.core.files import write_json
from sparsesoup.core.masks import sparsity as sparsity_of
from sparsesoup.runs.results import machine_name

RESULT = Path(__file__).parent / "results" / "smollm2.json"
ONCE = [(method, sparsity) for sparsity in (0.5, "2:4") for method in ("magnitude", "wanda", "sparsegpt")]
TUNED = ("gradual", "isp", "dense")
HELD_OUT = 0.4  # of the topics
EVALUATED, CALIBRATED = (32, 256), (16, 256)  # rows, tokens
ROW, ROWS, RATE = 128, 4, 1e-4  # tokens of a training row, rows of a step, peak learning rate; none of them tuned


def paragraphs() -> tuple[list[str], list[str]]:
    """Return the prose for training and the held-out prose."""
    names, seen = sorted(topics), set[str]()
    random.Random(0).shuffle(names)
    parts: list[list[str]] = [[], []]
    for i, name in enumerate(names):
        for paragraph in topics[name].split("\n\n"):
            text = " ".join(paragraph.split())
            prose = not paragraph.startswith((" ", "\n ")) and "::=" not in text and len(text) > 120
            if prose and text not in seen:
                seen.add(text)
                parts[i < HELD_OUT * len(names)].append(text)
    return parts[0], parts[1]


def rows_of(texts: list[str], tokenizer: Any, count: int, tokens: int) -> list[list[int]]:
    """Return texts, one behind the other, as rows of so many tokens."""
    ids = tokenizer("\n\n".join(texts))["input_ids"]
    rows = [ids[i : i + tokens] for i in range(0, len(ids) - tokens + 1, tokens)]
    return rows[:count]


@torch.no_grad()
def losses(model: Any, rows: list[list[int]]) -> list[float]:
    """Return the mean negative log-likelihood of a token, row by row."""
    model.eval()
    batches = [torch.tensor([row]) for row in rows]
    return [float(model(input_ids=ids, labels=ids).loss) for ids in batches]


class Bench:
    """The models, the text and the result file of a command."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.gguf = options, {"gguf_file": options.gguf} if options.gguf else {}
        self.commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
        self.tokenizer = AutoTokenizer.from_pretrained(options.model, **self.gguf)
        self.train, held_out = paragraphs()
        self.held_out = rows_of(held_out, self.tokenizer, *EVALUATED)
        text = "".join([*self.train, "\0", *held_out])
        settings = {
            "steps": options.steps, "python": platform.python_version(), "evaluated": EVALUATED,
            "calibrated": CALIBRATED, "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "training_row": ROW, "rows_of_a_step": ROWS, "learning_rate": RATE,
        }  # fmt: skip
        self.found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
        if self.found.get("settings") != json.loads(json.dumps(settings)):
            self.found = {
                "command": f"python benchmarks/smollm2.py --steps {options.steps}",
                "machine": f"{machine_name()}, torch {torch.__version__}",
                "settings": settings, "perplexity": {},
            }  # fmt: skip

    def model(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.options.model, dtype=torch.float32, **self.gguf)
        model.config.use_cache = False
        return model

    def measure(self, name: str, work: Callable[[Any], tuple[Any, dict[str, Any]]]) -> None:
        """Measure a model that `work` returns, with facts of it, unless it was measured."""
        if name in self.found["perplexity"] or not name.startswith((self.options.only, "dense")):
            return
        began, cpu = time.perf_counter(), time.process_time()
        model, facts = work(self.model())
        facts |= {"seconds": round(time.perf_counter() - began, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
        rows = losses(model, self.held_out)
        facts["commit"] = self.commit
        entry = {"perplexity": math.exp(sum(rows) / len(rows)), **facts, "losses": [round(loss, 5) for loss in rows]}
        self.found["perplexity"][name] = entry
        write_json(self.options.out, self.found)
        print(name, round(entry["perplexity"], 2), facts, flush=True)

    def once(self, method: Any, sparsity: Any) -> Callable[[Any], tuple[Any, dict[str, Any]]]:
        """Return the work of pruning without training."""

        def work(model: Any) -> tuple[Any, dict[str, Any]]:
            rows = rows_of(self.train, self.tokenizer, *CALIBRATED)
            batches = [{"input_ids": torch.tensor([row])} for row in rows]
            masks = prune_once(model, batches, method, sparsity, forward=_without_head)
            return model, {"sparsity": sparsity_of(masks)}

        return work

    def tuned(self, method: str) -> Callable[[Any], tuple[Any, dict[str, Any]]]:
        """Return the work of a fine-tuning through SFTTrainer, whose loop is ours."""
        from trl import SFTConfig, SFTTrainer

        def work(model: Any) -> tuple[Any, dict[str, Any]]:
            rows = [{"input_ids": row} for row in rows_of(self.train, self.tokenizer, 10**9, ROW)]
            arguments = SFTConfig(
                output_dir=tempfile.mkdtemp(), max_steps=self.options.steps, per_device_train_batch_size=ROWS,
                learning_rate=RATE, warmup_steps=0.1, max_length=ROW, report_to="none", use_cpu=True, bf16=False,
                gradient_checkpointing=False, seed=0,
            )  # fmt: skip
            data, few = Dataset.from_list(rows), Dataset.from_list(rows[:ROWS])
            trainer = SFTTrainer(
                model, arguments, train_dataset=data, eval_dataset=few, processing_class=self.tokenizer
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # arguments of TRL's defaults that our loop does not honour
                pruned = prune(method, trainer=trainer, sparsity=None if method == "dense" else 0.5)
            facts = {"sparsity": sparsity_of(pruned.masks), "cost": pruned.cost, "training_rows": len(rows)}
            return pruned.model, facts

        return work


def _without_head(model: Any, batch: dict[str, Tensor]) -> None:
    model.model(**batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", default="", help="rows whose names begin so: once, sft")
    parser.add_argument("--out", type=Path, default=RESULT)
    bench = Bench(parser.parse_args())
    bench.measure("dense", lambda model: (model, {"sparsity": 0.0}))
    for method, sparsity in ONCE:
        bench.measure(f"once-{method}-{sparsity}", bench.once(method, sparsity))
    for method in TUNED:
        bench.measure(f"sft-{method}", bench.tuned(method))


if __name__ == "__main__":
    main()
