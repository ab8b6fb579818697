"""What sparsity costs while training: each figure is a ratio to its plain counterpart, paired in one process.

`make bench` prints it and writes benchmarks/results/cost.json. On MiniLM with rows of the embedded dataset.
"""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from host_work import host_work, plain_loop
from pairs import paired, seconds
from selection import SELECTIONS, selection
from sparsesoup.core.granularity import Block
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.schedules import ConstantRate
from sparsesoup.exports.bitmask_codec import decode_tensor, encode_tensor
from sparsesoup.hub.build import ModelAndDataConfig, build_problem, open_task
from sparsesoup.methods.isp import PROTOCOLS
from sparsesoup.methods.movement import MovementPruning
from sparsesoup.methods.scores import magnitude
from sparsesoup.methods.soft_movement_and_l0 import HardConcreteL0
from sparsesoup.methods.weak_masks import weak_mask, weak_mask_phase
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.driver import run_forks
from sparsesoup.training.loop import train
from sparsesoup.training.plan import ActiveRun
from sparsesoup.training.problem import Problem

RESULT = Path(__file__).parent / "results" / "cost.json"


def masked_step(problem: Problem, steps: int, rounds: int) -> dict[str, Any]:
    """A step of `train` at 90 % sparsity against a bare dense loop over the same rows. Bound: 1.05."""
    sparse, dense = problem.start_run(), problem.start_run()
    for group in dense.optimizer.param_groups:
        group["lr"] = 1e-5
    sparse.set_masks_(topk_masks(magnitude(sparse.prunable_parameters()), 0.9))

    def ours() -> None:
        sparse.step = 0
        train(sparse, problem, steps, rate=lambda step: 1e-5)

    result = paired(ours, lambda: plain_loop(problem, dense.model, dense.optimizer, steps), rounds)
    return {"bound": 1.05, "steps": steps, **result}


def weak_mask_cost(problem: Problem, rounds: int) -> dict[str, Any]:
    """A weak mask of 30 steps, fork, score, keep and return included, against its 30 training steps. Bound: 1.10."""
    state = problem.start_run()
    train(state, problem, 1)
    state.set_masks_(topk_masks(magnitude(state.prunable_parameters()), 0.5))
    protocol, rate = PROTOCOLS[0], ConstantRate(1e-5)
    phase = weak_mask_phase("stage", 30, protocol, rate, (0, 0), lambda run: weak_mask(run.state, 0.6))

    def vote() -> None:
        state.memory.clear()
        state.step = 1  # the same rows as below
        fresh = replace(problem, checkpointer=Checkpointer(problem.meter))  # in which no phase is finished
        run_forks(ActiveRun(fresh, state, phases=[phase]), [phase])

    def steps() -> None:
        state.step = 1
        train(state, problem, 30, stream=phase.stream, rate=rate, protocol=protocol)

    return {"bound": 1.10, **paired(vote, steps, rounds)}


GATED: dict[str, tuple[float, Any]] = {  # bound, method
    "movement_step": (1.35, MovementPruning()),
    "l0_step": (1.35, HardConcreteL0()),
    "block_step": (1.10, MovementPruning(pattern=Block(32, 32))),
}


def gated_step(problem: Problem, method: Any, bound: float, steps: int, rounds: int) -> dict[str, Any]:
    """A step of a learned mask in the midst of its ramp against a bare dense loop over the same rows.

    Thresholds, feedback and penalty included. The most memory that a step takes beside the dense loop's is told in
    sizes of the prunable weights; the scores, their gradient and their two moments are 4.
    """
    dense, run, ramp = problem.start_run(), method.start_run(problem, 0.9), problem.steps // 3
    state, gated = run.state, run.own
    for group in dense.optimizer.param_groups:
        group["lr"] = 1e-5

    def ours() -> None:
        state.step = ramp
        train(state, problem, steps, rate=lambda step: 1e-5, hooks=[gated.hook], penalty=gated.penalty)

    def plain() -> None:
        plain_loop(problem, dense.model, dense.optimizer, steps, ramp)

    state.step = ramp
    gated.hook(state)
    result = paired(ours, plain, rounds)
    weights = sum(p.numel() * p.element_size() for p in state.prunable_parameters().values())
    learnt = [p for group in state.optimizer.param_groups[2:] for p in group["params"]]
    kept_tensors = [*learnt, *(t for p in learnt for t in state.optimizer.state[p].values() if t.dim())]
    more = (held(ours) - held(plain) + sum(t.numel() * t.element_size() for t in kept_tensors)) / weights
    return {"bound": bound, "steps": steps, "memory_over_weights": more, **result}


