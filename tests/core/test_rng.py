"""One seed, many streams."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsesoup.core.rng import cpu_generator, derive_seed

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
