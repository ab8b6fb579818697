"""What a study will cost, told beforehand: equal to the meter of the finished runs, wherever data decide nothing."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sparsesoup.cli.main import main
from sparsesoup.core.granularity import Block
from sparsesoup.methods import METHODS, TABLE
from sparsesoup.methods.pruning_at_init import Snip
from sparsesoup.report.format import format_count
from sparsesoup.study.cost.flops_model import FlopsModel, plan_costs
from sparsesoup.study.dry_run import forecast_trials
from sparsesoup.study.execute.jobs import TrialJob
from sparsesoup.study.execute.progress import StudyProgress
from sparsesoup.study.recipe.plan import read_plan
from sparsesoup.training.cost import CountFlops
from tiny_bert import bert
from tiny_studies import write_recipe

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("inside")]


RECIPE = {
    "models": "bert", "datasets": "reviews", "sparsities": [0.5, 0.8], "seeds": [0, 1], "steps": 14,
    "train": {"batch_size": 8, "learning_rate": 0.003},
    "methods": {
        "dense": None, "imp": {"method": {"cut": 0.5}}, "snip": {"method": {"batches": 3}, "sparsities": 0.5},
        "taught": {
            "name": "gradual", "sparsities": 0.5,
            "train": {"distill": {"teacher": "dense"}, "batch_size": 4, "gradient_accumulation_steps": 2},
        },
    },
}  # fmt: skip
CALIBRATED = {"snip", "grasp", "wanda", "sparsegpt", "gradient-flow"}
# Masks decide when these steps end; a pass ends behind the block that it is for.
AT_MOST = {"early-bird": "search", "isp-code": "weak", "sparsegpt": "score"}


def write(**changes):
    return Path(write_recipe(RECIPE | changes))


def counted(costs):
    """A meter without its seconds."""
    return {label: {k: v for k, v in cost.items() if k != "seconds"} for label, cost in costs.items()}


def method_for(name):
    """A method whose settings suit a short run on few rows."""
    method = METHODS[name]
    if name in CALIBRATED:
        method = dataclasses.replace(method, batches=3)
    if getattr(method, "score_rate", None) is not None:
        method = dataclasses.replace(method, score_rate=1.0)
    for part in {"pattern", "tile"} & {f.name for f in dataclasses.fields(method)}:
        if getattr(method, part) == Block(32, 32):  # which the tiny model does not have
            method = dataclasses.replace(method, **{part: Block(8, 8)})
    return dataclasses.replace(method, stage=0.3, weak_steps=3) if name == "isp-paper" else method


def planned(method, problem, sparsity):
    found = plan_costs(method.plan(problem.size, sparsity), problem, FlopsModel(problem))
    return counted({label: dataclasses.asdict(cost) for label, cost in found.items()})


@pytest.mark.parametrize("name", [name for name in METHODS if name != "ticket"])
def test_a_plan_costs_to_the_flop_what_the_method_does(name):
    steps = 90 if name == "isp-paper" else 30 if TABLE[name].family == "iterative" else 40
    problem, method = bert(steps=steps), method_for(name)
    problem = dataclasses.replace(problem, training=dataclasses.replace(problem.training, eval_steps=7))
    sparsity = 0.0 if TABLE[name].dense else 0.5
    mine = planned(method, problem, sparsity)
    method.run(problem, sparsity)
    real = counted(problem.meter.to_json())
    assert real["evaluation"]["examples"] >= 2 * len(problem.validation)
    if label := AT_MOST.get(name):
        assert real[label]["steps"] < mine[label]["steps"] or label == "score"
        assert real[label]["flops"] < mine[label]["flops"]
        mine[label] = real[label]
    assert mine == real


def test_a_plan_costs_to_the_flop_what_a_training_that_may_stop_early_takes_at_most():
    problem, method = bert(steps=40), METHODS["gradual"]
    training = dataclasses.replace(problem.training, eval_steps=7, early_stopping_patience=40)
    problem = dataclasses.replace(problem, training=training)
    mine = planned(method, problem, 0.5)
    method.run(problem, 0.5)
    assert mine == counted(problem.meter.to_json())
    assert mine["evaluation"]["examples"] == 6 * len(problem.validation)  # five times, and at the end


def test_a_plan_costs_to_the_flop_what_a_warm_up_of_the_head_does():
    problem, method = bert(steps=40, head=("classifier.weight", "classifier.bias")), Snip(batches=3, warmup=0.2)
    mine = planned(method, problem, 0.5)
    method.run(problem, 0.5)
    real = counted(problem.meter.to_json())
    assert mine == real
    assert real["search"]["flops"] / 8 < 0.7 * real["main"]["flops"] / 32


@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
def test_the_price_of_any_batch_is_what_it_would_count(family):
    problem = bert(family=family)
    price = FlopsModel(problem).price_of("train")
    for rows, width in ((5, 7), (3, 4)):
        draw = torch.randint(5, 64, (rows, width))
        batch = {"input_ids": draw, "attention_mask": torch.ones_like(draw), "labels": torch.zeros(rows).long()}
        with CountFlops() as count:
            problem.training_loss(problem.pretrained, batch).backward()
        problem.pretrained.zero_grad()
        assert price(rows, width) == count.flops


def test_a_long_phase_is_estimated_from_its_first_steps(monkeypatch):
    problem, method = bert(steps=500), METHODS["gradual"]
    exact = planned(method, problem, 0.5)
    monkeypatch.setattr("sparsesoup.study.cost.flops_model.LONG", 200)
    short = planned(method, problem, 0.5)
    assert short["main"]["steps"] == exact["main"]["steps"] == 500
    assert short["main"]["flops"] != exact["main"]["flops"]
    assert short["main"]["flops"] == pytest.approx(exact["main"]["flops"], rel=0.01)


def test_a_forecast_is_what_the_finished_study_has_on_its_meters(capsys):
    plan = read_plan(write())
    found = {forecast.trial.trial_key: forecast.estimate for forecast in forecast_trials(plan, Path("runs"))}
    assert not Path("runs").exists()
    assert main(["compare", "--config", "small.yaml", "--threads", "1"]) == 0
    shared = 0
    for cell in plan.trials:
        record = json.loads(Path(f"runs/studies/small/runs/{cell.trial_key}.json").read_text())
        real, mine = record["cost"], {k: dataclasses.asdict(c) for k, c in found[cell.trial_key].costs.items()}
        for table in (real, mine):
            shared += (1 if table is mine else -1) * sum(c.pop("shared") for k, c in table.items() if k != "teacher")
            table.get("teacher", {}).pop("shared", None)
        assert counted(mine) == counted(real)
        assert found[cell.trial_key].seconds > 0
        assert found[cell.trial_key].memory > 100 * 2**20
    assert shared == 0
    capsys.readouterr()
    assert main(["compare", "--config", "small.yaml", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"{len(plan.trials)} are done" in said
    assert "left to do: 0.0 s" in said


def test_a_forecast_tells_cells_totals_what_is_shared_and_what_is_refused(capsys):
    methods = {"dense": None, "again": {"name": "dense"}, "magnitude": None, "isp-paper": None}
    write(methods=methods, seeds=0, sparsities=0.5)
    assert main(["compare", "--config", "small.yaml", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "4 runs: 42 steps" in said
    assert "sharing saves 14 steps" in said  # the same run under another name
    assert "1 would be refused" in said
    assert "isp-paper with 7 growing stages" in said
    assert not Path("runs").exists()


def test_the_time_left_is_told_from_jobs_of_the_same_row(tmp_path, monkeypatch):
    cells = read_plan(write(methods={"dense": None, "imp": {"method": {"cut": 0.5}}}, sparsities=0.5)).trials
    jobs, clock = [TrialJob(cell, tmp_path, tmp_path) for cell in cells], [0.0]
    monkeypatch.setattr("sparsesoup.study.execute.progress.time.monotonic", lambda: clock[0])
    board = StudyProgress(Console(quiet=True), jobs)
    assert board.seconds_left(1) is None
    for job, seconds in zip(jobs[:1] + jobs[2:3], (10, 30), strict=True):  # one seed of dense, one of imp
        board.begin(job)
        clock[0] += seconds
        board.end(job)
    assert board.seconds_left(1) == 10 + 30
    board.begin(jobs[3])
    clock[0] += 5
    assert board.seconds_left(1) == 10 + 25
    assert board.seconds_left(2) == (10 + 25) / 2


def test_a_dry_run_says_the_disk_of_the_whole_study_with_the_trainings_that_runs_share(capsys, monkeypatch):
    file = write(methods={"dense": None, "imp": {"method": {"cut": 0.5}}}, sparsities=[0.5, 0.8])
    found = [f.estimate for f in forecast_trials(read_plan(file), Path("runs"))]
    assert main(["compare", "--config", str(file), "--dry-run"]) == 0
    (room,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory: ")]
    stays, cached = sum(e.disk[1] for e in found), sum(e.cached for e in found)
    peak = stays + cached + max(most - stays for most, stays in (e.disk for e in found))
    parts = [format_count(size, "B") for size in (peak, cached, stays)]
    assert f"disk: {parts[0]} at the peak (at most {parts[1]} of them trainings that runs share), " in room
    assert f", {parts[2]} stay, " in room
    sizes = []

    def measure(path):
        sizes.append(sum(file.stat().st_size for file in path.glob("*.safetensors")))

    monkeypatch.setattr("sparsesoup.study.compare.remove_path", measure)
    assert main(["compare", "--config", str(file)]) == 0
    assert 0.5 * cached < sizes[-1] < 1.2 * cached  # headers and records come on top, moments may be left out
