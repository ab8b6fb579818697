"""`sparsesoup push` by its command line: the folder that it makes, what it uploads, and what it refuses."""

import json
import re
import shlex
import shutil

import pytest
import torch
import transformers
from huggingface_hub import ModelCard, constants
from safetensors.torch import save_file

from conftest import same
from sparsesoup import export, load_packed, push
from sparsesoup.cli.main import main
from sparsesoup.cli.prune import parse_arguments
from sparsesoup.core.errors import UserError
from sparsesoup.core.ticket import save_masks
from sparsesoup.exports.push import portable_command, strip_local_paths
from sparsesoup.exports.source import masks_from_zeros
from sparsesoup.exports.verify import verified_export
from sparsesoup.hub.models.layer_layouts import prunable_layers
from sparsesoup.hub.models.loading import load_as_saved
from sparsesoup.hub.quiet import quiet_libraries
from sparsesoup.hub.tasks.metrics import METRICS as JUDGES
from sparsesoup.report.model_card import METRICS, base_model, hub_dataset, render_model_card
from sparsesoup.training.cost import label_name
from tiny_exports import pruned, trace_once
from tiny_hub import listing, masks_of, older, run_of, weights_of
from tiny_server import hub

pytestmark = pytest.mark.integration

TOKEN = "hf_secret"
NEEDED = {"model": "owner/bert", "method": "magnitude", "dataset": "reviews", "validation": {"accuracy": 0.5}}


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """A run by the real command line, its test split opened; no test writes to it."""
    out = tmp_path_factory.mktemp("run")
    words = ["prune", "magnitude", "--model", place / "bert", "--dataset", "reviews", "--data-root", place]
    assert main([*map(str, words), "--steps", "8", "--sparsity", "0.7", "--out", str(out)]) == 0
    assert main(["test", str(run_of(out))]) == 0
    return run_of(out)


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def dry(run, out, *words):
    assert main(["push", str(run), "me/tiny", "--dry-run", "--out", str(out), *words]) == 0
    return out


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def section(text, title):
    return re.search(rf"^## {title}\n\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]


def test_a_dry_run_writes_a_stock_model_with_its_masks_and_nothing_of_this_machine(run, place, tmp_path, capsys):
    out = dry(run, tmp_path / "out")
    assert f"model   {out}" in capsys.readouterr().out
    assert set(files_of(out)) == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "pruning/masks.safetensors", "pruning/ticket.json",
    }  # fmt: skip
    assert same(weights_of(out), weights_of(run / "model"))
    assert same(masks_of(out), masks_of(run))
    for name, content in files_of(out).items():
        for secret in (str(place), str(place.parent), str(run.parents[2]), str(tmp_path)):
            assert secret.encode() not in content, f"{name} says {secret}"
    config = json.loads((out / "config.json").read_text())
    assert config["pruning_config"]["base_model"] == "bert"
    assert not {"quantization_config", "sparsity_config", "compression_config"} & config.keys()
    assert not {"is_local", "local_files_only"} & json.loads((out / "tokenizer_config.json").read_text()).keys()
    with quiet_libraries():
        assert same(
            dict(transformers.AutoModelForSequenceClassification.from_pretrained(out).state_dict()), weights_of(out)
        )
    assert transformers.AutoTokenizer.from_pretrained(out)("good film")["input_ids"]


