"""What a loop of one's own has pruned, saved for every command that takes a pruned model."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from conftest import same
from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from sparsesoup.core.ticket import load_masks
from sparsesoup.loops.attach import attach
from tiny_bert import bert


def pruned(steps=12):
    problem = bert(steps=steps)
    model = problem.pretrained.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = attach(model, optimizer, "gradual", 0.6, steps=steps)
    for indices in problem.train.eval_batches(8) * 4:
        if pruner.step == steps:
            break
        model(**problem.train.batch(indices)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, pruner


def test_the_folder_loads_in_transformers_and_is_exported_and_timed(tmp_path, capsys):
    model, pruner = pruned()
    pruner.finish()
    folder = pruner.save(tmp_path / "mine")
    again = AutoModelForSequenceClassification.from_pretrained(folder)
    assert same(dict(again.state_dict()), dict(model.state_dict()))
    masks, facts = load_masks(folder / "pruning")
    assert same(masks, pruner.masks)
    assert facts["method"] == "gradual"
    assert main(["export", str(folder), "--to", "packed", "--out", str(tmp_path / "packed")]) == 0
    assert (tmp_path / "packed" / "config.json").is_file()
    assert main(["benchmark", str(folder), "--rounds", "3", "--batch", "2", "--length", "8"]) == 0
    capsys.readouterr()


def test_what_cannot_be_saved_is_said(tmp_path):
    _, pruner = pruned()
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there is there already"):
        pruner.save(tmp_path / "there")
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    other = attach(net, torch.optim.SGD(net.parameters(), lr=0.1), "magnitude", 0.5, steps=4)
    with pytest.raises(UserError, match=r"^Sequential is not a model of transformers; save its state_dict\(\)"):
        other.save(tmp_path / "net")
    assert not (tmp_path / "net").exists()
