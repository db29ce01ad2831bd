"""Every property of `check_reward` catches a reward that is wrong in this one way, and nothing that is right."""

import asyncio
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from marks import sampled

from segrl.errors import RewardCheckError, RewardError, SegRLError
from segrl.metrics import boundary_iou
from segrl.predictions import Frame
from segrl.rewards import list_rewards, make_reward, register_reward, registry, reward_info, weighted_sum
from segrl.testing import CheckReport, check_reward


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def failure(reward, name, **settings):
    """The error for a reward that fails one property."""
    with pytest.raises(RewardCheckError) as caught:
        check_reward(reward, **settings)
    assert caught.value.property == name, str(caught.value)
    return caught.value


def overlap(a, b):
    sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - np.prod(sides)
    return float(np.prod(sides) / union) if union > 0 else 0.0


def quality(prediction, target):
    """IoU of the first boxes; nothing said where nothing is to be found is right."""
    if not prediction.valid:
        return 0.0
    if len(prediction.boxes) == 0 or target.empty:
        return float(len(prediction.boxes) == 0 and target.empty)
    return overlap(prediction.boxes[0], target.boxes[0])


# --- everything that is right passes


BUILT_IN = [name for name in list_rewards() if reward_info(name).origin.startswith("segrl ")]


@pytest.mark.parametrize("name", sampled(BUILT_IN, keep=2))
def test_built_in(name):
    report = check_reward(name)
    assert {"scores", "range", "deterministic", "batch equals single", "called by TRL", "YAML"} <= set(
        report.passed
    ) | ({"range"} if make_reward(name).range is None else set())
    claimed = {"box_order": "order of boxes", "flip": "mirroring", "rescale": "enlarging"}
    info = make_reward(name).info
    assert {claimed[claim] for claim in info.invariant} <= set(report.passed)
    assert not callable(info.monotone)
    assert {f"monotone in {'the mask' if claim == 'mask' else claim}" for claim in info.monotone} <= set(report.passed)
    assert info.needs_target == ("honest about nothing" in report.passed)


def test_a_plain_function():
    report = check_reward(quality, max_examples=20)
    assert isinstance(report, CheckReport)
    assert report.outcomes["range"] == report.outcomes["empty: both"] == report.outcomes["mirroring"] == "not declared"
    assert {"scores", "pickles", "YAML", "invalid text", "honest about nothing", "hostile text"} <= set(report.passed)
    assert report.examples > 40
    assert re.search(r"^quality: \d+ examples", str(report))
    assert re.search(r"^  hostile text +passed$", str(report), re.MULTILINE)


class Vectorised:
    """A class with a setting."""

    def __init__(self, power: float = 2.0):
        self.power = power

    def score_batch(self, predictions, targets):
        return np.array([quality(*pair) for pair in zip(predictions, targets, strict=True)]) ** self.power


class Winner:
    """1 for the best answers to a prompt."""

    def score_group(self, predictions, targets):
        scores = [quality(*pair) for pair in zip(predictions, targets, strict=True)]
        return [float(score == max(scores)) for score in scores]


def brevity(completions, **columns):
    return [1 / (1 + len(text)) for text in completions]


def thinks(completions, **columns):
    return [float(text.strip().startswith("<think>")) for text in completions]


def few_tokens(completions, completion_ids, solution, **columns):
    rows = zip(completions, completion_ids, solution, strict=True)
    return [float(len(ids) < 200 and wanted in text) for text, ids, wanted in rows]


def in_original_pixels(shown, original):
    return Frame("original_px", original)


async def judged(prediction, target):
    await asyncio.sleep(0)
    return quality(prediction, target)


def log_and_progress(prediction, target, *, log_metric, progress):
    log_metric("seen", 1.0)
    return progress * quality(prediction, target)


