"""Rewards for masks: published formulas, the traps of published systems, and what each reward declares."""

import math
import pickle

import numpy as np
import pytest
import references
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import segrl.rewards.builtin.masks  # noqa: F401  registers the rewards
from segrl.errors import RewardError, UnknownNameError
from segrl.predictions import Frame, Prediction, Target, format_answer, format_completion, parse_completion
from segrl.rewards import list_rewards, make_reward

HEIGHT, WIDTH = 24, 32
DIAGONAL = 40.0
FRAME = Frame("original_px", (WIDTH, HEIGHT))
NAMES = ["boundary_iou", "hd95", "mask_dice", "mask_iou", "nsd", "s_measure", "soft_dice"]
GOOD = format_completion("A dark spot.", format_answer("cyst", [[4, 4, 12, 12]], FRAME))

every_reward = pytest.mark.parametrize("name", NAMES)
masks = arrays(np.bool_, (6, 8))


def mask_of(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = True
    return mask


LESION = Target.from_mask(mask_of((4, 4, 12, 12)), name="scan_7.png")
EMPTY = Target.from_mask(mask_of())


def answer(mask: np.ndarray | None, text: str = GOOD, probability: np.ndarray | None = None) -> Prediction:
    parsed = parse_completion(text, FRAME)
    return parsed if mask is None else parsed.with_mask(mask, probability)


def score(name: str, mask: np.ndarray | None, target: Target = LESION, text: str = GOOD, **settings) -> float:
    value = make_reward(name, **settings).score(answer(mask, text), target)
    assert value is not None
    return value


def test_all_of_them_are_registered_and_score_masks():
    assert set(NAMES) <= set(list_rewards())
    assert all(make_reward(name).needs_mask for name in NAMES)


# --- the formulas


def test_known_values():
    half, missed = mask_of((4, 4, 8, 12)), mask_of((20, 12, 28, 20))
    assert score("mask_iou", half) == 0.5
    assert score("mask_iou", half, power=2) == 0.25
    assert score("mask_dice", half) == score("soft_dice", half) == pytest.approx(2 / 3)
    assert score("hd95", half) == pytest.approx(1 - 4 / 4)  # 4 px off, a tenth of the diagonal
    assert score("hd95", half, limit=0.4) == pytest.approx(1 - 4 / 16)
    # The outlines have 20 and 28 pixels.
    near = sum(d <= 2 for d in references.directed_distances(half, LESION.mask, (1, 1)))
    near += sum(d <= 2 for d in references.directed_distances(LESION.mask, half, (1, 1)))
    assert score("nsd", half) == near / 48
    assert score("nsd", half, tolerance_px=4) == 1.0
    assert score("boundary_iou", half) == references.boundary_iou(half, LESION.mask, 0.02)
    assert score("boundary_iou", half, dilation=1) == 0.5  # all rim
    assert score("s_measure", half, alpha=0.3) == pytest.approx(references.s_measure(half, LESION.mask, 0.3))
    assert [score(name, missed) for name in ("mask_iou", "mask_dice", "soft_dice", "boundary_iou", "hd95", "nsd")] == [
        0.0
    ] * 6


@every_reward
def test_the_truth_scores_most(name):
    pixel, whole = Target.from_mask(mask_of((7, 5, 8, 6))), Target.from_mask(mask_of((0, 0, WIDTH, HEIGHT)))
    for target in (LESION, EMPTY, pixel, whole):
        assert score(name, target.mask, target) == 1.0


@every_reward
def test_better_masks_score_more(name):
    scores = [score(name, mask_of((4, 4, end, end))) for end in (8, 9, 10, 11, 12)]
    assert scores == sorted(scores)
    assert scores[0] < scores[-1] == 1.0


def test_soft_dice_reads_the_probabilities():
    mask = LESION.mask
    sure, unsure = np.where(mask, 0.9, 0.0), np.where(mask, 0.6, 0.2)
    reward = make_reward("soft_dice")
    scores = [reward.score(answer(mask, probability=p), LESION) for p in (unsure, sure)]
    assert scores == [
        pytest.approx(2 * 0.6 * 64 / (0.6 * 64 + 0.2 * (HEIGHT * WIDTH - 64) + 64)),
        pytest.approx(2 * 0.9 / 1.9),
    ]
    assert reward.score(answer(mask), LESION) == 1.0
    assert reward.score(answer(mask_of(), probability=unsure), EMPTY) == 1.0  # its mask is empty
    assert reward.score(answer(mask_of(), probability=unsure), LESION) == 0.0


# --- the traps

UNREADABLE = {
    "empty text": "",
    "text after the answer": GOOD + " I hope this helps.",
    "two answers": GOOD + "<answer>[4, 4, 12, 12]<seg></answer>",
    "no token": GOOD.replace("<seg>", ""),
    "token only in the reasoning": GOOD.replace("<seg>", "").replace("A dark", "<seg> A dark"),
    "no reasoning": GOOD[GOOD.index("<answer>") :],
}


@every_reward
@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE.keys())
@pytest.mark.parametrize("target", [LESION, EMPTY], ids=["lesion", "no lesion"])
def test_an_invalid_text_scores_nothing_for_a_perfect_mask(name, text, target):
    assert score(name, target.mask, target, text) == 0.0


@every_reward
def test_a_mask_without_its_token_or_a_token_without_its_mask_scores_nothing(name):
    for target in (LESION, EMPTY):
        assert score(name, target.mask, target, GOOD.replace("<seg>", ""), require_valid=False) == 0.0
        assert score(name, None, target) == score(name, None, target, require_valid=False) == 0.0


