"""Each trap is a way in which a published system scored for the wrong thing."""

import itertools
import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from reward_cases import (
    EMPTY,
    GOOD,
    HEIGHT,
    TARGET,
    TRUE_BOXES,
    WHOLE,
    WIDTH,
    as_trl_calls,
    mask_of,
    read,
    says,
)
from trl.trainer.utils import get_callable_name, is_async_callable

from segrl.errors import FrameError, RewardError, UnknownNameError
from segrl.predictions import Frame, Prediction, Status, Target, format_answer, format_completion
from segrl.rewards import CompletionFormat, list_rewards, make_reward, register_reward, registry


def score(name, prediction, target=TARGET, **settings):
    return make_reward(name, **settings).score(prediction, target)


# --- the published formulas


def test_format_scores_for_the_whole_grammar_only():
    assert score("format", read(GOOD)) == 1.0
    assert [score("format", read(text)) for text in ("", GOOD + "!", GOOD[7:], GOOD.replace("<seg>", ""))] == [0.0] * 4


def test_box_f1_known_values():
    assert score("box_f1", says(*TRUE_BOXES)) == 1.0
    assert score("box_f1", says(TRUE_BOXES[1], TRUE_BOXES[0])) == 1.0
    assert score("box_f1", says(TRUE_BOXES[0])) == pytest.approx(2 / 3)
    assert score("box_f1", says([4, 4, 16, 12], TRUE_BOXES[1])) == pytest.approx((0.8 + 1) / 2)
    missed = says([4, 4, 16, 12], [0, 20, 8, 28])  # IoU 0.8 and 0
    assert score("box_f1", missed) == pytest.approx((0.8 + 0) / 2 * 0.5)
    assert score("box_f1", missed, mean_over="true_positives") == pytest.approx(0.8 * 0.5)


def test_box_f1_averages_every_matched_pair_as_the_equation_is_written():
    """IoU 0.9 and 0.3 have a mean of 0.6; with a threshold of 0.5 one of the two is a true positive, so F1 is 0.5."""
    true = [[0, 0, 10, 10], [20, 0, 30, 10]]
    target = Target(mask_of(*true), np.array(true, dtype=float))
    found = says([0, 0, 10, 9], [20, 0, 30, 3])
    assert score("box_f1", found, target) == pytest.approx(0.6 * 0.5)
    assert score("box_f1", found, target, min_iou=0.2) == pytest.approx(0.6)
    assert score("box_f1", found, target, mean_over="true_positives") == pytest.approx(0.9 * 0.5)
    with pytest.raises(RewardError, match="mean_over='all'; expected Literal"):
        score("box_f1", found, target, mean_over="all")
    boxes = [make_reward("core_seg", **settings).parts[1][0] for settings in ({}, {"mean_over": "true_positives"})]
    assert [part.score(found, target) for part in boxes] == [pytest.approx(0.3), pytest.approx(0.45)]


def test_box_f1_counts_a_pair_above_the_threshold_only():
    half = [4, 4, 16, 9]
    one = Target.from_mask(mask_of(TRUE_BOXES[0]))
    assert score("box_f1", says(half), one) == 0.0
    assert score("box_f1", says(half), one, min_iou=0.49) == 0.5
    assert score("box_f1", says(half), one, min_iou=0) == 0.5


@st.composite
def box_lists(draw):
    boxes = []
    for _ in range(draw(st.integers(0, 4))):
        x1, y1 = draw(st.integers(0, WIDTH - 1)), draw(st.integers(0, HEIGHT - 1))
        boxes.append([x1, y1, draw(st.integers(x1 + 1, WIDTH)), draw(st.integers(y1 + 1, HEIGHT))])
    return boxes


@given(box_lists(), box_lists(), st.sampled_from([0.0, 0.3, 0.5]), st.sampled_from(["matched", "true_positives"]))
def test_box_f1_equals_a_slow_reading_of_the_paper(pred, true, min_iou, mean_over):
    """Among assignments of the same total IoU the number of true positives is open: the score is one of theirs."""

    def cover(box):
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    unique = [box for n, box in enumerate(pred) if pred[:n].count(box) < max(1, true.count(box))]
    iou = np.array([[len(cover(p) & cover(t)) / len(cover(p) | cover(t)) for t in true] for p in unique])
    target = Target(mask_of(*true), np.array(true, dtype=float).reshape(-1, 4))
    expected = [float(not pred and not true)]
    if pred and true:
        short, long = sorted((len(unique), len(true)))
        table = iou if len(unique) == short else iou.T
        pairings = [table[range(short), order] for order in itertools.permutations(range(long), short)]
        largest = max(pairing.sum() for pairing in pairings)
        expected = []
        for pairing in pairings:
            hits = pairing[pairing > min_iou]
            if np.isclose(pairing.sum(), largest):
                f1 = 2 * len(hits) / (len(pred) + len(true))
                counted = pairing if mean_over == "matched" else hits
                expected.append(f1 * counted.mean() if len(hits) else 0.0)
    found = score("box_f1", says(*pred), target, min_iou=min_iou, mean_over=mean_over)
    assert any(found == pytest.approx(value) for value in expected)


