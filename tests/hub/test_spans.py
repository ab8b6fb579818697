"""Questions and contexts become windows whose labels point at the answer, and a model learns from them."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.nn import functional
from transformers import AutoModelForQuestionAnswering, BertTokenizerLegacy, PreTrainedTokenizerFast

from sparsesoup.core.errors import UserError
from sparsesoup.hub.build import ModelAndDataConfig, build_problem, open_task
from sparsesoup.hub.tasks.labels import TextTask
from sparsesoup.hub.tasks.question_answering import (
    ANSWERABLE,
    LOW,
    QuestionAnswering,
    answers_of,
    encode_questions,
    find_spans,
    has_answers,
    predict_spans,
    span_loss,
)
from sparsesoup.hub.tasks.registry import infer_task
from sparsesoup.training.config import DistillConfig, TrainingConfig
from sparsesoup.training.cost import Cost
from sparsesoup.training.distillation import distillation_objective
from sparsesoup.training.loop import train
from sparsesoup.training.problem import evaluate_model
from tiny_hub import CONFIGS, checkpoint, questions, tokenizer, write_rows

TASK = QuestionAnswering()


def of_bytes():
    """A tokenizer of one token a byte, framed like RoBERTa: no segments, two separators, signs of several tokens."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "<pad>", "</s>", *signs]
    tool = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tool.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tool.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    special = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tool, model_max_length=128, model_input_names=["input_ids", "attention_mask"], **special
    )


def at_the_end():
    """A tokenizer framed and padded like XLNet's: its [CLS] comes last, its padding first."""
    tool = tokenizer(True)
    tool.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP] [CLS]:2", pair="$A [SEP] $B:1 [SEP]:1 [CLS]:2", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tool.padding_side = "left"
    return tool


TOOLS = {"bert": lambda: tokenizer(True), "distilbert": lambda: tokenizer(False), "bytes": of_bytes, "end": at_the_end}


def asked(count, seed=0, **more):
    """Questions in a table, some contexts used twice and one much longer."""
    rows = questions(count, seed, **more)
    rows[1] = {**rows[0], "id": "again"}
    long = " and ".join(row["context"] for row in questions(6, seed + 100))
    start = random.Random(seed).choice([i for i in range(len(long)) if long.startswith("was", i)])
    rows[2] = {"id": "long", "context": long, "question": "film was",
               "answers": {"text": ["was"], "answer_start": [start]}}  # fmt: skip
    return rows


def rows_of(*rows):
    return Dataset.from_list(list(rows))


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(("max_length", "stride"), [(24, 3), (40, None), (128, 20)])
def test_rows_are_the_windows_that_the_tokenizer_itself_cuts(tool, max_length, stride):
    rows = asked(8)
    used = TOOLS[tool]()
    data, _ = encode_questions(rows_of(*rows), replace(TASK, stride=stride), used, max_length)
    used.padding_side = "right"
    expected = used(
        [row["question"] for row in rows],
        [row["context"] for row in rows],
        truncation="only_second",
        max_length=max_length,
        stride=stride if stride is not None else max_length // 3,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=True,
        return_tensors="pt",
    )
    batch = data.batch(range(len(data)))
    for name in used.model_input_names:
        assert torch.equal(batch[name], expected[name]), name
    windows = [row[-1] for row in data.rows]
    assert [w.question for w in windows] == expected["overflow_to_sample_mapping"].tolist()
    assert [w.number for w in windows] == list(range(len(data)))
    assert data.lengths == tuple(expected["attention_mask"].sum(1).tolist())
    for i, window in enumerate(windows):
        owners = expected.sequence_ids(i)
        (none,) = [k for k, t in enumerate(expected["input_ids"][i]) if t == used.cls_token_id]
        inside = [k for k, owner in enumerate(owners) if owner == 1]
        assert (window.none, window.first, window.tokens) == (none, inside[0], len(inside))
        assert batch[ANSWERABLE][i].nonzero().flatten().tolist() == sorted([none, *inside])
        assert batch[ANSWERABLE].shape[1] == max_length
        # The slow twin: token by token, by the characters that the tokenizer itself gives.
        row, spots = rows[window.question], expected["offset_mapping"][i].tolist()
        (text,), (start,) = row["answers"].values()
        touched = [k for k in inside if spots[k][0] < start + len(text) and spots[k][1] > start]
        held = touched and spots[touched[0]][0] <= start and spots[touched[-1]][1] >= start + len(text)
        assert (window.start, window.end) == ((touched[0], touched[-1]) if held else (none, none))
        assert batch["labels"][i].tolist() == [i, window.start, window.end]
        if held:
            assert row["context"][spots[window.start][0] : spots[window.end][1]] == text