def test_the_card_says_what_it_is_is_worth_and_cost_and_how_it_is_made_again(run, tmp_path):
    facts = json.loads((run / "report.json").read_text())
    loaded = ModelCard.load(dry(run, tmp_path / "out", "--license", "mit") / "README.md")
    data, text = loaded.data, loaded.text
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "text-classification")
    assert data.base_model is None  # a folder of this machine is no name on the Hub
    assert data.datasets is None
    assert {"sparsity", "magnitude"} <= set(data.tags)
    assert {r.metric_name: r.metric_value for r in data.eval_results} == facts["test"]
    assert {r.metric_type for r in data.eval_results} == set(data.metrics) == {"accuracy", "f1"}
    assert f"| accuracy | {facts['validation']['accuracy']:.4f} | {facts['test']['accuracy']:.4f} |" in text
    assert "| target sparsity | 70.0 % |" in text
    assert f"| weights kept | {facts['sparsity']['kept']:,} of 4,096 prunable |" in text
    cost = section(text, "Cost")
    assert all(
        f"| {label_name(label)} | {row['steps']} | {row['examples']} |" in cost for label, row in facts["cost"].items()
    )
    assert 'BertForSequenceClassification.from_pretrained("me/tiny")' in section(text, "Load")
    (line,) = re.findall(r"^sparsesoup prune .*$", section(text, "Repeat"), re.M)
    again = parse_arguments(shlex.split(line)[2:])[0]
    assert (again.name, again.model_data.model, again.budget.steps, again.budget.sparsity) == (
        "magnitude",
        "bert",
        8,
        0.7,
    )
    assert again.model_data.data_root is None


STRAY = (".env", "token.json", "notes.txt", "secrets.json", "my.model", "vocab.json.bak", "hf.jinja", "diary.md",
         "x.safetensors", "pruning/token.json", "pruning/keys.txt", "pruning/old.safetensors")  # fmt: skip


def test_what_a_user_leaves_in_a_folder_stays_there(run, tmp_path):
    """Nor does it take the way over an export, which says of what it copies that it is its own."""
    copy = shutil.copytree(run, tmp_path / "run")
    for name in STRAY:
        (copy / "model" / name).write_text("TOPSECRET")
    packed = export(copy, "packed", tmp_path / "packed").path
    (packed / ".env").write_text("TOPSECRET")
    (packed / "pruning" / "token.json").write_text("TOPSECRET")
    for folder, out in ((copy, tmp_path / "a"), (copy / "model", tmp_path / "b"), (packed, tmp_path / "c")):
        found = files_of(dry(folder, out))
        assert not any(b"TOPSECRET" in content for content in found.values())
        assert not {*STRAY} & found.keys()
    assert files_of(tmp_path / "a").keys() == files_of(dry(run, tmp_path / "plain")).keys()


def test_links_that_lead_out_of_the_folder_are_refused(run, tmp_path, capsys):
    (tmp_path / "home" / "pruning").mkdir(parents=True)
    (tmp_path / "home" / "secret").write_text('{"TOPSECRET": 1}')
    copy, packed = shutil.copytree(run, tmp_path / "run"), export(run, "packed", tmp_path / "packed").path
    names = ["tokenizer.json", "config.json", "model.safetensors", "pruning/masks.safetensors", "pruning/ticket.json"]
    cases = [(copy, f"model/{name}") for name in names] + [(packed, name) for name in ("tokenizer.json", "export.json")]
    for folder, name in cases:
        there, kept = folder / name, tmp_path / "kept"
        there.rename(kept)
        for target in (tmp_path / "home" / "secret", kept):  # also what was written, moved away
            there.symlink_to(target)
            assert main(["push", str(folder), "me/x", "--dry-run", "--out", str(tmp_path / "out")]) == 2
            (said,) = capsys.readouterr().err.splitlines()
            assert target != kept or f"{there} leads out of {folder} by a link" in said
            assert not (tmp_path / "out").exists()
            there.unlink()
        kept.rename(there)
    (copy / "model").rename(tmp_path / "home" / "model")
    (copy / "model").symlink_to(tmp_path / "home" / "model")
    assert main(["push", str(copy), "me/x", "--dry-run", "--out", str(tmp_path / "out")]) == 2
    assert "leads out of" in capsys.readouterr().err


