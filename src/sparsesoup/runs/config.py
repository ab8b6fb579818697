"""Run settings: declared once, in dataclasses; flags, recipes, keywords and run.yaml are read into them."""

import difflib
import functools
import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from sparsesoup.core.errors import UserError
from sparsesoup.core.masking import check_scope, check_sparsity
from sparsesoup.core.settings import (
    ALIASES,
    Setting,
    TypedSettings,
    as_type,
    brief_value,
    fill_settings,
    flag_of,
    nest_table,
    settings_of,
    unknown_setting,
)
from sparsesoup.hub.build import ModelAndDataConfig
from sparsesoup.methods import METHODS, TABLE, Method
from sparsesoup.runs.trackers import TrackerConfig
from sparsesoup.runs.yaml_text import BadYaml, Node, compose_yaml, construct_yaml, dump_yaml, read_text
from sparsesoup.training.config import DistillConfig, TrainingConfig

MOST_STEPS, MOST_EPOCHS = 10**9, 10**6  # far above any training, far below the limits of loops and floats
MOST = {"seed": 2**63 - 1, "method": 10**5}  # limits of other integers; those of a method may be lengths of lists
# Settings that two runs of one result may differ in: of this machine, or of what watches the run.
UNRELATED = ("data_root", "report_to")
WORKERS = "dataloader_num_workers"  # of `train`: no result depends on it either
ELSEWHERE = (
    *UNRELATED,
    f"train.{WORKERS}",
    "dataset",
    "seed",
    "trust_remote_code",
)  # in a run's path, or of this machine: not in its key
OBJECTS = "objects"  # key of a recipe: the arguments that were objects in memory
# Flags of `prune` that are no settings of a run.
OUTSIDE = ("config", "out", "save_every", "cache_dir", "cache_size", "dry_run", "workers", "snapshots", "device")
NO_METHOD = f"no method given; use `sparsesoup prune METHOD --dataset ...`, where METHOD is one of {', '.join(METHODS)}"


