import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from segrl.data import CT_WINDOW, Intensity, intensity_for, scale_intensity, uniform_slices
from segrl.data.volumes.intensity import check_intensity, scaling_note
from segrl.errors import DataError

ENDS = st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)).filter(lambda ends: ends[0] < ends[1])


@given(ENDS)
def test_text_form_is_read_back_exactly(ends):
    intensity = Intensity("window", *ends)
    assert Intensity.parse(str(intensity)) == intensity


def test_text_form_is_short():
    assert str(CT_WINDOW) == "window:-160:240"
    assert str(Intensity("percentile", 0.5, 99.5)) == "percentile:0.5:99.5"
    assert Intensity.parse(" percentile:1:99 ") == Intensity("percentile", 1, 99)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"intensity '': expected 'window:<low>:<high>' or 'percentile:<low>:<high>'"),
        ("window", r"intensity 'window': expected 'window:<low>"),
        ("window:1", r"intensity 'window:1': expected"),
        ("window:1:2:3", r"intensity 'window:1:2:3': expected"),
        ("window:a:2", r"intensity 'window:a:2': expected .*for example 'window:-160:240'"),
        ("level:1:2", r"intensity kind 'level': expected 'window' or 'percentile'"),
        ("window:2:2", r"intensity window:2:2: expected two finite numbers, the lower one first"),
        ("window:nan:2", r"intensity window:nan:2: expected two finite numbers"),
        ("window:0:inf", r"intensity window:0:inf: expected two finite numbers"),
        ("percentile:-1:99", r"intensity percentile:-1:99: expected percentiles from 0 to 100"),
        ("percentile:1:101", r"intensity percentile:1:101: expected percentiles from 0 to 100"),
    ],
)
def test_bad_text(text, message):
    with pytest.raises(DataError, match=message):
        Intensity.parse(text)


def test_ct_window_of_known_values():
    voxels = np.array([[[-1000, -160, -60, 40, 140, 240, 3000]]], np.int16)
    assert scale_intensity(voxels, CT_WINDOW).tolist() == [[[0, 0, 64, 128, 191, 255, 255]]]
    assert scale_intensity(voxels, CT_WINDOW).dtype == np.uint8


def test_percentiles_are_of_the_voxels_that_are_not_zero():
    voxels = np.zeros((3, 20, 20), np.float32)
    voxels[1, :5, :20] = np.arange(1, 101).reshape(5, 20)
    grey = scale_intensity(voxels, Intensity("percentile", 0, 100))
    assert grey[1, 0, 0] == 0
    assert grey[1, 4, 19] == 255
    assert grey[1, 2, 10] == round(255 * 50 / 99)
    assert grey[0].max() == grey[2].max() == 0


@given(
    hnp.arrays(np.int16, hnp.array_shapes(min_dims=3, max_dims=3, max_side=4), elements=st.integers(-2000, 3000)),
    st.sampled_from([Intensity("window", -160, 240), Intensity("window", 0.5, 7), Intensity("percentile", 2, 97)]),
)
def test_scaling_agrees_with_a_slow_oracle(voxels, intensity):
    low, high = intensity.low, intensity.high
    if intensity.kind == "percentile":
        inside = sorted(voxels[voxels != 0].tolist())
        if inside:
            low, high = (
                np.interp(end / 100 * (len(inside) - 1), range(len(inside)), inside) for end in (low, high)
            )  # linear between the ranks
        if not inside or low == high:
            low, high = voxels.min(), voxels.max()
    grey = scale_intensity(voxels, intensity)
    for found, value in zip(grey.ravel().tolist(), voxels.ravel().tolist(), strict=True):
        share = 0.0 if low == high else min(1.0, max(0.0, (value - low) / (high - low)))
        assert abs(found - 255 * share) <= 0.5 + 1e-6


@given(st.integers(-100, 100), st.sampled_from([np.uint8, np.int16, np.int32, np.float32, np.float64]))
def test_a_constant_volume_is_black_under_percentiles(value, dtype):
    voxels = np.full((2, 3, 4), abs(value), dtype)
    assert not scale_intensity(voxels, Intensity("percentile", 0.5, 99.5)).any()


def test_a_binary_volume_keeps_its_foreground_under_percentiles():
    voxels = np.zeros((2, 3, 4), np.uint8)
    voxels[0, 1, 2] = 7
    grey = scale_intensity(voxels, Intensity("percentile", 0.5, 99.5))
    np.testing.assert_array_equal(grey, 255 * (voxels == 7))


def test_scaling_leaves_its_input_alone():
    voxels = np.arange(24.0).reshape(2, 3, 4)
    kept = voxels.copy()
    scale_intensity(voxels, Intensity("percentile", 5, 95))
    np.testing.assert_array_equal(voxels, kept)


