"""Masks against flood fill, rational area averages, PIL and torch."""

import json

import numpy as np
import pytest
import references
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from segrl.errors import DataError
from segrl.geometry import (
    binarize,
    boxes_from_mask,
    empty_score,
    foreground,
    mask_to_box,
    mask_to_rle,
    resize_mask,
    rle_to_mask,
    soft_target,
)

masks = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=9))
sizes = st.tuples(st.integers(1, 11), st.integers(1, 11))


@given(masks, st.integers(1, 4))
def test_boxes_equal_flood_fill(mask: np.ndarray, min_area: int):
    components = [c for c in references.components(mask) if len(c) >= min_area]
    keyed = [((-len(c), references.box_around(c)[1], references.box_around(c)[0]), c) for c in components]
    boxes = boxes_from_mask(mask, min_area)
    assert boxes.shape == (len(components), 4)
    assert sorted(boxes.tolist()) == sorted(references.box_around(c) for c in components)
    assert [(y, x) for x, y in boxes[:, :2].tolist()] == [key[1:] for key, _ in sorted(keyed, key=lambda pair: pair[0])]


def test_known_boxes():
    mask = np.zeros((5, 8), dtype=np.uint8)
    mask[0, 0] = mask[4, 7] = 255
    mask[2, 2] = mask[3, 3] = 255  # diagonal neighbours are one component
    np.testing.assert_array_equal(boxes_from_mask(mask), [[2, 2, 4, 4], [0, 0, 1, 1], [7, 4, 8, 5]])
    np.testing.assert_array_equal(boxes_from_mask(mask, min_area=2), [[2, 2, 4, 4]])
    np.testing.assert_array_equal(mask_to_box(mask), [0, 0, 8, 5])


@given(masks)
def test_mask_to_box_is_the_hull_of_the_component_boxes(mask: np.ndarray):
    box, boxes = mask_to_box(mask), boxes_from_mask(mask)
    if not mask.any():
        assert box is None
        assert boxes.shape == (0, 4)
    else:
        np.testing.assert_array_equal(box, [*boxes[:, :2].min(axis=0), *boxes[:, 2:].max(axis=0)])


@given(masks, sizes)
def test_soft_target_equals_rational_area_average(mask: np.ndarray, size: tuple[int, int]):
    target = soft_target(mask, size)
    assert target.dtype == torch.float32
    np.testing.assert_allclose(target, references.area_average(mask, size), atol=1e-6)
    assert float(target.mean()) == pytest.approx(mask.mean(), abs=1e-6)
    quantised = soft_target(mask, size, quantised=True)
    assert quantised.dtype == torch.uint8
    assert (quantised.float() / 255 - target).abs().max() <= 0.5 / 255 + 1e-6


def test_soft_target_equals_torch_for_whole_ratios():
    mask = np.random.default_rng(0).random((96, 64)) < 0.3
    expected = F.interpolate(torch.from_numpy(mask)[None, None].float(), (24, 32), mode="area")[0, 0]
    torch.testing.assert_close(soft_target(mask, (24, 32)), expected)


def test_soft_target_keeps_a_single_pixel():
    mask = np.zeros((512, 512), dtype=np.uint8)
    mask[100, 100] = 255
    assert float(soft_target(mask, (128, 128)).sum()) == pytest.approx(1 / 16)
    assert not resize_mask(mask, (128, 128)).any()


@given(masks, sizes)
def test_resize_equals_torch_nearest_exact(mask: np.ndarray, size: tuple[int, int]):
    # torch rounds in float32, so leave out sizes in which a sample falls on a pixel border.
    ties = any(
        (2 * i + 1) * old % (2 * new) == 0 for old, new in zip(mask.shape, size, strict=True) for i in range(new)
    )
    resized = resize_mask(mask, size)
    assert resized.shape == size
    if not ties:
        expected = F.interpolate(torch.from_numpy(mask)[None, None].float(), size, mode="nearest-exact")[0, 0] > 0
        np.testing.assert_array_equal(resized, expected)


def test_resize_equals_pil():
    mask = (np.random.default_rng(1).random((37, 53)) < 0.5).astype(np.uint8) * 255
    expected = np.asarray(Image.fromarray(mask).resize((29, 71), Image.Resampling.NEAREST)) > 0
    np.testing.assert_array_equal(resize_mask(mask, (71, 29)), expected)


@given(masks, st.integers(1, 4))
def test_enlarging_and_reducing_returns_the_mask(mask: np.ndarray, factor: int):
    height, width = mask.shape
    np.testing.assert_array_equal(resize_mask(resize_mask(mask, (height * factor, width * factor)), mask.shape), mask)


