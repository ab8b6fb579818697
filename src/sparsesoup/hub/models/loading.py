"""Load pre-trained models from the Hub, a folder or the embedded package; save pruned ones."""

import contextlib
import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import PIL.Image
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsesoup.core.errors import UserError
from sparsesoup.core.low_rank import split_layers_
from sparsesoup.core.masks import Masks
from sparsesoup.core.rng import derive_seed, fork_rng_of, seed_everything
from sparsesoup.core.ticket import match_parameter_names
from sparsesoup.hub.models.checkpoint import (
    WEIGHTS,
    adapter_notes,
    config_of,
    from_pretrained_arguments,
    load_reader,
    read_config,
    wrap_load_errors,
)
from sparsesoup.hub.models.cut_layers import NARROW, Widths, resize_layers_
from sparsesoup.hub.models.layer_layouts import FAMILIES
from sparsesoup.hub.models.open_clip import OpenClipForImageClassification
from sparsesoup.hub.models.weights import (
    REMEDY,
    LoadingNotes,
    check_weights,
    load_weights,
    match_rows_,
    may_be_new,
    randomly_drawn_head,
    unused_weights,
)
from sparsesoup.hub.quiet import quiet_libraries
from sparsesoup.hub.tasks.labels import TextTask
from sparsesoup.hub.tasks.registry import AnyTask, TaskType, task_type_of
from sparsesoup.training.device import current_device

LOW_RANK = "low_rank_config"  # config key of the ranks of split layers, by their names
OWN = {kind.__name__: kind for kind in (OpenClipForImageClassification,)}  # classes missing from transformers
COMPACT = "compact_config"  # config key of the widths of each layer
PLAIN_FORMAT, NARROW_FORMAT = 1, 2  # its formats: heads and units alone, or with what is narrower than they say


def load_model(
    model: str,
    task: AnyTask,
    seed: int,
    remote_code: bool = False,
    whole: bool = False,
    account: LoadingNotes | None = None,
    fixed: Mapping[str, Any] = MappingProxyType({}),
) -> PreTrainedModel:
    """Load a model with the head for a task, in float32; a new head is initialised from the seed.

    Only safetensors are read; code from the checkpoint runs only with `remote_code`.

    Args:
        whole: allow no new weights, as for a teacher or a run's own model.
        account: collects new weights and notes for the user.
        fixed: settings that override config.json.
    """
    options, kind = from_pretrained_arguments(model, remote_code), task_type_of(task)
    account = account or LoadingNotes()
    account.notes += adapter_notes(model)
    if kind.load is not None:
        with wrap_load_errors(model):
            return kind.load(options, task)
    own, config = read_config(options, model), read_config(options, model, **kind.settings(task))
    for each in (config, config.get_text_config()):  # a head looks up the padding token in the latter
        each.update(fixed)
    with wrap_load_errors(model), fork_rng_of(()):
        seed_everything(derive_seed(seed, "head"))
        # transformers 5 would keep the bf16 of a checkpoint: fine-tuning needs float32.
        head = kind.head
        if hasattr(config, COMPACT) or hasattr(config, LOW_RANK):
            with torch.device("meta"):
                head = type(head.from_config(config))
        loaded, lacking, left = _load_widths(head, model, options, config, torch.float32)
    with wrap_load_errors(model), tempfile.TemporaryDirectory() as folder:
        loaded.config.save_pretrained(folder)  # fail now if the config cannot be saved, not after the training
    if whole and lacking:
        raise UserError(
            f"model {model!r} is not fine-tuned for this task ({min(lacking)} {lacking[min(lacking)]} in its weights)"
        )
    allowed = may_be_new(loaded)
    if lacking.keys() - allowed:
        with contextlib.suppress(Exception):  # if the model cannot run, treat all weights as used
            allowed |= unused_weights(loaded, _probe_inputs(model, kind, remote_code))
    account.note_weights(model, seed, lacking, check_weights(model, loaded, lacking, left, allowed))
    if isinstance(task, TextTask) and task.labels and not lacking.keys() & {*randomly_drawn_head(loaded)}:
        with wrap_load_errors(model):
            counted = [f"LABEL_{i}" for i in range(len(task.labels))]  # the default names in config.json
            names = [*map(str, own.id2label.values())] if own.num_labels == len(counted) else counted
            note = match_rows_(model, loaded, names, task.labels, lambda: _probe_inputs(model, kind, remote_code))
            account.notes += [note] if note else []
    return loaded


