"""The user-facing error: one line with the thing, the value, the allowed values and the remedy."""

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Sequence

FLAG = re.compile(r"(`[^`]*`)|--([a-z][a-z0-9]*(?:[.-][a-z0-9]+)*)")


class UserError(ValueError):
    """Bad input, reported in one line; the command line prints it and exits with code 2.

    Args:
        message: the value, what is allowed, and the remedy.
        field: the setting concerned, such as train.learning_rate; shown as a flag on the command line, and as a
            line in a study's recipe. Empty if there is none.
        near: settings that may have been meant.
        named: settings that the message names, in the place of each {}.

    >>> error = UserError("got 0; raise --train.max-steps", "train.batch_size")
    >>> error.with_names(lambda field: f"--{field}")
    '--train.batch_size: got 0; raise --train.max-steps'
    >>> str(error)
    'train.batch_size: got 0; raise train.max_steps'
    """

    def __init__(self, message: str, field: str = "", near: Sequence[str] = (), named: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message, self.field, self.near, self.named = message, field, tuple(near), tuple(named)

    def __str__(self) -> str:
        return as_python(self.with_names(str))

    def with_names(self, spell: Callable[[str], str]) -> str:
        """Return the whole line, with the settings as a front end calls them."""
        meant = f"; did you mean {' or '.join(map(spell, self.near))}?" if self.near else ""
        message = self.message
        for name in self.named:
            message = message.replace("{}", spell(name), 1)
        return (f"{spell(self.field)}: " if self.field else "") + message + meant

    def without_field(self) -> "UserError":
        """Return the error without its setting, where the setting stands before it already."""
        return UserError(self.message, "", self.near, self.named)

    def in_group(self, group: str) -> "UserError":
        """Return the error of a setting as that of a group of settings, such as `train`."""
        field, *named = (".".join(filter(None, (group, name))) for name in (self.field, *self.named))
        return UserError(self.message, field, self.near, named)


def as_python(text: str) -> str:
    """Return a message with its flags as arguments and settings of Python; commands in backticks stay.

    >>> as_python("raise --train.learning-rate, or see `sparsesoup export --to packed`")
    'raise train.learning_rate, or see `sparsesoup export --to packed`'
    """
    return FLAG.sub(lambda found: found[1] or found[2].replace("-", "_"), text)


class Interrupted(KeyboardInterrupt):
    """An interrupt, such as Ctrl-C, of work that is saved in part: the same call resumes it."""


@contextlib.contextmanager
def mark_saved(is_saved: Callable[[], bool]) -> Iterator[None]:
    """Turn an interrupt in the block into an `Interrupted` if something is saved then."""
    try:
        yield
    except KeyboardInterrupt as error:
        if not is_saved():
            raise
        raise Interrupted from error


def require(holds: bool, setting: str, allowed: str, value: object) -> None:
    """Raise a UserError about a setting unless its condition holds.

    >>> require(False, "cut", "in (0, 1)", 2)
    Traceback (most recent call last):
    sparsesoup.core.errors.UserError: cut: must be in (0, 1), got 2
    """
    if not holds:
        shown = one_line(value)
        raise UserError(f"must be {allowed}, got {shown if len(shown) < 300 else f'{shown[:150]} ...'}", setting)


def list_names(names: Collection[object], most: int = 6) -> str:
    """Return names in one line; of many the first ones and how many more there are.

    >>> list_names(["a", "b", "c"]), list_names(["a", "b", "c"], most=2)
    ('a, b, c', 'a, b and 1 more')
    """
    shown = ", ".join(map(str, [*names][:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def one_line(text: object) -> str:
    """Return a text, such as that of an error, on one line."""
    return " ".join(str(text).split())


def root_cause(error: BaseException) -> BaseException:
    """Return the error from which an error came."""
    while error.__cause__ is not None and not isinstance(error, ConnectionError):
        error = error.__cause__
    return error


def cause_line(error: BaseException) -> str:
    """Return class and text of an error's root cause on one line."""
    cause = root_cause(error)
    return f"{type(cause).__name__}: {one_line(cause)[:200]}"
