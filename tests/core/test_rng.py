"""One seed, many streams."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from sparsesoup.core.rng import cpu_generator, derive_seed, devices_of, fork_rng_of, seed_everything

PATHS = st.lists(st.one_of(st.integers(), st.text(max_size=4)), max_size=4)


@given(st.integers(0, 99), PATHS, st.integers(0, 99), PATHS)
def test_a_number_is_a_function_of_seed_and_path_and_of_nothing_less(
    seed: int, path: list[object], other: int, way: list[object]
) -> None:
    assert (derive_seed(seed, *path) == derive_seed(other, *way)) == ((seed, path) == (other, way))
    assert 0 <= derive_seed(seed, *path) < 2**63


def test_a_path_is_no_string_of_its_parts() -> None:
    found = [
        derive_seed(0, "a", "b"),
        derive_seed(0, "ab"),
        derive_seed(0, "a", 1),
        derive_seed(0, "a1"),
        derive_seed(0, "a", "1"),
        derive_seed(0, ("a", 1)),
    ]
    assert len(set(found)) == len(found)


def test_the_numbers_are_pinned() -> None:
    """Another number would change the masks of every seed: a breaking change."""
    assert derive_seed(0, "order", 3) == 3339898520332188405
    assert torch.randperm(8, generator=cpu_generator(0, "order", 0)).tolist() == [0, 7, 4, 3, 5, 1, 2, 6]


def test_a_stream_disturbs_no_other() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = torch.rand(4, generator=cpu_generator(1, "x"))
    torch.rand(9, generator=cpu_generator(1, "y"))
    assert torch.rand(4, generator=cpu_generator(1, "x")).equal(first)
    assert torch.rand(2).equal(expected)


class Generators:
    """Stand-ins for the generators of four GPUs, which remember how they were seeded."""

    def __init__(self) -> None:
        self.seeds: dict[int, list[int]] = {}

    def __getitem__(self, index: int) -> "Generators":
        return Generators._One(self, index)  # type: ignore[return-value]

    class _One:
        def __init__(self, owner: "Generators", index: int) -> None:
            self.owner, self.index = owner, index

        def manual_seed(self, number: int) -> None:
            self.owner.seeds.setdefault(self.index, []).append(number)


def test_only_the_devices_in_use_are_seeded_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four GPUs the second one has tensors; the others are not touched."""
    generators, read, written = Generators(), [], []
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda number: pytest.fail("all GPUs were seeded"))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: read.append(device))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: written.append(device))
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = [torch.empty(2, device="cuda:1"), torch.empty(2, device="cuda:1"), torch.empty(2)]
    assert devices_of(tensors) == {torch.device("cuda", 1)}
    before = torch.get_rng_state()
    with fork_rng_of(tensors):
        seed_everything(5, devices_of(tensors))
    assert generators.seeds == {1: [5]}
    assert read == written == [torch.device("cuda", 1)]
    assert torch.get_rng_state().equal(before)


def test_a_seed_is_that_of_torch() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    seed_everything(11)
    assert torch.rand(3).equal(expected)
