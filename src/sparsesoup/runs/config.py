"""Run settings: declared once, in dataclasses; flags, YAML recipes and run.yaml are derived from them."""

import argparse
import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from jsonargparse import Namespace

from sparsesoup.core.errors import UserError
from sparsesoup.core.masking import check_scope
from sparsesoup.hub.build import ModelAndDataConfig
from sparsesoup.methods import METHODS, TABLE, Method
from sparsesoup.runs.config_flags import (
    TEXTS,
    as_flags,
    brief_number,
    columns_as_list,
    flatten_table,
    normalize_flag,
    shell_value,
)
from sparsesoup.runs.config_parser import MODE, ConfigParser
from sparsesoup.runs.config_yaml import read_yaml, text_of
from sparsesoup.training.config import DistillConfig, TrainingConfig

MOST_STEPS, MOST_EPOCHS = 10**9, 10**6  # far above any training, far below the limits of loops and floats
MOST = {"seed": 2**63 - 1, "method": 10**5}  # limits of other integers; those of a method may be lengths of lists
ELSEWHERE = (
    "data_root",
    "dataset",
    "seed",
    "trust_remote_code",
)  # part of a run's path, or specific to this machine: not in the key


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """Target sparsity and training length.

    Args:
        sparsity: share of the encoder's weights to remove, in [0, 1); default 0.9, for `ticket` the ticket's own.
        steps: T, the steps of one fine-tuning; default from epochs.
        epochs: T in epochs, instead of steps; default 3.
    """

    sparsity: float | None = None
    steps: int | None = None
    epochs: float | None = None

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            object.__setattr__(self, "sparsity", self.sparsity + 0.0)  # -0.0 becomes 0.0
        if self.sparsity is not None and not 0.0 <= self.sparsity < 1.0:
            hint = f"for {self.sparsity:g} % say {self.sparsity / 100:g}" if 1.0 < self.sparsity < 100.0 else "say 0.9"
            raise UserError(f"sparsity is the share of weights removed, in [0, 1), got {self.sparsity:g}; {hint}")
        if self.steps is not None and not 1 <= self.steps <= MOST_STEPS:
            raise UserError(f"steps must be at least 1 and at most {MOST_STEPS:,}, got {brief_number(self.steps)}")
        if self.epochs is not None and not 0 < self.epochs <= MOST_EPOCHS:
            raise UserError(f"epochs must be above 0 and at most {MOST_EPOCHS:,}, got {self.epochs:g}")
        if self.steps is not None and self.epochs is not None:
            raise UserError(
                f"steps ({self.steps}) and epochs ({self.epochs:g}) are mutually exclusive; give one of them"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings that determine a run.

    Args:
        name: name of the method.
        method: the method with its own settings.
        amount, place, train: budget, model and data, training.
    """

    name: str
    method: Method
    amount: BudgetConfig = field(default_factory=BudgetConfig)
    place: ModelAndDataConfig = field(default_factory=ModelAndDataConfig)
    train: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        for name in TABLE[self.name].fixed:
            value, own = getattr(self.method, name), getattr(METHODS[self.name], name)
            if value != own:
                raise UserError(f"method {self.name} has {name} {own}, got {value}; take the method that has it free")
        for name, value in flatten_table(self.to_dict()).items():
            most = MOST.get(name.partition(".")[0], MOST_STEPS)
            if isinstance(value, int) and abs(value) > most:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is a whole number of at most {most:,}, got {brief_number(value)}")
        if self.amount.sparsity is not None:
            check_scope(getattr(self.method, "scope", ""), self.amount.sparsity)
        if self.train.distill != DistillConfig() and not self.train.distill.teacher:
            raise UserError(
                "train.distill has settings but no teacher; add --train.distill.teacher dense, or a run or model"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, as in a recipe."""
        flat = dataclasses.asdict(self.place) | dataclasses.asdict(self.amount)
        method = {"name": self.name, **dataclasses.asdict(cast(Any, self.method))}
        table = json.dumps({"method": method, **flat, "train": dataclasses.asdict(self.train)})
        return json.loads(table, parse_float=lambda text: float(text) + 0.0)  # -0.0 and 0.0 are the same setting

    def run_key(self) -> str:
        """Return ten hex digits of the settings that differ from their defaults, except dataset and seed."""
        own, plain = self.to_dict(), RunConfig(name=self.name, method=METHODS[self.name]).to_dict()
        changed = {
            k: v for k, v in flatten_table(own).items() if v != flatten_table(plain).get(k) and k not in ELSEWHERE
        }
        return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:10]

    def repeat_command(self) -> str:
        """Return the command line that repeats the run."""
        own, plain = (
            flatten_table(self.to_dict()),
            flatten_table(RunConfig(name=self.name, method=METHODS[self.name]).to_dict()),
        )
        flags = [
            f"--{name.replace('_', '-')} {shell_value(value)}"
            for name, value in own.items()
            if value != plain.get(name) and name != "method.name"
        ]
        return " ".join(["sparsesoup prune", self.name, *flags])