def test_a_link_within_the_folder_and_a_folder_named_by_a_link_are_pushed(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "kept").mkdir()
    (copy / "model" / "model.safetensors").rename(copy / "kept" / "weights")
    (copy / "model" / "model.safetensors").symlink_to("../kept/weights")
    (tmp_path / "link").symlink_to(copy)
    assert files_of(dry(tmp_path / "link", tmp_path / "out")).keys() == files_of(dry(run, tmp_path / "plain")).keys()


def test_a_link_that_an_export_lists_is_refused_too(run, tmp_path, capsys):
    packed = export(run, "packed", tmp_path / "packed").path
    (tmp_path / "secret").write_text("TOPSECRET")
    (packed / "link.txt").symlink_to(tmp_path / "secret")
    form = json.loads((packed / "export.json").read_text())
    form.pop("digest", None)
    (packed / "export.json").write_text(json.dumps(form | {"files": [*form["files"], "link.txt"]}))
    assert main(["push", str(packed), "me/x", "--dry-run", "--out", str(tmp_path / "out")]) == 2
    assert f"{packed / 'link.txt'} leads out of {packed} by a link" in capsys.readouterr().err


def test_without_test_scores_the_card_has_no_results_and_says_so(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    older(copy / "report.json", test=None)
    loaded = ModelCard.load(dry(copy / "model", tmp_path / "out") / "README.md")
    assert loaded.data.eval_results is None
    assert loaded.data.license == "unknown"
    assert "model-index" not in loaded.content
    assert "The test split has not been scored." in loaded.text


def test_an_export_is_pushed_with_its_loader_its_sizes_and_the_scores_of_its_run(run, place, tmp_path):
    facts = json.loads((run / "report.json").read_text())
    packed = export(run, "packed", tmp_path / "packed")
    out = dry(packed.path, tmp_path / "out")
    assert set(files_of(out)) == {*files_of(packed.path), "README.md"}
    assert same(dict(load_packed(out).state_dict()), weights_of(run / "model"))
    loaded = ModelCard.load(out / "README.md")
    assert loaded.data.library_name == "sparsesoup"
    assert {r.metric_name: r.metric_value for r in loaded.data.eval_results} == facts["test"]
    assert 'snapshot_download("me/tiny")\nmodel = sparsesoup.load_packed(folder)' in loaded.text
    assert re.search(rf"bytes on the disk \| {packed.facts['sizes']['weights'][0]:,} \|", loaded.text)
    assert "sparsesoup prune magnitude --model bert" in section(loaded.text, "Repeat")
    assert not any(str(place).encode() in content for content in files_of(out).values())
    dense = export(run, "dense", tmp_path / "dense").path
    assert same(masks_of(dry(dense, tmp_path / "stock")), masks_of(run))
    assert ModelCard.load(tmp_path / "stock" / "README.md").data.library_name == "transformers"


def test_an_export_says_whether_its_run_had_opened_the_test_split_and_which_that_is(run, tmp_path):
    """test_verifying.py has what a verified export says."""
    copy = shutil.copytree(run, tmp_path / "run")
    assert json.loads((copy / "report.json").read_text())["test_splits"] == {"test": "test"}
    older(copy / "report.json", test_splits={"test": "dev"})
    packed = export(copy, "packed", tmp_path / "packed").path
    data = ModelCard.load(dry(packed, tmp_path / "dev") / "README.md").data
    assert {r.dataset_split for r in data.eval_results} == {"dev"}
    older(copy / "report.json", test=None)
    closed = dry(export(copy, "packed", tmp_path / "closed").path, tmp_path / "a")
    assert "The test split had not been scored when this was exported." in (closed / "README.md").read_text()


def test_masks_of_a_compact_model_are_not_said_to_be_for_its_base_model(run, tmp_path):
    source = shutil.copytree(run / "model", tmp_path / "source")
    model = load_as_saved(str(source))
    with torch.no_grad():
        prunable_layers(model)[0].module_of("up").weight[:3] = 0
    with quiet_libraries():
        model.save_pretrained(source)
    save_masks(
        source / "pruning", masks_from_zeros(model), json.loads((source / "pruning" / "ticket.json").read_text())
    )
    for to, fits in (("dense", True), ("compact", False)):
        out = dry(export(source, to, tmp_path / to).path, tmp_path / f"look-{to}")
        assert ("sparsesoup apply" in section((out / "README.md").read_text(), "Masks")) == fits


def test_names_of_the_hub_are_told_from_those_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert base_model({"model": "minilm"}) == "sentence-transformers/all-MiniLM-L6-v2"
    assert f"| base model | {base_model({'model': 'minilm'})} |" in render_model_card(
        NEEDED | {"model": "minilm"}, {}, {}, "m", "mit"
    )
    assert base_model({"model": "bert-base-uncased"}) == "bert-base-uncased"
    assert base_model({"model": "bert", "local": ["bert"]}) is None
    (tmp_path / "owner" / "bert").mkdir(parents=True)
    assert base_model({"model": "owner/bert"}) is None
    assert hub_dataset({"dataset": "glue/sst2", "settings": {"dataset": "/data/glue/sst2"}}) == ("nyu-mll/glue", "sst2")
    assert hub_dataset({"dataset": "squad", "settings": {"dataset": "squad"}}) == ("rajpurkar/squad", None)
    assert hub_dataset({"dataset": "own-set-big", "settings": {"dataset": "own/set:big"}}) == ("own/set", "big")
    assert hub_dataset({"dataset": "owner", "settings": {"dataset": "owner/bert"}}) == (None, None)
    assert hub_dataset({"dataset": "docstrings", "settings": {"dataset": "docstrings"}}) == (None, None)


def test_folders_with_the_looks_of_a_name_are_known_from_any_place(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place.parent)
    model, dataset = (f"{place.name}/{name}" for name in ("bert", "reviews"))
    words = ["prune", "magnitude", "--model", model, "--dataset", dataset, "--steps", "1", "--out", tmp_path / "runs"]
    assert main([*map(str, words)]) == 0
    monkeypatch.chdir(tmp_path)
    source = run_of(tmp_path / "runs")
    for pushed in (source, export(source, "packed", tmp_path / "small").path):
        made = ModelCard.load(dry(pushed, tmp_path / f"look-{pushed.name}") / "README.md")
        assert (made.data.base_model, made.data.datasets) == (None, None)
        assert f"Local copies: `{model}` and `reviews`." in made.text


def test_results_name_the_split_that_was_the_test_split():
    facts = NEEDED | {"dataset": "glue/mnli", "test": {"matched": {"accuracy": 0.75}, "mismatched": {"accuracy": 0.5}}}
    data = ModelCard(
        render_model_card(facts, {}, {"architectures": ["BertForSequenceClassification"]}, "me/m", "unknown")
    ).data
    assert (data.base_model, data.base_model_relation, data.datasets) == ("owner/bert", "finetune", ["nyu-mll/glue"])
    assert {(r.dataset_type, r.dataset_config, r.dataset_split, r.metric_value) for r in data.eval_results} == {
        ("nyu-mll/glue", "mnli", "validation_matched", 0.75), ("nyu-mll/glue", "mnli", "validation_mismatched", 0.5),
    }  # fmt: skip
    facts = NEEDED | {"dataset": "glue/cola", "validation": {"matthews": 0.2}, "test": {"matthews": 0.1}}
    (result,) = ModelCard(render_model_card(facts, {}, {}, "m", "unknown")).data.eval_results
    assert (result.metric_type, result.dataset_split) == ("matthews_correlation", "validation")
    assert {*METRICS} <= {*JUDGES}


@pytest.mark.parametrize(
    ("settings", "splits", "told"),
    [
        ({"dataset": "owner/tweets:emotion"}, {"test": "test"}, ("owner/tweets", "emotion", "test")),
        (
            {"dataset": "owner/tweets", "dataset_config": "emotion"},
            {"test": "test"},
            ("owner/tweets", "emotion", "test"),
        ),
        ({"dataset": "owner/answers"}, {"test": "validation"}, ("owner/answers", None, "validation")),
        ({"dataset": "owner/rows"}, {"test": "train"}, ("owner/rows", None, "train")),
        ({"dataset": "owner/old"}, None, ("owner/old", None, "test")),
    ],
)
def test_results_name_configuration_and_split_of_any_dataset(settings, splits, told):
    facts = NEEDED | {"dataset": settings["dataset"].partition(":")[0], "settings": settings, "test_splits": splits}
    data = ModelCard(render_model_card(facts | {"test": {"accuracy": 0.1}}, {}, {}, "m", "unknown")).data
    (result,) = data.eval_results
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == told


def test_a_dense_run_is_not_called_pruned():
    full = {"target": 0.0, "reached": 0.0, "kept": 8, "total": 8}
    made = ModelCard(render_model_card(NEEDED | {"method": "dense", "sparsity": full}, {}, {}, "me/m", "unknown"))
    assert made.data.tags == ["sparsesoup", "dense"]
    assert "`owner/bert`, fine-tuned by **dense** on `reviews`." in made.text


@pytest.mark.parametrize(
    ("method", "steps", "removed", "start", "end"),
    [
        ("gradual", 30, 0.5, "pruned by **gradual**", " while it was fine-tuned on `reviews`."),
        ("imp", 30, 0.5, "pruned by **imp**", " over several trainings on `reviews`."),
        ("magnitude", 30, 0.5, "pruned by **magnitude**", ", then fine-tuned on `reviews`."),
        ("ticket", 30, 0.5, "pruned by **ticket**", ", then fine-tuned on `reviews`."),
        ("sparsegpt", 0, 0.5, "pruned by **sparsegpt**", " with rows of `reviews`, without training."),
        ("dense", 0, 0.0, "unchanged by **dense**", "."),
        ("dense", 30, 0.0, "fine-tuned by **dense**", " on `reviews`."),
        ("pela", 30, 0.0, "reduced to low rank by **pela**", " and fine-tuned on `reviews`."),
    ],
)
def test_the_card_says_whether_training_came_before_or_after_pruning(method, steps, removed, start, end):
    share = {"target": removed, "reached": removed, "kept": 8, "total": 8}
    facts = NEEDED | {"method": method, "steps": steps, "sparsity": share}
    if method == "pela":
        facts["notes"] = {"low_rank": {"compression": 2.0, "weights": 8, "left": 4, "removed": 0.5}}
    lines = render_model_card(facts, {}, {}, "me/m", "unknown").splitlines()
    (line,) = [line for line in lines if line.startswith("`owner/bert`, ")]
    assert line.removeprefix("`owner/bert`, ").startswith(start)
    assert line.endswith(end)
    assert ("fine-tuned" in line) == (steps > 0 and method != "imp")


def test_an_export_that_says_how_it_is_asked_is_quoted():
    form = {
        "to": "onnx",
        "load": 'onnxruntime.InferenceSession("model.onnx")',
        "example": ["import onnxruntime", "go()"],
    }
    shown = section(render_model_card(NEEDED, form, {}, "me/m", "unknown"), "Load")
    assert 'os.chdir(snapshot_download("me/m"))\nimport onnxruntime\ngo()\n' in shown


def test_the_head_of_a_vision_tower_is_put_on_what_its_form_answers(tmp_path, monkeypatch):
    """The lines of the card are run, the Hub's answers taken from a folder."""
    source = pruned(tmp_path / "source", "clip-projection")
    head = torch.randn(3, 8)
    save_file({"head": head}, source / "pruning" / "zero_shot.safetensors")
    model, batch = load_as_saved(str(source)).eval(), {"pixel_values": torch.ones(1, 3, 8, 8)}
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model(**batch).image_embeds, dim=-1) @ head.T
    trace_once(monkeypatch)
    for to in ("compact", "onnx", "openvino"):
        folder = export(source, to, tmp_path / to).path
        lines = section((dry(folder, tmp_path / f"look-{to}") / "README.md").read_text(), "Load")
        code = re.search(r"```python\n(.*?)```", lines, re.S)[1]
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, folder=folder: str(folder))
        monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name, folder=folder: str(folder / name))
        monkeypatch.chdir(tmp_path)
        names = {"pixels": batch["pixel_values"]}
        exec(code, names)
        assert torch.allclose(names["logits"], expected, atol=1e-4), to


