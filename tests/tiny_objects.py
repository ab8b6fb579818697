"""Models, rows and Trainers in memory, as users of objects have them."""

from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from tiny_hub import CONFIGS, sentences, tokenizer

STEPS = 20


class Rows(torch.utils.data.Dataset[Any]):
    """A small classification set."""

    def __init__(self, count: int, seed: int) -> None:
        texts, self.labels = zip(*sentences(count, seed), strict=True)
        self.table = tokenizer(pairs=True)(list(texts), padding="max_length", max_length=24, truncation=True)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**{k: v[i] for k, v in self.table.items()}, "labels": self.labels[i]}


ROWS = Rows(64, 1)


class OwnLoss(Trainer):
    """A subclass whose loss is its own, as many users have one."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = functional.cross_entropy(outputs.logits, labels, label_smoothing=0.2)
        return (loss, outputs) if return_outputs else loss


def classifier() -> Any:
    """A tiny BERT of random weights, the same each time."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(CONFIGS["bert"]())


def trainer_of(folder: Path, callbacks: list[Any], kind: type[Trainer] = Trainer, **changes: Any) -> Trainer:
    given = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 0.005,
        "gradient_accumulation_steps": 2, "save_steps": 8, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "seed": 0, "logging_strategy": "no", "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = TrainingArguments(**(given | changes))
    return kind(classifier(), arguments, train_dataset=ROWS, eval_dataset=ROWS, callbacks=callbacks)


def model_of(kind: Any = AutoModelForSequenceClassification, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = CONFIGS["bert"]()
    for name, value in changes.items():
        setattr(config, name, value)
    return kind.from_config(config)


def texts(count: int, seed: int) -> datasets.Dataset:
    words, labels = zip(*sentences(count, seed), strict=True)
    table = tokenizer(pairs=True)(list(words), padding="max_length", max_length=24, truncation=True)
    return datasets.Dataset.from_dict({**dict(table), "labels": list(labels)})


TRAIN, VALIDATION = texts(64, 1), texts(24, 2)


def accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}
