"""What masking the lowest scores of movement does early in a training: the loss it leaves, against other choices.

    python benchmarks/ends.py

MiniLM on SST-2, scores learnt beside the weights for 80 steps of a warm-up; then a share of every matrix is masked by
the lowest scores, the highest, at random, or the smallest |w|, and the mean loss of 384 training rows is taken.
"""

import json
from pathlib import Path

import torch

from sparsesoup.hub.build import ModelAndDataConfig, build_problem, open_task
from sparsesoup.methods.gates.attach import gates_of
from sparsesoup.methods.movement import MovementPruning
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.loop import train
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState

RESULT = Path(__file__).parent / "results" / "tuning" / "ends.json"


def loss(problem: Problem, state: TrainState) -> float:
    """Mean loss of the first 384 training rows."""
    state.model.eval()
    with torch.no_grad():
        batches = [problem.train.batch(range(i, i + 64)) for i in range(0, 384, 64)]
        return sum(float(problem.training_loss(state.model, batch)) for batch in batches) / len(batches)


def mask_(state: TrainState, by: str, share: float, learnt: dict[str, torch.Tensor]) -> None:
    """Close the gates of this share of every matrix."""
    params = state.prunable_parameters()
    for name, gate in gates_of(state.model):
        ranks = {
            "lowest scores": learnt[name],
            "highest scores": -learnt[name],
            "random": torch.rand_like(learnt[name]),
            "smallest |w|": params[name].detach().abs(),
        }[by]
        assert gate.score is not None
        gate.score.data.copy_(ranks)
        gate.level.fill_(float(ranks.flatten().kthvalue(max(1, int(share * ranks.numel()))).values))


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    place = ModelAndDataConfig(dataset="glue/sst2")
    problem = build_problem(
        place, open_task(place), steps=400, training=TrainingConfig(learning_rate=2e-4, precision="bf16")
    )
    state = MovementPruning().start_run(problem, 0.7).state
    train(state, problem, 80)
    learnt = {name: gate.score.detach().clone() for name, gate in gates_of(state.model) if gate.score is not None}
    found: dict[str, object] = {"command": "python benchmarks/ends.py", "nothing masked": loss(problem, state)}
    for share in (0.02, 0.05, 0.15):
        for by in ("lowest scores", "highest scores", "random", "smallest |w|"):
            mask_(state, by, share, learnt)
            found[f"{by}, {share:g}"] = loss(problem, state)
    for what, value in found.items():
        print(f"{what:24} {value}")
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
