"""Metrics against sets of pixels, scipy's bootstrap and brute force."""

import json

import numpy as np
import pytest
import references
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import stats

from segrl import metrics
from segrl.errors import DataError
from segrl.evaluation import constant_mask_baseline
from segrl.geometry import resize_mask


@st.composite
def mask_pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(array_shapes(min_dims=2, max_dims=3, max_side=5))
    return draw(arrays(np.bool_, shape)), draw(arrays(np.bool_, shape))


@given(mask_pairs())
def test_overlap_equals_sets_of_pixels(pair: tuple[np.ndarray, np.ndarray]):
    pred, true = pair
    dice, iou = metrics.dice(pred, true), metrics.iou(pred, true)
    assert dice == references.dice(pred, true)
    assert iou == references.iou(pred, true)
    assert dice == pytest.approx(2 * iou / (1 + iou))
    assert (metrics.dice(true, pred), metrics.iou(true, pred)) == (dice, iou)


@given(mask_pairs())
def test_0_255_and_0_1_are_the_same_mask(pair: tuple[np.ndarray, np.ndarray]):
    pred, true = pair
    assert metrics.dice(pred.astype(np.uint8), true.astype(np.uint8) * 255) == metrics.dice(pred, true)


def test_known_values():
    pred, true = np.zeros((4, 4), dtype=bool), np.zeros((4, 4), dtype=bool)
    pred[:2], true[1:3] = True, True
    assert metrics.dice(pred, true) == 0.5
    assert metrics.iou(pred, true) == pytest.approx(1 / 3)
    assert metrics.dice(true, true) == metrics.iou(true, true) == 1.0


def test_empty_masks():
    empty, full = np.zeros((3, 3), dtype=bool), np.ones((3, 3), dtype=bool)
    for score in (metrics.dice, metrics.iou):
        assert score(empty, empty) == 1.0
        assert score(full, empty) == score(empty, full) == 0.0


def test_failure():
    empty, full = np.zeros((3, 3), dtype=bool), np.ones((3, 3), dtype=bool)
    assert not metrics.failure(full, full, True)
    assert metrics.failure(full, full, False)
    assert metrics.failure(empty, full, True)
    assert metrics.failure(None, full, True)
    assert not metrics.failure(empty, empty, True)
    assert not metrics.failure(None, empty, True)
    assert metrics.failure(full, empty, True)


def test_overlap_errors():
    with pytest.raises(DataError, match=r"pred: expected the shape of true \(3, 3\), got \(2, 2\)"):
        metrics.dice(np.ones((2, 2), dtype=bool), np.ones((3, 3), dtype=bool))
    with pytest.raises(DataError, match="pred: expected a bool or integer mask, got float64"):
        metrics.iou(np.ones((2, 2)), np.ones((2, 2), dtype=bool))


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(0).beta(2, 5, 300)
    expected = stats.bootstrap((values,), np.mean, n_resamples=5000, method="percentile", rng=1).confidence_interval
    low, high = metrics.bootstrap_ci(values, n_resamples=5000)
    assert low == pytest.approx(expected.low, abs=0.002)
    assert high == pytest.approx(expected.high, abs=0.002)


def test_bootstrap_agrees_with_all_resamples():
    # All 3^3 equally likely resamples of three values, counted out.
    values = [0.0, 3.0, 9.0]
    means = [sum(draw) / 3 for draw in np.stack(np.meshgrid(values, values, values)).reshape(3, -1).T]
    expected = np.quantile(means, [0.1, 0.9])
    np.testing.assert_allclose(metrics.bootstrap_ci(values, level=0.8, n_resamples=20000), expected, atol=1e-9)


def test_bootstrap_covers_the_true_mean():
    rng = np.random.default_rng(3)
    intervals = [metrics.bootstrap_ci(rng.normal(size=60), level=0.9, n_resamples=400) for _ in range(300)]
    assert np.mean([low <= 0 <= high for low, high in intervals]) == pytest.approx(0.9, abs=0.05)


@given(arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 1)), st.integers(0, 99))
def test_bootstrap_stays_inside_the_values_and_repeats(values: np.ndarray, seed: int):
    low, high = metrics.bootstrap_ci(values, n_resamples=50, seed=seed)
    assert values.min() - 1e-12 <= low <= high <= values.max() + 1e-12
    assert (low, high) == metrics.bootstrap_ci(values, n_resamples=50, seed=seed)


