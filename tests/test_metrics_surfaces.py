"""Outlines of masks against sets of pixels and all pairs of distances."""

import math

import numpy as np
import pytest
import references
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from segrl.errors import DataError
from segrl.metrics import boundary_iou, hausdorff, surface, surface_dice, surface_distances, surfaces


@st.composite
def mask_pairs(draw: st.DrawFn, min_dims: int = 1, max_dims: int = 3) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(array_shapes(min_dims=min_dims, max_dims=max_dims, max_side=7 if max_dims < 3 else 5))
    return draw(arrays(np.bool_, shape)), draw(arrays(np.bool_, shape))


def spacings(ndim: int) -> st.SearchStrategy[tuple[float, ...]]:
    return st.tuples(*[st.sampled_from([0.1, 0.5, 1.0, 2.5])] * ndim)


def disc(size: int, radius: float, y: float, x: float) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size]
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


def box(shape: tuple[int, ...], *ranges: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*ends) for ends in ranges)] = True
    return mask


MEASURES = {
    "boundary_iou": boundary_iou,
    "hausdorff": hausdorff,
    "surface_dice": lambda pred, true: surface_dice(pred, true, 1.0),
}
measures = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES.keys())


# --- against slow readings of the definitions


@given(mask_pairs())
def test_surface_equals_pixels_without_a_neighbour(pair):
    for mask in pair:
        assert references.pixels(surface(mask)) == references.surface(mask)


@given(mask_pairs(), st.sampled_from([0.01, 0.1, 0.2, 0.35, 0.8]))
def test_boundary_iou_equals_rims_of_pixels(pair, dilation):
    pred, true = pair
    assert boundary_iou(pred, true, dilation) == references.boundary_iou(pred, true, dilation)


@given(st.data(), mask_pairs(), st.booleans())
def test_distances_equal_all_pairs(data, pair, anisotropic):
    pred, true = pair
    steps = data.draw(spacings(pred.ndim)) if anisotropic else (1.0,) * pred.ndim
    there, back = surface_distances(pred, true, steps if anisotropic else None)
    np.testing.assert_allclose(np.sort(there), references.directed_distances(pred, true, steps), rtol=1e-12)
    np.testing.assert_allclose(np.sort(back), references.directed_distances(true, pred, steps), rtol=1e-12)


@given(st.data(), mask_pairs(), st.sampled_from([1e-9, 50.0, 95.0, 100.0]), st.sampled_from([0.0, 1.0, 1.5, 0.3]))
def test_hausdorff_and_surface_dice_equal_all_pairs(data, pair, percent, tolerance):
    pred, true = pair
    steps = data.draw(spacings(pred.ndim))
    there = references.directed_distances(pred, true, steps)
    back = references.directed_distances(true, pred, steps)
    distance, score = hausdorff(pred, true, percent, steps), surface_dice(pred, true, tolerance, steps)
    if there and back:
        expected = max(references.percentile(there, percent), references.percentile(back, percent))
        near = [value <= tolerance + 1e-7 for value in there + back]
        assert distance == pytest.approx(expected)
        assert score == sum(near) / len(near)
    else:
        assert distance == (math.inf if there or back else 0.0)
        assert score == float(not there and not back)


@pytest.mark.parametrize("shape", [(40, 50), (12, 14, 10)])
@pytest.mark.parametrize("density", [0.02, 0.5], ids=["tree", "transform"])
def test_tree_and_distance_transform_agree(monkeypatch, shape, density):
    rng = np.random.default_rng(0)
    pred, true = rng.random(shape) < density, rng.random(shape) < density
    steps = (0.7, 1.3, 2.0)[: len(shape)]
    found = []
    for cost in (0, 10**9):  # always the tree, never the tree
        monkeypatch.setattr(surfaces, "TREE_COST", cost)
        found.append([np.sort(directed) for directed in surface_distances(pred, true, steps)])
    for tree, transform in zip(*found, strict=True):
        np.testing.assert_allclose(tree, transform, rtol=1e-12)


# --- known values


def test_shifted_squares():
    true, pred = box((40, 40), (10, 20), (10, 20)), box((40, 40), (10, 20), (13, 23))
    assert hausdorff(pred, true, 100) == hausdorff(pred, true) == 3.0
    assert hausdorff(pred, true, 100, spacing=(1.0, 0.5)) == 1.5
    assert hausdorff(pred, true, 100, spacing=(0.5, 1.0)) == 3.0
    # Each outline has 36 pixels. Rows 10 and 19 share columns 13 to 19; the rest of a side is 1, 2 or 3 away.
    assert surface_dice(pred, true, 0.0) == 14 / 36
    assert surface_dice(pred, true, 3.0) == 1.0
    # The rim is 1 wide: 0.02 of the diagonal of 57. Both rims have 36 pixels, 14 of them common.
    assert boundary_iou(pred, true) == 14 / (36 + 36 - 14)