def test_dual_granularity_mask_known_values():
    target = Target.from_mask(mask_of([0, 0, 10, 10]))
    reward = partial(score, "dual_granularity_mask", target=target)
    assert reward(says(mask=target.mask)) == 3.0
    assert reward(says(mask=mask_of([0, 0, 10, 5]))) == pytest.approx(1 + 2 * 2 / 3)
    assert reward(says(mask=mask_of([10, 0, 20, 10]))) == 0.0  # adjacent boxes fill their hull
    assert reward(says(mask=mask_of([20, 0, 30, 10]))) == pytest.approx(-1 / 3)
    assert reward(says(mask=mask_of([0, 0, 10, 5])), dice_weight=1.0, dice_threshold=0.9) == pytest.approx(0.5)


@given(box_lists(), box_lists())
def test_dual_granularity_mask_stays_in_its_published_range(pred, true):
    value = score("dual_granularity_mask", says(mask=mask_of(*pred)), Target.from_mask(mask_of(*true)))
    assert value is not None
    assert -1 <= value <= 1 or 1.1 <= value <= 3


# --- the traps

UNREADABLE = {
    "empty text": "",
    "blank text": " \n",
    "the prompt's token only": "The mask token.",
    "two answers": GOOD + "<answer>[4, 4, 16, 14]<seg></answer>",
    "text after the answer": GOOD + " I hope this helps.",
    "text before the reasoning": "Sure! " + GOOD,
    "boxes only in the reasoning": '<think>{"bbox_2d": [4, 4, 16, 14]}, [22, 18, 34, 28]</think>',
    "no token": GOOD.replace("<seg>", ""),
    "token only in the reasoning": GOOD.replace("<seg>", "").replace("Two", "<seg> Two"),
    "two tokens": GOOD.replace("<seg>", "<seg><seg>"),
    "no reasoning": GOOD[GOOD.index("<answer>") :],
    "a bad box besides the good ones": GOOD.replace(".<seg>", ", [9, 9, 1, 1].<seg>"),
}


@pytest.mark.parametrize("target", [TARGET, EMPTY], ids=["lesions", "no lesion"])
@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_an_unreadable_text_scores_the_lowest_value_of_every_reward(text, target):
    prediction = read(text)
    perfect = prediction.with_mask(target.mask)
    assert score("format", prediction, target) == 0.0
    assert score("box_f1", prediction, target) == 0.0
    assert score("dual_granularity_mask", prediction, target) == -1.0
    assert score("dual_granularity_mask", perfect, target) == -1.0


def test_a_bare_answer_scores_in_the_ablation_without_reasoning():
    prediction = read(UNREADABLE["no reasoning"], require_reasoning=False)
    assert score("format", prediction) == score("box_f1", prediction) == 1.0


def test_an_invalid_text_scores_for_its_boxes_only_on_request():
    prediction = read(GOOD + "!")
    assert score("box_f1", prediction, require_valid=False) == 1.0
    assert score("dual_granularity_mask", prediction.with_mask(TARGET.mask), require_valid=False) == 3.0


def test_a_mask_without_its_token_is_never_paid():
    prediction = read("").with_mask(TARGET.mask)
    assert score("dual_granularity_mask", prediction, require_valid=False) == -1.0


def test_the_shadowing_first_answer_is_not_paid():
    wrong_first = "<think>a</think><answer>[0, 0, 2, 2]<seg></answer>" + GOOD
    assert score("box_f1", read(wrong_first), require_valid=False) == 0.0


def test_boxes_in_the_reasoning_add_and_remove_nothing():
    noisy = GOOD.replace("Two", '[{"bbox_2d": [0, 0, 9, 9]}] Two')
    assert score("box_f1", read(noisy)) == score("box_f1", read(GOOD)) == 1.0


