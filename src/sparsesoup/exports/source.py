"""The source of an export, a pruned model on disk; and what a format makes of it."""

import contextlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import load_table, make_folder, read_table, write_json
from sparsesoup.core.manifest import REPORT, check_model
from sparsesoup.core.masks import Masks
from sparsesoup.core.targets import block_of
from sparsesoup.core.ticket import FACTS, find_mask_folder, load_masks
from sparsesoup.exports.bitmask_codec import FILE, read_packed
from sparsesoup.exports.runtimes import ONNX_FILE, OPENVINO_FILE
from sparsesoup.hub.models.checkpoint import INDEX, WEIGHTS, weight_files
from sparsesoup.hub.models.loading import COMPACT, LOW_RANK, load_pruned
from sparsesoup.hub.models.prunable import prunable_matrices
from sparsesoup.hub.tasks import zero_shot
from sparsesoup.training.zero_hooks import zeros_of

# Tokenizers, processors, cards: no weights or pickles, and only known names, since users may keep other files there.
BESIDE = re.compile(
    r"((generation_|((video_)?pre)?processor_|tokenizer_|open_clip_)?config|tokenizer|special_tokens_map|added_tokens|vocab"
    r"|entity_vocab|emoji|byte_maps|normalizer|chat_template)\.json|(vocab|merges|dict|README)\.(txt|md)"
    r"|chat_template\.jinja|(spiece|sentencepiece(\.bpe)?|tokenizer|spm|spm_char)\.model|(source|target)\.spm"
)
OURS = ("config.json", "export.json", "benchmark.json", INDEX)


@dataclass(frozen=True)
class PreparedExport:
    """An export that is ready to be written.

    Args:
        save: writes it into an existing empty folder; may return further facts for export.json.
        size: its size, as of `size_of`; `weights` is measured after writing.
        layers: a row per layer, before and after; {"layer": name, column: [before, after], ...}.
        load: one line of code that loads it.
        notes: sentences for the user, without the full stop.
        facts: further facts for export.json.
    """

    save: Callable[[Path], dict[str, Any] | None]
    size: dict[str, int]
    layers: list[dict[str, Any]]
    load: str
    notes: Sequence[str] = ()
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PrunedSource:
    """A pruned model on disk."""

    folder: Path  # of config.json and weights, in stock, compact or packed form
    facts: dict[str, Any]  # content of its ticket
    masks: Masks | None  # name -> kept; None for a packed folder, where the zeros define them

    @property
    def is_packed(self) -> bool:
        """True if its weights are packed."""
        return (self.folder / FILE).is_file()

    def iterate_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, weights), named as in the files, one at a time."""
        if self.is_packed:
            yield from read_packed(self.folder)
            return
        for path in self.weight_files():
            try:
                with safe_open(path, framework="pt") as file:
                    for name in sorted(file.keys()):
                        yield name, file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise UserError(f"damaged model: {path} cannot be read ({error}); copy it again") from error

    def weight_files(self) -> list[Path]:
        """Return the files with weights."""
        several = [self.folder / FILE] if self.is_packed else weight_files(self.folder)
        if not several:
            raise UserError(f"no weights at {self.folder}: expected {WEIGHTS}, as save_pretrained writes it")
        if lost := [path for path in several if not path.is_file()]:
            raise UserError(f"damaged model: {lost[0]} is missing, which {INDEX} names; copy it again")
        return several

    @property
    def is_module(self) -> bool:
        """True if it has the weights of a module that is none of transformers', whose class no file names."""
        return not (self.folder / "config.json").is_file()

    def layer_of(self, name: str, shape: Sequence[int]) -> str:
        """Return the layer of a matrix in a repeated block; of a module the owner of a prunable matrix; else ''."""
        if not self.is_module:
            return block_of(name) if in_encoder(name, shape) else ""
        counted = len(shape) >= 2 if self.masks is None else name in self.masks
        return (name.rpartition(".")[0] or name) if counted else ""

    def check_zeros(self) -> None:
        """Raise a UserError if a weight that the masks prune is missing or not zero."""
        if not self.is_module:
            _ = self.model
            return
        tensors = dict(self.iterate_tensors())
        for name, mask in (self.masks or {}).items():
            if name not in tensors or tensors[name].shape != mask.shape:
                raise UserError(f"the masks in {self.folder} do not fit its weights ({name}); copy both again")
            if alive := int(torch.count_nonzero(tensors[name][~mask])):
                raise UserError(
                    f"{alive} weights of {name} in {self.folder} are not zero though its masks prune them; save the "
                    f"model as it was when the pruning ended"
                )

    @property
    def has_own_widths(self) -> bool:
        """True if its layers have widths that no stock class makes."""
        return getattr(self.model.config, COMPACT, None) is not None

    @property
    def is_low_rank(self) -> bool:
        """True if its layers are split into thin ones."""
        return not self.is_module and getattr(self.model.config, LOW_RANK, None) is not None

    @cached_property
    def model(self) -> Any:
        """The model in the class named in config.json, ready for inference."""
        if self.is_module:
            raise UserError(
                f"{self.folder} has the weights of a module that is none of transformers', whose class no file names; "
                f"export it --to dense or packed from its run, and give the module itself to torch.onnx.export or a "
                f"timer of your own"
            )
        return load_pruned(self.folder, self.masks or {}, dict(self.iterate_tensors()) if self.is_packed else None)

    def model_size(self) -> dict[str, int]:
        """Return its size, as `size_of` does."""
        weights = sum(path.stat().st_size for path in self.weight_files())
        return size_of(self.iterate_tensors(), weights, lambda name, shape: bool(self.layer_of(name, shape)))

    def copy_other_files(self, folder: Path, config: bool = True) -> None:
        """Copy all but the weights (tokenizer, processor, card), optionally config.json, and a frozen head."""
        for path in sorted(self.folder.iterdir()):
            wanted = path.name not in OURS or (config and path.name == "config.json")
            if path.is_file() and BESIDE.fullmatch(path.name) and wanted:
                shutil.copyfile(path, folder / path.name)
        for path in sorted((self.folder / "pruning").glob(f"{zero_shot.NAME}.*")):
            make_folder(folder / "pruning")
            shutil.copyfile(path, folder / "pruning" / path.name)


