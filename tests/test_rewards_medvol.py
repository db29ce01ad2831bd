"""The rewards of MedVol-R1."""

import json

import numpy as np
import pytest
from answers import FAR, HEIGHT, LEFT, RIGHT, WIDTH, in_answer, mask_of, read
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from segrl.errors import RewardError
from segrl.metrics import dice
from segrl.predictions import NOT_SHOWN, Frame, VolumeTarget
from segrl.rewards import CompletionFormat, make_reward
from segrl.rewards.builtin import box_hungarian, propagated_dice, slice_boxes, slice_format, slice_visibility

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


def score_of(prediction, target=VOLUME):
    return tuple(reward(prediction, target) for reward in ALL)


def test_known_values():
    assert score_of(says(3, LEFT, RIGHT)) == (1.0, 1.0, 1.0)
    assert score_of(says(3, LEFT)) == (1.0, 1.0, 0.5)
    assert score_of(says(3, LEFT, RIGHT, FAR)) == (1.0, 1.0, pytest.approx(2 / 3))
    assert score_of(says(2, LEFT)) == (1.0, 0.5, 1.0)
    assert score_of(says(4, [5, 5, 6, 6])) == (1.0, pytest.approx(1 / 240), 1.0)
    assert score_of(says(2, LEFT, LEFT)) == (1.0, 0.5, 0.5)


def test_a_slice_outside_the_volume_or_without_foreground():
    assert score_of(says(1, LEFT)) == (1.0, 0.0, 0.0)
    assert score_of(says(1)) == (0.0, 0.0, 0.0)  # no box where no box is, but in a volume that has some
    assert score_of(says(6, LEFT)) == (1.0, 0.0, 0.0)
    assert score_of(says(10**5, LEFT)) == (1.0, 0.0, 0.0)
    assert score_of(says(0, LEFT)) == (0.0, 0.0, 0.0)
    assert score_of(says(-1, LEFT)) == (0.0, 0.0, 0.0)
    assert score_of(says(2.5, LEFT)) == (0.0, 0.0, 0.0)


def test_no_slice():
    assert score_of(NOTHING) == (1.0, 0.0, 0.0)
    boxes_only = read(in_answer(json.dumps([{"bbox_2d": LEFT}, {"bbox_2d": RIGHT}])))
    assert boxes_only.valid
    assert score_of(boxes_only) == (0.0, 0.0, 0.0)


def test_a_volume_without_foreground():
    assert score_of(NOTHING, EMPTY) == (1.0, 1.0, 1.0)
    assert score_of(says(3), EMPTY) == (0.0, 0.0, 0.0)
    assert score_of(says(3, LEFT), EMPTY) == (1.0, 0.0, 0.0)
    assert score_of(read(in_answer(json.dumps({"bbox_2d": LEFT}))), EMPTY) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"slice": 3, "bbox_2d_list": [[4, 4, 16, 14]]}', 1.0),
        ('{"slice": 9999, "bbox_2d_list": [[4, 4, 16, 14]]}', 1.0),  # the other rewards see that there is none
        ('```json\n{"slice": 3, "bbox_2d_list": [[4, 4, 16, 14]]}\n```', 1.0),
        ('[{"slice": 3, "bbox_2d_list": [[4, 4, 16, 14]]}, {"point_2d": [5, 5]}]', 1.0),
        ('{"slice": 3}', 0.0),
        ('{"slice": 3, "bbox_2d_list": []}', 0.0),
        ('{"slice": 3, "bbox_2d": [4, 4, 16, 14]}', 0.0),
        ('{"slice": 3, "bbox_2d_list": [[4, 4, 16]]}', 0.0),
        ('{"bbox_2d_list": [[4, 4, 16, 14]]}', 0.0),
        ('{"point_2d": [5, 5]}', 0.0),
        ('{"slice": 3, "bbox_2d_list": [], "boxes": [[4, 4, 16, 14]]}', 0.0),
    ],
)
def test_the_format_asks_for_a_slice_and_a_box(answer, score):
    for allow_empty in (True, False):
        assert slice_format(read(in_answer(answer)), VOLUME, allow_empty=allow_empty) == score


