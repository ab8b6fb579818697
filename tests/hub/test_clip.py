"""CLIP as a classifier: the head is made of words and frozen, the image tower is pruned, and a ticket carries both."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture
from safetensors.torch import load_file

from sparsesoup import export, load_compact, load_packed, prune, push
from sparsesoup.cli.main import main
from sparsesoup.cli.prune import parse_arguments
from sparsesoup.core.errors import UserError
from sparsesoup.hub.build import ModelAndDataConfig, build_problem, open_task
from sparsesoup.hub.models.loading import load_model
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.hub.tasks import zero_shot
from sparsesoup.hub.tasks.zero_shot import names_of, templates_of
from sparsesoup.report.terminal import read_report
from sparsesoup.runs.config import dump_config
from sparsesoup.runs.yaml_text import dump_yaml, read_yaml
from sparsesoup.training.config import TrainingConfig
from tiny_clip import COLOURS, checkpoint, clip, pictures, tokenizer
from tiny_hub import masks_of, offline, run_of

pytestmark = pytest.mark.integration

NAMES = ("brick red", "moss green", "sky")
ONE = ("a photo of a {}.",)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny CLIP and images of three colours; no test writes to it."""
    folder = tmp_path_factory.mktemp("clip")
    return ModelAndDataConfig(model=str(checkpoint(folder / "clip")), dataset=str(pictures(folder / "colours")))


def line_of(place, out, method="magnitude", *more):
    flags = ["--model", place.model, "--dataset", place.dataset, "--sparsity", "0.5", "--steps", "30",
             "--train.batch-size", "8", "--train.learning-rate", "1e-3", "--out", str(out)]  # fmt: skip
    return ["prune", method, *flags, *more]


def words_of_run(place, run):
    return open_task(ModelAndDataConfig(model=str(run), dataset=place.dataset)).task


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """A finished run; no test writes to it."""
    out = tmp_path_factory.mktemp("ticket")
    assert main(line_of(place, out, "isp")) == 0
    return run_of(out)


def tower(place, templates=ONE):
    return load_model(place.model, replace(open_task(place).task, templates=templates), 0).eval()


@torch.no_grad()
def test_with_one_template_the_logits_are_the_checkpoints_own(place):
    whole, reader, pixels = (
        transformers.CLIPModel.from_pretrained(place.model).eval(),
        tokenizer(),
        torch.randn(4, 3, 8, 8),
    )
    words = reader([ONE[0].format(name) for name in NAMES], padding=True, return_tensors="pt")
    own = whole(pixel_values=pixels, **words).logits_per_image
    ours = zero_shot.predict_zero_shot(tower(place), {"pixel_values": pixels})
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    assert own.std() > 0.01


@torch.no_grad()
def test_the_head_is_the_mean_of_directions_not_of_embeddings():
    model, words, templates = clip(), tokenizer(), ("{}", "the {}!", "no {}, never a {}")
    head = zero_shot.zero_shot_head_of(model, words, NAMES, templates)
    for name, row in zip(NAMES, head, strict=True):
        prompts = [words(template.replace("{}", name), return_tensors="pt") for template in templates]
        each = [model.get_text_features(**prompt).pooler_output[0] for prompt in prompts]
        mean = sum(e / e.norm() for e in each) / len(each)
        torch.testing.assert_close(row, model.logit_scale.exp() * mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_many_prompts_at_a_time_make_the_same_head(monkeypatch):
    model, words, templates = clip(), tokenizer(), ("{}", "a {}")
    whole = zero_shot.zero_shot_head_of(model, words, NAMES, templates)
    monkeypatch.setattr(zero_shot, "AT_A_TIME", 4)
    torch.testing.assert_close(zero_shot.zero_shot_head_of(model, words, NAMES, templates), whole)


def test_the_image_tower_of_vit_b_32_has_the_published_count_of_prunable_weights():
    with torch.device("meta"):
        found = find_prunable(zero_shot.vision_tower(transformers.CLIPModel(transformers.CLIPConfig())))
    assert sum(target.shape[0] * target.shape[1] for target in found.values()) == 84_934_656
    assert {target.role for target in found.values()} == {
        "query", "key", "value", "output", "feed-forward in", "feed-forward out"
    }  # fmt: skip


def test_a_folder_as_clip_was_published_is_read_alike(place, tmp_path):
    """Processor and tokenizer in files of their own, sizes as numbers, 2 for the end of a text whatever its number."""
    folder, words = Path(shutil.copytree(place.model, tmp_path / "old")), tokenizer()
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    processor = {"crop_size": 8, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3,
                 "feature_extractor_type": "CLIPFeatureExtractor", "size": 8,
                 "image_mean": [0.48145466, 0.4578275, 0.40821073],
                 "image_std": [0.26862954, 0.26130258, 0.27577711]}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "vocab.json").write_text(json.dumps(words.get_vocab()))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "do_lower_case": True})
    )
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config | {"text_config_dict": None, "vision_config_dict": None}))
    old = replace(place, model=str(folder))
    one, other = (build_problem(p, open_task(p), steps=1) for p in (place, old))
    assert torch.equal(one.pretrained.get_buffer(zero_shot.HEAD), other.pretrained.get_buffer(zero_shot.HEAD))
    assert other.validate(other.pretrained) == one.validate(one.pretrained)


