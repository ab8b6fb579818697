#!/bin/sh
# Everything that has to be on a GPU to be seen, in at most ten minutes: benchmarks/gpu.sh FOLDER
# FOLDER gets tests.json (each test of the mark gpu with its outcome), gpu.json (steps, selection) and semi_structured.json.
set -u
OUT=${1:?give a folder for the results}
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python}
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="$PWD/src:$PWD/tests:$PWD/tests/methods:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
$PYTHON -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA device is there" >&2; exit 2; }
failed=0
timeout 310 $PYTHON -m pytest -m gpu --junitxml "$OUT/tests.xml" tests/gpu tests/exports/test_semi_structured.py || failed=1
$PYTHON - "$OUT" <<'PY' || failed=1
import json, sys
from pathlib import Path
from xml.etree import ElementTree

out, kinds = Path(sys.argv[1]), ("failure", "error", "skipped")
cases = ElementTree.parse(out / "tests.xml").iter("testcase")
found = {
    f"{case.get('classname')}::{case.get('name')}": {
        "outcome": next((kind for kind in kinds if case.find(kind) is not None), "passed"),
        "seconds": float(case.get("time") or 0),
    }
    for case in cases
}
(out / "tests.json").write_text(json.dumps(found, indent=1) + "\n")
PY
timeout 190 $PYTHON benchmarks/gpu.py --out "$OUT" || failed=1
timeout 80 $PYTHON benchmarks/semi_structured.py --rounds 5 --out "$OUT/semi_structured.json" || failed=1
exit $failed
