"""What is read is what was written, or one line says which file is not; what was there before stays."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from conftest import same
from mutations import SAME, SILENT, TOLD, TRACE, alike, line_of, subjects, trial, undamaged
from sparsesoup import load_compact, prune
from sparsesoup.cli.main import main
from sparsesoup.cli.prune import parse_arguments
from sparsesoup.core.errors import UserError
from sparsesoup.core.files import load_table, write_json
from sparsesoup.exports import write_export
from sparsesoup.hub.models.loading import load_as_saved
from sparsesoup.runs.run import fill_default_sparsity
from sparsesoup.training.cost import Cost
from sparsesoup.training.train_cache import CachedTraining, TrainingCache
from tiny_exports import pruned
from tiny_hub import older, sparsesoup

pytestmark = pytest.mark.integration

TRIALS = 96


@pytest.fixture(scope="module")
def kinds(place, tmp_path_factory):
    """Everything that can be damaged, and what each gives undamaged; no test writes to it."""
    folder = tmp_path_factory.mktemp("kinds")
    found = subjects(place, folder)
    return {kind.name: (kind, undamaged(kind, folder / "scratch")) for kind in found}


def finished(kinds, to):
    """A copy of a finished run, where the command that drew it finds it."""
    run = kinds["run"][0].folder
    return shutil.copytree(run, to.joinpath(*run.parts[-3:]))


def again(place, run):
    return line_of(place, run.parents[2], "magnitude", "--steps", "6")


@pytest.fixture
def refused(capsys):
    """Runs a command that must be refused; what it says."""

    def check(line, *parts):
        capsys.readouterr()
        assert main([str(word) for word in line]) == 2
        out, errors = capsys.readouterr()
        assert out == ""
        (said,) = errors.splitlines()
        for part in parts:
            assert part in said, said
        return said

    return check


@pytest.mark.parametrize("number", range(8))
def test_a_damaged_file_is_told_in_one_line_or_changes_nothing(number, kinds, tmp_path):
    (kind, before) = [*kinds.values()][number % len(kinds)]
    found = [trial(kind, before, tmp_path / "copy", i) for i in range(number, TRIALS, 8)]
    assert not [told for came, told in found if came in (SILENT, TRACE)]
    assert any(came == TOLD for came, _ in found)


def test_readings_are_compared_to_the_bit():
    assert alike({"a": (torch.ones(2), [1])}, {"a": (torch.ones(2), [1])})
    assert not alike({"a": torch.ones(2)}, {"a": torch.tensor([1.0, 1.0 + 1e-7])})
    assert (SAME, TOLD) != (SILENT, TRACE)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "pruning/masks.safetensors", "pruning/ticket.json"]
)
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_finished_run_with_a_damaged_model_is_not_called_well(file, how, kinds, place, tmp_path, refused):
    run = finished(kinds, tmp_path)
    path = run / "model" / file
    if how == "gone":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[-40] ^= 4
        path.write_bytes(data)
    refused(again(place, run), str(path), f"put it back, or remove {run}", "keep it in a separate folder")
    refused(["push", run, "me/x", "--dry-run", "--out", tmp_path / "out"], str(path))
    refused(["test", run], str(path))
    if file != "pruning/masks.safetensors" or how == "changed":  # without them it is no ticket
        refused(["export", run, "--to", "dense", "--out", tmp_path / "out"], str(path.name))
    assert not (tmp_path / "out").exists()


def test_a_model_that_was_saved_anew_in_a_run_is_told_and_one_of_its_own_is_taken(kinds, place, tmp_path, refused):
    run = finished(kinds, tmp_path)
    model = load_as_saved(str(run))
    with torch.no_grad():
        model.classifier.bias.add_(1.0)
    shutil.copytree(run / "model", tmp_path / "mine")
    for folder in (run / "model", tmp_path / "mine"):
        model.save_pretrained(folder)
    refused(again(place, run), "model.safetensors", "if it was changed on purpose, keep it in a separate folder")
    assert main(["export", str(tmp_path / "mine"), "--to", "packed", "--out", str(tmp_path / "packed")]) == 0


def test_a_run_of_an_older_version_is_checked_by_what_there_is(kinds, place, tmp_path, refused):
    run = finished(kinds, tmp_path)
    older(run / "report.json")
    older(run / "model" / "pruning" / "ticket.json")
    assert main(again(place, run)) == 0
    path, data = run / "model" / "model.safetensors", (run / "model" / "model.safetensors").read_bytes()
    path.write_bytes(data[:18000])
    refused(again(place, run), "model")
    refused(["push", run, "me/x", "--dry-run", "--out", tmp_path / "out"], "model")
    shutil.rmtree(run / "model")
    refused(again(place, run), "no ticket at")


def test_a_report_and_an_export_json_that_were_edited_are_told_with_what_to_take_out(kinds, place, tmp_path, refused):
    run = finished(kinds, tmp_path)
    table = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps(table | {"seed": 5}, indent=2))
    for line in (["show", run], again(place, run), ["push", run, "me/x", "--dry-run", "--out", tmp_path / "out"]):
        refused(line, "report.json", "not as it was written", 'take its line "digest" out')
    text = (run / "report.json").read_text().splitlines(keepends=True)
    (run / "report.json").write_text("".join(line for line in text if '"digest":' not in line))
    assert main(["show", str(run)]) == 0
    (run / "report.json").write_text(json.dumps(table))  # other spaces are no other report
    assert main(["show", str(run)]) == 0


def test_a_run_is_tested_by_the_recipe_that_it_was_drawn_by(kinds, tmp_path, refused):
    run = finished(kinds, tmp_path)
    recipe = (run / "run.yaml").read_text()
    (run / "run.yaml").write_text(recipe.replace("batch_size: 8", "batch_size: 9"))
    refused(["test", run], "run.yaml is not the recipe that", "train differ from its report.json")
    assert load_table(run / "report.json")["test"] is None


def test_a_recipe_that_is_no_text_is_damaged(kinds, place, tmp_path, refused):
    run = finished(kinds, tmp_path)
    data = bytearray((run / "run.yaml").read_bytes())
    data[200] = 0xFF
    (run / "run.yaml").write_bytes(data)
    refused(again(place, run), "run.yaml is damaged; give another --out or remove")


@pytest.mark.parametrize("text", ['{"model": "', "null", "[]", "{}", "7", '{"digest": 3}', 9000 * "["])
def test_a_stopped_run_whose_beginning_cannot_be_read_says_so(text, kinds, place, tmp_path, refused):
    kind = kinds["states of imp-rewind"][0]
    run = shutil.copytree(kind.folder, tmp_path.joinpath(*kind.folder.parts[-3:]))
    (run / "stages" / "base.json").write_text(text)
    with pytest.raises(UserError, match=r"base\.json|was begun with another") as caught:
        kind.read(run)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("damage", ["cut", "changed", "longer line", "gone"])
def test_a_log_that_is_not_what_was_written_is_told_and_one_that_is_gone_is_noted(damage, kinds, tmp_path):
    kind, before = kinds["states of imp-rewind"]
    run = shutil.copytree(kind.folder, tmp_path.joinpath(*kind.folder.parts[-3:]))
    log = run / "log.jsonl"
    text = log.read_text()
    if damage == "gone":
        log.unlink()
        assert alike(kind.read(run)[:2], before[:2])  # notes tell of the losses in the log
        return
    log.write_text({"cut": text[:30], "changed": text.replace("loss", "lost"), "longer line": "x" + text}[damage])
    with pytest.raises(UserError, match=r"damaged log .*log\.jsonl: .*put it back, or remove it to continue without"):
        kind.read(run)
    log.write_text(text)
    assert alike(kind.read(run), before)


def test_a_finished_run_whose_log_was_changed_is_told_and_may_do_without_one(kinds, place, tmp_path, refused):
    run = finished(kinds, tmp_path)
    (run / "log.jsonl").write_text("nonsense\n")
    refused(again(place, run), "log.jsonl")
    (run / "log.jsonl").unlink()
    assert main(again(place, run)) == 0


@pytest.mark.parametrize("damage", ["a bit", "a fact", "another name"])
def test_a_damaged_product_on_the_shelf_is_not_taken(damage, tmp_path):
    cache = TrainingCache(tmp_path)
    product = CachedTraining({"w": torch.arange(64.0)}, {"step": 3}, Cost(steps=3, seconds=0.1), [{"loss": 1.5}])
    cache.put_training("a" * 32, product)
    (file,) = tmp_path.iterdir()
    assert same(cache.get_training("a" * 32).tensors, product.tensors)
    if damage == "another name":
        file.rename(tmp_path / f"{'b' * 32}.safetensors")
    else:
        data = bytearray(file.read_bytes())
        at = len(data) - 9 if damage == "a bit" else data.index(b"1.5")
        data[at] ^= 1
        file.write_bytes(data)
    assert cache.get_training("a" * 32) is None
    assert cache.get_training("b" * 32) is None


def test_a_folder_that_was_there_stays_when_a_run_fails_before_its_first_save(place, tmp_path, refused):
    (tmp_path / "mine").mkdir()
    few = line_of(place, tmp_path / "mine", "isp", "--steps", "1")
    refused(few, "1 steps are too few")
    assert not list((tmp_path / "mine").iterdir())
    refused([*few[:-1], tmp_path / "mine" / "a" / "b"], "1 steps are too few")
    assert (tmp_path / "mine").is_dir()
    assert not (tmp_path / "mine" / "a").exists()


@pytest.fixture
def mounted(tmp_path):
    """An empty file system of its own."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_out_may_be_a_mount_point(place, mounted, tmp_path, refused):
    refused(line_of(place, mounted, "isp", "--steps", "1"), "1 steps are too few")
    source = pruned(tmp_path / "source", "bert")
    for to in ("packed", "dense"):
        assert main(["export", str(source), "--to", to, "--out", str(mounted)]) == 0
    assert os.path.ismount(mounted)
    assert "model.safetensors" in os.listdir(mounted)
    assert "packed.safetensors" not in os.listdir(mounted)
    assert not [name for name in os.listdir(mounted) if name.endswith(".part")]


