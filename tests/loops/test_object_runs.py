"""Runs of objects are ordinary runs: every command reads them, or refuses in one line what they cannot know."""

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from conftest import same
from sparsesoup import (
    DistillConfig,
    Observer,
    PrunedModel,
    TrainingConfig,
    UserError,
    benchmark,
    compare,
    evaluate_on_test,
    export,
    load_masks,
    load_packed,
    prune,
    push,
)
from sparsesoup.cli.main import main
from sparsesoup.core.files import load_table
from sparsesoup.loops.objects import prune_model
from sparsesoup.report.terminal import read_report
from tiny_hub import sentences, tokenizer
from tiny_objects import TRAIN, VALIDATION, accuracy, model_of, trainer_of

ARGS = TrainingConfig(learning_rate=5e-3, batch_size=8)
SHORT: dict[str, Any] = {"sparsity": 0.5, "steps": 12, "train": ARGS, "progress": False}


class Stop(Exception):
    """Stands for the end of a process."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[PrunedModel, Path]:
    found = prune_model("gradual", model_of(), TRAIN, VALIDATION, compute_metrics=accuracy, **SHORT)
    return found, found.save(tmp_path_factory.mktemp("saved") / "run")


def pairs(count: int = 64) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))
    return list(zip(x, x[:, :2].argmax(1), strict=True))


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


def entropy(model: nn.Module, batch: Any) -> Any:
    outputs = model(batch[0])
    return functional.cross_entropy(outputs, batch[1]), outputs


def one_line(call: Any, *given: Any, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*given, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_saved_run_has_the_files_of_a_run_and_says_what_it_cannot_know(saved: tuple[PrunedModel, Path]) -> None:
    found, run = saved
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {"run.yaml", "log.jsonl", "report.json", "report.html", "model/config.json"} <= names
    report = load_table(run / "report.json")
    assert report["validation"] == found.metrics
    assert report["cost"] == found.cost
    assert report["settings"]["objects"] == ["model", "train_dataset", "eval_dataset", "compute_metrics"]
    assert "no test split" in report["task"]
    assert report["command"].startswith("sparsesoup.prune('gradual', model=model, train_dataset=train_dataset,")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "in a run of objects" in page
    assert "12 logged steps" in page
    assert len((run / "log.jsonl").read_text(encoding="utf-8").splitlines()) == 12
    again = AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert same(again.state_dict(), found.model.state_dict())
    assert same(load_masks(run)[0], found.masks)


def test_commands_read_it(saved: tuple[PrunedModel, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, run = saved
    assert main(["show", str(run)]) == 0
    assert "no test split, since its rows were objects" in capsys.readouterr().out.replace("\n", " ")
    for form in ("dense", "packed"):
        export(run, form, tmp_path / form)
    (measured,) = benchmark(run, batch=2, length=8, rounds=3, backends=("torch",))
    assert measured["rows"]
    card = (Path(push(run, "me/pruned", out=tmp_path / "upload")) / "README.md").read_text(encoding="utf-8")
    assert "Its rows were objects in memory" in card
    assert "base_model" not in card.split("---")[1]


def test_commands_that_need_its_rows_refuse_it_in_one_line(
    saved: tuple[PrunedModel, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = saved
    for words in (
        ["test", str(run)],
        ["prune", "--config", str(run / "run.yaml")],
        ["export", str(run), "--to", "packed", "--out", str(tmp_path / "packed"), "--verify"],
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "a run of objects in memory (model, train_dataset, eval_dataset, compute_metrics)" in said
        assert said.count("\n") == 1
    assert not (tmp_path / "packed").exists()
    assert "run of objects" in one_line(evaluate_on_test, run)
    assert "is there already" in one_line(saved[0].save, run)


def test_a_killed_run_goes_on_to_the_same_bits_and_a_finished_one_is_read(tmp_path: Path) -> None:
    def call(out: Path | None, stop_at: int | None = None, **changes: Any) -> PrunedModel:
        calls = 0

        def loss(model: nn.Module, batch: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise Stop
            return model(**batch).loss

        given: dict[str, Any] = {"train_dataset": TRAIN, "eval_dataset": VALIDATION, "model": model_of(), "loss": loss}
        found = prune_model("imp-rewind", out=out, **(SHORT | given | changes))
        call.losses = calls  # type: ignore[attr-defined]
        return found

    whole = call(None)
    with pytest.raises(Stop):
        call(tmp_path, 40)
    (run,) = tmp_path.glob("objects/imp-rewind-*/seed-0")
    assert (run / "stages" / "checkpoint.json").exists()
    for other, says in (
        ({"train_dataset": TRAIN.select(range(60))}, "begun with another train_dataset"),
        ({"train_dataset": TRAIN.map(lambda row: {"labels": 1 - row["labels"]})}, "begun with another train_dataset"),
        ({"loss": lambda model, batch: 2 * model(**batch).loss}, "begun with another loss"),
    ):
        assert says in one_line(call, tmp_path, **other)
    again = call(tmp_path)
    assert again.path == run
    assert same(again.masks, whole.masks)
    assert same(again.model.state_dict(), whole.model.state_dict())
    assert again.metrics == whole.metrics
    assert again.cost["main"]["steps"] == whole.cost["main"]["steps"]
    read = call(tmp_path)
    assert call.losses == 0  # type: ignore[attr-defined]
    assert same(read.model.state_dict(), whole.model.state_dict())
    assert same(read.masks, whole.masks)
    assert read.metrics == whole.metrics
    model = model_of()
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    assert "made with another model" in one_line(call, tmp_path, model=model)
    copied = read.save(tmp_path / "copy")
    assert (copied / "report.html").exists()
    assert not (copied / "stages").exists()


def test_a_module_of_ones_own_is_saved_and_read_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {**SHORT, "loss": entropy, "out": tmp_path, "dataset": "mine/pairs"}
    found = prune_model("imp", network(), pairs(), **given)
    assert found.path is not None
    assert found.path.parent.parent == tmp_path / "mine" / "pairs"
    again = prune_model("imp", network(), pairs(), **given)
    assert same(again.model.state_dict(), found.model.state_dict())
    assert main(["show", str(found.path)]) == 0
    assert "Sequential on mine/pairs by imp" in capsys.readouterr().out
    card = (Path(push(found.path, "me/pairs", out=tmp_path / "upload")) / "README.md").read_text(encoding="utf-8")
    assert "library_name: sparsesoup" in card
    assert 'load_model(model, hf_hub_download("me/pairs", "model.safetensors"))' in card
    packed = export(found.path, "packed", tmp_path / "packed")
    kept = [[found.masks[name].numel(), int(found.masks[name].sum())] for name in ("0.weight", "2.weight")]
    rows = [{"layer": layer, "weights": each} for layer, each in zip("02", kept, strict=True)]
    assert packed.facts["layers"] == rows
    assert same(load_packed(packed.path, network()).state_dict(), found.model.state_dict())
    assert "whose class no file names" in one_line(export, found.path, "compact", tmp_path / "compact")
    assert "name of the rows" in one_line(prune_model, "imp", network(), pairs(), **(given | {"dataset": "../x"}))


def test_runs_of_objects_stand_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        str(prune_model(method, network(), pairs(), loss=entropy, out=tmp_path, **SHORT).path)
        for method in ("random", "magnitude")
    ]
    assert main(["compare", *runs, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "magnitude" in said
    assert "Validation scores: negative_loss." in said
    assert "points" not in said
    loss = float(read_report(Path(runs[1]))["validation"]["negative_loss"])
    assert f"| magnitude | {loss:.3f} |" in said


def test_saved_runs_stand_under_their_methods_and_equal_ones_under_their_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for number, (method, seed) in enumerate((("random", 0), ("random", 1), ("magnitude", 0))):
        found = prune_model(method, network(), pairs(), loss=entropy, seed=seed, **SHORT)
        runs.append(str(found.save(tmp_path / f"mine-{number}")))
    assert main(["compare", *runs, "--out", str(tmp_path)]) == 0
    heads = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()]
    assert heads[:4] == ["| method", "|---|---|---|", "| random", "| magnitude"]
    runs.append(str(found.save(tmp_path / "again")))
    assert main(["compare", *runs, "--out", str(tmp_path)]) == 0
    heads = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()]
    assert heads[2:5] == ["| random", "| mine-2", "| again"]


def test_results_stand_in_one_table_from_python(tmp_path: Path) -> None:
    inside = prune_model("random", network(), pairs(), loss=entropy, out=tmp_path, **SHORT)
    other = prune_model("magnitude", network(), pairs(), loss=entropy, **SHORT)
    assert "magnitude: 192 of 384 weights kept" in (said := one_line(compare, [inside, other], out=tmp_path))
    assert "is in memory; write it with save(folder) first" in said
    assert other.save(tmp_path / "other") == other.path
    found = compare([str(inside.path), other], out=tmp_path, name="mine")
    assert found.path == tmp_path / "studies" / "mine"
    for method, result in (("random", inside), ("magnitude", other)):
        assert f"| {method} | {result.metrics['negative_loss']:.3f} |" in found.table
    assert {Path(record["run"]) for record in found.facts["runs"]} == {inside.path, other.path}
    assert "workers: it is for a recipe" in one_line(compare, [inside, other], out=tmp_path, workers=2)
    assert "at least one" in one_line(compare, [], out=tmp_path)
    for wrong in ([inside, 3], None, inside, inside.path):
        assert "recipe: must be a recipe" in one_line(compare, wrong, out=tmp_path)


def test_the_state_of_a_run_of_objects_is_saved_as_often_as_asked(tmp_path: Path) -> None:
    class Killed(Observer):
        def step(self, record: dict[str, Any]) -> None:
            if record.get("step") == 9:
                raise Stop

    given: dict[str, Any] = {"model": network(), "train_dataset": pairs(), "loss": entropy, "progress": False}
    given |= {"sparsity": 0.5, "steps": 20}
    for every, saved in ((0.0, True), (1000.0, False)):
        with pytest.raises(Stop):
            prune("gradual", observer=Killed(), out=tmp_path / f"{every}", save_every=every, **given)
        found = [*(tmp_path / f"{every}").rglob("state-*.safetensors")]
        assert bool(found) == saved
    whole, again = (prune("gradual", out=folder, **given) for folder in (None, tmp_path / "0.0"))
    assert same(whole.model.state_dict(), again.model.state_dict())
    assert "save_every: a run in memory saves nothing" in one_line(prune, "gradual", save_every=1.0, **given)
    assert "save_every: must be a number" in one_line(prune, "gradual", save_every="1", out=tmp_path, **given)


def test_a_table_of_runs_does_not_take_the_place_of_one_of_other_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        str(prune_model("random", network(), pairs(), loss=entropy, seed=seed, **SHORT).save(tmp_path / f"run-{seed}"))
        for seed in (0, 1)
    ]
    assert main(["compare", runs[0], "--out", str(tmp_path)]) == 0
    assert main(["compare", *runs, "--out", str(tmp_path)]) == 0  # it may grow
    before = (tmp_path / "studies" / "runs" / "study.json").read_bytes()
    capsys.readouterr()
    assert main(["compare", runs[1], "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "holds a table of other runs" in said
    assert "give another --name" in said
    assert (tmp_path / "studies" / "runs" / "study.json").read_bytes() == before


@pytest.mark.parametrize("kind", ["object", "run", "dense", "setting"])
def test_a_teacher_is_a_model_a_run_or_the_dense_run(kind: str, tmp_path: Path) -> None:
    strong = prune_model("dense", model_of(), TRAIN, **SHORT)
    path = strong.save(tmp_path / "teacher")
    before = copy.deepcopy(strong.model.state_dict())
    teacher: Any = {"object": strong.model, "run": path, "setting": None}.get(kind, "dense")
    train = TrainingConfig(learning_rate=5e-3, batch_size=8, distill=DistillConfig(alpha=0.9))
    if kind == "setting":
        train = TrainingConfig(learning_rate=5e-3, batch_size=8, distill=DistillConfig(alpha=0.9, teacher=str(path)))
    given = SHORT | {"train": train, "teacher": teacher}
    found = prune_model("magnitude", model_of(), TRAIN, **given)
    assert same(strong.model.state_dict(), before)
    assert all(p.requires_grad for p in strong.model.parameters())
    plain = prune_model("magnitude", model_of(), TRAIN, **SHORT)
    assert not same(found.model.state_dict(), plain.model.state_dict())
    assert found.cost["main"]["flops"] > 1.2 * plain.cost["main"]["flops"]
    assert ("teacher" in found.cost) == (kind == "dense")
    reference = prune_model("magnitude", model_of(), TRAIN, **(given | {"teacher": strong.model}))
    assert same(found.model.state_dict(), reference.model.state_dict())


def test_the_dense_teacher_is_a_run_beside_and_survives_a_restart(tmp_path: Path) -> None:
    given = SHORT | {"loss": entropy, "teacher": "dense"}
    found = prune_model("magnitude", network(), pairs(), out=tmp_path, **given)
    assert len([*tmp_path.glob("objects/dense-*/seed-0/report.json")]) == 1
    memory = prune_model("magnitude", network(), pairs(), **given)
    assert same(found.model.state_dict(), memory.model.state_dict())
    assert found.cost["teacher"]["steps"] == 12
    other = prune_model("random", network(), pairs(), out=tmp_path, **given)
    assert other.cost["teacher"]["steps"] == 12
    assert len([*tmp_path.glob("objects/dense-*/seed-0/report.json")]) == 1


def test_distillation_of_a_model_into_itself_adds_nothing_and_leaves_padding_out() -> None:
    from sparsesoup.training.distillation import distillation_divergence

    draw = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 5, 3, generator=draw), torch.randn(2, 5, 3, generator=draw)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = distillation_divergence(one, other, 2.0, mask)
    assert torch.allclose(found[:1], distillation_divergence(one[:1, :3], other[:1, :3], 2.0))
    assert torch.allclose(found[1:], distillation_divergence(one[1:], other[1:], 2.0))


def test_a_teacher_of_other_answers_or_blocks_is_refused() -> None:
    other = model_of(num_labels=3)
    assert "the teacher answers (3,) a row" in one_line(
        prune_model, "magnitude", model_of(), TRAIN, **(SHORT | {"teacher": other})
    )
    three = TRAIN.map(lambda row, i: {"labels": i % 3}, with_indices=True)
    assert "the teacher does not take these batches" in one_line(
        prune_model, "magnitude", other, three, **(SHORT | {"teacher": model_of()})
    )
    hidden = TrainingConfig(batch_size=8, distill=DistillConfig(hidden=1.0))
    said = one_line(prune_model, "magnitude", model_of(), TRAIN, **(SHORT | {"teacher": network(), "train": hidden}))
    assert "the teacher has no block" in said
    assert "no model at" in one_line(prune_model, "magnitude", model_of(), TRAIN, **(SHORT | {"teacher": "./none"}))


def test_a_trainer_has_a_teacher_and_a_folder_of_runs_too(tmp_path: Path) -> None:
    teacher = prune_model("dense", model_of(), TRAIN, **SHORT).model
    trainer = trainer_of(tmp_path / "trainer", [], max_steps=12, save_strategy="no")
    trainer.processing_class = tokenizer(pairs=True)
    found = prune("gradual", trainer=trainer, sparsity=0.5, teacher=teacher, out=tmp_path / "runs", progress=False)
    assert isinstance(found, PrunedModel)
    assert found.path is not None
    assert (found.path / "model" / "tokenizer.json").exists()
    settings = json.loads((found.path / "report.json").read_text(encoding="utf-8"))["settings"]
    assert settings["train"]["distill"]["teacher"] == type(teacher).__name__


def test_a_name_stands_for_a_model_object(tmp_path: Path) -> None:
    model: PreTrainedModel = model_of()
    model.save_pretrained(tmp_path / "base")
    named = prune("magnitude", model=str(tmp_path / "base"), train_dataset=TRAIN, **SHORT)
    assert isinstance(named, PrunedModel)
    assert same(named.model.state_dict(), prune_model("magnitude", model, TRAIN, **SHORT).model.state_dict())
    assert named.report["model"] == str(tmp_path / "base")
    assert "leave it out" in one_line(prune, "isp", model=model, train_dataset=TRAIN, workers=2, **SHORT)
    assert "BertModel returned no loss" in one_line(prune, "magnitude", model="minilm", train_dataset=TRAIN, **SHORT)


def raw_texts(count: int, seed: int) -> datasets.Dataset:
    words, labels = zip(*sentences(count, seed), strict=True)
    return datasets.Dataset.from_dict({"said": list(words), "stars": list(labels), "nothing": ["-"] * count})


def test_a_table_of_texts_is_encoded_for_a_model_by_name(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {
        "model": str(place / "bert"), "train_dataset": raw_texts(80, 1), "dataset": "said", "text_columns": ["said"],
        "label_column": "stars", **SHORT,
    }  # fmt: skip
    found = prune("gradual", out=tmp_path, **given)
    assert isinstance(found, PrunedModel)
    assert list(found.metrics) == ["accuracy", "macro_f1"]
    assert found.report["validation_rows"] == 8  # of 80, none of them kept for a test
    assert found.report["train_rows"] == 72
    assert found.path is not None
    assert (found.path / "model" / "tokenizer.json").exists()
    own = prune("gradual", eval_dataset=raw_texts(20, 2), teacher="dense", **given)
    assert own.report["validation_rows"] == 20
    assert own.report["train_rows"] == 80
    assert own.cost["teacher"]["steps"] == 12
    assert main(["test", str(found.path)]) == 2
    assert "a run of objects in memory (train_dataset)" in capsys.readouterr().err
    for changes, says in (
        ({"train_dataset": datasets.DatasetDict({"train": raw_texts(20, 1)})}, "it is a table of splits .train.*"),
        ({"eval_dataset": {"matched": raw_texts(20, 1)}}, "eval_dataset: it is a table of splits .matched.*"),
        ({"model": model_of()}, "tables of texts or images and a model by name"),
        ({"text_column": "said"}, "did you mean|unknown setting"),
    ):
        with pytest.raises(UserError, match=says):
            prune("gradual", **(given | changes))
