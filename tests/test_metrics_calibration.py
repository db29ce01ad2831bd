"""Confidence against scores."""

import numpy as np
import pytest
from PIL import Image
from scipy.stats import beta

from segrl.errors import DataError
from segrl.metrics import calibration, certain_half_gain, reliability, risk_coverage
from segrl.reports.charts import calibration_chart


def test_a_calibrated_system_has_no_error():
    rng = np.random.default_rng(0)
    sure = rng.random(20000)
    right = rng.random(20000) < sure
    assert reliability(sure, right)["ece"] < 0.01
    assert reliability(sure, right)["ece"] < reliability(np.sqrt(sure), right)["ece"]


def test_bins_by_a_loop():
    rng = np.random.default_rng(0)
    sure, scores = rng.random(300), rng.random(300)
    sure[:3] = 0.0, 1.0, 0.3
    found = reliability(sure, scores, bins=7)
    slow = []
    for low in np.arange(7) / 7:
        here = [n for n in range(300) if low <= sure[n] < low + 1 / 7 or (sure[n] == 1 and low > 0.8)]
        slow.append((np.mean([sure[n] for n in here]), np.mean([scores[n] for n in here]), len(here)))
    assert np.allclose([[b["confidence"], b["score"], b["n"]] for b in found["bins"]], slow)
    assert found["ece"] == pytest.approx(sum(abs(a - b) * n for a, b, n in slow) / 300)


def test_risk_and_coverage_by_a_loop():
    rng = np.random.default_rng(0)
    sure, scores = rng.permutation(50) / 50, rng.random(50)
    found = risk_coverage(sure, scores)
    ordered = sorted(range(50), key=lambda n: -sure[n])
    slow = [1 - np.mean([scores[n] for n in ordered[:kept]]) for kept in range(1, 51)]
    assert np.allclose(found["risk"], slow)
    assert found["coverage"][-1] == 1.0
    assert found["aurc"] == pytest.approx(np.mean(slow))


def test_equal_confidences_do_not_depend_on_the_order():
    scores = np.random.default_rng(0).random(30)
    one, other = risk_coverage([0.5] * 30, scores), risk_coverage([0.5] * 30, scores[::-1])
    assert np.allclose(one["risk"], other["risk"])
    assert np.allclose(one["risk"], 1 - scores.mean())


def test_the_interval_of_the_halves():
    sure = np.linspace(0, 1, 200)
    scores = beta(5 * (sure + 0.1), 2).rvs(random_state=0)
    mean, low, high = certain_half_gain(sure, scores)
    assert mean == pytest.approx(scores[100:].mean() - scores[:100].mean())
    assert 0 < low < mean < high
    noise = certain_half_gain(np.random.default_rng(1).random(200), np.random.default_rng(2).random(200))
    assert noise[1] < 0 < noise[2]
    assert certain_half_gain(sure, scores) == certain_half_gain(sure, scores)


@pytest.mark.parametrize(
    ("sure", "scores", "message"),
    [
        ([], [], r"shapes \(0,\) and \(0,\)"),
        ([0.5], [0.5, 0.5], r"shapes \(1,\) and \(2,\)"),
        ([1.5], [0.5], r"confidence: 1.5; expected numbers in \[0, 1\]"),
        ([0.5], [np.nan], "score: nan"),
    ],
)
def test_what_is_no_pair(sure, scores, message):
    for function in (reliability, risk_coverage):
        with pytest.raises(DataError, match=message):
            function(sure, scores)


def test_one_answer_and_its_chart(tmp_path):
    found = calibration([0.5], [1.0])
    assert found["certain_half_gain"] is None
    with pytest.raises(DataError, match="two halves need 2 or more"):
        certain_half_gain([0.5], [1.0])
    with Image.open(calibration_chart(found, tmp_path / "new" / "a.png")) as chart:
        assert chart.width > 600
