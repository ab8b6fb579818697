"""Check that the Hub is reachable."""

from collections.abc import Callable

from huggingface_hub.errors import HfHubHTTPError

PATIENCE = 5.0  # seconds to wait for the Hub; its own clients try for half a minute


def hub_is_reachable(ask: Callable[..., object], name: str) -> bool:
    """Return True if the Hub responds to a query for this name within seconds; a refusal is a response too.

    Args:
        ask: `HfApi().model_info` or `.dataset_info`.
    """
    try:
        ask(name, timeout=PATIENCE)
    except HfHubHTTPError:
        return True
    except Exception:
        # No name server, a time-out, offline mode: the exception depends on the version of the HTTP library.
        return False
    return True
