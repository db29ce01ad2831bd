"""Presets: the published sums, and that they no longer score_of for what the originals scored for by mistake."""

import json
import pickle

import numpy as np
import pytest
from answers import FAR, HEIGHT, LEFT, RIGHT, WIDTH, in_answer, mask_of, target_of
from reward_cases import reloaded

from segrl.errors import RewardError
from segrl.predictions import Frame, VolumeTarget, format_answer, format_completion
from segrl.rewards import make_reward, reward_info

IMAGE_PRESETS = [
    "core_seg",
    "seg_zero",
    "vision_reasoner",
    "vlm_r1",
    "vlm_r1_ovd",
    "lens",
    "med_reasoner",
    "visual_rft",
    "seg_r1",
    "pixel_think",
]
PRESETS = [*IMAGE_PRESETS, "medvol_r1"]
MAX = {
    "core_seg": 5.0,
    "seg_zero": 5.0,
    "vision_reasoner": 7.0,
    "vlm_r1": 2.0,
    "vlm_r1_ovd": 2.0,
    "lens": 3.0,
    "med_reasoner": 4.0,
    "visual_rft": 3.0,
    "seg_r1": 2.0,
    "pixel_think": 5.0,
    "medvol_r1": 4.0,
}
BOTH, EMPTY = target_of(LEFT, RIGHT), target_of()
FRAME = Frame("original_px", (WIDTH, HEIGHT))
VOLUME = VolumeTarget.from_mask(np.stack([mask_of(), mask_of(LEFT), mask_of(LEFT, RIGHT)]))
EMPTY_VOLUME = VolumeTarget.from_mask(np.zeros((3, HEIGHT, WIDTH), dtype=bool))
each_preset = pytest.mark.parametrize("name", IMAGE_PRESETS)


def text_of(reward, target, *boxes, reasoning="A dark spot.", points=None, score=1.0):
    """The answer that names these boxes, in the preset's completion format; points are the truth's by default."""
    token = reward.completion_format.seg_token if reward.completion_format.require_seg else ""
    if reward.completion_format.answer_format == "text":
        return format_completion(reasoning, format_answer("cyst", boxes, FRAME, token))
    known = target.points.tolist() if points is None else points
    objects = [
        {"bbox_2d": list(box), "point_2d": known[min(n, len(known) - 1)] if known else [0, 0], "score": score}
        for n, box in enumerate(boxes)
    ]
    return format_completion(reasoning, json.dumps(objects) + token)


def score_of(reward, target, *boxes, mask=None, text=None, **said):
    """Score of an answer with these boxes, whose mask is the boxes unless given."""
    prediction = reward.completion_format.parse(
        text_of(reward, target, *boxes, **said) if text is None else text, FRAME
    )
    score = reward.score(prediction.with_mask(mask_of(*boxes) if mask is None else mask), target)
    assert score is not None
    return score


# --- the sums


@each_preset
def test_the_truth_scores_the_published_maximum(name):
    reward = make_reward(name)
    assert reward.range is not None
    assert reward.range[1] == MAX[name]
    assert score_of(reward, BOTH, LEFT, RIGHT) == pytest.approx(MAX[name])
    assert score_of(reward, EMPTY) == pytest.approx(MAX[name])


def test_core_seg_is_the_sum_of_its_three_rewards():
    reward = make_reward("core_seg")
    half = [4, 4, 16, 9]
    assert score_of(reward, target_of(LEFT), half) == pytest.approx(1 + 0 + 1 + 2 * 2 / 3)
    assert score_of(make_reward("core_seg", min_iou=0.4), target_of(LEFT), half) == pytest.approx(
        1 + 0.5 + 1 + 2 * 2 / 3
    )
    without_mask = make_reward("core_seg", weights=[1, 1, 0])
    assert [part.name for part, _ in without_mask.parts] == ["format", "box_f1"]
    assert not without_mask.needs_mask


