"""Every export of one run, loaded in a fresh process and asked for the whole test split: sizes, and who agrees.

    python benchmarks/exports.py benchmarks/scratch/glue/sst2/hybrid-movement-0123456789/seed-0

Writes benchmarks/results/exports.json, of which `make tables` draws the table.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from sparsesoup.core.files import write_json
from sparsesoup.exports.verify import verified_export
from sparsesoup.report.terminal import read_report
from sparsesoup.runs.results import library_versions, machine_name

RESULT = Path(__file__).parent / "results" / "exports.json"
FORMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dense", {}), ("packed", {}), ("packed", {"zstd": True}), ("packed", {"dtype": "bf16"}), ("compact", {}),
    ("onnx", {}), ("openvino", {}), ("openvino", {"fp16": True}),
)  # fmt: skip


def verified(run: Path, to: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What an export came to."""
    facts = verified_export(run, to, folder, settings).facts
    before, after = facts["sizes"]["weights"]
    return {"to": to, **settings, "bytes": after, "share": after / before, **facts["verified"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    report = read_report(options.run)
    found: dict[str, Any] = {
        "command": report["command"],
        "machine": machine_name(),
        "versions": library_versions(),
        "exports": [],
    }
    for number, (to, settings) in enumerate(FORMS):
        with tempfile.TemporaryDirectory() as folder:
            row = verified(options.run, to, settings, Path(folder) / str(number))
        found["exports"].append(row)
        write_json(options.out, found)
        print(f"{to} {settings}: {row['same']} of {row['rows']} the same, {100 * row['share']:.1f} % of the bytes")


if __name__ == "__main__":
    main()
