"""Run an export in its own process, loaded by the line of Python in its export.json.

A script, run as `python -P alone.py LINE` in the export's folder: input arrays come through stdin and outputs go
through stdout, each as the length of an npz file and the file. It imports from sparsesoup only what the line names.
"""

import contextlib
import importlib
import io
import os
import struct
import sys
from collections.abc import Callable
from typing import IO, Any

import numpy as np

Arrays = dict[str, np.ndarray]


def read_arrays(stream: IO[bytes]) -> Arrays | None:
    """Read the next arrays from a stream; None at its end."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    with np.load(io.BytesIO(stream.read(struct.unpack("<Q", head)[0]))) as file:
        return dict(file)


def write_arrays(stream: IO[bytes], arrays: Arrays) -> None:
    """Write arrays to a stream."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    stream.write(struct.pack("<Q", file.tell()) + file.getvalue())
    stream.flush()


def load_from_line(line: str) -> Callable[[Arrays], Arrays]:
    """Load a model by this line of Python; return a function that runs it."""
    names = line.partition("(")[0].split(".")
    name = names[0]
    for i in range(2, len(names)):  # the class may be in a nested module, as ours for open_clip's towers
        with contextlib.suppress(ImportError):
            importlib.import_module(".".join(names[:i]))
    model = eval(line, {name: importlib.import_module(name), "folder": "."})  # the line comes from our own export.json
    return {"onnxruntime": _graph_runner, "openvino": _openvino_runner}.get(name, _torch_runner)(model)


def _torch_runner(model: Any) -> Callable[[Arrays], Arrays]:
    import torch

    def ask(batch: Arrays) -> Arrays:
        with torch.no_grad():
            found = model.eval()(**{name: torch.from_numpy(array) for name, array in batch.items()}, return_dict=True)
        return {name: t.double().numpy() for name, t in found.items() if isinstance(t, torch.Tensor)}

    return ask


def _graph_runner(session: Any) -> Callable[[Arrays], Arrays]:
    names, given = [o.name for o in session.get_outputs()], [i.name for i in session.get_inputs()]
    return lambda batch: dict(zip(names, session.run(None, {name: batch[name] for name in given}), strict=True))


def _openvino_runner(model: Any) -> Callable[[Arrays], Arrays]:
    names, given = [o.any_name for o in model.outputs], [i.any_name for i in model.inputs]

    def ask(batch: Arrays) -> Arrays:
        found = model({name: batch[name] for name in given})
        return {name: found[i] for i, name in enumerate(names)}

    return ask


def serve_answers() -> None:
    """Load the model, then serve inputs until the stream ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output printed by libraries must not mix with the results
    ask = load_from_line(sys.argv[1])
    write_arrays(answers, {"sparsesoup": np.array("sparsesoup" in sys.modules)})
    while (batch := read_arrays(sys.stdin.buffer)) is not None:
        write_arrays(answers, ask(batch))


if __name__ == "__main__":
    serve_answers()