def method_named(name: str) -> Method:
    """Return the method of that name; raise a UserError with the nearest names if there is none."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `sparsesoup methods`"
        raise UserError(f"unknown method {name!r}; {hint} (allowed: {', '.join(METHODS)})")
    return METHODS[name]


def parser_for(name: str | None) -> ConfigParser:
    """Return the parser of `prune`, with the settings of a method if one is named."""
    prog = f"sparsesoup prune {name or 'METHOD'}"
    parser = ConfigParser(prog=prog, description=_method_description(name), allow_abbrev=False, parser_mode=MODE)
    parser.add_argument("--config", type=str, help="recipe (YAML); flags override it")
    parser.add_argument("--out", type=str, default="runs", help="folder for run directories")
    parser.add_argument("--save_every", type=float, default=30.0, help="minimum seconds between checkpoints")
    cache = (
        "folder of trainings shared by runs (the dense run, IMP's rounds); existing ones are reused, new ones added, "
    )
    parser.add_argument("--cache_dir", type=str, help=cache + "and both charged in full; default: none")
    workers = "processes for weak masks, each with as many threads as this one: set OMP_NUM_THREADS"
    parser.add_argument("--workers", type=int, default=1, help=workers)
    parser.add_class_arguments(BudgetConfig)
    parser.add_class_arguments(ModelAndDataConfig)
    parser.add_argument("--train", type=TrainingConfig, default=TrainingConfig())
    if name:
        parser.add_argument("--method", type=type(method_named(name)), default=method_named(name))
    for action in parser._actions:
        if type(action).__name__ == "_ActionConfigLoad":
            action.help = argparse.SUPPRESS  # jsonargparse's config file for a group of flags: use recipes instead
    return parser


def parse_arguments(arguments: Sequence[str]) -> tuple[RunConfig, Namespace]:
    """Return (settings, other flags) from the arguments of `prune`: a method, flags, a recipe under --config."""
    arguments = [normalize_flag(a) for a in arguments]
    arguments = columns_as_list(arguments)
    given = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    recipe = _recipe_of(arguments)
    for flag, other in (("steps", "epochs"), ("epochs", "steps")):
        if any(a.partition("=")[0] == f"--{flag}" for a in arguments):
            recipe.pop(other, None)  # flags override the recipe
    name = _method_name(given, recipe)
    return _parse_flags(name, [*as_flags(recipe), *arguments])


def config_from_dict(name: str, table: dict[str, Any]) -> RunConfig:
    """Return settings from plain values, as in a recipe; checked like flags."""
    method_named(name)
    return _parse_flags(name, as_flags(table))[0]


def _parse_flags(name: str, flags: list[str]) -> tuple[RunConfig, Namespace]:
    _check_digits(flags)
    parser = parser_for(name)
    chosen = parser.parse_args(flags)
    ready = parser.instantiate(chosen)

    def part(kind: type) -> Any:
        return kind(**{f.name: ready[f.name] for f in dataclasses.fields(kind)})

    settings = RunConfig(
        name=name, method=ready.method, amount=part(BudgetConfig), place=part(ModelAndDataConfig), train=ready.train
    )
    return settings, chosen


def _check_digits(flags: Sequence[str]) -> None:
    """Raise a UserError for a number too long for a float or a message; the name of a folder may be as long."""
    for before, flag in zip(["", *flags], flags, strict=False):
        name, equals, value = flag.partition("=") if flag.startswith("--") else (before, "=", flag)
        if name[2:] not in TEXTS and equals and re.fullmatch(r"[-+]?[\d_]{30,}", value):
            told = name.replace("_", "-")
            raise UserError(f"{told} is a number of {len(value)} digits, and no setting takes one as long")


def dump_config(settings: RunConfig) -> str:
    """Return the recipe that repeats a run, with all settings."""
    head = "# every setting of this run; `sparsesoup prune --config run.yaml` repeats it\n"
    return head + yaml.safe_dump(settings.to_dict(), sort_keys=False)


def _method_description(name: str | None) -> str:
    if name:
        fixed = ", ".join(f"{f} {getattr(METHODS[name], f)}" for f in TABLE[name].fixed if f != "protocols")
        return f"{TABLE[name].summary}." + (f" Fixed here: {fixed}." if fixed else "")
    return f"Prune a model. METHOD is one of: {', '.join(METHODS)}; `prune METHOD --help` has its settings."


def _recipe_of(arguments: list[str]) -> dict[str, Any]:
    paths = [a.partition("=")[2] or (arguments[i + 1] if i + 1 < len(arguments) else "") for i, a in
             enumerate(arguments) if a.partition("=")[0] == "--config"]  # fmt: skip
    if not paths:
        return {}
    path = Path(paths[-1])
    if not paths[-1] or paths[-1].startswith("--"):
        raise UserError("--config needs a recipe, such as the run.yaml of a run")
    try:
        recipe = read_yaml(text_of(path))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot read recipe {path}: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"recipe {path} must be a table of settings, such as a run's run.yaml")
    if flags := recipe.keys() & {"help", "print_shtab", "print_config"}:
        raise UserError(f"unknown setting {min(flags)} in recipe {path}; see `sparsesoup prune --help`")
    return recipe


def _method_name(given: str | None, recipe: dict[str, Any]) -> str:
    own = recipe.get("method")
    written = own.get("name") if isinstance(own, dict) else own
    if isinstance(own, dict):
        recipe["method"] = {k: v for k, v in own.items() if k != "name"}
    else:
        recipe.pop("method", None)
    if given and written and given != written:
        raise UserError(f"the recipe is for method {written}, the command line says {given}; name one of them")
    name = given or written
    if not name:
        raise UserError(f"no method named; say `sparsesoup prune METHOD`, one of {', '.join(METHODS)}")
    method_named(str(name))
    return str(name)
