"""Pre-trained models, from the Hub, a folder or the embedded package; pruned ones written."""

import contextlib
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from sparsesoup.errors import UserError
from sparsesoup.hub.checkpoint import call, config_of, locate, quiet, reading
from sparsesoup.hub.families import matrices
from sparsesoup.hub.kinds import AnyTask, kind_of
from sparsesoup.hub.open_clip import OpenClipForImageClassification
from sparsesoup.hub.structure import FAMILIES, Widths, narrow_
from sparsesoup.rng import fold
from sparsesoup.targets import block_of

OWN = {kind.__name__: kind for kind in (OpenClipForImageClassification,)}  # classes that transformers does not have
COMPACT, COMPACT_FORMAT = "compact_config", 1  # key of config.json with the widths of each layer


def load_model(model: str, task: AnyTask, seed: int, remote_code: bool = False, whole: bool = False) -> PreTrainedModel:
    """A model with the head that the task needs, in float32; a new head is drawn from the seed.

    Only safetensors are read; code of the checkpoint runs only if `remote_code` says so.
    Raises: UserError if there is no such model, or none with such a head; if it is to be `whole`, as a teacher, also
    where the head is not its own or of another shape.
    """
    options, kind = call(locate(model), remote_code), kind_of(task)
    if kind.load is not None:
        with reading(model):
            return kind.load(options, task)
    with reading(model):
        config = AutoConfig.from_pretrained(**options, **kind.settings(task))
        with torch.random.fork_rng():
            torch.manual_seed(fold(seed, "head"))
            # A checkpoint may be stored in bf16, which transformers 5 would keep: fine-tuning needs float32.
            loaded, found = _fitting(kind.head, config).from_pretrained(
                **options,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    _become_stock(loaded)
    # A head may be new; an encoder drawn at random would be a mistake that only a log of transformers tells.
    lacking = {*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])} & matrices(loaded).keys()
    if whole:
        _check_answers(model, options, loaded, [*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])])
    if lacking:
        raise UserError(
            f"the weights of model {model!r} do not fit its config.json: {len(lacking)} matrices of the encoder are "
            f"missing or of another shape, such as {min(lacking)}; give a folder as save_pretrained wrote it"
        )
    return loaded


def hollow_model(model: str, task: AnyTask, remote_code: bool = False) -> PreTrainedModel:
    """A model with the head that the task needs and shapes instead of weights, which takes no time to make."""
    options, kind = call(locate(model), remote_code), kind_of(task)
    with reading(model), torch.device("meta"):
        config = AutoConfig.from_pretrained(**options, **kind.settings(task))
        return kind.head.from_config(config, trust_remote_code=remote_code)


def _check_answers(model: str, options: Mapping[str, Any], loaded: PreTrainedModel, lacking: list[str]) -> None:
    """UserError unless a model answers the task by itself, and in the order of the task's own labels."""
    if lacking:
        raise UserError(
            f"model {model!r} is not fine-tuned for this task ({min(lacking)} is missing or of another shape)"
        )
    with reading(model):
        own = [*AutoConfig.from_pretrained(**options).id2label.values()]
    asked = [*(loaded.config.id2label or {}).values()]
    if own != asked and sorted(own) == sorted(asked):
        raise UserError(
            f"model {model!r} answers in the order {', '.join(own)}, the data in that of {', '.join(asked)}; fine-tune "
            f"it on labels in that order"
        )