@pytest.mark.parametrize("answer", ["{}", "[]", '{"bbox_2d_list": []}'])
def test_the_answer_for_nothing_found_is_a_setting(answer):
    prediction = read(in_answer(answer))
    assert slice_format(prediction, EMPTY) == slice_format(prediction, VOLUME) == 1.0
    assert slice_format(prediction, EMPTY, allow_empty=False) == 0.0
    strict = make_reward("medvol_r1", allow_empty=False).parts[0][0]
    assert (strict.name, strict.settings) == ("slice_format", {"allow_empty": False})


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
def test_an_invalid_text_scores_nothing(text, target):
    assert score_of(read(text), target) == (0.0, 0.0, 0.0)


def test_an_invalid_text_scores_for_what_it_says_on_request():
    prediction = read(in_answer('{"slice": 3, "bbox_2d_list": [[4, 4, 16, 14], [22, 18, 34, 28]]}') + " Done.")
    assert slice_visibility(prediction, VOLUME, require_valid=False) == 1.0
    assert slice_boxes(prediction, VOLUME, require_valid=False) == 1.0


@given(st.integers(1, DEPTH + 2), st.lists(st.sampled_from([LEFT, RIGHT, FAR, [4, 4, 16, 9]]), max_size=4))
def test_scores_follow_from_the_areas_and_boxes_of_the_slice(number, boxes):
    found = score_of(says(number, *boxes))
    areas = [int(mask.sum()) for mask in SLICES]
    area = areas[number - 1] if number <= DEPTH else 0
    on_slice = box_hungarian(says(number, *boxes), VOLUME.at(number - 1)) if area else 0.0
    assert found == (float(bool(boxes)), pytest.approx(area / max(areas)), pytest.approx(on_slice))


def test_a_plain_trainer_can_call_them():
    text = in_answer('{"slice": 3, "bbox_2d_list": [[4, 4, 16, 14], [22, 18, 34, 28]]}')
    for name in ("slice_format", "slice_visibility", "slice_boxes"):
        reward = make_reward(name, frame="original_px", require_seg=False, answer_format="json")
        assert reward.volume
        assert reward(completions=[text, "no"], volume=[np.stack(SLICES)] * 2) == [1.0, 0.0]


# --- slices that were not shown


def read_shown(text, slices):
    """The answer of a model that sees only these slices of the volume."""
    frame = Frame("original_px", (WIDTH, HEIGHT), slices=slices)
    return CompletionFormat(require_seg=False, answer_format="json").parse(in_answer(text), frame)


def test_the_named_slice_is_the_one_in_the_whole_volume():
    shown = read_shown('{"slice": 2, "bbox_2d_list": [[4, 4, 16, 14], [22, 18, 34, 28]]}', (0, 2, 4))
    assert shown.slice_index == 2
    assert score_of(shown) == (1.0, 1.0, 1.0)
    assert propagated_dice(shown.with_mask(VOLUME.mask), VOLUME) == 1.0


def test_a_slice_that_was_not_shown():
    """`NOT_SHOWN` is -1, which as an index would be the last slice: here that one is the best."""
    best_last = VolumeTarget.from_mask(np.stack([SLICES[0], SLICES[1], SLICES[2]]))
    for target, nothing in ((best_last, 0.0), (EMPTY, 0.0)):
        shown = read_shown('{"slice": 3, "bbox_2d_list": [[4, 4, 16, 14], [22, 18, 34, 28]]}', (0, 2))
        assert shown.valid
        assert shown.slice_index == NOT_SHOWN
        assert score_of(shown, target) == (1.0, nothing, nothing)
        assert propagated_dice(shown.with_mask(target.mask), target) == 0.0
        without_boxes = read_shown('{"slice": 3, "bbox_2d_list": []}', (0, 2))
        assert score_of(without_boxes, target) == (0.0, nothing, nothing)
        assert propagated_dice(without_boxes.with_mask(target.mask & False), target) == 0.0


def test_the_best_score_is_below_1_where_the_largest_slice_is_not_shown():
    shown = read_shown('{"slice": 2, "bbox_2d_list": [[4, 4, 16, 14]]}', (0, 1, 3))
    assert slice_visibility(shown, VOLUME) == SLICES[1].sum() / SLICES[2].sum() == 0.5


# --- the propagated mask

ALL_BUT_THE_LAST_ROW = VOLUME.mask.copy()
ALL_BUT_THE_LAST_ROW[:, 13] = ALL_BUT_THE_LAST_ROW[:, 27] = False
NO_MASK = VOLUME.mask & False


def propagated(said, mask, target=VOLUME, **settings):
    return propagated_dice(said if mask is None else said.with_mask(mask), target, **settings)


