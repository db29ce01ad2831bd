"""Rewards for boxes, against slow readings of their equations and the ways in which published ones are hacked."""

import itertools
import json

import numpy as np
import pytest
from answers import FAR, HEIGHT, LEFT, RIGHT, WIDTH, box_lists, in_answer, read, says, slow_iou, target_of
from growth import grows_linearly
from hypothesis import given
from hypothesis import strategies as st
from references import largest_total

from segrl.errors import RewardError
from segrl.geometry import giou
from segrl.rewards import make_reward
from segrl.rewards.builtin import box_ap, box_confidence, box_count, box_giou, box_hungarian, box_iou, box_l1
from segrl.testing import check_reward

WHOLE = [0, 0, WIDTH, HEIGHT]
BOTH = target_of(LEFT, RIGHT)
EMPTY = target_of()
LOWEST = {
    box_ap: 0.0,
    box_confidence: 0.0,
    box_count: 0.0,
    box_giou: -1.0,
    box_hungarian: 0.0,
    box_iou: 0.0,
    box_l1: 0.0,
}
VARIANTS = [
    (box_iou, {}),
    (box_iou, {"threshold": 0.5}),
    (box_iou, {"threshold": 0.0}),
    (box_iou, {"power": 2.0}),
    (box_iou, {"several": "hull"}),
    (box_giou, {}),
    (box_l1, {}),
    (box_l1, {"graded": True}),
    (box_l1, {"resized_to": 840}),
    (box_count, {}),
    (box_count, {"graded": True}),
    (box_hungarian, {}),
    (box_hungarian, {"mode": "f_beta", "beta": 2.0}),
    (box_hungarian, {"min_iou": 0.5}),
    (box_ap, {}),
    (box_ap, {"thresholds": (0.3,)}),
    (box_confidence, {}),
]
each_variant = pytest.mark.parametrize(("reward", "settings"), VARIANTS)


def answer(*boxes, confident=True):
    """Boxes with confidences, so that every reward here applies."""
    return says(*boxes, scores=[1.0] * len(boxes) if confident else ())


def score_of(reward, boxes, target=BOTH, **settings):
    return reward(answer(*boxes), target, **settings)


def slow_matrix(pred, true, value):
    return np.array([[value(p, t) for t in true] for p in pred], dtype=float).reshape(len(pred), len(true))


def slow_share(pred, true, value):
    """Best total of one-to-one pairs, by trying them all, over the larger number; empty sides by the rule."""
    if not pred or not true:
        return float(not pred and not true)
    return largest_total(slow_matrix(pred, true, value)) / max(len(pred), len(true))


# --- known values


def test_box_iou_known_values():
    half, shifted = [4, 4, 16, 9], [4, 4, 16, 12]
    one = target_of(LEFT)
    assert score_of(box_iou, [half], one) == 0.5
    assert score_of(box_iou, [half], one, power=2) == 0.25
    assert score_of(box_iou, [half], one, threshold=0.5) == 0.0
    assert score_of(box_iou, [shifted], one, threshold=0.5) == 1.0
    assert score_of(box_iou, [shifted]) == pytest.approx(0.4)
    assert score_of(box_iou, [RIGHT, shifted]) == pytest.approx(0.9)
    assert score_of(box_iou, [[4, 4, 34, 28]], several="hull") == 1.0
    assert score_of(box_iou, [LEFT], several="hull") == pytest.approx(120 / 720)


def test_box_giou_known_values():
    one = target_of([0, 0, 10, 10])
    assert score_of(box_giou, [[0, 0, 10, 10]], one) == 1.0
    assert score_of(box_giou, [[10, 0, 20, 10]], one) == 0.0
    assert score_of(box_giou, [[20, 0, 30, 10]], one) == pytest.approx(-1 / 3)
    assert score_of(box_giou, [LEFT]) == 0.0  # one right, one missing: (1 - 1) / 2
    assert score_of(box_giou, [LEFT, RIGHT, FAR, FAR]) == 0.0


def test_box_l1_known_values():
    off = [6, 6, 18, 16]
    one = target_of(LEFT)
    assert score_of(box_l1, [off], one, within_px=2) == 0.0
    assert score_of(box_l1, [off], one, within_px=2.01) == 1.0
    assert score_of(box_l1, [off], one, within_px=8, graded=True) == 0.75
    assert score_of(box_l1, [off, RIGHT], within_px=2) == 0.5
    wide, high = 840 / WIDTH, 840 / HEIGHT
    for box, distance in (([6, 4, 16, 14], 2 * wide / 4), ([4, 4, 16, 16], 2 * high / 4)):
        assert score_of(box_l1, [box], one, within_px=distance + 0.1, resized_to=840) == 1.0
        assert score_of(box_l1, [box], one, within_px=distance - 0.1, resized_to=840) == 0.0


