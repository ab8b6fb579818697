"""The zeros of a pruned model stay while something else trains it: any loop, any optimizer, the Trainer."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from conftest import same
from sparsesoup import SparsityCallback, hold_zeros
from sparsesoup.core.masks import apply_masks_
from sparsesoup.core.ticket import load_masks, save_masks
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.training.zero_hooks import zeros_of
from tiny_hub import CONFIGS, sentences, tokenizer, weights_of

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1),
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "rmsprop with momentum": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))


def half(model):
    torch.manual_seed(1)
    return {n: torch.rand_like(p) > 0.5 for n, p in model.named_parameters() if p.dim() == 2}


def steps(model, optimizer, count, clip=1.0):
    """Train on noise; the gradient norms before clipping."""
    torch.manual_seed(2)
    norms = []
    for _ in range(count):
        optimizer.zero_grad()
        x = torch.randn(8, 6)
        nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
    return norms


def revived(model, masks):
    params = dict(model.named_parameters())
    return sum(int(params[name][~mask].count_nonzero()) for name, mask in masks.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_in_a_bare_loop_though_the_optimizer_remembers_the_dense_model(name):
    model = net()
    masks, optimizer = half(model), OPTIMIZERS[name](model.parameters())
    steps(model, optimizer, 5)  # moments of the dense model, which would move a pruned weight
    stop = hold_zeros(model, optimizer, masks)
    assert revived(model, masks) == 0  # from the moment it is asked for
    steps(model, optimizer, 10)
    assert revived(model, masks) == 0
    kept = sum(int(p.count_nonzero()) for p in model.parameters() if p.dim() == 2)
    assert kept == sum(int(m.sum()) for m in masks.values())
    stop()
    steps(model, optimizer, 1)
    assert revived(model, masks) > 0  # so the assertions above can fail


def test_gradients_of_pruned_weights_do_not_count_in_the_norm():
    model = net()
    masks = half(model)
    apply_masks_(dict(model.named_parameters()), masks)
    held, free = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.SGD(held.parameters(), lr=0.1)
    hold_zeros(held, optimizer, masks)
    (norm,) = steps(held, optimizer, 1)
    (dense,) = steps(free, torch.optim.SGD(free.parameters(), lr=0.0), 1, clip=1e9)
    grads = {n: p.grad * masks[n] if n in masks else p.grad for n, p in free.named_parameters()}
    assert norm == pytest.approx(float(torch.cat([g.flatten() for g in grads.values()]).norm()))
    assert norm < 0.95 * dense


def test_accumulated_gradients_of_pruned_weights_are_zero_too():
    model = net()
    masks = half(model)
    hold_zeros(model, torch.optim.SGD(model.parameters(), lr=0.1), masks)
    for _ in range(2):
        model(torch.randn(4, 6)).square().sum().backward()
    assert all(not p.grad[~masks[n]].any() and p.grad.any() for n, p in model.named_parameters() if n in masks)


def test_after_stop_the_model_can_be_copied_and_pickled_with_its_zeros():
    model = net()
    masks, optimizer = half(model), torch.optim.AdamW(model.parameters())
    stop = hold_zeros(model, optimizer, masks)
    steps(model, optimizer, 2)
    stop()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(other.state_dict(), model.state_dict())
    assert same(zeros_of(model, masks), masks)


def test_masks_of_another_model_are_refused_by_name():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"the model has no parameter 7\.weight to hold at zero"):
        hold_zeros(model, optimizer, {"7.weight": torch.ones(2, 2) > 0})
    with pytest.raises(ValueError, match=r"0\.weight has shape \(10, 6\), its mask \(2, 2\)"):
        hold_zeros(model, optimizer, {"0.weight": torch.zeros(2, 2) > 0})
    assert same(model.state_dict(), before)


def pruned_bert():
    """A tiny BERT at exactly 70 % sparsity, and its masks."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(CONFIGS["bert"]())
    targets = find_prunable(model)
    masks = {}
    for name, target in targets.items():
        order = torch.randperm(target.shape[0] * target.shape[1]).reshape(target.shape)
        masks[name] = order >= round(0.7 * order.numel())
    apply_masks_(dict(model.named_parameters()), masks)
    return model, masks


class Rows(torch.utils.data.Dataset):
    def __init__(self, count, seed):
        tool = tokenizer(pairs=True)
        texts, self.labels = zip(*sentences(count, seed), strict=True)
        self.table = tool(list(texts), padding="max_length", max_length=24, truncation=True)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {**{k: v[i] for k, v in self.table.items()}, "labels": self.labels[i]}


def trainer_of(folder, model, callbacks):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=0.01, weight_decay=0.1, max_grad_norm=0.5, save_steps=2, eval_steps=2, eval_strategy="steps",
        save_strategy="steps", load_best_model_at_end=True, metric_for_best_model="eval_loss", report_to="none",
        disable_tqdm=True, use_cpu=True, seed=0, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Rows(48, 1), eval_dataset=Rows(12, 2), callbacks=callbacks)


def nonzero(weights, masks):
    return {name: weights[name] != 0 for name in masks}


def test_the_trainer_keeps_the_zeros_to_the_end_in_every_checkpoint_and_after_resuming(tmp_path):
    model, masks = pruned_bert()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    save_masks(tmp_path / "ticket", masks, {"method": "random"})
    trainer = trainer_of(tmp_path / "out", model, [SparsityCallback(tmp_path / "ticket")])
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    assert same(nonzero(dict(model.named_parameters()), masks), masks)
    moved = [n for n, p in model.named_parameters() if n in masks and not torch.equal(p, start[n])]
    assert len(moved) == len(masks)  # it was trained
    checkpoints = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert [folder.name for folder in checkpoints] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for folder in checkpoints:
        assert same(nonzero(weights_of(folder), masks), masks), folder
        beside, facts = load_masks(folder)
        assert same(beside, masks)
        assert facts["method"] == "random"
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(other.state_dict(), model.state_dict())
    batch = {k: torch.tensor(v)[None] for k, v in Rows(1, 3)[0].items() if k != "labels"}
    model(**batch).logits.sum().backward()  # the callback has let go: gradients are whole again
    assert all(bool(p.grad[~masks[n]].any()) for n, p in model.named_parameters() if n in masks)

    whole = weights_of(tmp_path / "out" / "checkpoint-6")
    again, _ = pruned_bert()
    resumed = trainer_of(tmp_path / "out", again, [SparsityCallback(tmp_path / "out" / "checkpoint-2")])
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    resumed_weights = weights_of(tmp_path / "out" / "checkpoint-6")
    assert same(nonzero(resumed_weights, masks), masks)
    assert same(resumed_weights, whole)


def test_without_the_callback_the_trainer_revives_what_was_pruned(tmp_path):
    model, masks = pruned_bert()
    trainer_of(tmp_path, model, []).train()
    found = nonzero(dict(model.named_parameters()), masks)
    assert sum(int(m.sum()) for m in found.values()) > 2 * sum(int(m.sum()) for m in masks.values())


def test_the_callback_takes_masks_of_the_bare_base_model_too(tmp_path):
    model, masks = pruned_bert()
    bare = {name.removeprefix("bert."): mask for name, mask in masks.items()}
    trainer_of(tmp_path, model, [SparsityCallback(bare)]).train()
    assert same(nonzero(dict(model.named_parameters()), masks), masks)
