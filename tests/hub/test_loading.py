"""What arrives of a checkpoint: a weight that it lacks or that is no number is named, and so is a head that is new."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file

import tiny_clip
import tiny_images
from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from sparsesoup.hub.build import ModelAndDataConfig, build_problem, open_task
from sparsesoup.hub.models.loading import load_as_saved, load_model
from sparsesoup.hub.models.weights import LoadingNotes, order_of
from tiny_hub import classifier, listing, offline, run_of, tokenizer, weights_of, write_rows


def edited(source, folder, config=None, drop=(), change=None, extra=(), **files):
    """A copy of a model's folder with other entries in config.json, and weights dropped, changed or added."""
    shutil.copytree(source, folder)
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(table | (config or {})))
    if drop or change or extra:
        weights = {n: t for n, t in weights_of(folder).items() if not any(part in n for part in drop)}
        weights |= {name: torch.ones(2, 2) for name in extra}
        for name, t in (change or {}).items():
            weights[name] = t(weights[name].clone())
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, text in files.items():
        (folder / name.replace("_json", ".json")).write_text(text)
    return folder


def line(model, dataset, out, *more, steps=2):
    words = ["--model", model, "--dataset", dataset, "--sparsity", 0.5, "--steps", steps, "--train.batch-size", 4]
    return [str(word) for word in ["prune", "magnitude", *words, "--out", out, *more]]


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs a command that must be refused in one line; nothing may come into being below `runs`."""

    def check(words, *parts):
        capsys.readouterr()
        before = listing(tmp_path / "runs") if (tmp_path / "runs").exists() else None
        assert main([str(word) for word in words]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("sparsesoup: ")
        assert not [part for part in parts if part not in said], said
        assert (listing(tmp_path / "runs") if (tmp_path / "runs").exists() else None) == before

    return check


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    tiny_images.checkpoint(folder / "vit")
    tiny_images.photos(folder / "photos", rows=12, test=6)
    tiny_clip.checkpoint(folder / "clip")
    tiny_clip.pictures(folder / "colours", rows=4)
    return folder


def nan(t):
    t.view(-1)[3] = float("nan")
    return t


def infinite(t):
    t.view(-1)[:2] = float("-inf")
    return t


LOST = [
    ({"config": {"vocab_size": 70}}, "word_embeddings.weight has shape (64, 16), expected (70, 16)"),
    ({"config": {"max_position_embeddings": 200}}, "position_embeddings.weight has shape (132, 16)"),
    ({"config": {"type_vocab_size": 3}}, "token_type_embeddings.weight has shape (2, 16)"),
    ({"config": {"intermediate_size": 0}}, "intermediate.dense.bias has shape (32,), expected (0,)"),
    ({"drop": ["word_embeddings"]}, "embeddings.word_embeddings.weight is missing"),
    ({"drop": ["embeddings.LayerNorm.weight"]}, "embeddings.LayerNorm.weight is missing"),
    ({"drop": ["layer.1.output.LayerNorm.bias"]}, "layer.1.output.LayerNorm.bias is missing"),
    ({"drop": ["layer.0.attention.self.query.bias"]}, "query.bias is missing"),
    ({"drop": ["layer.0.attention.self.query.weight"]}, "query.weight is missing"),
    ({"change": {"embeddings.LayerNorm.bias": nan}}, "1 of 16 numbers NaN or infinite in bert.embeddings.LayerNorm"),
    ({"change": {"encoder.layer.1.output.dense.weight": infinite}}, "2 of 512 numbers NaN or infinite in bert.encoder"),
    ({"config": {"model_type": "gpt2", "architectures": None}}, "and 27 more, and they have "),
    ({"config": {"model_type": "roberta"}}, "has model_type roberta and architectures BertModel, a class of"),
    ({"config": {"model_type": "camembert"}}, "architectures BertModel, a class of model_type bert; use it as it "),
    ({"extra": ["encoder.layer.1.output.adapter.weight"]}, "output.adapter.weight, which it does not know; "),
]


@pytest.mark.parametrize(("how", "said"), LOST)
def test_a_weight_that_would_be_drawn_at_random_or_is_no_number_is_named(place, refused, tmp_path, how, said):
    model = edited(place / "bert", tmp_path / "model", **how)
    refused(line(model, place / "reviews", tmp_path / "runs"), said, str(model))


@pytest.mark.parametrize(
    ("source", "dataset", "how", "said"),
    [
        ("vit", "photos", {"config": {"image_size": 24}}, "position_embeddings has shape (1, 10, 16)"),
        ("vit", "photos", {"drop": ["layernorm_before.weight"]}, "layernorm_before.weight is missing"),
        ("vit", "photos", {"change": {"embeddings.cls_token": nan}}, "NaN or infinite in vit.embeddings.cls_token"),
        ("clip", "colours", {"drop": ["pre_layrnorm.bias"]}, "pre_layrnorm.bias is missing"),
        ("clip", "colours", {"drop": ["text_model.final_layer_norm"]}, "text_model.final_layer_norm.bias is missing"),
        ("clip", "colours", {"config": {"projection_dim": 10}}, "has shape"),
        ("clip", "colours", {"change": {"text_projection.weight": nan}}, "NaN or infinite in text_projection.weight"),
    ],
)
def test_models_of_images_arrive_whole_too(pictures, refused, tmp_path, source, dataset, how, said):
    model = edited(pictures / source, tmp_path / "model", **how)
    refused(line(model, pictures / dataset, tmp_path / "runs"), said)


def test_questions_teachers_copies_and_runs_arrive_whole_too(place, refused, tmp_path):
    """Every road by which a model comes in."""
    broken = edited(place / "bert", tmp_path / "broken", drop=["embeddings.LayerNorm.bias"])
    refused(line(broken, place / "questions", tmp_path / "runs"), "LayerNorm.bias is missing")
    teacher = classifier(tmp_path / "teacher")
    other = edited(teacher, tmp_path / "other", change={"classifier.weight": nan})
    refused(line(place / "bert", place / "reviews", tmp_path / "runs", "--train.distill.teacher", other),
            "train.distill.teacher: ", "NaN or infinite in classifier.weight")  # fmt: skip

    assert main(line(place / "bert", place / "reviews", tmp_path / "done")) == 0
    run = run_of(tmp_path / "done")
    for how, said in (
        ({"drop": ["embeddings.LayerNorm.bias"]}, "LayerNorm.bias is missing"),
        ({"config": {"vocab_size": 70}}, "word_embeddings.weight has shape"),
        ({"change": {"embeddings.LayerNorm.bias": nan}}, "NaN or infinite"),
    ):
        shutil.rmtree(tmp_path / "base", ignore_errors=True)
        model = edited(place / "bert", tmp_path / "base", **how)
        refused(["apply", run, "--model", model, "--out", tmp_path / "runs"], said)
    with pytest.raises(UserError, match=r"classifier\.bias is missing"):
        load_as_saved(str(edited(run / "model", tmp_path / "product", drop=["classifier.bias"])))
    edited(run / "model", tmp_path / "half", drop=["classifier.bias"])
    (run / "model").rename(tmp_path / "aside")
    (tmp_path / "half").rename(run / "model")
    refused(["test", run], "is not the file that was written")


def test_a_new_head_is_named_before_the_first_step_and_in_the_report(place, tmp_path, capsys):
    model = edited(place / "bert", tmp_path / "model", drop=["pooler"])
    assert main(line(model, place / "reviews", tmp_path / "runs")) == 0
    names = "bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias, classifier.weight"
    said = f"not in the checkpoint of {model}, so initialised with seed 0: {names}"
    assert f"note: {said}" in capsys.readouterr().err.splitlines()
    assert said in json.loads((run_of(tmp_path / "runs") / "report.json").read_text())["head"]


@pytest.mark.parametrize(
    ("family", "labels", "changes", "new"),
    [
        ("bert", "abc", {}, ["classifier.bias", "classifier.weight"]),
        ("bert", "01", {}, []),
        ("roberta", "abc", {}, ["classifier.out_proj.bias", "classifier.out_proj.weight"]),
    ],
)
def test_a_head_for_other_labels_is_new_and_one_that_fits_stays(place, tmp_path, family, labels, changes, new):
    account = LoadingNotes()
    model = classifier(tmp_path / "model", family, labels=tuple(labels))
    load_model(str(model), open_task(ModelAndDataConfig(dataset=str(place / "reviews"))).task, 0, account=account)
    assert account.notes == (
        [f"not in the checkpoint of {model}, so initialised with seed 0: {', '.join(new)}"] if new else []
    )


def test_blocks_that_config_json_does_not_ask_for_are_named(place, tmp_path):
    account = LoadingNotes()
    model = edited(place / "bert", tmp_path / "model", config={"num_hidden_layers": 1})
    load_model(str(model), open_task(ModelAndDataConfig(dataset=str(place / "reviews"))).task, 0, account=account)
    assert "left out, since its config.json does not use them: encoder.layer.1." in account.notes[-1].replace(
        "bert.", ""
    )
    with pytest.raises(UserError, match=r"have .*encoder\.layer\.1.*which its config.json does not know"):
        load_as_saved(str(model))


def test_what_the_task_never_reads_may_be_new(pictures, tmp_path):
    """DINOv2 masks patches in pre-training alone."""
    model = tiny_images.checkpoint(tmp_path / "dinov2", "dinov2")
    task = open_task(ModelAndDataConfig(model=str(model), dataset=str(pictures / "photos"))).task
    account = LoadingNotes()
    load_model(str(edited(model, tmp_path / "unmasked", drop=["mask_token"])), task, 0, account=account)
    assert "dinov2.embeddings.mask_token" in account.notes[0]
    with pytest.raises(UserError, match=r"cls_token is missing"):
        load_model(str(edited(model, tmp_path / "headless", drop=["cls_token"])), task, 0)


def test_a_head_of_clips_own_classifier_may_be_new_and_its_tower_not(pictures, tmp_path):
    """Its class has the parts of the base model as its own, without a name in front."""
    tower = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.SiglipConfig(
        text_config={**tower, "vocab_size": 20}, vision_config={**tower, "image_size": 12, "patch_size": 4}
    )
    transformers.SiglipModel(config).save_pretrained(tmp_path / "siglip")
    tiny_images.processor().save_pretrained(tmp_path / "siglip")
    task = open_task(ModelAndDataConfig(model=str(tmp_path / "siglip"), dataset=str(pictures / "photos"))).task
    account = LoadingNotes()
    load_model(str(tmp_path / "siglip"), task, 0, account=account)
    assert account.notes[0].endswith("initialised with seed 0: classifier.bias, classifier.weight")
    lacking = edited(tmp_path / "siglip", tmp_path / "lacking", drop=["vision_model.post_layernorm.weight"])
    with pytest.raises(UserError, match=r"vision_model\.post_layernorm\.weight is missing"):
        load_model(str(lacking), task, 0)


# labels in another order


@pytest.mark.parametrize(
    ("own", "labels", "order"),
    [
        (["b", "a"], ["a", "b"], [1, 0]),
        (["Positive ", "NEGATIVE"], ["negative", "positive"], [1, 0]),
        (["LABEL_0", "LABEL_1"], ["0", "1"], [0, 1]),
        (["LABEL_0", "LABEL_1"], ["bad", "good"], [0, 1]),
        (["a", "A"], ["A", "a"], [1, 0]),  # case tells these apart
        (["x  y", "z"], ["z", "x y"], [1, 0]),
        (["neutral", "yes", "no"], ["good", "neutral", "bad"], [1, 0, 2]),
    ],
)
def test_rows_of_a_head_are_matched_by_name(own, labels, order):
    assert order_of(own, labels) == order


def answers(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "deberta-v2", "electra"])
def test_a_classifier_with_its_labels_in_another_order_answers_as_before(place, tmp_path, family):
    rows = [("a good film", "good"), ("a poor film", "poor"), ("a fine film", "fine")] * 6
    write_rows(tmp_path / "data" / "train.csv", ("text", "label"), rows)
    model, account = classifier(tmp_path / "model", family, labels=("POOR", "good", "Fine ")), LoadingNotes()
    own = transformers.AutoModelForSequenceClassification.from_pretrained(model).eval()
    task = open_task(ModelAndDataConfig(dataset=str(tmp_path / "data"))).task
    found = load_model(str(model), task, 0, account=account)
    inputs = tokenizer(family in ("bert", "deberta-v2", "electra"))("a warm plot", return_tensors="pt")
    assert tuple(task.labels) == ("fine", "good", "poor")
    assert torch.equal(answers(found, inputs), answers(own, inputs)[:, [2, 1, 0]])
    assert found.config.id2label == {0: "fine", 1: "good", 2: "poor"}
    assert account.notes == [
        "the head's rows are POOR, good, Fine ; they were put in the order fine, good, poor, matched by name"
    ]


def test_a_classifier_of_images_and_a_teacher_are_matched_too(place, pictures, tmp_path, capsys):
    config = tiny_images.CONFIGS["vit"]()
    config.id2label = dict(enumerate(("red", "dark", "light")))
    own = transformers.ViTForImageClassification(config).eval()
    shutil.copytree(pictures / "vit", tmp_path / "vit")
    own.save_pretrained(tmp_path / "vit")
    task = open_task(ModelAndDataConfig(model=str(tmp_path / "vit"), dataset=str(pictures / "photos"))).task
    inputs = {"pixel_values": torch.randn(2, 3, 12, 12)}
    found = load_model(str(tmp_path / "vit"), task, 0)
    assert torch.equal(answers(found, inputs), answers(own, inputs)[:, [1, 2, 0]])

    teacher = classifier(tmp_path / "teacher", labels=("1", "0"))
    assert main(line(place / "bert", place / "reviews", tmp_path / "runs", "--train.distill.teacher", teacher)) == 0
    said = f"note: the teacher {teacher}: the head's rows are 1, 0; they were put in the order 0, 1, matched by name"
    assert said in capsys.readouterr().err.splitlines()


def test_a_head_whose_rows_have_other_names_says_for_what_they_are_taken(place, tmp_path):
    account = LoadingNotes()
    model = classifier(tmp_path / "model", labels=("cold", "warm"))
    load_model(str(model), open_task(ModelAndDataConfig(dataset=str(place / "reviews"))).task, 0, account=account)
    assert account.notes == ["the head's rows cold, warm are taken in this order for the labels 0, 1"]


# models that are not what they seem


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_is_refused_with_the_advice_to_merge_it(place, refused, tmp_path, whole, name):
    model = tmp_path / "model"
    shutil.copytree(place / "bert", model)
    if not whole:
        (model / "config.json").unlink()
        (model / "model.safetensors").unlink()
    (model / name).write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    for words in (
        line(model, place / "reviews", tmp_path / "runs"),
        line(place / "bert", place / "reviews", tmp_path / "runs", "--train.distill.teacher", model),
    ):
        refused(words, str(model), name, "merge_and_unload()", "save_pretrained")


def test_an_adapter_in_a_subfolder_is_named_since_the_base_alone_is_pruned(place, refused, tmp_path, capsys):
    """peft keeps each adapter but the first in a folder of its own."""
    model = tmp_path / "model"
    shutil.copytree(place / "bert", model)
    for folder in ("default", "checkpoint-5/other"):
        (model / folder).mkdir(parents=True)
        (model / folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert main(line(model, place / "reviews", tmp_path / "out")) == 0
    said = (
        f"note: model {model} holds adapters that are not read, in checkpoint-5/other, default; to prune one, merge it"
    )
    assert [row for row in capsys.readouterr().err.splitlines() if row.startswith(said)]
    (model / "config.json").unlink()
    words = line(model, place / "reviews", tmp_path / "runs")
    refused(words, str(model), "default/adapter_config.json", "merge_and_unload()")


HUB = """
import pathlib, sys
from sparsesoup.cli.main import main
from sparsesoup.hub.models.checkpoint import model_files_digest
folder, *words = sys.argv[1:]
tuned, plain = ([word.replace("NAME", name) for word in words] for name in ("tuned", "plain"))
assert main(tuned) == 2
assert model_files_digest("someone/plain") == model_files_digest(folder)
assert main(plain) == 0
(pathlib.Path(folder) / "generation_config.json").write_text("{}")  # from another program: no run reads it
assert main(plain) == 0
(pathlib.Path(folder) / "tokenizer_config.json").write_text("{}")
assert main(plain) == 2
"""


def test_a_model_of_the_hub_is_known_by_its_files_and_refused_if_it_is_an_adapter(place, tmp_path, monkeypatch):
    """In a process of its own: where copies from the Hub are kept is settled when its library is imported."""
    for name in ("tuned", "plain"):
        copy = tmp_path / "cache" / f"models--someone--{name}"
        shutil.copytree(place / "bert", copy / "snapshots" / "a1")
        (copy / "refs").mkdir()
        (copy / "refs" / "main").write_text("a1")
    (tmp_path / "cache/models--someone--tuned/snapshots/a1/adapter_config.json").write_text('{"peft_type": "LORA"}')
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    folder, words = copy / "snapshots" / "a1", line("someone/NAME", place / "reviews", tmp_path / "runs")
    done = subprocess.run(
        [sys.executable, "-c", HUB, folder, *words], capture_output=True, text=True, env=offline(), check=False
    )
    assert done.returncode == 0, done.stderr
    first, *_, last = [row for row in done.stderr.splitlines() if row.startswith("sparsesoup: ")]
    assert first.startswith("sparsesoup: model someone/tuned holds an adapter (adapter_config.json)")
    assert last.startswith("sparsesoup: model someone/plain is not the one that ")


def test_a_tokenizer_with_ids_beyond_the_embeddings_is_refused(place, refused, tmp_path):
    shutil.copytree(place / "bert", tmp_path / "model")
    tool = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    tool.add_tokens([f"new{i}" for i in range(20)])
    tool.save_pretrained(tmp_path / "model")
    for dataset in ("reviews", "questions"):
        refused(line(tmp_path / "model", place / dataset, tmp_path / "runs"),
                "has ids up to 69, the model 64 embeddings", "resize_token_embeddings")  # fmt: skip


def test_a_mask_token_beyond_the_embeddings_is_no_fault_since_no_text_gives_it(place, tmp_path):
    shutil.copytree(place / "bert", tmp_path / "model")
    tool = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    tool.add_tokens([f"new{i}" for i in range(64 - len(tool))])
    tool.add_special_tokens({"mask_token": "<mask>"})
    assert tool.mask_token_id == 64  # as that of bart-large-cnn
    tool.save_pretrained(tmp_path / "model")
    assert main(line(tmp_path / "model", place / "reviews", tmp_path / "runs")) == 0


@pytest.mark.parametrize("outside", ["../bert/model.safetensors", "/etc/hostname", "sub/../../bert/model.safetensors"])
def test_an_index_of_weights_does_not_lead_out_of_its_folder(place, refused, tmp_path, outside):
    shutil.copytree(place / "bert", tmp_path / "bert")
    model = edited(place / "bert", tmp_path / "model")
    names = [*weights_of(model)]
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, outside)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(line(model, place / "reviews", tmp_path / "runs"), "model.safetensors.index.json", "outside its folder")
    (model / "sub").mkdir()
    shutil.copy(place / "bert" / "model.safetensors", model / "sub" / "part.safetensors")
    index["weight_map"] = dict.fromkeys(names, "sub/part.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_as_saved(str(model)) is not None
    for damaged in ("[]", "{", '{"weight_map": [1]}', '{"weight_map": {"a": 5}}'):
        (model / "model.safetensors.index.json").write_text(damaged)
        refused(line(model, place / "reviews", tmp_path / "runs"), "index.json cannot be read")


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ({"num_attention_heads": 0}, ["num_attention_heads 0", "1 or more"]),
        ({"num_attention_heads": None}, ["num_attention_heads"]),
        ({"num_attention_heads": -2}, ["num_attention_heads -2"]),
        ({"num_attention_heads": 3}, ["(16)", "(3)"]),
        ({"num_attention_heads": "2"}, ["num_attention_heads"]),
        ({"hidden_size": 0}, ["hidden_size 0"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers 0"]),
        ({"hidden_dropout_prob": float("nan")}, ["hidden_dropout_prob nan"]),
        ({"attention_probs_dropout_prob": 1.5}, ["attention_probs_dropout_prob 1.5", "0 to below 1"]),
        ({"classifier_dropout": float("nan")}, ["classifier_dropout nan"]),
        ({"layer_norm_eps": float("inf")}, ["layer_norm_eps inf"]),
        ({"initializer_range": float("nan")}, ["initializer_range nan"]),
        ({"hidden_act": "nonsense"}, ["'nonsense'"]),
        ({"model_type": ["bert"]}, ["cannot load model"]),
        ({"model_type": 5}, ["model type `5`"]),
        ({"pad_token_id": 9999}, ["cannot load model"]),
        ({"id2label": "good"}, ["cannot load model"]),
        ({"quantization_config": 5}, ["cannot load model"]),
        ({"return_dict": False}, ["cannot answer a row of"]),
        ({"output_attentions": True}, ["output_attentions"]),
    ],
)
def test_a_config_that_makes_no_model_ends_in_one_line(place, refused, tmp_path, entry, parts):
    model = edited(place / "bert", tmp_path / "model", config=entry)
    refused(line(model, place / "reviews", tmp_path / "runs"), str(model), *parts)


@pytest.mark.parametrize("named", ["BertModl", 5, ["Nonsense"], ["pipeline"], ["BertTokenizer"], [[]], {}, [""]])
def test_architectures_of_nonsense_are_refused_where_they_name_the_class(place, tmp_path, named):
    model = edited(place / "bert", tmp_path / "model", config={"architectures": named})
    with pytest.raises(UserError, match=r"config\.json of model .* has architectures"):
        load_as_saved(str(model))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "null"),
        ("config.json", "[5]"),
        ("config.json", "[" * 100_000),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "null"),
        ("tokenizer.json", '{"version": 5}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": "BertModel"}'),
        ("tokenizer_config.json", '{"tokenizer_class": "TokenizersBackend", "model_input_names": ["x"]}'),
        ("tokenizer_config.json", '{"tokenizer_class": "TokenizersBackend", "model_max_length": "many"}'),
        ("special_tokens_map.json", "[]"),
        ("added_tokens.json", "[]"),
    ],
)
def test_a_damaged_file_beside_the_weights_ends_in_one_line(place, refused, tmp_path, file, text):
    shutil.copytree(place / "bert", tmp_path / "model")
    (tmp_path / "model" / file).write_text(text)
    part = "cannot load model" if file == "config.json" else "cannot load the tokenizer of model"
    refused(line(tmp_path / "model", place / "reviews", tmp_path / "runs"), part, str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({"image_mean": [0.5]}, "mean must have 3 elements"),
        ({"image_std": [0, 0, 0]}, "makes numbers from"),
        ({"rescale_factor": float("nan")}, "makes numbers from nan to nan"),
        ({"rescale_factor": 0}, "makes numbers from -1.0 to -1.0"),
        ({"size": {"height": 0, "width": 12}}, "Size must contain"),
        ({"resample": 99}, "99"),
    ],
)
def test_an_image_processor_that_makes_nothing_of_images_is_named(pictures, refused, tmp_path, entry, part):
    shutil.copytree(pictures / "vit", tmp_path / "model")
    path = tmp_path / "model" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    refused(line(tmp_path / "model", pictures / "photos", tmp_path / "runs"),
            "cannot load the image processor of model", part)  # fmt: skip


@pytest.mark.parametrize("processor", [None, "specials"])
def test_a_tokenizer_that_makes_nothing_of_any_text_is_named(place, refused, tmp_path, processor):
    """One that knows no letter of the texts; without special tokens around them the rows are empty."""
    shutil.copytree(place / "bert", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    table = json.loads(path.read_text())
    table["model"]["vocab"] = {k if k.startswith("[") else f"{k}é": i for k, i in table["model"]["vocab"].items()}
    if processor is None:
        table["post_processor"], table["normalizer"] = (
            None,
            {"type": "Replace", "pattern": {"Regex": "."}, "content": ""},
        )
    path.write_text(json.dumps(table))
    said = (
        "makes none of 'film" if processor is None else "makes nothing but special tokens of every text, such as 'film"
    )
    refused(line(tmp_path / "model", place / "reviews", tmp_path / "runs"), said, "the tokenizer that belongs")


def test_a_problem_names_its_head_and_what_is_fresh_in_it(place, pictures, tmp_path):
    """A warm-up of the head trains these alone."""
    for model, fresh in ((place / "bert", True), (classifier(tmp_path / "model"), False)):
        where = ModelAndDataConfig(model=str(model), dataset=str(place / "reviews"))
        problem = build_problem(where, open_task(where), steps=1)
        assert problem.head == ("classifier.weight", "classifier.bias")
        assert problem.fresh == (("classifier.bias", "classifier.weight") if fresh else ())
    where = ModelAndDataConfig(model=str(pictures / "clip"), dataset=str(pictures / "colours"))
    problem = build_problem(where, open_task(where), steps=1)
    assert problem.head == problem.fresh == ()
