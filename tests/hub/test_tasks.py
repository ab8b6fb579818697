"""What is asked of a text is told from names and columns, and answers are judged as GLUE judges them."""

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

from sparsesoup.core.errors import UserError
from sparsesoup.hub.tasks.columns import find_task
from sparsesoup.hub.tasks.labels import TextTask, label_values
from sparsesoup.hub.tasks.metrics import GLUE, METRICS, glue_task, task_metric

STRING, FLOAT, INT = Value("string"), Value("float32"), Value("int64")


def rows_of(**columns):
    """Two rows with columns of these types."""
    values = {"string": ["a", "b"], "float32": [0.5, 2.0], "int64": [0, 2]}
    content = {name: [0, 1] if isinstance(kind, ClassLabel) else values[kind.dtype] for name, kind in columns.items()}
    return Dataset.from_dict(content, features=Features(columns))


@pytest.mark.parametrize("name", GLUE)
def test_every_glue_task_is_known_with_its_columns_and_metrics(name):
    texts = dict.fromkeys(GLUE[name][0], STRING)
    label = FLOAT if name == "stsb" else ClassLabel(names=["a", "b"])
    task = find_task(rows_of(idx=INT, extra=STRING, **texts, label=label), f"glue/{name}")
    assert task == TextTask(GLUE[name][0], "label", () if name == "stsb" else ("a", "b"), GLUE[name][1])
    assert set(task.metrics) <= set(METRICS)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("glue/qnli_dev_split", "qnli"),
        ("nyu-mll/glue:rte", "rte"),
        ("/somewhere/glue/cola", "cola"),
        ("superglue/rte", None),
        ("glue/colander", None),
        ("sst2", None),
    ],
)
def test_a_glue_task_is_told_from_the_end_of_the_name(name, task):
    assert glue_task(name) == task


def test_columns_are_told_from_their_types_and_names():
    named = ClassLabel(names=["no", "yes"])
    assert find_task(rows_of(text=STRING, label=named), "x").texts == ("text",)
    pair = find_task(rows_of(guid=STRING, second=STRING, first=STRING, sentiment=INT), "x")
    assert pair == TextTask(("second", "first"), "sentiment", ("0", "1", "2"), ("accuracy", "macro_f1"))
    assert find_task(rows_of(text=STRING, score=FLOAT), "x").metrics == ("pearson", "spearman")
    assert find_task(rows_of(text=STRING, category=STRING), "x").labels == ("a", "b")


def test_a_column_that_spells_the_label_out_is_not_taken_for_a_text():
    assert find_task(rows_of(text=STRING, label=INT, label_text=STRING), "x").texts == ("text",)


@pytest.mark.parametrize(
    "columns",
    [
        {"text": STRING, "outcome": INT},
        {"text": STRING, "label": INT, "target": INT},
        {"text": INT, "label": INT},
        {"a": STRING, "b": STRING, "c": STRING, "label": INT},
    ],
)
def test_columns_with_no_or_several_readings_are_listed_with_the_setting_that_settles_it(columns):
    with pytest.raises(UserError) as error:
        find_task(rows_of(**columns), "reviews")
    message = str(error.value)
    assert "\n" not in message
    assert all(f"{name} ({kind.dtype})" in message for name, kind in columns.items())
    assert error.value.field in ("text_columns", "label_column")


def test_columns_named_by_the_user_overrule_the_guess_and_have_to_exist():
    rows = rows_of(a=STRING, b=STRING, c=STRING, label=INT, outcome=INT)
    assert find_task(rows, "x", texts=["c"], label="outcome").texts == ("c",)
    with pytest.raises(UserError, match="no column 'd'"):
        find_task(rows, "x", texts=["d"])
    with pytest.raises(UserError, match="one or two"):
        find_task(rows, "x", texts=["a", "b", "c"], label="label")
    with pytest.raises(UserError, match="another one for the label"):
        find_task(rows, "x", texts=["label"], label="label")


@pytest.mark.parametrize("value", [-1, 3, None])
def test_a_class_out_of_range_is_named_with_split_row_and_range(value):
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, value]})
    with pytest.raises(UserError, match=rf"reviews test: row 1 has the label {value} .*0 to 1"):
        label_values(rows, TextTask(("text",), "label", ("no", "yes"), ()), "reviews test")


def test_a_number_that_is_none_or_not_finite_is_refused():
    for value in (None, float("nan"), float("inf")):
        rows = Dataset.from_dict({"text": ["a", "b"], "label": [0.5, value]})
        with pytest.raises(UserError, match=r"row 1 .* a finite number"):
            label_values(rows, TextTask(("text",), "label", (), ()), "train")


def test_numbers_are_the_classes_of_these_names_where_training_wrote_words():
    train = Dataset.from_dict({"text": ["a", "b", "c"], "label": ["1", "2", "other"]})
    task = find_task(train, "reviews")
    test = Dataset.from_dict({"text": ["a", "b"], "label": [1, 2]})  # a csv in which nothing is other
    assert label_values(test, task, "test") == label_values(train.select([0, 1]), task, "train") == [0, 1]
    with pytest.raises(UserError, match="row 0 has the label '3'"):
        label_values(Dataset.from_dict({"text": ["a"], "label": [3]}), task, "test")


