"""Trials of one place load it once, begin with the same bits, and see every change on disk."""

import contextlib
import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from sparsesoup.core.targets import weights_fingerprint
from sparsesoup.hub import model_data_cache
from sparsesoup.hub.build import ModelAndDataConfig
from sparsesoup.hub.model_data_cache import ModelDataCache
from sparsesoup.hub.tasks.splits import LoadedDataset
from sparsesoup.report.terminal import read_report
from sparsesoup.study.execute.jobs import JobRunner, TrialJob, TrialOptions
from sparsesoup.study.recipe.plan import read_plan
from tiny_hub import checkpoint, reviews, weights_equal
from tiny_studies import ISP, RECIPE, write_recipe

pytestmark = pytest.mark.usefixtures("inside")


@pytest.fixture
def loads(monkeypatch):
    """The place of each model that was loaded, and a reference to it."""
    found = []

    def load(place, *more):
        loaded = load_model_and_data(place, *more)
        found.append((place, weakref.ref(loaded.model)))
        return loaded

    load_model_and_data = model_data_cache.load_model_and_data
    monkeypatch.setattr(model_data_cache, "load_model_and_data", load)
    return found


def classifiers_in_memory():
    """How many classifiers are alive."""
    return sum(
        isinstance(each, PreTrainedModel) for each in gc.get_objects() if "Classification" in type(each).__name__
    )


@contextlib.contextmanager
def no_collections():
    """Let nothing collect cycles but what asks for it."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_jobs_of_one_place_load_it_once_and_leave_it_as_it_was(loads, tmp_path):
    methods = {"magnitude": None, "movement": None, "dense": None, "isp": ISP}
    write_recipe(RECIPE | {"methods": methods, "sparsities": 0.5, "seeds": 0})
    jobs = [
        TrialJob(t, Path("kept"), Path("kept/studies/s"), TrialOptions(threads=1))
        for t in read_plan(Path("small.yaml")).trials
    ]
    runner, held = JobRunner(), classifiers_in_memory()
    with no_collections():
        for job in jobs:
            runner(job)
            assert not job.failure_path.exists()
            assert classifiers_in_memory() - held == 1, "beside the model that is kept another one is held"
    ((_, model),) = loads
    before = weights_fingerprint(dict(model().named_parameters()))
    for job in jobs:
        JobRunner()(replace(job, out=Path("alone"), folder=Path("alone/studies/s")))
        assert weights_equal(tmp_path / "kept" / job.trial.path, tmp_path / "alone" / job.trial.path)
    assert len(loads) == 1 + len(jobs)
    assert {weights_fingerprint(dict(m().named_parameters())) for _, m in loads if m() is not None} == {before}


def test_a_run_is_scored_with_the_rows_and_the_fingerprint_that_it_was_trained_with(monkeypatch):
    opened, hashed = [], []

    def open_splits(*args, **more):
        opened.append(args)
        return known(*args, **more)

    def fingerprint(source):
        hashed.append(source)
        return plain(source)

    known, plain = model_data_cache.open_splits, LoadedDataset.train_fingerprint.func
    monkeypatch.setattr(model_data_cache, "open_splits", open_splits)
    monkeypatch.setattr(LoadedDataset.train_fingerprint, "func", fingerprint)
    write_recipe(RECIPE | {"methods": ["magnitude"], "seeds": 0, "steps": 2})
    runner = JobRunner()
    for trial in read_plan(Path("small.yaml")).trials:
        runner(job := TrialJob(trial, Path("kept"), Path("kept/studies/s"), TrialOptions(threads=1)))
        assert read_report(job.run)["test"]
    assert len(opened) == len(hashed) == 1


def places(**changes):
    return ModelAndDataConfig(model="mine", dataset="said", **changes)


def ask(cache, place):
    """Dataset, task and loaded place, as a run asks for them."""
    opened = cache.open_task(place)
    return opened.source, opened, cache.load_model_and_data(place, opened, "no"), cache.overview(place, opened)


def test_another_seed_takes_the_data_and_another_model_and_two_models_are_never_held(loads):
    checkpoint(Path("mine")), reviews(Path("said"))
    cache = ModelDataCache()
    source, opened, loaded, overview = ask(cache, places())
    assert all(
        one is other for one, other in zip(ask(cache, places()), (source, opened, loaded, overview), strict=True)
    )
    del loaded
    again = ask(cache, places(seed=1))
    assert again[0] is source
    assert again[1] is opened
    assert len(loads) == 2
    gc.collect()
    assert loads[0][1]() is None


def test_a_file_that_changes_is_read_again():
    checkpoint(Path("mine")), reviews(Path("said"))
    cache = ModelDataCache()
    source, opened, loaded, _ = ask(cache, places())
    checkpoint(Path("mine"), seed=3)
    other = ask(cache, places())
    assert other[0] is source
    assert other[2] is not loaded
    assert other[1].model_files != ""
    reviews(Path("said"), 60)
    last = ask(cache, places())
    assert last[0].train_fingerprint != source.train_fingerprint
    assert last[1] is not opened
    assert len(last[2].train) < len(loaded.train)
