"""Matching against trying every assignment."""

import numpy as np
import pytest
import references
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from segrl.errors import DataError
from segrl.geometry import match, match_boxes, pairwise_iou

costs = arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=5), elements=st.floats(-10, 10))


def random_boxes(seed: int, count: int) -> np.ndarray:
    corners = np.random.default_rng(seed).integers(0, 10, (count, 4))
    return np.concatenate([corners[:, :2], corners[:, :2] + 1 + corners[:, 2:]], axis=1).astype(np.float64)


@given(costs)
def test_cost_is_minimal_and_pairs_are_one_to_one(cost: np.ndarray):
    rows, columns = match(cost)
    assert len(rows) == len(set(rows)) == len(set(columns)) == min(cost.shape)
    assert list(rows) == sorted(rows)
    assert cost[rows, columns].sum() == pytest.approx(-references.largest_total(-cost))


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5))
def test_boxes_have_the_largest_total_iou(seed: int, predicted: int, truths: int):
    pred, true = random_boxes(seed, predicted), random_boxes(seed + 1, truths)
    table = pairwise_iou(pred, true)
    matching = match_boxes(pred, true)
    assert matching.iou.sum() == pytest.approx(references.largest_total(table))
    np.testing.assert_array_equal(matching.iou, table[matching.pred_index, matching.true_index])
    assert (matching.iou > 0).all()


@given(st.integers(0, 10**6), st.floats(0, 1))
def test_the_threshold_only_drops_pairs(seed: int, min_iou: float):
    pred, true = random_boxes(seed, 4), random_boxes(seed + 1, 4)
    every, kept = match_boxes(pred, true), match_boxes(pred, true, min_iou)
    above = every.iou > min_iou
    np.testing.assert_array_equal(kept.pred_index, every.pred_index[above])
    np.testing.assert_array_equal(kept.true_index, every.true_index[above])


def test_the_total_counts_not_the_best_pair():
    # The best pair (0, 0) with IoU 0.6 would leave (1, 1) with 0.08; crossing over gives twice 70/130.
    pred, true = [[55, 0, 155, 1], [0, 0, 100, 1]], [[30, 0, 130, 1], [85, 0, 185, 1]]
    matching = match_boxes(pred, true)
    np.testing.assert_array_equal(matching.true_index, [1, 0])
    np.testing.assert_allclose(matching.iou, 70 / 130)
    assert len(match_boxes(pred, true, min_iou=0.55)) == 0  # the threshold does not bring (0, 0) back


def test_the_threshold_is_exclusive():
    pred, true = [[0, 0, 2, 1]], [[0, 0, 1, 1]]
    assert len(match_boxes(pred, true, min_iou=0.49)) == 1
    assert len(match_boxes(pred, true, min_iou=0.5)) == 0


@pytest.mark.parametrize(("pred", "true"), [([], []), ([], [[0, 0, 1, 1]]), ([[0, 0, 1, 1]], [])])
def test_no_boxes(pred: list, true: list):
    matching = match_boxes(pred, true)
    assert matching.pred_index.shape == matching.true_index.shape == matching.iou.shape == (0,)
    assert len(matching) == 0


def test_errors():
    with pytest.raises(DataError, match=r"cost: expected shape \(N, M\), got \(3,\)"):
        match([1, 2, 3])
    with pytest.raises(DataError, match="cost: expected finite numbers, got nan"):
        match([[1, np.nan]])
    with pytest.raises(DataError, match=r"a\[0\]: expected finite"):
        match_boxes([[0, 0, np.inf, 1]], [])
