"""Which boxes of an answer prompt the segmenter, and on which slice."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from builders import tiny_segmenter
from volume_builders import blocks

from segrl.caching import FeatureCache
from segrl.errors import SegRLError, UnknownNameError
from segrl.predictions import NOT_SHOWN, Frame, VolumeTarget, parse_completion
from segrl.segmenters import PropagationRequest, VolumePropagator, add_volume_masks

SHAPE = (7, 24, 40)
TRUTH = VolumeTarget(blocks([0, 9, 9, 9, 9, 0, 0]))  # boxes 5, 2, 13, 3 and 7, 10, 8, 11
NEAR, FAR, LONE = [4, 1, 14, 5], [25, 15, 36, 22], [6, 9, 9, 12]


@pytest.fixture(scope="module")
def propagator():
    return VolumePropagator(tiny_segmenter().eval(), reach=2)


def grey(seed=0):
    return np.random.default_rng(seed).integers(0, 255, SHAPE, dtype=np.uint8)


def said(index, *boxes):
    """An answer that names a slice (None for no slice), with boxes in pixels."""
    named = "" if index is None else f'"slice": {index + 1}, '
    text = f'<think>a</think><answer>{{{named}"bbox_2d_list": {[list(box) for box in boxes]}}}</answer>'
    return parse_completion(text, Frame("original_px", (40, 24)), require_seg=False, answer_format="json")


def propagated(propagator, volume, index, *boxes):
    return propagator([PropagationRequest(volume, "", index, np.array(boxes, dtype=float).reshape(-1, 4))])[0]


def masks(propagator, answers, volume=None, **settings) -> list[Any]:
    volume = grey() if volume is None else volume
    volumes, keys = [volume] * len(answers), [""] * len(answers)
    found = add_volume_masks(propagator, answers, volumes, keys, [TRUTH] * len(answers), **settings)
    assert [row.text for row in found] == [row.text for row in answers]
    assert all(row.mask is not None and row.mask.shape == SHAPE for row in found)
    return [row.mask for row in found]


class TestBoxes:
    def test_all_of_them(self, propagator):
        (mask,) = masks(propagator, [said(3, NEAR, FAR)])
        assert np.array_equal(mask, propagated(propagator, grey(), 3, NEAR, FAR))
        assert mask.any()
        assert not mask[0].any()  # beyond the reach of 2

    def test_only_the_matched(self, propagator):
        found = masks(
            propagator,
            [said(3, FAR, NEAR), said(3, NEAR, LONE), said(3, NEAR, NEAR), said(3, FAR), said(5, NEAR)],
            prompt_boxes="matched",
        )
        near = propagated(propagator, grey(), 3, NEAR)
        assert np.array_equal(found[0], near)
        assert np.array_equal(found[1], propagated(propagator, grey(), 3, NEAR, LONE))
        assert np.array_equal(found[2], near)  # one-to-one
        assert not found[3].any()
        assert not found[4].any()  # no lesion there
        assert near.any()

    def test_a_volume_without_foreground_has_no_matched_box(self, propagator):
        nothing = VolumeTarget(np.zeros(SHAPE, dtype=bool))
        (found,) = add_volume_masks(propagator, [said(3, NEAR)], [grey()], [""], [nothing], prompt_boxes="matched")
        assert not np.asarray(found.mask).any()


class TestSlices:
    def test_an_answer_that_names_no_slice_of_the_volume_gets_an_empty_mask(self, propagator):
        answers = [said(None, NEAR), said(99, NEAR), replace(said(3, NEAR), slice_index=NOT_SHOWN), said(3)]
        for kind in ("all", "matched"):
            before = propagator.encoded_slices
            assert not np.any(masks(propagator, answers, prompt_boxes=kind))
            assert propagator.encoded_slices == before

    def test_boxes_outside_the_slice(self, propagator):
        outside, cut = masks(propagator, [said(3, [60, 40, 90, 70]), said(3, [20, 10, 900, 900])])
        assert not outside.any()
        assert np.array_equal(cut, propagated(propagator, grey(), 3, [20, 10, 40, 24]))

    def test_a_volume_of_one_slice(self, propagator):
        volume = grey()[:1]
        answer = said(0, NEAR)
        (found,) = add_volume_masks(propagator, [answer], [volume], [""])
        assert np.array_equal(np.asarray(found.mask), propagated(propagator, volume, 0, NEAR))

    def test_masks_stay_with_their_answers(self, propagator):
        """Answers without a mask between others, and two volumes of different shape."""
        small = grey(1)[:3, :, :30]
        answers = [said(None), said(2, FAR), said(9, FAR), said(1, NEAR), said(5, LONE)]
        volumes = [grey(), grey(), small, small, grey()]
        found = add_volume_masks(propagator, answers, volumes, [""] * 5)
        expected = [None, (2, FAR), None, (1, NEAR), (5, LONE)]
        for row, volume, case in zip(found, volumes, expected, strict=True):
            mask = np.zeros(volume.shape, bool) if case is None else propagated(propagator, volume, *case)
            assert np.array_equal(np.asarray(row.mask), mask)

    def test_nothing(self, propagator):
        assert add_volume_masks(propagator, [], [], []) == []


def test_features_are_computed_once_for_all_answers_and_kept_by_key():
    propagator = VolumePropagator(tiny_segmenter().eval(), reach=1, cache=FeatureCache())
    answers = [said(2, NEAR), said(2, FAR), said(3, NEAR), said(2, LONE)]
    for _ in range(2):
        add_volume_masks(propagator, answers, [grey() for _ in answers], ["a"] * 4)
        assert propagator.encoded_slices == 4  # 1, 2, 3, 4


def test_errors(propagator):
    with pytest.raises(UnknownNameError, match="unknown prompt_boxes 'match'; did you mean 'matched'"):
        masks(propagator, [said(3, NEAR)], prompt_boxes="match")
    with pytest.raises(SegRLError, match="prompt_boxes='matched' needs the true boxes; pass targets, or"):
        add_volume_masks(propagator, [said(3, NEAR)], [grey()], [""], prompt_boxes="matched")
    with pytest.raises(ValueError, match="shorter"):
        add_volume_masks(propagator, [said(3, NEAR)], [grey()], [])