@pytest.mark.parametrize("intensity", [CT_WINDOW, Intensity("percentile", 1, 99)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite(bad, intensity):
    voxels = np.zeros((2, 3, 4), np.float32)
    voxels[1, 1, :2] = bad
    for call in (lambda: scale_intensity(voxels, intensity), lambda: intensity_for("CT", voxels)):
        with pytest.raises(DataError, match=r"voxels: 2 of 24 are NaN or infinite; replace them, as with numpy"):
            call()


@pytest.mark.parametrize("voxels", [np.zeros((3, 4)), np.zeros((0, 3, 4)), np.zeros((1, 2, 2), complex), [[["a"]]]])
def test_voxels_of_another_kind(voxels):
    with pytest.raises(DataError, match=r"voxels .*: expected real numbers of the shape \(D, H, W\), not empty"):
        scale_intensity(voxels, CT_WINDOW)


@pytest.mark.parametrize(
    ("modality", "low", "high", "text"),
    [
        ("CT", -1024, 3071, "window:-160:240"),
        ("ct scan", -100, 80, "window:-160:240"),
        ("Computed tomography", -1000, 200, "window:-160:240"),
        ("contrast-enhanced CT", -1000, 200, "window:-160:240"),
        ("CT", 0, 255, "window:0:255"),
        ("CT", 3, 17, "window:0:255"),
        ("CT", 0, 1, "window:0:1"),
        ("CT", 0, 1023, "percentile:0.5:99.5"),  # no air, so not in Hounsfield units
        ("MRI", 0, 255, "percentile:0.5:99.5"),
        ("MRI", -3, 3, "percentile:0.5:99.5"),
        ("OCT", -3, 3, "percentile:0.5:99.5"),
        ("", 0, 4000, "percentile:0.5:99.5"),
    ],
)
def test_intensity_follows_modality_and_range(modality, low, high, text):
    assert str(intensity_for(modality, np.array([[[low, high]]]))) == text


@given(st.integers(1, 700), st.integers(1, 130))
def test_uniform_slices_are_spread_evenly(depth, count):
    chosen = uniform_slices(depth, count)
    assert chosen.dtype == np.int64
    assert len(chosen) == min(depth, count)
    assert 0 <= chosen[0] <= chosen[-1] < depth
    steps = np.diff(chosen)
    assert (steps > 0).all()
    if len(chosen) > 1:
        assert (chosen[0], chosen[-1]) == (0, depth - 1)
        assert np.ptp(steps) <= 1
        # no slice of the volume is further from a chosen one than half a step, rounded up
        assert np.abs(np.arange(depth)[:, None] - chosen).min(axis=1).max() <= (depth - 1) / (len(chosen) - 1) / 2 + 1


def test_uniform_slices_of_known_depths():
    assert uniform_slices(1, 64).tolist() == [0]
    assert uniform_slices(5, 64).tolist() == [0, 1, 2, 3, 4]
    assert uniform_slices(5, 1).tolist() == [2]
    assert uniform_slices(100, 2).tolist() == [0, 99]
    assert uniform_slices(7, 4).tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize(("depth", "count", "name"), [(0, 4, "depth=0"), (4, 0, "count=0"), (-1, 4, "depth=-1")])
def test_uniform_slices_needs_numbers_above_zero(depth, count, name):
    with pytest.raises(DataError, match=rf"{name}: expected 1 slice or more"):
        uniform_slices(depth, count)


# ---- what is left after scaling ------------------------------------------------------------------------------------

HU = np.random.default_rng(0).normal(0, 300, (4, 32, 32)).clip(-1024, 3000).round()
SPELLINGS = [
    *("CT", "ct", "CT scan", "Computed tomography", "Computed Tomography (CT)", "computerized tomography"),
    *("CECT", "contrast-enhanced CT", "NCCT", "CT angiography", "CTA", "CBCT", "HRCT", "LDCT", "PET/CT", "CT_abdomen"),
]
NOT_HU = {
    "z-scored": (HU - HU.mean()) / HU.std(),
    "-1 to 1": (HU.clip(-160, 240) - 40) / 200,
    "HU / 1000": HU / 1000,
    "0 to 2": (HU.clip(-160, 240) + 160) / 200,
    "only air": HU.clip(-1024, 0) - 400,
}


def levels(voxels, intensity):
    return len(np.unique(scale_intensity(voxels, intensity)))


@pytest.mark.parametrize("case", NOT_HU)
@pytest.mark.parametrize("modality", [*SPELLINGS, "MRI", "PET", ""])
def test_no_scan_goes_blank_whatever_its_modality_is_called(modality, case):
    intensity = intensity_for(modality, NOT_HU[case])
    assert levels(NOT_HU[case], intensity) > 100
    note = scaling_note(modality, NOT_HU[case], intensity)
    assert ("not in Hounsfield units: scaled by percentile:0.5:99.5" in note) == (modality in SPELLINGS)


@pytest.mark.parametrize("modality", SPELLINGS)
def test_hounsfield_units_keep_their_window_without_a_word(modality):
    assert intensity_for(modality, HU) == CT_WINDOW
    assert scaling_note(modality, HU, CT_WINDOW) == ""


@pytest.mark.parametrize("modality", ["OCT", "SPECT", "MRI", "PET", ""])
def test_other_modalities_are_no_ct(modality):
    intensity = intensity_for(modality, HU)
    assert str(intensity) == "percentile:0.5:99.5"
    assert scaling_note(modality, HU, intensity) == ""


def test_a_scan_of_few_values_keeps_them():
    """A label map, or two tissues: nothing is lost, so nothing is said."""
    voxels = np.where(HU > 0, 60.0, -1000.0)
    assert intensity_for("CT", voxels) == CT_WINDOW
    check_intensity(voxels, CT_WINDOW)
    check_intensity(np.full((2, 3, 4), 7.0), CT_WINDOW)


def test_a_hot_spot_does_not_blank_the_rest():
    voxels = np.abs(HU)
    voxels[0, 0, 0] = 1e9
    assert levels(voxels, intensity_for("PET", voxels)) > 100
    with pytest.raises(DataError, match=r"intensity percentile:0:100: leaves 2 grey levels of voxels from 0 to 1e\+09"):
        check_intensity(voxels, Intensity("percentile", 0, 100))


@pytest.mark.parametrize(("case", "left"), [("z-scored", 5), ("-1 to 1", 3), ("HU / 1000", 3)])
def test_a_given_window_that_blanks_a_scan_is_refused(case, left):
    with pytest.raises(
        DataError,
        match=rf"window:-160:240: leaves {left} grey levels of voxels from .*; expected at least 16",
    ):
        check_intensity(NOT_HU[case], CT_WINDOW)
    check_intensity(HU, CT_WINDOW)