def test_spheres_of_anisotropic_voxels():
    z, y, x = np.mgrid[:24, :48, :48]
    millimetres = np.sqrt(((z - 12) * 2.0) ** 2 + (y - 24) ** 2 + (x - 24) ** 2)
    small, large = millimetres < 12, millimetres < 15
    steps = (2.0, 1.0, 1.0)
    assert hausdorff(small, large, 100, steps) == pytest.approx(3.0, abs=1.0)
    assert surface_dice(small, large, 1.0, steps) == 0.0
    assert surface_dice(small, large, 4.0, steps) == 1.0


def test_a_percentile_forgives_an_outlier_and_the_maximum_does_not():
    true = disc(128, 30, 64, 64)
    pred = true.copy()
    pred[0, 0] = True
    assert hausdorff(pred, true, 100) == pytest.approx(math.hypot(64, 64) - 30, abs=1)
    assert hausdorff(pred, true, 95) == 0.0


def test_directed_percentiles_are_not_pooled():
    # One of two predicted pixels is 9 off; no true one of 100 is. Pooled, the outlier would vanish.
    pred, true = box((1, 110), (0, 1), (0, 1)), box((1, 110), (0, 1), (0, 100))
    pred[0, 108] = True
    assert hausdorff(pred, pred | true, 95) > hausdorff(true, true, 95)
    there, _ = surface_distances(pred, true)
    assert sorted(there) == [0.0, 9.0]
    assert hausdorff(pred, true, 50) >= 4.5


def test_boundary_iou_does_not_reward_the_inside():
    true, pred = box((512, 512), (100, 400), (100, 400)), box((512, 512), (107, 393), (107, 393))
    assert 286**2 / 300**2 > 0.9  # the plain IoU
    # 0.02 of the diagonal is 14: the rims reach from 0 to 14 and from 7 to 21 pixels into the true square.
    assert boundary_iou(pred, true) == (286**2 - 272**2) / (300**2 - 258**2)


@pytest.mark.parametrize("dilation", [1e-9, 0.02, 0.5, 3.0])
def test_thin_masks_and_wide_rims_score_the_plain_iou(dilation):
    true, pred = box((30, 30), (5, 6), (2, 22)), box((30, 30), (5, 6), (12, 27))
    assert boundary_iou(pred, true, dilation) == 10 / 25
    full = np.ones((9, 9), dtype=bool)
    assert boundary_iou(full, box((9, 9), (0, 9), (0, 3)), 3.0) == 27 / 81


def test_the_end_of_the_image_is_an_outline():
    full = np.ones((50, 40), dtype=bool)
    inner = box((50, 40), (1, 49), (1, 39))
    assert np.count_nonzero(surface(full)) == 2 * (50 + 40) - 4
    assert hausdorff(full, inner, 100) == pytest.approx(math.sqrt(2))
    assert boundary_iou(full, inner, 1e-9) == 0.0
    assert boundary_iou(full, full) == surface_dice(full, full, 0.0) == 1.0


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (1, 1, 1), (7,)])
def test_one_pixel_and_whole_images(shape):
    full = np.ones(shape, dtype=bool)
    corner = np.zeros(shape, dtype=bool)
    corner.flat[0] = True
    for mask in (full, corner):
        assert boundary_iou(mask, mask) == surface_dice(mask, mask, 0.0) == 1.0
        assert hausdorff(mask, mask) == 0.0
    assert hausdorff(corner, full, 100) == math.dist([0] * len(shape), [side - 1 for side in shape])


def test_one_pixel_lesions_are_measured_like_any_other():
    pred, true = box((99, 99), (7, 8), (3, 4)), box((99, 99), (4, 5), (7, 8))
    assert hausdorff(pred, true) == 5.0
    assert (surface_dice(pred, true, 4.9), surface_dice(pred, true, 5.0)) == (0.0, 1.0)
    assert boundary_iou(pred, true) == 0.0


def test_a_tolerance_counts_itself_whatever_the_rounding():
    pred, true = box((9, 9), (0, 1), (0, 1)), box((9, 9), (3, 4), (0, 1))
    assert 3 * 0.1 > 0.3  # the trap
    assert surface_dice(pred, true, 0.3, spacing=(0.1, 0.1)) == 1.0


# --- properties


@measures
@given(mask_pairs())
def test_symmetric_and_blind_to_flips_and_stored_values(measure, pair):
    pred, true = pair
    value = measure(pred, true)
    assert measure(true, pred) == value
    assert measure(pred.astype(np.uint8) * 255, true.astype(np.int64)) == value
    for axis in range(pred.ndim):
        assert measure(np.flip(pred, axis), np.flip(true, axis)) == value
    assert measure(pred.T, true.T) == value


