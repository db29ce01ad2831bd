import dataclasses
import pickle

import numpy as np
import pytest
from PIL import Image

from segrl.errors import DataError
from segrl.prediction import Prediction, Status, Target


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


@pytest.mark.parametrize("mask", [np.zeros((4, 4)), np.zeros((4, 4), np.uint8), np.zeros((1, 4, 4), bool), [[True]]])
def test_a_mask_of_logits_or_of_another_shape_is_refused(mask):
    with pytest.raises(DataError, match=r"Prediction\.mask is a .*expected an \(H, W\) bool numpy array"):
        make_prediction().with_mask(mask)
    with pytest.raises(DataError, match=r"Target\.mask of 'a\.png'"):
        Target(mask, np.zeros((0, 4)), name="a.png")


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
