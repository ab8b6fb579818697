"""Whether the Hub can be asked."""

from collections.abc import Callable

from huggingface_hub.errors import HfHubHTTPError

PATIENCE = 5.0  # seconds for the Hub's first answer; its own clients try for half a minute


def hub_is_reachable(ask: Callable[..., object], name: str) -> bool:
    """Whether the Hub says anything about this name within seconds; a refusal is an answer too.

    Args:
        ask: `HfApi().model_info` or `.dataset_info`.
    """
    try:
        ask(name, timeout=PATIENCE)
    except HfHubHTTPError:
        return True
    except Exception:
        # No name server, a time-out, offline mode: the error differs by the version of the HTTP library.
        return False
    return True