@dataclass(frozen=True, kw_only=True)
class BudgetConfig(TypedSettings):
    """Target sparsity and training length.

    Args:
        sparsity: share of the prunable weights to remove, in [0, 1); default 0.9, for `ticket` the ticket's own.
        steps: T, the steps of one fine-tuning; default from epochs; 0 prunes without training.
        epochs: T in epochs, instead of steps; default 3.
    """

    sparsity: float | None = None
    steps: int | None = None
    epochs: float | None = None

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
            object.__setattr__(self, "sparsity", self.sparsity + 0.0)  # -0.0 becomes 0.0
        if self.steps is not None and not 0 <= self.steps <= MOST_STEPS:
            raise UserError(f"must be at least 0 and at most {MOST_STEPS:,}, got {brief_value(self.steps)}", "steps")
        if self.epochs is not None and not 0 < self.epochs <= MOST_EPOCHS:
            raise UserError(f"must be above 0 and at most {MOST_EPOCHS:,}, got {self.epochs:g}", "epochs")
        if self.steps is not None and self.epochs is not None:
            raise UserError(
                f"steps ({self.steps}) and epochs ({self.epochs:g}) are mutually exclusive; give one of them", "steps"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings that determine a run.

    Args:
        name: name of the method.
        method: the method with its own settings.
        budget, model_data, train, tracking: sparsity and length, model and data, training, trackers.
        objects: arguments that were given as objects in memory, so that no text repeats the run.
    """

    name: str
    method: Method
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    model_data: ModelAndDataConfig = field(default_factory=ModelAndDataConfig)
    train: TrainingConfig = field(default_factory=TrainingConfig)
    tracking: TrackerConfig = field(default_factory=TrackerConfig)
    objects: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in TABLE[self.name].fixed:
            value, own = getattr(self.method, name), getattr(METHODS[self.name], name)
            if value != own:
                raise UserError(
                    f"method {self.name} has {name} {own}, got {value}; use the method that leaves it free",
                    f"method.{name}",
                )
        for name, value in flatten_table(self.to_dict()).items():
            most = MOST.get(name.partition(".")[0], MOST_STEPS)
            if isinstance(value, int) and abs(value) > most:
                raise UserError(f"a whole number of at most {most:,}, got {brief_value(value)}", name)
        if self.budget.sparsity is not None:
            check_scope(getattr(self.method, "scope", ""), self.budget.sparsity)
        if self.train.distill != DistillConfig() and not self.train.distill.teacher:
            raise UserError(
                "there are settings of a distillation but no teacher; set it to dense, or to a run or a model",
                "train.distill.teacher",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, as in a recipe."""
        method = {"name": self.name, **asdict(cast(Any, self.method))}
        flat = {**asdict(self.model_data), **asdict(self.budget), **asdict(self.tracking)}
        train = {**asdict(self.train), "precision": self.train.mixed_precision}
        table = {"method": method, **flat, "train": train}
        table |= {OBJECTS: self.objects} if self.objects else {}
        return json.loads(json.dumps(table), parse_float=lambda text: float(text) + 0.0)  # -0.0 is 0.0

    def changed_settings(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults, by dotted name."""
        # That of the device of this moment, which Python may change from call to call.
        plain = {**_default_settings(self.name), "train.precision": TrainingConfig().mixed_precision}
        return {name: v for name, v in flatten_table(self.to_dict()).items() if v != plain.get(name)}

    def run_key(self) -> str:
        """Return ten hex digits of the settings that differ from their defaults, except dataset and seed."""
        changed = {name: value for name, value in self.changed_settings().items() if name not in ELSEWHERE}
        return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:10]

    def repeat_command(self) -> str:
        """Return the command line that repeats the run; of objects the call in Python."""
        if self.objects:
            return self._repeat_call()
        words = ["sparsesoup", "prune", self.name]
        for name, value in self.changed_settings().items():
            words += [flag_of(name), value if isinstance(value, str) else json.dumps(value)]
        return shlex.join(words)

    def _repeat_call(self) -> str:
        table = nest_table({name: v for name, v in self.changed_settings().items() if name != OBJECTS})
        for group in [name for name, value in table.items() if isinstance(value, dict)]:
            table[group] = nest_table(table[group])
        given = [f"{name}={name}" for name in self.objects]
        if "teacher" in self.objects:
            table["train"]["distill"].pop("teacher")
        left_out = {*self.objects, *(("model",) if "trainer" in self.objects else ())}
        given += [f"{name}={value!r}" for name, value in table.items() if name not in left_out]
        return f"sparsesoup.prune({', '.join([repr(self.name), *given])})"


@functools.cache
def _default_settings(name: str) -> dict[str, Any]:
    """Return the settings of a run with a method by default, by dotted name."""
    return flatten_table(RunConfig(name=name, method=METHODS[name]).to_dict())


def without_workers(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's settings as plain values without the number of threads that prepare its batches.

    >>> without_workers({"seed": 0, "train": {"batch_size": 8, "dataloader_num_workers": 2}})
    {'seed': 0, 'train': {'batch_size': 8}}
    """
    train = table.get("train")
    kept = {key: value for key, value in train.items() if key != WORKERS} if isinstance(train, dict) else train
    return {**table, **({"train": kept} if "train" in table else {})}


def method_named(name: str) -> Method:
    """Return the method of that name; raise a UserError with the nearest names if there is none."""
    if name not in METHODS:
        near = difflib.get_close_matches(name.lower(), METHODS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `sparsesoup methods`"
        raise UserError(f"unknown method {name!r}; {hint} (allowed: {', '.join(METHODS)})")
    return METHODS[name]


def config_from_dict(name: str, table: Mapping[Any, Any]) -> RunConfig:
    """Return the settings of a run from plain values, as in a recipe.

    Raises: UserError with the setting, if it is unknown or its value is wrong.
    """
    parts: dict[str, Any] = {"budget": BudgetConfig(), "model_data": ModelAndDataConfig(), "tracking": TrackerConfig()}
    values: dict[str, dict[str, Any]] = {part: {} for part in parts}
    flat = {f.name: part for part, default in parts.items() for f in fields(default)}
    parts |= {"train": TrainingConfig(), "method": method_named(name)}
    for key, value in nest_table(table).items():
        setting = ALIASES.get(key, key)
        if setting == OBJECTS:
            refuse_objects(table)
        if setting in OUTSIDE:
            raise UserError(
                "this is no setting of a run, so no recipe holds it; use its flag on the command line", setting
            )
        if setting in flat:
            values[flat[setting]][setting] = _plain_value(setting, value)
        elif setting in parts:
            parts[setting] = as_type(Any, value, setting, parts[setting])
        else:
            raise unknown_setting(setting, [s.name for s in run_settings(name)])
    return RunConfig(name=name, **parts | {part: fill_settings(parts[part], own) for part, own in values.items()})


def refuse_objects(settings: Mapping[Any, Any], what: str = "this") -> None:
    """Raise a UserError if a run with these settings was one of objects, which have neither a name nor a test split."""
    if names := settings.get(OBJECTS):
        given = ", ".join(map(str, names)) if isinstance(names, list | tuple) else str(names)
        raise UserError(
            f"{what} is a run of objects in memory ({given}), whose rows and test split no command can find; repeat or "
            f"score it in the Python code that has them"
        )


def run_settings(method: str) -> list[Setting]:
    """Return all settings of a run with a method."""
    parts = (BudgetConfig(), ModelAndDataConfig(), TrackerConfig())
    flat = [setting for part in parts for setting in settings_of(part)]
    return [*flat, *settings_of(TrainingConfig(), "train"), *settings_of(method_named(method), "method")]


def _plain_value(name: str, value: Any) -> Any:
    """Return names of columns and trackers as a list, and those of classes as one text, however they are written."""
    if name == "sparsity" and isinstance(value, str):
        raise UserError(f"the share of weights removed is a number in [0, 1), got {value!r}; for 90 % set 0.9", name)
    if name == "report_to" and value in ("none", ["none"], None):
        return []
    if name in ("text_columns", "report_to") and isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if name in ("prompts", "class_names") and isinstance(value, (list, tuple)):
        words = [word for word in value if type(word) in (str, int) and "," not in str(word)]
        if name == "prompts" or not value or len(words) < len(value):
            raise UserError(f"expected text, got {value!r}; several are given by a file with one a line", name)
        return ",".join(map(str, words))
    return value


def read_recipe(path: Path, given: str = "") -> tuple[str, dict[str, Any], Node]:
    """Return (method, settings, node tree) of a recipe for `prune`.

    Args:
        given: the method that the command line names.
    Raises: UserError if it cannot be read, or is for another method.
    """
    try:
        tree = compose_yaml(read_text(path))
        recipe = construct_yaml(tree)
    except (OSError, BadYaml) as error:
        raise UserError(f"cannot read recipe {path}: {error}") from error
    if not isinstance(recipe, dict) or tree is None:
        raise UserError(f"recipe {path} must be a table of settings, such as a run's run.yaml")
    own = recipe.pop("method", None)
    written = own.pop("name", None) if isinstance(own, dict) else own
    if given and written and given != written:
        raise UserError(f"the recipe is for method {written}, the command line says {given}; name one of them")
    if not (name := given or written):
        raise UserError(NO_METHOD)
    method_named(str(name))
    return str(name), {**recipe, **({"method": own} if isinstance(own, dict) else {})}, tree


def read_run_config(path: Path) -> RunConfig:
    """Return the settings of a run.yaml."""
    name, table, _ = read_recipe(path)
    return config_from_dict(name, table)


def dump_config(settings: RunConfig) -> str:
    """Return the recipe that repeats a run, with all settings."""
    how = "the same call in Python" if settings.objects else "`sparsesoup prune --config run.yaml`"
    head = f"# every setting of this run; {how} repeats it\n"
    return head + dump_yaml(settings.to_dict())


def flatten_table(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables; keys are joined by dots."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= flatten_table(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