def test_no_text_tower_is_on_the_way_of_the_training(place):
    problem = build_problem(place, open_task(place), steps=2, training=TrainingConfig(batch_size=8))
    assert type(problem.pretrained) is transformers.CLIPVisionModelWithProjection
    learnt = [name for name, p in problem.pretrained.named_parameters() if p.requires_grad]
    assert learnt
    assert all(name.startswith(("vision_model.", "visual_projection.")) for name in learnt)
    assert all(name.startswith("vision_model.encoder.layers.") for name in problem.targets)


def test_a_run_trains_the_projection_and_leaves_the_head_and_the_checkpoint(place, run):
    base, found = load_file(f"{place.model}/model.safetensors"), load_file(run / "model" / "model.safetensors")
    assert not torch.equal(base["visual_projection.weight"], found["visual_projection.weight"])
    assert not any(name.startswith("text_") for name in found)
    head = load_file(run / "model" / "pruning" / "zero_shot.safetensors")["head"]
    whole = transformers.CLIPModel.from_pretrained(place.model).eval()
    torch.testing.assert_close(head, zero_shot.zero_shot_head_of(whole, tokenizer(), NAMES, ONE), rtol=0, atol=0)
    for name, mask in masks_of(run).items():
        assert not found[name][~mask].any()
        assert found[name][mask].any()


def test_a_ticket_carries_its_prompts_and_the_report_what_was_right_before_training(place, run):
    words = json.loads((run / "model" / "pruning" / "zero_shot.json").read_text())
    assert len(words.pop("digest")) == 64
    assert words == {"format": "1", "names": [*NAMES], "templates": [*ONE]}
    report, problem = read_report(run), build_problem(place, open_task(place), steps=1)
    assert report["notes"]["before"] == problem.validate(problem.pretrained)
    assert "3 classes (brick_red, moss_green, sky)" in report["task"]
    assert "'a photo of a {}.'" in report["task"]
    assert "frozen" in report["head"]


ALONE = """
import json, sys
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, CLIPVisionModelWithProjection
from PIL import Image

folder, picture = sys.argv[1:]
model = CLIPVisionModelWithProjection.from_pretrained(folder).eval()
head = load_file(folder + "/pruning/zero_shot.safetensors")["head"]
processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
images = processor(Image.open(picture).convert("RGB"), return_tensors="pt")
with torch.no_grad():
    embeds = model(**images).image_embeds
logits = embeds / embeds.norm(dim=-1, keepdim=True) @ head.T
assert "sparsesoup" not in sys.modules
print(json.dumps(logits.tolist()))
"""


@torch.no_grad()
def logits(model, head, picture):
    """What the command above says, with a model that is loaded otherwise."""
    model.register_buffer(zero_shot.HEAD, head, persistent=False)
    return zero_shot.predict_zero_shot(model.eval(), {"pixel_values": picture})


@torch.no_grad()
def test_the_documented_lines_give_the_logits_of_the_run_without_us(place, run):
    picture = f"{place.dataset}/test/sky/0.png"
    answer = subprocess.run([sys.executable, "-c", ALONE, str(run / "model"), picture], capture_output=True, text=True,
                            env=offline(), check=True)  # fmt: skip
    model = load_model(str(run), words_of_run(place, run), 0).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(place.model, backend="pil")
    batch = processor(Picture.open(picture).convert("RGB"), return_tensors="pt")
    found = torch.tensor(json.loads(answer.stdout))
    torch.testing.assert_close(found, zero_shot.predict_zero_shot(model, batch), rtol=0, atol=1e-6)


