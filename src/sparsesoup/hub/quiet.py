"""Silence the libraries: their warnings, logs and progress bars, besides the errors that they raise."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping

import datasets
from transformers import logging as transformers_logging

LEVELS = {"transformers": logging.ERROR, "torch.onnx": logging.ERROR} | dict.fromkeys(
    ("datasets", "huggingface_hub", "fsspec"), logging.CRITICAL + 1
)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Disable warnings, logs and progress bars of the libraries in this block; the caller's settings are restored."""
    loggers = {logging.getLogger(name): level for name, level in LEVELS.items()}
    before = {logger: logger.level for logger in loggers}
    bars = not datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    _set_levels(loggers)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        _set_levels(before)
        if bars[0]:
            datasets.enable_progress_bars()
        if bars[1]:
            transformers_logging.enable_progress_bar()


def _set_levels(levels: Mapping[logging.Logger, int]) -> None:
    changed = [logger for logger, level in levels.items() if logger.level != level]
    for logger in changed:
        logger.level = levels[logger]
    for logger in changed[:1]:
        logger.setLevel(logger.level)  # makes all loggers forget what they have cached: once, since it takes long
