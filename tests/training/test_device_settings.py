"""Settings of the device and of its arithmetic: their defaults, what they change, and what refuses them."""

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import sparsesoup
from conftest import Net, same, tiny
from sparsesoup.cli.compare import read_study_arguments
from sparsesoup.cli.main import main
from sparsesoup.cli.prune import parse_arguments
from sparsesoup.core.errors import UserError
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.targets import Target
from sparsesoup.methods import METHODS, Method
from sparsesoup.methods.scores import magnitude
from sparsesoup.runs.config import RunConfig, config_from_dict
from sparsesoup.study.cost.flops_model import FlopsModel, plan_costs
from sparsesoup.training import backends
from sparsesoup.training import device as devices
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.loop import train
from sparsesoup.training.optimizers import BITSANDBYTES, OPTIMIZERS
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState
from tiny_bert import bert

NAMES = (*OPTIMIZERS, *BITSANDBYTES)
BASE = TrainingConfig(learning_rate=1e-2, batch_size=16)
GPU = torch.device("cuda", 0)


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that runs are on a CUDA device of some capability."""

    def pretend(found: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
        monkeypatch.setattr("sparsesoup.training.config.current_device", lambda: GPU)

    return pretend


def wide(**changes: Any) -> Problem:
    """The tiny problem with matrices that are large enough for moments of 8 bits."""
    torch.manual_seed(1)
    net = Net(80)
    targets = {n: Target("other", tuple(p.shape)) for n, p in net.named_parameters() if n == "wide.weight"}
    return tiny(pretrained=net, targets=targets, **changes)


def prune_half(state: TrainState) -> None:
    state.set_masks_(topk_masks(magnitude(state.prunable_parameters()), 0.5))


def weights(state: TrainState) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in state.model.named_parameters()}


def test_the_default_precision_is_that_of_the_device(capability: Any) -> None:
    assert TrainingConfig().mixed_precision == "no"
    capability((9, 0))
    assert TrainingConfig().mixed_precision == "bf16"
    assert TrainingConfig(precision="no").mixed_precision == "no"
    capability((7, 5))
    assert TrainingConfig().mixed_precision == "no"


def test_a_record_has_the_precision_that_was_used_and_the_key_of_a_default_run_stays(capability: Any) -> None:
    method = METHODS["gradual"]
    plain = RunConfig(name="gradual", method=method)
    key = plain.run_key()
    assert plain.to_dict()["train"]["precision"] == "no"
    assert replace(plain, train=TrainingConfig(precision="no")).run_key() == key
    capability((8, 0))
    assert plain.to_dict()["train"]["precision"] == "bf16"
    assert plain.run_key() == key
    assert replace(plain, train=TrainingConfig(precision="no")).run_key() != key


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"precision": "fp16"}, "train.precision: fp16 needs a CUDA device, and runs are on cpu; use bf16 or no"),
        ({"tf32": True}, "train.tf32: cpu has no TF32; leave it out"),
    ],
)
def test_what_a_cpu_lacks_is_refused(training: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        TrainingConfig(**training).check_device()
    assert str(caught.value) == message
    with pytest.raises(UserError, match=message.partition(":")[0]):
        tiny(training=TrainingConfig(**training)).start_run()


def test_what_an_old_gpu_lacks_is_refused(capability: Any) -> None:
    capability((7, 5))
    for given in ({"precision": "bf16"}, {"tf32": True}):
        with pytest.raises(UserError, match="cuda:0 has no"):
            TrainingConfig(**given).check_device()
    TrainingConfig(precision="fp16").check_device()
    TrainingConfig().check_device()
    capability((8, 0))
    TrainingConfig(precision="bf16", tf32=True).check_device()


@pytest.mark.parametrize("flags", [["--train.precision", "fp16"], ["--train.tf32"]])
def test_the_command_line_refuses_in_one_line(
    flags: list[str], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["prune", "magnitude", "--model", str(place / "bert"), "--dataset", str(place / "reviews")]
    assert main([*line, "--steps", "4", *flags, "--out", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"sparsesoup: {flags[0]}: ")
    assert "\n" not in said
    assert not (tmp_path / "runs").exists()


def test_a_study_with_a_precision_that_is_not_there_is_refused_before_any_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "study.yaml"
    recipe.write_text(
        f"models: {place / 'bert'}\ndatasets: {place / 'reviews'}\nsparsities: 0.5\nseeds: 0\nsteps: 4\n"
        "train: {precision: fp16}\nmethods: [magnitude]\n"
    )
    assert main(["compare", "--config", str(recipe), "--out", str(tmp_path / "runs")]) == 2
    assert "train.precision: fp16 needs a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_a_missing_library_is_refused_in_one_line(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = ["prune", "magnitude", "--model", str(place / "bert"), "--dataset", str(place / "reviews")]
    assert main([*line, "--steps", "4", "--train.optim", name, "--out", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err.strip()
    assert said == (
        f"sparsesoup: --train.optimizer: {name} needs bitsandbytes, which is not installed; pip install "
        "'sparsesoup[optimizers]', or use adamw"
    )


def test_optim_is_another_name_of_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    settings, _ = parse_arguments(["gradual", "--train.optim", "sgd"])
    assert settings == parse_arguments(["gradual", "--train.optimizer", "sgd"])[0]
    assert settings == config_from_dict("gradual", {"train": {"optim": "sgd"}})
    assert main(["prune", "gradual", "--train.optim", "adam_w"]) == 2
    assert "--train.optimizer: expected one of adamw, adam, sgd" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_masks_hold_after_every_step_of_every_optimizer(name: Any) -> None:
    problem = wide(training=replace(BASE, optimizer=name, weight_decay=0.1))
    seen = []

    def look(state: TrainState) -> None:
        mask = state.masks["wide.weight"]
        seen.append(int(state.model.wide.weight[~mask].count_nonzero()))  # type: ignore[union-attr,index]

    state = train(problem.start_run(), problem, 3)
    prune_half(state)
    for _ in range(6):
        train(state, problem, 1)
        look(state)
    assert seen == [0] * 6
    assert (state.model.wide.weight == 0).sum() == 80 * 240 // 2  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NAMES)
def test_training_in_two_halves_from_a_saved_state_is_training_at_once(name: Any) -> None:
    problem = wide(training=replace(BASE, optimizer=name))
    once = train(problem.start_run(), problem, 8)
    first = train(problem.start_run(), problem, 4)
    saved = {key: t.clone() for key, t in first.tensors().items()}
    then = problem.start_run()
    then.load_state_(saved, first.facts())
    assert not same(weights(first), weights(train(then, problem, 4)))
    assert same(weights(once), weights(then))


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_the_moments_of_8_bits_are(name: Any) -> None:
    problem = wide(training=replace(BASE, optimizer=name))
    state = train(problem.start_run(), problem, 2)
    kinds = {t.dtype for t in state.optimizer.state[state.model.wide.weight].values() if isinstance(t, Tensor)}  # type: ignore
    assert torch.uint8 in kinds
    before = {k: t.clone() for k, t in state.tensors().items() if t.dtype == torch.uint8}
    prune_half(state)
    assert same(before, {k: state.tensors()[k] for k in before})  # code 0 is not the number 0


@pytest.mark.parametrize("name", ["adafactor", "adamw_bnb_8bit"])
def test_a_penalty_that_needs_mean_squares_is_refused_without_them(name: Any) -> None:
    problem = wide(training=replace(BASE, optimizer=name), steps=60)
    with pytest.raises(UserError, match=r"^train.optimizer: this method's penalty needs a mean square"):
        replace(METHODS["l0"], score_rate=1.0).run(problem, 0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["gradual", "movement", "l0", "platon", "imp"])
def test_gradient_checkpointing_changes_no_bit(name: str) -> None:
    def run(on: bool) -> Any:
        training = TrainingConfig(learning_rate=1e-3, batch_size=8, gradient_checkpointing=on)
        problem = bert(training=training, steps=40)
        return problem, small(METHODS[name]).run(problem, 0.5)

    (_, plain), (problem, found) = run(False), run(True)
    assert same(found.weights, plain.weights)
    assert same(found.masks, plain.masks)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in problem.pretrained.modules())
    assert found.cost["main"]["flops"] > plain.cost["main"]["flops"]  # the second forward pass is counted
    mode = problem.pretrained.training
    planned = plan_costs(small(METHODS[name]).plan(problem.size, 0.5), problem, FlopsModel(problem))
    assert {label: cost.flops for label, cost in planned.items()} == {k: c["flops"] for k, c in found.cost.items()}
    assert problem.pretrained.training == mode
    assert not any(getattr(module, "gradient_checkpointing", False) for module in problem.pretrained.modules())


def small(method: Method) -> Method:
    changes = {"window": {"every_steps": 4, "window": 2}, "score_rate": {"score_rate": 1.0}, "rounds": {"rounds": 2}}
    found = next((changes[key] for key in changes if getattr(method, key, None)), {})
    return replace(method, **found)  # type: ignore[type-var,arg-type]


def test_a_model_without_blocks_refuses_gradient_checkpointing() -> None:
    with pytest.raises(UserError, match=r"^train.gradient_checkpointing: Net has no gradient checkpointing"):
        tiny(training=replace(BASE, gradient_checkpointing=True)).start_run()


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile without a C++ compiler: the graph that torch.compile finds runs as it is."""
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda model: plain(model, backend="aot_eager"))


