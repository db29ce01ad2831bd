"""Measures of masks and probabilities against sums over lists of pixels."""

import numpy as np
import pytest
import references
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from segrl import metrics
from segrl.errors import DataError
from segrl.metrics import s_measure, soft_dice

probabilities = st.floats(0, 1, width=32)


@st.composite
def pairs(draw: st.DrawFn, soft: bool) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(array_shapes(min_dims=2, max_dims=2, max_side=7))
    pred = draw(arrays(np.float32, shape, elements=probabilities) if soft else arrays(np.bool_, shape))
    return pred, draw(arrays(np.bool_, shape))


def square(size: int, low: int, high: int) -> np.ndarray:
    mask = np.zeros((size, size), dtype=bool)
    mask[low:high, low:high] = True
    return mask


either = pytest.mark.parametrize("measure", [s_measure, soft_dice])


# --- the empty rule, and what peers pay for


@either
def test_empty_sides(measure):
    empty, full, dot = np.zeros((6, 6), dtype=bool), np.ones((6, 6), dtype=bool), square(6, 2, 3)
    assert measure(empty, empty) == 1.0
    for mask in (full, dot):
        assert measure(empty, mask) == measure(mask, empty) == 0.0
        assert measure(mask, mask) == 1.0


@either
def test_probabilities_are_empty_if_their_mask_is(measure):
    empty, dot = np.zeros((6, 6), dtype=bool), square(6, 2, 3)
    unsure, sure = np.full((6, 6), 0.5), np.full((6, 6), 0.5)
    sure[0, 0] = 0.51
    assert measure(unsure, empty) == 1.0
    assert measure(unsure, dot) == measure(sure, empty) == 0.0
    assert 0 < measure(sure, dot) < 1


def test_s_measure_pays_nothing_for_an_empty_mask_of_a_small_lesion():
    # The published code gives 0.5 and more, since nearly all pixels agree; for an empty truth it pays 1 - mean(P).
    assert s_measure(np.zeros((64, 64), dtype=bool), square(64, 30, 33)) == 0.0
    assert s_measure(square(64, 30, 33), np.zeros((64, 64), dtype=bool)) == 0.0


def test_s_measure_pays_nothing_for_opposite_constant_parts():
    true = square(8, 0, 1)
    pred = true.copy()
    pred[1:, 1:] = True
    # Row 0 and column 0 are right; the lower right part, 49 of 64 pixels, is the opposite, for which peers pay 1.0.
    assert s_measure(pred, true, alpha=0.0) == pytest.approx(1 - 49 / 64)


# --- known values and slow readings


def test_known_values():
    true, pred = square(8, 2, 6), np.zeros((8, 8), dtype=bool)
    pred[2:6, 2:4] = True
    # Half of the 16 pixels are found, and no background is: x = 1/2 with s^2 = 4/15.
    inside = 1.0 / (0.25 + 1 + (4 / 15) ** 0.5)
    assert s_measure(pred, true, alpha=1.0) == pytest.approx(16 / 64 * inside + 48 / 64 * 1.0)
    assert soft_dice(pred, true) == pytest.approx(2 / 3)
    assert soft_dice(np.where(pred, 0.75, 0.25), true) == pytest.approx(2 * (6 + 2) / (6 + 14 + 16))


@pytest.mark.slow
@pytest.mark.parametrize("soft", [False, True])
@given(st.data())
def test_s_measure_equals_the_paper_term_by_term(soft, data):
    pred, true = data.draw(pairs(soft))
    alpha = data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    assume((pred > 0.5).any() and true.any() and not true.all())
    assert s_measure(pred, true, alpha) == pytest.approx(references.s_measure(pred, true, alpha), abs=1e-6)


@pytest.mark.slow
@given(pairs(soft=True))
def test_soft_dice_equals_sums_over_pixels(pair):
    pred, true = pair
    assume((pred > 0.5).any() and true.any())
    overlap = sum(float(p) for p, t in zip(pred.flat, true.flat, strict=True) if t)
    assert soft_dice(pred, true) == pytest.approx(2 * overlap / (sum(map(float, pred.flat)) + np.count_nonzero(true)))


@given(pairs(soft=False))
def test_a_mask_and_its_certain_probabilities_score_the_same(pair):
    pred, true = pair
    assert soft_dice(pred, true) == soft_dice(pred.astype(float), true) == metrics.dice(pred, true)
    assert s_measure(pred.astype(np.float32), true) == pytest.approx(s_measure(pred, true))
    assert s_measure(pred.astype(np.uint8) * 255, true.astype(int) * 7) == s_measure(pred, true)
    bitmap = (true.astype(np.uint8) * np.uint8(255)).view(np.bool_)  # as PIL reads it
    assert s_measure(pred, bitmap) == s_measure(pred, true)


@given(pairs(soft=True))
def test_range(pair):
    assert 0 <= s_measure(*pair) <= 1
    assert 0 <= soft_dice(*pair) <= 1
    true = pair[1]
    assert s_measure(true, true) == soft_dice(true, true) == 1.0


def test_a_truth_without_background_is_scored_by_the_mean():
    pred = np.full((4, 4), 0.75)
    assert s_measure(pred, np.ones((4, 4), dtype=bool)) == 0.75


def test_soft_dice_reads_volumes():
    volume = np.zeros((3, 4, 5), dtype=bool)
    volume[1, 1:3, 1:3] = True
    assert soft_dice(volume * 0.75, volume) == pytest.approx(2 * 3 / (3 + 4))


def test_one_pixel_images():
    one = np.ones((1, 1), dtype=bool)
    assert s_measure(one, one) == soft_dice(one, one) == 1.0
    assert s_measure(np.array([[0.6]]), one) == 0.6


def test_graded_masks_score_in_order():
    true = square(64, 16, 48)
    scores = [s_measure(square(64, 16, end), true) for end in (20, 30, 40, 44, 48)]
    assert scores == sorted(scores)
    assert scores[-1] == 1.0


# --- errors


@either
def test_wrong_input_is_refused(measure):
    true = square(6, 2, 3)
    with pytest.raises(DataError, match=r"pred: expected the shape of true \(6, 6\), got \(5, 6\); resize"):
        measure(np.ones((5, 6), dtype=bool), true)
    with pytest.raises(DataError, match="true: expected a bool or integer mask, got float64; threshold it"):
        measure(true, true.astype(float))
    with pytest.raises(DataError, match=r"expected probabilities in \[0, 1\], got values from -2.0 to 3.0; .*sigmoid"):
        measure(np.where(true, 3.0, -2.0), true)
    with pytest.raises(DataError, match="got values from nan to nan"):
        measure(np.where(true, np.nan, 0.5), true)


def test_s_measure_settings_are_checked():
    with pytest.raises(DataError, match=r"alpha=1.5; expected a number in \[0, 1\]"):
        s_measure(square(6, 2, 3), square(6, 2, 3), alpha=1.5)
    volume = np.ones((2, 3, 4), dtype=bool)
    with pytest.raises(DataError, match=r"true: expected shape \(H, W\), got \(2, 3, 4\)"):
        s_measure(volume, volume)