def test_seg_zero_thresholds_are_those_of_a_square_of_840():
    reward = make_reward("seg_zero")
    one = target_of(LEFT)
    parts = [part.name for part, _ in reward.parts]
    assert parts == ["think_answer_format", "json_format", "box_iou", "box_l1", "point_distance"]
    off = [5, 4, 16, 14]  # 1 px of 40 is 21 px of 840: on average over the coordinates 5.25
    assert score_of(reward, one, off) == 5.0
    off = [6, 4, 16, 14]
    assert score_of(reward, one, off) == 4.0
    assert score_of(make_reward("seg_zero", resized_to=None), one, off) == 5.0
    assert score_of(reward, one, [4, 4, 16, 9]) == 3.0  # IoU 0.5 is not above 0.5
    x, y = one.points[0]
    assert score_of(reward, one, LEFT, points=[[x + 100 / 21 + 0.1, y]]) == 4.0
    assert score_of(reward, one, LEFT, points=[[x + 100 / 21 - 0.1, y]]) == 5.0
    assert score_of(reward, one, [4, 4, 16, 8], points=[[x, y + 1]]) == 2.0  # the point is not in the predicted box


def test_vision_reasoner_scores_shares():
    reward = make_reward("vision_reasoner")
    assert score_of(reward, BOTH, LEFT) == pytest.approx(1 + 2 + 1.5 + 1)
    assert score_of(reward, BOTH, LEFT, RIGHT, FAR) == pytest.approx(1 + 2 + 3 * 2 / 3 + 1)
    repeats = "It is dark. It is dark. It is dark."
    assert score_of(reward, BOTH, LEFT, RIGHT, reasoning=repeats) == pytest.approx(6.0)
    no_points = in_answer(json.dumps([{"bbox_2d": LEFT}, {"bbox_2d": RIGHT}]))
    assert score_of(reward, BOTH, text=no_points) == pytest.approx(1 + 1 + 2 + 0 + 1)


def test_vlm_r1_scores_the_iou():
    assert score_of(make_reward("vlm_r1"), target_of(LEFT), [4, 4, 16, 12]) == pytest.approx(1.8)
    ovd = make_reward("vlm_r1_ovd")
    assert score_of(ovd, target_of(LEFT), [4, 4, 16, 12]) == pytest.approx(1.7)
    assert score_of(ovd, target_of(LEFT), LEFT, FAR) == pytest.approx(1.5)


def test_lens_squares_both_ious():
    assert score_of(make_reward("lens"), target_of(LEFT), [4, 4, 16, 12]) == pytest.approx(1 + 2 * 0.64)


def test_med_reasoner_modes():
    soft, hard = make_reward("med_reasoner"), make_reward("med_reasoner", mode="hard")
    off = [4, 4, 16, 12]
    assert score_of(soft, target_of(LEFT), off) == pytest.approx(1 + 1 + 0.8 + 1)
    assert score_of(hard, target_of(LEFT), off) == pytest.approx(1 + 1 + 0.8 + 1 + (1 - 0.5 / 100) + 1)
    assert score_of(soft, target_of(LEFT), text="<answer>none</answer>") == 0.25


def test_visual_rft_scores_hits_and_confidence_in_them():
    reward = make_reward("visual_rft")
    assert score_of(reward, BOTH, [4, 4, 16, 12], RIGHT, score=0.5) == pytest.approx(1 + 0.9 + 0.5)
    assert score_of(reward, BOTH, FAR, [0, 0, 2, 2], score=0.0) == 1.0


def test_seg_r1_weights_the_mask():
    measure = make_reward("s_measure")
    prediction = make_reward("seg_r1").completion_format.parse(text_of(make_reward("seg_r1"), BOTH, LEFT), FRAME)
    shape = measure.score(prediction.with_mask(mask_of(LEFT)), BOTH)
    assert shape is not None
    assert score_of(make_reward("seg_r1"), BOTH, LEFT) == pytest.approx(1 + 0.7 * 0.5 + 0.3 * shape)