@pytest.mark.parametrize(
    "reward",
    [
        Vectorised,
        Winner,
        brevity,
        judged,
        log_and_progress,
        make_reward("box_f1").gate("format").clip(0.1, 0.9).scale(2.0, -1.0).schedule({0: 0, 0.5: 1}),
        make_reward("box_iou").group_relative("rank"),
        make_reward("box_iou").group_relative("zscore", group_size=3),
        weighted_sum({"format": 1.0, judged: 2.0}, "mixed"),
        weighted_sum({"slice_format": 1.0, "slice_boxes": 2.0}, "slices"),
        weighted_sum([(thinks, 0.5), ("mask_iou", 1.0)], "with TRL's"),
        make_reward("box_iou", seg_token="", require_seg=False, require_reasoning=False, answer_format="json"),
        make_reward("mask_iou", frame=in_original_pixels),
    ],
    ids=lambda reward: getattr(reward, "name", getattr(reward, "__name__", "?")),
)
def test_every_form_of_a_reward(reward):
    report = check_reward(reward, max_examples=15)
    assert {"scores", "deterministic", "batch equals single", "called by TRL", "hostile text"} <= set(report.passed)


def test_settings_are_those_of_make_reward():
    assert check_reward("box_f1", min_iou=0.3, answer_format="json", max_examples=5).reward == "box_f1"
    with pytest.raises(SegRLError, match="did you mean 'min_iou'"):
        check_reward("box_f1", minimum_iou=0.3)


def test_columns_of_a_trl_function():
    assert "scores" in check_reward(few_tokens, columns={"solution": "[0, 0"}, max_examples=10).passed
    with pytest.raises(RewardError, match=r"'few_tokens' reads the column 'solution'"):
        check_reward(few_tokens)


def test_what_is_not_at_the_top_of_a_module_need_not_pickle():
    report = check_reward(lambda prediction, target: quality(prediction, target), max_examples=5)
    assert report.outcomes["pickles"].startswith("not applicable: test_what_is_not")
    assert report.outcomes["YAML"].startswith("not applicable: reward '<lambda>' cannot be written")


def test_the_same_seed_gives_the_same_example():
    errors = [failure(no_boxes_no_index, "scores", seed=seed) for seed in (1, 1)]
    assert str(errors[0]) == str(errors[1])


# --- scores


def no_boxes_no_index(prediction, target):
    return float(prediction.boxes[0, 0] >= 0)


def mean_of_nothing(prediction, target):
    return float(np.sum(prediction.boxes) / max(len(prediction.boxes), 1e-400))


def verdict(prediction, target):
    return "good" if prediction.valid else "bad"


class OnlyTheValid:
    def score_batch(self, predictions, targets):
        return [1.0 for prediction in predictions if prediction.valid]


def one_for_all(completions, **columns):
    return [1.0]


@pytest.mark.parametrize(
    ("reward", "found"),
    [
        (no_boxes_no_index, "IndexError"),
        (verdict, "the score is the text"),
        (OnlyTheValid, "returned 0 scores for 1 rows"),
        (one_for_all, "returned 1 scores for 2 rows"),
        (lambda prediction, target: float("nan") if prediction.valid else 0.0, "returned nan"),
        (lambda prediction, target: -np.inf if target.empty else 0.0, "returned -inf"),
        (lambda prediction, target: 1.0 if prediction.mask[0, 0] else 0.0, "'NoneType' object is not subscriptable"),
    ],
)
def test_scores(reward, found):
    error = failure(reward, "scores", seed=1)
    assert found in error.found
    assert error.expected == "one finite number or None per row, and no exception, whatever the model says"


