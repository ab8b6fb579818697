"""Launches of several ranks are refused in one line, before anything is read or written."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from conftest import Net, tiny
from processes import run_command
from sparsesoup import attach, compare, prune, prune_model, prune_once
from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from sparsesoup.core.single_process import WORLD_SIZES

LINE = "pruning runs in one process, this is one of 2"


@pytest.fixture(params=WORLD_SIZES)
def two_ranks(request, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(request.param, "2")
    monkeypatch.chdir(tmp_path)


def calls() -> dict[str, Callable[[], Any]]:
    net = Net()
    return {
        "attach": lambda: attach(net, torch.optim.SGD(net.parameters(), lr=0.1), steps=10),
        "prune by names": lambda: prune("gradual", model="nowhere", dataset="nowhere"),
        "prune a model": lambda: prune("gradual", model=net, train_dataset=tiny().train.rows),
        "prune_model": lambda: prune_model("gradual", net, tiny().train.rows),
        "prune_once": lambda: prune_once(net, method="magnitude"),
        "compare": lambda: compare({"methods": ["gradual"], "models": "nowhere", "datasets": ["nowhere"]}),
    }


@pytest.mark.parametrize("name", calls())
def test_python_refuses_several_ranks(two_ranks, name, tmp_path):
    with pytest.raises(UserError, match=LINE):
        calls()[name]()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("words", [["prune", "gradual"], ["compare", "--config", "none.yaml"], ["test", "none"]])
def test_the_command_line_refuses_several_ranks(two_ranks, words, capsys, tmp_path):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert LINE in error
    assert error.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


def test_help_needs_no_single_rank(two_ranks, capsys):
    assert main(["--help"]) == 0


def test_a_trainer_of_several_ranks_is_refused(monkeypatch, tmp_path):
    net = Net()
    args = TrainingArguments(str(tmp_path / "trainer"), use_cpu=True, report_to="none")
    trainer = Trainer(net, args, train_dataset=tiny().train.rows)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=LINE):
        prune("gradual", trainer=trainer)


def test_one_rank_of_torchrun_and_words_that_are_no_number_are_no_launch_of_several(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("PMI_SIZE", "")
    assert sum(int(m.sum()) for m in prune_once(Net(), method="magnitude", sparsity=0.5).values()) > 0


def test_a_process_group_of_several_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(UserError, match=r"one of 4 \(torch.distributed\)"):
        prune_once(Net(), method="magnitude")


def test_the_command_itself_exits_with_2(place, tmp_path):
    words = ["prune", "magnitude", "--model", str(place / "bert"), "--dataset", str(place / "reviews")]
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "1"}
    done = run_command(words, "from sparsesoup.cli.main import main", tmp_path, environment)
    assert done.returncode == 2
    assert LINE in done.stderr
    assert not (tmp_path / "runs").exists()