def test_box_count_known_values():
    three = target_of(LEFT, RIGHT, FAR)
    assert score_of(box_count, [FAR, WHOLE, LEFT], three) == 1.0
    assert score_of(box_count, [FAR], three) == 0.0
    assert score_of(box_count, [FAR], three, graded=True) == pytest.approx(1 / 3)
    assert score_of(box_count, [FAR, LEFT, RIGHT, WHOLE], graded=True) == 0.5
    assert score_of(box_count, [FAR, FAR]) == 0.0
    assert score_of(box_count, [FAR, FAR], graded=True) == 0.0


def test_box_hungarian_known_values():
    shifted = [4, 4, 16, 12]
    assert score_of(box_hungarian, [shifted]) == pytest.approx(0.4)
    assert score_of(box_hungarian, [shifted], mode="f_beta") == pytest.approx(2 * 0.8 / 3)
    assert score_of(box_hungarian, [shifted], mode="f_beta", beta=2) == pytest.approx(5 * 0.8 / 9)
    assert score_of(box_hungarian, [shifted, FAR], min_iou=0.8) == 0.0
    quality = score_of(box_hungarian, [shifted, FAR], mode="f_beta", min_iou=0.5)
    assert quality == pytest.approx(0.8 / (1 + 0.5 + 0.5))  # panoptic quality: one hit, one false alarm, one miss


def test_box_ap_known_values():
    assert score_of(box_ap, [LEFT, RIGHT]) == 1.0
    assert score_of(box_ap, [LEFT]) == 0.5
    assert score_of(box_ap, [FAR, LEFT, RIGHT], count_penalty=False) == pytest.approx(2 / 3)
    assert score_of(box_ap, [LEFT, FAR, RIGHT], count_penalty=False) == pytest.approx((1 + 2 / 3) / 2)
    assert score_of(box_ap, [LEFT, RIGHT, FAR], count_penalty=False) == 1.0
    assert score_of(box_ap, [LEFT, RIGHT, FAR]) == pytest.approx(2 / 3)
    assert score_of(box_ap, [[4, 4, 16, 12]], target_of(LEFT)) == pytest.approx(
        0.7
    )  # IoU 0.8 reaches 7 of 10 thresholds


def test_box_ap_ranks_by_confidence_and_then_by_order():
    ranked = says(FAR, LEFT, RIGHT, scores=[0.1, 0.9, 0.8])
    assert box_ap(ranked, BOTH, count_penalty=False) == 1.0
    tied = says(FAR, LEFT, RIGHT, scores=[0.5, 0.5, 0.5])
    assert box_ap(tied, BOTH, count_penalty=False) == pytest.approx(2 / 3)
    many = [[n, 0, n + 1, 1] for n in range(40)]
    for place in (0, 10, 20, 30, 40):
        boxes = [*many[:place], LEFT, *many[place:]]
        tied = says(*boxes, scores=[0.25 + 0.5 * (n % 2) for n in range(place)] + [0.5] * (len(boxes) - place))
        above = place // 2
        assert box_ap(tied, target_of(LEFT), count_penalty=False) == pytest.approx(1 / (above + 1))


def test_box_ap_pairs_a_box_with_the_lesion_that_it_fits_best():
    two = target_of([0, 0, 10, 10], [2, 0, 12, 10])
    assert score_of(box_ap, [[2, 0, 12, 10], [0, 0, 10, 7]], two, thresholds=[0.5]) == 1.0


def test_box_confidence_known_values():
    def confidence(boxes, scores, target=BOTH, **settings):
        return box_confidence(says(*boxes, scores=scores), target, **settings)

    assert confidence([LEFT, RIGHT], [1.0, 0.5]) == 0.75
    assert confidence([LEFT], [1.0]) == 0.5
    assert confidence([LEFT, FAR], [1.0, 0.5]) == 0.25
    assert confidence([LEFT, FAR], [1.0, 0.0]) == 0.5
    assert confidence([LEFT, FAR], [0.2, 1.0]) == 0.0
    assert confidence([[4, 4, 16, 9]], [1.0], target_of(LEFT)) == 0.0
    assert confidence([[4, 4, 16, 9]], [1.0], target_of(LEFT), threshold=0.4) == 1.0
    assert confidence([LEFT, RIGHT], []) == 0.0