def test_dice_around_the_named_slice():
    """120 pixels on slice 1, 240 on slice 2, 1 on slice 3; the lesions are 12 wide and 10 high."""
    assert propagated(says(3, LEFT, RIGHT), VOLUME.mask) == 1.0
    one_row_less = 2 * (361 - 36) / (361 - 36 + 361)
    assert propagated(says(3, LEFT, RIGHT), ALL_BUT_THE_LAST_ROW) == pytest.approx(one_row_less)
    only_key = np.zeros_like(VOLUME.mask)
    only_key[2] = SLICES[2]
    assert propagated(says(3, LEFT, RIGHT), only_key) == pytest.approx(2 * 240 / (240 + 361))
    assert propagated(says(3, LEFT, RIGHT), only_key, delta=0) == 1.0
    assert propagated(says(2, LEFT), only_key, delta=0) == 0.0
    assert propagated(says(2, LEFT), only_key, delta=1) == pytest.approx(2 * 240 / (240 + 360))
    assert propagated(says(2, LEFT), only_key | True, delta=0) == pytest.approx(2 * 120 / (120 + HEIGHT * WIDTH))


@given(
    arrays.arrays(bool, (9, 3, 4)),
    arrays.arrays(bool, (9, 3, 4)),
    st.integers(1, 9),
    st.integers(0, 10),
)
def test_slices_are_counted_one_by_one(mask, truth, number, delta):
    target = VolumeTarget.from_mask(truth)
    near = [k for k in range(9) if abs(k - (number - 1)) <= delta]
    expected = dice(mask[near], truth[near]) if truth[near].any() else 0.0
    assert propagated(says(number, [0, 0, 4, 3]), mask, target, delta=delta) == pytest.approx(expected)


def test_naming_a_slice_far_from_everything_does_not_pay():
    far = VolumeTarget.from_mask(np.stack([*SLICES, *[mask_of()] * 5]))
    for said in (says(10), says(10, LEFT)):
        assert propagated(said, far.mask & False, far, delta=2) == 0.0
        assert propagated(said, far.mask, far, delta=2) == 0.0
    assert propagated(says(10), far.mask & False, far, delta=6) == 0.0  # with foreground around: one side is empty


@pytest.mark.parametrize("said", [says(), NOTHING, says(6, LEFT), says(10**5, LEFT), says(0, LEFT), says(2.5, LEFT)])
def test_no_slice_of_the_volume(said):
    assert propagated(said, VOLUME.mask) == propagated(said, NO_MASK) == propagated(said, None) == 0.0


def test_no_mask():
    assert propagated(says(3, LEFT), None) == 0.0
    assert propagated(says(3, LEFT), NO_MASK) == 0.0


def test_nothing_to_propagate_in_a_volume_without_foreground():
    for mask in (None, NO_MASK):
        assert propagated(NOTHING, mask, EMPTY) == 1.0
        assert propagated(says(3), mask, EMPTY) == 0.0
        assert propagated(says(3, LEFT), mask, EMPTY) == 0.0
    assert propagated(NOTHING, VOLUME.mask, EMPTY) == 0.0


def test_the_mask_of_an_invalid_text():
    said = read(in_answer('{"slice": 3, "bbox_2d_list": [[4, 4, 16, 14]]}') + " Done.")
    assert propagated(said, VOLUME.mask) == 0.0
    assert propagated(said, VOLUME.mask, require_valid=False) == 1.0
    assert propagated(read(""), NO_MASK, EMPTY) == 0.0


@pytest.mark.parametrize("delta", [-1, 2.0, 0.5, True, "5", None])
def test_delta_is_a_whole_number(delta):
    with pytest.raises(RewardError, match=r"delta=.*; expected a whole number of slices, 0 or more, such as 5"):
        propagated(says(3, LEFT), VOLUME.mask, delta=delta)


def test_a_mask_of_another_shape_is_refused():
    reward = make_reward("propagated_dice")
    for mask, shape in ((SLICES[2], r"\(32, 40\)"), (VOLUME.mask[:4], r"\(4, 32, 40\)")):
        with pytest.raises(RewardError, match=rf"scan_7.nii.*the mask has the shape {shape}"):
            reward.score(says(3, LEFT).with_mask(mask), VOLUME)


def test_a_trainer_without_a_propagator_cannot_call_it():
    with pytest.raises(RewardError, match="decodes none; use SegGRPOTrainer with a VolumePropagator"):
        make_reward("propagated_dice")(completions=["no"], volume=[np.stack(SLICES)])
