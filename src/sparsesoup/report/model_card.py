"""The model card for the Hub: description, scores, cost, usage and provenance."""

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sparsesoup.core.low_rank import low_rank_of
from sparsesoup.hub.models.checkpoint import EMBEDDED
from sparsesoup.hub.models.loading import OWN
from sparsesoup.hub.tasks.metrics import GLUE
from sparsesoup.hub.tasks.splits import SHORT
from sparsesoup.methods import TABLE
from sparsesoup.report import format as words
from sparsesoup.report import terminal as show
from sparsesoup.report.escaping import (
    command_line,
    escape_markdown,
    fenced_code,
    markdown_code,
    markdown_prose,
    printable_line,
)
from sparsesoup.training.cost import LABELS, label_name

TEMPLATE = "card.md.j2"
BASE = {EMBEDDED: "sentence-transformers/all-MiniLM-L6-v2"}  # the model that the embedded package is a copy of
PIPELINES = {
    "ForSequenceClassification": "text-classification", "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification", "ForMaskedLM": "fill-mask",
}  # fmt: skip
METRICS = {"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr", "macro_f1": "f1"}
SIZES = {"weights": "bytes on the disk", "parameters": "parameters", "nonzero": "of these not zero"}
NAMES = {"model": "base model", "method": "method", "dataset": "dataset", "task": "task", "seed": "seed"}
SEEN = "model(pixel_values=pixels).image_embeds"  # of a vision tower in torch
Facts = Mapping[str, Any]


def render_model_card(facts: Facts, form: Facts, config: Facts, repo: str, license: str) -> str:
    """Return the text of README.md, metadata first.

    Args:
        facts: report.json or ticket.json; contains nothing specific to this machine.
        form, config: export.json and config.json; empty where there is none.
        repo, license: the model's name on the Hub, and its license as the Hub names it.
    """
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_template_value)
    environment.filters |= {"flop": words.format_count, "duration": words.format_duration, "label": label_name}
    template = (resources.files("sparsesoup.report") / TEMPLATE).read_text(encoding="utf-8")
    body = environment.from_string(template).render(_template_values(facts, form, config, repo))
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    head = card_metadata(facts, form, config, repo, license).to_yaml()
    return str(ModelCard(f"---\n{head}\n---\n\n{body}\n"))  # parses the metadata again


def _template_value(value: Any) -> str:
    """Return a value for the template: names are escaped; only marked text is taken as Markdown."""
    return value if isinstance(value, Markup) else escape_markdown(str(value))


def card_metadata(facts: Facts, form: Facts, config: Facts, repo: str, license: str) -> ModelCardData:
    """Return the metadata for the Hub: base model, and scores on the test split if it has been scored."""
    name, (dataset, part) = _architecture_name(config), hub_dataset(facts)
    task = next((task for ending, task in PIPELINES.items() if name.endswith(ending)), None)
    called = printable_line(str(facts.get("dataset")))
    metrics = {name: METRICS.get(name, printable_line(name)) for name in show.flatten_scores(facts.get("validation"))}
    base, stock = base_model(facts), _class_module(config) == "transformers" and _by_class(form) and (form or config)
    results = [
        EvalResult(
            task_type=task or "other", dataset_type=dataset or called, dataset_config=part, dataset_name=called,
            dataset_split=printable_line(split), metric_type=METRICS.get(name, printable_line(name)),
            metric_name=printable_line(name), metric_value=value,
        )
        for split, table in _by_split(facts).items()
        for name, value in table.items()
    ]  # fmt: skip
    names = ["sparsesoup", facts.get("method", "unknown"), *([form["to"]] if form.get("to") else [])]
    kind = "low-rank" if low_rank_of(facts) else "sparsity"
    tags = [*([kind, "pruned"] if _is_pruned(facts) else []), *(printable_line(str(name)) for name in names)]
    more: dict[str, Any] = {"base_model_relation": "finetune"} if base else {}
    return ModelCardData(
        base_model=base, datasets=[dataset] if dataset else None, metrics=sorted({*metrics.values()}) or None,
        eval_results=results or None,
        model_name=repo.rpartition("/")[2] if results else None, library_name="transformers" if stock else "sparsesoup",
        license=printable_line(license), pipeline_tag=task, tags=tags, **more,
    )  # fmt: skip


