"""Tiny checkpoints of random weights, a tokenizer, data sets on the disk, and the command line: nothing is mocked."""

import csv
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from processes import run_command
from sparsesoup.core.masks import Masks
from sparsesoup.core.ticket import load_masks

WORDS = [
    "good",
    "bad",
    "fine",
    "poor",
    "film",
    "book",
    "very",
    "not",
    "a",
    "the",
    "was",
    "plot",
    "cast",
    "and",
    "so",
    "dull",
    "bright",
    "warm",
    "cold",
    "empty",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, *WORDS, *"abcdefghijklmnopqrstuvwxyz"])}
COMMON: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "max_position_embeddings": 132}
SHAPE: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "type_vocab_size": 2,
}  # fmt: skip
STORAGES: dict[str, Any] = {  # as in every published checkpoint of DeBERTa v2 and v3
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "share_att_key": True,
}  # fmt: skip
CONFIGS = {
    "bert": lambda **more: transformers.BertConfig(**COMMON, **(SHAPE | more)),
    "distilbert": lambda **more: transformers.DistilBertConfig(
        **COMMON, **({"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2} | more)
    ),
    "roberta": lambda **more: transformers.RobertaConfig(**COMMON, **(SHAPE | more)),
    "deberta-v2": lambda **more: transformers.DebertaV2Config(**COMMON, **(SHAPE | STORAGES | more)),
    "electra": lambda **more: transformers.ElectraConfig(**COMMON, **(SHAPE | {"embedding_size": 8} | more)),
}
FAMILIES = tuple(CONFIGS)


def gpt2() -> Any:
    return transformers.GPT2Config(
        n_embd=16, n_layer=3, n_head=4, n_inner=24, vocab_size=64, n_positions=32, pad_token_id=0
    )


def tokenizer(pairs: bool) -> Any:
    """A fast WordPiece tokenizer of 51 pieces; `pairs` says whether the model tells two texts apart."""
    tool = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    tool.normalizer, tool.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tool.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if pairs else ["input_ids", "attention_mask"]
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tool, model_max_length=128, model_input_names=names, mask_token="[MASK]", **special
    )


def base_model(family: str, seed: int = 0, **more: Any) -> Any:
    """A model of that family without a head, its weights drawn from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModel.from_config(CONFIGS[family](**more))
        with torch.no_grad():  # 0.02, the families' own, would leave so small a model with nothing to say
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.2)
    return model


def checkpoint(folder: Path, family: str = "bert", seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A folder as a base model's authors publish it: weights without a head, and a tokenizer."""
    base_model(family, seed).to(dtype).save_pretrained(folder)
    tokenizer(family in ("bert", "deberta-v2", "electra")).save_pretrained(folder)
    return folder


def classifier(
    folder: Path,
    family: str = "bert",
    labels: Sequence[str] = ("0", "1"),
    vocabulary: dict[str, str] | None = None,
    **more: Any,
) -> Path:
    """A fine-tuned model, as far as anyone can tell."""
    checkpoint(folder, family)
    config = CONFIGS[family](id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)})
    config.update(more)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    if vocabulary:
        tool = json.loads((folder / "tokenizer.json").read_text())
        tool["model"]["vocab"] = {vocabulary.get(word, word): i for word, i in tool["model"]["vocab"].items()}
        (folder / "tokenizer.json").write_text(json.dumps(tool))
    return folder


