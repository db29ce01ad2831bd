"""The public strategies give what they promise, reach what they should, and shrink to something that can be read."""

from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st

from segrl.errors import DataError
from segrl.geometry import pairwise_iou
from segrl.predictions import NOT_SHOWN, Frame, Status, Target, VolumeTarget
from segrl.rewards import CompletionFormat
from segrl.testing import strategies
from segrl.testing.answers import HOSTILE, broken_completions, write_answer, write_completion

FRAME = Frame("original_px", (40, 30))
BOXES = [[3, 2, 20, 10], [25, 15, 40, 30]]
FORMATS = {
    "text": CompletionFormat(),
    "json": CompletionFormat(answer_format="json"),
    "json without token": CompletionFormat(answer_format="json", require_seg=False),
    "answer only": CompletionFormat(seg_token="", require_seg=False, require_reasoning=False),
    "token with brackets": CompletionFormat(seg_token="[SEG]"),
}
formats = pytest.mark.parametrize("completion_format", FORMATS.values(), ids=FORMATS)


def smallest(strategy, condition=lambda found: True, seed=0):
    quick = settings(max_examples=2000, database=None, suppress_health_check=list(HealthCheck))  # pyright: ignore
    return find(strategy, condition, settings=quick, random=Random(seed))


def reached(strategy, label, count=300):
    """The labels of many examples."""
    seen = set()

    @settings(max_examples=count, database=None, suppress_health_check=list(HealthCheck))  # pyright: ignore
    @given(strategy)
    def look(example):
        seen.add(label(example))

    look()
    return seen


# --- masks, volumes, boxes, points


@given(strategies.masks(max_size=9))
def test_masks(mask):
    assert mask.dtype == np.bool_
    assert mask.flags.writeable
    assert 1 <= min(mask.shape) <= max(mask.shape) <= 9


@given(strategies.masks(5, 7, empty=False))
def test_masks_with_foreground(mask):
    assert mask.shape == (5, 7)
    assert mask.any()


@given(st.data())
def test_masks_near_another(data):
    other = data.draw(strategies.masks(empty=False))
    assert data.draw(strategies.masks(near=other)).shape == other.shape
    assert not data.draw(strategies.masks(near=other, empty=True)).any()


def test_masks_near_another_are_often_the_same():
    other = np.eye(6, dtype=bool)
    assert reached(strategies.masks(near=other), lambda mask: (mask == other).all()) == {True, False}
    assert len(reached(strategies.masks(6, 6), lambda mask: int(mask.sum()))) > 10


def test_masks_shrink():
    assert smallest(strategies.masks()).tolist() == [[False]]
    assert smallest(strategies.masks(8, 8), lambda mask: mask.sum() >= 3).sum() == 3


@given(strategies.volumes(max_depth=3, max_size=5), strategies.volumes(empty=False), strategies.volumes(empty=True))
def test_volumes(volume, full, empty):
    assert volume.dtype == np.bool_
    assert volume.ndim == 3
    assert volume.shape[0] <= 3
    assert full.any()
    assert not empty.any()


@given(strategies.boxes(12, 7), strategies.boxes(12, 7, near=BOXES[:1], min_boxes=2, max_boxes=3))
def test_boxes(boxes, near):
    for found in (boxes, near):
        assert found.shape[1:] == (4,)
        assert (found == np.rint(found)).all()
        assert (found[:, :2] <= found[:, 2:]).all()
        assert (found >= 0).all()
        assert (found <= [12, 7, 12, 7]).all() or found is near  # `BOXES` is taller than the image
    assert 2 <= len(near) <= 3


def test_boxes_reach_repetitions_hits_and_no_area():
    def label(boxes):
        repeated = len(boxes) > len({*map(tuple, boxes)})
        hit = len(boxes) > 0 and bool((pairwise_iou(boxes, BOXES) == 1).any())
        flat = bool((boxes[:, :2] == boxes[:, 2:]).any())
        return repeated, hit, flat

    seen = reached(strategies.boxes(40, 30, near=BOXES), label)
    assert all({True, False} == {found[part] for found in seen} for part in range(3))
    assert smallest(strategies.boxes(40, 30, near=BOXES)).shape == (0, 4)
    assert smallest(strategies.boxes(40, 30), len).tolist() == [[0, 0, 0, 0]]


