"""What is read is said before the first step, with what a user may not have meant by it."""

import json
import re

import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from sparsesoup.hub.build import ModelAndDataConfig, OpenedTask, open_task
from sparsesoup.hub.tasks.columns import find_task
from sparsesoup.hub.tasks.labels import label_values
from sparsesoup.hub.tasks.overview import data_overview
from sparsesoup.hub.tasks.registry import infer_task
from sparsesoup.hub.tasks.splits import LoadedDataset, open_test, training_splits
from tiny_hub import checkpoint, questions, reviews, run_of, squad, write_rows
from tiny_images import checkpoint as vision_checkpoint
from tiny_images import photos


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny BERT and reviews; no test writes to it."""
    place = tmp_path_factory.mktemp("overview")
    checkpoint(place / "bert")
    reviews(place / "reviews")
    return place


def rows_of(kinds=None, **columns):
    return Dataset.from_dict(columns, features=Features(kinds) if kinds else None)


def noted(train, test=None, **more):
    """The notes on these rows."""
    source = LoadedDataset("set", {"train": train} | ({"test": test} if test else {}), **more)
    return " | ".join(data_overview(OpenedTask(source, infer_task(source.train_split, "set", None, None)), 0).notes)


def distinct(count, first=0):
    return [f"film {i}" for i in range(first, first + count)]


# What is said, and when


def test_prune_and_test_say_what_they_read_and_so_does_the_report(place, tmp_path, capsys):
    flags = ["--dataset", str(place / "reviews"), "--model", str(place / "bert"), "--steps", "2"]
    assert main(["prune", "magnitude", *flags, "--out", str(tmp_path)]) == 0
    read = [
        "data: reviews: 72 training and 8 validation rows from split train (train.csv); 24 test rows from split "
        "test (test.csv)",
        "data: 2 classes (0, 1) in column label from column text",
    ]
    assert capsys.readouterr().err.splitlines()[:2] == read
    run = run_of(tmp_path)
    assert json.loads((run / "report.json").read_text())["data"] == {
        "read": [line.removeprefix("data: ") for line in read],
        "notes": [],
    }
    assert "72 training and 8 validation rows" in (run / "report.html").read_text()
    assert main(["test", str(run)]) == 0
    assert capsys.readouterr().err.splitlines()[:2] == read


def test_a_study_says_it_once_a_dataset(place, tmp_path, capsys):
    recipe = tmp_path / "few.yaml"
    recipe.write_text(
        f"models: {place / 'bert'}\ndatasets: {place / 'reviews'}\nmethods: [dense]\nseeds: [0, 1]\nsteps: 1\n"
    )
    assert main(["compare", "--config", str(recipe), "--out", str(tmp_path / "runs")]) == 0
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("data: ")]) == 2


def test_a_refusal_before_the_first_step_stays_one_line(place, tmp_path, capsys):
    flags = ["--dataset", str(place / "reviews"), "--model", str(place / "bert"), "--steps", "1"]
    assert main(["prune", "isp", *flags, "--out", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_dense_teacher_is_not_drawn_before_it_is_said(place, tmp_path, capsys):
    flags = ["--dataset", str(place / "reviews"), "--model", str(place / "bert"), "--steps", "2"]
    flags += ["--train.distill.teacher", "dense", "--out", str(tmp_path)]
    assert main(["prune", "magnitude", *flags]) == 0
    said = capsys.readouterr().err.splitlines()
    assert [line[:6] for line in said].count("data: ") == 2
    assert said[0].startswith("data: reviews")


def test_splits_and_columns_that_are_not_read_are_named():
    rows = rows_of(text=distinct(20), label=[0, 1] * 10, number=range(20))
    source = LoadedDataset(
        "set", {"train": rows, "validation": rows.select([0]), "test": rows.select([1]), "more": rows}
    )
    read = data_overview(OpenedTask(source, infer_task(rows, "set", None, None)), 0).read
    assert read[0].endswith("1 test rows from split test; not read: split validation, more")
    assert read[1] == "2 classes (0, 1) in column label from column text; not read: number"


# The answer read as a text


@pytest.mark.parametrize(
    "answers",
    [
        ["upbeat", "gloomy"] * 10,  # one to one
        ["great", "bad", "good", "awful"] * 5,  # finer than the label, which it determines
        ["1", "0"] * 5 + ["0", "1"] * 5,  # the names of the labels, from somebody who saw it otherwise
    ],
)
def test_a_column_that_says_the_answer_is_not_read_and_that_is_said(answers):
    train = rows_of(text=distinct(20), label=[1, 0] * 10, mood=answers)
    assert find_task(train, "set").texts == ("text",)
    assert "column mood gives column label away" in noted(train)
    assert "so it is not read" in noted(train)


def test_it_is_known_by_the_names_of_classes_too():
    kinds = {"text": Value("string"), "label": ClassLabel(names=["Bad", "Good"]), "said": Value("string")}
    train = rows_of(kinds, text=distinct(20), label=[1, 0] * 10, said=["good "] * 15 + ["bad"] * 5)
    assert find_task(train, "set").texts == ("text",)
    assert "column said gives column label away" in noted(train)


@pytest.mark.parametrize("other", [["a", "b", "c", "d"] * 5, [f"who {i}" for i in range(20)], ["x"] * 20])
def test_other_columns_are_texts(other):
    train = rows_of(text=distinct(20), label=[0] * 10 + [1] * 10, other=other)
    assert find_task(train, "set").texts == ("text", "other")
    assert noted(train) == ""


def test_a_column_that_a_user_names_is_read_and_noted():
    train = rows_of(text=distinct(20), label=[1, 0] * 10, mood=["up", "down"] * 10)
    task = find_task(train, "set", texts=["mood"])
    notes = data_overview(OpenedTask(LoadedDataset("set", {"train": train}), task), 0).notes
    assert "column mood gives column label away" in notes[0]
    assert "so the scores mean nothing" in notes[0]


# Labels


def test_numbers_with_a_gap_are_noted():
    for present, count, missing in (([1, 2], 3, "0"), ([0, 5], 6, "1, 2, 3, 4")):
        said = noted(rows_of(text=distinct(40), label=present * 20))
        assert f"{count - 2} of {count} classes without a training row: {missing}; " in said
    assert noted(rows_of(text=distinct(40), label=[0, 1] * 20)) == ""


@pytest.mark.parametrize("value", ["3,5", "n.a.", "1.2.3"])
def test_a_value_that_is_no_number_among_numbers_is_named_with_its_row(value):
    scores = [f"{i / 7:.3f}" for i in range(80)]
    scores[41] = value
    said = rf"row 41 has {value!r} in column label, where 79 of 80 rows have a number; correct or drop"
    with pytest.raises(UserError, match=said):
        find_task(rows_of(text=distinct(80), label=scores), "set")
    task = find_task(rows_of(text=distinct(20), label=[i / 7 for i in range(20)]), "set")
    with pytest.raises(UserError, match=f"test: row 41 has the label '{value}'"):
        label_values(rows_of(text=distinct(80), label=scores), task, "test")


def test_one_word_among_classes_that_are_numbers_is_noted():
    labels = ["0", "1"] * 40
    labels[17] = "x"
    said = noted(rows_of(text=distinct(80), label=labels))
    assert "row 17 has 'x' in column label, where 79 of 80 rows have a number: a class of its own" in said
    assert "have a number" not in noted(rows_of(text=distinct(80), label=["1", "2", "3", "other"] * 20))


def test_more_classes_than_can_be_learnt_are_noted():
    said = noted(rows_of(text=distinct(40), label=[f"{i} %" for i in range(40)]))
    assert "column label has 40 different labels in 40 rows, each a class; if they are numbers" in said
    assert "each a class" not in noted(rows_of(text=distinct(40), label=["a", "b", "c", "d"] * 10))


@pytest.mark.parametrize("pair", [("pos", "pos "), ("pos", "\u00a0pos"), ("caf\u00e9", "cafe\u0301"),
                                  ("pos", "pos\u200b"), ("pos", "\u2060pos"), ("\u2764", "\u2764\ufe0f")])  # fmt: skip
@pytest.mark.parametrize("published", [False, True])
def test_two_classes_that_look_like_one_are_refused(pair, published):
    kinds = {"text": Value("string"), "label": ClassLabel(names=list(pair)) if published else Value("string")}
    labels = [0, 1] * 10 if published else [*pair] * 10
    with pytest.raises(UserError, match=r"which look the same.*write them alike") as error:
        find_task(rows_of(kinds, text=distinct(20), label=labels), "set")
    assert all(ascii(name) in str(error.value) for name in pair)


@pytest.mark.parametrize("pair", [("Pos", "pos"), ("Pos ", "pos"), ("Pos\u200b", "pos")])
def test_classes_that_differ_by_capitals_and_spaces_are_noted(pair):
    said = noted(rows_of(text=distinct(40), label=[*pair] * 20))
    assert f"classes {pair[0]!r} and {pair[1]!r} differ only in capital letters or spaces" in said


# Rows that are there twice


def test_rows_that_are_training_rows_too_are_counted():
    train = rows_of(text=distinct(40), label=[0, 1] * 20)
    test = rows_of(text=distinct(20, first=30), label=[0, 1] * 10)
    assert "10 of 20 test rows are also training rows (the same text)" in noted(train, test)
    doubled = rows_of(text=distinct(20) * 2, label=[0, 1] * 20)
    assert re.search(r"[1-4] of 4 validation rows are also training rows", noted(doubled))
    assert noted(train, test.select(range(10, 20))) == ""


def test_copies_in_other_capitals_and_spaces_count():
    train = rows_of(text=distinct(40), label=[0, 1] * 20)
    near = [f" Film  {i}\n" for i in range(5)] + distinct(3, first=10) + distinct(12, first=100)
    said = noted(train, rows_of(text=near, label=[0, 1] * 10))
    assert "8 of 20 test rows are also training rows (the same text; 5 with other capitals or spaces)" in said


@pytest.mark.parametrize("blank", ["", " ", "\n\t", "\u200b"])
def test_blank_texts_are_counted(blank):
    train = rows_of(text=[blank if i % 3 == 1 else f"film {i}" for i in range(80)], label=[0, 1] * 40)
    test = rows_of(text=[*distinct(6, first=100), blank], label=[0, 1, 0, 1, 0, 1, 0])
    said = noted(train, test)
    assert "27 of 80 rows of split train are blank in column text: drop them if that is not intended" in said
    assert "1 of 7 rows of split test are blank in column text" in said


def test_both_texts_of_a_pair_count():
    pairs = {"one": ["a"] * 40, "two": distinct(40), "label": [0, 1] * 20}
    test = rows_of(one=["b"] * 5, two=distinct(5), label=[0, 1, 0, 1, 0])
    assert noted(rows_of(**pairs), test) == ""
    moved = rows_of(one=["af"] * 5, two=[two[1:] for two in distinct(5)], label=[0, 1, 0, 1, 0])
    assert noted(rows_of(**pairs), moved) == ""


def test_questions_and_images_are_counted_too(tmp_path):
    checkpoint(tmp_path / "bert")
    vision_checkpoint(tmp_path / "vit")
    folder = squad(tmp_path / "squad")
    asked = [{**row, "question": f"{row['question']} {i}"} for i, row in enumerate(questions(40, 1))]
    for split, rows in (("train", asked), ("validation", asked[:6])):
        write_rows(folder / f"{split}.jsonl", tuple(rows[0]), [tuple(row.values()) for row in rows])
    opened = open_task(ModelAndDataConfig(model=str(tmp_path / "bert"), dataset=str(folder)))
    assert "6 of 6 test rows are also training rows (the same text)" in " ".join(data_overview(opened, 0).notes)
    photos(tmp_path / "photos", rows=12, test=6)
    place = ModelAndDataConfig(model=str(tmp_path / "vit"), dataset=str(tmp_path / "photos"))
    assert data_overview(open_task(place), 0).notes == ()
    for split, name in (("train", "again.png"), ("test", "seen.png")):
        PIL.Image.new("RGB", (12, 12)).save(tmp_path / "photos" / split / "dark" / name)
    assert "1 of 7 test rows are also training rows (the same image)" in " ".join(
        data_overview(open_task(place), 0).notes
    )


# Rows without a label


@pytest.mark.parametrize(
    ("labels", "classes"),
    [([0, 1, None, 1], ("0", "1")), ([0, 1, -1, 1], ("0", "1")), (["p", "n", "", " "], ("n", "p"))],
)
def test_rows_without_a_label_are_refused_or_dropped(labels, classes):
    rows = rows_of(text=distinct(40), label=labels * 10)
    task, gone = find_task(rows, "set"), 20 if "p" in labels else 10
    assert task.labels == classes
    with pytest.raises(
        UserError, match=r"set train: row 2 has the label .*drop rows without a label by drop_unlabelled"
    ):
        training_splits(LoadedDataset("set", {"train": rows}), task, 0)
    source = LoadedDataset("set", {"train": rows}, drop_unlabelled=True)
    assert sum(map(len, training_splits(source, task, 0))) + len(open_test(source, task)["test"]) == 40 - gone


def test_a_user_drops_rows_without_a_label(place, tmp_path, capsys):
    labels = ["pos", "neg", "", " "] * 10
    for split, first in (("train", 0), ("test", 100)):
        write_rows(
            tmp_path / "set" / f"{split}.csv", ("text", "label"), list(zip(distinct(40, first), labels, strict=True))
        )
    line = ["prune", "magnitude", "--dataset", str(tmp_path / "set"), "--model", str(place / "bert"), "--steps", "1"]
    assert main([*line, "--drop-unlabelled", "true", "--out", str(tmp_path / "runs")]) == 0
    run = run_of(tmp_path / "runs")
    notes = json.loads((run / "report.json").read_text())["data"]["notes"]
    assert notes[:2] == [
        f"20 of 40 rows of split {split} are dropped: they have no label" for split in ("train", "test")
    ]
    assert f"note: {notes[0]}" in capsys.readouterr().err
    assert list(json.loads((run / "model" / "config.json").read_text())["id2label"].values()) == ["neg", "pos"]
    assert main(["test", str(run)]) == 0


def test_rows_are_numbered_as_they_are_where_others_were_dropped():
    rows = rows_of(text=["a", "b", None, "d"], label=[0, None, 1, 1])
    source = LoadedDataset("set", {"train": rows}, drop_unlabelled=True)
    with pytest.raises(UserError, match=r"set train \(its 1 rows without a label left out\): row 1 has None"):
        training_splits(source, find_task(rows, "set"), 0)


def test_numbers_to_learn_and_questions_without_a_label_are_dropped_too():
    scores = rows_of(text=distinct(30), label=[0.5, None, float("nan")] * 10)
    source = LoadedDataset("set", {"train": scores, "test": scores}, drop_unlabelled=True)
    task = find_task(scores, "set")
    assert task.labels == ()
    assert len(open_test(source, task)["test"]) == 10
    asked = questions(20)
    none = rows_of(
        **{key: [row[key] if i or key != "answers" else None for i, row in enumerate(asked)] for key in asked[0]}
    )
    task = infer_task(none, "set", None, None)
    assert not task.unanswerable
    with pytest.raises(UserError, match=r"row 0 has None in column answers.*by drop_unlabelled"):
        training_splits(LoadedDataset("set", {"train": none}), task, 0)
    assert sum(map(len, training_splits(LoadedDataset("set", {"train": none}, drop_unlabelled=True), task, 0))) == 17


def test_numbers_that_pandas_made_floats_for_a_missing_one_stay_classes():
    assert find_task(rows_of(text=distinct(3), label=[0.0, 1.0, None]), "set").labels == ("0", "1")
    assert find_task(rows_of(text=distinct(3), label=[0.0, 1.0, 2.0]), "set").labels == ()
    assert find_task(rows_of(text=distinct(3), label=[0.5, 1.0, None]), "set").labels == ()
    assert find_task(rows_of(text=distinct(3), label=[-1.0, 1.0, None]), "set").labels == ()


# Columns on the command line


@pytest.mark.parametrize("words", [["one,two"], ["one, two"], ["one", "two"], ["one,", "two"], ['["one", "two"]']])
def test_two_columns_are_named_in_every_usual_way(words):
    from sparsesoup.cli.prune import parse_arguments

    assert parse_arguments(["dense", "--text-columns", *words, "--steps", "1"])[0].model_data.text_columns == (
        "one",
        "two",
    )
    assert parse_arguments(
        ["dense", "--text-columns=" + ",".join(words)] if len(words) == 1 else ["dense", "--text-columns", *words]
    )


def test_columns_that_may_be_meant_are_named():
    rows = rows_of(a=distinct(9), b=distinct(9), c=distinct(9), label=[0, 1, 1] * 3)
    with pytest.raises(UserError, match=r"3 columns that may be the text \(a, b, c\)"):
        find_task(rows, "set")
    with pytest.raises(UserError, match=r"2 columns that may be the label \(label, target\)"):
        find_task(rows.add_column("target", [1, 0, 1] * 3), "set")


def test_names_of_classes_command_no_terminal_and_break_no_line(place, tmp_path, capsys):
    rows = list(zip(distinct(40), ["bad\x1b[31m", "good\nnote: all is well"] * 20, strict=True))
    write_rows(tmp_path / "set" / "train.csv", ("text", "label"), rows)
    line = ["prune", "magnitude", "--dataset", str(tmp_path / "set"), "--model", str(place / "bert"), "--steps", "1"]
    assert main([*line, "--out", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().err
    assert "\x1b[31m" not in said
    assert r"2 classes (bad\x1b[31m, good\nnote: all is well)" in said