@pytest.mark.parametrize(
    ("train", "names", "truth"),
    [(["a", "b", "c"], ["a", "c"], [0, 2]), (["a", "b"], ["b", "a"], [1, 0]), (["0", "1", "2"], ["0", "2"], [0, 2]),
     (["0", "1"], ["no", "yes"], [0, 1])],
)  # fmt: skip
def test_classes_are_known_by_name_where_a_split_numbers_them_in_its_own_way(train, names, truth):
    rows = Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]})
    test = rows.cast_column("label", ClassLabel(names=names))
    assert label_values(test, TextTask(("text",), "label", tuple(train), ()), "test") == truth


def test_a_class_that_training_does_not_know_is_named():
    rows = Dataset.from_dict({"text": ["x", "y", "z"], "label": [0, 1, -1]})
    test = rows.cast_column("label", ClassLabel(names=["b", "new"]))
    task = TextTask(("text",), "label", ("a", "b"), ())
    with pytest.raises(UserError, match=r"row 1 has the label 'new' .* one of the training split's classes \(a, b\)"):
        label_values(test, task, "test")
    with pytest.raises(UserError, match="row 1 has the label -1"):
        label_values(test.select([0, 2]), task, "test")


@pytest.mark.parametrize("values", [[-2, -1, -2], [-2, 0, 0]])
def test_numbers_below_zero_are_no_classes(values):
    with pytest.raises(UserError, match=r"2 different numbers from -2 to (-1|0), where classes 0, 1, 2"):
        find_task(Dataset.from_dict({"text": ["a", "b", "c"], "label": values}), "x")


def test_whole_numbers_with_a_point_are_classes_where_training_has_classes():
    task = TextTask(("text",), "label", ("0", "1"), ())
    assert label_values(Dataset.from_dict({"text": ["a", "b"], "label": [1.0, 0.0]}), task, "test") == [1, 0]
    with pytest.raises(UserError, match=r"row 1 has the label 0\.5"):
        label_values(Dataset.from_dict({"text": ["a", "b"], "label": [1.0, 0.5]}), task, "test")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["0.5", "1.5", "NA"], "row 2 has 'NA' .*2 of 3 rows have a number"),
        (["a", "a"], "every row"),
        ([0, 0], "every row has the label 0"),
        ([[0, 1], [1]], "several labels at once"),
        ([["a"], []], "several labels at once"),
    ],
)
def test_labels_that_are_no_classes_are_refused(values, said):
    with pytest.raises(UserError, match=f"x: .*{said}"):
        find_task(Dataset.from_dict({"text": ["t"] * len(values), "label": values}), "x")


def test_a_word_that_says_missing_is_a_class_among_words():
    assert find_task(Dataset.from_dict({"text": ["t"] * 3, "label": ["yes", "no", "na"]}), "x").labels[0] == "na"


def test_metrics_agree_with_hand_arithmetic():
    task = TextTask(("t",), "label", ("a", "b"), ("accuracy", "matthews", "f1", "macro_f1"))
    answers, truth = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1])
    found = task_metric(task)(torch.nn.functional.one_hot(answers, 2).float(), truth)
    # True positives 2, false positives 1, true negatives 1, false negatives 0.
    assert found == pytest.approx(
        {"accuracy": 3 / 4, "matthews": 2 / 12**0.5, "f1": 4 / 5, "macro_f1": (4 / 5 + 2 / 3) / 2}
    )
    numbers = task_metric(TextTask(("t",), "label", (), ("pearson", "spearman")))
    found = numbers(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0.0, 1.0, 2.0]))
    assert found == pytest.approx({"pearson": 3 / (2 * 14 / 3) ** 0.5, "spearman": 1.0})


def test_constant_answers_are_worth_nothing_and_warn_of_nothing():
    judge = task_metric(TextTask(("t",), "label", ("a", "b"), ("accuracy", "matthews", "f1", "macro_f1")))
    assert judge(torch.tensor([[1.0, 0.0]] * 4), torch.tensor([0, 1, 1, 1]))["matthews"] == 0.0
    assert judge(torch.tensor([[1.0, 0.0]] * 4), torch.zeros(4, dtype=torch.int64))["accuracy"] == 1.0
    numbers = task_metric(TextTask(("t",), "label", (), ("pearson", "spearman")))
    for outputs in (torch.ones(3), torch.tensor([1.0, 1.0, 1.0 + 1e-6])):
        assert abs(numbers(outputs, torch.tensor([0.0, 1.0, 2.0]))["pearson"]) <= 1
    assert numbers(torch.ones(3), torch.tensor([0.0, 1.0, 2.0])) == {"pearson": 0.0, "spearman": 0.0}
    assert numbers(torch.ones(1), torch.ones(1)) == {"pearson": 0.0, "spearman": 0.0}


def test_outputs_that_are_not_finite_end_in_one_line():
    with pytest.raises(UserError, match="1 of 4 outputs"):
        task_metric(TextTask(("t",), "label", ("a", "b"), ("accuracy",)))(
            torch.tensor([[0, 1], [0, torch.nan]]), torch.zeros(2)
        )
