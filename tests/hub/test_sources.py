"""Datasets are found where they lie, and methods see the training split alone."""

import json
import logging
import os
import re
import subprocess
import sys

import pandas
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from sparsesoup.core.errors import UserError
from sparsesoup.hub.tasks import splits as sources
from sparsesoup.hub.tasks.columns import find_task
from sparsesoup.hub.tasks.labels import TextTask
from sparsesoup.hub.tasks.question_answering import QuestionAnswering
from sparsesoup.hub.tasks.splits import open_splits, open_test, training_splits

pytestmark = pytest.mark.integration

FEATURES = Features({"sentence": Value("string"), "label": ClassLabel(names=["no", "yes"])})
TASK = TextTask(("sentence",), "label", ("no", "yes"), ("accuracy",))


def rows_of(count, first=0):
    numbers = range(first, first + count)
    return Dataset.from_dict({"sentence": [f"text {i}" for i in numbers], "label": [i % 2 for i in numbers]}, FEATURES)


def write(folder, **splits):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        rows.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return folder


def source_of(name="reviews", **splits):
    return sources.LoadedDataset(name, splits)


def texts(rows):
    return set(rows["sentence"][:])


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """No data root, no Hub, and nothing lying about in the working folder."""
    monkeypatch.delenv("SPARSESOUP_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def test_a_folder_is_opened_by_path_by_data_root_and_by_environment(tmp_path, monkeypatch):
    folder = write(tmp_path / "root" / "glue" / "cola", train=rows_of(20), validation=rows_of(5, 20))
    by_path = open_splits(str(folder))
    by_root = open_splits("glue/cola", data_root=str(tmp_path / "root"))
    monkeypatch.setenv("SPARSESOUP_DATA", str(tmp_path / "root"))
    by_environment = open_splits("glue/cola")
    for source in (by_path, by_root, by_environment):
        assert source.name == "glue/cola"
        assert {name: len(rows) for name, rows in source.splits.items()} == {"train": 20, "validation": 5}
    assert find_task(by_path.train_split, by_path.name).metrics == ("matthews",)
    assert open_splits(str(tmp_path / "root" / "glue"), config="cola").name == "glue/cola"


def test_every_text_format_and_usual_file_name_is_read(tmp_path):
    folder = tmp_path / "my reviews"
    (folder / "data").mkdir(parents=True)
    (folder / "train.csv").write_text('text,label\n"one, two",pos\nNA,neg\n')
    (folder / "dev.tsv").write_text("text\tlabel\nthree, four\tpos\n")
    (folder / "data" / "reviews_test.jsonl").write_text(json.dumps({"text": "five", "label": "neg"}) + "\n")
    (folder / "dataset_infos.json").write_text("{}")
    source = open_splits(str(folder))
    assert source.name == "my-reviews"
    assert {name: rows["text"][:] for name, rows in source.splits.items()} == {
        "train": ["one, two", "NA"],
        "validation": ["three, four"],
        "test": ["five"],
    }
    assert open_splits(str(folder / "dev.tsv")).train_split["label"][:] == ["pos"]


def test_no_library_writes_to_the_terminal_or_the_log(tmp_path, capfd, caplog):
    logging.getLogger("datasets").addHandler(caplog.handler)
    folder = write(tmp_path / "set", train=rows_of(3))
    capfd.readouterr()  # bars of to_parquet itself
    assert len(open_splits(str(folder)).train_split) == 3
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(UserError):
        len(open_splits(str(tmp_path / "bad.parquet")).train_split)
    logging.getLogger("datasets").removeHandler(caplog.handler)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_the_fingerprint_is_of_the_rows_and_not_of_place_or_format(tmp_path):
    rows = rows_of(30)
    first = open_splits(str(write(tmp_path / "a", train=rows))).train_fingerprint
    rows.to_csv(tmp_path / "b.csv")
    assert open_splits(str(tmp_path / "b.csv")).train_fingerprint == first
    assert open_splits(str(write(tmp_path / "c", train=rows.select([*range(28), 29, 28])))).train_fingerprint != first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", "", "train.csv is empty"),
        ("train.parquet", "no parquet at all", "cannot read .*train.parquet"),
        ("train.jsonl", '{"text": "a"', "cannot read .*train.jsonl"),
        ("readme.md", "hello", "no data in .*name a folder with"),
    ],
)
def test_files_that_hold_no_rows_end_in_one_line_that_names_them(tmp_path, name, content, message):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        len(open_splits(str(tmp_path / "set")).train_split)
    assert "\n" not in str(error.value)