def base_model(facts: Facts) -> str | None:
    """Return the base model's name on the Hub; None for a local one."""
    name = str(facts.get("model", ""))
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return BASE.get(name) or (None if Path(name).exists() or name in facts.get("local", []) else name)


def hub_dataset(facts: Facts) -> tuple[str | None, str | None]:
    """Return (name on the Hub, configuration) of the dataset; None for a local one, as any without an owner may be."""
    name, settings = str(facts.get("dataset", "")), facts.get("settings", {})
    dataset, _, part = str(settings.get("dataset", "")).partition(":")
    part = part or str(settings.get("dataset_config") or "")
    if _is_glue(name):
        return "nyu-mll/glue", name.removeprefix("glue/")
    if dataset in SHORT:
        return SHORT[dataset], part or None
    known = (
        re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) and not Path(dataset).exists() and name not in facts.get("local", [])
    )
    return (dataset, part or None) if known else (None, None)


def _by_split(facts: Facts) -> dict[str, Facts]:
    """Return the dataset's name of each split -> scores on its rows, used here as the test split."""
    test: Facts = facts.get("test") or {}
    parts = test if any(isinstance(table, Mapping) for table in test.values()) else {"": test}
    called = facts.get("test_splits") or {}
    own = "validation" if _is_glue(str(facts.get("dataset", ""))) else "test"  # for a run that does not record it
    return {called.get(part or "test", f"{own}_{part}" if part else own): table for part, table in parts.items()}


def _is_glue(name: str) -> bool:
    return name.startswith("glue/") and name.removeprefix("glue/") in GLUE


def _template_values(facts: Facts, form: Facts, config: Facts, repo: str) -> dict[str, Any]:
    validation, test = (show.flatten_scores(facts.get(split)) for split in ("validation", "test"))
    labels = [label for label, _ in show.ordered_costs(facts)] if facts.get("cost") else []
    alone, to = ("stock shapes", " --to low-rank") if low_rank_of(facts) else ("zeros alone", "")
    notes = form.get("notes") or [f"{alone} make a model neither smaller nor faster: `sparsesoup export{to}` does"]
    return {
        "name": repo.rpartition("/")[2], "opening": _opening_sentence(facts, form), "rows": _fact_rows(facts),
        "scores": [(name, *("" if v is None else f"{v:.4f}" for v in (validation.get(name), test.get(name))))
                   for name in {**validation, **test}],
        "objects": ", ".join(map(str, (facts.get("settings") or {}).get("objects", []))),
        "scored": bool(test), "form": form, "low_rank": low_rank_of(facts),
        "stray_masks": bool(form) and "origin" not in facts,
        "no_masks": bool(form) and not any(str(n).endswith("masks.safetensors") for n in form.get("files", [])),
        "degenerate": (facts.get("notes") or {}).get("degenerate", []),
        "costs": show.ordered_costs(facts) if labels else [],
        "times": show.times_dense(facts) if labels and "steps" in facts else None,
        "labels": [LABELS[label] for label in labels if label in LABELS],
        "load": fenced_code(_loading_code(form, config, repo) + _head_code(form, config, repo), "python"),
        "notes": [Markup(markdown_prose(str(note))) for note in notes],
        "sizes": [(SIZES[k], *(f"{n:,}" for n in pair)) for k, pair in form.get("sizes", {}).items() if k in SIZES],
        "command": fenced_code(command_line(facts["command"]), "sh") if facts.get("command") else "",
        "local": Markup(" and ".join(markdown_code(str(name)) for name in facts.get("local", []))),
        "versions": ", ".join(f"{name} {number}" for name, number in facts.get("versions", {}).items()),
    }  # fmt: skip


def _opening_sentence(facts: Facts, form: Facts) -> Markup:
    name, row = str(facts.get("method", "an unknown method")), TABLE.get(str(facts.get("method")))
    source = f" ({row.summary}; {row.source})" if row and row.source else ""
    method = f"**{escape_markdown(name)}**{escape_markdown(source)}"
    base, dataset = markdown_code(str(facts.get("model", "a model"))), facts.get("dataset")
    done = _describe_training(facts, row.family if row else "", method, markdown_code(str(dataset)) if dataset else "")
    shape = f" This is its {markdown_code(str(form['to']))} export." if form else ""
    return Markup(f"{base}, {done}.{shape}")


