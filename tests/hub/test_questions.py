"""Question answering from a checkpoint and SQuAD's columns to a folder that transformers alone reloads."""

import json
import subprocess
import sys

import pytest
import torch
import transformers

import sparsesoup as library
from sparsesoup.cli.main import main
from sparsesoup.cli.prune import parse_arguments
from sparsesoup.core.errors import UserError
from sparsesoup.core.masks import count_kept
from sparsesoup.core.ticket import Ticket
from sparsesoup.hub.build import ModelAndDataConfig, build_problem, open_task
from sparsesoup.hub.models.loading import load_model
from sparsesoup.hub.tasks.metrics import exact_match, f1
from sparsesoup.hub.tasks.question_answering import QuestionAnswering
from sparsesoup.hub.tasks.registry import SPANS
from sparsesoup.hub.tasks.splits import open_splits, open_test, training_splits
from tiny_hub import masks_of, offline, questions, run_of, tokenizer, write_rows

FAMILIES = ("bert", "distilbert", "roberta")
TOTAL = 2 * (4 * 16 * 16 + 2 * 16 * 32)


def drawn(place, out, family="bert", **more):
    settings = {"model": str(place / family), "dataset": str(place / "questions"), "sparsity": 0.7, "steps": 20} | more
    return library.prune(
        "magnitude", out=out, train={"batch_size": 8, "learning_rate": 0.003}, progress=False, **settings
    )


ALONE = """
import json, sys, torch, transformers
torch.set_num_threads(1)
answers = {}
for folder in json.loads(sys.argv[1]):
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    tool = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        said = model(**tool("film was", "the film was dull and the book was warm", return_tensors="pt"))
    answers[folder] = [said.start_logits.tolist(), said.end_logits.tolist(), type(model).__name__]
assert "sparsesoup" not in sys.modules
print(json.dumps(answers))
"""


def test_three_families_are_pruned_saved_and_reloaded_by_transformers_alone(place, tmp_path, monkeypatch):
    made, plain = [], Ticket.__init__

    def keep_weights(self, masks, weights, *rest, **more):
        plain(self, masks, weights, *rest, **more)
        made.append(self)

    monkeypatch.setattr(Ticket, "__init__", keep_weights)
    runs = {family: (drawn(place, tmp_path / family, family), made[-1]) for family in FAMILIES}
    folders = json.dumps([str(run.path / "model") for run, _ in runs.values()])
    answer = subprocess.run([sys.executable, "-c", ALONE, folders], capture_output=True, text=True,
                            env=offline() | {"PYTHONWARNINGS": "default"}, check=False)  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    reloaded = json.loads(answer.stdout)
    for family, (run, ticket) in runs.items():
        model = load_model(str(place / family), QuestionAnswering(), seed=0)
        model.load_state_dict(ticket.weights)
        with torch.no_grad():
            tool = tokenizer(family == "bert")
            own = model.eval()(**tool("film was", "the film was dull and the book was warm", return_tensors="pt"))
        start, end, kind = reloaded[str(run.path / "model")]
        assert torch.equal(torch.tensor(start), own.start_logits), family
        assert torch.equal(torch.tensor(end), own.end_logits), family
        assert kind.endswith("ForQuestionAnswering")
        weights = dict(model.named_parameters())
        masks = masks_of(run.path)
        assert count_kept(masks) == round(0.3 * TOTAL) == run.report["sparsity"]["kept"]
        assert all(torch.equal(weights[n] != 0, m) for n, m in masks.items()), family
        assert list(run.report["validation"]) == ["f1", "exact_match"]
        assert all(0 <= score <= 1 for score in run.report["validation"].values())
        config = json.loads((run.path / "model" / "config.json").read_text())
        assert config["id2label"] == {"0": "start", "1": "end"}


def slow_scores(folder, rows):
    """Mean f1 and exact match of a saved model on short contexts, by transformers and a search through all spans."""
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    tool = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        inputs = tool(row["question"], row["context"], return_tensors="pt", return_offsets_mapping=True)
        spots, owners = inputs.pop("offset_mapping")[0].tolist(), inputs.sequence_ids(0)
        with torch.no_grad():
            said = model(**inputs)
        start, end = said.start_logits[0], said.end_logits[0]
        inside = [i for i, owner in enumerate(owners) if owner == 1]
        spans = [(i, j) for i in inside for j in inside if i <= j < i + 30]
        i, j = max(spans, key=lambda ij: float(start[ij[0]] + end[ij[1]]))
        text, truths = row["context"][spots[i][0] : spots[j][1]], row["answers"]["text"]
        found.append([max(measure(text, truth) for truth in truths) for measure in (f1, exact_match)])
    return [sum(column) / len(column) for column in zip(*found, strict=True)]


def test_the_evaluate_on_test_is_that_of_the_saved_model_with_short_and_long_windows(place, tmp_path):
    expected = None
    for length in (None, 15):
        run = drawn(place, tmp_path / str(length), steps=60, max_length=length)
        scores = library.evaluate_on_test(run.path)
        if length is None:
            expected = slow_scores(run.path / "model", questions(12, 2))
            assert list(scores.values()) == pytest.approx(expected)
        assert list(scores) == ["f1", "exact_match"]
    assert run.report["train_rows"] > 40  # windows, of which a context has several now
    assert expected[0] > 0