@given(masks, st.integers(1, 255), st.booleans())
def test_binarize_reads_any_foreground_value(mask: np.ndarray, value: int, three_channels: bool):
    stored = mask.astype(np.uint8) * np.uint8(value)
    stored = np.stack([stored] * 3, axis=2) if three_channels else stored
    read = binarize(stored)
    assert read.dtype == np.bool_
    np.testing.assert_array_equal(read, mask)


@pytest.mark.parametrize(
    "stored",
    [
        np.array([[0, 1], [1, 0]]),
        np.array([[0.0, 0.5], [0.5, 0.0]]),
        np.array([[False, True], [True, False]]),
        np.array([[[0], [255]], [[255], [0]]], dtype=np.uint8),
    ],
)
def test_binarize_known(stored: np.ndarray):
    np.testing.assert_array_equal(binarize(stored), [[False, True], [True, False]])


def test_constant_masks():
    assert not binarize(np.zeros((2, 3), dtype=np.uint8)).any()
    assert binarize(np.full((2, 3), 7)).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.array([[0, 254, 255]]), r"a\.png: .*got 3 values \(0, 254, 255\); threshold it first"),
        (np.arange(100).reshape(10, 10), r"got 100 values \(0, 1, 2, 3, 4, \.\.\.\)"),
        (np.array([[1, 2]]), r"got 2 values \(1, 2\); .*background 0"),
        (np.array([[0.0, np.nan]]), r"got 2 values \(0.0, nan\)"),
        (np.array([[-1, 0]]), r"got 2 values \(-1, 0\)"),
        (np.array([[-1, -1]]), r"got 1 values \(-1\)"),
        (np.array([[[0, 0, 9]]]), "the 3 channels of the mask differ"),
        (np.zeros((2, 2, 4)), r"shape \(2, 2, 4\)"),
        (np.zeros((0, 5)), "at least one pixel"),
        (np.array([["a"]]), "expected numbers"),
    ],
)
def test_binarize_refuses(wrong: np.ndarray, message: str):
    with pytest.raises(DataError, match=message):
        binarize(wrong, "a.png")


def test_empty_rule():
    assert empty_score(True, True) == 1.0
    assert empty_score(True, False) == empty_score(False, True) == 0.0
    assert empty_score(False, False) is None


def test_empty_masks_stay_empty():
    mask = np.zeros((4, 6), dtype=bool)
    assert not resize_mask(mask, (9, 9)).any()
    assert not soft_target(mask, (3, 5)).any()


def test_foreground_wants_a_decision_about_floats():
    with pytest.raises(DataError, match=r"logits: .*got float32; threshold it first"):
        foreground(np.zeros((2, 2), dtype=np.float32), "logits")
    with pytest.raises(DataError, match=r"mask: expected 2 dimensions, got shape \(1, 2, 2\)"):
        boxes_from_mask(np.zeros((1, 2, 2), dtype=bool))


@pytest.mark.parametrize("resize", [resize_mask, soft_target])
def test_sizes_are_checked(resize):
    with pytest.raises(DataError, match=r"shape \(2, 2\) to \(0, 4\)"):
        resize(np.ones((2, 2), dtype=bool), (0, 4))
    with pytest.raises(DataError, match=r"shape \(0, 2\) to \(3, 4\)"):
        resize(np.ones((0, 2), dtype=bool), (3, 4))


# ---- run lengths


def column_runs(mask: np.ndarray) -> list[int]:
    """COCO's definition, pixel by pixel: columns from left to right, background first."""
    counts, value = [0], False
    for x in range(mask.shape[1]):
        for y in range(mask.shape[0]):
            if bool(mask[y, x]) != value:
                counts.append(0)
                value = not value
            counts[-1] += 1
    return counts


@given(masks)
def test_run_lengths_equal_cocos_definition_and_read_back(mask: np.ndarray):
    rle = mask_to_rle(mask)
    assert rle == {"size": list(mask.shape), "counts": column_runs(mask)}
    np.testing.assert_array_equal(rle_to_mask(rle), mask)
    assert json.loads(json.dumps(rle)) == rle
    np.testing.assert_array_equal(rle_to_mask({key: np.array(value) for key, value in rle.items()}), mask)


@pytest.mark.parametrize("value", [0, 1])
def test_run_lengths_of_one_value(value: int):
    assert mask_to_rle(np.full((2, 3), value))["counts"] == [0, 6][1 - value :]
    assert (rle_to_mask(mask_to_rle(np.full((2, 3), value))) == value).all()


@given(arrays(bool, array_shapes(min_dims=3, max_dims=3, max_side=5)))
def test_run_lengths_of_a_volume_are_those_of_its_slices_side_by_side(volume: np.ndarray):
    rle = mask_to_rle(volume)
    assert rle == {"size": list(volume.shape), "counts": mask_to_rle(np.concatenate(list(volume), axis=1))["counts"]}
    np.testing.assert_array_equal(rle_to_mask(json.loads(json.dumps(rle))), volume)


