"""Run an export in its own process, loaded by the line of Python in its export.json.

A script, run as `python -P subprocess_runner.py LINE` in the export's folder: pickled arrays by name come through stdin
and go through stdout, batch by batch, since a test split of images may exceed memory and disk. It imports from
sparsesoup only what the line names.
"""

import contextlib
import importlib
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]


def load_from_line(line: str) -> Callable[[Arrays], Arrays]:
    """Load a model by this line of Python; return a function that runs it."""
    names = line.partition("(")[0].split(".")
    for i in range(2, len(names)):  # the class may be in a nested module, as ours for open_clip's towers
        with contextlib.suppress(ImportError):
            importlib.import_module(".".join(names[:i]))
    # The line comes from our own export.json.
    model = eval(line, {names[0]: importlib.import_module(names[0]), "folder": "."})
    return {"onnxruntime": onnx_runner, "openvino": openvino_runner}.get(names[0], _torch_runner)(model)


def _torch_runner(model: Any) -> Callable[[Arrays], Arrays]:
    import torch

    def infer(batch: Arrays) -> Arrays:
        with torch.no_grad():
            found = model.eval()(**{name: torch.from_numpy(array) for name, array in batch.items()}, return_dict=True)
        return {name: t.double().numpy() for name, t in found.items() if isinstance(t, torch.Tensor)}

    return infer


def onnx_runner(session: Any) -> Callable[[Arrays], Arrays]:
    """Return a function that runs a session of ONNX Runtime, inputs and outputs by name."""
    names, given = [o.name for o in session.get_outputs()], [i.name for i in session.get_inputs()]
    return lambda batch: dict(zip(names, session.run(None, {name: batch[name] for name in given}), strict=True))


def openvino_runner(model: Any) -> Callable[[Arrays], Arrays]:
    """Return a function that runs a compiled model of OpenVINO, inputs and outputs by name."""
    names, given = [o.any_name for o in model.outputs], [i.any_name for i in model.inputs]

    def infer(batch: Arrays) -> Arrays:
        found = model({name: batch[name] for name in given})
        return {name: found[i] for i, name in enumerate(names)}

    return infer


def serve_answers() -> None:
    """Load the model, say whether it needed sparsesoup, then serve inputs until the stream ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output printed by libraries must not mix with the results
    infer = load_from_line(sys.argv[1])
    pickle.dump("sparsesoup" in sys.modules, answers)
    answers.flush()
    batches: Any = sys.stdin.buffer
    while batches.peek(1):
        pickle.dump(infer(pickle.load(batches)), answers)
        answers.flush()


if __name__ == "__main__":
    serve_answers()