def test_an_export_replaces_only_what_it_wrote_itself(tmp_path, refused):
    source, out = pruned(tmp_path / "source", "bert"), tmp_path / "mine"
    out.mkdir()
    inode = out.stat().st_ino
    line = ["export", source, "--to", "dense", "--out", out]
    for _ in range(2):
        assert main([str(word) for word in line]) == 0
        assert out.stat().st_ino == inode  # the user's own folder
    (out / "kept").mkdir()
    refused(line, "holds something else (kept)")
    (out / "kept").rmdir()
    (out / "link").symlink_to(tmp_path / "source")
    refused(line, "holds something else (link)")
    (out / "link").unlink()
    (out / "model.safetensors").write_bytes(b"the user's own")
    refused(line, "holds something else (model.safetensors)")
    assert (out / "model.safetensors").read_bytes() == b"the user's own"


def test_a_compact_export_whose_weights_were_trained_on_there_says_what_to_do(tmp_path, refused):
    out = write_export(pruned(tmp_path / "source", "bert"), "compact", tmp_path / "out").path
    model = load_compact(out)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    model.save_pretrained(out)
    with pytest.raises(UserError, match=r"model\.safetensors cannot be used .*changed on purpose.* without export"):
        load_compact(out)
    (out / "export.json").unlink()
    assert same(load_compact(out).state_dict(), model.state_dict())