def test_the_message_holds_the_smallest_example_and_the_cause():
    error = failure(no_boxes_no_index, "scores")
    assert str(error) == (
        "reward 'no_boxes_no_index' fails 'scores'\n"
        "expected: one finite number or None per row, and no exception, whatever the model says\n"
        "found: RewardError: reward 'no_boxes_no_index': IndexError: index 0 is out of bounds for axis 0 with size 0\n"
        "smallest example:\n"
        "row 0\n"
        "  text: '<think>One region differs from the tissue around it.</think>"
        "<answer>No lesion is visible.<seg></answer>' (valid)\n"
        "  boxes: []\n"
        "  true boxes: []\n"
        "  true mask:\n"
        "    ."
    )
    assert isinstance(error, AssertionError)
    assert isinstance(error.__cause__, RewardError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# --- any batch


def dice_of_two(prediction, target):
    """Twice the IoU is not Dice."""
    if prediction.mask is None or not (prediction.mask | target.mask).any():
        return 0.0
    return 2 * float((prediction.mask & target.mask).sum() / (prediction.mask | target.mask).sum())


def test_range():
    register_reward("dice_of_two", needs_mask=True, range=(0, 1))(dice_of_two)
    error = failure("dice_of_two", "range")
    assert (error.expected, error.found) == ("scores in [0, 1], as declared", "2")
    assert "  mask:\n    " in error.example
    assert len(error.example) < 400, "a mask of a few pixels"


def test_range_over_the_training_progress():
    def late(prediction, target, *, progress):
        return 1.0 - progress

    register_reward("late", range=(0, 0.5))(late)
    assert "progress: 0" in failure("late", "range").example


def sorts_in_place(prediction, target):
    prediction.boxes.sort(axis=0)
    return quality(prediction, target)


def crops_the_truth(prediction, target):
    if prediction.mask is not None:
        target.mask[:] &= prediction.mask
    return 0.0


def test_input_unchanged():
    assert "Prediction.boxes left as it was" in failure(sorts_in_place, "input unchanged").expected
    register_reward("crops_the_truth", needs_mask=True)(crops_the_truth)
    assert "Target.mask left as it was" in failure("crops_the_truth", "input unchanged").expected


def coin(prediction, target):
    return float(np.random.default_rng().random())


class Counter:
    def __init__(self):
        self.seen = 0

    def score_batch(self, predictions, targets):
        self.seen += len(predictions)
        return [float(self.seen)] * len(predictions)


class RunningBest:
    """A group is compared with the groups before it."""

    def __init__(self):
        self.best = 0.0

    def score_group(self, predictions, targets):
        scores = [len(prediction.boxes) - self.best for prediction in predictions]
        self.best = max(self.best, *scores)
        return scores


@pytest.mark.parametrize("reward", [coin, Counter, RunningBest])
def test_deterministic(reward):
    assert "the same scores" in failure(reward, "deterministic").expected


class Standardised:
    """Scores relative to whatever else is in the batch."""

    def score_batch(self, predictions, targets):
        lengths = np.array([len(prediction.text) for prediction in predictions], dtype=float)
        return lengths - lengths.mean()


class FirstIsBest:
    """Of equal answers to a prompt the first one wins."""

    def score_group(self, predictions, targets):
        best = int(np.argmax([quality(*pair) for pair in zip(predictions, targets, strict=True)]))
        return [float(row == best) for row in range(len(predictions))]


def test_batch_equals_single():
    error = failure(Standardised, "batch equals single")
    assert error.expected == "the same scores for each row alone as in the batch"
    assert error.example.count("row ") == 2


def test_any_order_of_rows():
    error = failure(FirstIsBest, "any order of rows")
    assert error.found == "[1.0, 0.0], in reversed order [0.0, 1.0]"


def only_squares(shown, original):
    if shown[0] != shown[1]:
        raise ValueError("the image is not square")
    return Frame("relative_1000", original)


def test_called_by_trl():
    error = failure("box_f1", "called by TRL", frame=only_squares)
    assert error.found == "ValueError: the image is not square"


def test_called_by_trl_must_give_what_score_batch_gives():
    def knows_boxes(prediction, target):
        return float(len(prediction.boxes) == len(target.boxes))

    def from_the_call(completions, target, query, boxes=None, **columns):
        return [0.0 if boxes is None else 1.0 for _ in completions]

    assert "called by TRL" in check_reward(knows_boxes, max_examples=5).passed
    assert "[0.0]" in failure(from_the_call, "called by TRL").found


def keyed(prediction, target, *, key=len):
    return float(key(prediction.boxes))


def from_a_folder(prediction, target, *, folder=None):
    return float(folder is None)


def test_pickles():
    assert "lambda" in failure(keyed, "pickles", key=lambda boxes: 0).found


def test_yaml():
    error = failure(from_a_folder, "YAML", folder=Path("masks"))
    assert error.expected == "a reward that can be written as YAML and read from it"


# --- hostile text


def lazy_pattern(prediction, target):
    return float(re.search(r"\[.*?\]", prediction.text, re.DOTALL) is not None)


def any_two_boxes_alike(prediction, target):
    boxes = prediction.boxes
    return float((boxes[:, None] == boxes[None]).all(axis=2).sum() == len(boxes))


def counts_past_a_thousand(prediction, target):
    if len(prediction.boxes) > 1000:
        raise OverflowError("too many boxes")
    return 0.0


def nests(prediction, target):
    def depth(text):
        return 1 + depth(text[1:]) if text.startswith("<") else 0

    return float(depth(prediction.text))


@pytest.mark.slow
def test_hostile_text_takes_time_in_proportion():
    for function, kind in ((lazy_pattern, "open square brackets"), (any_two_boxes_alike, "many boxes")):
        register_reward(function.__name__, needs_target=False)(function)
        assert f"characters of {kind}" in failure(function, "hostile text", max_examples=2).found


def test_hostile_text_raises_nothing():
    error = failure(counts_past_a_thousand, "hostile text", max_examples=2)
    assert "OverflowError: too many boxes, for 65536 characters of many boxes" in error.found
    register_reward("nests", needs_target=False)(nests)
    assert "RecursionError" in failure(nests, "hostile text", max_examples=2).found


def test_hostile_text_stays_in_the_range():
    register_reward("per_10_000", range=(0, 1), needs_target=False)(
        lambda prediction, target: len(prediction.text) / 10_000
    )
    assert "for 16384 characters of" in failure("per_10_000", "hostile text", max_examples=2).found


# --- claims


def claim(function, **claims):
    register_reward("claimed", **claims)(function)
    return "claimed"


def boxes_in_order(prediction, target):
    pairs = zip(prediction.boxes, target.boxes, strict=False)
    return sum(overlap(*pair) for pair in pairs) / max(len(prediction.boxes), len(target.boxes), 1)


def left_edge(prediction, target):
    if len(prediction.boxes) == 0 or target.empty:
        return 0.0
    return float(prediction.boxes[:, 0].min() == target.boxes[:, 0].min())


def within_two_pixels(prediction, target):
    if len(prediction.boxes) == 0 or target.empty:
        return 0.0
    return float(np.abs(prediction.boxes[0] - target.boxes[0]).mean() < 2)


def iou_of_the_hits(prediction, target):
    """Mean over the hits only: a second hit lowers it."""
    hits = [overlap(a, b) for a in prediction.boxes for b in target.boxes if overlap(a, b) > 0.3]
    return float(np.mean(hits)) if hits else 0.0


def centre_distance(prediction, target):
    if len(prediction.boxes) == 0 or target.empty:
        return -100.0
    offset = prediction.boxes[0] - target.boxes[0]
    return -float(np.abs(offset[:2] + offset[2:]).sum())


def outline(prediction, target):
    return 0.0 if prediction.mask is None else boundary_iou(prediction.mask, target.mask, 0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "claims", "name"),
    [
        (boxes_in_order, {"invariant": ["box_order"]}, "order of boxes"),
        (left_edge, {"invariant": ["flip"]}, "mirroring"),
        (within_two_pixels, {"invariant": ["rescale"]}, "enlarging"),
        (iou_of_the_hits, {"monotone": ["boxes"]}, "monotone in boxes"),
        *sampled(
            [
                (centre_distance, {"monotone": ["boxes"]}, "monotone in boxes"),
                (outline, {"monotone": ["mask"], "needs_mask": True}, "monotone in the mask"),
            ]
        ),
    ],
)
def test_claims(reward, claims, name):
    assert "as declared" in failure(claim(reward, **claims), name).expected


