"""The script that pre-trains a small CLIP: its loss, its tokenizer, and that a stopped training ends as any other."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from PIL import Image as Picture
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from conftest import same
from tiny_clip import COLOURS, pictures
from tiny_hub import weights_of

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
OTHERS = {"coal": (30, 30, 30), "snow": (240, 240, 240)}
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("clip_pretrain")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two sets of coloured images, and a third that is not learnt from; no test writes to it."""
    folder = tmp_path_factory.mktemp("sets")
    for name, colours in (("colours", None), ("greys", OTHERS), ("far", OTHERS)):
        pictures(folder / name, colours=colours)
        for picture in (folder / name / "test").rglob("*.png"):
            picture.write_bytes(b"whoever opens the test split falls over this")
    return folder


@pytest.fixture
def recipe(tmp_path, data):
    """The recipe of the benchmarks, made small."""
    found = yaml.safe_load((ROOT / "benchmarks" / "experiments" / "clip-pretrain.yaml").read_text())
    found |= {"datasets": {"colours": 1, "greys": 2}, "transfer": ["far"], "side": 8, "patch": 4, "projection": 8}
    found |= {"vision": SMALL, "text": SMALL, "vocabulary": 700, "steps": 40}
    found["train"] |= {"batch_size": 16, "learning_rate": 1e-2, "precision": "no"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(found))
    return tmp_path / "recipe.yaml"


def line_of(recipe, data, out, *more):
    return [str(recipe), "--data-root", str(data), "--out", str(out), "--threads", "1", *more]


def test_the_loss_lets_several_captions_be_right(script):
    draw = torch.Generator().manual_seed(0)
    similarity, groups = torch.randn(6, 6, generator=draw), torch.tensor([0, 1, 0, 2, 1, 0])
    total = 0.0
    for table in (similarity.tolist(), similarity.T.tolist()):
        for i, row in enumerate(table):
            right = [j for j in range(6) if groups[j] == groups[i]]
            everything = sum(math.exp(value) for value in row)
            total -= sum(math.log(math.exp(row[j]) / everything) for j in right) / len(right) / 6
    assert float(script.contrastive(similarity, groups)) == pytest.approx(total / 2, rel=1e-5)


def test_where_all_captions_differ_the_loss_is_clips_own(script):
    similarity = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(script.contrastive(similarity, torch.arange(5)), image_text_contrastive_loss(similarity))


def test_the_tokenizer_reads_any_text_and_loads_without_us(script, tmp_path):
    made = script.tokenizer_of(["a photo of a cat.", "a photo of the dog.", "AM General Hummer SUV 2000"], 600, 40)
    made.save_pretrained(tmp_path)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["A photo of a cat.", "quux Ünïcode 17%", ""]
    assert read(texts)["input_ids"] == made(texts)["input_ids"]
    assert [len(made(text)["input_ids"]) for text in ("a photo of a cat", "")] == [7, 2]
    for ids in read(texts)["input_ids"]:
        assert ids.count(read.eos_token_id) == 1  # which is also what CLIP takes for what it does not know
    assert read.model_max_length == 40


def test_a_caption_names_the_class_of_its_image_in_a_template_of_its_set(script, recipe, data):
    table = yaml.safe_load(recipe.read_text())
    side = {"height": 8, "width": 8}
    processor = transformers.CLIPImageProcessorPil(size=side, crop_size=side)
    sets = [script.open_set(name, table, processor, str(data)) for name in table["datasets"]]
    tokenizer = script.tokenizer_of(["a photo of a moss green."], 700, 40)
    rows = script.captioned(sets, [1, 2], tokenizer)
    assert len(rows) == len(sets[0].train) + 2 * len(sets[1].train)
    batch, again, other = (rows.augmented_view(0, "look", step).batch(range(len(rows))) for step in (3, 3, 4))
    assert same(batch, again)
    assert not same(batch, other)
    names = [name for s in sets for name in s.names]
    said = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert len(set(said)) == len(said)
    plain = [Picture.new("RGB", (8, 8), colour) for colour in (COLOURS | OTHERS).values()]
    wanted = processor(plain, return_tensors="pt")["pixel_values"].mean((2, 3))
    for k, image in enumerate(batch["pixel_values"]):
        seen = int((wanted - image.mean((1, 2))).norm(dim=1).argmin())
        assert names[seen] in said[batch["caption"][k]]
        assert batch["labels"][k] == seen


def test_a_stopped_pre_training_ends_as_an_undisturbed_one(script, recipe, data, tmp_path, monkeypatch, capsys):
    assert script.main(line_of(recipe, data, tmp_path / "whole", "--result", str(tmp_path / "result.json"))) == 0
    told = capsys.readouterr().out
    assert "colours (in-domain)" in told
    assert "far (transfer)" in told
    with monkeypatch.context() as patch:
        patch.setattr(script.ProgressLogger, "step", stop_at(17, script.ProgressLogger.step))
        with pytest.raises(KeyboardInterrupt):
            script.main(line_of(recipe, data, tmp_path / "parts", "--save-every", "0"))
    assert script.main(line_of(recipe, data, tmp_path / "parts")) == 0
    assert same(*(weights_of(tmp_path / name / "model") for name in ("whole", "parts")))
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["zero_shot"]["colours"]["accuracy"] >= 0.75  # of three colours; it has learnt what they are called
    assert found["cost"]["main"]["steps"] == 40
    model = transformers.CLIPModel.from_pretrained(tmp_path / "whole" / "model")
    assert type(transformers.AutoProcessor.from_pretrained(tmp_path / "whole" / "model")) is transformers.CLIPProcessor
    assert model.logit_scale <= math.log(100) + 1e-6


def stop_at(step, plain):
    def stopping(watch, record):
        plain(watch, record)
        if record.get("step") == step:
            raise KeyboardInterrupt

    return stopping


def test_what_cannot_be_is_refused_in_one_line(script, recipe, data, tmp_path, capsys):
    table = yaml.safe_load(recipe.read_text())
    out = tmp_path / "out"
    out.mkdir()
    (out / "recipe.yaml").write_text(yaml.safe_dump({**table, "steps": 7}))
    assert script.main(line_of(recipe, data, out)) == 2
    assert "another recipe" in capsys.readouterr().err
    for text, why in (
        ("a: [1", "cannot read"),
        (yaml.safe_dump({**table, "stepz": 3}), "'stepz' is missing or unknown"),
        (yaml.safe_dump({name: value for name, value in table.items() if name != "side"}), "'side' is missing"),
        (yaml.safe_dump({**table, "train": {"batch": 8}}), "argument 'batch'; its keys are learning_rate"),
        (yaml.safe_dump({**table, "train": {"batch_size": "many"}}), "batch_size: expected a whole number, got 'many'"),
        (yaml.safe_dump({**table, "train": [8]}), "`train` does not fit"),
    ):
        (tmp_path / "wrong.yaml").write_text(text)
        assert script.main(line_of(tmp_path / "wrong.yaml", data, tmp_path / "new")) == 2
        said = capsys.readouterr().err
        assert why in said
        assert said.count("\n") == 1
    assert script.main(line_of(tmp_path / "nowhere.yaml", data, tmp_path / "new")) == 2
    assert "cannot read" in capsys.readouterr().err
    assert script.main(line_of(recipe, data, tmp_path / "new", "--steps", "0")) == 2
    assert "at least 1" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
