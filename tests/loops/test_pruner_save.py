"""What a loop of one's own has pruned, saved for every command that takes a pruned model."""

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from conftest import Net, same
from sparsesoup import export, load_packed
from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from sparsesoup.core.ticket import load_masks
from sparsesoup.loops.attach import attach
from tiny_bert import bert
from tiny_loops import Loop

pytestmark = pytest.mark.filterwarnings("ignore:before the first weights are masked a weight can travel")


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
    short = ["--rounds", "3", "--batch", "2", "--length", "8", "--backends", "torch"]
    assert main(["benchmark", str(folder), *short]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("method", ["gradual", "isp", "movement"])
def test_a_module_of_ones_own_is_saved_and_exported_and_loaded_again(method, tmp_path, capsys):
    loop = Loop()
    pruner = loop.attach(method)
    loop.train()
    pruner.finish()
    folder = pruner.save(tmp_path / "mine")
    masks, _ = load_masks(folder / "pruning")
    assert same(masks, pruner.masks)
    for form in ("dense", "packed"):
        assert main(["export", str(folder), "--to", form, "--out", str(tmp_path / form)]) == 0
        assert "blocks.0" in (said := capsys.readouterr().out)
        assert "module" in said
    for load in (
        lambda net: load_model(net, tmp_path / "dense" / "model.safetensors"),
        lambda net: load_packed(tmp_path / "packed", net),
    ):
        load(again := Net())
        assert same(dict(again.state_dict()), dict(loop.model.state_dict()))
    with pytest.raises(UserError, match="does not fit this Linear"):
        load_packed(tmp_path / "packed", nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"call load_packed\(folder, module\)"):
        load_packed(tmp_path / "packed")
    for words in (["export", str(folder), "--to", "onnx", "--out", "graph"], ["benchmark", str(folder)]):
        assert main(words) == 2
        assert "a module that is none of transformers', whose class no file names" in capsys.readouterr().err


def test_a_module_that_was_trained_on_or_lost_is_refused(tmp_path):
    loop = Loop()
    pruner = loop.attach("gradual")
    loop.train()
    pruner.finish()
    folder = pruner.save(tmp_path / "mine")
    with torch.no_grad():
        loop.model.blocks[0].weight.add_(1.0)
    save_model(loop.model, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"weights of blocks\.0\.weight in .* are not zero though its masks prune"):
        export(folder, "packed", tmp_path / "packed")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model beside the masks .*; give the run directory, or the folder"):
        export(folder, "packed", tmp_path / "packed")


def test_what_cannot_be_saved_is_said(tmp_path):
    _, pruner = pruned()
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there is there already"):
        pruner.save(tmp_path / "there")