# --- slow readings of the equations

pairs = given(box_lists(unique=True), box_lists(unique=True))


@pairs
def test_box_iou_and_hungarian_equal_a_slow_reading(pred, true):
    target = target_of(*true)
    assert score_of(box_iou, pred, target) == pytest.approx(slow_share(pred, true, slow_iou))
    assert score_of(box_hungarian, pred, target) == pytest.approx(slow_share(pred, true, slow_iou))
    for threshold in (0.0, 0.3):
        expected = slow_share(pred, true, lambda p, t, limit=threshold: slow_iou(p, t) > limit)
        assert score_of(box_iou, pred, target, threshold=threshold) == pytest.approx(expected)
    squared = slow_share(pred, true, lambda p, t: slow_iou(p, t) ** 2)
    assert score_of(box_iou, pred, target, power=2) == pytest.approx(squared)
    if pred and true:
        total = slow_share(pred, true, slow_iou) * max(len(pred), len(true))
        precision, recall = total / len(pred), total / len(true)
        for beta in (0.5, 1.0, 2.0):
            expected = (1 + beta**2) * precision * recall / (beta**2 * precision + recall) if total else 0.0
            assert score_of(box_hungarian, pred, target, mode="f_beta", beta=beta) == pytest.approx(expected)


@pairs
def test_box_giou_equals_a_slow_reading(pred, true):
    if pred and true:
        small, large = sorted([pred, true], key=len)
        options = itertools.permutations(range(len(large)), len(small))
        best = max(sum(float(giou(a, large[n])) for a, n in zip(small, order, strict=True)) for order in options)
        expected = (best - (len(large) - len(small))) / len(large)
    else:
        expected = 1.0 if not pred and not true else -1.0
    assert score_of(box_giou, pred, target_of(*true)) == pytest.approx(expected)


@pairs
def test_box_l1_equals_a_slow_reading(pred, true):
    def off(p, t):
        return sum(abs(a - b) for a, b in zip(p, t, strict=True)) / 4

    target = target_of(*true)
    assert score_of(box_l1, pred, target, within_px=6) == pytest.approx(
        slow_share(pred, true, lambda p, t: off(p, t) < 6)
    )
    graded = slow_share(pred, true, lambda p, t: max(0.0, 1 - off(p, t) / 6))
    assert score_of(box_l1, pred, target, within_px=6, graded=True) == pytest.approx(graded)


def slow_ap(pred, true, threshold, recalls):
    """Average precision as COCO defines it: the mean over the recall levels of the best precision from there on."""
    free, curve, hits = set(range(len(true))), [], 0
    for rank, box in enumerate(pred, start=1):
        overlaps = [(slow_iou(box, true[n]), -n) for n in free if slow_iou(box, true[n]) >= threshold]
        if overlaps:
            free.remove(-max(overlaps)[1])
            hits += 1
        curve.append((hits / len(true), hits / rank))
    return sum(max([p for r, p in curve if r >= level - 1e-9], default=0.0) for level in recalls) / len(recalls)


@given(box_lists(unique=True, max_size=6), box_lists(unique=True), st.sampled_from([0.2, 0.5, 0.75]))
def test_box_ap_equals_a_slow_reading_and_coco_up_to_its_sampling(pred, true, threshold):
    if not pred or not true:
        return
    value = score_of(box_ap, pred, target_of(*true), thresholds=[threshold], count_penalty=False)
    steps = [(k + 1) / len(true) for k in range(len(true))]
    assert value == pytest.approx(slow_ap(pred, true, threshold, steps))
    assert value == pytest.approx(slow_ap(pred, true, threshold, [level / 100 for level in range(101)]), abs=0.0101)
    penalised = score_of(box_ap, pred, target_of(*true), thresholds=[threshold])
    assert penalised == pytest.approx(value * min(1, len(true) / len(pred)))


# --- what holds for all of them


@each_variant
@given(box_lists(), box_lists())
def test_scores_stay_in_the_declared_range(reward, settings, pred, true):
    made = make_reward(reward, **settings)
    assert made.range is not None
    low, high = made.range
    value = made.score(answer(*pred), target_of(*true))
    assert value is not None
    assert low <= value <= high


