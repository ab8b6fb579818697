"""Asks an export in a process of its own, by the very line of Python that its export.json tells users.

A script, run as `python -P alone.py LINE` in the export's folder: arrays come in through stdin and answers go out
through stdout, each as the length of an npz file and the file. Of sparsesoup it imports only what the line names.
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
    """The arrays that stand next in a stream; None at its end."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    with np.load(io.BytesIO(stream.read(struct.unpack("<Q", head)[0]))) as file:
        return dict(file)


def write_arrays(stream: IO[bytes], arrays: Arrays) -> None:
    """Put arrays into a stream."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    stream.write(struct.pack("<Q", file.tell()) + file.getvalue())
    stream.flush()


def load_from_line(line: str) -> Callable[[Arrays], Arrays]:
    """What answers for a model that was loaded by this line."""
    names = line.partition("(")[0].split(".")
    name = names[0]
    for i in range(2, len(names)):  # a class may be of a module deep inside, as our own for open_clip's towers is
        with contextlib.suppress(ImportError):
            importlib.import_module(".".join(names[:i]))
    model = eval(line, {name: importlib.import_module(name), "folder": "."})  # our own export.json says it
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
    """Load, then answer until the stream ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    ask = load_from_line(sys.argv[1])
    write_arrays(answers, {"sparsesoup": np.array("sparsesoup" in sys.modules)})
    while (batch := read_arrays(sys.stdin.buffer)) is not None:
        write_arrays(answers, ask(batch))


if __name__ == "__main__":
    serve_answers()