def _describe_training(facts: Facts, family: str, method: str, rows: str) -> str:
    """Return what was done to the base model: pruned or not, trained or not, and which came first."""
    on = f" on {rows}" if rows else ""
    if facts.get("steps") == 0:
        data = f" with rows of {rows}" if rows else ""
        return f"pruned by {method}{data}, without training" if _is_pruned(facts) else f"unchanged by {method}"
    if low_rank_of(facts) is not None:
        return f"reduced to low rank by {method} and fine-tuned{on}"
    if not _is_pruned(facts):
        return f"fine-tuned by {method}{on}"
    if family in ("one-shot", "given") or facts.get("method") == "random":
        return f"pruned by {method}, then fine-tuned{on}"
    return f"pruned by {method} {'over several trainings' if family == 'iterative' else 'while it was fine-tuned'}{on}"


def _is_pruned(facts: Facts) -> bool:
    return low_rank_of(facts) is not None or (facts.get("sparsity") or {}).get("reached") != 0


def _fact_rows(facts: Facts) -> list[tuple[str, str]]:
    values = {**facts, "model": base_model(facts) or facts.get("model")}
    found = [(name, str(values[key])) for key, name in NAMES.items() if values.get(key) is not None]
    if low := low_rank_of(facts):
        found += [
            ("compression by rank", f"{low['compression']:g}"),
            ("weights left by rank", f"{low['left']:,} of {low['weights']:,} prunable"),
        ]
    elif share := facts.get("sparsity"):
        target = words.format_percent(share["target"]) if share["target"] is not None else "none"
        found += [("target sparsity", target), ("sparsity reached", words.format_percent(share["reached"])),
                  ("weights kept", f"{share['kept']:,} of {share['total']:,} prunable")]  # fmt: skip
    return found


def _architecture_name(config: Facts) -> str:
    name = str((config.get("architectures") or [""])[0])
    return name if name.isidentifier() else ""  # it is used in a line of Python


def _class_module(config: Facts) -> str:
    """Return the module of the model's class."""
    own = OWN.get(_architecture_name(config))
    return own.__module__ if own else "transformers"


def _by_class(form: Facts) -> bool:
    """Return True if a run or an export is loaded by its class's from_pretrained."""
    return not form or ".from_pretrained(" in str(form.get("load"))


def _loading_code(form: Facts, config: Facts, repo: str) -> str:
    line = str(form.get("load", ""))
    if not form and not config:  # a run of a module that is none of transformers'
        fetch = ["from huggingface_hub import hf_hub_download", "from safetensors.torch import load_model", ""]
        return "\n".join([*fetch, f'load_model(model, hf_hub_download("{repo}", "model.safetensors"))'])
    if _by_class(form):
        name = _architecture_name(config) or "AutoModel"
        return f'from {_class_module(config)} import {name}\n\nmodel = {name}.from_pretrained("{repo}")'
    if form.get("example"):  # a format that needs neither torch nor sparsesoup
        fetch = ["import os", "", "from huggingface_hub import snapshot_download", ""]
        return "\n".join([*fetch, f'os.chdir(snapshot_download("{repo}"))', *form["example"]])
    first = "import sparsesoup\n" if line.startswith("sparsesoup.") else ""
    line = f"model = {line}" if first else line
    return f'{first}from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{repo}")\n{line}'


def _head_code(form: Facts, config: Facts, repo: str) -> str:
    """Return the code that makes a CLIP vision tower the classifier that was scored."""
    if config.get("architectures") != ["CLIPVisionModelWithProjection"]:
        return ""
    graph = bool(form.get("example"))  # the session has run by then; its first output is the embeddings
    first, seen = "import torch\n" * graph, "torch.from_numpy(answers[0])" if graph else SEEN
    return f"""

# Classes are those of pruning/zero_shot.json, in its order; their frozen head is in the same folder.
{first}from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch.nn.functional import normalize

head = load_file(hf_hub_download("{repo}", "pruning/zero_shot.safetensors"))["head"]
logits = normalize({seen}, dim=-1) @ head.T"""
