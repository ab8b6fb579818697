"""Settings from a table of plain values, checked against the types of their dataclasses."""

import difflib
import functools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from sparsesoup.core.errors import UserError

T = TypeVar("T")
ALIASES = {"image_column": "text_columns", "train.optim": "train.optimizer"}  # the latter as transformers calls it
# Names of transformers, peft and other tools for settings of a run, for the hint of an error.
ELSEWHERE_NAMED = {
    "lr": "train.learning_rate", "rate": "train.learning_rate", "wd": "train.weight_decay",
    "bs": "train.batch_size", "batch": "train.batch_size", "per_device_train_batch_size": "train.batch_size",
    "train_batch_size": "train.batch_size", "gradient_clipping": "train.max_grad_norm", "clip": "train.max_grad_norm",
    "accumulation": "train.gradient_accumulation_steps", "fp16": "train.precision", "bf16": "train.precision",
    "mixed_precision": "train.precision", "warmup": "train.warmup_ratio", "warmup_steps": "train.warmup_ratio",
    "eval_strategy": "train.eval_steps", "evaluation_strategy": "train.eval_steps",
    "patience": "train.early_stopping_patience", "early_stopping": "train.early_stopping_patience",
    "teacher": "train.distill.teacher", "num_workers": "train.dataloader_num_workers",
    "num_train_epochs": "epochs", "num_epochs": "epochs", "epoch": "epochs", "max_steps": "steps", "num_steps": "steps",
    "amount": "sparsity", "pruning_ratio": "sparsity",
    "random_seed": "seed", "output_dir": "out", "save_steps": "save_every", "model_name_or_path": "model",
    "model_name": "model", "checkpoint": "model", "data": "dataset", "dataset_name": "dataset",
    "train_file": "dataset", "dataset_config_name": "dataset_config", "max_seq_length": "max_length",
    "text_column": "text_columns", "label": "label_column", "use_cpu": "device", "no_cuda": "device",
}  # fmt: skip
LINEAR = "the learning rate warms up and decays linearly, by train.warmup_ratio alone"
FIXED = dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "scheduler"), LINEAR)  # what no setting changes
FLOAT_DIGITS = 300  # a longer integer has no float


@dataclass(frozen=True)
class Setting:
    """A setting: its dotted name, such as train.distill.alpha, its type hint, its default, the object that holds it."""

    name: str
    kind: Any
    value: Any
    owner: Any


def settings_of(default: Any, group: str = "") -> Iterator[Setting]:
    """Yield the settings of a dataclass's object; those of a dataclass within it in place of itself."""
    hints = get_type_hints(type(default))
    for f in fields(default):
        name, value = join_names(group, f.name), getattr(default, f.name)
        if is_dataclass(value):
            yield from settings_of(value, name)
        else:
            yield Setting(name, hints[f.name], value, default)


def fill_settings(default: T, table: Mapping[Any, Any], group: str = "") -> T:
    """Return settings with the values of a table in place of their own.

    Args:
        default: an object of a dataclass.
        table: setting -> value, with tables for dataclasses; see `nest_table` for its keys.
        group: name of the object, such as train; empty at the top.
    Raises: UserError with the setting, if it is unknown, its value is of another type, or its class refuses it.
    """
    hints, values = get_type_hints(type(default)), dict[str, Any]()
    for key, value in nest_table(table).items():
        name = ALIASES.get(join_names(group, key), key).rpartition(".")[2]
        if name not in {f.name for f in fields(default)}:  # type: ignore[arg-type]  # T is a dataclass
            raise unknown_setting(join_names(group, name), [s.name for s in settings_of(default, group)])
        values[name] = as_type(hints[name], value, join_names(group, name), getattr(default, name))
    try:
        return replace(default, **values)  # type: ignore[type-var]  # T is a dataclass
    except UserError as error:
        raise error.in_group(group) from error


