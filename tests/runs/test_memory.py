"""What a run needs of memory and disk is known from its plan, and said before anything is loaded."""

from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from conftest import tiny
from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.methods import METHODS
from sparsesoup.runs import memory
from sparsesoup.runs.memory import disk_of, extra_memory, free_disk, free_memory, memory_remedies, state_sizes
from sparsesoup.training.config import DistillConfig, TrainingConfig
from sparsesoup.training.loop import train
from sparsesoup.training.plan import Phase
from sparsesoup.training.snapshots import STORAGES, SnapshotStore
from sparsesoup.training.state_files import save_state
from tiny_hub import arguments, base_model, run_of

CPU = torch.device("cpu")


def sized(optimizer="adamw", extrapolate=0.0):
    problem = tiny(steps=40, training=TrainingConfig(optimizer=optimizer, extrapolate=extrapolate, batch_size=16))
    return problem, state_sizes(problem.pretrained, problem.targets, problem.training)


def of_kind(state, kind):
    return sum(t.nbytes for name, t in state.tensors().items() if name.startswith(kind) and t.numel() > 1)


@pytest.mark.parametrize("extrapolate", [0.0, 0.5])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "rmsprop"])
def test_sizes_are_those_of_a_real_state(optimizer, extrapolate, tmp_path):
    problem, sizes = sized(optimizer, extrapolate)
    state = train(problem.start_run(), problem, 1)
    assert sizes.weights == of_kind(state, "model/")
    assert sizes.moments == of_kind(state, "optimizer/")
    assert 4 * sizes.snapshot == 4 * (sizes.weights + sizes.moments + of_kind(state, "masks/"))
    save_state(tmp_path / "s", state.tensors(), state.facts())
    assert (tmp_path / "s").stat().st_size == pytest.approx(sizes.saved, rel=0.2)  # names are much of so small a file
    snapshot = SnapshotStore("disk", tmp_path).take(state)
    assert snapshot.tensors.path.stat().st_size == pytest.approx(sizes.snapshot, rel=0.2)


def test_sizes_need_no_weights():
    problem, sizes = sized()
    assert state_sizes(problem.pretrained.to("meta"), problem.targets, problem.training) == sizes


def test_snapshots_count_where_they_are():
    problem, sizes = sized()
    for name, held, stages in (("isp", 1, 0), ("imp-rewind", 1, 1), ("imp", 0, 0), ("gradual", 0, 0)):
        phases = METHODS[name].plan(problem.size, 0.7)
        beside = {place: extra_memory(phases, sizes, problem.training, CPU, place) for place in STORAGES}
        assert beside["device"] == beside["host"] == beside["disk"] + held * sizes.snapshot
        assert beside["disk"] >= sizes.prunable // 4  # masks
        copies = round(max(phase.copies for phase in phases) * sizes.prunable)  # such as the votes
        disk = {place: disk_of(phases, sizes, place) for place in STORAGES}
        assert disk["disk"][0] == disk["device"][0] + held * sizes.snapshot
        assert disk["device"][0] == disk["device"][1] + (2 + stages) * sizes.saved + 2 * copies
    isp = METHODS["isp"].plan(problem.size, 0.7)
    gpu = [extra_memory(isp, sizes, problem.training, torch.device("cuda"), place) for place in STORAGES]
    assert gpu[0] == gpu[1] + sizes.snapshot == gpu[2] + sizes.snapshot
    own = METHODS["sparse-progressive-distillation"].plan(problem.size, 0.7)  # a teacher, which no saved state holds
    assert extra_memory(own, sizes, problem.training, CPU, "disk") == sizes.weights + sizes.prunable // 4
    assert not any(phase.copies or (phase.label == "teacher" and phase.keeps_moments) for phase in own)
    stopped = replace(problem.training, eval_steps=5, early_stopping_patience=2)
    assert extra_memory(phases, sizes, stopped, CPU, "disk") == beside["disk"] + sizes.weights


