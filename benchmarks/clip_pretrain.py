"""Pre-train a small CLIP from scratch: an image tower and a text tower, with captions made of class names.

    python benchmarks/clip_pretrain.py

Learns from training splits alone, without the rows that a run with the same seed holds out for validation. Killed, the
same command goes on where it was. The result is a folder that `CLIPModel` and `CLIPProcessor` of transformers load; it
is not committed. CIFAR-10 and Cars are in-domain for it: runs with other seeds validate on rows that it has seen with
their class names, no run tests on any. MNIST it has never seen.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from rich.console import Console
from tokenizers import pre_tokenizers, trainers
from torch import Tensor, nn

from sparsesoup.core.errors import UserError, cause_line
from sparsesoup.core.files import atomic_write, file_lock, write_json, write_text
from sparsesoup.core.rng import cpu_generator, derive_seed
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.hub.quiet import quiet_libraries
from sparsesoup.hub.tasks import zero_shot
from sparsesoup.hub.tasks.images import ImageTask, encode_images
from sparsesoup.hub.tasks.registry import infer_task
from sparsesoup.hub.tasks.splits import open_splits, training_splits
from sparsesoup.hub.tasks.text import padding_function
from sparsesoup.hub.tasks.zero_shot import names_of, templates_of
from sparsesoup.runs.progress import ProgressLogger
from sparsesoup.runs.results import library_versions, machine_name
from sparsesoup.training.batching import Batch, RowBatches
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.cost import Cost, CostTracker
from sparsesoup.training.loop import train
from sparsesoup.training.problem import Problem, evaluate_model

HERE = Path(__file__).parent
SHIPPED = HERE / "experiments" / "clip-pretrain.yaml"
WARMEST = 100.0  # what exp(logit scale) may be at most, Radford et al. 2021, sec. 2.5
END, BEGIN = "<|endoftext|>", "<|startoftext|>"


def contrastive(similarity: Tensor, groups: Tensor) -> Tensor:
    """The symmetric contrastive loss of Radford et al. 2021, sec. 2.3, where several captions of a batch may be right.

    With P(i) = {j: g_j = g_i}: L = 1/2b sum_i -1/|P(i)| sum_{j in P(i)} (log softmax_j S_ij + log softmax_j S_ji).
    Captions of one class say the same thing, whatever their template, so none of them is a wrong one. Where all groups
    differ it is CLIP's own loss.

    Args:
        similarity: S [b, b], images by captions, times the scale.
        groups: g [b], what image and caption of a pair are about.
    """
    same = (groups[:, None] == groups[None, :]).float()
    wanted = same / same.sum(1, keepdim=True)
    images, captions = similarity.log_softmax(1), similarity.T.log_softmax(1)
    return -(wanted * (images + captions)).sum(1).mean() / 2


def objective(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a batch; each caption goes through the text tower once, however often it is there."""
    outputs = model(**{key: batch[key] for key in ("pixel_values", "input_ids", "attention_mask")})
    captions = outputs.text_embeds.float()[batch["caption"]]
    scale = model.logit_scale.exp().clamp(max=WARMEST)
    return contrastive(scale * outputs.image_embeds.float() @ captions.T, batch["labels"])


