"""Snapshots of a training state: the way back from a fork, and rewinding points."""

import secrets
import tempfile
import weakref
from pathlib import Path
from typing import Literal, get_args

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import disk_full, is_disk_full, make_folder, remove_path
from sparsesoup.core.tensor_files import TensorFile, write_tensors
from sparsesoup.training.state import Snapshot, TrainState

Storage = Literal["device", "host", "disk"]
STORAGES: tuple[str, ...] = get_args(Storage)


class SnapshotStore:
    """Take snapshots of states: on their device, in host memory, or on disk.

    All are restored to the same bits by `TrainState.restore_snapshot_`. A file is removed with the last reference to
    its snapshot.

    Args:
        storage: device, host or disk. On a CPU the first two are the same.
        folder: folder of the files; None: that of the system for temporary files.
    Raises: UserError if it is none of these.

    >>> SnapshotStore("disk").storage
    'disk'
    """

    def __init__(self, storage: str = "device", folder: Path | None = None) -> None:
        if storage not in STORAGES:
            raise UserError(f"expected {', '.join(STORAGES)}, got {storage!r}", "snapshots")
        self.storage, self.folder = storage, folder

    def take(self, state: TrainState) -> Snapshot:
        """Return a snapshot of a state: weights, buffers, moments, masks, step, memory, notes.

        Raises: UserError if the disk is full.
        """
        if self.storage == "device":
            return state.take_snapshot()
        if self.storage == "host":
            return Snapshot({n: t.detach().to("cpu", copy=True) for n, t in state.tensors().items()}, state.facts())
        return Snapshot(self._written(state), state.facts())

    def _written(self, state: TrainState) -> TensorFile:
        folder = self.folder or Path(tempfile.gettempdir())
        make_folder(folder)
        path = folder / f".snapshot-{secrets.token_hex(8)}.part"  # a run removes what it finds of this name
        try:
            write_tensors(path, {name: t.detach() for name, t in state.tensors().items()})
            file = TensorFile(path)
        except BaseException as error:
            remove_path(path)
            if isinstance(error, OSError) and is_disk_full(error):
                raise UserError(disk_full(path, error)) from error
            raise
        weakref.finalize(file, remove_path, path)
        return file
