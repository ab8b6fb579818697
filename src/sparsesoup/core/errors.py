"""The one error that a user may cause: a single line that names the thing, the value, the allowed and the remedy."""


class UserError(ValueError):
    """Bad input, said in one line; the command line prints it and ends with exit code 2."""