def tokenizer_of(captions: Sequence[str], size: int, length: int) -> transformers.CLIPTokenizer:
    """A tokenizer of CLIP's kind for these captions: lower case, byte-level, each byte a token of its own at need.

    Args:
        size: tokens at most, specials included.
        length: tokens of a text at most.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    single = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    tool = transformers.CLIPTokenizer().backend_tokenizer
    tool.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=size - len(alphabet) - 2, end_of_word_suffix="</w>", initial_alphabet=alphabet,
            show_progress=False,
        ),
    )  # fmt: skip
    merges = [tuple(pair) for pair in json.loads(tool.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*single, *("".join(pair) for pair in merges), BEGIN, END])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


@dataclass(frozen=True)
class Set:
    """A dataset with what its images are called.

    Args:
        name, names: the dataset as the recipe has it, and its class names.
        templates, prompts: sentences that these go into, in captions and when the model is asked.
        train, held_out: rows of its training split; no `train` where it is only scored.
        judge: (logits, labels) -> scores.
    """

    name: str
    names: tuple[str, ...]
    templates: tuple[str, ...]
    prompts: tuple[str, ...]
    train: RowBatches | None
    held_out: RowBatches
    judge: Any


def open_set(name: str, recipe: dict[str, Any], processor: Any, data_root: str | None) -> Set:
    """A set of the recipe; its test split stays shut."""
    source = open_splits(name, data_root=data_root)
    task = infer_task(source.train_split, source.name, None, None)
    if not isinstance(task, ImageTask):
        raise UserError(f"{name} holds no images, which a CLIP is pre-trained on; name another dataset")
    train_rows, held_out = training_splits(source, task, recipe["seed"])
    rows = encode_images(train_rows, task, processor)[0] if name in recipe["datasets"] else None
    others, judge = encode_images(held_out, task, processor)
    names = names_of(None, task.labels, False, source.name)
    prompts = templates_of(None, source.name)
    return Set(name, names, tuple(dict.fromkeys([*recipe["templates"], *prompts])), prompts, rows, others, judge)


def captioned(sets: Sequence[Set], repeats: Sequence[int], tokenizer: Any) -> RowBatches:
    """The training rows of sets, each with a caption of its class in a template drawn anew at each look.

    A batch has the images, the different captions of the batch as tokens, `caption`: which of these is whose, and
    `labels`: which class of all sets it is.
    """
    first = [sum(len(s.names) for s in sets[:k]) for k in range(len(sets))]
    tokens = [
        [tokenizer(template.replace("{}", name))["input_ids"] for template in s.templates]
        for s in sets
        for name in s.names
    ]
    rows = [(k, row) for k, s in enumerate(sets) for row in [*s.train.rows] * repeats[k]]
    pad = padding_function(["input_ids"], tokenizer, left=False)

    def vary(chosen: Sequence[tuple[int, Any]], look: int) -> Batch:
        draw = cpu_generator(look, "captions")
        parts = [[row for k, row in chosen if k == number] for number in range(len(sets))]
        seen = [(k, sets[k].train.vary(part, look)) for k, part in enumerate(parts) if part]
        labels = torch.cat([batch["labels"] + first[k] for k, batch in seen])
        pixels = torch.cat([batch["pixel_values"] for _, batch in seen])
        mirrored = torch.rand(len(pixels), generator=draw) < 0.5
        pixels[mirrored] = pixels[mirrored].flip(-1)
        drawn = torch.rand(len(labels), generator=draw)
        said = [(g, int(share * len(tokens[g]))) for g, share in zip(labels.tolist(), drawn.tolist(), strict=True)]
        different = list(dict.fromkeys(said))
        caption = torch.tensor([different.index(one) for one in said])
        text = pad([(tokens[g][t],) for g, t in different])
        return {"pixel_values": pixels, **text, "caption": caption, "labels": labels}

    return RowBatches(rows, lambda chosen: vary(chosen, 0), vary=vary)


def model_of(recipe: dict[str, Any], tokenizer: Any) -> transformers.CLIPModel:
    """A CLIP of random weights, drawn from the seed."""
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
               "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    words = {**recipe["text"], **special, "vocab_size": len(tokenizer), "max_position_embeddings": recipe["length"]}
    pictures = {**recipe["vision"], "image_size": recipe["side"], "patch_size": recipe["patch"]}
    size = recipe["projection"]
    config = transformers.CLIPConfig(
        text_config={**words, "projection_dim": size}, vision_config={**pictures, "projection_dim": size},
        projection_dim=size,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(recipe["seed"], "model"))
        return transformers.CLIPModel(config)


def zero_shot_scores(problem: Problem, model: Any, tokenizer: Any, sets: Sequence[Set]) -> dict[str, dict[str, float]]:
    """What the model says to rows of the training splits that were held out, by prompts alone."""
    found = {}
    for s in sets:
        tower = zero_shot.vision_tower(model)  # on the device of the model
        head = zero_shot.zero_shot_head_of(model, tokenizer, s.names, s.prompts)
        tower.register_buffer(zero_shot.HEAD, head, persistent=False)
        asked = replace(problem, predict=zero_shot.predict_zero_shot, metric=s.judge)
        found[s.name] = evaluate_model(asked, tower, s.held_out, Cost())
    return found


def pretrain(
    recipe: dict[str, Any], out: Path, data_root: str | None, console: Console, every: float = 10.0
) -> dict[str, Any]:
    """Train, or go on with a training that was stopped, and write the checkpoint; what it came to.

    Args:
        every: seconds between saves at the least.
    """
    side = {"height": recipe["side"], "width": recipe["side"]}
    processor = transformers.CLIPImageProcessorPil(size=side, crop_size=side)
    repeats = recipe["datasets"]
    sets = [open_set(name, recipe, processor, data_root) for name in [*repeats, *recipe["transfer"]]]
    learnt = sets[: len(repeats)]
    captions = [t.replace("{}", name) for s in sets for name in s.names for t in s.templates]
    tokenizer = tokenizer_of(captions, recipe["vocabulary"], recipe["length"])
    model, watch, meter = model_of(recipe, tokenizer), ProgressLogger(out / "log.jsonl", console), CostTracker()
    data = captioned(learnt, [*repeats.values()], tokenizer)
    problem = Problem(
        pretrained=model, targets=find_prunable(model), train=data, validation=learnt[0].held_out,
        steps=recipe["steps"],
        predict=zero_shot.predict_zero_shot, criterion=lambda outputs, batch: outputs.mean(), metric=learnt[0].judge,
        objective=objective, training=TrainingConfig(**recipe["train"]), seed=recipe["seed"], meter=meter,
        observer=watch,
        checkpointer=Checkpointer(meter, out / "stages", every, position=watch.log_position, rewind=watch.rewind_log),
    )  # fmt: skip
    try:
        state = problem.start_run()
        problem.checkpointer.run_stage("pre-train", state, train, state, problem, problem.steps)
        model.load_state_dict(state.model.state_dict())
        model.to(problem.accelerator.device)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(WARMEST))
        found = {"recipe": recipe, "zero_shot": zero_shot_scores(problem, model.eval(), tokenizer, sets)}
    finally:
        watch.close()
    found |= {
        "cost": meter.to_json(),
        "machine": machine_name(problem.accelerator.device),
        "versions": library_versions(),
    }
    with quiet_libraries(), atomic_write(out / "model") as temporary:
        model.save_pretrained(temporary)
        transformers.CLIPProcessor(processor, tokenizer).save_pretrained(temporary)
    write_json(out / "pretraining.json", found)
    problem.checkpointer.close()
    return found


def read_recipe(path: Path, steps: int | None) -> dict[str, Any]:
    """What to train, and how.

    Args:
        path: of a YAML file with the keys of the shipped one.
        steps: instead of the recipe's.
    Raises: UserError if it cannot be read, or keys are missing or unknown.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {cause_line(error)}; give a recipe such as {SHIPPED}") from error
    known = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    wrong = sorted(map(str, known.keys() ^ (recipe if isinstance(recipe, dict) else {}).keys()))
    if wrong:
        raise UserError(f"{path}: key {wrong[0]!r} is missing or unknown; the keys are those of {SHIPPED}")
    try:
        TrainingConfig(**recipe["train"])
    except TypeError as error:
        keys = ", ".join(field.name for field in fields(TrainingConfig))
        raise UserError(f"{path}: `train` does not fit: {cause_line(error)}; its keys are {keys}") from error
    if steps is not None and steps < 1:
        raise UserError(f"--steps is {steps}, where at least 1 is needed")
    return {**recipe, "steps": steps or recipe["steps"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", default=SHIPPED)
    parser.add_argument("--out", type=Path, default=HERE / "scratch" / "clip-small", help="folder to write")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--data-root", help="folder of named datasets; default the variable SPARSESOUP_DATA")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save-every", type=float, default=10.0, help="seconds between saves at the least")
    parser.add_argument("--result", type=Path, help="also write what it came to here, such as in benchmarks/results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        recipe = read_recipe(options.recipe, options.steps)
        with file_lock(options.out / ".lock", wait=False):
            _check_same(options.out / "recipe.yaml", recipe)
            if not (options.out / "pretraining.json").exists():
                pretrain(recipe, options.out, options.data_root, Console(stderr=True), options.save_every)
        found = json.loads((options.out / "pretraining.json").read_text(encoding="utf-8"))
        if options.result:
            write_json(options.result, found)
    except UserError as error:
        print(f"clip_pretrain: {error}", file=sys.stderr)
        return 2
    for name, scores in found["zero_shot"].items():
        kind = "transfer" if name in recipe["transfer"] else "in-domain"
        print(f"{name} ({kind}), held-out training rows: zero-shot accuracy {scores['accuracy']:.3f}")
    print(f"model   {options.out / 'model'}")
    return 0


def _check_same(path: Path, recipe: dict[str, Any]) -> None:
    """A stopped training goes on under the same recipe only."""
    if path.exists() and yaml.safe_load(path.read_text(encoding="utf-8")) != recipe:
        raise UserError(f"{path.parent} holds a pre-training of another recipe; give another --out or remove it")
    write_text(path, yaml.safe_dump(recipe, sort_keys=False))


if __name__ == "__main__":
    sys.exit(main())