def sentences(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Sentences, and 1 where the good words outnumber the bad."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        wanted = i % 2
        telling = ["good", "fine", "bright", "warm"] if wanted else ["bad", "poor", "dull", "cold"]
        words = draw.choices(WORDS[4:15], k=draw.randint(2, 12)) + draw.choices(telling, k=2)
        draw.shuffle(words)
        found.append((" ".join(words), wanted))
    return found


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    """A csv, tsv or jsonl file of these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
        else:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([columns, *rows])
    return path


def reviews(folder: Path, rows: int = 80) -> Path:
    """A data set of two classes: train.csv and test.csv."""
    write_rows(folder / "train.csv", ("text", "label"), sentences(rows, 1))
    write_rows(folder / "test.csv", ("text", "label"), sentences(24, 2))
    return folder


def questions(count: int, seed: int = 0, clauses: int = 3) -> list[dict[str, Any]]:
    """Questions in SQuAD's format: what was said of a thing, in a context that says something of several."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        things = draw.sample(["film", "book", "plot", "cast"], min(clauses, 4))
        said = [f"the {thing} was {draw.choice(['very ', 'so ', ''])}{draw.choice(WORDS[15:])}" for thing in things]
        number = draw.randrange(len(said))
        context, answer = " and ".join(said), said[number].split(" was ")[1]
        start = context.index(said[number]) + said[number].index(" was ") + 5
        right = {"text": [answer], "answer_start": [start]}
        found.append({"id": str(i), "context": context, "question": f"{things[number]} was", "answers": right})
    return found


def squad(folder: Path, rows: int = 40) -> Path:
    """A data set of questions: train.jsonl and validation.jsonl."""
    for split, count, seed in (("train", rows, 1), ("validation", 12, 2)):
        asked = questions(count, seed)
        write_rows(folder / f"{split}.jsonl", tuple(asked[0]), [tuple(row.values()) for row in asked])
    return folder


def offline() -> dict[str, str]:
    """The environment of a command: one thread, no Hub, modules from where this process has them."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "error"}


MAIN = "from sparsesoup.cli.main import main"


def command(*arguments: object, wrap: str = MAIN) -> list[str]:
    """The command line in a process of its own; `wrap` may set up that process first."""
    code = f"import sys\n{wrap}\nsys.exit(main())"
    return [sys.executable, "-c", code, *map(str, arguments)]


def sparsesoup(*arguments: object, cwd: Path | None = None, wrap: str = MAIN) -> subprocess.CompletedProcess[str]:
    """The command line, run to its end in a process that has its imports already."""
    return run_command([*map(str, arguments)], wrap, cwd or Path.cwd(), offline())


def sparsesoup_alone(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command line in a new interpreter, which takes seconds to import everything."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, cwd=cwd, env=offline(), check=False)


def run_of(out: Path) -> Path:
    """The one run directory below `out`."""
    (found,) = out.glob("*/*/seed-*")
    return found


def masks_of(run: Path) -> Masks:
    return load_masks(run)[0]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def older(path: Path, *lacking: str, **changes: Any) -> None:
    """Make a table what an older version wrote, without digests, or a user who took them out; some of it changed."""
    table = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in table.items() if k not in ("digest", "digests", *lacking)}))


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with its size and time, to see that none was written."""
    stats = {str(p.relative_to(folder)): p.stat() for p in sorted(folder.rglob("*"))}
    return {name: (s.st_size, s.st_mtime_ns) for name, s in stats.items()}


# Methods that save several stages on their way, with the lines of their log.
SAVED_METHODS = {
    "isp": ["--steps", "40", "--method.stages", "3", "--method.weak-masks", "2", "--method.look-ahead", "0.05"],
    "imp-rewind": ["--steps", "12", "--method.cut", "0.5", "--method.rewind", "0.25"],
}
LINES = {"isp": 40, "imp-rewind": 3 + 9 * 4}


def arguments(place, method, out):
    return ["prune", method, "--model", str(place / "bert"), "--dataset", str(place / "reviews"), "--sparsity", "0.8",
            "--train.batch-size", "8", "--train.learning-rate", "0.003", "--save-every", "0", *SAVED_METHODS[method],
            "--out", str(out)]  # fmt: skip


def costs_of(report):
    return {
        label: {k: v for k, v in cost.items() if k not in ("seconds", "shared")}
        for label, cost in report["cost"].items()
    }


def weights_equal(one, other):
    pairs = [(weights_of(one / "model"), weights_of(other / "model")), (masks_of(one), masks_of(other))]
    return all(a.keys() == b.keys() and all(a[n].equal(b[n]) for n in a) for a, b in pairs)


def without_seconds(found):
    """What two runs of a study must have in common: all but seconds and what was shared."""
    for cell in found["runs"]:
        cell.pop("seconds")
        for cost in cell["cost"].values():
            cost.pop("seconds")
            cost.pop("shared")
    return found
