"""Images are seen as the model's processor makes them, cropped lightly in training alone, and pruned all the way."""

import json
import shutil
import warnings
from dataclasses import replace

import PIL.Image
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Image, Value
from torch.utils.flop_counter import FlopCounterMode

import sparsesoup as library
from conftest import same
from processes import kill_after
from sparsesoup import load_compact, load_packed
from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from sparsesoup.core.rng import cpu_generator
from sparsesoup.hub.build import ModelAndDataConfig, build_problem, open_task
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.hub.tasks import images
from sparsesoup.hub.tasks.images import ImageTask, encode_images, find_images, random_crop
from sparsesoup.hub.tasks.registry import describe_task, infer_task
from sparsesoup.hub.tasks.splits import open_splits, open_test, training_splits
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.cost import CountFlops
from sparsesoup.training.loop import train
from tiny_hub import checkpoint as texts_checkpoint
from tiny_hub import costs_of, log_of, masks_of, run_of, weights_of, write_rows
from tiny_images import (
    CLASSES,
    CONFIGS,
    LAYERS,
    PATCH,
    SIDE,
    TASK,
    WIDTH,
    checkpoint,
    parquet,
    photos,
    processor,
    table,
)

TOTAL = LAYERS * (4 * WIDTH * WIDTH + 2 * WIDTH * 32)
METHODS = {
    "magnitude": [],
    "movement": [],
    "hybrid-movement": ["--method.attention", "heads", "--method.score-rate", "0.5"],
    "isp": ["--method.stages", "2", "--method.weak-masks", "2", "--method.look-ahead", "0.1"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny ViT, a tiny BERT, and pictures in a folder and in parquet; no test writes to it."""
    folder = tmp_path_factory.mktemp("images")
    checkpoint(folder / "vit")
    texts_checkpoint(folder / "bert")
    photos(folder / "photos")
    parquet(folder / "table")
    return folder


def line_of(place, out, method="magnitude", **changed):
    flags = {"model": place / "vit", "dataset": place / "photos", "sparsity": 0.6, "steps": 20, "train.batch-size": 8,
             "train.learning-rate": 0.01} | {k.replace("_", "-"): v for k, v in changed.items()}  # fmt: skip
    return ["prune", method, *(word for name, value in flags.items() for word in (f"--{name}", str(value))),
            *METHODS[method], "--out", str(out)]  # fmt: skip


# What is read


def test_a_folder_a_class_is_a_task_of_images_with_the_splits_of_its_folders(place):
    source = open_splits(str(place / "photos"))
    task = infer_task(source.train_split, source.name, None, None)
    assert task == TASK
    assert describe_task(task) == "3 classes (dark, light, red) in column label from column image (images)"
    assert {name: len(rows) for name, rows in source.splits.items()} == {"test": 12, "train": 48}
    train, validation = training_splits(source, task, 0)
    assert (len(train), len(validation), len(open_test(source, task)["test"])) == (43, 5, 12)


def test_classes_have_the_same_numbers_in_every_split_and_no_split_folders_mean_one_split(tmp_path):
    photos(tmp_path / "some")
    shutil.rmtree(tmp_path / "some" / "test" / "dark")
    test = open_splits(str(tmp_path / "some")).splits["test"]
    assert {test.features["label"].int2str(row["label"]) for row in test} == {"light", "red"}
    assert all(row["image"].filename.split("/")[-2] == CLASSES[row["label"]] for row in test)
    whole = open_splits(str(tmp_path / "some" / "train"))
    assert list(whole.splits) == ["train"]
    assert len(open_test(whole, infer_task(whole.train_split, "some", None, None))["test"]) == 5


def test_a_table_that_names_the_images_of_a_split_gives_the_rows_of_folders_of_classes(place, tmp_path):
    folder = shutil.copytree(place / "photos", tmp_path / "named")
    for split in ("train", "test"):
        rows = [(f"{p.parent.name}/{p.name}", p.parent.name, 7) for p in sorted((folder / split).glob("*/*"))]
        write_rows(folder / split / "metadata.csv", ("file_name", "kind", "size"), rows)
    named, plain = (open_splits(str(at)) for at in (folder, place / "photos"))
    task = infer_task(named.train_split, "named", None, "kind")
    assert task == ImageTask(("image",), "kind", CLASSES, ("accuracy", "macro_f1"))
    for split, wanted in plain.splits.items():
        seen = [picture.tobytes() for picture in named.splits[split]["image"]]
        assert seen == [picture.tobytes() for picture in wanted["image"]]
        assert named.splits[split]["kind"] == [CLASSES[number] for number in wanted["label"]]


def test_a_table_that_names_images_of_several_splits_is_refused(place, refused, tmp_path):
    folder = shutil.copytree(place / "photos", tmp_path / "named")
    rows = [(str(path.relative_to(folder)), path.parent.name) for path in sorted(folder.glob("*/*/*"))]
    write_rows(folder / "metadata.csv", ("file_name", "label"), rows)
    line = line_of(place, tmp_path / "runs", dataset=folder)
    refused(line, "metadata.csv is not all of one split", "each folder of a split")
    write_rows(folder / "metadata.csv", ("file_name", "label"), [row for row in rows if row[0].startswith("train")])
    assert len(open_splits(str(folder)).train_split) == 48
    write_rows(folder / "data" / "metadata.csv", ("file_name", "label"), rows[:1])
    refused(line, "metadata.csv is not all of one split")


def test_the_column_of_images_is_found_or_named(place):
    rows = table(4)
    assert find_images(rows, "x", None, None) == TASK
    contents = [cell["bytes"] for cell in rows.cast_column("image", Image(decode=False))["image"]]
    bare = Dataset.from_dict({"png": contents, "label": rows["label"][:]})
    assert find_images(bare, "x", None, None).texts == ("png",)
    other = Dataset.from_dict({"key": [b"no image"] * 4, "text": ["a"] * 4, "label": [0, 1] * 2})
    assert infer_task(other, "x", None, None).texts == ("text",)
    seen, _ = encode_images(bare, find_images(bare, "x", None, None), processor())
    wanted, _ = encode_images(rows, TASK, processor())
    assert seen.batch(range(4))["pixel_values"].equal(wanted.batch(range(4))["pixel_values"])
    both = rows.add_column("caption", ["a", "b", "c", "d"])
    assert find_images(both, "x", None, None).texts == ("image",)
    assert find_images(both, "x", ["caption"], None) is None
    assert infer_task(both, "x", ["caption"], None).texts == ("caption",)
    two = Dataset.from_dict({**rows[:], "depth": rows["image"][:]}, Features({**rows.features, "depth": Image()}))
    with pytest.raises(UserError, match=r"the columns to read are image, depth, where one .* by image_column"):
        find_images(two, "x", None, None)
    assert find_images(two, "x", ["depth"], None).texts == ("depth",)


def test_the_fingerprint_tells_contents_and_not_where_they_lie(place, tmp_path):
    shutil.copytree(place / "photos", tmp_path / "elsewhere")
    first, other = (open_splits(str(folder)) for folder in (place / "photos", tmp_path / "elsewhere"))
    assert first.train_fingerprint == other.train_fingerprint
    PIL.Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "elsewhere" / "train" / "red" / "002.png")
    assert open_splits(str(tmp_path / "elsewhere")).train_fingerprint != first.train_fingerprint
    assert open_splits(str(place / "table")).train_fingerprint == open_splits(str(place / "table")).train_fingerprint


# What the model sees


@pytest.mark.parametrize("held", [2**29, 0])
@pytest.mark.parametrize("kind", ["squashed", "cropped"])
def test_the_model_sees_what_its_processor_makes_of_every_image(place, monkeypatch, held, kind):
    monkeypatch.setattr(images, "HELD", held)
    made = processor()
    if kind == "cropped":
        made = transformers.CLIPImageProcessorPil(size={"shortest_edge": 14}, crop_size={"height": SIDE, "width": SIDE})
    for rows in (open_splits(str(place / "photos")).splits["test"], table(5, height=30, width=21)):
        wanted = made([row["image"].convert("RGB") for row in rows], return_tensors="pt")["pixel_values"]
        data, _ = encode_images(rows, TASK, made)
        batch = data.batch(range(len(rows)))
        assert batch.keys() == {"pixel_values", "labels"}
        assert batch["pixel_values"].dtype == torch.float32
        assert batch["pixel_values"].allclose(wanted, atol=1e-6)
        assert batch["labels"].tolist() == rows["label"][:]
        assert data.count_tokens(range(4)) == (4, 0)


def test_a_crop_keeps_nine_tenths_of_the_area_and_is_a_function_of_what_draws_it():
    ramp = torch.arange(100, dtype=torch.float32).expand(3, 100, 100).to(torch.uint8)
    edges = []
    for number in range(200):
        once, again = (random_crop(ramp, cpu_generator(0, number)) for _ in range(2))
        assert once.equal(again)
        assert once.shape == ramp.shape
        edges.append((float(once[0, :, 2].float().mean()) - 2, 97 - float(once[0, :, 97].float().mean())))
    widths = torch.tensor([100 - left - right for left, right in edges])
    assert 89 <= widths.min() < 92
    assert 98 < widths.max() <= 101
    upright = random_crop(ramp.mT.contiguous(), cpu_generator(0, 1))
    assert not upright.mT.equal(random_crop(ramp, cpu_generator(0, 1)))  # the sides are drawn by themselves
    flat = torch.full((3, 7, 9), 77, dtype=torch.uint8)
    assert all(random_crop(flat, cpu_generator(1, i)).equal(flat) for i in range(20))


def test_training_sees_other_crops_each_step_and_validation_the_whole_image():
    data, _ = encode_images(table(6), TASK, processor())
    plain = data.batch(range(6))["pixel_values"]
    first, again, later = (data.augmented_view(0, "look", step).batch(range(6))["pixel_values"] for step in (3, 3, 4))
    assert first.equal(again)
    assert not first.equal(later)
    assert not first.equal(plain)
    assert (first - plain).abs().mean() < 0.3  # the same picture still
    # A row is cropped alike whoever stands beside it: batches may be cut into parts.
    assert data.augmented_view(0, "look", 3).batch([4, 1])["pixel_values"].equal(first[[4, 1]])
    some = data.random_subset(0.5, 0, "weak")
    rows = [number for number, _ in some.rows]
    assert some.augmented_view(0, "look", 3).batch(range(3))["pixel_values"].equal(first[rows])
    assert some.batch(range(3))["pixel_values"].equal(plain[rows])


def problem_of(place, **changed):
    where = ModelAndDataConfig(model=str(place / "vit"), dataset=str(place / "table"))
    return build_problem(where, open_task(where), steps=6, training=TrainingConfig(batch_size=8), **changed)


def test_training_in_two_halves_is_training_at_once_crops_included(place, monkeypatch):
    problem = problem_of(place)
    once = train(problem.start_run(), problem, 6)
    halves = problem.start_run()
    for steps in (2, 4):
        train(halves, problem, steps)
    assert same(once.model.state_dict(), halves.model.state_dict())
    monkeypatch.setattr(images, "random_crop", lambda image, draw: image)
    whole = train(problem.start_run(), problem, 6)
    assert not same(once.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("held", [0, images.HELD])
def test_images_prepared_ahead_are_the_same_bits_and_warnings_stay_as_they_were(place, monkeypatch, held):
    monkeypatch.setattr(images, "HELD", held)
    before, found = [*warnings.filters], []
    for workers in (0, 3):
        problem = problem_of(place)
        training = replace(problem.training, dataloader_num_workers=workers, gradient_accumulation_steps=2)
        problem = replace(problem, training=training)
        state = train(problem.start_run(), problem, 6)
        found.append((state.model.state_dict(), problem.validate(state.model)))
    assert same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert warnings.filters == before


# What it costs


def test_flops_of_a_vit_are_those_of_its_patches_matrices_and_attention(place):
    problem = problem_of(place)
    model, batch = problem.pretrained.eval(), problem.validation.batch(range(3))
    tokens, rows = (SIDE // PATCH) ** 2 + 1, 3
    patches = 2 * (tokens - 1) * 3 * PATCH**2 * WIDTH
    matrices = 2 * tokens * (4 * WIDTH * WIDTH + 2 * WIDTH * 32)
    attention = 2 * 2 * tokens * tokens * WIDTH
    forward = rows * (patches + LAYERS * (matrices + attention) + 2 * WIDTH * len(CLASSES))
    with CountFlops() as count, torch.no_grad():
        problem.predict(model, batch)
    assert count.flops == forward
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as theirs:
        loss = problem.criterion(problem.predict(model, batch), batch)
        loss.backward()
    model.set_attn_implementation("sdpa")
    with CountFlops() as count:
        problem.criterion(problem.predict(model, batch), batch).backward()
    # Three times the forward pass, but nobody asks for the gradient of the pixels.
    assert count.flops == theirs.get_total_flops() == 3 * forward - rows * patches


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_matrices_of_the_blocks_of_every_family_are_prunable(family):
    config = CONFIGS[family]()
    config.architectures = []  # of DeiT there are two classes
    model = transformers.AutoModelForImageClassification.from_config(config)
    found = find_prunable(model)
    blocks = [n for n, p in model.named_parameters() if p.dim() == 2 and ".0." in n and "relative" not in n]
    assert set(blocks) <= {*found}
    assert not [n for n in found if any(part in n for part in ("patch", "classifier", "position", "cls_token"))]
    assert {"query", "key", "value", "output", "feed-forward in", "feed-forward out"} <= {
        t.role for t in found.values()
    }


# The whole way


@pytest.mark.parametrize("method", ["magnitude", "movement", "isp"])
def test_a_pruned_vit_is_loaded_by_stock_transformers_and_answers_as_it_did(place, tmp_path, method, capsys):
    assert main(line_of(place, tmp_path, method)) == 0
    run = run_of(tmp_path)
    report = json.loads((run / "report.json").read_text())
    assert report["sparsity"]["total"] == TOTAL
    assert report["sparsity"]["kept"] == round(0.4 * TOTAL)
    assert report["task"].endswith("from column image (images)")
    assert report["cost"]["main"]["tokens"] == report["cost"]["main"]["examples"]
    masks = masks_of(run)
    stock, info = transformers.AutoModelForImageClassification.from_pretrained(run / "model", output_loading_info=True)
    assert not any(info.values())
    assert stock.config.id2label == dict(enumerate(CLASSES))
    assert not any(stock.get_parameter(name)[~mask].any() for name, mask in masks.items())
    made = transformers.AutoImageProcessor.from_pretrained(run / "model")
    assert main(["test", str(run)]) == 0
    test = open_splits(str(place / "photos")).splits["test"]
    with torch.no_grad():
        answers = stock(**made([row["image"].convert("RGB") for row in test], return_tensors="pt")).logits
    right = float((answers.argmax(1) == torch.tensor(test["label"][:])).float().mean())
    assert json.loads((run / "report.json").read_text())["test"]["accuracy"] == pytest.approx(right, abs=1e-6)
    assert right > 0.5  # a third by chance
    assert main(["show", str(run)]) == 0
    assert "3 classes (dark, light, red)" in capsys.readouterr().out


def test_a_pruned_vit_goes_through_every_export_and_onto_another_copy(place, tmp_path):
    assert main(line_of(place, tmp_path / "runs", "hybrid-movement")) == 0
    run = run_of(tmp_path / "runs")
    stock = transformers.AutoModelForImageClassification.from_pretrained(run / "model").eval()
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=cpu_generator(0))
    wanted = stock(pixels).logits
    for to, load in (("dense", stock.from_pretrained), ("packed", load_packed), ("compact", load_compact)):
        assert main(["export", str(run), "--to", to, "--out", str(tmp_path / to)]) == 0
        assert load(tmp_path / to).eval()(pixels).logits.allclose(wanted, atol=1e-5)
        assert (tmp_path / to / "preprocessor_config.json").is_file()
    assert main(["apply", str(run), "--model", str(place / "vit"), "--out", str(tmp_path / "copy")]) == 0
    copy = weights_of(tmp_path / "copy")
    assert same(masks_of(tmp_path / "copy"), {n.removeprefix("vit."): m for n, m in masks_of(run).items()})
    assert sum(int((t != 0).sum()) for n, t in copy.items() if "layers." in n and t.dim() == 2) <= round(0.4 * TOTAL)
    assert (tmp_path / "copy" / "preprocessor_config.json").is_file()


def test_a_teacher_that_sees_images_in_the_same_way_teaches(place, tmp_path):
    more = {"train.distill.teacher": "dense", "train.distill.hidden": 0.1}
    assert main(line_of(place, tmp_path / "runs", steps=4, **more)) == 0
    (dense,) = (tmp_path / "runs" / "photos").glob("dense-*/seed-0")
    teacher = shutil.copytree(dense / "model", tmp_path / "teacher")  # in the run itself it would be damage
    processor(SIDE * 2).save_pretrained(teacher)
    with pytest.raises(UserError, match=r"sees images otherwise than .*vit"):
        library.prune("magnitude", model=str(place / "vit"), dataset=str(place / "photos"), steps=4,
                      train={"distill": {"teacher": str(teacher)}}, out=tmp_path / "other", progress=False)  # fmt: skip


def test_a_run_on_images_that_is_killed_ends_like_an_undisturbed_one(place, tmp_path):
    found = []
    for folder, moments in (("whole", ()), ("killed", (15,))):
        line = [*line_of(place, tmp_path / folder / "runs", "isp"), "--save-every", "0"]
        ahead = [*line, "--train.dataloader-num-workers", "2"]  # and it goes on without
        assert [kill_after(ahead, tmp_path / folder / "runs", after) for after in moments] == [-9] * len(moments)
        assert main(line) == 0
        found.append(run_of(tmp_path / folder / "runs"))
    one, other = found
    assert same(masks_of(one), masks_of(other))
    assert same(weights_of(one / "model"), weights_of(other / "model"))
    assert [(x["step"], x["loss"]) for x in log_of(one)] == [(x["step"], x["loss"]) for x in log_of(other)]
    assert costs_of(json.loads((one / "report.json").read_text())) == costs_of(
        json.loads((other / "report.json").read_text())
    )


# What is refused


@pytest.fixture
def refused(capsys, tmp_path):
    def check(line, *parts):
        capsys.readouterr()
        assert main([str(word) for word in line]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        assert all(part in said for part in parts), said
        assert not list((tmp_path / "runs").rglob("*.json"))

    return check


def test_an_image_that_cannot_be_read_is_named_with_its_row(place, refused, tmp_path):
    folder = shutil.copytree(place / "photos", tmp_path / "photos")
    broken = folder / "train" / "light" / "004.png"
    broken.write_bytes(broken.read_bytes()[:80])
    refused(line_of(place, tmp_path / "runs", dataset=folder), "row 17 of column image", str(broken), "correct or drop")
    rows = table(20).cast_column("image", Image(decode=False))
    cells = rows["image"][:]
    for cell, why in (({"bytes": b"no image", "path": None}, "its format is not known"), (None, "NoneType")):
        changed = Dataset.from_dict(
            {"image": [*cells[:7], cell, *cells[8:]], "label": rows["label"][:]}, table(1).features
        )
        (tmp_path / "set").mkdir(exist_ok=True)
        changed.to_parquet(tmp_path / "set" / "train.parquet")
        refused(
            line_of(place, tmp_path / "runs", dataset=tmp_path / "set"), "row 7 of column image", "cannot be read", why
        )


def test_a_file_that_is_gone_is_named_also_where_it_is_of_a_test_row(place, refused, tmp_path):
    folder = tmp_path / "named"
    folder.mkdir()
    paths = [str(path) for path in sorted((place / "photos" / "train").rglob("*.*"))]
    features = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "label": Value("int64")})
    rows = {"image": [{"bytes": None, "path": path} for path in paths], "label": [i % 2 for i in range(48)]}
    Dataset.from_dict(rows, features).to_parquet(folder / "train.parquet")
    source = open_splits(str(folder))
    (lost, *_) = open_test(source, infer_task(source.train_split, "named", None, None))["test"]["image"]
    gone = str(tmp_path / "gone.png")
    rows["image"][paths.index(lost["path"])]["path"] = gone
    Dataset.from_dict(rows, features).to_parquet(folder / "train.parquet")
    refused(line_of(place, tmp_path / "runs", dataset=folder), gone, "cannot be read", "put it back")


def test_images_and_texts_are_not_given_to_the_other_kind_of_model(place, refused, tmp_path):
    out = tmp_path / "runs"
    refused(line_of(place, out, model=place / "bert"), str(place / "bert"), "photos", "images", "vision model")
    write_rows(tmp_path / "said" / "train.csv", ("text", "label"), [("good", 0), ("bad", 1)] * 20)
    refused(line_of(place, out, dataset=tmp_path / "said"), str(place / "vit"), "said", "column text")
    rows = table(20).remove_columns("image").add_column("image", [f"{i}.png" for i in range(20)])
    (tmp_path / "named").mkdir()
    rows.to_parquet(tmp_path / "named" / "train.parquet")
    refused(line_of(place, out, dataset=tmp_path / "named", image_column="image"), str(place / "vit"), "column image")
    refused(line_of(place, out, dataset=tmp_path / "named", image_column="picture"), "no column 'picture'", "image")


@pytest.mark.parametrize("split", ["train", ""])
def test_images_deeper_than_the_folder_of_a_class_are_not_left_out_in_silence(place, refused, tmp_path, split):
    folder = tmp_path / "deep" / split
    shutil.copytree(place / "photos" / "train", folder)
    (folder / "red" / "more").mkdir()
    (folder / "red" / "more" / "notes.txt").write_text("no image")
    assert len(open_splits(str(tmp_path / "deep")).train_split) == 48
    for picture in sorted((folder / "red").glob("*.*")):  # the first, and then all of a class
        picture.rename(folder / "red" / "more" / picture.name)
        if picture.name in ("002.png", "047.png"):
            refused(line_of(place, tmp_path / "runs", dataset=tmp_path / "deep"), "red/more holds images", "move them")


def test_images_without_labels_or_with_wrong_ones_are_refused(place, refused, tmp_path):
    out = tmp_path / "runs"
    for folder in ("flat", "flat/train", "flat/test"):
        (tmp_path / folder).mkdir(exist_ok=True)
        shutil.copyfile(place / "photos" / "train" / "red" / "008.jpg", tmp_path / folder / "1.jpg")
        refused(line_of(place, out, dataset=tmp_path / "flat"), "flat holds images without labels", "train/cat/1.png")
    shutil.copytree(place / "photos" / "train" / "red", tmp_path / "single" / "pictures")
    refused(line_of(place, out, dataset=tmp_path / "single"), "the one class pictures", "at least two classes")
    bare, wrong = tmp_path / "bare", tmp_path / "wrong"
    bare.mkdir()
    table(20).remove_columns("label").to_parquet(bare / "train.parquet")
    refused(line_of(place, out, dataset=bare), "no column that looks like a label", "image (PIL.Image.Image)")
    wrong.mkdir()
    features = Features({"image": Image(), "label": Value("int64")})
    Dataset.from_dict({"image": table(20)["image"][:], "label": [0] * 19 + [-1]}, features).to_parquet(
        wrong / "a.parquet"
    )
    refused(line_of(place, out, dataset=wrong), "row 19 has the label -1", "0 to 0")


def test_a_processor_that_is_missing_or_makes_images_of_another_size(place, refused, tmp_path):
    model = shutil.copytree(place / "vit", tmp_path / "vit")
    processor(SIDE + PATCH).save_pretrained(model)
    refused(line_of(place, tmp_path / "runs", model=model), str(model), "3x16x16", "preprocessor_config.json")
    transformers.ViTImageProcessorPil(do_resize=False).save_pretrained(model)
    (tmp_path / "set").mkdir()
    rows = [table(9), table(9, height=SIDE + 4)]
    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))})
    whole = {name: [value for part in rows for value in part[name][:]] for name in features}
    Dataset.from_dict(whole, features).to_parquet(tmp_path / "set" / "train.parquet")
    refused(line_of(place, tmp_path / "runs", model=model, dataset=tmp_path / "set"), "becomes (3, 1", "one size")
    (model / "preprocessor_config.json").unlink()
    refused(
        line_of(place, tmp_path / "runs", model=model), "cannot load the image processor", "preprocessor_config.json"
    )


def test_settings_of_texts_are_refused_for_images(place, refused, tmp_path):
    refused(line_of(place, tmp_path / "runs", max_length=64), "--max-length: 64 tokens", "images")
    refused(line_of(place, tmp_path / "runs", doc_stride=8), "--doc-stride: ", "got 8; leave it out")


def test_a_user_types_it_by_name_below_the_data_root(place, tmp_path, capsys):
    shutil.copytree(place / "table", tmp_path / "data" / "mnist")
    line = line_of(place, tmp_path, dataset="mnist", data_root=tmp_path / "data", image_column="image", steps=2)
    assert main(line) == 0
    assert "of 4,096 weights kept" in capsys.readouterr().out