def test_a_run_is_scored_on_test_and_shown(run, capsys, tmp_path):
    copy = tmp_path / "seed-0"
    shutil.copytree(run, copy)
    assert main(["test", str(copy)]) == 0
    assert 0 <= read_report(copy)["test"]["accuracy"] <= 1
    assert main(["show", str(copy)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Zero-shot, dense and before any training:" in told


def test_exports_are_of_the_image_tower_and_carry_the_head(place, tmp_path):
    stages = {"attention": "heads", "score_rate": 1.0}
    pruned = prune("hybrid-movement", out=tmp_path / "runs", model=place.model, dataset=place.dataset, sparsity=0.5,
                   steps=12, train={"batch_size": 8}, method=stages, progress=False)  # fmt: skip
    stock, pixels = transformers.CLIPVisionModelWithProjection.from_pretrained, torch.randn(2, 3, 8, 8)
    head = load_file(pruned.path / "model" / "pruning" / "zero_shot.safetensors")["head"]
    expected = logits(stock(pruned.path / "model"), head, pixels)
    for to, load in {"dense": stock, "packed": load_packed, "compact": load_compact}.items():
        made = export(pruned.path, to, tmp_path / to)
        carried = load_file(made.path / "pruning" / "zero_shot.safetensors")["head"]
        assert (made.path / "pruning" / "zero_shot.json").is_file()
        torch.testing.assert_close(logits(load(made.path), carried, pixels), expected, rtol=1e-5, atol=1e-5)
    assert not any("text" in row["layer"] for row in made.facts["layers"])
    push(made.path, "me/clip", out=tmp_path / "card")
    assert (
        'hf_hub_download("me/clip", "pruning/zero_shot.safetensors")' in (tmp_path / "card" / "README.md").read_text()
    )
    asked = export(pruned.path, "packed", tmp_path / "asked", verify=True).facts["verified"]
    assert asked["same"] == asked["rows"] > 0


@torch.no_grad()
def test_a_pruned_tower_goes_back_among_the_words_of_its_base(place, run):
    """As docs/guides/images.md has it."""
    whole, found = (
        transformers.CLIPModel.from_pretrained(place.model),
        load_model(str(run), words_of_run(place, run), 0),
    )
    whole.vision_model, whole.visual_projection = found.vision_model, found.visual_projection
    batch = tokenizer()([ONE[0].format(name) for name in NAMES], padding=True, return_tensors="pt")
    pixels = torch.randn(2, 3, 8, 8)
    own = whole(pixel_values=pixels, **batch).logits_per_image
    torch.testing.assert_close(own, zero_shot.predict_zero_shot(found, {"pixel_values": pixels}), rtol=1e-5, atol=1e-5)


def test_the_masks_alone_prune_the_image_tower_of_a_whole_clip(place, run, tmp_path):
    assert main(["apply", str(run), "--model", place.model, "--out", str(tmp_path / "whole")]) == 0
    found, base = load_file(tmp_path / "whole" / "model.safetensors"), load_file(f"{place.model}/model.safetensors")
    masks = masks_of(run)
    assert found.keys() == base.keys()
    assert all(torch.equal(found[n], base[n] * masks[n] if n in masks else base[n]) for n in base)
    assert transformers.CLIPProcessor.from_pretrained(tmp_path / "whole").image_processor.size["height"] == 8


def test_prompts_and_names_are_settings_of_a_run(place, tmp_path):
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\n")
    (tmp_path / "prompts.txt").write_text("a {} thing\nsomething {}, really\n")
    more = ["--prompts", str(tmp_path / "prompts.txt"), "--class-names", str(tmp_path / "names.txt")]
    assert main(line_of(place, tmp_path / "runs", "dense", *more)) == 0
    words = json.loads((run_of(tmp_path / "runs") / "model" / "pruning" / "zero_shot.json").read_text())
    assert words["names"] == ["red", "green", "blue"]
    assert words["templates"] == ["a {} thing", "something {}, really"]
    (tmp_path / "prompts.txt").unlink()
    assert main(["test", str(run_of(tmp_path / "runs"))]) == 0


def test_a_stopped_run_does_not_go_on_with_other_words_in_the_same_file(place, capsys, tmp_path):
    words = tmp_path / "prompts.txt"
    words.write_text("a {} thing\n")
    line = line_of(place, tmp_path / "runs", "magnitude", "--prompts", str(words))
    assert main(line) == 0
    (run_of(tmp_path / "runs") / "report.json").unlink()  # as if killed just before its end
    words.write_text("no {} thing\n")
    refused(capsys, line, "was begun with another head")


def test_a_run_from_before_there_were_prompts_is_the_same_run(place, tmp_path):
    line = line_of(place, tmp_path / "runs")
    assert main(line) == 0
    run = run_of(tmp_path / "runs")
    table = read_yaml((run / "run.yaml").read_text())
    del table["prompts"], table["class_names"]
    (run / "run.yaml").write_text(dump_yaml(table))
    before = (run / "report.json").stat().st_mtime_ns
    assert main(line) == 0
    assert (run / "report.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("prompt", ["a photo of a {}.", "{}", "photo: {}, of a thing", "[{}]", 'the "{}"'])
def test_a_prompt_is_taken_as_it_is_written(place, prompt):
    settings, _ = parse_arguments(["magnitude", "--model", place.model, "--prompts", prompt])
    assert settings.model_data.prompts == prompt
    assert read_yaml(dump_config(settings))["prompts"] == prompt


def test_the_words_known_for_a_dataset_are_taken_by_its_name():
    assert templates_of(None, "mnist") == ('a photo of the number: "{}".',)
    assert len(templates_of(None, "cifar10_jpeg")) > 1
    assert templates_of(None, "flowers") == ONE
    assert names_of(None, ["a_b", "c"], False, "x") == ("a b", "c")


def refused(capsys, line, *parts):
    capsys.readouterr()
    assert main([str(word) for word in line]) == 2
    out, errors = capsys.readouterr()
    (said,) = errors.splitlines()
    assert not out
    assert all(part in said for part in parts), said


def test_bad_words_are_refused_in_one_line(place, capsys, tmp_path):
    out = tmp_path / "runs"
    refused(capsys, line_of(place, out, "isp", "--prompts", "a photo"), "'a photo' has no {}", "--prompts")
    refused(capsys, line_of(place, out, "isp", "--class-names", "red,green"), "2 names are given, ", "3 classes")
    refused(
        capsys,
        line_of(place, out, "isp", "--class-names", "names.txt"),
        "1 names are given (there is no file names.txt)",
    )
    refused(capsys, line_of(place, out, "isp", "--class-names", "red,sky,red"), "'red' is there twice", "--class-names")
    refused(capsys, line_of(place, out, "isp", "--class-names", "red,,green"), "class 1", "empty name")
    long = "a photo of something that is " + 20 * "very " + "{}"
    refused(capsys, line_of(place, out, "isp", "--prompts", long), "tokens, the text tower takes 48", "--prompts")
    assert not out.exists()


def test_numbers_for_want_of_names_are_refused_with_the_remedy(place, capsys, tmp_path):
    features = Features({"image": Image(), "label": Value("int64")})
    plain = [Picture.new("RGB", (8, 8), colour) for colour in COLOURS.values()]
    rows = Dataset.from_dict({"image": plain * 6, "label": [0, 1, 2] * 6}, features=features)
    (tmp_path / "numbered").mkdir()
    rows.to_parquet(tmp_path / "numbered" / "train.parquet")
    numbered = ModelAndDataConfig(model=place.model, dataset=str(tmp_path / "numbered"))
    refused(
        capsys, line_of(numbered, tmp_path / "runs"), "3 classes of numbered are numbers without names", "--class-names"
    )
    assert main(line_of(numbered, tmp_path / "runs", "dense", "--class-names", "red,green,blue")) == 0


def test_words_for_a_model_that_reads_none_are_refused(place, capsys, tmp_path):
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    ))  # fmt: skip
    vit.save_pretrained(tmp_path / "vit")
    transformers.AutoImageProcessor.from_pretrained(place.model, backend="pil").save_pretrained(tmp_path / "vit")
    other = ModelAndDataConfig(model=str(tmp_path / "vit"), dataset=place.dataset)
    refused(capsys, line_of(other, tmp_path / "runs", "isp", "--prompts", "a {}"), "read by a CLIP", "leave them out")


def test_a_tower_without_its_words_and_a_ticket_with_others_are_refused(place, run, capsys, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(run / "model", bare, ignore=shutil.ignore_patterns("pruning"))
    refused(
        capsys,
        line_of(ModelAndDataConfig(model=str(bare), dataset=place.dataset), tmp_path / "runs"),
        "whole CLIPModel",
    )
    ticket = ModelAndDataConfig(model=str(run), dataset=place.dataset)
    refused(capsys, line_of(ticket, tmp_path / "runs", "isp", "--prompts", "my {}"), "no text tower", "base model")
    assert main(line_of(ticket, tmp_path / "runs", "dense")) == 0


def test_a_clip_teaches_itself_by_the_same_head(place, tmp_path):
    assert main(line_of(place, tmp_path, "pins", "--train.precision", "bf16")) == 0


def test_a_dense_clip_teaches(place, tmp_path):
    assert main(line_of(place, tmp_path, "gradual", "--train.distill.teacher", "dense")) == 0


def test_a_clip_without_a_tokenizer_is_refused_since_all_its_classes_would_be_the_same(place, tmp_path):
    shutil.copytree(place.model, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(UserError, match="mute has no tokenizer"):
        load_model(str(tmp_path / "mute"), open_task(place).task, 0)