def test_a_container_with_a_limit_has_no_more_than_that(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    whole = free_memory(CPU)
    assert whole == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    for name, text in (("max", "1000000\n"), ("current", "900000\n"), ("stat", "anon 5\ninactive_file 300000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_memory(CPU) == 400_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) > 400_000


def test_the_disk_is_that_of_the_nearest_folder(tmp_path):
    assert free_disk(tmp_path / "a" / "b") == pytest.approx(free_disk(tmp_path), rel=0.1)
    assert free_disk(Path("runs")) > 0


@pytest.mark.integration
def test_too_little_memory_is_said_before_anything_is_loaded(place, tmp_path, capsys, monkeypatch):
    line = arguments(place, "isp", tmp_path)

    def stop(*_, **more):
        raise UserError("loaded")

    with monkeypatch.context() as patch:
        patch.setattr("sparsesoup.hub.build.load_model", stop)
        assert main(line) == 2
        assert "of memory" not in capsys.readouterr().err
        patch.setattr(memory, "free_memory", lambda device: 1000)
        assert main(line) == 2
        note, error = [said for said in capsys.readouterr().err.splitlines() if "memory" in said or "loaded" in said]
    assert note.startswith("note: this run needs at least ")
    assert note.endswith(
        "kB of memory besides activations, and 1.00 kB are free here: it may be killed; use --snapshots disk or a "
        "smaller --model"
    )
    assert error == "sparsesoup: loaded"
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    assert main(line) == 0  # a warning alone
    capsys.readouterr()
    assert main(line) == 0  # a finished run needs nothing
    assert "of memory" not in capsys.readouterr().err
    assert (run_of(tmp_path) / "report.json").exists()


@pytest.mark.integration
def test_a_dry_run_says_what_memory_and_disk_are_needed_and_free(place, tmp_path, capsys, monkeypatch):
    line = [*arguments(place, "isp", tmp_path / "runs"), "--dry-run"]
    assert main(line) == 0
    told = capsys.readouterr().out
    (room,) = [said for said in told.splitlines() if said.startswith("memory: ")]
    assert room.count("at the peak") == room.count("are free") == 2
    assert "note: this run needs" not in told
    monkeypatch.setattr("sparsesoup.study.dry_run.fresh_memory", lambda device: 1000)
    monkeypatch.setattr("sparsesoup.study.dry_run.free_disk", lambda folder: 1000)
    assert main(line) == 0
    notes = [said for said in capsys.readouterr().out.splitlines() if said.startswith("note: this run needs")]
    assert "of memory, and 1.00 kB are free here: it may be killed; use a smaller --train.batch-size (" in notes[0]
    assert notes[0].endswith("), --train.gradient-checkpointing true, --snapshots disk or a smaller --model")
    assert "of disk, and 1.00 kB are free in " in notes[1]
    assert not (tmp_path / "runs").exists()


def test_a_remedy_is_named_where_it_needs_less_memory() -> None:
    model = base_model("bert")
    sizes = state_sizes(model, find_prunable(model), TrainingConfig())
    plain, fork = [Phase(name="train", steps=4)], [Phase(name="weak", steps=4, kind="fork")]
    gpu = torch.device("cuda")

    def remedies(phases, device=CPU, place="device", model=None, **training):
        return memory_remedies(phases, sizes, TrainingConfig(**training), device, place, model)

    assert remedies(plain) == remedies(fork, place="disk") == ["a smaller --model"]
    assert remedies(fork) == remedies(fork, place="host") == ["--snapshots disk", "a smaller --model"]
    assert remedies(fork, gpu) == ["--snapshots host or disk", "a smaller --model"]
    assert remedies(fork, gpu, "host") == ["a smaller --model"]  # they are not on the device
    first, second, _ = remedies(plain, model=model)
    assert first.startswith("a smaller --train.batch-size (")
    assert second == "--train.gradient-checkpointing true"
    assert remedies(plain, model=model, batch_size=1, gradient_checkpointing=True) == ["a smaller --model"]
    stops = remedies(plain, eval_steps=2, early_stopping_patience=2, distill=DistillConfig(teacher="dense"))
    assert stops == ["no --train.early-stopping-patience", "no --train.distill.teacher", "a smaller --model"]
