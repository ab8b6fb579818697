"""Packed weights come back to the bit, and what was changed on the way is refused by its name."""

import contextlib
import json
import re
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conftest import same
from sparsesoup.core.errors import UserError
from sparsesoup.core.rng import cpu_generator
from sparsesoup.exports import bitmask_codec as codec

pytestmark = pytest.mark.integration

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def weights(shape: tuple[int, ...], sparsity: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    draw = cpu_generator(seed, "weights")
    dense = torch.randn(shape, generator=draw)
    return dense.to(dtype).masked_fill(torch.rand(shape, generator=draw) < sparsity, 0.0)


def written(folder: Path, table: dict[str, torch.Tensor], zstd: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    codec.write_packed(
        folder / codec.FILE, [(name, *codec.encode_tensor(name, t, None, zstd)) for name, t in table.items()]
    )
    return folder


@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=3).map(tuple), sparsity=st.sampled_from([0, 0.3, 0.9, 1]),
    dtype=st.sampled_from(FLOATS), zstd=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_unpacking_gives_back_every_bit_whatever_the_shape_type_and_sparsity(shape, sparsity, dtype, zstd, seed):
    before = weights(shape, sparsity, dtype, seed)
    entry, parts = codec.encode_tensor("w", before, None, zstd)
    after = codec.decode_tensor("w", entry, {name.partition("|")[2]: t for name, t in parts.items()})
    assert same({"w": before}, {"w": after})


def test_zeros_of_both_signs_are_zeros(tmp_path):
    matrix = -torch.ones(40, 50) * (torch.rand(40, 50, generator=cpu_generator(0, "kept")) < 0.1)
    assert int(torch.signbit(matrix).sum()) == matrix.numel()
    entry, parts = codec.encode_tensor("w", matrix)
    assert sum(t.nbytes for t in parts.values()) < 0.15 * matrix.nbytes
    assert codec.decode_tensor("w", entry, {name.partition("|")[2]: t for name, t in parts.items()}).equal(matrix)


def test_not_a_number_and_infinity_and_the_smallest_number_and_integers_keep_their_bits(tmp_path):
    strange = torch.zeros(64)
    strange[3], strange[4], strange[5] = 1e-45, float("nan"), float("-inf")
    table = {"strange": strange, "counts": torch.tensor([0, 0, 7, 0] * 9), "yes": torch.tensor([True] + [False] * 99),
             "turned": weights((30, 20), 0.9).T, "part": weights((30, 20), 0.9)[::2, 1:]}  # fmt: skip
    folder = written(tmp_path, table)
    assert same(table, dict(codec.read_packed(folder)))
    assert {key.rpartition("|")[2] for key in load_file(folder / codec.FILE)} == {"bits", "values"}


@pytest.mark.parametrize(("dtype", "bound"), [(None, 0.14), (torch.bfloat16, 0.085)])
def test_matrices_at_ninety_percent_take_the_promised_share_of_their_float32_size(dtype, bound):
    matrix = torch.zeros(1000 * 1000)
    matrix[torch.randperm(10**6, generator=cpu_generator(0, "kept"))[:100_000]] = 0.5
    _, parts = codec.encode_tensor("w", matrix.view(1000, 1000), dtype)
    assert sum(t.nbytes for t in parts.values()) / matrix.nbytes <= bound
    _, squeezed = codec.encode_tensor("w", matrix.view(1000, 1000), dtype, zstd=True)
    assert sum(t.nbytes for t in squeezed.values()) < 0.9 * sum(t.nbytes for t in parts.values())


def test_rounded_values_come_back_in_their_own_type_rounded_as_torch_does():
    before = weights((40, 30), 0.8)
    entry, parts = codec.encode_tensor("w", before, torch.bfloat16)
    after = codec.decode_tensor("w", entry, {name.partition("|")[2]: t for name, t in parts.items()})
    assert same({"w": before.bfloat16().float()}, {"w": after})


def test_a_matrix_without_enough_zeros_is_kept_whole():
    _, parts = codec.encode_tensor("w", weights((40, 30), 0.01))
    assert [*parts] == ["w|whole"]


def test_the_same_weights_are_the_same_bytes(tmp_path):
    table = {f"w{i}": weights((40, 30), 0.8, seed=i) for i in range(5)}
    one, other = (written(tmp_path / name, table, True) / codec.FILE for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path / "packed", {f"layer.{i}.weight": weights((40, 30), 0.8, seed=i) for i in range(3)})


def offsets(path: Path) -> list[tuple[int, int, str]]:
    """(where it begins, where it ends, whose it is) of every part in the file, read by hand."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = {key: row["data_offsets"] for key, row in json.loads(data[8 : 8 + length]).items() if key[0] != "_"}
    return sorted((8 + length + low, 8 + length + high, key.rpartition("|")[0]) for key, (low, high) in header.items())


@pytest.mark.parametrize("number", range(6))
def test_an_edited_byte_is_refused_with_the_name_of_its_tensor(folder, number):
    path = folder / codec.FILE
    data, (low, high, name) = bytearray(path.read_bytes()), offsets(path)[number]
    data[(low + high) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"damaged file .*packed\.safetensors: the bytes of {re.escape(name)} are not"):
        dict(codec.read_packed(folder))


def refused(folder: Path, *said: str) -> None:
    """The file is refused in one line that names it."""
    with pytest.raises(UserError, match=r"damaged file .*packed\.safetensors: .*; copy it again") as caught:
        dict(codec.read_packed(folder))
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in said)


@settings(max_examples=60)
@given(share=st.floats(0, 0.999), zstd=st.booleans())
def test_a_truncated_file_is_refused(tmp_path_factory, share, zstd):
    folder = tmp_path_factory.mktemp("cut")
    written(folder, {f"layer.{i}.weight": weights((40, 30), 0.8, seed=i) for i in range(3)}, zstd)
    path = folder / codec.FILE
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(folder)


@pytest.mark.parametrize("length", [2**50, 2**64 - 1])
def test_a_header_that_says_to_be_longer_than_any_file_is_refused(folder, length):
    path = folder / codec.FILE
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(folder)


def header_of(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put(path: Path, header: bytes, rest: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + rest)


EDITS = {
    "type of as many bytes": {"dtype": "I32"}, "smaller type": {"dtype": "F16"}, "no type": {"dtype": "Q32"},
    "shape": {"shape": [7]}, "place": {"data_offsets": [0, 7]}, "no place": {"data_offsets": "here"},
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize("part", ["values", "bits"])
def test_an_edited_header_is_refused(tmp_path, part, zstd, edit):
    folder = written(tmp_path, {f"layer.{i}.weight": weights((40, 30), 0.8, seed=i) for i in range(3)}, zstd)
    header, rest = header_of(folder / codec.FILE)
    row = header[f"layer.1.weight|{part}"]
    same_bytes = {"dtype": "I8"} if row["dtype"] == "U8" else EDITS["type of as many bytes"]
    row |= same_bytes if edit == "type of as many bytes" else EDITS[edit]
    put(folder / codec.FILE, json.dumps(header).encode(), rest)
    # safetensors finds the others, before anything is read.
    refused(folder, *(["layer.1.weight"] if edit == "type of as many bytes" else []))


@settings(max_examples=200)
@given(share=st.floats(0, 0.999), byte=st.integers(32, 126), zstd=st.booleans())
def test_a_header_with_another_letter_gives_the_same_weights_or_is_refused(tmp_path_factory, share, byte, zstd):
    before = {f"layer.{i}.weight": weights((40, 30), 0.8, seed=i) for i in range(2)}
    path = written(tmp_path_factory.mktemp("letter"), before, zstd) / codec.FILE
    data = bytearray(path.read_bytes())
    data[8 + int(share * struct.unpack("<Q", data[:8])[0])] = byte
    path.write_bytes(data)
    with contextlib.suppress(UserError):
        assert same(dict(codec.read_packed(path.parent)), before)


def rewritten(folder: Path, change) -> None:
    """The file with its table and its parts changed, as a well-formed safetensors file."""
    path = folder / codec.FILE
    parts = load_file(path)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["sparsesoup"])
    change(header, parts)
    save_file(parts, path, metadata={"sparsesoup": json.dumps(header)})


def shape(header, parts):
    header["tensors"]["layer.1.weight"]["shape"] = [30, 40]


def swap(header, parts):
    parts["layer.0.weight|values"], parts["layer.1.weight|values"] = (
        parts["layer.1.weight|values"], parts["layer.0.weight|values"])  # fmt: skip


def lose(header, parts):
    del parts["layer.1.weight|values"]


def lose_all(header, parts):
    del parts["layer.1.weight|values"], parts["layer.1.weight|bits"]


def stranger(header, parts):
    parts["layer.9.weight|whole"] = torch.ones(3)


def older(header, parts):
    header["format"] = 0


def bare(header, parts):
    header["tensors"]["layer.1.weight"] = 3


CHANGES = {
    shape: r"the bytes of layer\.1\.weight", swap: r"the bytes of layer\.0\.weight", lose: r"layer\.1\.weight",
    lose_all: r"layer\.1\.weight", stranger: r"layer\.9\.weight", older: "has format 0; this version reads 1",
    bare: r"damaged file .*layer\.1\.weight is not as it was written",
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_table_is_refused(folder, change):
    rewritten(folder, change)
    with pytest.raises(UserError, match=CHANGES[change]):
        dict(codec.read_packed(folder))


def test_bytes_behind_the_last_tensor_and_no_file_at_all_are_refused(folder, tmp_path):
    with open(folder / codec.FILE, "ab") as file:
        file.write(b"more")
    refused(folder)
    with pytest.raises(
        UserError, match=r"no .*packed\.safetensors: give a folder that `sparsesoup export --to packed`"
    ):
        dict(codec.read_packed(tmp_path / "nowhere"))


def test_a_type_that_is_not_known_is_refused_by_name():
    with pytest.raises(UserError, match=r"w has type torch\.complex64, which is not packed; allowed: float64"):
        codec.encode_tensor("w", torch.zeros(3, dtype=torch.complex64))