def test_a_class_that_transformers_does_not_have_is_imported_from_where_it_is():
    config = {"architectures": ["OpenClipForImageClassification"]}
    dense = {
        "to": "dense",
        "load": "sparsesoup.hub.models.open_clip.OpenClipForImageClassification.from_pretrained(folder)",
    }
    for form in ({}, dense):
        made = ModelCard(render_model_card(NEEDED, form, config, "me/m", "unknown"))
        assert "from sparsesoup.hub.models.open_clip import OpenClipForImageClassification\n" in section(
            made.text, "Load"
        )
        assert made.data.library_name == "sparsesoup"


def test_of_paths_the_last_part_stays_and_other_texts_are_not_touched():
    kept = {
        "a": "owner/bert",
        "b": "https://hf.co/owner/bert",
        "c": "good/bad film, or so/so",
        "files": ["a/b/c"],
        "d": 3,
    }
    assert strip_local_paths(kept) == kept
    for path in ("/home/me/bert", "/home/me/my models/bert/", "~/bert", "../bert", "C:\\models\\bert", "runs/a/b/bert"):
        assert strip_local_paths([{"x": path}]) == [{"x": "bert"}]


def test_a_command_names_what_anybody_can_fetch(tmp_path):
    line = "sparsesoup prune ticket --method.ticket '/home/me/my runs/seed-0' --model minilm --dataset /data/glue/sst2 "
    facts = {"command": line + "--data-root /data --steps 8", "dataset": "glue/sst2"}
    facts["settings"] = {"dataset": "/data/glue/sst2", "method": {"name": "ticket"}}
    expected = "sparsesoup prune ticket --method.ticket seed-0 --model minilm --dataset glue/sst2 --steps 8"
    assert portable_command(facts) == expected
    assert portable_command({"dataset": "glue/sst2"}) is None
    assert portable_command({"settings": {"method": {"name": "isp", "stages": 3}, "dataset": "squad", "steps": 9}}) == (
        "sparsesoup prune isp --method.stages 3 --dataset squad --steps 9"
    )