@given(strategies.points(5, 4, near=[[4.5, 0.5]], max_points=3))
def test_points(points):
    assert points.shape[1:] == (2,)
    assert (points % 1 == 0.5).all()
    assert ((points > 0) & (points < [5, 4])).all()


# --- truths


@given(strategies.targets(max_size=8), strategies.targets(empty=False), strategies.targets(empty=True))
def test_targets(target, full, empty):
    assert isinstance(target, Target)
    assert max(target.width, target.height) <= 8
    assert target.boxes.tolist() == Target.from_mask(target.mask).boxes.tolist()
    assert len(full.boxes) > 0
    assert empty.empty


@given(st.data())
def test_volumes_near_another(data):
    near = data.draw(strategies.volumes(empty=False))
    found = data.draw(strategies.volumes(near=near))
    assert (found.shape, found.dtype) == (near.shape, near.dtype)
    assert not data.draw(strategies.volumes(near=near, empty=True)).any()
    assert data.draw(strategies.volumes(near=near, empty=False)).any()


@given(strategies.volume_targets(), strategies.volume_targets(empty=False), strategies.volume_targets(empty=True))
def test_volume_targets(target, full, empty):
    assert isinstance(target, VolumeTarget)
    assert not full.empty
    assert empty.empty


# --- completions


@formats
def test_valid_completions(completion_format):
    @given(strategies.completions(FRAME, near=BOXES, completion_format=completion_format))
    def check(text):
        parsed = completion_format.parse(text, FRAME)
        assert parsed.valid, parsed.status
        assert (parsed.boxes <= [40, 30, 40, 30]).all()

    check()


@formats
def test_broken_completions(completion_format):
    @given(strategies.completions(FRAME, valid=False, completion_format=completion_format))
    def check(text):
        assert not completion_format.parse(text, FRAME).valid

    check()


@formats
@pytest.mark.parametrize("boxes", [[], BOXES], ids=["nothing", "boxes"])
def test_every_trap_is_invalid_and_named(completion_format, boxes):
    texts = broken_completions("One spot.", write_answer(boxes, FRAME, completion_format), completion_format)
    statuses = {name: completion_format.parse(text, FRAME).status for name, text in texts.items()}
    assert Status.VALID not in statuses.values(), statuses
    assert statuses["two answers"] is statuses["trailing text"] is Status.EXTRA_TEXT
    assert statuses["empty"] is statuses["answer inside the reasoning"] is Status.NO_ANSWER
    malformed = Status.MALFORMED_JSON if completion_format.answer_format == "json" else Status.MALFORMED_BOXES
    assert statuses["box with x2 < x1"] is statuses["huge number in a box"] is statuses["NaN in a box"] is malformed
    assert ("no token" in texts) == completion_format.require_seg
    assert ("no reasoning" in texts) == completion_format.require_reasoning


@pytest.mark.slow
def test_completions_reach_every_status_and_both_sides():
    for completion_format in (CompletionFormat(), CompletionFormat(answer_format="json")):
        statuses = reached(
            strategies.completions(FRAME, valid=False, completion_format=completion_format),
            lambda text, completion_format=completion_format: completion_format.parse(text, FRAME).status,
            600,
        )
        other = Status.MALFORMED_BOXES if completion_format.answer_format == "json" else Status.MALFORMED_JSON
        assert statuses == set(Status) - {Status.VALID, other}
    mixed = reached(strategies.completions(FRAME, valid=None), lambda text: CompletionFormat().parse(text, FRAME).valid)
    assert mixed == {True, False}


