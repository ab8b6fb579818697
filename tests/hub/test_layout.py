"""Which files and folders are read: nothing joins a split, and nothing stays out of one, without a word."""

import shutil

import PIL.Image
import pytest
from datasets import Dataset, Features, Value

from sparsesoup.core.errors import UserError
from sparsesoup.hub.data.folders import find_files, image_endings
from sparsesoup.hub.tasks.splits import open_splits
from tiny_hub import sentences, write_rows
from tiny_images import photos


def folder_of(place, *names):
    for name in names:
        write_rows(place / name, ("text", "label"), sentences(4))
    return place


def read(place):
    """Split -> its files, and what is said of the others."""
    splits, notes = find_files(place)
    return {name: [str(path.relative_to(place)) for path in paths] for name, paths in splits.items()}, notes


@pytest.mark.parametrize(
    ("files", "splits", "said"),
    [
        (("train.csv", "train_old.csv"), {"train": ["train.csv"]}, ["train_old.csv is not read: train.csv is the"]),
        (("train/train.csv", "train/more.csv"), {"train": ["train/train.csv"]}, ["train/more.csv is not read"]),
        (("train.csv", "extra.csv"), {"train": ["train.csv"]}, ["extra.csv is not read: not named after a split"]),
        (("train.csv", "test.csv", "test_labels.csv"), {"test": ["test.csv"], "train": ["train.csv"]}, ["test_labels"]),
        (("train/a.csv", "train/b.csv"), {"train": ["train/a.csv", "train/b.csv"]}, []),
        (("a_train.csv", "b_train.csv"), {"train": ["a_train.csv", "b_train.csv"]}, ["joined from a_train.csv, b"]),
        (("a.csv", "b.csv"), {"train": ["a.csv", "b.csv"]}, ["the train split is joined from a.csv, b.csv"]),
        (("data/train-00000-of-00002.csv", "data/train-00001-of-00002.csv"),
         {"train": ["data/train-00000-of-00002.csv", "data/train-00001-of-00002.csv"]}, []),
    ],
)  # fmt: skip
def test_a_file_named_like_a_split_is_the_split_and_what_is_joined_or_left_out_is_said(tmp_path, files, splits, said):
    found, notes = read(folder_of(tmp_path, *files))
    assert found == splits
    assert len(notes) == len(said)
    assert all(part in note for part, note in zip(said, notes, strict=True)), notes


def test_a_split_in_a_format_that_is_not_read_is_named(tmp_path):
    (folder_of(tmp_path, "train.csv") / "test.csv.gz").write_bytes(b"-")
    assert read(tmp_path)[1] == ["test.csv.gz is not read: the ending is none of .parquet, .csv, .tsv, .jsonl, .json"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("train.csv", "val.csv", "dev.csv"), "validation split twice, as dev.csv and val.csv"),
        (("train.csv", "data/train.csv"), "train split twice, as train.csv and data/train.csv"),
        (("train.csv", "train/a.csv"), "train split twice, as train.csv and train/a.csv"),
        (("train.csv", "training.csv"), "train split twice"),
        (("train.csv", "dev_matched.csv", "validation_matched.csv"), "validation_matched split twice"),
    ],
)
def test_a_split_that_is_there_twice_is_refused(tmp_path, files, said):
    with pytest.raises(UserError, match=f"{said}.*rename or remove one"):
        find_files(folder_of(tmp_path, *files))


# Images


def picture(path, kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (8, 8)).save(path, format=kind)


def classes(place):
    return open_splits(str(place)).train_split.features["label"].names


@pytest.mark.parametrize("ending", [".jfif", ".jpe", ".jp2", ".tga", ".apng", ".avif", ".bmp", ".JPG"])
def test_every_image_that_pillow_opens_is_read(tmp_path, ending):
    if ending.lower() not in image_endings():
        pytest.skip(f"this Pillow does not open {ending}")
    picture(tmp_path / "set" / "cat" / "1.png")
    picture(tmp_path / "set" / "dog" / f"1{ending}", "PNG" if ending == ".apng" else None)
    assert classes(tmp_path / "set") == ["cat", "dog"]
    assert [image.size for image in open_splits(str(tmp_path / "set")).train_split["image"]] == [(8, 8)] * 2


