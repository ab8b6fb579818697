"""Remove local paths from the facts about a run."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

from sparsesoup.core.errors import UserError
from sparsesoup.runs.config import config_from_dict

NAMED = ("_name_or_path", "name_or_path", "pruning_config")  # config keys that may contain a path
HERE = ("is_local", "local_files_only")  # tokenizer keys about how it was loaded


def is_local(value: Any) -> bool:
    """Return True for a text that looks like a local path, rather than a name.

    >>> is_local("/home/me/bert"), is_local("~/bert"), is_local("owner/bert"), is_local("https://hf.co/owner/bert")
    (True, True, False, False)
    """
    text = value if isinstance(value, str) else ""
    begins = text.startswith(("/", "~", "./", "../", "\\\\")) or bool(re.match(r"[A-Za-z]:[\\/]", text))
    deep = text.count("/") > 1 and "://" not in text and not re.search(r"\s", text)
    return len(text) > 1 and (begins or deep)


def strip_local_paths(value: Any, key: str = "") -> Any:
    """Remove the folders from local paths; the last part stays.

    >>> strip_local_paths({"model": "/home/me/bert", "data_root": "/data", "files": ["pruning/ticket.json"]})
    {'model': 'bert', 'files': ['pruning/ticket.json']}
    """
    if isinstance(value, Mapping):
        return {k: strip_local_paths(v, k) for k, v in value.items() if k != "data_root"}
    if isinstance(value, list):
        return value if key == "files" else [strip_local_paths(part, key) for part in value]
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if is_local(value) else value


def strip_local_config(config: dict[str, Any]) -> dict[str, Any]:
    """Remove local information from a config. Labels and tokens stay, although they may look like paths."""
    return {key: strip_local_paths(v) if key in NAMED else v for key, v in config.items() if key not in HERE}


def portable_command(facts: Mapping[str, Any]) -> str | None:
    """Return the command line that repeats a run, without local folders; None if the facts lack it."""
    settings = dict(facts.get("settings") or {})
    method = dict(settings.pop("method", {}))
    name = str(method.pop("name", None))
    try:
        line = str(facts.get("command") or config_from_dict(name, {**settings, "method": method}).repeat_command())
    except (UserError, TypeError):
        return None
    words, called = shlex.split(line), {settings.get("dataset"): facts.get("dataset")}  # glue/sst2 for its local folder
    return shlex.join(
        (called.get(word) or strip_local_paths(word)) if is_local(word) else word
        for before, word in zip(["", *words], words, strict=False)
        if "--data-root" not in (before, word)
    )
