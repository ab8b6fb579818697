"""Images are made once in a process, for all runs and seeds, and anew where anything about them differs."""

import io

import numpy as np
import PIL.Image
import pytest
import transformers
from datasets import Dataset, Features, Image, Value, concatenate_datasets

from sparsesoup.core.errors import UserError
from sparsesoup.hub.tasks import images as pictures
from sparsesoup.hub.tasks.images import ImageCache
from sparsesoup.hub.tasks.splits import open_splits, training_splits
from tiny_images import SIDE, TASK, parquet, photos, processor, table


@pytest.fixture
def opened(monkeypatch):
    """Numbers of the rows whose images were opened, in order; nothing is kept from other tests."""
    rows, known = [], ImageCache._open_image
    monkeypatch.setattr(pictures, "_KEPT", {})
    monkeypatch.setattr(ImageCache, "_open_image", lambda self, cell, row: rows.append(row) or known(self, cell, row))
    return rows


def seen(rows, made=None):
    """The images of rows as bytes, whatever is kept."""
    return ImageCache(rows, "image", made or processor()).pixels_of(range(len(rows)))


@pytest.mark.parametrize("kind", [parquet, photos])
def test_all_seeds_and_runs_of_a_process_share_the_images_of_a_split(tmp_path, opened, kind):
    kind(tmp_path / "some")
    for seed in (0, 1):
        source = open_splits(str(tmp_path / "some"))
        for rows in training_splits(source, TASK, seed):
            wanted = processor()([row["image"].convert("RGB") for row in rows], return_tensors="pt")["pixel_values"]
            found = ImageCache(rows, "image", processor())
            assert found.model_inputs(found.pixels_of(range(len(rows)))).allclose(wanted, atol=1e-6)
    assert set(opened) == set(range(48))
    # The first of each split is opened before, for its size: two splits, two seeds.
    assert len(opened) == 48 + 4


def test_only_the_rows_of_a_split_are_made(opened):
    chosen = table(40).select([7, 3, 30])
    assert seen(chosen).equal(seen(table(40))[[7, 3, 30]])
    assert opened[:4] == [7, 3, 7, 30]


def test_images_are_made_anew_where_they_their_files_or_the_processor_differ(tmp_path, opened):
    rows = table(4)
    for other, made in ((table(4, 9), None), (rows, processor(SIDE + 2)), (concatenate_datasets([rows, rows]), None)):
        known = len(opened)
        first = seen(rows)
        assert len(opened) == known + (5 if not known else 1)
        again, fresh = seen(other, made), len(opened)
        assert fresh > known + len(other)
        assert again.shape != first.shape or not again.equal(first)
    assert seen(rows.select(range(2, 4))).equal(seen(rows)[2:])  # parts of one table in memory
    assert seen(rows.select(range(2))).equal(seen(rows)[:2])
    path = tmp_path / "one.png"
    for level in (0, 200):
        PIL.Image.new("RGB", (SIDE, SIDE), (level,) * 3).save(path)
        one = Dataset.from_dict({"image": [str(path)]}, Features({"image": Image()}))
        assert seen(one).unique().tolist() == [level]


def test_slices_of_one_table_are_told_apart_whatever_form_its_images_have(opened):
    bare = [cell["bytes"] for cell in table(6).cast_column("image", Image(decode=False))["image"]]
    wanted = seen(table(6))
    for kind, cells in (
        (Value("binary"), bare),
        (Image(), [{"bytes": one, "path": None} for one in bare]),
        ({"bytes": Value("binary"), "path": Value("string")}, [{"bytes": one, "path": None} for one in bare]),
    ):
        rows = Dataset.from_dict({"image": cells}, Features({"image": kind}))
        for first in (0, 2, 4):
            assert seen(rows.select(range(first, first + 2))).equal(wanted[first : first + 2])


def test_levels_of_sixteen_bits_keep_their_order_and_those_without_a_range_are_refused(opened):
    def stored(levels, ending):
        file = io.BytesIO()
        PIL.Image.fromarray(levels).save(file, ending)
        return Dataset.from_dict({"image": [{"bytes": file.getvalue(), "path": None}]}, Features({"image": Image()}))

    ramp = np.tile(np.arange(SIDE, dtype=np.uint16) * 20, (SIDE, 1))
    for ending in ("png", "tiff"):
        assert seen(stored(ramp << 8, ending)).equal(seen(stored(ramp.astype(np.uint8), ending)))
    for kind in (np.int32, np.float32):
        with pytest.raises(UserError, match=r"row 0 of column image cannot be read .* range of its levels"):
            seen(stored(ramp.astype(kind), "tiff"))


def test_what_a_processor_makes_is_taken_in_any_layout_of_memory_or_refused():
    side = {"height": SIDE, "width": SIDE}
    mobile = transformers.MobileViTImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side)  # blue comes first
    wanted = mobile([table(2)[1]["image"]], return_tensors="pt")["pixel_values"]
    made = ImageCache(table(2), "image", mobile)
    assert made.model_inputs(made.pixels_of([1])).allclose(wanted, atol=1e-6)
    for other in (
        transformers.Siglip2ImageProcessorPil(),
        transformers.ImageGPTImageProcessorPil(clusters=[[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]], size=side),
    ):
        with pytest.raises(UserError, match=rf"\({type(other).__name__}\) does not make one array of channels"):
            seen(table(2), other)


def test_a_row_that_cannot_be_read_is_named_as_published_and_spoils_no_later_run(tmp_path, opened):
    rows = table(6).cast_column("image", Image(decode=False)).to_dict()
    rows["image"][4]["bytes"] = b"no image"
    bad = Dataset.from_dict(rows, table(6).features)
    with pytest.raises(UserError, match=r"row 4 of column image cannot be read as an image"):
        seen(bad.select([5, 4, 2]))
    good = [0, 1, 2, 3, 5]
    assert seen(bad.select(good)).equal(seen(table(6))[good])


def test_images_that_are_kept_do_not_fill_the_memory(monkeypatch, opened):
    monkeypatch.setattr(pictures, "HELD", 6 * 3 * SIDE * SIDE)
    for count in (3, 2, 3, 6):
        seen(table(count))
    assert [len(made.there) for made in pictures._KEPT.values()] == [6]
    seen(table(7))  # more than may be held: made each time
    assert [len(made.there) for made in pictures._KEPT.values()] == [6]


def test_of_a_split_that_is_too_large_the_rows_chosen_are_held_if_these_fit(monkeypatch, opened):
    monkeypatch.setattr(pictures, "HELD", 4 * 3 * SIDE * SIDE)
    large, whole = table(9), ImageCache(table(9), "image", processor())
    for chosen in ([7, 0, 3], [2, 8]):
        wanted = whole.pixels_of([chosen[1], chosen[0]])
        opened.clear()
        for made in (ImageCache(large.select(chosen), "image", processor()) for _ in range(2)):
            assert made.pixels_of([1, 0]).equal(wanted)
        assert opened == [chosen[0], *sorted(chosen), chosen[0]]