@pytest.mark.parametrize("ending", [".heic", ".svg", ".raw", ""])
@pytest.mark.parametrize("split", ["train/", ""])
def test_a_format_that_is_not_read_is_named_by_its_first_file(tmp_path, ending, split):
    picture(tmp_path / f"{split}cat" / "1.png")
    for number in (1, 2):
        picture(tmp_path / f"{split}dog" / f"{number}{ending}", "PNG")
    with pytest.raises(UserError, match=rf"dog/1{ending} is not read: .* \(2 such files in dog\); convert them"):
        open_splits(str(tmp_path))


def test_what_systems_leave_behind_is_no_class_and_no_image(tmp_path):
    photos(tmp_path / "plain", rows=12)
    before = open_splits(str(tmp_path / "plain")).train_fingerprint
    for name in ("__MACOSX/train", "__MACOSX", ".thumbs", "train/__MACOSX", "train/.cache", "train/@eaDir"):
        picture(tmp_path / "plain" / name / "1.png")
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "._1.png"):
        (tmp_path / "plain" / "train" / "dark" / name).write_bytes(b"-")
    found = open_splits(str(tmp_path / "plain"))
    assert (found.train_fingerprint, found.notes) == (before, ())


def test_what_else_lies_beside_images_is_said(tmp_path):
    photos(tmp_path, rows=12)
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "train" / "dark" / "notes.txt").write_text("-")
    picture(tmp_path / "train" / "loose.png")
    picture(tmp_path / "train_old" / "dark" / "1.png")
    assert list(open_splits(str(tmp_path)).notes) == [
        "folder train_old is not read: it is not named after a split",
        "notes.txt in dark is not read: it is no image (1 such files)",
        "folder empty is no class: it holds no images",
        "loose.png in train is not read: it is in no class (1 such images)",
    ]


def test_two_folders_of_one_split_are_refused(tmp_path):
    photos(tmp_path, rows=12)
    shutil.copytree(tmp_path / "test", tmp_path / "val")
    shutil.copytree(tmp_path / "test", tmp_path / "valid")
    with pytest.raises(UserError, match="validation split twice, as val and valid"):
        open_splits(str(tmp_path))


@pytest.mark.parametrize("split", ["train", ""])
def test_a_table_beside_folders_of_classes_is_refused(tmp_path, split):
    photos(tmp_path / "set", rows=12)
    place = tmp_path / "set" if split else tmp_path / "set" / "train"
    write_rows(place / "labels.csv", ("id", "class"), [("001", "dark")])
    with pytest.raises(UserError, match=r"a table \(labels.csv\) and folders of images .*name the table itself"):
        open_splits(str(place))
    assert len(open_splits(str(place / "labels.csv")).train_split) == 1


def test_one_folder_of_pictures_beside_a_table_is_no_class(tmp_path):
    picture(folder_of(tmp_path, "reviews.csv") / "plots" / "1.png")
    assert open_splits(str(tmp_path)).train_split.column_names == ["text", "label"]


