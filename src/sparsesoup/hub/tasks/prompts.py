"""Prompts for CLIP: sentences with class names."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sparsesoup.core.errors import UserError, one_line

HOLE = "{}"  # placeholder of the class name
PLAIN = ("a photo of a {}.",)
DIGITS = ('a photo of the number: "{}".',)
SIGNS = ('a zoomed in photo of a "{}" traffic sign.',)
OBJECTS = ("a photo of a {}.", "a blurry photo of a {}.", "a small photo of a {}.", "a photo of the {}.")
CARS = ("a photo of a {}.", "a photo of the {}, a type of car.", "a photo of the parked {}.")
# Part of a dataset's name -> its templates. Radford et al. 2021, sec. 3.1.4, explain their benefit.
KNOWN = {"mnist": DIGITS, "svhn": DIGITS, "gtsrb": SIGNS, "cifar": OBJECTS, "cars": CARS}


def templates_of(asked: str | None, dataset: str) -> tuple[str, ...]:
    """Return the prompt templates for class names.

    `asked` is a sentence with {} for the name, or a file with one per line; None uses those of the dataset.
    Raises: UserError if the file cannot be read, or a sentence has no {}.

    >>> templates_of("a picture of my {}.", "cifar10"), templates_of(None, "mnist")
    (('a picture of my {}.',), ('a photo of the number: "{}".',))
    """
    if asked is None:
        return next((found for part, found in KNOWN.items() if part in dataset.lower()), PLAIN)
    found = _read_lines(asked) if os.path.isfile(asked) else (asked,)
    for line in found:
        if HOLE not in line:
            raise UserError(
                f"the prompt {line!r} has no {HOLE} where the class name goes, and is no file with one prompt a line; "
                f"say 'a photo of a {HOLE}.'",
                "prompts",
            )
    return _require_different(found, "prompt", "prompts")


def names_of(asked: str | None, labels: Sequence[str], numbered: bool, dataset: str) -> tuple[str, ...]:
    """Return the class names for prompts.

    `asked` holds names in the labels' order, separated by commas, or is a file with one per line; None uses the labels,
    unless they are `numbered`.
    Raises: UserError if names are missing, too few, too many, empty or repeated.

    >>> names_of(None, ["grand_piano", "tick"], False, "objects")
    ('grand piano', 'tick')
    """
    if asked is None and numbered:
        raise UserError(
            f"the {len(labels)} classes of {dataset} are numbers without names, which a CLIP's prompts need; say "
            f"a file of one name a line, or name,name,...",
            "class_names",
        )
    found = tuple(labels) if asked is None else _read_lines(asked) if os.path.isfile(asked) else tuple(asked.split(","))
    found = tuple(" ".join(name.replace("_", " ").split()) for name in found)
    if len(found) != len(labels):
        lost = f" (there is no file {asked})" if asked and "," not in asked and not os.path.isfile(asked) else ""
        raise UserError(
            f"{len(found)} names are given{lost}, {dataset} has {len(labels)} classes; give one each", "class_names"
        )
    if not all(found):
        raise UserError(f"class {found.index('')} of {dataset} has an empty name; name it", "class_names")
    return _require_different(found, "class name", "class_names")


def _read_lines(path: str) -> tuple[str, ...]:
    try:
        found = tuple(line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}; give a text file") from error
    if not found:
        raise UserError(f"{path} is empty, where at least one line is needed; check the file")
    return found


def _require_different(found: tuple[str, ...], what: str, field: str) -> tuple[str, ...]:
    twice = [name for name, count in Counter(found).items() if count > 1]
    if twice:
        raise UserError(f"the {what} {twice[0]!r} is there twice, so that nothing tells them apart; correct it", field)
    return found