def test_bootstrap_in_blocks_draws_every_resample(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(5).random(100)
    whole = metrics.bootstrap_ci(values)
    monkeypatch.setattr("segrl.metrics.summary.RESAMPLED_VALUES_AT_ONCE", 730)
    assert metrics.bootstrap_ci(values) == pytest.approx(whole, abs=0.01)


def test_paired_bootstrap_sees_what_unpaired_intervals_hide():
    easy = np.random.default_rng(6).random(200)
    better = easy + 0.01
    assert metrics.paired_bootstrap_ci(better, easy) == pytest.approx((0.01, 0.01))
    assert metrics.bootstrap_ci(better)[0] < metrics.bootstrap_ci(easy)[1]


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        ([], {}, "at least one sample, got none"),
        ([1.0, np.nan], {}, "expected finite numbers, got nan"),
        ([[1.0]], {}, r"expected shape \(n,\), got \(1, 1\)"),
        ([1.0], {"level": 95}, "expected 0 < level < 1 .*level=95"),
        ([1.0], {"n_resamples": 0}, "n_resamples=0"),
    ],
)
def test_bootstrap_errors(values: list, settings: dict, message: str):
    with pytest.raises(DataError, match=message):
        metrics.bootstrap_ci(values, **settings)


def test_paired_bootstrap_wants_the_same_samples():
    with pytest.raises(DataError, match=r"same samples, got shapes \(2,\) and \(3,\)"):
        metrics.paired_bootstrap_ci([1, 2], [1, 2, 3])


def test_summary():
    records = [
        {"dice": 1.0, "iou": 1.0, "fail": False, "modality": "CT", "anatomy": "Head", "name": "a"},
        {"dice": 0.5, "iou": 0.25, "fail": False, "modality": "MRI", "anatomy": "Head"},
        {"dice": 0.0, "iou": 0.0, "fail": True, "modality": "MRI", "anatomy": ""},
    ]
    summary = metrics.summarise(records)
    assert (summary["mdice"], summary["miou"], summary["n"]) == (0.5, pytest.approx(1.25 / 3), 3)
    assert summary["fail"] == pytest.approx(1 / 3)
    for name, key in (("mdice", "dice"), ("miou", "iou"), ("fail", "fail")):
        assert summary["ci95"][name] == pytest.approx(metrics.bootstrap_ci([record[key] for record in records]))
    assert list(summary["groups"]) == ["modality", "anatomy"]
    assert list(summary["groups"]["modality"]) == ["CT", "MRI"]
    assert summary["groups"]["anatomy"]["unspecified"] == {
        "mdice": 0.0,
        "miou": 0.0,
        "fail": 1.0,
        "n": 1,
        "ci95": {"mdice": [0.0, 0.0], "miou": [0.0, 0.0], "fail": [1.0, 1.0]},
    }
    assert summary["groups"]["modality"]["MRI"] == {
        key: value for key, value in metrics.summarise(records[1:]).items() if key != "groups"
    }
    assert json.loads(json.dumps(summary)) == summary


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "at least one sample, got none"),
        ([{"dice": 1, "iou": 1}], r"records\[0\]: missing \['fail'\], got the keys \['dice', 'iou'\]"),
        ([{"dice": 1, "iou": np.nan, "fail": 0}], r"records\[0\]: expected finite scores"),
        ([{"dice": 1, "iou": None, "fail": 0}], r"records\[0\]: expected numbers"),
    ],
)
def test_summary_errors(records: list, message: str):
    with pytest.raises(DataError, match=message):
        metrics.summarise(records)


VOLUMES = {"mdice": "dice", "hd95_mm": "hd95_mm"}


def test_summary_of_other_metrics_and_groupings():
    records = [
        {"dice": 0.5, "hd95_mm": 2.0, "lesion": "liver"},
        {"dice": 0.0, "hd95_mm": None, "lesion": "liver"},
        {"dice": 1.0, "hd95_mm": 0.0, "lesion": "kidney"},
        {"dice": 0.0, "hd95_mm": None},
    ]
    summary = metrics.summarise(records, metrics=VOLUMES, groupings=["lesion"], optional=["hd95_mm"])
    assert {key: value for key, value in summary.items() if key not in ("ci95", "groups")} == {
        "mdice": 0.375,
        "hd95_mm": 1.0,  # of two volumes, not (2 + 0) / 4
        "n": 4,
        "n_scored": {"hd95_mm": 2},
    }
    assert summary["ci95"]["hd95_mm"] == list(metrics.bootstrap_ci([2.0, 0.0]))
    assert list(summary["groups"]) == ["lesion"]
    assert list(summary["groups"]["lesion"]) == ["kidney", "liver", "unspecified"]
    assert summary["groups"]["lesion"]["unspecified"] == {
        "mdice": 0.0,
        "hd95_mm": None,
        "n": 1,
        "n_scored": {"hd95_mm": 0},
        "ci95": {"mdice": [0.0, 0.0], "hd95_mm": None},
    }
    assert json.loads(json.dumps(summary)) == summary


