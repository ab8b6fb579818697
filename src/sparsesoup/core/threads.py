"""The limit on torch threads."""

import os

from sparsesoup.core.errors import UserError

MOST_THREADS = 4 * (os.cpu_count() or 1)  # far above this torch crashes


def check_threads(count: int | None) -> None:
    """Raise a UserError for more threads than this machine supports; None leaves the number to torch."""
    if (count or 0) > MOST_THREADS:
        raise UserError(f"--threads is at most {MOST_THREADS} here, four a core, got {count}")