def _probe_inputs(model: str, kind: TaskType, remote_code: bool) -> dict[str, Tensor]:
    """Return one row of model inputs, from a blank image or a few words."""
    reader = load_reader(model, kind.images, remote_code)
    if kind.images:
        return dict(reader(images=PIL.Image.new("RGB", (64, 64)), return_tensors="pt"))
    return dict(reader("what is it", "it is a row", return_tensors="pt"))


def meta_model(model: str, task: AnyTask, remote_code: bool = False) -> PreTrainedModel:
    """Return a model with the head for a task on the meta device, without weights."""
    kind = task_type_of(task)
    config = config_of(model, remote_code, **kind.settings(task))
    with wrap_load_errors(model), torch.device("meta"):
        return kind.head.from_config(config, trust_remote_code=remote_code)


def load_as_saved(
    model: str, state: Mapping[str, Tensor] | None = None, account: LoadingNotes | None = None
) -> PreTrainedModel:
    """Load a model in the class, precision and widths of its checkpoint, without adding a head.

    Args:
        state: weights named as in the files, to use instead of the folder's.
        account: for a published model, collects new weights of its head or pooler and weights left out. By default
            config.json and weights must match, so there are none.
    """
    options = from_pretrained_arguments(model, False)
    config = read_config(options, model)
    if state is not None:
        options = {"pretrained_model_name_or_path": None, "state_dict": dict(state)}
    with wrap_load_errors(model), fork_rng_of(()):
        seed_everything(0)
        loaded, lacking, left = _load_widths(_class_of(config, model), model, options, config, "auto")
    left = check_weights(model, loaded, lacking, left, () if account is None else may_be_new(loaded))
    if account is not None:
        account.note_weights(model, 0, lacking, left)
        account.notes += adapter_notes(model)
    elif left:
        raise UserError(f"the weights of model {model!r} have {left[0]}, which its config.json does not know; {REMEDY}")
    return loaded


def load_pruned(folder: Path, masks: Masks, state: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """Load a pruned model for inference as `load_as_saved` does; its masks are {} if unknown."""
    model = load_as_saved(str(folder), state).eval()
    params = dict(model.named_parameters())
    shapes = {name: p.shape for name, p in params.items()}
    for name, mask in match_parameter_names(masks, shapes, model.base_model_prefix).items():
        if alive := int(torch.count_nonzero(params[name].detach()[~mask])):
            raise UserError(
                f"{alive} weights of {name} in {folder} are not zero though its masks prune them: it was "
                f"trained on without SparsityCallback or hold_zeros; `sparsesoup apply` makes them zero again"
            )
    return model


def _class_of(config: Any, model: str) -> Any:
    """Return the class named in config.json, or the one without a head if none is named."""
    if config.architectures is None or config.architectures == []:
        with torch.device("meta"):
            return type(transformers.AutoModel.from_config(config))
    name = config.architectures[0] if isinstance(config.architectures, list) else config.architectures
    known = OWN.get(name) or getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(known, type) and issubclass(known, PreTrainedModel)):
        raise UserError(
            f"config.json of model {model} has architectures {config.architectures!r}, where a list with the name of a "
            f"model class of transformers is needed; correct it"
        )
    return known


def _load_widths(
    kind: Any, model: str, options: Mapping[str, Any], config: Any, dtype: Any
) -> tuple[Any, dict[str, str], list[str]]:
    """Return what `load_weights` does; the layers get the widths or ranks that config.json has for them, if any."""
    compact, low_rank = getattr(config, COMPACT, None), getattr(config, LOW_RANK, None)
    if low_rank is not None:
        ranks = _checked_ranks(kind, low_rank)
        return _load_changed(kind, lambda made: split_layers_(made, ranks, fill=False), model, options, config, dtype)
    if compact is None:
        return load_weights(kind, model, options, config=config, dtype=dtype)
    table = compact.get("layers") if isinstance(compact, dict) else None
    if (
        not issubclass(kind, PreTrainedModel)
        or not isinstance(table, dict)
        or compact.get("format") not in (PLAIN_FORMAT, NARROW_FORMAT)
    ):
        raise UserError(
            f"config.json has a {COMPACT} that cannot be read: expected format 1 or 2, a table of layers and "
            f"a class of transformers under architectures; use the file as it was exported"
        )
    return _load_changed(kind, lambda made: resize_layers_(made, table), model, options, config, dtype)


