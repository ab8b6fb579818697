"""The user-facing error: one line with the thing, the value, the allowed values and the remedy."""


class UserError(ValueError):
    """Bad input, reported in one line; the command line prints it and exits with code 2."""