def test_duplicates_and_whole_image_boxes_only_cost():
    assert score("box_f1", says(*TRUE_BOXES, TRUE_BOXES[0])) == pytest.approx(0.8)
    assert score("box_f1", says(*TRUE_BOXES, *TRUE_BOXES, *TRUE_BOXES)) == pytest.approx(0.5)
    assert score("box_f1", says(WHOLE)) == 0.0
    assert score("box_f1", says(*TRUE_BOXES, WHOLE)) == pytest.approx(0.8)
    assert score("box_f1", says(*[WHOLE] * 9)) == 0.0


@given(box_lists(), st.sampled_from([0.0, 0.5]))
@example([[0, 0, 27, 27]], 0.0)  # over both lesions: the copy could be the partner of the second one
def test_repeating_a_box_never_pays(boxes, min_iou):
    once = score("box_f1", says(*boxes), min_iou=min_iou)
    again = score("box_f1", says(*boxes, *boxes), min_iou=min_iou)
    assert once is not None
    assert again is not None
    assert again <= once + 1e-9


def test_a_hallucination_where_nothing_is_scores_less_than_a_correct_empty_answer():
    assert score("box_f1", says(), EMPTY) == 1.0
    assert score("box_f1", says([4, 4, 9, 9]), EMPTY) == 0.0
    assert score("box_f1", says([7, 7, 7, 7]), EMPTY) == 0.0
    assert score("dual_granularity_mask", says(mask=EMPTY.mask), EMPTY) == 3.0
    assert score("dual_granularity_mask", says(mask=mask_of([4, 4, 5, 5])), EMPTY) == -1.0
    assert score("dual_granularity_mask", says(mask=mask_of(WHOLE)), EMPTY) == -1.0


def test_an_empty_answer_where_lesions_are_is_wrong():
    assert score("box_f1", says()) == 0.0
    assert score("dual_granularity_mask", says(mask=EMPTY.mask)) == -1.0
    assert score("dual_granularity_mask", says(mask=EMPTY.mask), dice_threshold=0.0) == -1.0
    assert score("dual_granularity_mask", says()) == -1.0


def test_one_pixel_lesions_are_scored_like_any_other():
    pixel = Target.from_mask(mask_of([5, 5, 6, 6]))
    assert score("box_f1", says([5, 5, 6, 6]), pixel) == 1.0
    assert score("box_f1", says([6, 5, 7, 6]), pixel) == 0.0
    assert score("box_f1", says([5, 5, 5, 5]), pixel) == 0.0  # a point has no area
    assert score("dual_granularity_mask", says(mask=pixel.mask), pixel) == 3.0
    assert score("dual_granularity_mask", says(mask=mask_of([6, 5, 7, 6])), pixel) == 0.0


def test_a_mask_is_not_thresholded_at_128():
    stored = TARGET.mask.astype(np.uint8)
    assert score("dual_granularity_mask", says(mask=TARGET.mask), Target.from_mask(stored)) == 3.0


# --- plain TRL trainers


COMPLETIONS = {
    "plain": lambda text: text,
    "conversational": lambda text: [{"role": "assistant", "content": text}],
    "parts": lambda text: [{"role": "assistant", "content": [{"type": "text", "text": text}]}],
    "tools": lambda text: [
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": GOOD},
        {"role": "assistant", "content": text},
    ],
}


@pytest.mark.parametrize("form", COMPLETIONS.values(), ids=COMPLETIONS.keys())
def test_a_plain_trl_trainer_can_call_a_reward(form):
    reward = make_reward("box_f1", frame="original_px")
    masks = [Image.fromarray(TARGET.mask), TARGET.mask, TARGET.mask.astype(np.uint8) * 255]
    result, logged = as_trl_calls(reward, [form(GOOD), form("no"), form(GOOD)], mask=masks, lesion=["cyst", None, ""])
    assert result == [1.0, 0.0, 1.0]
    assert logged == {"valid_completions": pytest.approx(2 / 3)}
    assert get_callable_name(reward) == "box_f1"
    assert not is_async_callable(reward)


def test_two_assistant_messages_are_one_text_with_two_answers():
    message = {"role": "assistant", "content": GOOD}
    assert as_trl_calls(make_reward("format"), [[message, message]], mask=[TARGET.mask])[0] == [0.0]


