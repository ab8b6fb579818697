"""Batches prepared ahead are those of one thread, in order; a stop in between leaves nothing behind."""

import threading
import time
from dataclasses import replace

import pytest
import torch

from sparsesoup.core.errors import UserError
from sparsesoup.runs.config import config_from_dict
from sparsesoup.study.recipe.trial import Trial
from sparsesoup.training.batching import RowBatches
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.loop import train
from sparsesoup.training.prefetch import StepBatches, prepare_batches

CPU = torch.device("cpu")


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prepare")]


def slow(item):
    """The first ones take longest, so that later ones are ready before them."""
    time.sleep(0.02 / (1 + item))
    return {"labels": torch.tensor([item])}


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_batches_come_in_order_and_only_so_many_ahead(workers):
    asked = []

    def items():
        for item in range(20):
            asked.append(item)
            yield item

    batches = prepare_batches(slow, items(), workers, CPU)
    for item in range(20):
        assert int(next(batches)["labels"]) == item
        assert len(asked) <= item + 1 + 2 * workers
    assert next(batches, None) is None
    assert not threads()


def test_an_error_comes_at_its_batch_and_ends_the_threads():
    def prepare(item):
        if item == 3:
            raise UserError("row 3 cannot be read")
        return slow(item)

    batches = prepare_batches(prepare, range(9), 2, CPU)
    assert [int(next(batches)["labels"]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match=r"^row 3 cannot be read$"):
        next(batches)
    assert not threads()


def rows(count=24):
    """Rows that are seen otherwise in every step."""

    def vary(chosen, look):
        noise = torch.rand(len(chosen), 3, generator=torch.Generator().manual_seed(look % 2**31))
        return {"x": noise + torch.tensor(chosen)[:, None], "labels": torch.tensor(chosen)}

    return RowBatches(list(range(count)), lambda chosen: vary(chosen, 0), tuple(range(1, count + 1)), vary)


def settings(size, workers):
    return TrainingConfig(batch_size=size, dataloader_num_workers=workers)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("size", [2, 3, 6])
def test_a_step_has_the_rows_that_it_has_without_workers_from_any_step_on(workers, size):
    data = rows()
    for first in (0, 5):
        order = list(zip(range(9), data.train_batches(6, first, 7, "name"), strict=False))
        ahead, plain = (
            StepBatches(data, [i for _, i in order], first, (7, "look", "name"), settings(size, w), CPU)
            for w in (workers, 0)
        )
        for step, (one, other) in enumerate(zip(ahead.steps, plain.steps, strict=True), first):
            assert one == other
            mine, theirs = ahead.view_of(step, one), plain.view_of(step, other)
            assert mine.count_tokens(one) == theirs.count_tokens(other)
            for part in (one[i : i + size] for i in range(0, len(one), size)):
                for name, value in theirs.batch(part).items():
                    assert torch.equal(mine.batch(part)[name], value)
            if step == first + 6:
                break
        ahead.close()
        assert not threads()


def test_a_training_with_workers_ends_at_the_same_bits_and_goes_on_from_any_step(problem):
    def weights(workers, *parts):
        own = problem()
        own = replace(own, training=replace(own.training, dataloader_num_workers=workers))
        state = own.start_run()
        for steps in parts:
            train(state, own, steps)
        assert not threads()
        return torch.cat([p.detach().flatten() for p in state.model.parameters()]), own.validate(state.model)

    plain, scores = weights(0, 12)
    for workers, *parts in ((1, 12), (2, 12), (2, 5, 7), (3, 1, 4, 7)):
        found, again = weights(workers, *parts)
        assert torch.equal(found, plain)
        assert again == scores


def test_the_number_of_workers_is_no_part_of_what_a_run_is():
    one, other = (config_from_dict("imp", {"train": {"dataloader_num_workers": n}}) for n in (0, 4))
    assert one.run_key() == other.run_key()
    keys = {Trial("imp", 0.5, settings, path=None).trial_key for settings in (one, other)}
    assert len(keys) == 1
    assert "--train.dataloader-num-workers 4" in other.repeat_command()


@pytest.mark.parametrize("number", [-1, 1000])
def test_a_number_of_workers_that_is_none_is_refused(number):
    with pytest.raises(UserError, match=f"must be at least 0 and at most 256, got {number}"):
        TrainingConfig(dataloader_num_workers=number)