def test_run_lengths_of_a_large_volume_are_few():
    volume = np.zeros((400, 64, 64), dtype=bool)
    volume[100:103, 10:20, 30:40] = True
    assert len(mask_to_rle(volume)["counts"]) == 2 * 3 * 10 + 1


def test_what_is_written_of_the_largest_scans_is_read():
    volume = np.zeros((1059, 512, 512), dtype=bool)
    volume[100:900:3, 10:400, 30:40] = True
    again = rle_to_mask(mask_to_rle(volume))
    assert again.shape == volume.shape
    assert all((one == other).all() for one, other in zip(again, volume, strict=True))


def test_nothing_is_written_that_is_not_read(monkeypatch):
    monkeypatch.setattr("segrl.geometry.masks.MAX_RLE_PIXELS", 11)
    with pytest.raises(DataError, match=r"shape \(3, 2, 2\); expected at most 11 pixels, what rle_to_mask reads"):
        mask_to_rle(np.zeros((3, 2, 2), dtype=bool))


@pytest.mark.parametrize("convert", [foreground, mask_to_rle, mask_to_box])
def test_negative_values_are_no_foreground(convert):
    with pytest.raises(
        DataError, match=r"has negative values, down to -1; expected 0 for the background; threshold it"
    ):
        convert(np.array([[0, -1], [1, 0]]))


def test_other_dimensions_have_no_run_lengths():
    for shape in ((4,), (2, 2, 2, 2)):
        with pytest.raises(DataError, match="expected 2 dimensions, got shape"):
            mask_to_rle(np.zeros(shape, dtype=bool))


def test_runs_of_length_0_are_read():
    np.testing.assert_array_equal(rle_to_mask({"size": [1, 4], "counts": [1, 0, 1, 2, 0]}), [[0, 0, 1, 1]])


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ([1, 2], r"truth: \[1, 2\]; expected run lengths"),
        ({"size": [2, 2]}, "expected run lengths"),
        ({"size": [2, 2], "counts": "~"}, "compressed run lengths with the character '~'; expected those that pyco"),
        ({"size": [2, 2], "counts": b"3P"}, "compressed run lengths with no end"),
        ({"size": [2, 2], "counts": ""}, "compressed run lengths with no end"),
        ({"size": [2, 2], "counts": "oooooooooo0"}, "a run of 2\\*\\*31 or more"),
        ({"size": [2, 2], "counts": "3"}, "the counts cover 3 pixels; expected 4"),
        ({"size": [2], "counts": [2]}, r"size \[2\]; expected \[height, width\]"),
        ({"size": [2, 0], "counts": [0]}, r"size \[2, 0\]"),
        ({"size": [2, -2], "counts": [4]}, r"size \[2, -2\]"),
        ({"size": [2.0, 2], "counts": [4]}, r"size \[2.0, 2\]"),
        ({"size": [10**20, 2], "counts": [4]}, "two positive whole numbers"),
        ({"size": [10**6, 10**6], "counts": [10**12]}, "expected at most 1073741824 pixels"),
        ({"size": [2**10, 2**10, 2**10 + 1], "counts": [2**30 + 2**20]}, "expected at most 1073741824 pixels"),
        ({"size": [2**25, 2**25, 2**25], "counts": [4]}, "expected at most 1073741824 pixels"),
        (
            {"size": [2, 2, 2, 2], "counts": [16]},
            r"expected \[height, width\], .* or for a volume \[slices, height, width",
        ),
        ({"size": [2, 2, 2], "counts": [4]}, r"cover 4 pixels; expected 8, for the size \[2, 2, 2\]"),
        ({"size": [2, 2], "counts": []}, r"counts \[\]; expected a list of whole numbers"),
        ({"size": [2, 2], "counts": [5, -1]}, r"counts \[5, -1\]"),
        ({"size": [2, 2], "counts": [1.5, 2.5]}, r"counts \[1.5, 2.5\]"),
        ({"size": [2, 2], "counts": [True, 3, [1]]}, "expected a list of whole numbers"),
        ({"size": [2, 2], "counts": [[4]]}, "expected a list of whole numbers"),
        ({"size": [2, 2], "counts": [3]}, r"cover 3 pixels; expected 4, for the size \[2, 2\]"),
        ({"size": [2, 2], "counts": [2**62, 2**62, 2**62, 2**62, 4]}, "cover 18446744073709551620 pixels"),
    ],
)
def test_run_lengths_are_checked(rle, message: str):
    with pytest.raises(DataError, match=message):
        rle_to_mask(rle, "truth")