@pytest.mark.slow
def test_claims_about_volumes():
    def lowest_edge(prediction, target):
        return float(max((box[3] for box in prediction.boxes), default=0.0))

    def right_slice(prediction, target):
        return float(target.slice_areas.any() and prediction.slice_index == int(np.argmax(target.slice_areas)))

    register_reward("lowest_edge", volume=True, needs_target=False, invariant=["flip"])(lowest_edge)
    failure("lowest_edge", "mirroring")
    register_reward("right_slice", volume=True, invariant=["flip", "rescale"], empty={"both": 0.0})(right_slice)
    assert {"mirroring", "enlarging", "empty: both"} <= set(check_reward("right_slice", max_examples=20).passed)
    register_reward("any_slice", volume=True, monotone=["boxes"])(
        lambda prediction, target: float(not target.empty and len(prediction.boxes) > 0 and prediction.boxes[0, 0] == 0)
    )
    failure("any_slice", "monotone in boxes")


def voxels(prediction, target):
    """Share of the true voxels that are found; -1 for a mask of another shape."""
    if prediction.mask is None or target.empty:
        return 0.0
    return float(prediction.mask[target.mask].mean()) if prediction.mask.shape == target.mask.shape else -1.0


def outlines(prediction, target):
    masks = zip(prediction.mask, target.mask, strict=True) if prediction.mask is not None else ()
    return float(np.mean([boundary_iou(one, other, 0.02) for one, other in masks] or [0.0]))