@pytest.mark.usefixtures("captured")
def test_a_compiled_model_keeps_its_names_its_flops_and_its_masks() -> None:
    def run(on: bool) -> tuple[Problem, TrainState]:
        problem = tiny(training=replace(BASE, torch_compile=on))
        problem.pretrained.dropout.p = 0.0  # type: ignore[union-attr]
        state = problem.start_run()
        prune_half(state)
        return problem, train(state, problem, 6)

    (eager, plain), (problem, state) = run(False), run(True)
    assert state.model._compiled_call_impl is not None
    assert state.tensors().keys() == plain.tensors().keys()
    assert same(state.masks, plain.masks)
    for name, p in state.model.named_parameters():
        torch.testing.assert_close(p, dict(plain.model.named_parameters())[name], rtol=1e-4, atol=1e-5)
    assert all((p[~state.masks[n]] == 0).all() for n, p in state.prunable_parameters().items())
    assert problem.meter.costs["main"].flops == eager.meter.costs["main"].flops
    assert problem.pretrained._compiled_call_impl is None


@pytest.mark.slow
def test_a_compiled_run_is_near_the_plain_one(place: Path, tmp_path: Path) -> None:
    """By the compiler that users have; takes a C++ compiler on a CPU."""
    more: dict[str, Any] = {"model": str(place / "bert"), "dataset": str(place / "reviews"), "sparsity": 0.5}
    train = {"batch_size": 8, "torch_compile": True}
    run = sparsesoup.prune("gradual", **more, steps=12, train=train, out=tmp_path, progress=False)
    assert run.report["sparsity"]["reached"] == pytest.approx(0.5, abs=1e-3)


