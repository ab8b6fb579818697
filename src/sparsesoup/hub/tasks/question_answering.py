"""Extractive question answering: find the answer span in a context. Long contexts are split into windows."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from sparsesoup.core.errors import UserError, require
from sparsesoup.hub.tasks.columns import LABEL_NAMES
from sparsesoup.hub.tasks.labels import DROP, columns_of
from sparsesoup.hub.tasks.metrics import ContextWindow, MetricFunction, squad_metric
from sparsesoup.hub.tasks.text import Row, check_tokenizer, padding_function, text_column
from sparsesoup.training.batching import Batch, RowBatches

ANSWERABLE = "answerable"  # [rows, max_length]: tokens at which an answer may begin or end
FEWEST = 3  # minimum tokens of question and window in a row, one of them shared by neighbouring windows
LOW = -1e4  # logit of all other tokens: 0 after a softmax, and finite, so that distillation can compare two of them
Tokens = tuple[np.ndarray, np.ndarray]  # token ids of a text [tokens], and the characters of each [tokens, 2]


@dataclass(frozen=True)
class QuestionAnswering:
    """A question-answering task in SQuAD's format."""

    texts: tuple[str, str] = ("question", "context")  # the columns of question and context
    # the column of answers: each has a `text` and its `answer_start` in characters of the context
    label: str = "answers"
    unanswerable: bool = False  # True if some training questions have no answer, as in SQuAD 2.0
    # overlap in tokens of consecutive windows of a long context; default a third of a window
    stride: int | None = None


def find_spans(train: Dataset, name: str, texts: Sequence[str] | None, label: str | None) -> QuestionAnswering | None:
    """Infer the question-answering task of a dataset from its columns; None for other datasets."""
    features, found = train.features, QuestionAnswering()
    columns, answers = tuple(texts or found.texts), label or found.label
    kind = getattr(features.get(answers), "feature", features.get(answers))  # a dict of lists, or a list of dicts
    if len(columns) == 2 and {*columns} <= set(features):
        if isinstance(kind, dict) and {"text", "answer_start"} <= set(kind):
            given = [value for value in train[answers][:] if value is not None]
            return QuestionAnswering((columns[0], columns[1]), answers, not all(map(_parse_answers, given)))
        labels = [c for c, k in features.items() if isinstance(k, ClassLabel) or c.lower() in LABEL_NAMES]
        if columns == found.texts and not label and not labels:
            raise UserError(
                f"{name} has question and context, and no column answers with text and answer_start, where questions "
                f"need them; its columns are {columns_of(features)}; name another column",
                "label_column",
            )
    return None


def answers_of(rows: Dataset, task: QuestionAnswering, split: str) -> list[list[tuple[str, int]]]:
    """Return (text, start) of the correct answers to each question; empty if it has none."""
    found = []
    _, contexts = (text_column(rows, column, split) for column in task.texts)
    for i, (context, value) in enumerate(zip(contexts, rows[task.label][:], strict=True)):
        answers = _parse_answers(value)
        if answers is None:
            remedy = f"complete them, or {DROP}" if value is None else "correct or drop such rows"
            raise UserError(
                f"{split}: row {i} has {str(value)[:80]} in column {task.label}, where a text and an answer_start for "
                f"each answer are needed; {remedy}"
            )
        for text, start in answers:
            there = context[start : start + len(text)] if 0 <= start < len(context) else None
            if there != text:
                says = f"it has {len(context)} characters" if there is None else f"it reads {there[:80]!r} there"
                raise UserError(
                    f"{split}: row {i} has the answer {text[:80]!r} at character {start} of its context, where {says}; "
                    "correct answer_start or drop such rows"
                )
        found.append(answers)
    return found


def has_answers(rows: Dataset, task: QuestionAnswering) -> bool:
    """Return True if any question has an answer: competitions publish test questions without."""
    return task.label in rows.column_names and any(_parse_answers(value) for value in rows[task.label][:])


