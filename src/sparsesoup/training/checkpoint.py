"""Checkpoints: finished stages of a run on disk, so that a killed run resumes where it stopped."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import load_table, remove_path, write_table
from sparsesoup.core.tensor_files import load_tensors, save_tensors
from sparsesoup.training.cost import CostTracker
from sparsesoup.training.state_files import open_state, save_state

CHECKPOINT = "checkpoint.json"
SHARE = 50  # a save may cost at most 1/50 of the time since the last one


class Checkpointable(Protocol):
    """A state that can be saved and loaded."""

    def tensors(self) -> dict[str, Tensor]: ...
    def facts(self) -> dict[str, Any]: ...
    def load_state_(self, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None: ...


class Checkpointer:
    """The finished stages, the current stage, and the state to resume from.

    A method runs its work as named stages. A restarted run skips the finished ones and loads the state after the last;
    code between stages must not read the state, since it is stale while stages are skipped. A stage that trains must
    do so first and only once, so that `save_if_due` can also save in the middle of it.

    Args:
        meter: costs, saved and restored with the state, so that no step is lost or counted twice.
        folder: checkpoint folder; None disables checkpoints.
        every: minimum seconds between saves; longer if a save takes more than a fiftieth of that.
        position: further state to save (the end of the log), with `rewind` to return to it; 0 is the beginning.
    """

    def __init__(
        self,
        meter: CostTracker,
        folder: Path | None = None,
        every: float = 30.0,
        position: Callable[[], Any] = lambda: 0,
        rewind: Callable[[Any], None] = lambda at: None,
    ) -> None:
        self.meter, self.folder, self.every, self.position = meter, folder, every, position
        self.finished: list[str] = []
        self.held: list[str] = []
        self.open: str | None = None
        self._owner: Checkpointable | None = None
        self._stored: dict[str, dict[str, Tensor]] = {}
        self._partial: tuple[str, int] | None = None
        self._saved: str | None = None
        self._digests: dict[str, str] = {}  # of the files in the checkpoint folder; older versions recorded none
        self._run, self._read_run, self._over = 1, 1, False
        self._given: dict[str, dict[str, float]] | None = None
        self._last, self._took = time.monotonic(), 0.0
        rewind(self._read_position(folder / CHECKPOINT) if folder is not None and (folder / CHECKPOINT).exists() else 0)

    @property
    def resumed_stage(self) -> str | None:
        """The stage from which a restarted run resumes; None for a fresh run."""
        if self._partial:
            return f"the middle of {self._partial[0]}"
        return self.finished[-1] if self.finished else None

    @property
    def is_mid_stage(self) -> bool:
        """Return True if the current stage resumes from a checkpoint in its middle."""
        return self._partial is not None and self._partial[0] == self.open

    def begin_run(self, meter: CostTracker) -> None:
        """Begin a run: stages finished by earlier runs on the same problem are dropped, and so are their costs.

        The first run resumes from the loaded checkpoint, unless that belongs to a later run. A second call within a
        run, before its end or an error, has no effect.
        """
        if self._given is None:
            self._given = meter.to_json()
        if self._over:
            self._run, self._over = self._run + 1, False
        elif self._read_run == self._run:
            return
        self._read_run = self._run
        self.finished, self.held, self._partial = [], [], None
        self.close()
        meter.restore(self._given)

    def end_run(self) -> None:
        """End a run: the next one on the same problem starts over."""
        self._over = True

    def run_stage(
        self, name: str, state: Checkpointable, work: Callable[..., object], *args: Any, hold: bool = False
    ) -> None:
        """Call `work(*args)` once in the lifetime of the run.

        Args:
            name: name of the stage, unique in the run.
            state: the state changed by the work; restored instead of working if this was the last finished stage.
            hold: keep this stage's state on disk to the end and restore it on every restart (a rewinding point).
        """
        if name in self.finished:
            if name in self.held or (name == self.finished[-1] and not self._partial):
                self._restore_state(state, f"held-{name}" if name in self.held else self._saved)
            return
        self.open, self._owner = name, state
        try:
            work(*args)
        except BaseException:
            self.end_run()
            raise
        self.open = self._owner = self._partial = None
        self.finished.append(name)
        if hold:
            self.held.append(name)
        if hold or self._save_is_due():
            self._save_state(state, f"held-{name}" if hold else None)

    def resume_step(self, state: Checkpointable, until: int) -> int:
        """Return the step to train to: `until`, or the step saved within the stage, whose state is then loaded."""
        if self._partial and self.is_mid_stage and self._owner is state:
            self._restore_state(state, self._saved)
            return self._partial[1]
        return until

    def will_save(self, state: Checkpointable) -> bool:
        """Return True if `save_if_due` would save the state now."""
        return self._owner is state and self._save_is_due()

    def save_if_due(self, state: Checkpointable, until: int, ending: bool = False) -> None:
        """Save the state if a save is due; called after each step of a training to step `until`.

        Before an error ends the run (`ending`), save if a restart could skip a finished stage.
        """
        if self._owner is state and (self._save_is_due() or (ending and self.finished)):
            self._partial = (str(self.open), until)
            self._save_state(state)

    @contextmanager
    def without_saving(self) -> Iterator[None]:
        """Disable saving in this block: the state is a copy, and a restart starts the current stage over."""
        owner, self._owner = self._owner, None
        try:
            yield
        finally:
            self._owner = owner

    def put_artifact(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep an artifact (a round's trained ticket) until the end of the run: on disk if there is a folder.

        Call it in the stage that makes the artifact. A rerun stage writes the same artifact again, so a name stands for
        one artifact in the lifetime of the run.
        """
        if self.folder is None:
            self._stored[name] = {k: t.detach().clone() for k, t in tensors.items()}
            return
        path = self.folder / f"stored-{name}.safetensors"
        self._digests[path.name] = save_tensors(path, tensors)

    def get_artifact(self, name: str) -> dict[str, Tensor]:
        """Return the artifact of that name, on the CPU if loaded from disk; do not modify it.

        Raises: UserError if its file is missing or damaged.
        """
        if self.folder is None:
            return self._stored[name]
        path = self.folder / f"stored-{name}.safetensors"
        with _refuse_damaged("artifact", path):
            return load_tensors(path, self._digests.get(path.name))[0]

    def close(self) -> None:
        """Remove the saved states and artifacts, which are no longer needed."""
        self._stored.clear()
        self._digests.clear()
        self._saved = None
        for file in self.folder.glob("*.safetensors") if self.folder else ():
            remove_path(file)

    def _save_is_due(self) -> bool:
        return time.monotonic() - self._last >= max(self.every, SHARE * self._took)

    def _save_state(self, state: Checkpointable, name: str | None = None) -> None:
        if self.folder is None:
            return
        began, before = time.monotonic(), self._saved
        self._saved = name or ("state-b" if before == "state-a" else "state-a")
        path = self.folder / f"{self._saved}.safetensors"
        self._digests[path.name] = save_state(path, state.tensors(), state.facts())
        # The checkpoint file names the state: a kill between the two writes leaves the old pair intact.
        entry = {"finished": self.finished, "held": self.held, "partial": self._partial, "saved": self._saved}
        costs = {"meter": self.meter.to_json(), "given": self._given}
        old = f"{before}.safetensors" if before and before != self._saved and not before.startswith("held-") else ""
        self._digests.pop(old, None)
        rest = {"run": self._run, "position": self.position(), "digests": self._digests}
        write_table(self.folder / CHECKPOINT, entry | costs | rest)
        if old:
            remove_path(self.folder / old)
        self._last = time.monotonic()
        self._took = self._last - began

    def _read_position(self, path: Path) -> Any:
        """Load the checkpoint of an earlier run; return the saved position."""
        with _refuse_damaged("checkpoint", path):
            entry = load_table(path)
            self.finished, self.held, self._saved = entry["finished"], entry["held"], entry["saved"]
            self._partial = (entry["partial"][0], entry["partial"][1]) if entry["partial"] else None
            self.meter.restore(entry["meter"])
            self._read_run, self._given = entry.get("run", 1), entry.get("given")
            self._digests = dict(entry.get("digests", {}))
            return entry["position"]

    def _restore_state(self, state: Checkpointable, name: str | None) -> None:
        path = Path(str(self.folder)) / f"{name}.safetensors"
        with _refuse_damaged("state", path), open_state(path, self._digests.get(path.name)) as (tensors, facts):
            state.load_state_(tensors, facts)


@contextmanager
def _refuse_damaged(what: str, path: Path) -> Iterator[None]:
    """Turn the errors of reading a file of a checkpoint into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"damaged {what} {path} ({error}); remove {path.parent} to start over") from error