def test_a_missing_path_root_or_subfolder_is_said_to_be_missing(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        open_splits("./nowhere")
    with pytest.raises(UserError, match=r"data root .*nowhere is no folder"):
        open_splits("glue/cola", data_root=str(tmp_path / "nowhere"))
    write(tmp_path / "glue" / "cola", train=rows_of(3))
    with pytest.raises(UserError, match="no subfolder 'rte'; it has cola"):
        open_splits("glue", config="rte")
    with pytest.raises(UserError, match="subfolders: cola"):
        open_splits("glue")


def test_a_split_in_two_formats_is_refused(tmp_path):
    folder = write(tmp_path / "set", train=rows_of(3))
    (folder / "train.csv").write_text("sentence,label\na,0\n")
    with pytest.raises(UserError, match=r"train split as \.csv and \.parquet"):
        open_splits(str(folder))


def test_the_hub_out_of_reach_fails_fast_in_one_line_that_says_what_to_do():
    code = """
import time
from sparsesoup.hub.tasks.splits import open_splits
started = time.monotonic()
try:
    open_splits("glue/rte")
except ValueError as error:
    print(type(error).__name__, error)
assert time.monotonic() - started < 6
"""
    nobody = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=nobody, check=True)
    line = r"UserError cannot open dataset 'glue/rte': .*nyu-mll/glue, configuration rte.*no copy.*SPARSESOUP_DATA.*\n"
    assert re.fullmatch(line, found.stdout)
    assert found.stderr == ""


def test_validation_is_a_seeded_tenth_of_the_training_split():
    source = source_of(train=rows_of(50), validation=rows_of(10, 100), test=rows_of(10, 200))
    train, validation = training_splits(source, TASK, seed=0)
    assert (len(train), len(validation)) == (45, 5)
    assert texts(train) | texts(validation) == texts(source.train_split)
    assert texts(training_splits(source, TASK, seed=0)[1]) == texts(validation)
    assert texts(training_splits(source, TASK, seed=1)[1]) != texts(validation)


def test_a_file_is_called_by_its_letters_of_any_script_and_by_a_digest_without_any(tmp_path):
    names = {}
    for stem in ("评论", "отзывы", "cafe\u0301", "my reviews (2)", "🎬", "🎵"):
        rows_of(4).to_csv(tmp_path / f"{stem}.csv", index=False)
        names[stem] = open_splits(str(tmp_path / f"{stem}.csv")).name
    assert [*names.values()][:4] == ["评论", "отзывы", "caf\u00e9", "my-reviews-2"]
    film, song = names["🎬"], names["🎵"]
    assert film != song
    assert all(re.fullmatch("dataset-[0-9a-f]{8}", name) for name in (film, song))


def test_at_most_two_thousand_and_at_least_one_row_is_held_out():
    many, few = source_of(train=rows_of(25000), test=rows_of(3)), source_of(train=rows_of(3), test=rows_of(3))
    assert len(training_splits(many, TASK, 0)[1]) == 2000
    assert [len(part) for part in training_splits(few, TASK, 0)] == [2, 1]
    with pytest.raises(UserError, match=r"^reviews train has 1 row, where at least 2 are needed"):
        training_splits(source_of(train=rows_of(1), test=rows_of(3)), TASK, 0)


def test_the_test_split_is_glues_validation_and_elsewhere_the_labelled_test():
    splits = {"train": rows_of(9), "validation": rows_of(4, 20), "test": rows_of(5, 40)}
    assert len(open_test(source_of("glue/mrpc", **splits), TASK)["test"]) == 4
    assert len(open_test(source_of("reviews", **splits), TASK)["test"]) == 5
    unlabelled = Dataset.from_dict({"sentence": ["a", "b"], "label": [-1, -1]}, FEATURES)
    assert len(open_test(source_of("reviews", **{**splits, "test": unlabelled}), TASK)["test"]) == 4
    assert len(open_test(source_of("reviews", train=rows_of(9), dev=rows_of(6)), TASK)["test"]) == 6


@pytest.mark.parametrize(
    ("name", "others", "told"),
    [
        ("glue/mrpc", {"validation": 4, "test": 5}, {"test": "validation"}),
        ("reviews", {"validation": 4, "test": 5}, {"test": "test"}),
        ("reviews", {"dev": 6}, {"test": "dev"}),
        ("reviews", {}, {"test": "train"}),
        ("glue/mnli", {f"validation_{key}": 4 for key in ("matched", "mismatched")},
         {"matched": "validation_matched", "mismatched": "validation_mismatched"}),
    ],
)  # fmt: skip
def test_what_the_test_rows_are_called_in_their_dataset(name, others, told):
    source = source_of(name, train=rows_of(40), **{split: rows_of(count) for split, count in others.items()})
    assert sources.test_splits(source, TASK) == told
    assert open_test(source, TASK).keys() == told.keys()