class ExportFormat(Protocol):
    """An export format: a frozen dataclass whose fields are its settings."""

    def make(self, source: PrunedSource) -> PreparedExport:
        """Return the export in memory; raise all errors here, before anything is written."""


def open_source(run: Path) -> PrunedSource:
    """Open the pruned model of a run directory, of a model folder with `pruning/`, or of a packed folder."""
    check_finished(run)
    if (run / FILE).is_file():
        ticket = run / "pruning" / FACTS
        return PrunedSource(run, read_table(ticket, "ticket", "copy it again") if ticket.is_file() else {}, None)
    if graph := graph_in(run):
        raise UserError(f"{run} holds a graph ({graph}), which no other form is made of; give the run it was made from")
    try:
        folder = find_mask_folder(run).parent
    except UserError as error:
        raise UserError(
            f"no run and no export at {run}: give a run directory (seed-<n>), a model folder with pruning/, or what "
            f"`sparsesoup export` wrote"
        ) from error
    if not any((folder / name).is_file() for name in ("config.json", WEIGHTS)):
        raise UserError(
            f"no model beside the masks in {folder}: expected config.json and {WEIGHTS}; give the run directory, or "
            f"the folder that `save` wrote"
        )
    masks, facts = load_masks(folder / "pruning")
    check_model(folder)
    with contextlib.suppress(OSError, ValueError):  # scores on the test split are taken after the ticket is written
        report = load_table(folder.parent / REPORT)
        facts |= {key: report[key] for key in ("test", "test_splits") if report.get(key)}
    return PrunedSource(folder, facts, masks)


def run_folder_of(path: Path) -> Path:
    """Return the run directory of a model/ folder or of the masks in it; any other path is returned unchanged."""
    model = path.parent if path.name == "pruning" else path
    return model.parent if model.name == "model" and (model.parent / "run.yaml").is_file() else path


def graph_in(folder: Path) -> str:
    """Return the file of another engine's graph in a folder; empty if there is none."""
    return next((name for name in (ONNX_FILE, OPENVINO_FILE) if (folder / name).is_file()), "")


def forget_masks(folder: Path) -> None:
    """Remove the reference to masks from the config.json of a folder that has none."""
    table = read_table(folder / "config.json")
    if (table.get("pruning_config") or {}).pop("masks", None) is not None:
        write_json(folder / "config.json", table)


def check_finished(run: Path) -> None:
    """Raise a UserError if the path is the directory of an unfinished run."""
    if (run / "run.yaml").is_file() and not (run / REPORT).is_file():
        raise UserError(
            f"{run} is not finished; repeat the `sparsesoup prune` command that started it, which resumes it"
        )


def in_encoder(name: str, shape: Iterable[int]) -> bool:
    """Return True if a weight is a matrix in a repeated block."""
    return bool(block_of(name)) and len([*shape]) >= 2


def size_of(
    tensors: Iterable[tuple[str, Tensor]], weights: int = 0, counted: Callable[[str, Sequence[int]], bool] = in_encoder
) -> dict[str, int]:
    """Return the size of a model with these weights, which take `weights` bytes on disk.

    Returns: `weights` as given, `encoder` (bytes of the matrices in its repeated blocks, unpacked), and the numbers of
        `parameters` and of `nonzero` ones.
    """
    size = {"weights": weights, "encoder": 0, "parameters": 0, "nonzero": 0}
    for name, tensor in tensors:
        size["encoder"] += tensor.nbytes if counted(name, tensor.shape) else 0
        size["parameters"] += tensor.numel()
        size["nonzero"] += int(torch.count_nonzero(tensor))
    return size


def masks_from_zeros(model: Any) -> Masks:
    """Return the masks given by a model's own zeros; fully zero matrices have none."""
    return {name: mask for name, mask in zeros_of(model, prunable_matrices(model)).items() if mask.numel()}


def largest_difference(
    found: Sequence[Tensor], expected: Sequence[Tensor], close: float, what: str, remedy: str = "", least: float = 1.0
) -> float:
    """Return the largest difference between the outputs of two models; refuse more than `close`.

    `close` is a share of the largest expected output, or of `least` if that is more; `what` and `remedy` begin and end
    the message.
    """
    pairs = list(zip(found, expected, strict=True))
    difference = float(torch.stack([(a - b).abs().max() for a, b in pairs]).max())  # NaN if any is
    largest = max(float(b.abs().max()) for _, b in pairs)
    if not difference <= close * max(largest, least):
        raise UserError(f"{what}, by {difference:.3g} of {largest:.3g}{remedy}")
    return difference
