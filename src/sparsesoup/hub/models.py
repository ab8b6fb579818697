"""Pre-trained models and what reads their rows, from the Hub, a folder or the embedded package; pruned ones written."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel
from transformers import logging as messages

from sparsesoup.errors import UserError
from sparsesoup.hub.embedded import embedded_model
from sparsesoup.hub.families import prunable
from sparsesoup.hub.kinds import AnyTask, kind_of
from sparsesoup.hub.online import answers
from sparsesoup.hub.open_clip import CONFIG as OPEN_CLIP
from sparsesoup.hub.open_clip import OpenClipForImageClassification
from sparsesoup.hub.structure import FAMILIES, Widths, narrow_
from sparsesoup.hub.text import check_words
from sparsesoup.rng import fold
from sparsesoup.targets import block_of

EMBEDDED = "minilm"
OWN = {kind.__name__: kind for kind in (OpenClipForImageClassification,)}  # classes that transformers does not have
COMPACT, COMPACT_FORMAT = "compact_config", 1  # key of config.json with the widths of each layer
GIVE = (
    "give a folder with config.json and model.safetensors, a Hub id that can be reached, or minilm (pip install "
    "'sparsesoup[demo]')"
)


def locate(model: str) -> str:
    """The folder or Hub id behind a model's name; a run directory stands for its model folder."""
    if model == EMBEDDED:
        return str(embedded_model())
    for folder in (Path(model) / "model", Path(model)):
        if (folder / "config.json").is_file():
            return str(folder)
    if (Path(model) / OPEN_CLIP).is_file():
        raise UserError(
            f"model {model} is an open_clip checkpoint; say `sparsesoup.from_open_clip({model!r}, 'folder')` in Python "
            f"and give that folder"
        )
    if Path(model).exists():
        raise UserError(f"model {model} is a folder without config.json; give what save_pretrained wrote, or a Hub id")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(f"no model at {model}: no such folder")
    return model


def _options(where: str, remote_code: bool) -> dict[str, Any]:
    # Without an answer transformers would try for half a minute; a cached copy is found at once.
    local = Path(where).exists() or not answers(huggingface_hub.HfApi().model_info, where)
    return {"pretrained_model_name_or_path": where, "local_files_only": local, "trust_remote_code": remote_code}


def load_model(model: str, task: AnyTask, seed: int, remote_code: bool = False, whole: bool = False) -> PreTrainedModel:
    """A model with the head that the task needs, in float32; a new head is drawn from the seed.

    Only safetensors are read; code of the checkpoint runs only if `remote_code` says so.
    Raises: UserError if there is no such model, or none with such a head; if it is to be `whole`, as a teacher, also
    where the head is not its own or of another shape.
    """
    options, kind = _options(locate(model), remote_code), kind_of(task)
    if kind.load is not None:
        with _reading(model):
            return kind.load(options, task)
    with _reading(model):
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
    lacking = {*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])} & prunable(loaded).keys()
    if whole:
        _check_answers(model, options, loaded, [*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])])
    if lacking:
        raise UserError(
            f"the weights of model {model!r} do not fit its config.json: {len(lacking)} matrices of the encoder are "
            f"missing or of another shape, such as {min(lacking)}; give a folder as save_pretrained wrote it"
        )
    return loaded


def _check_answers(model: str, options: Mapping[str, Any], loaded: PreTrainedModel, lacking: list[str]) -> None:
    """UserError unless a model answers the task by itself, and in the order of the task's own labels."""
    if lacking:
        raise UserError(
            f"model {model!r} is not fine-tuned for this task ({min(lacking)} is missing or of another shape)"
        )
    with _reading(model):
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
    options = _options(locate(model), False)
    with _reading(model):
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
    with _reading(model):
        config = AutoConfig.from_pretrained(model)
        if hasattr(config, COMPACT):
            delattr(config, COMPACT)
        if (layout := FAMILIES.get(str(config.model_type))) and hasattr(config, layout.units) and wanted:
            # Never fewer than config.json says: what is cut out of a compact model again was narrow before.
            for key, number in (("units", layout.units), ("heads", "num_attention_heads")):
                setattr(config, number, max(getattr(config, number), *(row[key] for row in wanted.values())))
        return _class_of(config)(config).eval()


def config_of(model: str, remote_code: bool = False) -> Any:
    """What the model's config.json says."""
    with _reading(model):
        return AutoConfig.from_pretrained(**_options(locate(model), remote_code))


def has_head(model: str, task: AnyTask, remote_code: bool = False) -> bool:
    """Whether transformers knows a class of this model's type with the head that a task needs."""
    kind = kind_of(task)
    return remote_code or kind.load is not None or type(config_of(model)) in kind.head._model_mapping


def load_reader(model: str, images: bool, remote_code: bool = False) -> Any:
    """What makes a model's inputs of rows: its image processor, or its tokenizer."""
    return load_processor(model, remote_code) if images else load_tokenizer(model, remote_code)


def load_processor(model: str, remote_code: bool = False) -> Any:
    """The model's image processor, in its form for Pillow: the same whether torchvision is there or not.

    Raises: UserError if the model has none.
    """
    options = _options(locate(model), remote_code)
    with _reading(
        model, "give a folder with preprocessor_config.json, as save_pretrained of an image processor writes"
    ):
        return AutoImageProcessor.from_pretrained(**options, backend="pil")


def load_tokenizer(model: str, remote_code: bool = False) -> Any:
    """The model's tokenizer; one without a padding token pads with its end-of-text token.

    Raises: UserError if the model has none.
    """
    options = _options(locate(model), remote_code)
    with _reading(model, "give a folder with tokenizer.json, as save_pretrained of a tokenizer writes"):
        tokenizer = AutoTokenizer.from_pretrained(**options)
    check_words(tokenizer, model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


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


@contextlib.contextmanager
def _reading(model: str, remedy: str = GIVE) -> Iterator[None]:
    """Turns what transformers says of a model that cannot be read into one line."""
    try:
        with quiet():
            yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"cannot load model {model!r}: {first[:200]}; {remedy}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no notes of transformers on the terminal inside the block."""
    level, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(level)
        if bars:
            messages.enable_progress_bar()