def mask_on_the_named_slice(prediction, target):
    return float(prediction.mask is not None and prediction.mask[prediction.slice_index or 0].any())


def test_masks_of_volumes():
    reward = claim(voxels, needs_mask=True, volume=True, range=(0, 1), monotone=["mask"], invariant=["flip", "rescale"])
    report = check_reward(reward, answer_format="json", max_examples=10)
    assert {"range", "mirroring", "enlarging", "monotone in the mask"} <= set(report.passed)


@pytest.mark.long
@pytest.mark.parametrize(
    ("reward", "claims", "name"),
    [
        (outlines, {"monotone": ["mask"]}, "monotone in the mask"),
        (mask_on_the_named_slice, {}, "scores"),  # the slice may lie outside the volume
    ],
)
def test_claims_about_masks_of_volumes(reward, claims, name):
    error = failure(claim(reward, needs_mask=True, volume=True, **claims), name)
    assert "  mask, slice 0:\n    " in error.example
    assert "  true mask, slice 0:\n    " in error.example


@pytest.mark.long
@pytest.mark.parametrize(
    ("declared", "side", "found"),
    [
        ({"both": 0.5, "prediction": 0.0, "target": 0.0}, "both", "1.0"),
        ({"both": 1.0, "prediction": -1.0, "target": 0.0}, "prediction", "0.0"),
        ({"both": 1.0, "prediction": 0.0, "target": None}, "target", "0.0"),
    ],
)
def test_empty_sides(declared, side, found):
    error = failure(claim(quality, empty=declared), f"empty: {side}")
    assert error.found == found
    assert error.expected.startswith(f"{declared[side]} for a valid answer")


@pytest.mark.long
def test_an_empty_side_may_not_apply():
    def only_lesions(prediction, target):
        return None if target.empty else quality(prediction, target)

    name = claim(only_lesions, empty={"both": None, "target": None}, range=(0, 1))
    report = check_reward(name)
    assert {"empty: both", "empty: target", "honest about nothing"} <= set(report.passed)
    assert report.outcomes["empty: prediction"] == "not declared"


def any_box_is_a_start(prediction, target):
    if len(prediction.boxes) == 0:
        return 0.0
    return 0.5 + quality(prediction, target) / 2 if prediction.valid else 0.0


