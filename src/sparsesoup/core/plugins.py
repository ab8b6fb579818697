"""What other packages add to the tables of methods, tasks and export formats, by entry points."""

from importlib.metadata import entry_points
from typing import Any

from sparsesoup.core.errors import UserError


def load_plugins(group: str, kind: type[Any], taken: object) -> dict[str, Any]:
    """Return name -> object of every installed entry point of a group.

    Args:
        group: of entry points, such as `sparsesoup.methods`.
        kind: the class that each must be an instance of.
        taken: a container of the names that are in use.
    Raises: UserError naming the entry point that cannot be imported, is of another class, or has a name in use.
    """
    found: dict[str, Any] = {}
    for entry in entry_points(group=group):
        if entry.name in found or entry.name in taken:  # type: ignore[operator]
            raise UserError(f"plugin {entry.value} adds {entry.name} to {group}, a name in use; uninstall or rename it")
        try:
            found[entry.name] = entry.load()
        except Exception as error:
            text = " ".join(str(error).split())
            raise UserError(
                f"plugin {entry.value} ({group}) cannot be imported: {text}; repair or uninstall it"
            ) from error
        if not isinstance(found[entry.name], kind):
            raise UserError(
                f"plugin {entry.value} ({group}) is a {type(found[entry.name]).__name__}, where a {kind.__name__} is "
                f"needed; repair or uninstall it"
            )
    return found