def encode_questions(
    rows: Dataset, task: QuestionAnswering, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[RowBatches, MetricFunction]:
    """Return the windows of all contexts, ready for batching, and the metric.

    A row has special tokens, question and context. A question longer than half the row is truncated. Each context is
    tokenized once, however many questions it has. Rows are padded on the right. Labels are [window, start, end].
    """
    frame = WindowBuilder(tokenizer, max_length, task)
    questions, contexts = (text_column(rows, column, "the data") for column in task.texts)
    answers = answers_of(rows, task, "the data")
    question_ids, context_ids = _tokenize_texts(tokenizer, questions), _tokenize_texts(tokenizer, contexts)
    made: list[Row] = []
    for number, (question, context) in enumerate(zip(questions, contexts, strict=True)):
        ids, places = context_ids[context]
        wanted = _answer_token_span(places, *answers[number][0]) if answers[number] else None
        for inputs, first, none, begin, count in frame.cut_windows(question_ids[question][0], ids):
            inside = wanted is not None and begin <= wanted[0] and wanted[1] < begin + count
            start, end = (first + at - begin for at in wanted) if wanted and inside else (none, none)
            made.append((*inputs, ContextWindow(len(made), number, none, first, count, begin, start, end)))
    truths = [[text for text, _ in each] for each in answers]
    places_of = [context_ids[context][1] for context in contexts]
    pad = padding_function(frame.names, tokenizer, left=False)

    def collate_rows(rows: Sequence[Row]) -> Batch:
        allowed = torch.zeros(len(rows), max_length, dtype=torch.bool)
        windows: list[ContextWindow] = [row[-1] for row in rows]
        for i, window in enumerate(windows):
            allowed[i, window.none] = True
            allowed[i, window.first : window.first + window.tokens] = True
        labels = torch.tensor([(window.number, window.start, window.end) for window in windows])
        return pad(rows) | {ANSWERABLE: allowed, "labels": labels}

    data = RowBatches(made, collate_rows, tuple(len(row[0]) for row in made))
    return data, squad_metric([row[-1] for row in made], contexts, places_of, truths, task.unanswerable)


def predict_spans(model: nn.Module, batch: Batch) -> Tensor:
    """Return logits of start and end, [rows, 2, max_length]; -10,000 where no answer may begin or end."""
    allowed = batch[ANSWERABLE]
    found = model(**{name: t for name, t in batch.items() if name not in ("labels", ANSWERABLE)})
    outputs = torch.stack([found.start_logits, found.end_logits], 1).float()
    # Padded to one width, so that the outputs of several batches can be joined.
    outputs = functional.pad(outputs, (0, allowed.shape[1] - outputs.shape[2]))
    return outputs.masked_fill(~allowed[:, None], LOW)


def span_loss(outputs: Tensor, batch: Batch) -> Tensor:
    """Return the mean of the cross-entropies of start and end."""
    return functional.cross_entropy(outputs.flatten(0, 1), batch["labels"][:, 1:].flatten())


class WindowBuilder:
    """Build windows: the special tokens around question and context, and the window length."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, task: QuestionAnswering) -> None:
        check_tokenizer(tokenizer, max_length)
        if not tokenizer.is_fast:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} is a slow one ({type(tokenizer).__name__}), which does not "
                "say where its tokens stand in the text; use a checkpoint with tokenizer.json"
            )
        sample = tokenizer("a", "a")
        owner = sample.sequence_ids(0)
        one, two = owner.index(0), owner.index(1)
        gap = one + owner.count(0), two + owner.count(1)
        self.names = [n for n in tokenizer.model_input_names if n in sample and n != "attention_mask"]
        self.around = {n: (sample[n][:one], sample[n][gap[0] : two], sample[n][gap[1] :]) for n in self.names}
        self.inside = {n: (sample[n][one], sample[n][two]) for n in self.names}
        specials = sum(map(len, self.around["input_ids"]))
        marks = [i - len(owner) if i >= two else i for i, t in enumerate(sample["input_ids"])
                 if owner[i] is None and t == tokenizer.cls_token_id]  # fmt: skip
        self.none = marks[0] if marks else 0  # at the end of the row if the tokenizer puts it there
        self.free = max_length - specials
        most = self.free - self.free // 2 - 1
        why = f"since a row has {specials} tokens beside question and context"
        require(most >= 1, "max_length", f"at least {specials + FEWEST} here, {why}", max_length)
        inside = task.stride is None or 1 <= task.stride <= most
        require(inside, "doc_stride", f"1 to {most} with a max_length of {max_length}", task.stride)
        self.stride = task.stride if task.stride is not None else min(max_length // 3, most)

    def cut_windows(
        self, question: np.ndarray, context: np.ndarray
    ) -> Iterator[tuple[list[np.ndarray], int, int, int, int]]:
        """Yield (inputs, first, none, begin, count) of each window of a context, from left to right."""
        question = question[: self.free // 2]
        room = self.free - len(question)
        for begin in range(0, max(1, len(context) - self.stride), room - self.stride):
            part = context[begin : begin + room]
            inputs = [self._window_row(name, question, part) for name in self.names]
            before, between, _ = self.around["input_ids"]
            first = len(before) + len(question) + len(between)
            yield inputs, first, self.none % len(inputs[0]), begin, len(part)

    def _window_row(self, name: str, question: np.ndarray, part: np.ndarray) -> np.ndarray:
        before, between, after = self.around[name]
        if name != "input_ids":
            one, two = self.inside[name]
            question, part = np.full(len(question), one), np.full(len(part), two)
        kind = np.int32 if name == "input_ids" else np.int8
        return np.concatenate([before, question, between, part, after], dtype=kind, casting="unsafe")


def _tokenize_texts(tokenizer: Any, texts: Sequence[str]) -> Mapping[str, Tokens]:
    """Return the tokens of each text, a thousand at a time, since lists take twenty times the memory of arrays."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    plain = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    context_ids: dict[str, Tokens] = {}
    unique = list(dict.fromkeys(texts))
    for i in range(0, len(unique), 1000):
        chunk = unique[i : i + 1000]
        found = tokenizer(chunk, **plain, return_offsets_mapping=True, truncation=False, verbose=False)
        for text, ids, places in zip(chunk, found["input_ids"], found["offset_mapping"], strict=True):
            context_ids[text] = np.array(ids, dtype=np.int32), np.array(places, dtype=np.int32).reshape(-1, 2)
    return context_ids


def _answer_token_span(places: np.ndarray, text: str, start: int) -> tuple[int, int] | None:
    """Return (first, last) token that overlaps an answer; None if there is none, as when the tokenizer drops it."""
    first = int(np.searchsorted(places[:, 1], start, side="right"))
    last = int(np.searchsorted(places[:, 0], start + len(text), side="left")) - 1
    return (first, last) if first <= last else None


def _parse_answers(value: Any) -> list[tuple[str, int]] | None:
    """Return (text, start) of each answer with a text; None for another format."""
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        value = {key: [each.get(key) for each in value] for key in ("text", "answer_start")}
    texts, starts = map(value.get, ("text", "answer_start")) if isinstance(value, dict) else (None, None)
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        return None
    if not all(isinstance(t, str) and isinstance(s, int) for t, s in zip(texts, starts, strict=True)):
        return None
    return [(text, start) for text, start in zip(texts, starts, strict=True) if text]