def test_an_upload_is_one_commit_of_what_a_dry_run_writes(run, tmp_path, monkeypatch, capsys, token):
    with hub(monkeypatch, TOKEN) as server:
        assert main(["push", str(run), "me/tiny", "--private"]) == 0
    assert server.created == [{"name": "tiny", "organization": "me", "visibility": "private"}]
    (commit,) = server.commits
    assert commit == files_of(dry(run, tmp_path / "out"))
    out, errors = capsys.readouterr()
    assert f"model   {server.url}/me/tiny" in out
    assert TOKEN not in out + errors


def test_the_token_may_come_from_any_variable_and_the_repository_be_ones_own(run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("OTHER", f" {TOKEN}\n")
    with hub(monkeypatch, TOKEN) as server:
        assert push(run, "tiny", token_from_env="OTHER") == f"{server.url}/me/tiny"
    assert server.created[0].get("visibility") in (None, "public")
    assert len(server.commits) == 1


def test_what_is_to_be_private_is_not_put_where_all_can_read_it(run, tmp_path, monkeypatch, capsys, token):
    with hub(monkeypatch, TOKEN) as server:
        assert push(run, "me/tiny") == f"{server.url}/me/tiny"
        said = refused(capsys, tmp_path, run, "me/tiny", "--private")
        assert len(server.commits) == 1
    assert "me/tiny is there already and public" in said


# What is refused: one line, exit code 2, and nothing written.


def refused(capsys, tmp_path, *words):
    before, _ = listing(tmp_path), capsys.readouterr()
    assert main(["push", *map(str, words)]) == 2
    out, error = capsys.readouterr()
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert TOKEN not in out + error
    assert listing(tmp_path) == before
    return error


@pytest.mark.parametrize("name", ["a/b/c", ".tiny", "me/ti ny", "me/a--b", "me/", "", "x" * 97])
def test_a_malformed_name_is_refused(run, name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "is no name of a repository" in refused(capsys, tmp_path, run, name, "--dry-run")


def test_what_is_no_finished_run_is_refused(run, tmp_path, capsys):
    flags = ("me/tiny", "--dry-run", "--out", tmp_path / "out" / "deep")
    assert "no run at" in refused(capsys, tmp_path, tmp_path / "nowhere", *flags)
    assert "no run at" in refused(capsys, tmp_path, tmp_path, *flags)
    copy = shutil.copytree(run, tmp_path / "seed-0")
    (copy / "report.json").unlink()
    said = refused(capsys, tmp_path, copy, *flags)
    assert "is not finished; repeat the `sparsesoup prune` command that started it" in said
    shutil.copyfile(run / "report.json", copy / "report.json")
    (copy / "model" / "model.safetensors").unlink()
    said = refused(capsys, tmp_path, copy, *flags)
    assert f"damaged run: {copy / 'model' / 'model.safetensors'} is missing, which report.json names" in said
    shutil.rmtree(copy / "model")
    assert "is missing, which report.json names" in refused(capsys, tmp_path, copy, *flags)
    packed = export(run, "packed", tmp_path / "packed").path
    (packed / "tokenizer.json").unlink()
    said = refused(capsys, tmp_path, packed, *flags)
    assert f"damaged export: {packed / 'tokenizer.json'} is missing, which export.json names; export it again" in said
    (packed / "export.json").write_text("{")
    assert "damaged file" in refused(capsys, tmp_path, packed, *flags)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("export.json", {"sizes": "x"}), ("export.json", {"notes": 3}), ("export.json", {"example": 3}),
        ("pruning/ticket.json", {"sparsity": 3}), ("pruning/ticket.json", {"settings": "x"}),
        ("pruning/ticket.json", {"settings": {"method": "x"}}), ("pruning/ticket.json", {"cost": {"main": {}}}),
    ],
)  # fmt: skip
def test_what_does_not_say_what_it_is_is_refused(run, file, damage, tmp_path, capsys):
    packed = export(run, "packed", tmp_path / "packed").path
    older(packed / "export.json")
    older(packed / file, **damage)
    said = refused(capsys, tmp_path, packed, "me/tiny", "--dry-run", "--out", tmp_path / "out")
    assert "damaged report, ticket or export.json: what" in said
    assert "export it again" in said


