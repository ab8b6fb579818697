"""Rename keys of the committed results where the library has renamed them; no number changes.

    python benchmarks/rewrite_results.py

Commands stay as they were run, with the commit they ran at.
"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
KEYS = {"strong": "main", "asked": "target"}  # old -> new


def with_new_keys(value: Any) -> Any:
    """The value with the present names of its keys."""
    if isinstance(value, dict):
        return {KEYS.get(key, key): with_new_keys(part) for key, part in value.items()}
    return [with_new_keys(part) for part in value] if isinstance(value, list) else value


def main() -> None:
    for path in sorted(RESULTS.rglob("*.json")):
        text = path.read_text(encoding="utf-8")
        old = json.loads(text)
        if (new := with_new_keys(old)) != old:
            indent = len(text.splitlines()[1]) - len(text.splitlines()[1].lstrip())
            path.write_text(json.dumps(new, indent=indent) + "\n", encoding="utf-8")
            print(path)


if __name__ == "__main__":
    main()