def test_a_plain_trl_trainer_reads_thousandths_unless_told_otherwise():
    relative = Frame("relative_1000", (WIDTH, HEIGHT))
    text = format_completion("Dark.", format_answer("cyst", TRUE_BOXES, relative))
    result, _ = as_trl_calls(make_reward("box_f1", min_iou=0.9), [text], mask=[TARGET.mask])
    assert result == [pytest.approx(1.0, abs=0.02)]


def half_size_frame(image_size, original_size):
    assert image_size == (WIDTH // 2, HEIGHT // 2)
    return Frame("resized_px", original_size, image_size)


@pytest.mark.parametrize("columns", [{"image": [Image.new("RGB", (20, 16))]}, {"images": [[Image.new("L", (20, 16))]]}])
def test_a_frame_may_depend_on_the_image(columns):
    text = "<think>a</think><answer>[2, 2, 8, 7], [11, 9, 17, 14]<seg></answer>"
    result, _ = as_trl_calls(make_reward("box_f1", frame=half_size_frame), [text], mask=[TARGET.mask], **columns)
    assert result == [1.0]


def test_given_boxes_replace_those_of_the_mask():
    one = GOOD.replace(", [22, 18, 34, 28]", "")
    reward = make_reward("box_f1", frame="original_px")
    result, _ = as_trl_calls(reward, [one, GOOD], mask=[TARGET.mask] * 2, boxes=[TRUE_BOXES[:1], None])
    assert result == [1.0, 1.0]


def test_predictions_and_targets_of_the_trainer_are_used_as_they_are():
    reward = make_reward("dual_granularity_mask")
    prediction = [says(mask=TARGET.mask), says(mask=EMPTY.mask)]
    result, logged = as_trl_calls(reward, ["", ""], prediction=prediction, target=[TARGET, EMPTY], mask=["unread"] * 2)
    assert result == [3.0, 3.0]
    assert logged == {}


def test_an_empty_batch():
    assert as_trl_calls(make_reward("format"), [], mask=[])[0] == []


def test_the_ablation_without_reasoning_reaches_a_plain_trainer():
    text = UNREADABLE["no reasoning"].replace("<seg>", "")
    reward = make_reward("format", require_reasoning=False, require_seg=False)
    assert reward.completion_format == CompletionFormat(require_reasoning=False, require_seg=False)
    assert as_trl_calls(reward, [text], mask=[TARGET.mask])[0] == [1.0]


# --- failures name the reward and the row; nothing becomes a 0.0


def fails_on_second(prediction, target, *, fail):
    if target.name == "b.png":
        return fail()
    return None


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (lambda: {}["boxes"], "KeyError: 'boxes'"),
        (lambda: float("nan"), "returned nan; expected a finite number"),
        (lambda: float("-inf"), "returned -inf"),
        (lambda: "0.5", "TypeError: the score is the text '0.5'; expected a number or None"),
        (lambda: [1.0], "TypeError"),
    ],
)
def test_a_failing_reward_names_itself_and_the_row(fail, message):
    reward = make_reward(fails_on_second, fail=fail).named("mine")
    targets = [Target.from_mask(TARGET.mask, name=name) for name in ("a.png", "b.png")]
    with pytest.raises(RewardError, match=rf"reward 'mine', row 1 \(b\.png\).*{message}"):
        reward.score_batch([says(), says()], targets)
    with pytest.raises(RewardError, match=rf"reward 'mine' \(b\.png\).*{message}"):
        reward.score(says(), targets[1])
    assert reward.score(says(), targets[0]) is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"query": ["q", "q"]}, r"reward 'box_f1' needs a column 'mask' or 'target'; columns passed: .*query"),
        (
            {"mask": [TARGET.mask, np.arange(9).reshape(3, 3)]},
            r"'box_f1', row 1 \(b\): cannot build the target from column 'mask': b",
        ),
        ({"mask": [TARGET.mask, None]}, r"'box_f1', row 1 \(b\): cannot build the target from column 'mask'"),
        (
            {"mask": [TARGET.mask]},
            r"'box_f1', row 1 \(b\): cannot build the target from column 'mask': list index out of range",
        ),
        (
            {"mask": [TARGET.mask] * 2, "boxes": [None, [[3, 3, 1, 1]]]},
            r"row 1 \(b\): .*column 'boxes': Target\.boxes of 'b'\[0\]",
        ),
        ({"target": [TARGET]}, r"'box_f1': column 'target' has 1 rows for 2 completions"),
        ({"target": [TARGET] * 2, "prediction": [says()]}, r"'box_f1': column 'prediction' has 1 rows for 2"),
    ],
)
def test_bad_rows_stop_the_run(columns, message):
    with pytest.raises(RewardError, match=message):
        as_trl_calls(make_reward("box_f1"), [GOOD, GOOD], name=["a", "b"], **columns)


