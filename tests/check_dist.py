"""Build the wheel and the sdist, install each into an empty environment, and run the README's example there.

    python tests/check_dist.py [--out dist] [--steps 30]

The example is the README's block of Python, run in an empty folder; the shell's `sparsesoup methods` follows it.
`--steps` changes its number of steps, for a quicker look (at least 30).
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def built(out: Path) -> list[Path]:
    """Build both; the wheel is made of the sdist, so that neither can hold what the other lacks."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], check=True)
    newest = [max(out.glob(pattern), key=lambda path: path.stat().st_mtime) for pattern in ("*.whl", "*.tar.gz")]
    return [path.resolve() for path in newest]


def members(path: Path) -> set[str]:
    """Names of the package's files in a wheel or an sdist, from `sparsesoup/` on."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
    else:
        with tarfile.open(path) as sdist:
            names = [name.partition("/src/")[2] for name in sdist.getnames()]
    return {name for name in names if name.startswith("sparsesoup/")}


def check_files(path: Path) -> None:
    """Every file that git has below src/, data included, and no other one."""
    listed = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {name.removeprefix("src/") for name in listed.splitlines()}
    lacking, more = tracked - members(path), {m for m in members(path) - tracked if Path(m).suffix}
    if lacking or more:
        raise SystemExit(f"{path.name}: lacks {sorted(lacking)}, holds {sorted(more)}, which git does not")


def example(steps: int | None) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    return code if steps is None else re.sub(r"\bsteps=\d+", f"steps={steps}", code)


def check_install(path: Path, code: str) -> None:
    """Install into a fresh environment and run there, in an empty folder, without this clone on the path."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as made:
        folder, empty = Path(made) / "venv", Path(made) / "empty"
        empty.mkdir()
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pinned = ["-c", str(ROOT / "constraints.txt"), f"sparsesoup[demo] @ {path.as_uri()}"]
        for line in (
            ["python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pinned],
            ["python", "-c", code],
            ["sparsesoup", "methods"],
        ):
            subprocess.run([str(folder / "bin" / line[0]), *line[1:]], cwd=empty, env=clean, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    for path in built(options.out):
        check_files(path)
        check_install(path, example(options.steps))
        print(f"{path.name}: installs into an empty environment and runs the README's example", flush=True)


if __name__ == "__main__":
    main()