@given(st.lists(st.tuples(st.floats(0, 1), st.none() | st.floats(0, 300)), min_size=1, max_size=12))
def test_summary_of_values_that_may_be_missing_equals_their_own_bootstrap(values: list):
    records = [{"dice": dice, "hd95_mm": distance} for dice, distance in values]
    summary = metrics.summarise(records, metrics=VOLUMES, groupings=(), optional={"hd95_mm"})
    kept = [distance for _, distance in values if distance is not None]
    assert summary["n_scored"]["hd95_mm"] == len(kept)
    assert summary["mdice"] == pytest.approx(sum(dice for dice, _ in values) / len(values))
    assert summary["hd95_mm"] == (pytest.approx(sum(kept) / len(kept)) if kept else None)
    assert summary["ci95"]["hd95_mm"] == (list(metrics.bootstrap_ci(kept)) if kept else None)


def test_summary_refuses_what_an_optional_metric_cannot_be():
    record = {"dice": 0.5, "hd95_mm": None}
    with pytest.raises(DataError, match=r"optional: \['nsd'\]; expected some of the metrics \['mdice', 'hd95_mm'\]"):
        metrics.summarise([record], metrics=VOLUMES, optional=["nsd"])
    with pytest.raises(DataError, match=r"records\[1\]: missing \['hd95_mm'\]"):
        metrics.summarise([record, {"dice": 0.5}], metrics=VOLUMES, optional=["hd95_mm"])
    with pytest.raises(DataError, match=r"records\[0\]: expected numbers, got {'dice': 0.5, 'hd95_mm': None}"):
        metrics.summarise([record], metrics=VOLUMES)
    for value in (float("inf"), float("nan")):
        with pytest.raises(DataError, match=r"records\[0\]: expected finite scores"):
            metrics.summarise([{**record, "hd95_mm": value}], metrics=VOLUMES, optional=["hd95_mm"])


@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0, 0.6))
def test_constant_mask_is_the_best_cut(seed: int, count: int, density: float):
    rng = np.random.default_rng(seed)
    train = [rng.random((8, 8)) < density for _ in range(count)]
    mask, threshold = constant_mask_baseline(train, size=8)
    average = np.mean(train, axis=0)
    np.testing.assert_array_equal(mask, average > threshold)

    def score(candidate: np.ndarray) -> float:
        return float(np.mean([references.dice(candidate, true) for true in train]))

    # With at most 6 masks the default thresholds separate all averages, so no cut is better.
    cuts = [average > level for level in {0.0, *average.ravel()}]
    assert score(mask) == pytest.approx(max(map(score, cuts)), abs=1e-6)


def test_constant_mask_of_differing_sizes_and_given_thresholds():
    centre = np.zeros((40, 20), dtype=np.uint8)
    centre[10:30, 5:15] = 255
    everything = np.ones((7, 9), dtype=bool)
    mask, threshold = constant_mask_baseline(iter([centre, centre, everything]), size=16, thresholds=[0.5, 0.1])
    np.testing.assert_array_equal(mask, resize_mask(centre, (16, 16)))
    assert threshold == 0.5
    assert metrics.dice(resize_mask(mask, centre.shape), centre) == 1.0


def test_constant_mask_of_a_tie_has_the_lowest_threshold():
    train = [np.eye(4, dtype=bool), np.eye(4, dtype=bool)]
    assert constant_mask_baseline(train, size=4, thresholds=[0.5, 0.2, 0.9])[1] == 0.2


def test_constant_mask_of_mostly_empty_masks_is_empty():
    train = [np.zeros((4, 4), dtype=bool)] * 2 + [np.eye(4, dtype=bool)]
    mask, threshold = constant_mask_baseline(train, size=4)
    assert not mask.any()
    assert threshold == pytest.approx(1 / 3)


def test_constant_mask_of_empty_masks_is_empty():
    mask, _ = constant_mask_baseline([np.zeros((4, 4), dtype=bool)] * 2, size=4)
    assert not mask.any()


def test_constant_mask_errors():
    with pytest.raises(DataError, match="train_masks: expected at least one mask"):
        constant_mask_baseline([])
    with pytest.raises(DataError, match="thresholds: expected at least one candidate"):
        constant_mask_baseline([np.ones((2, 2), dtype=bool)], thresholds=[])