class TypedSettings:
    """Base of dataclasses of settings: each value is of the type of its hint before `__post_init__` sees it."""

    def __init_subclass__(cls, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if own := cls.__dict__.get("__post_init__"):

            @functools.wraps(own)
            def convert_first(self: Any) -> None:
                convert_types_(self)
                own(self)

            cls.__post_init__ = convert_first  # type: ignore[method-assign]  # it wraps the class's own

    def __post_init__(self) -> None:
        convert_types_(self)


def convert_types_(given: Any) -> None:
    """Convert the settings of a dataclass's object to the types of their hints, such as 1 to 1.0 for a rate.

    Raises: UserError with the setting, if its value is of another type.
    """
    hints = get_type_hints(type(given))
    for f in fields(given):
        value = getattr(given, f.name)
        if not is_dataclass(value):  # which has converted its own
            object.__setattr__(given, f.name, as_type(hints[f.name], value, f.name))


def nest_table(table: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a table in which dashes of keys are underscores, and dotted keys override values of nested tables.

    >>> nest_table({"train": {"batch_size": 8, "precision": "no"}, "train.batch-size": 4})
    {'train': {'batch_size': 4, 'precision': 'no'}}
    """
    found: dict[str, Any] = {}
    for key, value in table.items():
        name, dot, rest = str(key).replace("-", "_").partition(".")
        if dot:
            value = {**(own if isinstance(own := found.get(name), Mapping) else {}), rest: value}
        found[name] = value
    return found


def unknown_setting(name: str, known: Iterable[str]) -> UserError:
    """Return the error for a setting that there is not, with the nearest ones and all of its group."""
    known, (group, _, leaf) = [*known], name.rpartition(".")
    if leaf in FIXED:
        return UserError(f"unknown setting: {FIXED[leaf]}; leave it out", name)
    if meant := _same_elsewhere(leaf, known, group):
        return UserError("unknown setting", name, meant)
    own = [each.removeprefix(f"{group}.") for each in known if each.startswith(f"{group}.")]
    if own:
        near = difflib.get_close_matches(name.removeprefix(f"{group}."), own, n=3, cutoff=0.5)
        return UserError(f"unknown setting ({group} has {', '.join(own)})", name, [f"{group}.{n}" for n in near])
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    allowed = ", ".join(dict.fromkeys(each.partition(".")[0] for each in known))
    return UserError("unknown setting" if near else f"unknown setting (allowed: {allowed})", name, near)


def _same_elsewhere(leaf: str, known: Sequence[str], group: str) -> list[str]:
    """Return the settings that are known by that name in another group, or in another library."""
    same = [each for each in known if each.rpartition(".")[2] == leaf]
    meant = ELSEWHERE_NAMED.get(leaf, leaf if leaf in ELSEWHERE_NAMED.values() else "")
    there = meant in known or meant.partition(".")[0] in known or group == "train"
    return same or ([meant] if meant and there else [])


def as_type(kind: Any, value: Any, field: str, default: Any = None) -> Any:
    """Return a plain value as one of a type hint: a number for a float, a list for a tuple, a table for a dataclass.

    Args:
        field: the setting.
        default: its default; a table leaves the settings that it does not name as they are there.
    Raises: UserError with the setting, if the value is of another type.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if is_dataclass(default) and isinstance(value, Mapping):
        return fill_settings(default, value, field)
    for option in get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,):
        origin, parts = get_origin(option), get_args(option)
        if type(value) is option or (origin is Literal and value in parts):
            return value
        if option is str and isinstance(value, os.PathLike):
            return os.fspath(value)
        if option is float and type(value) is int and abs(value) < 10**FLOAT_DIGITS:
            return float(value)
        if is_dataclass(option) and isinstance(value, Mapping):
            return fill_settings(option(), value, field)  # type: ignore[operator]  # a dataclass with defaults
        kinds = parts[:1] * len(value) if ... in parts and isinstance(value, (list, tuple)) else parts
        if origin is tuple and isinstance(value, (list, tuple)) and len(kinds) == len(value):
            return tuple(as_type(k, v, f"{field}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    inner = [s.name for s in settings_of(default, field)] if is_dataclass(default) else []
    allowed = describe_type(type(default) if inner else kind)
    raise UserError(f"expected {allowed}, got {brief_value(value)}", field, inner[:1])


def plain_values(value: Any) -> Any:
    """Return a value with lists for tuples, texts for paths and keys, and Python's numbers for numpy's."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(part) for part in value]
    value = value.item() if isinstance(value, np.generic) else value
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def describe_type(kind: Any) -> str:
    """Return a type hint as users know it.

    >>> describe_type(int | None), describe_type(Literal["no", "bf16"]), describe_type(float | tuple[float, float])
    ('a whole number or null', 'one of no, bf16', 'a number or [a number, a number]')
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(describe_type, parts))
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is tuple:
        return f"a list of {describe_type(parts[0])}" if ... in parts else f"[{', '.join(map(describe_type, parts))}]"
    if is_dataclass(kind):
        return f"a table of {', '.join(f.name for f in fields(kind))}"
    words = {NoneType: "null", str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return words.get(kind, kind.__name__)


def brief_value(value: Any) -> str:
    """Format a value to fit a line.

    >>> brief_value("300"), brief_value(10**400)
    ("'300'", 'a number of 401 digits')
    """
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"a number of {int(math.log10(abs(value))) + 1} digits"
    return repr(value) if len(repr(value)) < 200 else f"{repr(value)[:150]} ..."


def join_names(group: str, name: str) -> str:
    """Return the dotted name of a setting in a group."""
    return f"{group}.{name}" if group else name


def flag_of(name: str) -> str:
    """Return the flag of a setting.

    >>> flag_of("train.learning_rate")
    '--train.learning-rate'
    """
    return f"--{name.replace('_', '-')}"
