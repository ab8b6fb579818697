"""How many threads torch may be given."""

import os

from sparsesoup.core.errors import UserError

MOST_THREADS = 4 * (os.cpu_count() or 1)  # far above it torch ends in a crash


def check_threads(count: int | None) -> None:
    """Raise a UserError for more threads than this machine bears; None is as many as torch takes."""
    if (count or 0) > MOST_THREADS:
        raise UserError(f"--threads is at most {MOST_THREADS} here, four a core, got {count}")
