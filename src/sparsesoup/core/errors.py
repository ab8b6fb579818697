"""The user-facing error: one line with the thing, the value, the allowed values and the remedy."""


class UserError(ValueError):
    """Bad input, reported in one line; the command line prints it and exits with code 2."""


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