def packing(rounds: int) -> dict[str, Any]:
    """BERT-base's encoder at 90 %, packed and unpacked in memory: MB of float32 a second, and share of that size.

    Bounds: 200 MB a second each way; 0.14 of the size, 0.085 with values in bf16.
    """
    draw, found = torch.Generator().manual_seed(0), {}
    dense = {f"layer.{i}.weight": torch.randn(3072, 2304, generator=draw) for i in range(12)}
    sparse = {name: w * (torch.rand(w.shape, generator=draw) < 0.1) for name, w in dense.items()}
    size = sum(w.nbytes for w in sparse.values())
    for label, kind in (("same", None), ("bf16", torch.bfloat16)):
        packed = [(name, *encode_tensor(name, w, kind)) for name, w in sparse.items()]
        parts = [(n, entry, {k.rpartition("|")[2]: t for k, t in table.items()}) for n, entry, table in packed]
        pack = min(seconds(lambda k=kind: [encode_tensor(n, w, k) for n, w in sparse.items()]) for _ in range(rounds))
        unpack = min(seconds(lambda p=parts: [decode_tensor(*row) for row in p]) for _ in range(rounds))
        share = sum(t.nbytes for _, _, table in packed for t in table.values()) / size
        found[label] = {"pack_mb_s": size / pack / 1e6, "unpack_mb_s": size / unpack / 1e6, "share": share}
    return found


def held(work: Callable[[], Any]) -> int:
    """The most bytes of tensors that live at a time during the work, as torch's own profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    most = level = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            most = max(most, level)
    return most


def measure_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a masked step, a weak mask and a step with learned masks cost."""
    torch.set_num_threads(options.threads)
    place = ModelAndDataConfig()
    problem = build_problem(place, open_task(place), steps=1000, training=TrainingConfig())
    found = {
        "masked_step": masked_step(problem, 16, options.rounds),
        "weak_mask": weak_mask_cost(problem, max(3, options.rounds // 3)),
    }
    for name, (bound, method) in GATED.items():
        found[name] = gated_step(problem, method, bound, 10, max(3, options.rounds // 2))
    for name, table in found.items():
        low, high = table["quartiles"]
        print(f"{name:12} {table['ratio']:.3f} of plain ({low:.3f} to {high:.3f}); bound {table['bound']:.3f}")
    for name in GATED:
        more = found[name]["memory_over_weights"]
        print(f"{name}: {more:.2f} weights' sizes beside a dense step's memory; bound 4.00")
    return found


def measure_selections(options: argparse.Namespace) -> dict[str, Any]:
    """Return what selections cost, on one thread and on two."""
    found = {f"selection_{threads}": selection(max(3, options.rounds // 2), threads) for threads in (1, 2)}
    for name, table in found.items():
        print(
            f"{name}: {table['share_of_read_bandwidth']:.3f} of the read bandwidth; at least {table['bound']:.2f}; "
            f"{table['over_torch_topk']:.3f} of torch.topk's time; "
            f"memory beside the scores {table['memory_over_scores']:.2f} of them; bound {table['memory_bound']:.2f}"
        )
        for scope, (bound, _, _) in SELECTIONS.items():
            print(f"{name} {scope}: {table[scope]['ratio']:.2f} plain selections; bound {bound:.1f}")
    return found


def measure_host_work(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a step costs the host beside a bare loop's."""
    torch.set_num_threads(1)
    found = host_work(options.rounds)
    print(f"host work: {found['bare_milliseconds']:.1f} ms a step of a bare loop, {found['matrices']} matrices")
    for name, row in found["more"].items():
        print(f"host work of {name}: {row['milliseconds']:+.1f} ms; bound {row['bound']:.1f}")
    return {"host_work": found}


def measure_packing(options: argparse.Namespace) -> dict[str, Any]:
    """Return what packing costs."""
    found = packing(3)
    for label, table in found.items():
        print(
            f"packing {label}: {table['pack_mb_s']:.0f} MB/s, unpacking {table['unpack_mb_s']:.0f} MB/s; bound 200; "
            f"{table['share']:.3f} of the size"
        )
    return {"packing": found}


PARTS = {"selection": measure_selections, "steps": measure_steps, "host": measure_host_work, "packing": measure_packing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of all but the selections")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=PARTS, nargs="*", default=[*PARTS], help="keep the other committed figures")
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for part in options.only:
        found |= PARTS[part](options)
    found["machine"] = f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}"
    found["command"] = "make bench"
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