def _checked_ranks(kind: Any, facts: Any) -> dict[str, int]:
    """Return the ranks in a `low_rank_config`; raise a UserError if it cannot be read."""
    ranks = facts.get("ranks") if isinstance(facts, dict) and facts.get("format") == 1 else None
    whole = isinstance(ranks, dict) and all(isinstance(rank, int) and rank > 0 for rank in ranks.values())
    if not whole or not issubclass(kind, PreTrainedModel):
        raise UserError(
            f"config.json has a {LOW_RANK} that cannot be read: expected format 1, a table of ranks and a class of "
            f"transformers under architectures; use the file as it was exported"
        )
    return dict(ranks or {})


def _load_changed(
    kind: Any, change: Callable[[Any], None], model: str, options: Mapping[str, Any], config: Any, dtype: Any
) -> tuple[Any, dict[str, str], list[str]]:
    """Load weights into a model whose layers were changed as soon as it was made."""

    def __init__(self: Any, config: Any, *inputs: Any, **more: Any) -> None:
        kind.__init__(self, config, *inputs, **more)
        change(self)

    narrow = type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})
    loaded, lacking, left = load_weights(narrow, model, options, config=config, dtype=dtype)
    loaded.__class__ = kind  # the stock class, which can be pickled and saved by name
    return loaded, lacking, left


def compact_table(widths: Widths) -> dict[str, Any]:
    """Return the content of `compact_config` for these widths."""
    narrow = any(NARROW in row for row in widths.values())
    return {"format": NARROW_FORMAT if narrow else PLAIN_FORMAT, "layers": widths}


def class_can_build(kind: Any, config: Any, wanted: Mapping[str, Tensor]) -> bool:
    """Return True if a stock class makes exactly these parameters from a config."""
    # A ValueError says that the heads do not divide the hidden size.
    with torch.device("meta"), quiet_libraries(), contextlib.suppress(ValueError):
        return {n: p.shape for n, p in kind(config).named_parameters()} == {n: p.shape for n, p in wanted.items()}
    return False


def unpruned_model(model: str, wanted: Widths) -> PreTrainedModel:
    """Return a randomly initialised model of a folder's class and config, as before anything was cut out of it.

    The largest of the `wanted` heads and units counts: a class makes all layers alike.
    """
    config = config_of(model)
    with wrap_load_errors(model):
        if hasattr(config, COMPACT):
            delattr(config, COMPACT)
        if (layout := FAMILIES.get(str(config.model_type))) and hasattr(config, layout.units) and wanted:
            # At least the numbers in config.json: a compact model that is cut again was narrow before.
            for key, number in (("units", layout.units), ("heads", "num_attention_heads")):
                setattr(config, number, max(getattr(config, number), *(row[key] for row in wanted.values())))
        return _class_of(config, model)(config).eval()


def save_model(
    model: PreTrainedModel, weights: Mapping[str, Tensor], folder: Path, reader: Any, facts: Mapping[str, Any]
) -> None:
    """Write a stock model folder, which transformers alone can load, with pruned weights exactly zero.

    Args:
        model: the pre-trained model, for its class and config; not changed.
        facts: content of `pruning_config` in `config.json` (a serving engine refuses other known keys).
    """
    product = copy.deepcopy(model).cpu()
    product.load_state_dict(dict(weights))
    product.config.pruning_config = dict(facts)
    with quiet_libraries():
        product.save_pretrained(folder)
        if reader is not None:
            reader.save_pretrained(folder)


def save_module(module: nn.Module, folder: Path) -> None:
    """Write the weights of a module that is none of transformers' into a new folder, each tensor once."""
    folder.mkdir()
    safetensors.torch.save_model(module, str(folder / WEIGHTS))


def use_faster_attention_(model: PreTrainedModel, precision: str) -> None:
    """Train with plain matrix products where torch's fused attention is slow: its backward pass in bf16 on a CPU.

    For image models, whose rows are short and whose attention has no dropout; with dropout, as in most text models,
    torch uses products anyway. Saved models are unaffected.
    """
    if precision == "bf16" and current_device().type == "cpu" and model.config._attn_implementation == "sdpa":
        with quiet_libraries():
            model.set_attn_implementation("eager")