# Tables


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id,text,label\n0,well, a b,0\n1,so, c d,1\n", "line 2 has 4 fields, where the head has 3 .*in quotes"),
        ("text,label\na b,0\nc, d,1\n", "line 3 has 3 fields, where the head has 2"),
        ("text,label\na b,0,\nc d,1,\n", "line 2 has 3 fields.*remove the ',' at its end"),
        ("text,label\na b,0\nc d,1\ne", r"line 4 has 1 field, where the head has 2 .*cut off"),
        ("text,label,day\na b,0,1\nc d,1\n", "line 3 has 2 fields"),
        ('text,label\n"two\nlines",0\n\n"a\nb",1\nc\n', "line 7 has 1 field"),
        ('text,label\na,0\n"b,1\nc,0\n', "line 3 has 1 field.*close its quotes"),
        ("text;label\na, b;0\nc;1\n", "separated by ';'; fields of a .csv file are separated by commas"),
        ("text,label,label\na,0,1\nb,1,0\n", "has the column 'label' twice"),
        ("text, label,label\na,0,1\nb,1,0\n", "has the column 'label' twice"),
    ],
)
def test_rows_of_another_width_and_a_column_twice_are_refused_by_file_and_line(tmp_path, text, said):
    (tmp_path / "set.csv").write_text(text)
    with pytest.raises(UserError, match=rf"set\.csv(, |: | ).*{said}"):
        len(open_splits(str(tmp_path / "set.csv")).train_split)


@pytest.mark.parametrize("form", ["{0}\t{1}\n", '"{0}"\t{1}\n'])
def test_rows_of_another_width_are_refused_in_tables_with_tabs(tmp_path, form):
    rows = [*(form.format(f"text {i}", i % 2) for i in range(4)), form.format("text", "1\t")]
    (tmp_path / "set.tsv").write_text("text\tlabel\n" + "".join(rows))
    with pytest.raises(UserError, match="line 6 has 3 fields"):
        len(open_splits(str(tmp_path / "set.tsv")).train_split)


def test_long_texts_blank_lines_and_a_byte_order_mark_are_no_fault(tmp_path):
    long = "word " * 50_000
    (tmp_path / "set.csv").write_text(f'\ufefftext,label\n\n"{long}",0\n  \n"a, ""b""\nc",1\n', encoding="utf-8")
    assert open_splits(str(tmp_path / "set.csv")).train_split["text"][:] == [long, 'a, "b"\nc']


@pytest.mark.parametrize("text", ["text, label\na b, 0\nc d, 1\n", 'label , text\n0, "a b"\n1, "c d"\n',
                                  "text\t label\na b\t0\nc d\t1\n"])  # fmt: skip
def test_spaces_after_the_commas_of_a_head_are_part_of_no_name(tmp_path, text):
    path = tmp_path / ("set.tsv" if "\t" in text else "set.csv")
    path.write_text(text)
    rows = open_splits(str(path)).train_split
    assert (rows["text"][:], rows["label"][:]) == (["a b", "c d"], [0, 1])


def test_parquet_without_rows_is_empty_and_one_without_among_others_is_passed_over(tmp_path):
    features = Features({"text": Value("string"), "label": Value("int64")})
    none = Dataset.from_dict({"text": [], "label": []}, features=features)
    some = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    for shard, rows in (("train-00000-of-00002", some), ("train-00001-of-00002", none), ("test-00000-of-00001", none)):
        rows.to_parquet(tmp_path / f"{shard}.parquet")
    found = open_splits(str(tmp_path))
    assert len(found.train_split) == 2
    with pytest.raises(UserError, match=r"test is empty: .*has no rows"):
        len(found.splits["test"])


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"), "holds its train split twice"),
        (("train-00000-of-00001-0a1b2c", "train-00000-of-00001-ffee11"), "holds its train split twice"),
        (("train-00000-of-00003", "train-00002-of-00003"), "lacks 1 of the 3 shards .* train-00001-of-00003"),
        (("train-00001-of-00003",), "lacks 2 of the 3 shards .* train-00000-of-00003"),
    ],
)
def test_shards_are_all_there_and_of_one_table(tmp_path, files, said):
    folder_of(tmp_path, *(f"{name}.csv" for name in files))
    with pytest.raises(UserError, match=said):
        find_files(tmp_path)


def test_a_stray_quote_that_swallows_rows_is_refused(tmp_path):
    rows = [f"text {i},{i % 2}" for i in range(20)]
    rows[4], rows[9] = '"text 4,0', '"text 9,1'
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="a quote stands where no field begins or ends"):
        _ = open_splits(str(tmp_path)).splits["train"]
