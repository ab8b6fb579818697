"""Facts on a run without folders of its machine."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

from sparsesoup.core.errors import UserError
from sparsesoup.runs.config import config_from_dict

NAMED = ("_name_or_path", "name_or_path", "pruning_config")  # keys of configs that may name a folder
HERE = ("is_local", "local_files_only")  # and what tokenizers note of how they were found


def is_local(value: Any) -> bool:
    """Return True for a text that looks like a path of some machine, rather than a name.

    >>> is_local("/home/me/bert"), is_local("~/bert"), is_local("owner/bert"), is_local("https://hf.co/owner/bert")
    (True, True, False, False)
    """
    text = value if isinstance(value, str) else ""
    begins = text.startswith(("/", "~", "./", "../", "\\\\")) or bool(re.match(r"[A-Za-z]:[\\/]", text))
    deep = text.count("/") > 1 and "://" not in text and not re.search(r"\s", text)
    return len(text) > 1 and (begins or deep)


def strip_local_paths(value: Any, key: str = "") -> Any:
    """Facts without a machine's folders: of a path its last part stays.

    >>> strip_local_paths({"model": "/home/me/bert", "data_root": "/data", "files": ["pruning/ticket.json"]})
    {'model': 'bert', 'files': ['pruning/ticket.json']}
    """
    if isinstance(value, Mapping):
        return {k: strip_local_paths(v, k) for k, v in value.items() if k != "data_root"}
    if isinstance(value, list):
        return value if key == "files" else [strip_local_paths(part, key) for part in value]
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if is_local(value) else value


def strip_local_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what only this machine knows. Labels and tokens stay, which may look like paths."""
    return {
        key: strip_local_paths(value) if key in NAMED else value for key, value in config.items() if key not in HERE
    }


def portable_command(facts: Mapping[str, Any]) -> str | None:
    """The command line that repeats a run, without this machine's folders; None where the facts do not say."""
    settings = dict(facts.get("settings") or {})
    method = dict(settings.pop("method", {}))
    name = method.pop("name", None)
    try:
        line = str(facts.get("command") or config_from_dict(str(name), {**settings, "method": method}).repeat_command())
    except (UserError, TypeError):
        return None
    words, called = shlex.split(line), {settings.get("dataset"): facts.get("dataset")}  # glue/sst2 for a folder of that
    pairs = zip(["", *words], words, strict=False)
    kept = [
        (called.get(w) or strip_local_paths(w)) if is_local(w) else w
        for before, w in pairs
        if "--data-root" not in (before, w)
    ]
    return shlex.join(kept)