def test_pixel_think_scores_less_for_words_beyond_the_budget():
    reward = make_reward("pixel_think", limit=100, margin=500)

    def words(count, *boxes):
        answer = text_of(reward, BOTH, *boxes)
        said = len(answer.split())
        return score_of(reward, BOTH, text=answer.replace("A dark spot.", "word " * (count - said + 2)))

    assert words(100, LEFT, RIGHT) == pytest.approx(5.0)
    assert words(150, LEFT, RIGHT) == pytest.approx(4.5)
    assert words(600, LEFT, RIGHT) == pytest.approx(0.0)
    assert words(2000, LEFT, RIGHT) == 0.0
    assert words(100, FAR) == pytest.approx(2.0)
    assert score_of(reward, BOTH, text=text_of(reward, BOTH, LEFT, RIGHT) + " Done.") == 1.0  # the JSON format
    assert score_of(reward, BOTH, text="") == 0.0


def test_medvol_r1():
    reward = make_reward("medvol_r1")

    def volume(answer, target=VOLUME, mask=VOLUME.mask, reward=reward):
        return reward.score(reward.completion_format.parse(in_answer(answer), FRAME).with_mask(mask), target)

    nothing = VOLUME.mask & False
    best = '{"slice": 3, "bbox_2d_list": [[4, 4, 16, 14], [22, 18, 34, 28]]}'
    assert volume(best) == 4.0
    assert volume('{"slice": 2, "bbox_2d_list": [[4, 4, 16, 14]]}') == 3.5
    assert volume(best, mask=nothing) == 3.0
    assert volume('{"slice": 1, "bbox_2d_list": []}', mask=nothing) == 0.0
    assert volume("{}", EMPTY_VOLUME, nothing) == 4.0
    assert volume("{}", EMPTY_VOLUME, nothing, make_reward("medvol_r1", allow_empty=False)) == 3.0
    assert volume('{"slice": 1, "bbox_2d_list": []}', EMPTY_VOLUME, nothing) == 0.0
    assert volume("none", mask=nothing) == 0.0

    left_out = volume(best, mask=nothing, reward=make_reward("medvol_r1", weights=[1, 1, 1, 0]))
    assert left_out == 3.0
    assert not make_reward("medvol_r1", weights=[1, 1, 1, 0]).needs_mask
    part = make_reward("medvol_r1", delta=2).parts[-1][0]
    assert (part.name, part.settings) == ("propagated_dice", {"delta": 2})
    only_key = np.stack([mask_of(), mask_of(), mask_of(LEFT, RIGHT)])
    assert volume(best, mask=only_key, reward=make_reward("medvol_r1", delta=0)) == 4.0
    assert volume(best, mask=only_key) == pytest.approx(3 + 480 / 600)


# --- traps: each earned as much as a good answer, or more, in one of the originals


@each_preset
def test_an_empty_text_scores_the_lowest_value(name):
    reward = make_reward(name)
    assert reward.range is not None
    for text in ("", " ", "none", "<answer></answer>"):
        for target in (BOTH, EMPTY):
            assert score_of(reward, target, text=text, mask=target.mask) == pytest.approx(reward.range[0])


