"""Boxes against torchvision, shapely and painted pixels."""

import numpy as np
import pytest
import shapely
import torch
import torchvision.ops
from hypothesis import given
from hypothesis import strategies as st

from segrl.errors import DataError, SegRLError
from segrl.geometry import area, giou, pairwise_giou, pairwise_iou, validate_boxes


@st.composite
def boxes(draw: st.DrawFn, min_side: int = 0) -> np.ndarray:
    count = draw(st.integers(0, 4))
    corner, side = st.integers(0, 12), st.integers(min_side, 8)
    rows = [
        (x, y, x + width, y + height)
        for x, y, width, height in draw(st.lists(st.tuples(corner, corner, side, side), min_size=count, max_size=count))
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def test_known_values():
    a, b = [[0, 0, 2, 2]], [[1, 1, 3, 3], [5, 0, 6, 2]]
    np.testing.assert_allclose(pairwise_iou(a, b), [[1 / 7, 0]])
    np.testing.assert_allclose(pairwise_giou(a, b), [[1 / 7 - 2 / 9, -0.5]])
    np.testing.assert_array_equal(area(b), [4, 2])


@given(boxes(min_side=1), boxes(min_side=1))
def test_equals_torchvision(a: np.ndarray, b: np.ndarray):
    first, second = torch.from_numpy(a), torch.from_numpy(b)
    np.testing.assert_allclose(pairwise_iou(a, b), torchvision.ops.box_iou(first, second), atol=1e-12)
    np.testing.assert_allclose(pairwise_giou(a, b), torchvision.ops.generalized_box_iou(first, second), atol=1e-12)


@given(boxes(min_side=1), boxes(min_side=1))
def test_iou_equals_painted_pixels(a: np.ndarray, b: np.ndarray):
    def paint(box: np.ndarray) -> np.ndarray:
        canvas = np.zeros((24, 24), dtype=bool)
        x1, y1, x2, y2 = box.astype(int)
        canvas[y1:y2, x1:x2] = True
        return canvas

    expected = [[(paint(p) & paint(q)).sum() / (paint(p) | paint(q)).sum() for q in b] for p in a]
    np.testing.assert_allclose(pairwise_iou(a, b), np.reshape(expected, (len(a), len(b))))


@given(boxes(), boxes())
def test_equals_shapely_also_for_degenerate_boxes(a: np.ndarray, b: np.ndarray):
    for p, q, score in zip(a, b, giou(a[: len(b)], b[: len(a)]), strict=False):
        first, second = shapely.box(*p), shapely.box(*q)
        union = first.area + second.area - first.intersection(second).area
        hull = shapely.box(*np.minimum(p, q)[:2], *np.maximum(p, q)[2:]).area
        if (p == q).all():
            assert score == 1
        elif hull == 0:
            assert score == -1
        else:
            expected = (first.intersection(second).area / union if union else 0) - (hull - union) / hull
            assert score == pytest.approx(expected, abs=1e-12)


@given(boxes(), boxes())
def test_properties(a: np.ndarray, b: np.ndarray):
    iou, generalised = pairwise_iou(a, b), pairwise_giou(a, b)
    assert iou.shape == generalised.shape == (len(a), len(b))
    assert ((iou >= 0) & (iou <= 1) & (generalised >= -1) & (generalised <= iou)).all()
    np.testing.assert_array_equal(iou, pairwise_iou(b, a).T)
    np.testing.assert_allclose(generalised, pairwise_giou(3 * a + 7, 3 * b + 7), atol=1e-12)
    np.testing.assert_array_equal(np.diag(pairwise_giou(a, a)), np.ones(len(a)))


def test_degenerate_boxes():
    point, line, square = [1, 1, 1, 1], [1, 1, 1, 5], [0, 0, 4, 4]
    np.testing.assert_array_equal(pairwise_iou([point, line], [point, line, square]), [[1, 0, 0], [0, 1, 0]])
    assert giou(point, line) == -1
    assert giou(point, [9, 9, 9, 9]) == -1
    assert giou(point, square) == 0  # inside: the union fills the hull
    assert giou(line, line) == 1


def test_a_one_pixel_wide_box_equals_itself():
    assert pairwise_iou([[3, 0, 4, 9]], [[3, 0, 4, 9]]) == 1


def test_giou_broadcasts_over_leading_dimensions():
    a, b = np.zeros((3, 1, 4)), np.array([[0, 0, 1, 1], [0, 0, 2, 2]])
    a[..., 2:] = 1
    np.testing.assert_allclose(giou(a, b), [[1, 0.25]] * 3)
    assert giou(a[0, 0], b[1]).shape == ()


def test_no_boxes():
    assert validate_boxes([]).shape == (0, 4)
    assert pairwise_iou([], [[0, 0, 1, 1]]).shape == (0, 1)
    assert pairwise_giou([[0, 0, 1, 1]], np.zeros((0, 4))).shape == (1, 0)
    assert area(np.zeros((0, 4))).shape == (0,)
    assert giou(np.zeros((0, 4)), np.zeros((0, 4))).shape == (0,)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([1, 2, 3, 4], r"row 7: expected shape \(N, 4\), got \(4,\); for one box pass"),
        ([[1, 2, 3]], r"row 7: expected shape \(N, 4\), got \(1, 3\)"),
        ([[0, 0, 1, 1], [3, 0, 1, 1]], r"row 7\[1\]: .*x1 <= x2 and y1 <= y2, got \[3.0, 0.0, 1.0, 1.0\]"),
        ([[0, 0, 1, np.nan]], r"row 7\[0\]: expected finite coordinates"),
        ([["a", 0, 1, 1]], r"row 7: expected numbers of shape \(N, 4\), got \[\['a'"),
        ([[0, 0, 1, 1], [2, 3]], r"row 7: expected numbers"),
    ],
)
def test_errors_say_what_is_wrong(wrong: list, message: str):
    with pytest.raises(DataError, match=message):
        validate_boxes(wrong, "row 7")


def test_giou_checks_its_boxes():
    with pytest.raises(SegRLError, match=r"b: expected shape \(\.\.\., 4\), got \(3,\)"):
        giou([0, 0, 1, 1], [0, 0, 1])
    with pytest.raises(SegRLError, match=r"a\[0\]: .*x1 <= x2"):
        giou([2, 0, 1, 1], [0, 0, 1, 1])
