"""What 2:4 matrices gain on a GPU: whole encoders and single matrices, dense against 2:4, in turn in one process.

    python benchmarks/semi_structured.py [--out benchmarks/results/semi_structured.json]

Needs torch, transformers and a CUDA device of compute capability 8.0 or more; no data, no download, no installation.
Weights are random and cut to 2:4 by magnitude, which takes the same time as any other 2:4.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, functional
from torch.sparse import to_sparse_semi_structured

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from sparsesoup.core.masking import topk_masks  # noqa: E402
from sparsesoup.core.timing import time_interleaved  # noqa: E402
from sparsesoup.exports.semi_structured import (  # noqa: E402
    KINDS,
    missing_device_support,
    to_semi_structured_,
    why_unsupported,
)

SHAPES = {  # name -> (hidden size, feed-forward units, heads, layers)
    "MiniLM-L6": (384, 1536, 12, 6),
    "BERT-base": (768, 3072, 12, 12),
    "BERT-large": (1024, 4096, 16, 24),
}
BATCHES = ((1, 128), (32, 128), (256, 128), (32, 512))
MATRICES = ((384, 1536), (768, 768), (3072, 768), (1024, 4096), (4096, 4096), (16384, 4096))  # (out, in)
TOKENS = (4096, 32768)


def encoder(name: str, layers: int | None = None) -> Any:
    """A BERT of that shape, the matrices of its layers 2:4 by magnitude."""
    from transformers import BertConfig, BertModel

    hidden, units, heads, depth = SHAPES[name]
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": units, "num_attention_heads": heads}
    model = BertModel(BertConfig(**sizes, num_hidden_layers=layers or depth), add_pooling_layer=False).eval()
    linear = {where: part for where, part in model.encoder.named_modules() if isinstance(part, Linear)}
    masks = topk_masks({where: part.weight.detach().abs() for where, part in linear.items()}, 0.5, scope="2:4")
    with torch.no_grad():
        for where, part in linear.items():
            part.weight.mul_(masks[where])
    return model


def names_of(model: Any) -> list[str]:
    """The weights that torch has a 2:4 kernel for."""
    inside = ((f"encoder.{where}.weight", part) for where, part in model.encoder.named_modules())
    return [name for name, part in inside if isinstance(part, Linear) and not why_unsupported(part, part.weight)]


def compared(calls: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, Any]:
    """Milliseconds of each, median and quartiles, how many times as fast 2:4 is, and how far the answers are apart."""
    try:
        one, other = (call() for call in calls.values())
        took = time_interleaved([*calls.values()], rounds)
    except RuntimeError as error:  # a kernel that this GPU or torch lacks is a result too
        return {"error": " ".join(str(error).split())[:300]}
    parts = [statistics.quantiles([1000 * second for second in seconds], n=4) for seconds in took]
    rows = [dict(zip(("low", "median", "high"), part, strict=True)) for part in parts]
    table: dict[str, Any] = dict(zip(calls, rows, strict=True))
    apart = float((one - other).abs().max()) / float(one.abs().max())
    return {**table, "gain": table["dense"]["median"] / table["sparse"]["median"], "relative_difference": apart}


def held() -> int:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@torch.no_grad()
def encoders(rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each shape, type and batch."""
    for name in SHAPES:
        for kind in KINDS:
            start = held()
            dense = encoder(name).to("cuda", kind)
            middle = held()
            sparse = copy.deepcopy(dense)
            try:
                to_semi_structured_(sparse, names_of(sparse), verify=True)
            except (RuntimeError, ValueError) as error:
                yield {"model": name, "dtype": str(kind), "error": " ".join(str(error).split())[:300]}
                continue
            sizes = {"dense_bytes": middle - start, "sparse_bytes": held() - middle}
            for rows, length in BATCHES:
                ids = torch.randint(0, 30000, (rows, length), device="cuda")
                mask = torch.ones_like(ids)
                calls = {
                    "dense": lambda m=dense, i=ids, a=mask: m(i, attention_mask=a).last_hidden_state,
                    "sparse": lambda m=sparse, i=ids, a=mask: m(i, attention_mask=a).last_hidden_state,
                }
                row = {"model": name, "dtype": str(kind), "rows": rows, "length": length}
                yield {**row, **sizes, **compared(calls, rounds)}
            del dense, sparse


@torch.no_grad()
def matrices(rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each single matrix, type and count of tokens."""
    for out, into in MATRICES:
        for kind in KINDS:
            weight = torch.randn(out, into, device="cuda", dtype=kind)
            weight *= topk_masks({"": weight.abs()}, 0.5, scope="2:4")[""]
            try:
                half = to_sparse_semi_structured(weight)
            except RuntimeError as error:
                yield {"out": out, "in": into, "dtype": str(kind), "error": " ".join(str(error).split())[:300]}
                continue
            bias = torch.zeros(out, device="cuda", dtype=kind)
            for tokens in TOKENS:
                x = torch.randn(tokens, into, device="cuda", dtype=kind)
                calls = {
                    "dense": lambda x=x, w=weight, b=bias: functional.linear(x, w, b),
                    "sparse": lambda x=x, w=half, b=bias: functional.linear(x, w, b),
                }
                yield {"out": out, "in": into, "dtype": str(kind), "tokens": tokens, **compared(calls, rounds)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "semi_structured.json")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    if why := missing_device_support("cuda"):
        print(f"2:4 matrices cannot be timed here: {why}", file=sys.stderr)
        return 2
    import transformers

    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "versions": versions, "rounds": options.rounds}
    for part, rows in (("matrices", matrices(options.rounds)), ("encoders", encoders(options.rounds))):
        found[part] = []
        for row in rows:
            found[part].append(row)
            what = " ".join(str(v) for v in row.values() if not isinstance(v, dict | float))
            times = [f"{key} {row[key]['median']:.3f} ms" for key in ("dense", "sparse") if key in row]
            gain = f"{row['gain']:.2f} times as fast" if "gain" in row else ""
            print(", ".join([what, *times, gain]), flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(found, indent=1) + "\n")  # after each row: a lease may end
    return 0


if __name__ == "__main__":
    sys.exit(main())