TRICKS = {
    "every answer twice": lambda good: good * 2,
    "JSON in the reasoning, no answer": lambda good: f"<think>{good.partition('<answer>')[2]}".replace(
        "/answer", "/think"
    ),
    "text after the answer": lambda good: good + " " + good.partition("<answer>")[2],
    "cut off": lambda good: good[: len(good) * 3 // 4],
}


@each_preset
@pytest.mark.parametrize("trick", TRICKS.values(), ids=TRICKS.keys())
@pytest.mark.parametrize("target", [BOTH, EMPTY], ids=["lesions", "no lesion"])
def test_a_broken_text_scores_less_than_half(name, trick, target):
    reward = make_reward(name)
    good = text_of(reward, target, *target.boxes.tolist())
    assert score_of(reward, target, text=trick(good), mask=target.mask) < MAX[name] / 2


@each_preset
@pytest.mark.parametrize("copies", [2, 10])
def test_duplicates_do_not_pay(name, copies):
    reward = make_reward(name)
    once = score_of(reward, BOTH, LEFT, RIGHT, points=BOTH.points.tolist())
    boxes = [LEFT, RIGHT] * copies
    again = score_of(reward, BOTH, *boxes, points=BOTH.points.tolist() * copies)
    masks_only = name == "seg_r1"  # where boxes do not count at all
    assert again == pytest.approx(once) if masks_only else again < once


@each_preset
def test_a_hallucination_scores_less_than_a_correct_empty_answer(name):
    reward = make_reward(name)
    assert score_of(reward, EMPTY, LEFT) < score_of(reward, EMPTY)
    assert score_of(reward, EMPTY, [7, 7, 7, 7], mask=mask_of([7, 7, 8, 8])) < score_of(reward, EMPTY)


@each_preset
def test_whole_images_and_grids_score_less_than_the_truth(name):
    reward = make_reward(name)
    grid = [[x, y, x + 8, y + 8] for x in range(0, WIDTH, 8) for y in range(0, HEIGHT, 8)]
    honest = score_of(reward, BOTH, LEFT, RIGHT)
    assert score_of(reward, BOTH, [0, 0, WIDTH, HEIGHT]) < 0.75 * honest
    assert score_of(reward, BOTH, *grid) < 0.75 * honest


def test_one_missing_key_does_not_zero_the_rest():
    text = in_answer(json.dumps([{"bbox_2d": LEFT}, {"bbox_2d": RIGHT, "point_2d": BOTH.points[1].tolist()}]))
    assert score_of(make_reward("vision_reasoner"), BOTH, text=text) == pytest.approx(1 + 1.5 + 1 + 1 + 0.5 + 1)


# --- the registry


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_listed_described_pickled_and_written(name):
    info = reward_info(name)
    assert info.form == "preset"
    assert info.source
    assert info.equation
    assert info.summary
    reward = make_reward(name, frame="original_px")
    assert reward.name == name
    assert reward.completion_format.frame == "original_px"
    assert (reward.completion_format.answer_format == "text") == (name == "core_seg")
    assert reward.volume == (name == "medvol_r1")
    assert reward.needs_mask == (name in ("core_seg", "lens", "medvol_r1", "seg_r1"))
    assert pickle.loads(pickle.dumps(reward)) == reward
    assert reloaded(reward) == reward


def test_a_plain_trainer_can_call_a_preset():
    reward = make_reward("vlm_r1", frame="original_px")
    text = text_of(reward, BOTH, LEFT, RIGHT)
    logged = {}
    result = reward(completions=[text, "no"], mask=[BOTH.mask] * 2, log_metric=logged.__setitem__)
    assert result == [2.0, 0.0]
    assert logged["vlm_r1/box_iou"] == 0.5


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "pixel_think"])
def test_weights_are_settings_and_checked(name):
    reward = make_reward(name)
    weights = [weight for _, weight in reward.parts]
    doubled = make_reward(name, weights=[2 * weight for weight in weights])
    assert [weight for _, weight in doubled.parts] == [2 * weight for weight in weights]
    with pytest.raises(RewardError, match=rf"{name}: weights=\[1\]"):
        make_reward(name, weights=[1])


@pytest.mark.parametrize("name", ["seg_zero", "vision_reasoner", "vlm_r1", "med_reasoner", "visual_rft", "pixel_think"])
def test_the_order_of_the_objects_does_not_matter(name):
    reward = make_reward(name)
    assert score_of(reward, BOTH, RIGHT, LEFT, points=BOTH.points[::-1].tolist()) == pytest.approx(MAX[name])
