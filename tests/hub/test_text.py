"""Texts become padded batches that equal the tokenizer's own."""

import time

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sparsesoup.core.errors import UserError
from sparsesoup.hub.tasks.labels import TextTask
from sparsesoup.hub.tasks.text import encode_texts

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh"]
PAIR = TextTask(("first", "second"), "label", ("no", "yes"), ("accuracy",))
ONE = TextTask(("first",), "label", ("no", "yes"), ("accuracy",))
ROWS = {"first": ["a b c d", "e", "f g"], "second": ["h", "a b c d e f g h", ""], "label": [0, 1, 1]}


def words(side="right", **changes):
    """A tokenizer of one token per letter, with BERT's special tokens and segment numbers."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    settings = {"model_max_length": 64, "padding_side": side, "model_input_names": names, **special, **changes}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("task", [ONE, PAIR])
@pytest.mark.parametrize("max_length", [6, 64])
def test_a_batch_equals_the_tokenizers_own_padding(side, task, max_length):
    tokenizer = words(side)
    data = encode_texts(Dataset.from_dict(ROWS), task, tokenizer, max_length)
    expected = tokenizer(
        *[ROWS[column] for column in task.texts],
        truncation=True,
        max_length=max_length,
        padding=True,
        return_tensors="pt",
    )
    batch = data.batch([0, 1, 2])
    assert set(batch) == {*expected, "labels"}
    for name in expected:
        assert torch.equal(batch[name], expected[name]), name
    assert data.lengths == tuple(expected["attention_mask"].sum(1).tolist())


def test_a_batch_is_as_wide_as_its_longest_row():
    data = encode_texts(Dataset.from_dict(ROWS), ONE, words(), 64)
    assert data.batch([1, 2])["input_ids"].tolist() == [[1, 8, 2, 0], [1, 9, 10, 2]]


def test_labels_are_class_numbers_or_real_numbers():
    numbers = TextTask(("first",), "label", (), ("pearson",))
    assert encode_texts(Dataset.from_dict(ROWS), ONE, words(), 64).batch([1, 0])["labels"].tolist() == [1, 0]
    assert encode_texts(Dataset.from_dict(ROWS), numbers, words(), 64).batch([1, 0])["labels"].dtype == torch.float32
    written = Dataset.from_dict({**ROWS, "label": ["yes", "no", "yes"]})
    labels = encode_texts(written, ONE, words(), 64).batch([0, 1])["labels"]
    assert (labels.tolist(), labels.dtype) == ([1, 0], torch.int64)


def test_a_text_that_is_no_string_is_named_by_row_and_column():
    for value in (None, 7):
        rows = Dataset.from_dict({**ROWS, "second": [value] * 3})
        with pytest.raises(UserError, match=rf"row 0 has {value} .*column second"):
            encode_texts(rows, PAIR, words(), 64)


def test_a_tokenizer_that_cannot_pad_or_a_length_that_it_cannot_take_is_refused():
    with pytest.raises(UserError, match="no padding token"):
        encode_texts(Dataset.from_dict(ROWS), ONE, words(pad_token=None), 64)
    for length in (0, 4, 65):
        with pytest.raises(UserError, match=f"^max_length: must be 5 to 64 for the tokenizer .*, got {length}$"):
            encode_texts(Dataset.from_dict(ROWS), ONE, words(), length)


def test_making_a_batch_costs_next_to_nothing():
    rows = Dataset.from_dict({"first": ["a b c d e f " * 5] * 32, "label": [0] * 32})
    data = encode_texts(rows, ONE, words(), 64)
    times = []
    for _ in range(50):
        started = time.perf_counter()
        data.batch(range(32))
        times.append(time.perf_counter() - started)
    assert min(times) < 0.0005


def test_the_same_texts_are_tokenised_once_and_others_anew():
    def first_row(task=ONE, length=64, side="right", **changes):
        return encode_texts(Dataset.from_dict(ROWS | changes), task, words(truncation_side=side), length).rows[0][0]

    assert first_row() is first_row(label=[1, 0, 0])
    for other in ({"task": PAIR}, {"length": 6}, {"length": 5, "side": "left"}, {"first": ["a b c d", "e ", "f g"]}):
        assert first_row(**other) is not first_row()
    assert first_row(length=5, side="left").tolist() != first_row(length=5).tolist()


def test_rows_that_are_kept_tokenised_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr("sparsesoup.hub.tasks.text.MOST", 6)
    monkeypatch.setattr("sparsesoup.hub.tasks.text._KEPT", kept := {})
    for count in (3, 2, 3, 9):
        encode_texts(Dataset.from_dict({"first": ["a"] * count, "label": [0] * count}), ONE, words(), 64)
    assert [len(arrays[0]) for _, arrays in kept.values()] == [9]


def test_a_row_without_any_token_is_refused():
    bare = words()
    bare.backend_tokenizer.post_processor = processors.ByteLevel()  # GPT-2 puts nothing around a text
    rows = Dataset.from_dict({"first": ["a", "", "b"], "label": [0, 1, 0]})
    assert encode_texts(rows, ONE, words(), 64).lengths == (3, 2, 3)
    with pytest.raises(UserError, match=r"1 of 3 rows have no tokens in column first.*drop such rows"):
        encode_texts(rows, ONE, bare, 64)