@given(mask_pairs(), st.integers(1, 4))
def test_empty_surroundings_change_no_distance(pair, margin):
    pred, true = (np.pad(mask, margin) for mask in pair)
    assert hausdorff(pred, true) == hausdorff(*pair)
    assert surface_dice(pred, true, 1.0) == surface_dice(pair[0], pair[1], 1.0)


@measures
@given(mask_pairs())
def test_bools_of_any_byte_are_the_same(measure, pair):
    # PIL reads a bitmap as bools whose byte is 255.
    pred, true = ((mask.astype(np.uint8) * np.uint8(255)).view(np.bool_) for mask in pair)
    assert measure(pred, pair[1]) == measure(pair[0], true) == measure(*pair)
    np.testing.assert_array_equal(surface(pred), surface(pair[0]))


@given(mask_pairs())
def test_perfect_for_equal_outlines_only(pair):
    pred, true = pair
    same = references.surface(pred) == references.surface(true)
    assert (hausdorff(pred, true, 100) == 0) == (surface_dice(pred, true, 0.0) == 1) == same
    assert boundary_iou(pred, pred) == 1.0
    assert 0 <= boundary_iou(pred, true) <= 1


@given(mask_pairs())
def test_a_wider_tolerance_or_percentile_never_lowers(pair):
    pred, true = pair
    scores = [surface_dice(pred, true, tolerance) for tolerance in (0.0, 1.0, 1.5, 2.0, 9.0)]
    assert scores == sorted(scores)
    distances = [hausdorff(pred, true, percentile) for percentile in (10, 50, 95, 100)]
    assert distances == sorted(distances)
    if pred.any() and true.any():
        assert surface_dice(pred, true, distances[-1]) == 1.0


@given(st.integers(0, 20))
def test_a_mask_that_moves_away_is_farther(shift):
    true = disc(96, 16, 40, 30)
    near, far = (np.roll(true, by, axis=1) for by in (shift, shift + 1))
    assert hausdorff(far, true, 100) >= hausdorff(near, true, 100)
    assert hausdorff(near, true, 100) == shift


def test_inputs_are_left_alone():
    pred, true = disc(32, 9, 12, 12), disc(32, 9, 15, 15)
    before = pred.copy(), true.copy()
    for measure in MEASURES.values():
        measure(pred, true)
    np.testing.assert_array_equal((pred, true), before)


class Counted(np.ndarray):
    """Counts the elements that NumPy's operations write."""

    written = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        plain = [np.asarray(value) for value in inputs]
        result = getattr(ufunc, method)(*plain, **kwargs)
        Counted.written += result.size
        return result.view(Counted)


def work(radius: int) -> int:
    Counted.written = 0
    surfaces._inside(np.ones((400, 400), dtype=np.uint8).view(Counted), radius)
    return Counted.written


def test_a_wider_rim_takes_hardly_more_work():
    assert work(1) > 400 * 398  # something is counted
    assert work(50) <= 2 * 7 * 400 * 400  # 7 = log2(101), rounded up; 50 erosions would write 50 times the image
    assert work(100) < 1.2 * work(50)


# --- errors


@measures
def test_wrong_masks_are_refused(measure):
    mask = np.ones((4, 4), dtype=bool)
    with pytest.raises(DataError, match=r"pred: expected the shape of true \(4, 4\), got \(4, 5\); resize"):
        measure(np.ones((4, 5), dtype=bool), mask)
    with pytest.raises(DataError, match="true: expected a bool or integer mask, got float64; threshold it first"):
        measure(mask, mask.astype(float))
    with pytest.raises(DataError, match=r"got \(\)"):
        measure(np.array(True), np.array(True))


@pytest.mark.parametrize("value", [0.0, -0.1, math.inf, math.nan])
def test_dilation_is_checked(value):
    with pytest.raises(DataError, match=rf"dilation={value}; expected a positive share"):
        boundary_iou(np.ones((2, 2), bool), np.ones((2, 2), bool), value)


@pytest.mark.parametrize("value", [0.0, 100.1, math.nan])
def test_percentile_is_checked(value):
    with pytest.raises(DataError, match=rf"percentile={value}; expected a number in \(0, 100\], such as 95"):
        hausdorff(np.ones((2, 2), bool), np.ones((2, 2), bool), value)


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_tolerance_is_checked(value):
    with pytest.raises(DataError, match=rf"tolerance={value}; expected a distance of at least 0"):
        surface_dice(np.ones((2, 2), bool), np.ones((2, 2), bool), value)


@pytest.mark.parametrize("spacing", [(1.0,), (1.0, 0.0), (1.0, math.nan), (1.0, 1.0, 1.0)])
@pytest.mark.parametrize("mask", [np.ones((2, 2), bool), np.zeros((2, 2), bool)], ids=["full", "empty"])
def test_spacing_is_checked(mask, spacing):
    with pytest.raises(DataError, match=r"spacing=\(.*\); expected 2 positive numbers, one per axis"):
        hausdorff(mask, mask, spacing=spacing)
