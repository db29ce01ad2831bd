"""The text rewards of MedVol-R1."""

import json

import numpy as np
import pytest
from answers import FAR, HEIGHT, LEFT, RIGHT, WIDTH, in_answer, mask_of, read
from hypothesis import given
from hypothesis import strategies as st

from segrl.prediction import VolumeTarget
from segrl.rewards import make_reward
from segrl.rewards.boxes import box_hungarian
from segrl.rewards.medvol_r1 import slice_boxes, slice_format, slice_visibility

DEPTH = 5
SLICES = [mask_of(), mask_of(LEFT), mask_of(LEFT, RIGHT), mask_of([5, 5, 6, 6]), mask_of()]
VOLUME = VolumeTarget.from_mask(np.stack(SLICES), name="scan_7.nii")
EMPTY = VolumeTarget.from_mask(np.zeros((DEPTH, HEIGHT, WIDTH), dtype=bool))
ALL = [slice_format, slice_visibility, slice_boxes]


def says(number=None, *boxes, keep_list=True):
    """An answer that names a slice as the model writes it, counted from 1."""
    item = {} if number is None else {"slice": number}
    if boxes or keep_list:
        item["bbox_2d_list"] = [list(box) for box in boxes]
    return read(in_answer(json.dumps(item)))


NOTHING = says(keep_list=False)


def pay(prediction, target=VOLUME):
    return tuple(reward(prediction, target) for reward in ALL)


def test_known_values():
    assert pay(says(3, LEFT, RIGHT)) == (1.0, 1.0, 1.0)
    assert pay(says(3, LEFT)) == (1.0, 1.0, 0.5)
    assert pay(says(3, LEFT, RIGHT, FAR)) == (1.0, 1.0, pytest.approx(2 / 3))
    assert pay(says(2, LEFT)) == (1.0, 0.5, 1.0)
    assert pay(says(4, [5, 5, 6, 6])) == (1.0, pytest.approx(1 / 240), 1.0)
    assert pay(says(2, LEFT, LEFT)) == (1.0, 0.5, 0.5)


def test_a_slice_outside_the_volume_or_without_foreground():
    assert pay(says(1, LEFT)) == (1.0, 0.0, 0.0)
    assert pay(says(1)) == (1.0, 0.0, 0.0)  # no box where no box is, but in a volume that has some
    assert pay(says(6, LEFT)) == (1.0, 0.0, 0.0)
    assert pay(says(10**5, LEFT)) == (1.0, 0.0, 0.0)
    assert pay(says(0, LEFT)) == (0.0, 0.0, 0.0)
    assert pay(says(-1, LEFT)) == (0.0, 0.0, 0.0)
    assert pay(says(2.5, LEFT)) == (0.0, 0.0, 0.0)


def test_no_slice():
    assert pay(NOTHING) == (1.0, 0.0, 0.0)
    boxes_only = read(in_answer(json.dumps([{"bbox_2d": LEFT}, {"bbox_2d": RIGHT}])))
    assert boxes_only.valid
    assert pay(boxes_only) == (0.0, 0.0, 0.0)


def test_a_volume_without_foreground():
    assert pay(NOTHING, EMPTY) == (1.0, 1.0, 1.0)
    assert pay(says(3), EMPTY) == (1.0, 0.0, 0.0)
    assert pay(says(3, LEFT), EMPTY) == (1.0, 0.0, 0.0)
    assert pay(read(in_answer(json.dumps({"bbox_2d": LEFT}))), EMPTY) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("target", [VOLUME, EMPTY], ids=["lesions", "no lesion"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "<think>a</think>",
        in_answer("slice 3"),
        in_answer('{"slice": 3, "bbox_2d_list": [[4, 4, 16, 14], [22, 18, 34, 28]]}') + " Done.",
        in_answer('{"slice": 3, "bbox_2d_list": [[4, 4, 16, 14]]}') * 2,
        in_answer('{"slice": 3, "slice": 2, "bbox_2d_list": [[4, 4, 16, 14]]}'),
        in_answer('{"slice": 3, "bbox_2d_list": [[16, 4, 4, 14]]}'),
        in_answer('[{"slice": 3, "bbox_2d_list": [[4, 4, 16, 14]]}, {"slice": 2, "bbox_2d_list": []}]'),
    ],
)
def test_an_invalid_text_earns_nothing(text, target):
    assert pay(read(text), target) == (0.0, 0.0, 0.0)


def test_an_invalid_text_is_paid_for_what_it_says_on_request():
    prediction = read(in_answer('{"slice": 3, "bbox_2d_list": [[4, 4, 16, 14], [22, 18, 34, 28]]}') + " Done.")
    assert slice_visibility(prediction, VOLUME, require_valid=False) == 1.0
    assert slice_boxes(prediction, VOLUME, require_valid=False) == 1.0


@given(st.integers(1, DEPTH + 2), st.lists(st.sampled_from([LEFT, RIGHT, FAR, [4, 4, 16, 9]]), max_size=4))
def test_scores_follow_from_the_areas_and_boxes_of_the_slice(number, boxes):
    found = pay(says(number, *boxes))
    areas = [int(mask.sum()) for mask in SLICES]
    area = areas[number - 1] if number <= DEPTH else 0
    on_slice = box_hungarian(says(number, *boxes), VOLUME.at(number - 1)) if area else 0.0
    assert found == (1.0, pytest.approx(area / max(areas)), pytest.approx(on_slice))


def test_a_plain_trainer_can_call_them():
    text = in_answer('{"slice": 3, "bbox_2d_list": [[4, 4, 16, 14], [22, 18, 34, 28]]}')
    for name in ("slice_format", "slice_visibility", "slice_boxes"):
        reward = make_reward(name, frame="original_px", require_seg=False, answer_format="json")
        assert reward.volume
        assert reward(completions=[text, "no"], volume=[np.stack(SLICES)] * 2) == [1.0, 0.0]