def test_the_command_line_prunes_scores_and_shows_questions(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    line = ["prune", "magnitude", "--model", str(place / "bert"), "--dataset", "questions", "--data-root", str(place),
            "--sparsity", "0.7", "--steps", "10", "--max-length", "30", "--doc-stride", "5",
            "--out", str(tmp_path)]  # fmt: skip
    assert main(line) == 0
    assert "validation f1 0." in capsys.readouterr().out
    run = run_of(tmp_path)
    assert main(["test", str(run)]) == 0
    assert capsys.readouterr().out.startswith("test: f1 0.")
    assert main(["show", str(run)]) == 0
    out = capsys.readouterr().out
    assert " f1 on validation" in out
    assert "exact_match 0." in out
    page = (run / "report.html").read_text()
    assert "exact_match" in page
    settings = parse_arguments(["--config", str(run / "run.yaml")])[0]
    assert (settings.model_data.max_length, settings.model_data.doc_stride) == (30, 5)
    assert "--doc-stride 5" in settings.repeat_command()


def test_a_classifier_of_other_classes_becomes_a_model_for_questions(place, tmp_path):
    config = transformers.AutoConfig.from_pretrained(place / "bert", num_labels=7)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "seven")
    model = load_model(str(tmp_path / "seven"), QuestionAnswering(), seed=0)
    assert model.qa_outputs.out_features == 2


def test_rows_are_as_long_as_questions_need_or_the_model_takes(place, tmp_path):
    def width(**more):
        given = ModelAndDataConfig(model=str(tmp_path / "long"), dataset=str(place / "questions"), **more)
        return build_problem(given, open_task(given), steps=1).validation.batch([0])["answerable"].shape[1]

    for positions, most in ((200, 200), (500, SPANS.length)):
        config = transformers.BertConfig.from_pretrained(place / "bert", max_position_embeddings=positions)
        transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "long")
        tool = tokenizer(True)
        tool.model_max_length = 10**9
        tool.save_pretrained(tmp_path / "long")
        assert width() == most
    assert width(max_length=77) == 77


def nested(rows):
    """Rows as SQuAD publishes them."""
    paragraphs = [
        {"context": row["context"], "qas": [{"id": row["id"], "question": row["question"], "answers": [
            {"text": t, "answer_start": s} for t, s in zip(*row["answers"].values(), strict=True)]}]}
        for row in rows
    ]  # fmt: skip
    return {"version": "1.1", "data": [{"title": "All", "paragraphs": paragraphs}]}


def test_squads_own_files_are_the_same_rows(place, tmp_path):
    rows = questions(40, 1)
    rows[3]["answers"] = {"text": [], "answer_start": []}
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "train-v2.0.json").write_text(json.dumps(nested(rows), indent=2))
    (tmp_path / "raw" / "dev-v2.0.json").write_text(json.dumps(nested(questions(12, 2)), indent=2))
    source = open_splits(str(tmp_path / "raw"))
    assert set(source.splits) == {"train", "validation"}
    assert source.train_split.remove_columns("title").to_list() == rows
    task = open_task(ModelAndDataConfig(dataset=str(tmp_path / "raw"))).task
    assert task == QuestionAnswering(unanswerable=True)
    assert [len(part) for part in training_splits(source, task, 0)] == [36, 4]
    assert {name: len(part) for name, part in open_test(source, task).items()} == {"test": 12}


def test_a_file_of_json_that_is_no_squad_is_read_as_before(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps([{"text": '{"data": [{"paragraphs"', "label": 1}] * 3))
    assert open_splits(str(tmp_path)).train_split.column_names == ["text", "label"]
    (tmp_path / "train.json").write_text('{"data": [{"paragraphs": [{"context": "a"}]}]}')
    with pytest.raises(UserError, match=r"cannot read .*train\.json"):
        len(open_splits(str(tmp_path)).train_split)


def test_published_questions_without_answers_are_no_test_split(tmp_path):
    rows, empty = questions(20, 1), {"text": [], "answer_start": []}
    columns = tuple(rows[0])
    write_rows(tmp_path / "train.jsonl", columns, [tuple(row.values()) for row in rows])
    write_rows(tmp_path / "test.jsonl", columns, [tuple({**row, "answers": empty}.values()) for row in rows])
    source = open_splits(str(tmp_path))
    assert len(open_test(source, QuestionAnswering())["test"]) == 2  # carved out of the training split
    write_rows(tmp_path / "validation.jsonl", columns[:3], [tuple(row.values())[:3] for row in rows])
    with pytest.raises(UserError, match="validation has no column 'answers'"):
        open_test(open_splits(str(tmp_path)), QuestionAnswering())


@pytest.mark.parametrize("name", ["squad", "squad_v2", "rajpurkar/squad"])
def test_squad_is_looked_for_under_the_name_it_has_on_the_hub(name):
    whole = name if "/" in name else f"rajpurkar/{name}"
    with pytest.raises(UserError, match=rf"cannot open dataset '{name}'.*the Hub \({whole}, configuration default\)"):
        open_splits(name)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--doc-stride", "40"], ["--doc-stride: must be 1 to 18 with a max_length of 40, got 40"]),
        (["--doc-stride", "0"], ["--doc-stride: must be 1 to 18 ", "got 0"]),
        (
            ["--label-column", "id", "--text-columns", "question", "--doc-stride", "3"],
            ["--doc-stride: ", "got 3; leave it"],
        ),
    ],
)
def test_bad_settings_end_in_one_line(place, tmp_path, capsys, flags, parts):
    line = ["prune", "magnitude", "--model", str(place / "bert"), "--dataset", str(place / "questions"), "--steps", "4",
            "--max-length", "40", "--out", str(tmp_path / "runs"), *flags]  # fmt: skip
    assert main(line) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert all(part in said for part in parts), said
    assert not (tmp_path / "runs").exists()