def test_a_folder_is_not_removed_to_make_room_for_a_file(tmp_path):
    (tmp_path / "report.json").mkdir()
    (tmp_path / "report.json" / "mine").write_text("mine")
    with pytest.raises(IsADirectoryError):
        write_json(tmp_path / "report.json", {})
    assert (tmp_path / "report.json" / "mine").read_text() == "mine"
    assert os.listdir(tmp_path) == ["report.json"]


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from sparsesoup.cli.main import main
"""


def test_a_full_disk_names_the_file_that_was_written_not_the_one_that_was_read(tmp_path):
    source = pruned(tmp_path / "source", "bert")
    full = sparsesoup("export", source, "--to", "dense", "--out", tmp_path / "out", wrap=LIMITED)
    assert full.returncode == 2
    assert f"the disk is full ({tmp_path / 'out' / 'model.safetensors'}: " in full.stderr
    assert str(source) not in full.stderr


@pytest.mark.parametrize("steps", ["-1", str(2**64), "9" * 19, "1" + 400 * "0", "1" + 5000 * "0"])
def test_a_number_of_steps_that_no_training_has_is_refused(steps, place, tmp_path, refused):
    said = refused(line_of(place, tmp_path / "runs", "magnitude", "--steps", steps), "steps")
    assert len(said) < 400
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("method", "flag", "value"),
    [
        *(("isp", "--method.stages", value) for value in (str(2**64), "1" + 400 * "0", "200000")),
        ("magnitude", "--seed", str(2**64)),
        ("magnitude", "--train.batch-size", str(2**64)),
        ("magnitude", "--max-length", str(2**64)),
        ("magnitude", "--train.learning-rate", "1" + 400 * "0"),
        ("magnitude", "--sparsity", "1" + 400 * "0"),
        ("magnitude", "--save-every", "1" + 400 * "0"),
        ("imp", "--method.cut", "1e-320"),
        ("imp", "--method.cut", "1e-9"),
    ],
)
def test_numbers_that_would_fill_time_or_memory_are_refused(method, flag, value, place, tmp_path, refused):
    said = refused([*line_of(place, tmp_path / "runs", method), "--steps", "20", flag, value], flag[2:].split(".")[-1])
    assert len(said) < 300
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("epochs", ["1e300", "1e999", "inf", "nan", "-1", "9" * 400])
def test_a_number_of_epochs_that_no_training_has_is_refused(epochs, place, tmp_path, refused):
    refused(line_of(place, tmp_path / "runs", "magnitude", "--epochs", epochs), "epochs")


@pytest.mark.parametrize("command", ["prune", "export", "apply", "show", "push", "benchmark"])
def test_names_that_are_no_text_are_refused(command, place, tmp_path, refused):
    name = os.fsdecode(b"caf\xe9")
    words = line_of(place, tmp_path / name, "magnitude")[1:] if command == "prune" else [tmp_path / name]
    refused([command, *words], r"caf\udce9", "rename")


def test_a_folder_whose_name_is_no_text_is_refused_from_python(place, tmp_path):
    where = {"model": str(place / "bert"), "dataset": str(place / "reviews"), "steps": 2, "progress": False}
    with pytest.raises(UserError, match="has a name that is no text"):
        prune("magnitude", out=tmp_path / os.fsdecode(b"caf\xe9"), **where)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["--sparsity", "0"], ["--sparsity", "-0"]),
        (["--sparsity", "0"], ["--sparsity", "-0.0"]),
        (["--sparsity", "0.5"], ["--sparsity", "5e-1"]),
        (["--epochs", "2"], ["--epochs", "2.0"]),
        (["--sparsity", "0.5", "--train.weight-decay", "0"], ["--sparsity", "0.50", "--train.weight-decay", "-0.0"]),
    ],
)
def test_equal_numbers_are_one_run_however_they_are_written(one, other, place, tmp_path):
    """`-0` and `-0.0` were two directories."""
    settings = [fill_default_sparsity(parse_arguments(["magnitude", *words])[0]) for words in (one, other)]
    assert settings[0].run_key() == settings[1].run_key()
    assert json.dumps(settings[0].to_dict()) == json.dumps(settings[1].to_dict())
    assert repr(settings[0].budget.sparsity) == repr(settings[1].budget.sparsity)


STUDY = """
models: {place}/bert
datasets: {place}/reviews
methods: [magnitude]
sparsities: 0.5
seeds: {seeds}
steps: 2
train: {{batch_size: 8}}
"""


def test_a_study_on_a_full_disk_writes_all_of_its_tables_or_none(place, tmp_path, monkeypatch):
    """The last of them takes the most room; those before it had been written by then."""
    monkeypatch.chdir(tmp_path)
    line = ["compare", "--config", "small.yaml", "--threads", "1"]
    Path("small.yaml").write_text(STUDY.format(place=place, seeds=0))
    assert main(line) == 0
    folder = Path("runs/studies/small")
    before = {path.name: path.read_bytes() for path in folder.glob("study.*") if path.suffix != ".yaml"}
    assert len(before) == 6
    Path("small.yaml").write_text(STUDY.format(place=place, seeds=[0, 1]))
    largest = max(before, key=lambda name: len(before[name]))
    assert largest == "study.html"
    full = sparsesoup(*line, wrap=WHILE_TABLES.format(size=len(before[largest]) - 1000))
    assert full.returncode == 2, full.stderr
    assert "the disk is full (runs/studies/small/study.html: " in full.stderr.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in folder.glob("study.*") if path.suffix != ".yaml"} == before
    assert not [path for path in folder.rglob("*") if path.name.endswith(".part")]
    assert main(line) == 0
    assert len(json.loads((folder / "study.json").read_text())["runs"]) == 2


WHILE_TABLES = """
import resource
from sparsesoup.cli.main import main
from sparsesoup.study import compare
plain = compare._write_tables
def write(*given, **more):
    resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
    return plain(*given, **more)