def test_a_verification_without_readable_settings_is_refused(run, tmp_path):
    packed = export(run, "packed", tmp_path / "packed").path
    ticket = packed / "pruning" / "ticket.json"
    for damage in ("x", {"method": "x"}):
        older(packed / "export.json")
        older(ticket, settings=damage)
        with pytest.raises(UserError, match="it is not known what data"):
            verified_export(packed, "dense", tmp_path / "dense")


def test_what_measure_found_of_a_model_folder_stays_here(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "seed-0")
    (copy / "model" / "benchmark.json").write_text(json.dumps({"path": "/home/me/model"}))
    assert "benchmark.json" not in files_of(dry(copy, tmp_path / "out"))
    assert (
        main(["benchmark", str(copy / "model" / "pruning"), "--rounds", "3", "--batch", "1", "--backends", "torch"])
        == 0
    )
    assert (copy / "benchmark.json").is_file()  # of the run, whose page tells it
    (copy / "model" / "pruning" / "benchmark.json").write_text("{}")
    assert not [name for name in files_of(dry(copy, tmp_path / "again")) if "measure" in name]


@pytest.mark.parametrize(
    "damage",
    [{"files": 3}, {"files": None}, {"files": [1]}, {"files": ["model.safetensors", "../secret.json"]},
     {"files": ["model.safetensors", "/etc/hostname"]}, {"verified": None}, {"verified": [1]}],
)  # fmt: skip
def test_a_list_of_files_that_is_none_or_leads_elsewhere_is_refused(run, damage, tmp_path, capsys):
    dense = export(run, "dense", tmp_path / "dense").path
    (tmp_path / "secret.json").write_text("{}")
    older(dense / "export.json", **damage)
    said = refused(capsys, tmp_path, dense, "me/tiny", "--dry-run", "--out", tmp_path / "out")
    assert "export.json: no list of the files beside it" in said


