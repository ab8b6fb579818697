"""Export formats of a pruned model. A format is a module here and a row in `FORMATS`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import DIGESTS, atomic_write, digest_of, digests_of, load_table, write_table
from sparsesoup.core.manifest import EXPORT
from sparsesoup.core.plugins import load_plugins
from sparsesoup.core.settings import fill_settings
from sparsesoup.exports.compact import CompactFormat, load_compact
from sparsesoup.exports.dense import DenseFormat
from sparsesoup.exports.graphs import OnnxFormat, OpenVinoFormat
from sparsesoup.exports.low_rank import LowRankFormat, load_low_rank
from sparsesoup.exports.packed import PackedFormat, load_packed
from sparsesoup.exports.semi_structured import SemiStructuredFormat, load_semi_structured
from sparsesoup.exports.source import ExportFormat, open_source

WEIGHTS = (".safetensors", ".onnx", ".onnx.data", ".bin")  # extensions of weight files
SOURCE = ("method", "model", "dataset", "local", "seed", "sparsity", "validation", "test", "test_splits")

__all__ = [
    "FORMATS", "FormatInfo", "WrittenExport", "load_compact", "load_low_rank", "load_packed", "load_semi_structured",
    "write_export",
]  # fmt: skip


@dataclass(frozen=True)
class FormatInfo:
    """A row of the table of formats.

    Args:
        format: its dataclass, whose fields are its command-line flags.
        summary: short description.
        gain: benefit for the user.
    """

    format: type[Any]
    summary: str
    gain: str


FORMATS = {
    "dense": FormatInfo(
        DenseFormat, "the stock folder, pruned weights zero", "loads everywhere; neither smaller nor faster"
    ),
    "packed": FormatInfo(PackedFormat, "one bit per weight and the nonzero values", "small on disk; unpacked for use"),
    "compact": FormatInfo(
        CompactFormat, "heads and feed-forward units without weights cut out", "smaller and faster everywhere"
    ),
    "low-rank": FormatInfo(
        LowRankFormat, "two thin layers instead of each one", "smaller and faster where the rank is low enough"
    ),
    "onnx": FormatInfo(OnnxFormat, "the compact model as a graph", "ONNX Runtime and others run it, without torch"),
    "openvino": FormatInfo(OpenVinoFormat, "the compact model as OpenVINO's graph", "OpenVINO runs it, without torch"),
    "semi-structured": FormatInfo(
        SemiStructuredFormat,
        "the stock folder with 2:4 matrices",
        "faster on GPUs that skip their zeros (from compute capability 8.0 on); experimental, not yet run on one",
    ),
}

FORMATS |= load_plugins("sparsesoup.exports", FormatInfo, FORMATS)


@dataclass(frozen=True)
class WrittenExport:
    """The folder of an export and the content of its export.json."""

    path: Path
    facts: dict[str, Any]


def format_named(name: str, settings: Mapping[str, Any]) -> ExportFormat:
    """Return the format of that name with these settings."""
    if name not in FORMATS:
        raise UserError(f"unknown format {name!r}; allowed: {', '.join(FORMATS)}")
    known = [f.name for f in fields(FORMATS[name].format)]
    if unknown := [key for key in settings if key not in known]:
        raise UserError(f"format {name} has no setting {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    made: ExportFormat = fill_settings(FORMATS[name].format(), settings)
    return made


def write_export(run: Path, to: str, out: Path, settings: Mapping[str, Any] | None = None) -> WrittenExport:
    """Export a run, a model folder with `pruning/` or another export to a folder, with settings of the format.

    Raises: UserError for bad input, before anything is written.
    """
    format, source = format_named(to, settings or {}), open_source(run)
    _check_out(out, source.folder)
    before, product = source.model_size(), format.make(source)
    with atomic_write(out) as temporary:
        temporary.mkdir()
        more = product.save(temporary) or {}
        files = sorted(str(p.relative_to(temporary)) for p in temporary.rglob("*") if p.is_file())
        weights = sum((temporary / f).stat().st_size for f in files if f.endswith(WEIGHTS) and "/" not in f)
        after = product.size | {"weights": weights}
        facts = {
            "format": 1,
            "to": to,
            "settings": dict(vars(format)),
            "source": {key: source.facts[key] for key in SOURCE if key in source.facts},
            "sizes": {key: [value, after[key]] for key, value in before.items()},
            "layers": product.layers,
            "load": product.load,
            "notes": [*product.notes],
            **product.facts,
            **more,
            "files": [*files, EXPORT],
            DIGESTS: digests_of(temporary, files),
        }
        write_table(temporary / EXPORT, facts)
    return WrittenExport(out, facts)


def _check_out(out: Path, source: Path) -> None:
    """Raise a UserError unless `out` is free, or holds only an earlier export."""
    try:
        here, there, work = out.resolve(), source.resolve(), Path.cwd()
    except RuntimeError as error:  # raised for a cycle of links before Python 3.13
        raise UserError(f"--out {out} is a link that leads to itself; give another folder") from error
    if here == work or here in work.parents:
        raise UserError(f"--out {out} is the folder you are in, or one above it; give a folder that does not exist")
    if here == there or here in there.parents:
        raise UserError(f"--out {out} holds the model that is exported; give another folder")
    if out.is_file():
        raise UserError(f"--out {out} is a file; give a folder that does not exist")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    earlier = _earlier_files(out)
    named = {*earlier, "benchmark.json"}
    named |= {str(parent) for name in named for parent in Path(name).parents}
    other = sorted(name for path in out.rglob("*") if (name := str(path.relative_to(out))) not in named)
    if other or not earlier:
        first = other[0] if other else out.name
        raise UserError(f"--out {out} holds something else ({first}); give a folder that does not exist")


def _earlier_files(out: Path) -> list[str]:
    """Return the unchanged files of an earlier export in a folder."""
    try:
        facts = load_table(out / EXPORT)
        digests, files = dict(facts.get(DIGESTS, {})), [str(name) for name in facts["files"]]
        return [name for name in files if name not in digests or digest_of(out / name) == digests[name]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
