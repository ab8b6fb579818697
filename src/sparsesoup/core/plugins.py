"""Plugins: methods, tasks and export formats that other packages add through entry points."""

from collections.abc import Container
from importlib.metadata import entry_points
from typing import Any

from sparsesoup.core.errors import UserError, one_line


def load_plugins(group: str, kind: type[Any], taken: Container[str]) -> dict[str, Any]:
    """Return name -> object for every installed entry point of a group.

    Raises: UserError naming the entry point that cannot be imported, is not of class `kind`, or reuses a taken name.
    """
    found: dict[str, Any] = {}
    for entry in entry_points(group=group):
        if entry.name in found or entry.name in taken:
            raise UserError(f"plugin {entry.value} adds {entry.name} to {group}, a name in use; uninstall or rename it")
        try:
            found[entry.name] = entry.load()
        except Exception as error:
            message = f"plugin {entry.value} ({group}) cannot be imported: {one_line(error)}; repair or uninstall it"
            raise UserError(message) from error
        if not isinstance(found[entry.name], kind):
            raise UserError(
                f"plugin {entry.value} ({group}) is a {type(found[entry.name]).__name__}, where a {kind.__name__} is "
                f"needed; repair or uninstall it"
            )
    return found