@pytest.mark.slow
def test_honest_about_nothing():
    error = failure(any_box_is_a_start, "honest about nothing")
    assert error.found == "0 for the right answer, 0.5 for the hallucination"
    assert "needs_target=False" in error.expected
    register_reward("any_box", needs_target=False)(lambda prediction, target: float(len(prediction.boxes) > 0))
    assert check_reward("any_box").outcomes["honest about nothing"].startswith("not applicable")
    register_reward("no_truth", needs_target=False)(any_box_is_a_start)  # but it reads it
    assert "no attribute 'empty'" in failure("no_truth", "reads what it declares").found


def unreadable_is_empty(prediction, target):
    """A text that cannot be parsed counts as one that finds nothing."""
    if not prediction.valid:
        return float(target.empty)
    return quality(prediction, target)


def test_invalid_text():
    error = failure(unreadable_is_empty, "invalid text")
    assert error.found.startswith("0 for the valid one, 1 for the one that is ")
    assert error.example.count("truth: as above") == 1


# --- what hypothesis is needed for


@pytest.mark.slow
def test_without_hypothesis(tmp_path):
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import segrl.testing, segrl.audit\n"
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules)\n"
        "try: segrl.testing.check_reward\n"
        "except ImportError as error: print(error)\n"
        "try: segrl.testing.strategies\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("pip install 'segrl[testing]'" in line for line in lines)


@pytest.mark.long
def test_a_claim_may_depend_on_the_settings():
    """Of the hull of several boxes it is false: one box made exact can lower the IoU of the hulls."""
    assert make_reward("box_iou").info.monotone == ("boxes",)
    assert make_reward("box_iou", several="hull").info.monotone == ()
    report = check_reward("box_iou", several="hull", threshold=0.3)
    assert report.outcomes["monotone in boxes"] == "not declared"


# --- a passing check must have seen something


def share(prediction, target):
    """Share of the true pixels that are found; None without a mask."""
    if prediction.mask is None or target.empty:
        return None
    return float(prediction.mask[target.mask].mean())


def undeclared_mask(prediction, target):
    return 0.0 if prediction.mask is None else float(prediction.mask.any())


def mask_taken_for_granted(prediction, target):
    return float(prediction.mask.any())


def undeclared_probability(prediction, target):
    return 0.0 if prediction.probability is None else float(prediction.probability.max())


def undeclared_truth(prediction, target):
    return float(target is not None and len(prediction.boxes) > 0)


def nan_without_overlap(prediction, target):
    if prediction.mask is None or not prediction.mask.any() or target.empty:
        return 0.0
    return float("nan") if not (prediction.mask & target.mask).any() else 1.0


def nan_on_an_empty_truth(prediction, target):
    if prediction.mask is None or not prediction.mask.any():
        return 1.0
    return float("nan") if target.empty else 0.5


def nan_only_if_all_is_found(prediction, target):
    if prediction.mask is None or not prediction.mask.all():
        return 0.0
    return float("nan") if target.mask.any() and not target.mask.all() else 1.0


def boxes_taken_for_granted(prediction, target):
    return 1.0 if target.empty else float(prediction.boxes[0, 0] >= 0)


def modality_taken_for_granted(prediction, target):
    return float(target.modality[0].isupper())


def reasoning_taken_for_granted(prediction, target):
    return float(len(prediction.reasoning) > 3)


def writes_into_an_undeclared_mask(prediction, target):
    if prediction.mask is not None:
        prediction.mask[..., 0] = True
    return float(len(prediction.boxes))


def coin_of_the_global_state(prediction, target):
    return float(np.random.random())


def seeds_the_global_state(prediction, target):
    np.random.seed(0)
    return float(len(prediction.boxes)) + float(np.random.random())


def never_applies(prediction, target):
    return None


def always_half(prediction, target):
    return 0.5


class Ranks:
    """A row scores more than the row before it."""

    def score_batch(self, predictions, targets):
        return [float(row) for row in range(len(predictions))]


class Longest:
    """The longest text so far."""

    def __init__(self):
        self.longest = 1

    def score_batch(self, predictions, targets):
        self.longest += sum(len(prediction.text) for prediction in predictions)
        return [len(prediction.text) / self.longest for prediction in predictions]