def load_as_saved(model: str, state: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """The model in the class and precision that its checkpoint names, no head added.

    Where config.json has `compact_config`, its layers get the widths that stand there.

    Args:
        model: Hub id or folder.
        state: weights under the names of the files, to take instead of the folder's; then none may be missing.
    Raises: UserError if there is no such model, or weights do not fit.
    """
    options = call(locate(model), False)
    with reading(model):
        config = AutoConfig.from_pretrained(**options)
        kind = _class_of(config)
        compact = getattr(config, COMPACT, None)
        given: dict[str, Any] = {"dtype": "auto", "use_safetensors": True, "output_loading_info": True}
        given["ignore_mismatched_sizes"] = True  # which is told below, by name
        if state is not None:
            options = {"pretrained_model_name_or_path": None, "state_dict": dict(state)}
        if compact is not None:
            kind = _narrowed(kind, compact)
        loaded, found = kind.from_pretrained(**options, config=config, **given)
    _check_fit(model, loaded, found, whole=state is not None or compact is not None)
    _become_stock(loaded)
    return loaded


def _class_of(config: Any) -> Any:
    """The class that config.json names, and the one without a head where it names none that is known."""
    name = (config.architectures or [""])[0]
    if known := OWN.get(name) or getattr(transformers, name, None):
        return known
    with torch.device("meta"):
        return type(transformers.AutoModel.from_config(config))


def _check_fit(model: str, loaded: PreTrainedModel, found: Mapping[str, Any], whole: bool) -> None:
    """UserError naming the first weight that is not the one its config.json asks for.

    Args:
        model: its name.
        loaded, found: the model, and what transformers tells of the loading.
        whole: whether they were written for each other, so that no weight may be missing and no layer be too many;
            else no weight of a repeated block may be missing, which would be drawn at random.
    """
    remedy = "take config.json and weights as they were written"
    if wrong := sorted(found["mismatched_keys"]):
        name, there, asked = wrong[0]
        raise UserError(
            f"the weights of model {model!r} do not fit its config.json: {name} has shape {tuple(there)}, asked for is "
            f"{tuple(asked)}; {remedy}"
        )
    if lacking := [name for name in found["missing_keys"] if whole or block_of(name)]:
        raise UserError(f"the weights of model {model!r} lack {min(lacking)}, which its config.json asks for; {remedy}")
    known = {"", *(block_of(name) for name, _ in loaded.named_parameters())}
    if whole and (left := [name for name in found["unexpected_keys"] if block_of(name) not in known]):
        raise UserError(
            f"the weights of model {model!r} have {min(left)}, which its config.json does not know; {remedy}"
        )


def _fitting(head: Any, config: Any) -> Any:
    """An Auto class, or for a compact model the class that it stands for, with the widths of config.json."""
    compact = getattr(config, COMPACT, None)
    if compact is None:
        return head
    with torch.device("meta"):
        kind = type(head.from_config(config))
    return _narrowed(kind, compact)


def _become_stock(loaded: Any) -> None:
    """Leave the class that narrows, of use only while weights come in: the stock one pickles and is saved by name."""
    if COMPACT in vars(type(loaded)):
        loaded.__class__ = type(loaded).__bases__[0]


def _narrowed(kind: Any, compact: Any) -> Any:
    """A class whose models have the widths of `compact_config` before their weights come."""
    table = compact.get("layers") if isinstance(compact, dict) else None
    if not issubclass(kind, PreTrainedModel) or not isinstance(table, dict) or compact.get("format") != COMPACT_FORMAT:
        raise UserError(
            f"config.json has a {COMPACT} that cannot be read: expected format {COMPACT_FORMAT}, a table of layers and "
            f"a class of transformers under architectures; take the file as it was exported"
        )

    def __init__(self: Any, config: Any, *inputs: Any, **more: Any) -> None:
        kind.__init__(self, config, *inputs, **more)
        narrow_(self, table)

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__, COMPACT: table})


def makes(kind: Any, config: Any, wanted: Mapping[str, Tensor]) -> bool:
    """Whether a stock class makes just these parameters from a config."""
    with torch.device("meta"), quiet(), contextlib.suppress(ValueError):  # heads that do not divide the hidden size
        return {n: p.shape for n, p in kind(config).named_parameters()} == {n: p.shape for n, p in wanted.items()}
    return False


def unpruned_model(model: str, wanted: Widths) -> PreTrainedModel:
    """A model of the class and config of a folder before anything was cut out of it; its weights are drawn at random.

    Args:
        model: the folder.
        wanted: heads and units of its layers; a class makes all layers alike, so the most of them count.
    Raises: UserError if its config.json cannot be read.
    """
    with reading(model):
        config = AutoConfig.from_pretrained(model)
        if hasattr(config, COMPACT):
            delattr(config, COMPACT)
        if (layout := FAMILIES.get(str(config.model_type))) and hasattr(config, layout.units) and wanted:
            # Never fewer than config.json says: what is cut out of a compact model again was narrow before.
            for key, number in (("units", layout.units), ("heads", "num_attention_heads")):
                setattr(config, number, max(getattr(config, number), *(row[key] for row in wanted.values())))
        return _class_of(config)(config).eval()


def has_head(model: str, task: AnyTask, remote_code: bool = False) -> bool:
    """Whether transformers knows a class of this model's type with the head that a task needs."""
    kind = kind_of(task)
    return remote_code or kind.load is not None or type(config_of(model)) in kind.head._model_mapping


def save_model(
    model: PreTrainedModel, weights: Mapping[str, Tensor], folder: Path, reader: Any, facts: Mapping[str, Any]
) -> None:
    """Write a stock model folder: `from_pretrained` of transformers alone loads it, its pruned weights exactly zero.

    Args:
        model: the pre-trained model, which gives class and config; not changed.
        weights: the state to save.
        reader: its tokenizer or image processor.
        facts: what goes into `config.json` as `pruning_config` (a serving engine refuses other known keys).
    """
    product = copy.deepcopy(model).cpu()
    product.load_state_dict(dict(weights))
    product.config.pruning_config = dict(facts)
    with quiet():
        product.save_pretrained(folder)
        if reader is not None:
            reader.save_pretrained(folder)