@pytest.mark.slow
def test_json_completions_reach_points_confidences_and_slices():
    completion_format = CompletionFormat(answer_format="json", require_seg=False)

    def label(text):
        said = completion_format.parse(text, FRAME)
        return len(said.points) > 0, said.scores is not None, said.has_seg

    seen = reached(strategies.completions(FRAME, completion_format=completion_format), label)
    assert {(True, False, True), (False, True, False), (False, False, True)} <= seen
    slices = reached(
        strategies.completions(FRAME, depth=3, completion_format=completion_format),
        lambda text: completion_format.parse(text, FRAME).slice_index,
    )
    assert slices == {0, 1, 2, 3, None}, "one slice too many, and none, too"
    nothing = strategies.completions(FRAME, depth=3, completion_format=completion_format, empty=True)
    seen = reached(
        nothing.map(lambda text: completion_format.parse(text, FRAME)), lambda said: (said.slice_index, len(said.boxes))
    )
    assert seen == {(None, 0)}


@formats
def test_completions_reach_every_notation_and_end_tokens(completion_format):
    marks = ("](", "[", "),(", "<|box_start|>", "```", "<|im_end|>")
    texts = strategies.completions(FRAME, empty=False, completion_format=completion_format)
    seen = reached(texts, lambda text: tuple(mark in text for mark in marks))
    expected = {"[", "```", "<|im_end|>"} if completion_format.answer_format == "json" else {"[", *marks[2:4], marks[5]}
    assert {mark for found in seen for mark, there in zip(marks, found, strict=True) if there} >= expected


def test_completions_in_another_frame():
    frame = Frame("relative_1000", (40, 30))

    @given(strategies.completions(frame, near=BOXES, empty=False))
    def check(text):
        boxes = CompletionFormat().parse(text, frame).boxes
        assert len(boxes) >= 1
        assert (abs(boxes - np.rint(boxes)) <= 0.03).all(), "to a thousandth of the image"

    check()


def test_completions_shrink():
    assert smallest(strategies.completions(FRAME)) == (
        "<think>One region differs from the tissue around it.</think><answer>No lesion is visible.<seg></answer>"
    )
    some = smallest(strategies.completions(FRAME), lambda text: len(CompletionFormat().parse(text, FRAME).boxes) > 0)
    assert "<answer>The lesion is located at [0, 0, 0, 0].<seg></answer>" in some


@given(st.data())
def test_points_near_what_is_outside_are_inside(data):
    found = data.draw(strategies.points(4, 3, near=[[-0.5, -0.5], [9, 1]]))
    assert (found % 1 == 0.5).all()
    assert ((found > 0) & (found < [4, 3])).all()


# --- predictions and batches


@given(st.data())
def test_predictions(data):
    target = data.draw(st.one_of(strategies.targets(), strategies.volume_targets()))
    completion_format = data.draw(st.sampled_from(list(FORMATS.values())))
    said = data.draw(strategies.predictions(target, mask=True, probability=True, completion_format=completion_format))
    if isinstance(target, VolumeTarget):
        assert said.mask is not None or not said.valid
        named = said.slice_index is not None and said.slice_index in range(target.depth) and len(said.boxes) > 0
        assert named or said.mask is None or not said.mask.any()
    else:
        assert (said.mask is not None) == said.has_seg
    if said.mask is not None:
        assert said.mask.shape == target.mask.shape
    if said.probability is not None:
        assert said.mask is not None
        assert said.probability.dtype == np.float32
        assert ((said.probability > 0.5) == said.mask).all()
    assert (said.boxes == np.rint(said.boxes)).all()
    assert (said.points % 1 == 0.5).all()


@given(st.data())
def test_predictions_that_find_nothing_or_something(data):
    target = data.draw(st.one_of(strategies.targets(), strategies.volume_targets()))
    completion_format = CompletionFormat(answer_format="json")
    nothing = data.draw(
        strategies.predictions(target, valid=True, mask=True, empty=True, completion_format=completion_format)
    )
    assert nothing.valid
    assert nothing.mask is not None
    assert (len(nothing.boxes), len(nothing.points), nothing.slice_index, nothing.mask.any()) == (0, 0, None, False)
    finds = data.draw(
        strategies.predictions(target, valid=True, mask=True, empty=False, completion_format=completion_format)
    )
    assert finds.mask is not None
    assert (len(finds.boxes) > 0, finds.mask.any()) == (True, True)
    if isinstance(target, VolumeTarget):
        assert finds.slice_index in range(target.depth)