PLANTED = [
    (undeclared_mask, {}, "reads what it declares"),
    (mask_taken_for_granted, {}, "scores"),
    (mask_taken_for_granted, {"needs_mask": True}, "scores"),
    (undeclared_probability, {"needs_mask": True}, "reads what it declares"),
    (undeclared_truth, {"needs_target": False}, "reads what it declares"),
    (nan_without_overlap, {"needs_mask": True}, "scores"),
    (nan_without_overlap, {}, "scores"),
    (nan_on_an_empty_truth, {"needs_mask": True}, "scores"),
    (nan_only_if_all_is_found, {"needs_mask": True}, "scores"),
    (boxes_taken_for_granted, {}, "scores"),
    (modality_taken_for_granted, {}, "scores"),
    (reasoning_taken_for_granted, {}, "scores"),
    (writes_into_an_undeclared_mask, {}, "input unchanged"),
    (coin_of_the_global_state, {}, "deterministic"),
    (seeds_the_global_state, {}, "random state"),
    (never_applies, {}, "numbers"),
    (Ranks, {}, "batch equals single"),
    (Longest, {}, "deterministic"),
]


@pytest.mark.parametrize("volume", [False, True], ids=["image", "volume"])
@pytest.mark.parametrize(("reward", "declared", "name"), PLANTED)
def test_planted_faults_are_found(reward, declared, name, volume):
    """Also where random examples are few, since corner cases are always among them."""
    register_reward("planted", volume=volume, **declared)(reward)
    failure("planted", name, max_examples=1)


def slice_taken_for_granted(prediction, target):
    return float(prediction.slice_index + 1)


def test_a_volume_whose_slice_is_not_named():
    register_reward("planted", volume=True)(slice_taken_for_granted)
    failure("planted", "scores", max_examples=1)


@pytest.mark.parametrize("volume", [False, True], ids=["image", "volume"])
def test_a_constant_is_a_warning(volume):
    register_reward("planted", volume=volume, range=(0, 1))(always_half)
    with pytest.warns(UserWarning, match=r"reward 'planted' returned 0\.5 for all \d+ answers that it scored"):
        report = check_reward("planted", max_examples=5)
    assert (report.constant, report.nones) == (0.5, 0)
    assert "WARNING: always the number 0.5" in str(report)


@pytest.mark.parametrize("volume", [False, True], ids=["image", "volume"])
def test_the_report_says_how_often_there_was_a_number(volume):
    register_reward("planted", volume=volume, needs_mask=True, range=(0, 1))(share)
    report = check_reward("planted", max_examples=5)
    assert report.numbers > 100
    assert report.nones > 100
    assert report.constant is None
    assert f"returned {report.numbers} numbers and {report.nones} times None" in str(report)


@pytest.mark.parametrize("needs_mask", [False, True])
@pytest.mark.parametrize("volume", [False, True])
def test_examples_are_with_and_without_each_optional_part(needs_mask, volume):
    seen = set()

    def looks(prediction, target):
        seen.add(("mask", prediction.mask is not None))
        seen.add(("probability", prediction.probability is not None))
        seen.add(("boxes", len(prediction.boxes) > 0))
        seen.add(("reasoning", prediction.reasoning is not None))
        seen.add(("answer", prediction.answer is not None))
        seen.add(("slice", prediction.slice_index is not None))
        seen.add(("ground truth", not target.empty))
        seen.add(("valid", prediction.valid))
        seen.update((column, bool(text)) for column, text in target.to_dict().items())
        if volume:
            seen.add(("cubic", len(set(target.spacing_mm)) == 1))
        return float(len(prediction.boxes))

    register_reward("planted", volume=volume, needs_mask=needs_mask)(looks)
    with pytest.raises(RewardCheckError):  # it counts boxes, wherever they are
        check_reward("planted", max_examples=30)
    names = {name for name, _ in seen}
    assert {(name, there) for name in names for there in (True, False)} - seen == (
        set() if volume else {("slice", True)}
    )