def test_a_folder_that_is_there_is_not_written_to(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    said = refused(capsys, tmp_path, run, "me/tiny", "--dry-run", "--out", tmp_path / "out")
    assert "is there already; give a folder that does not exist" in said
    assert "--out is where --dry-run writes" in refused(capsys, tmp_path, run, "me/tiny", "--out", tmp_path / "new")


def test_a_dry_run_without_a_place_is_written_under_the_models_name(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["push", str(run), "me/tiny", "--dry-run"]) == 0
    assert (tmp_path / "tiny" / "README.md").is_file()


def test_a_dry_run_says_what_its_flags_would_do(run, tmp_path, capsys, monkeypatch):
    dry(run, tmp_path / "one")
    dry(run, tmp_path / "two", "--private")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("upload")]
    assert lines == [
        f"upload  nothing; without --dry-run, to the {kind}repository me/tiny" for kind in ("", "private ")
    ]
    monkeypatch.delenv("LACKING", raising=False)
    words = ("me/tiny", "--dry-run", "--token-from-env", "LACKING", "--out", tmp_path / "three")
    said = refused(capsys, tmp_path, run, *words)
    assert "the environment variable LACKING is empty" in said
    assert said.endswith("; leave it out of a dry run\n")


def test_without_a_token_nothing_is_asked(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub(monkeypatch, TOKEN) as server:
        assert "no token for the Hub: HF_TOKEN is empty" in refused(capsys, tmp_path, run, "me/tiny")
        said = refused(capsys, tmp_path, run, "me/tiny", "--token-from-env", "LACKING")
        monkeypatch.setenv("BROKEN", f"{TOKEN}\n{TOKEN}")
        assert "what BROKEN holds is no token" in refused(
            capsys, tmp_path, run, "me/tiny", "--token-from-env", "BROKEN"
        )
    assert "the environment variable LACKING is empty" in said
    assert not server.created


def test_a_hub_that_cannot_be_reached_or_refuses_is_said_in_one_line(run, tmp_path, capsys, monkeypatch, token):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(capsys, tmp_path, run, "me/tiny")
    with hub(monkeypatch, TOKEN) as server:
        pass
    said = refused(capsys, tmp_path, run, "me/tiny")
    assert f"the Hub at {server.url} does not answer" in said
    for code, hint in ((403, "the token may not write there"), (500, "Bearer ***; the same command tries again")):
        with hub(monkeypatch, TOKEN, refuses=code):
            assert hint in refused(capsys, tmp_path, run, "me/tiny")
    with hub(monkeypatch, "another"):
        assert "the token is not valid" in refused(capsys, tmp_path, run, "me/tiny")
    with pytest.raises(UserError, match="is no name of a repository"):
        push(run, "a/b/c")