@pytest.mark.slow
def test_predictions_about_a_volume_reach_every_kind_of_slice_and_mask():
    target = VolumeTarget.from_mask(np.pad(np.ones((1, 2, 2), dtype=bool), 1))
    completion_format = CompletionFormat(answer_format="json", require_seg=False)

    def kind(said):
        k, mask = said.slice_index, said.mask
        where = "none" if k is None else "not shown" if k == NOT_SHOWN else "inside" if k < target.depth else "outside"
        return where, "none" if mask is None else "right" if (mask == target.mask).all() else bool(mask.any())

    seen = reached(strategies.predictions(target, mask=True, completion_format=completion_format), kind, 1000)
    assert {(where, False) for where in ("none", "not shown", "inside", "outside")} <= seen
    assert {("inside", True), ("none", "none"), ("inside", "none")} <= seen
    assert {where for where, mask in seen if mask is True} == {"inside"}


@pytest.mark.slow
@given(strategies.batches(max_groups=3), strategies.batches(group_size=4, volume=True, valid=True, max_size=6))
def test_batches(batch, volumes):
    for predictions, targets, groups in (batch, volumes):
        assert len(predictions) == len(targets) == len(groups) > 0
        for group in set(groups):
            rows = [row for row, other in enumerate(groups) if other == group]
            assert rows == list(range(rows[0], rows[-1] + 1))
            assert len({id(targets[row]) for row in rows}) == 1
    assert len(set(batch[2])) <= 3
    assert len(volumes[0]) % 4 == 0
    assert all(isinstance(target, VolumeTarget) for target in volumes[1])


@pytest.mark.slow
def test_batches_shrink():
    def has_foreground(batch):
        return any(prediction.mask is not None and prediction.mask.any() for prediction in batch[0])

    shapes = []
    for seed in range(4):  # shrinking is a search: always to one row, and from some seeds to one pixel
        predictions, targets, groups = smallest(strategies.batches(mask=True), has_foreground, seed)
        assert (len(predictions), groups) == (1, [0])
        assert predictions[0].mask is not None
        shapes.append((predictions[0].mask.shape, targets[0].mask.shape))
    assert ((1, 1), (1, 1)) in shapes


# --- texts


def test_write_answer_round_trip():
    completion_format = CompletionFormat(answer_format="json")
    text = write_completion(BOXES, FRAME, completion_format, points_px=[[4.5, 5.5]], scores=[0.5, 1.0], rounding=False)
    said = completion_format.parse(text, FRAME)
    assert said.valid
    assert said.scores is not None
    assert (said.boxes.tolist(), said.points.tolist(), said.scores.tolist()) == (BOXES, [[4.5, 5.5]], [0.5, 1.0])
    volume = completion_format.parse(
        write_completion(BOXES, FRAME, completion_format, slice_index=2, points_px=[[4, 5]]), FRAME
    )
    assert (volume.slice_index, volume.boxes.tolist(), volume.points.tolist()) == (2, BOXES, [[4, 5]])
    in_words = write_answer([[0.5, 1, 2, 3]], FRAME, rounding=False, lesion="cyst")
    assert in_words == "The cyst is located at [0.5, 1, 2, 3].<seg>"
    with pytest.raises(DataError, match="bracket"):
        write_answer(BOXES, FRAME, lesion="[cyst]")


@pytest.mark.parametrize("kind", HOSTILE)
@formats
def test_hostile_texts_have_their_length_and_status(kind, completion_format):
    text = HOSTILE[kind](20_000, completion_format)
    assert 15_000 <= len(text) <= 24_000
    valid = list(HOSTILE).index(kind) < 5
    said = completion_format.parse(text, FRAME)
    assert said.valid or not valid
    assert len(said.boxes) > 400 or kind != "many boxes"
