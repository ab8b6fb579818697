"""The Trainer, a subclass with a loss of its own, and accelerate: pruned without a change of their loops."""

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from conftest import same
from sparsesoup import InstantSoup, Platon, PruningCallback, UserError, attach
from sparsesoup.core.masks import count_kept, count_total
from sparsesoup.methods import METHODS, Method
from tiny_objects import ROWS, STEPS, OwnLoss, classifier, trainer_of


def zeros_hold(model: nn.Module, masks: dict[str, Tensor]) -> bool:
    params = dict(model.named_parameters())
    return not any(bool(params[name][~mask].any()) for name, mask in masks.items())


@pytest.mark.parametrize("kind", [Trainer, OwnLoss])
def test_a_trainer_prunes_by_one_line(tmp_path: Path, kind: type[Trainer]) -> None:
    pruning = PruningCallback("gradual", sparsity=0.7)
    trainer = trainer_of(tmp_path, [pruning], kind)
    trainer.train()
    assert trainer.model is not None
    assert round(0.3 * count_total(pruning.masks)) == count_kept(pruning.masks)
    assert zeros_hold(trainer.model, pruning.masks)
    assert all("parametrizations" not in name for name in trainer.model.state_dict())


def test_look_aheads_do_not_change_what_the_loop_sees(tmp_path: Path) -> None:
    """At sparsity 0 isp's weak runs and platon's scores leave the Trainer's result as it is without a callback."""
    plain = trainer_of(tmp_path / "plain", [])
    plain.train()
    methods: list[Method] = [InstantSoup(stages=2, weak_masks=2, look_ahead=0.1), METHODS["gradual"]]
    for number, method in enumerate(methods):
        pruning = PruningCallback(method, sparsity=0.0)
        other = trainer_of(tmp_path / str(number), [pruning])
        other.train()
        assert pruning.pruner is not None
        assert pruning.pruner.cost.steps == (8 if number == 0 else 0)
        assert same(other.model.state_dict(), plain.model.state_dict())


@pytest.mark.parametrize("method", [Platon(every_steps=4, window=2), InstantSoup(stages=3, weak_masks=2)])
def test_a_resumed_training_ends_at_the_same_masks(tmp_path: Path, method: Method) -> None:
    whole = PruningCallback(method, sparsity=0.6)
    first = trainer_of(tmp_path / "out", [whole])
    first.train()
    for later in (16, STEPS):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{later}")
    again = PruningCallback(method, sparsity=0.6)
    second = trainer_of(tmp_path / "out", [again])
    second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))
    assert same(again.masks, whole.masks)
    assert same(second.model.state_dict(), first.model.state_dict())


def test_a_checkpoint_without_the_pruning_is_refused(tmp_path: Path) -> None:
    trainer_of(tmp_path, []).train()
    trainer = trainer_of(tmp_path, [PruningCallback("gradual")])
    with pytest.raises(UserError, match="is no checkpoint of a training with this callback"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_arguments_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 8, "save_strategy": "steps"}
    trainer = trainer_of(tmp_path, [PruningCallback("gradual")], **best)
    with pytest.raises(UserError, match="load_best_model_at_end and pruning do not go together"):
        trainer.train()


def test_a_training_that_stops_early_keeps_what_it_has_with_a_warning(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 9

    pruning = PruningCallback("gradual", sparsity=0.7)
    trainer = trainer_of(tmp_path, [pruning, Stop()])
    with pytest.warns(UserWarning, match=r"ended at step 9 of 20, at sparsity 0\.\d+ of 0.7"):
        trainer.train()
    assert 0 < 1 - count_kept(pruning.masks) / count_total(pruning.masks) < 0.7


def test_a_loop_of_accelerate_needs_nothing_special() -> None:
    accelerator, model = Accelerator(gradient_accumulation_steps=2, cpu=True), classifier()
    loader = torch.utils.data.DataLoader(ROWS, batch_size=4, collate_fn=_collate)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model, optimizer, prepared = accelerator.prepare(model, optimizer, loader)
    pruner = attach(
        model, optimizer, "isp", 0.6, steps=24, loss=lambda model, batch: model(**batch).loss, batches=prepared
    )
    order = []
    for _ in range(3):
        for batch in prepared:
            order.append(copy.deepcopy(batch["input_ids"]))
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
    assert pruner.step == 24
    masks = pruner.finish()
    assert count_kept(masks) == round(0.4 * count_total(masks))
    assert zeros_hold(model, masks)
    assert torch.equal(torch.cat(order[:16]), torch.cat([_collate([ROWS[i]])["input_ids"] for i in range(64)]))


def _collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def test_one_line_says_what_stands_in_the_way() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = classifier()
        optimizer = torch.optim.AdamW(model.parameters())
        with pytest.raises(UserError, match="goes back to an earlier step"):
            attach(model, optimizer, "imp-rewind", 0.5, steps=20)


@pytest.mark.parametrize(("given", "says"), [({"sparsity": 90}, "got 90"), ({"method": "grdual"}, "mean gradual")])
def test_a_wrong_callback_is_refused_when_it_is_made(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        PruningCallback(**given)


class Break(TrainerCallback):
    armed = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 10 and self.armed:
            self.armed = False
            raise KeyboardInterrupt


def test_a_training_that_was_broken_off_is_pruned_once_when_it_goes_on(tmp_path: Path) -> None:
    whole = PruningCallback("gradual", sparsity=0.7)
    trainer_of(tmp_path / "whole", [whole]).train()
    pruning = PruningCallback("gradual", sparsity=0.7)
    trainer = trainer_of(tmp_path / "broken", [pruning, Break()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert same(pruning.masks, whole.masks)
    assert not trainer.model._forward_pre_hooks


def test_two_callbacks_on_one_trainer_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, [PruningCallback("gradual", sparsity=0.7)])
    trainer.add_callback(PruningCallback("magnitude", sparsity=0.5))
    with pytest.raises(UserError, match=r"another pruner .gradual. has hooks"):
        trainer.train()