def test_mnli_has_two_test_splits():
    splits = {"train": rows_of(9), "validation_matched": rows_of(4), "validation_mismatched": rows_of(5)}
    found = open_test(source_of("glue/mnli", **splits), TASK)
    assert {name: len(rows) for name, rows in found.items()} == {"matched": 4, "mismatched": 5}


def test_training_never_opens_a_test_split(tmp_path):
    folder = write(tmp_path / "set", train=rows_of(20), validation=rows_of(4))
    (folder / "test.parquet").write_text("opening this fails")
    source = open_splits(str(folder))
    training_splits(source, TASK, 0)
    with pytest.raises(UserError, match=r"test\.parquet"):
        open_test(source, TASK)


@pytest.mark.parametrize("extra", [{}, {"test": Dataset.from_dict({"sentence": ["a"], "label": [-1]}, FEATURES)}])
def test_a_carved_test_split_is_the_same_for_all_seeds_and_never_trained_on(extra):
    source = source_of(train=rows_of(40), **extra)
    test = texts(open_test(source, TASK)["test"])
    assert len(test) == 4
    for seed in (0, 1):
        assert texts(open_test(source, TASK)["test"]) == test
        train, validation = (texts(rows) for rows in training_splits(source, TASK, seed))
        assert not test & (train | validation)
        assert not train & validation
        assert len(train | validation) == 36


def test_without_a_training_split_the_others_are_named():
    with pytest.raises(UserError, match="its splits are validation, test"):
        training_splits(source_of(validation=rows_of(3), test=rows_of(3)), TASK, 0)
    with pytest.raises(UserError, match="its splits are north, south"):
        training_splits(source_of(north=rows_of(3), south=rows_of(3)), TASK, 0)
    assert len(training_splits(source_of(everything=rows_of(30)), TASK, 0)[0]) == 24


def test_labels_are_checked_wherever_a_split_is_opened():
    bad = Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [0, 1, -1]}, FEATURES)
    with pytest.raises(UserError, match="reviews train: row 2 has the label -1"):
        training_splits(source_of(train=bad, test=rows_of(3)), TASK, 0)
    with pytest.raises(UserError, match="reviews test: row 2 has the label -1"):
        open_test(source_of(train=rows_of(3), test=bad), TASK)
    with pytest.raises(UserError, match="reviews train is empty"):
        training_splits(source_of(train=rows_of(0), test=rows_of(3)), TASK, 0)
    with pytest.raises(UserError, match="reviews validation has no column 'label'"):
        open_test(source_of(train=rows_of(3), validation=rows_of(3).remove_columns("label")), TASK)


def test_texts_are_checked_and_counted_as_the_split_has_them_before_rows_are_held_out():
    for bad in range(20):  # two of which are held out, which moves what lies behind them
        gap = [None if i == bad else "a" for i in range(20)]
        rows = Dataset.from_dict({"sentence": gap, "label": [0, 1] * 10}, FEATURES)
        with pytest.raises(UserError, match=f"reviews train: row {bad} has None of type NoneType in column sentence"):
            training_splits(source_of(train=rows, test=rows_of(3)), TASK, 0)
        with pytest.raises(UserError, match=f"reviews test: row {bad} has None"):
            open_test(source_of(train=rows_of(3), test=rows), TASK)


def test_a_question_that_is_missing_is_counted_as_the_split_has_it():
    answers = {"text": ["b"], "answer_start": [2]}
    asked = [{"question": None if i == 17 else "which", "context": "a b", "answers": answers} for i in range(20)]
    rows = Dataset.from_list(asked)
    with pytest.raises(UserError, match="reviews train: row 17 has None of type NoneType in column question"):
        training_splits(source_of(train=rows), QuestionAnswering(), 0)


def test_a_written_label_that_training_never_saw_is_refused():
    train = Dataset.from_dict({"text": ["a", "b"], "label": ["pos", "neg"]})
    test = Dataset.from_dict({"text": ["c"], "label": ["mixed"]})
    source = source_of(train=train, test=test)
    with pytest.raises(UserError, match=r"row 0 has the label 'mixed'.*\(neg, pos\)"):
        open_test(source, find_task(source.train_split, source.name))


def test_quotes_of_a_table_with_tabs_are_text_unless_they_stand_around_fields(tmp_path):
    rows = [f"said {i}" for i in range(30)]
    rows[3], rows[20] = '"So it goes" said he', '"unclosed'
    plain = "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(rows))
    (tmp_path / "plain.tsv").write_text("text\tlabel\n" + plain)
    assert open_splits(str(tmp_path / "plain.tsv")).train_split["text"][:] == rows
    rows[4] = "two\nlines"
    pandas.DataFrame({"text": rows, "label": 1}).to_csv(tmp_path / "quoted.tsv", sep="\t", index=False)
    assert open_splits(str(tmp_path / "quoted.tsv")).train_split["text"][:] == rows
