"""One real run: Instant Soup Pruning of the embedded MiniLM on sentences of the embedded data set."""

import json
import subprocess
import sys

import pytest
import torch

import sparsesoup
from sparsesoup.hub.data.embedded import embedded_dataset
from tiny_hub import log_of, masks_of, offline, weights_of, write_rows

pytestmark = pytest.mark.integration

PRUNABLE = 6 * (4 * 384 * 384 + 2 * 384 * 1536)
RELOAD = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
torch.set_num_threads(1)
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
batch = AutoTokenizer.from_pretrained(sys.argv[1])(["Return the thing of a graph.", "Plot y versus x."],
                                                   padding=True, return_tensors="pt")
assert "sparsesoup" not in sys.modules
with torch.no_grad():
    print(json.dumps([model(**batch).logits.tolist(), list(model.config.id2label.values())]))
"""


def test_minilm_is_pruned_by_a_soup_to_exactly_nine_tenths_and_reloads(tmp_path):
    names = embedded_dataset()["train"].features["label"].names
    for split, count in (("train", 300), ("test", 40)):
        rows = embedded_dataset()[split].shuffle(seed=0).select(range(count))
        table = [(text, names[label]) for text, label in zip(rows["text"][:], rows["label"][:], strict=True)]
        write_rows(tmp_path / "sentences" / f"{split}.csv", ("text", "label"), table)
    own = {"stages": 2, "weak_masks": 2, "look_ahead": 0.08}
    run = sparsesoup.prune(
        "isp", dataset=str(tmp_path / "sentences"), sparsity=0.9, steps=12, max_length=48, method=own,
        train={"batch_size": 8}, out=tmp_path / "runs", progress=False,
    )  # fmt: skip

    kept = round((1 - 0.9) * PRUNABLE)
    assert (run.report["sparsity"]["kept"], run.report["sparsity"]["total"]) == (kept, PRUNABLE)
    cost = run.report["cost"]
    assert (cost["main"]["steps"], cost["weak"]["steps"]) == (8, 4)  # weak steps are charged to T
    assert len(log_of(run.path)) == 12
    stages = run.report["notes"]["stages"]
    assert [stage["weak_masks"] for stage in stages] == [2, 2]
    assert all(0 < stage["same"] < 1 and 0 <= stage["changed"] < 1 for stage in stages)
    weights, masks = weights_of(run.path / "model"), masks_of(run.path)
    assert len(masks) == 36
    assert all(torch.equal(weights[name] != 0, mask) for name, mask in masks.items())
    assert (run.path / "model" / "pruning" / "masks.safetensors").stat().st_size < PRUNABLE / 8 + 10_000
    page = (run.path / "report.html").read_text()
    assert "minilm" in page
    assert "<svg" in page or "data:image" in page
    assert set(sparsesoup.evaluate_on_test(run.path)) == {"accuracy", "macro_f1"}

    line = [sys.executable, "-c", RELOAD, str(run.path / "model")]
    answer = subprocess.run(line, capture_output=True, text=True, check=False,
                            env=offline() | {"PYTHONWARNINGS": "default"})  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    logits, classes = json.loads(answer.stdout)
    assert classes == sorted(names)
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    own_model = AutoModelForSequenceClassification.from_pretrained(run.path / "model").eval()
    own_model.load_state_dict(weights)
    batch = AutoTokenizer.from_pretrained(run.path / "model")(
        ["Return the thing of a graph.", "Plot y versus x."], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.equal(torch.tensor(logits), own_model(**batch).logits)