def test_the_device_of_a_call_is_its_own(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(devices.VARIABLE, raising=False)
    more: dict[str, Any] = {"model": str(place / "bert"), "dataset": str(place / "reviews"), "steps": 4}
    with pytest.raises(UserError, match=r"^device: torch .* finds no cuda:7 here"):
        sparsesoup.prune("magnitude", **more, out=tmp_path, device="cuda:7")
    run = sparsesoup.prune("magnitude", **more, out=tmp_path, device="cpu", progress=False)
    assert devices.VARIABLE not in os.environ
    with pytest.raises(UserError, match="finds no cuda:7"):
        sparsesoup.evaluate_on_test(run.path, device="cuda:7")
    assert sparsesoup.evaluate_on_test(run.path, device="cpu")
    with pytest.raises(UserError, match="finds no cuda:7"):
        sparsesoup.compare({}, device="cuda:7")


def test_a_problem_outlives_the_device_of_a_call() -> None:
    problem = tiny()
    with devices.device_chosen("cpu"):
        state = train(problem.start_run(), problem, 1)
    assert not AcceleratorState._shared_state
    assert problem.accelerator.device == torch.device("cpu")
    train(state, problem, 1)


@pytest.mark.parametrize("name", ["cuda:7", "gpu"])
def test_compare_refuses_a_device_that_is_not_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--config", "table3", "--device", name]) == 2
    assert capsys.readouterr().err.startswith("sparsesoup: --device: ")


def test_compare_leaves_the_devices_of_ray_to_ray() -> None:
    with pytest.raises(UserError, match="device is for runs on this machine; Ray gives each run its own"):
        read_study_arguments(["--config", "table3", "--executor", "ray", "--device", "cpu"])


class Pretended:
    """An accelerator on a device that is not here."""

    def __init__(self, device: str) -> None:
        self.device, self.num_processes = torch.device(device), 1


@pytest.fixture
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(backends.WORKSPACE, raising=False)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]


@pytest.mark.usefixtures("switches")
def test_determinism_and_tf32_are_set_on_a_gpu_and_taken_back(capability: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    capability((9, 0))
    monkeypatch.setattr(backends, "Accelerator", lambda mixed_precision: Pretended("cuda:0"))

    def found() -> tuple[bool, bool, str, str]:
        conv = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        product = torch.backends.cuda.matmul.fp32_precision
        return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic, product, conv

    backends.make_accelerator(TrainingConfig())
    assert found() == (False, False, "ieee", "ieee")
    assert backends.WORKSPACE not in os.environ
    backends.make_accelerator(TrainingConfig(full_determinism=True, tf32=True))
    assert found() == (True, True, "tf32", "tf32")
    assert os.environ[backends.WORKSPACE] == ":4096:8"
    backends.make_accelerator(TrainingConfig())
    assert found() == (False, False, "ieee", "ieee")
    torch.use_deterministic_algorithms(True)  # by the user, in whose process this is
    backends.make_accelerator(TrainingConfig())
    assert torch.are_deterministic_algorithms_enabled()


def test_a_cpu_needs_no_determinism() -> None:
    problem = tiny(training=replace(BASE, full_determinism=True))
    plain = tiny()
    found = [dict(train(p.start_run(), p, 5).model.named_parameters()) for p in (plain, problem)]
    assert not torch.are_deterministic_algorithms_enabled()
    assert same(*found)