compare._write_tables = write
"""


CHANGES = {
    "config.json": ('"hidden_dropout_prob": 0.1', '"hidden_dropout_prob": 0.3'),
    "tokenizer.json": ('"good"', '"goof"'),
}


@pytest.mark.parametrize("file", CHANGES)
def test_a_base_model_whose_files_changed_is_another_model(file, place, tmp_path, capsys):
    """To a finished run, to one that was stopped, and to the cache of trainings."""
    shutil.copytree(place / "bert", tmp_path / "bert")
    words = [
        "--model",
        str(tmp_path / "bert"),
        "--dataset",
        str(place / "reviews"),
        "--sparsity",
        "0.5",
        "--steps",
        "20",
    ]
    words += ["--train.batch-size", "8", "--cache-dir", str(tmp_path / "cache")]
    assert main(["prune", "dense", *words, "--out", str(tmp_path / "one")]) == 0
    path = tmp_path / "bert" / file
    old, new = CHANGES[file]
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    assert main(["prune", "dense", *words, "--out", str(tmp_path / "one")]) == 2
    assert "is not the one that" in capsys.readouterr().err
    assert main(["prune", "dense", *words, "--out", str(tmp_path / "two")]) == 0
    one, two = (next((tmp_path / name).glob("*/*/seed-0/model/model.safetensors")) for name in ("one", "two"))
    assert one.read_bytes() != two.read_bytes(), "a training of the old model was taken from the cache"