@every_reward
def test_an_invalid_text_scores_for_its_mask_only_on_request(name):
    assert score(name, LESION.mask, text=GOOD + "!", require_valid=False) == 1.0


@every_reward
def test_empty_masks(name):
    # The published S-measure scores an empty mask 1.0, and more than 0.5 where the lesion is small.
    speck = Target.from_mask(mask_of((7, 5, 8, 6)))
    assert score(name, EMPTY.mask, EMPTY) == 1.0
    for target in (LESION, speck):
        assert score(name, EMPTY.mask, target) == 0.0
        assert score(name, target.mask, EMPTY) == 0.0
    assert score(name, mask_of((0, 0, WIDTH, HEIGHT)), EMPTY) == 0.0


@given(masks, masks)
def test_dice_is_not_twice_the_iou(pred, true):
    target, prediction = Target.from_mask(true), answer(pred)
    dice, iou = (make_reward(name).score(prediction, target) for name in ("mask_dice", "mask_iou"))
    assert dice == references.dice(pred, true) <= 1.0
    assert iou == references.iou(pred, true)


@every_reward
def test_a_mask_of_0_and_1_is_not_thresholded_at_128(name):
    for value in (1, 255):
        stored = LESION.mask.astype(np.uint8) * np.uint8(value)
        assert score(name, LESION.mask, Target.from_mask(stored)) == 1.0


@every_reward
def test_masks_of_different_sizes_are_an_error_that_names_reward_and_row(name):
    reward = make_reward(name)
    small = np.ones((HEIGHT // 2, WIDTH // 2), dtype=bool)
    with pytest.raises(RewardError, match=rf"reward '{name}', row 1 \(scan_7\.png\).*\(24, 32\), got \(12, 16\)"):
        reward.score_batch([answer(LESION.mask), answer(small)], [LESION, LESION])
    with pytest.raises(RewardError, match=rf"reward '{name}', row 0.*\(24, 32\), got \(12, 16\)"):
        reward.score_batch([answer(np.zeros_like(small)), answer(small)], [EMPTY, EMPTY])


@every_reward
def test_a_mask_that_cannot_be_paid_is_not_measured(name):
    other_size = np.ones((3, 3), dtype=bool)  # measuring it would raise
    assert score(name, other_size, text=GOOD + "!") == 0.0


@every_reward
def test_whole_image_masks_of_a_small_lesion_score_little(name):
    speck = Target.from_mask(mask_of((15, 11, 18, 13)))
    assert score(name, mask_of((0, 0, WIDTH, HEIGHT)), speck) < 0.15


# --- what they declare


@every_reward
@given(pred=masks, true=masks)
def test_declared_range_and_empty_cases(name, pred, true):
    reward = make_reward(name)
    value = score(name, pred, Target.from_mask(true))
    low, high = reward.range or (math.nan, math.nan)
    assert low <= value <= high
    empty = reward.info.empty
    assert isinstance(empty, dict)
    case = {(False, False): "both", (False, True): "prediction", (True, False): "target"}
    if key := case.get((bool(pred.any()), bool(true.any()))):
        assert value == empty[key]


@every_reward
@given(pred=masks, true=masks, axis=st.integers(0, 1), factor=st.integers(2, 3))
def test_declared_invariances(name, pred, true, axis, factor):
    claims = make_reward(name).info.invariant
    value = score(name, pred, Target.from_mask(true))
    if "flip" in claims:
        assert score(name, np.flip(pred, axis), Target.from_mask(np.flip(true, axis))) == pytest.approx(value)
    if "rescale" in claims:
        larger = [mask.repeat(factor, axis=0).repeat(factor, axis=1) for mask in (pred, true)]
        assert score(name, larger[0], Target.from_mask(larger[1])) == pytest.approx(value)
    if "box_order" in claims:
        target = Target.from_mask(true)
        assert score(name, pred, Target(target.mask, target.boxes[::-1])) == value


@pytest.mark.parametrize("name", ["mask_dice", "mask_iou", "soft_dice"])
@given(pred=masks, true=masks, changed=masks)
def test_declared_monotone(name, pred, true, changed):
    assert make_reward(name).info.monotone == ("mask",)
    better = np.where(changed, true, pred)  # some pixels corrected
    target = Target.from_mask(true)
    assert score(name, better, target) >= score(name, pred, target)


@every_reward
def test_declared_words(name):
    info = make_reward(name).info
    assert info.equation
    assert info.source
    assert info.summary.endswith((".", "?"))


@every_reward
def test_pickles(name):
    reward = pickle.loads(pickle.dumps(make_reward(name)))
    assert reward.score(answer(LESION.mask), LESION) == 1.0


# --- settings


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mask_iou", {"power": 0}, r"power=0; expected a positive number"),
        ("mask_iou", {"power": math.nan}, r"power=nan"),
        ("boundary_iou", {"dilation": -0.02}, r"dilation=-0.02; expected a positive share of the diagonal"),
        ("s_measure", {"alpha": 2}, r"alpha=2; expected a number in \[0, 1\]"),
        ("hd95", {"limit": 0.0}, r"limit=0.0; expected a positive share of the image's diagonal"),
        ("nsd", {"tolerance_px": -1}, r"tolerance_px=-1; expected a number of pixels"),
        ("nsd", {"tolerance_px": math.inf}, r"tolerance_px=inf"),
    ],
)
def test_settings_are_checked(name, settings, message):
    for mask in (LESION.mask, None):
        with pytest.raises(RewardError, match=message):
            score(name, mask, **settings)


def test_an_unknown_setting_has_a_suggestion():
    with pytest.raises(UnknownNameError, match="'tolerance'; did you mean 'tolerance_px'"):
        make_reward("nsd", tolerance=2)