@pytest.mark.parametrize("completion", [None, 3, [{"role": "assistant"}], ["text"]])
def test_a_completion_that_is_no_text_stops_the_run(completion):
    with pytest.raises(RewardError, match=r"reward 'format', row 0 \(scan_7\.png\): cannot read the completion"):
        as_trl_calls(make_reward("format"), [completion], target=[TARGET])


def test_misaligned_masks_and_batches_stop_the_run():
    with pytest.raises(RewardError, match=r"'dual_granularity_mask' \(scan_7\.png\): DataError: .*shape"):
        score("dual_granularity_mask", says(mask=np.zeros((3, 3), dtype=bool)))
    with pytest.raises(RewardError, match="1 predictions but 2 targets"):
        make_reward("format").score_batch([says()], [TARGET, TARGET])


def test_a_trainer_without_masks_refuses_a_mask_reward():
    with pytest.raises(RewardError, match="decodes none; use SegGRPOTrainer with a MaskHead"):
        as_trl_calls(make_reward("dual_granularity_mask"), [GOOD], mask=[TARGET.mask])


# --- the registry


def test_names_and_settings_are_checked_with_a_suggestion():
    assert {"box_f1", "dual_granularity_mask", "format"} <= set(list_rewards())
    with pytest.raises(UnknownNameError, match="unknown reward 'box_f2'"):
        make_reward("box_f2")
    with pytest.raises(UnknownNameError, match=r"setting of reward 'box_f1' 'min_iuo'"):
        make_reward("box_f1", min_iuo=0.3)
    with pytest.raises(UnknownNameError, match=r"'prediction'"):
        make_reward("box_f1", prediction=None)
    with pytest.raises(RewardError, match=r"min_iou=50; expected a number in \[0, 1\)"):
        score("box_f1", says(), min_iou=50)


def test_a_frame_is_checked_when_the_reward_is_made():
    with pytest.raises(FrameError, match="frame kind 'pixels'"):
        make_reward("box_f1", frame="pixels")
    with pytest.raises(FrameError, match=r"pass frame=functools\.partial\(frame_for, processor\)"):
        make_reward("box_f1", frame="resized_px")


@pytest.fixture
def own_registry(monkeypatch):
    """Forgets what a test registers."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


@pytest.mark.usefixtures("own_registry")
def test_register_a_reward():
    @register_reward("test_wordy")
    def wordy(prediction: Prediction, target: Target, *, words: int) -> float | None:
        return None if prediction.reasoning is None else len(prediction.reasoning.split()) / words

    assert "test_wordy" in list_rewards()
    assert score("test_wordy", read(GOOD), words=6) == 0.5
    assert score("test_wordy", read(""), words=6) is None
    with pytest.raises(RewardError, match="reward 'test_wordy' needs the setting 'words'"):
        make_reward("test_wordy")
    with pytest.raises(RewardError, match=r"reward 'test_wordy' is registered already, by .*wordy"):
        register_reward("test_wordy")(lambda prediction, target: 0.0)
    with pytest.raises(RewardError, match="'box_f1' is registered already"):
        register_reward("box_f1")(wordy)
    with pytest.raises(RewardError, match="parameter 'frame', which is a setting of every reward"):
        register_reward("test_framed")(lambda prediction, target, frame: 0.0)


@pytest.mark.usefixtures("own_registry")
def test_a_reward_may_take_any_setting():
    register_reward("test_open")(lambda prediction, target, **settings: settings["anything"])
    assert score("test_open", says(), anything=2) == 2.0


@pytest.mark.slow
def test_rewards_pickle_into_another_process():
    reward = make_reward("box_f1", min_iou=0.3, frame="original_px")
    assert pickle.loads(pickle.dumps(reward)) == reward
    assert hash(pickle.loads(pickle.dumps(reward))) == hash(reward)
    code = "import pickle, sys; r = pickle.load(sys.stdin.buffer); print(r.name, r.settings, r.completion_format.frame)"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(reward), capture_output=True, check=True)
    assert done.stdout.decode().strip() == "box_f1 {'min_iou': 0.3} original_px"


def test_status_of_the_good_text():
    assert read(GOOD).status is Status.VALID