@each_variant
@given(box_lists(), st.randoms(use_true_random=False))
def test_the_ground_truth_in_any_order_has_the_highest_score(reward, settings, true, random):
    shuffled = random.sample(true, len(true))
    assert score_of(reward, shuffled, target_of(*true), **settings) == pytest.approx(1.0)


@each_variant
@given(box_lists(unique=True), box_lists(unique=True), st.integers(0, 3), st.integers(0, 4))
def test_a_copy_of_a_box_never_pays(reward, settings, pred, true, which, place):
    if not pred:
        return
    target = target_of(*true)
    once = score_of(reward, pred, target, **settings)
    copied = [*pred[:place], pred[which % len(pred)], *pred[place:]]
    if reward is not box_ap or place > which % len(pred):  # else the ranking changes
        assert score_of(reward, copied, target, **settings) <= once + 1e-9
    assert score_of(reward, pred * 2, target, **settings) <= once + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(("reward", "settings"), [v for v in VARIANTS if v[0] is not box_ap])
@given(box_lists(), box_lists(), st.randoms(use_true_random=False))
def test_the_order_of_boxes_does_not_matter(reward, settings, pred, true, random):
    shuffled = score_of(reward, random.sample(pred, len(pred)), target_of(*random.sample(true, len(true))), **settings)
    assert shuffled == pytest.approx(score_of(reward, pred, target_of(*true), **settings))


@each_variant
def test_empty_sides(reward, settings):
    lowest = LOWEST[reward]
    assert score_of(reward, [], EMPTY, **settings) == 1.0
    assert score_of(reward, [LEFT], EMPTY, **settings) == lowest
    assert score_of(reward, [[7, 7, 7, 7]], EMPTY, **settings) == lowest
    assert score_of(reward, [], BOTH, **settings) == lowest
    assert reward(says(points=[[5, 5]]), EMPTY, **settings) == lowest  # a hallucinated point is no empty answer
    assert reward(says(points=[[5, 5]]), BOTH, **settings) == lowest


UNREADABLE = {
    "empty": "",
    "blank": " ",
    "no answer": "<think>Dark.</think>",
    "JSON only in the reasoning": f'<think>{{"bbox_2d": {LEFT}}}</think><answer>none</answer>',
    "text after the answer": in_answer(json.dumps([{"bbox_2d": LEFT}, {"bbox_2d": RIGHT}])) + " Done.",
    "two answers": in_answer(json.dumps({"bbox_2d": LEFT})) * 2,
    "cut off": in_answer(json.dumps([{"bbox_2d": LEFT}, {"bbox_2d": RIGHT}])[:-2]),
    "one bad box": in_answer(json.dumps([{"bbox_2d": LEFT}, {"bbox_2d": [9, 9, 1, 1]}])),
}


@each_variant
@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_an_unreadable_text_scores_the_lowest_value(reward, settings, text):
    prediction = read(text)
    assert not prediction.valid
    assert reward(prediction, BOTH, **settings) == LOWEST[reward]
    assert reward(prediction, EMPTY, **settings) == LOWEST[reward]


def test_an_unreadable_text_scores_for_its_boxes_on_request():
    prediction = read(UNREADABLE["text after the answer"])
    for reward in (box_iou, box_giou, box_l1, box_count, box_hungarian, box_ap):
        assert reward(prediction, BOTH, require_valid=False) == 1.0
    assert box_iou(read(UNREADABLE["two answers"]), BOTH, require_valid=False) == 0.0
    assert box_iou(read(UNREADABLE["one bad box"]), BOTH, require_valid=False) == 0.5


# --- traps


def test_one_pixel_and_degenerate_boxes():
    pixel = target_of([5, 5, 6, 6])
    for reward in (box_iou, box_giou, box_l1, box_hungarian, box_ap, box_confidence):
        assert score_of(reward, [[5, 5, 6, 6]], pixel) == 1.0
    for reward in (box_iou, box_hungarian, box_ap, box_confidence):
        assert score_of(reward, [[6, 5, 7, 6]], pixel) == 0.0
        assert score_of(reward, [[5, 5, 5, 5]], pixel) == 0.0


