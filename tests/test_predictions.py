import dataclasses
import pickle

import numpy as np
import pytest
from PIL import Image

from segrl.errors import DataError
from segrl.predictions import Prediction, Status, Target, VolumeTarget


def make_prediction(**changes):
    fields = {"text": "t", "reasoning": "r", "answer": "a", "boxes": [[1, 2, 3, 4]], "status": Status.VALID}
    return Prediction(**{**fields, "has_seg": True, **changes})


def two_lesions():
    mask = np.zeros((6, 8), dtype=bool)
    mask[0:2, 0:3] = True
    mask[4, 6] = True
    return mask


def test_only_a_valid_status_is_valid():
    assert make_prediction().valid
    assert not any(make_prediction(status=status).valid for status in Status if status is not Status.VALID)
    assert Status("no_answer") is Status.NO_ANSWER
    assert f"{Status.NO_SEG_TOKEN}" == "no_seg_token"


def test_with_mask_is_a_copy():
    prediction = make_prediction()
    masked = prediction.with_mask(two_lesions())
    assert prediction.mask is None
    assert masked.mask is not None
    assert masked.mask.sum() == 7
    assert masked.text == prediction.text
    assert masked.boxes.dtype == np.float64


@pytest.mark.parametrize("mask", [np.zeros((4, 4)), np.zeros((4, 4), np.uint8), np.zeros((1, 1, 4, 4), bool), [[True]]])
def test_a_mask_of_logits_or_of_another_shape_is_refused(mask):
    with pytest.raises(DataError, match=r"Prediction\.mask is a .*expected an \(H, W\) bool numpy array"):
        make_prediction().with_mask(mask)
    with pytest.raises(DataError, match=r"Target\.mask of 'a\.png'"):
        Target(mask, np.zeros((0, 4)), name="a.png")


def test_the_mask_of_a_volume():
    volume = np.stack([two_lesions(), np.zeros_like(two_lesions())])
    assert make_prediction().with_mask(volume).mask is volume
    with pytest.raises(
        DataError, match=r"Prediction\.mask is a float64 array.*expected a \(D, H, W\) bool numpy array"
    ):
        make_prediction().with_mask(np.zeros((2, 4, 4)))
    with pytest.raises(DataError, match=r"Target\.mask"):
        Target(volume, np.zeros((0, 4)))


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_prediction().text = "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_target_from_mask_has_one_box_per_component_and_keeps_its_fields():
    target = Target.from_mask(two_lesions(), query="Where?", lesion="cyst", name="a.png")
    assert target.boxes.tolist() == [[0, 0, 3, 2], [6, 4, 7, 5]]
    assert (target.height, target.width, target.empty) == (6, 8, False)
    assert (target.query, target.lesion, target.name, target.modality) == ("Where?", "cyst", "a.png", "")


@pytest.mark.parametrize("value", [1, 255])
def test_target_from_an_image_or_array_of_any_foreground_value(value):
    stored = two_lesions().astype(np.uint8) * value
    for mask in (stored, Image.fromarray(stored), stored.tolist()):
        assert np.array_equal(Target.from_mask(mask).mask, two_lesions())


def test_empty_target():
    target = Target.from_mask(np.zeros((3, 5), dtype=np.uint8))
    assert target.empty
    assert target.boxes.shape == (0, 4)


def test_a_mask_that_is_not_binary_names_the_row():
    with pytest.raises(DataError, match=r"scan_7\.png"):
        Target.from_mask(np.arange(12).reshape(3, 4), name="scan_7.png")


def test_bad_boxes_are_refused():
    with pytest.raises(DataError, match=r"Prediction\.boxes\[0\]"):
        make_prediction(boxes=[[3, 0, 1, 1]])


def test_records_pickle():
    prediction, target = pickle.loads(pickle.dumps((make_prediction(), Target.from_mask(two_lesions()))))
    assert prediction.valid
    assert np.array_equal(target.mask, two_lesions())


def test_points_scores_and_probabilities_are_checked():
    boxes = np.array([[0.0, 0, 2, 2]])
    assert make_prediction(boxes=boxes).points.shape == (0, 2)
    assert make_prediction(points=[]).points.shape == (0, 2)
    with pytest.raises(DataError, match=r"Prediction\.points: expected finite numbers of shape \(P, 2\)"):
        make_prediction(points=np.array([[1.0, np.nan]]))
    with pytest.raises(DataError, match=r"Prediction\.scores: expected 1 numbers in \[0, 1\], one per box"):
        make_prediction(boxes=boxes, scores=[0.5, 0.5])
    with pytest.raises(DataError, match=r"Prediction\.scores"):
        make_prediction(boxes=boxes, scores=[1.5])
    mask = two_lesions()
    assert make_prediction().with_mask(mask, mask.astype(np.float32)).probability is not None
    with pytest.raises(DataError, match=r"Prediction\.probability: expected the shape of the mask \(6, 8\), got"):
        make_prediction().with_mask(mask, np.zeros((2, 2), np.float32))


def test_the_points_of_a_target_lie_in_its_lesions():
    mask = np.zeros((9, 12), dtype=bool)
    mask[1:6, 1:6] = True
    mask[7, 11] = True
    target = Target.from_mask(mask)
    assert target.points.tolist() == [[3.5, 3.5], [11.5, 7.5]]
    assert Target(mask, np.array([[6.0, 0, 10, 2]])).points.tolist() == [[8, 1]]
    assert Target.from_mask(np.zeros((3, 3), bool)).points.shape == (0, 2)


class TestVolume:
    def volume(self):
        mask = np.zeros((3, 6, 8), dtype=np.uint8)
        mask[1:] = two_lesions()
        mask[2, 0, 0] = 0
        return VolumeTarget.from_mask(mask, (5.0, 0.7, 0.7), lesion="cyst", name="ct_1")

    def test_slices(self):
        volume = self.volume()
        assert volume.slice_areas.tolist() == [0, 7, 6]
        assert (volume.depth, volume.height, volume.width, volume.empty) == (3, 6, 8, False)
        assert volume.at(1).boxes.tolist() == Target.from_mask(two_lesions()).boxes.tolist()
        assert volume.at(0).empty
        assert (volume.at(1).lesion, volume.at(1).name) == ("cyst", "ct_1")
        assert volume.at(1) is volume.at(1)

    def test_empty(self):
        assert VolumeTarget.from_mask(np.zeros((2, 3, 3), bool)).empty

    @pytest.mark.parametrize("index", [-1, 3])
    def test_a_slice_outside(self, index):
        with pytest.raises(DataError, match=rf"ct_1: slice {index}; expected 0 <= slice < 3"):
            self.volume().at(index)

    def test_what_is_no_volume(self):
        with pytest.raises(DataError, match=r"a\.nii: expected 3 dimensions, got shape \(6, 8\)"):
            VolumeTarget.from_mask(two_lesions(), name="a.nii")
        with pytest.raises(DataError, match="threshold it first"):
            VolumeTarget.from_mask(np.zeros((1, 2, 2)))
        with pytest.raises(DataError, match=r"VolumeTarget\.mask of 'x' is a bool array .*expected a \(D, H, W\)"):
            VolumeTarget(two_lesions(), name="x")
        with pytest.raises(DataError, match=r"spacing_mm.*\(0, 1, 1\); expected three positive millimetres"):
            VolumeTarget.from_mask(np.zeros((1, 2, 2), bool), (0, 1, 1))

    def test_pickles(self):
        volume = pickle.loads(pickle.dumps(self.volume()))
        assert volume.at(2).boxes.tolist() == self.volume().at(2).boxes.tolist()