@pytest.mark.parametrize(("max_length", "stride"), [(16, 1), (16, 5), (24, 8), (60, None)])
def test_windows_cover_the_context_and_overlap_by_the_stride(max_length, stride):
    rows = asked(6)
    data, _ = encode_questions(rows_of(*rows), replace(TASK, stride=stride), of_bytes(), max_length)
    for number, row in enumerate(rows):
        windows = [r[-1] for r in data.rows if r[-1].question == number]
        assert windows[0].begin == 0
        assert windows[-1].begin + windows[-1].tokens == len(row["context"].encode())
        for one, two in itertools.pairwise(windows):
            assert one.begin + one.tokens - two.begin == (max_length // 3 if stride is None else stride)
    assert any(r[-1].start != r[-1].none for r in data.rows)


def test_an_answer_of_signs_of_several_bytes_is_found_and_read_back():
    context, text = "a naïve café 🙂🙂 in Zürich", "café 🙂"
    row = {"context": context, "question": "é?", "answers": {"text": [text], "answer_start": [context.index(text)]}}
    data, judged = encode_questions(rows_of(row), TASK, of_bytes(), 100)
    (window,) = [r[-1] for r in data.rows]
    assert window.end - window.start + 1 == len(text.encode())
    outputs = torch.zeros(1, 2, 100)
    outputs[0, 0, window.start], outputs[0, 1, window.end] = 1.0, 1.0
    assert judged(outputs, data.batch([0])["labels"])["exact_match"] == 1.0


def test_spaces_around_an_answer_are_not_part_of_it():
    row = {"context": "the film was good", "question": "film", "answers": {"text": [" good"], "answer_start": [12]}}
    plain = {**row, "answers": {"text": ["good"], "answer_start": [13]}}
    data, _ = encode_questions(rows_of(row, plain), TASK, tokenizer(True), 40)
    assert data.batch([0])["labels"][0, 1:].tolist() == data.batch([1])["labels"][0, 1:].tolist()
    assert data.rows[0][-1].start == data.rows[0][-1].end != 0


def test_a_long_question_leaves_half_of_the_row_to_the_context():
    row = {**questions(1)[0], "question": "very " * 100}
    data, _ = encode_questions(rows_of(row), TASK, tokenizer(True), 23)
    assert {r[-1].first for r in data.rows} == {1 + 10 + 1}
    assert max(data.lengths) == 23


def test_questions_without_an_answer_and_empty_contexts_point_at_the_first_token():
    empty = {"text": [], "answer_start": []}
    rows = [{**questions(1)[0], "answers": empty}, {"id": "", "context": "", "question": "film", "answers": empty}]
    data, judged = encode_questions(
        rows_of(*rows, questions(1)[0]), replace(TASK, unanswerable=True), tokenizer(True), 60
    )
    labels = data.batch([0, 1, 2])["labels"]
    assert labels[:2].tolist() == [[0, 0, 0], [1, 0, 0]]
    assert labels[2, 1] > 0
    outputs = torch.zeros(3, 2, 60)
    outputs[:, :, 0] = 1.0  # everywhere surer of nothing
    assert judged(outputs, labels)["exact_match"] == pytest.approx(2 / 3)


class Fixed(nn.Module):
    """A model that says what it is told, for inputs of a tokenizer."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, token_type_ids, attention_mask):
        start, end = self.logits[:, :, : input_ids.shape[1]].unbind(1)
        return type("Said", (), {"start_logits": start, "end_logits": end})


def test_predict_masks_question_and_padding_and_has_one_width():
    data, _ = encode_questions(rows_of(*questions(3, clauses=1), questions(1, clauses=4)[0]), TASK, tokenizer(True), 40)
    batch = data.batch(range(4))
    said = torch.randn(4, 2, 40)
    outputs = predict_spans(Fixed(said), batch)
    assert outputs.shape == (4, 2, 40)
    for i, row in enumerate(data.rows):
        for k in range(40):
            window = row[-1]
            answers = k == window.none or window.first <= k < window.first + window.tokens
            assert torch.equal(outputs[i, :, k], said[i, :, k] if answers else torch.full((2,), LOW))


def test_the_loss_is_the_mean_of_that_of_start_and_end():
    data, _ = encode_questions(rows_of(*questions(3)), TASK, tokenizer(True), 40)
    batch = data.batch(range(3))
    outputs = predict_spans(Fixed(torch.randn(3, 2, 40)), batch)
    start = functional.cross_entropy(outputs[:, 0], batch["labels"][:, 1])
    end = functional.cross_entropy(outputs[:, 1], batch["labels"][:, 2])
    assert span_loss(outputs, batch).item() == pytest.approx((start + end).item() / 2, rel=1e-5)


# What is a question-answering task, and what is wrong with one.


def test_squads_columns_are_known_in_both_forms_and_under_other_names():
    row = questions(1)[0]
    flat = {**row, "answers": [{"text": t, "answer_start": s} for t, s in zip(*row["answers"].values(), strict=True)]}
    for each in (row, flat):
        assert infer_task(rows_of(each), "x", None, None) == QuestionAnswering()
        assert answers_of(rows_of(each), TASK, "x") == [list(zip(*row["answers"].values(), strict=True))]
    renamed = rows_of({"passage": row["context"], "asked": row["question"], "spans": row["answers"]})
    task = infer_task(renamed, "x", ["asked", "passage"], "spans", 9)
    assert task == QuestionAnswering(("asked", "passage"), "spans", False, 9)
    assert encode_questions(renamed, replace(task, stride=None), tokenizer(True), 40)[0].lengths
    labelled = rows_of({**row, "label": 1}, {**row, "label": 0})
    assert isinstance(infer_task(labelled, "x", None, "label"), TextTask)


def test_a_question_without_an_answer_makes_it_squad_2():
    row = questions(1)[0]
    for empty in ({"text": [], "answer_start": []}, {"text": [""], "answer_start": [-1]}):
        assert infer_task(rows_of(row, {**row, "answers": empty}), "x", None, None) == QuestionAnswering(
            unanswerable=True
        )
        assert has_answers(rows_of(row, {**row, "answers": empty}), TASK)
        assert not has_answers(rows_of({**row, "answers": empty}), TASK)


def test_a_table_of_questions_without_answers_is_refused_and_other_tables_are_left_alone():
    row = questions(1)[0]
    for answers in ({}, {"answers": "good"}):
        table = rows_of({"context": row["context"], "question": row["question"], **answers})
        with pytest.raises(UserError, match="reviews has question and context, and no column answers") as error:
            find_spans(table, "reviews", None, None)
        assert "\n" not in str(error.value)
    boolean = rows_of({"context": row["context"], "question": row["question"], "label": 1})
    assert find_spans(boolean, "reviews", None, None) is None
    with pytest.raises(UserError, match="doc_stride: reviews is not a question answering dataset"):
        infer_task(boolean, "reviews", None, None, 4)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": ["good"], "answer_start": [17]}, "row 0 has the answer 'good' at character 17 .* has 17 characters"),
        ({"text": ["good"], "answer_start": [-1]}, "row 0 has the answer 'good' at character -1"),
        ({"text": ["good"], "answer_start": [12]}, "row 0 has the answer 'good' at character 12 .* reads ' goo' there"),
        ({"text": ["good", "film"], "answer_start": [13]}, "row 0 has .* a text and an answer_start for each"),
        ({"text": [None], "answer_start": [13]}, "row 0 has .* a text and an answer_start for each"),
        (None, "row 0 has None in column answers"),
    ],
)
def test_an_answer_that_is_not_where_it_should_be_is_named_by_split_and_row(answers, message):
    bad = {"context": "the film was good", "question": "film", "answers": answers}
    with pytest.raises(UserError, match=f"reviews test: {message}") as error:
        answers_of(rows_of(bad, {**bad, "answers": {"text": ["good"], "answer_start": [13]}}), TASK, "reviews test")
    assert "\n" not in str(error.value)


def test_a_stride_that_leaves_no_room_is_refused_with_what_is_allowed():
    rows = rows_of(*questions(2))
    for stride in (0, 19, 40):
        with pytest.raises(UserError, match=f"doc_stride: must be 1 to 18 with a max_length of 40, got {stride}"):
            encode_questions(rows, replace(TASK, stride=stride), tokenizer(True), 40)
    assert len(encode_questions(rows, replace(TASK, stride=18), tokenizer(True), 40)[0]) == 2


def test_a_tokenizer_that_knows_no_characters_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "film"]))
    slow = BertTokenizerLegacy(str(tmp_path / "vocab.txt"), model_max_length=64)
    with pytest.raises(UserError, match=r"tokenizer of .* is a slow one .*tokenizer.json"):
        encode_questions(rows_of(*questions(2)), TASK, slow, 40)


# What a model learns.


def test_a_tiny_model_learns_ten_questions_by_heart(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = asked(11, 3)
    write_rows(tmp_path / "set" / "train.jsonl", tuple(rows[0]), [tuple(row.values()) for row in rows])
    write_rows(tmp_path / "set" / "test.jsonl", tuple(rows[0]), [tuple(row.values()) for row in rows[:1]])
    place = ModelAndDataConfig(model=str(checkpoint(tmp_path / "bert")), dataset=str(tmp_path / "set"), max_length=40)
    problem = build_problem(
        place, open_task(place), steps=300, training=TrainingConfig(learning_rate=1e-2, batch_size=10)
    )
    assert len(problem.train) > 10  # the long context is cut
    judged = encode_questions(open_task(place).source.train_split, TASK, tokenizer(True), 40)
    state = train(problem.start_run(), problem, 300)
    found = evaluate_model(replace(problem, metric=judged[1]), state.model, judged[0], Cost())
    assert found["f1"] > 0.9
    assert found["exact_match"] > 0.8


def test_distillation_of_spans_is_finite_and_moves_the_student_towards_the_teacher(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = questions(12, clauses=2)
    write_rows(tmp_path / "set" / "train.jsonl", tuple(rows[0]), [tuple(row.values()) for row in rows])
    place = ModelAndDataConfig(model=str(checkpoint(tmp_path / "bert")), dataset=str(tmp_path / "set"), max_length=60)
    problem = build_problem(
        place, open_task(place), steps=60, training=TrainingConfig(learning_rate=1e-2, batch_size=5)
    )
    torch.manual_seed(3)
    teacher = AutoModelForQuestionAnswering.from_config(CONFIGS["bert"]())
    objective = distillation_objective(problem, teacher, DistillConfig(alpha=1.0, temperature=1.0))
    batch = problem.train.batch(range(len(problem.train)))
    before = objective(problem.pretrained.eval(), batch).total
    state = train(problem.start_run(), replace(problem, objective=objective), 60)
    after = objective(state.model.eval(), batch).total
    assert torch.isfinite(before)
    assert after < 0.5 * before