@each_variant
def test_a_grid_of_boxes_and_the_whole_image_score_less_than_the_truth(reward, settings):
    grid = [[x, y, x + 5, y + 4] for x in range(0, WIDTH, 5) for y in range(0, HEIGHT, 4)]
    honest = score_of(reward, [LEFT, RIGHT], **settings)
    several = settings.get("several") == "hull"  # the hull of a grid is the whole image
    assert score_of(reward, grid, **settings) <= (0.6 if several else 0.1) * honest
    if reward is not box_count:
        assert score_of(reward, [WHOLE] * 2, **settings) <= 0.6 * honest
        assert score_of(reward, [WHOLE], **settings) <= 0.6 * honest


@given(box_lists(), box_lists(), st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=4), st.randoms())
def test_copies_with_other_confidences_neither_pay_nor_depend_on_the_order(pred, true, scores, random):
    target = target_of(*true)
    answers = list(zip(pred * 2, (scores * 2)[: 2 * len(pred)], strict=True))
    value = box_confidence(says(*[box for box, _ in answers], scores=[score for _, score in answers]), target)
    random.shuffle(answers)
    shuffled = box_confidence(says(*[box for box, _ in answers], scores=[score for _, score in answers]), target)
    assert shuffled == pytest.approx(value)
    known = {tuple(box): (box, score) for box, score in sorted(answers, key=lambda answer: answer[1])}  # the surest
    once = box_confidence(
        says(*[box for box, _ in known.values()], scores=[score for _, score in known.values()]), target
    )
    if len(set(map(tuple, true))) == len(true):
        assert value <= once + 1e-9


def test_wrong_boxes_with_no_confidence_score_nothing():
    junk = [[n, 0, n + 1, 1] for n in range(10)]
    assert box_confidence(says(*junk, scores=[0.0] * 10), BOTH) == 0.0


def test_boxes_below_the_last_hit_cost_by_default_only():
    boxes = [LEFT, RIGHT, FAR, WHOLE]
    assert score_of(box_ap, boxes) == 0.5
    assert score_of(box_ap, boxes, count_penalty=False) == 1.0


def test_twin_lesions_may_be_answered_by_twin_boxes():
    twins = target_of(LEFT, LEFT)
    assert score_of(box_iou, [LEFT, LEFT], twins) == 1.0
    assert score_of(box_iou, [LEFT], twins) == 0.5
    assert score_of(box_iou, [LEFT] * 3, twins) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("reward", "settings", "message"),
    [
        (box_iou, {"threshold": 1.0}, r"threshold=1\.0; expected None or a number in \[0, 1\)"),
        (box_iou, {"threshold": -0.1}, r"threshold=-0\.1"),
        (box_iou, {"power": 0}, "power=0; expected a positive number"),
        (box_iou, {"several": "first"}, "several='first'; expected 'matched' or 'hull'"),
        (box_l1, {"within_px": 0}, "within_px=0; expected a positive number of pixels"),
        (box_l1, {"resized_to": 0}, "resized_to=0; expected None or a positive edge"),
        (box_hungarian, {"mode": "sum"}, "mode='sum'; expected 'max' or 'f_beta'"),
        (box_hungarian, {"beta": 0}, "beta=0; expected a positive number"),
        (box_hungarian, {"min_iou": 1}, r"min_iou=1; expected a number in \[0, 1\)"),
        (box_ap, {"thresholds": ()}, r"thresholds=\(\); expected numbers in \(0, 1\]"),
        (box_ap, {"thresholds": 0.5}, r"thresholds=0\.5"),
        (box_ap, {"thresholds": (0.5, 1.5)}, r"thresholds=\(0\.5, 1\.5\)"),
        (box_confidence, {"threshold": 1}, r"threshold=1; expected a number in \[0, 1\)"),
    ],
)
def test_bad_settings(reward, settings, message):
    with pytest.raises(RewardError, match=message):
        reward(answer(LEFT), BOTH, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(("reward", "settings"), [variant for variant in VARIANTS if variant[1]])
def test_what_is_declared_holds_for_these_settings_too(reward, settings):
    check_reward(reward, max_examples=20, **settings)


@each_variant
def test_work_is_linear_in_the_boxes(reward, settings):
    def scored(count):
        boxes = [{"bbox_2d": [n % 30, n % 20, n % 30 + 10 + n * 1e-9, 32], "score": 0.5} for n in range(count)]
        prediction = read(in_answer(json.dumps(boxes)))
        assert len(prediction.boxes) == count
        return lambda: reward(prediction, BOTH, **settings)

    assert scored(16_000)() < 0.6
    assert grows_linearly(scored, 300)
