"""Rewards for the text: each trap is a way in which a published format reward scored for the wrong thing."""

import pytest
from answers import MEGABYTE, hostile_texts, in_answer, read, says
from growth import grows_linearly
from hypothesis import given
from hypothesis import strategies as st

from segrl.errors import RewardError
from segrl.rewards import make_reward
from segrl.rewards.builtin import json_format, length_budget, non_repeat, repetition, think_answer_format
from segrl.testing import check_reward

GOOD = '<think>Dark spot.</think><answer>[{"bbox_2d": [1, 2, 9, 8], "point_2d": [4, 4]}]</answer>'
TEXT_REWARDS = ["think_answer_format", "json_format", "length_budget", "repetition", "non_repeat"]


def form(text, graded=False):
    return think_answer_format(read(text), None, graded=graded)


def objects(content, **settings):
    return json_format(read(in_answer(content)), None, **settings)


def thinks(reasoning, reward, **settings):
    return reward(says([1, 2, 9, 8], reasoning=reasoning), None, **settings)


# --- think_answer_format

FORMS = {
    "good": (GOOD, 1.0),
    "white space around and between": (f"\n {GOOD.replace('</think>', '</think> ')} \n", 1.0),
    "the answer is no JSON": ("<think>a</think><answer>b</answer>", 1.0),
    "text after": (GOOD + " I hope this helps.", 0.75),
    "text before": ("Sure! " + GOOD, 0.75),
    "text between": (GOOD.replace("<answer>", "so <answer>"), 0.75),
    "answer first": ("<answer>b</answer><think>a</think>", 0.75),
    "no reasoning": ("<answer>b</answer>", 0.25),
    "blank reasoning": ("<think> </think><answer>b</answer>", 0.25),
    "blank answer": ("<think>a</think><answer>\n</answer>", 0.25),
    "two answers": (GOOD + "<answer>b</answer>", 0.25),
    "answer not closed": ("<think>a</think><answer>b", 0.25),
    "answer closed twice": (GOOD + "</answer>", 0.25),
    "nested": ("<think><answer>b</answer></think>", 0.25),
    "everything twice": (GOOD * 2, 0.0),
    "blank blocks": ("<think></think><answer></answer>", 0.0),
    "tags only": ("<think><answer>", 0.0),
    "empty": ("", 0.0),
    "blank": (" \n", 0.0),
    "other tags": ("<THINK>a</THINK><ANSWER>b</ANSWER>", 0.0),
}


@pytest.mark.parametrize(("text", "share"), FORMS.values(), ids=FORMS.keys())
def test_format_known_values(text, share):
    assert form(text, graded=True) == share
    assert form(text) == float(share == 1.0)


@given(st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "a", " "]), max_size=12))
def test_repeating_the_text_or_a_tag_never_raises_the_graded_format(pieces):
    text = "".join(pieces)
    value = form(text, graded=True)
    assert form(text) == float(value == 1.0)
    for tag in {piece for piece in pieces if piece.startswith("<")}:
        assert form(text + tag, graded=True) <= value
        assert form(tag + text, graded=True) <= value
    assert form(text + text, graded=True) <= value


# --- json_format

ONE = '{"bbox_2d": [1, 2, 9, 8], "point_2d": [4, 4]}'
TWO = '{"bbox_2d": [20, 2, 29, 8], "point_2d": [24, 4]}'
ANSWERS = {
    "one object": (ONE, 1.0),
    "a list": (f"[{ONE}, {TWO}]", 1.0),
    "nothing found": ("[]", 1.0),
    "nothing found, as an object": ("{}", 1.0),
    "a token behind": (f"[{ONE}]<seg>", 1.0),
    "another token behind": (f"[{ONE}] <|seg|>", 1.0),
    "one missing key does not zero the list": ('[{"bbox_2d": [1, 2, 9, 8]}, ' + TWO + "]", 0.75),
    "one bad box does not zero the list": ('[{"bbox_2d": [1], "point_2d": [4, 4]}, ' + TWO + "]", 0.5),
    "a box with x2 < x1": ('[{"bbox_2d": [9, 2, 1, 8], "point_2d": [4, 4]}]', 0.0),
    "a repeated object": (f"[{ONE}, {ONE}, {ONE}, {ONE}]", 0.25),
    "repeated but for a free key": (f"[{ONE}, {ONE[:-1]}" + ', "n": 2}]', 0.5),
    "a key twice": ('{"bbox_2d": [1, 2, 9, 8], "bbox_2d": [1, 2, 3, 4], "point_2d": [4, 4]}', 0.0),
    "an empty object in a list": (f"[{{}}, {ONE}]", 0.5),
    "no numbers": ('{"bbox_2d": ["1", "2", "9", "8"], "point_2d": [4, 4]}', 0.0),
    "infinite": ('{"bbox_2d": [1, 2, Infinity, 8], "point_2d": [4, 4]}', 0.0),
    "not a number": ('{"bbox_2d": [1, 2, NaN, 8], "point_2d": [4, 4]}', 0.0),
    "text before": (f"Here: {ONE}", 0.0),
    "two values": (f"{ONE} {TWO}", 0.0),
    "single quotes": (ONE.replace('"', "'"), 0.0),
    "cut off": (f"[{ONE}, {TWO[:9]}", 0.0),
    "a number": ("7", 0.0),
    "null": ("null", 0.0),
    "a word": ("none", 0.0),
    "a token only": ("<seg>", 0.0),
}


@pytest.mark.parametrize(("content", "share"), ANSWERS.values(), ids=ANSWERS.keys())
def test_json_known_values(content, share):
    keys = ("bbox_2d", "point_2d")
    assert objects(content, keys=keys, graded=True) == pytest.approx(share)
    assert objects(content, keys=keys) == float(share == 1.0)


def test_json_keys_are_those_asked_for():
    assert objects('{"bbox_2d": [1, 2, 9, 8]}') == 1.0
    assert objects('{"bbox_2d": [1, 2, 9, 8]}', keys=["bbox_2d", "score"], graded=True) == 0.5
    assert objects('{"bbox_2d": [1, 2, 9, 8], "label": null}', keys=["label"]) == 0.0
    assert objects('{"slice": 3, "bbox_2d_list": [[1, 2, 9, 8]]}', keys=["slice", "bbox_2d_list"]) == 1.0
    assert objects('{"slice": 0, "bbox_2d_list": []}', keys=["slice"]) == 0.0


def test_objects_that_contradict_each_other_are_not_well_formed():
    two_slices = '[{"slice": 3, "bbox_2d_list": []}, {"slice": 4, "bbox_2d_list": []}]'
    assert objects(two_slices, keys=["slice"]) == 0.0
    one_confidence = '[{"bbox_2d": [1, 2, 9, 8], "score": 0.5}, {"bbox_2d": [20, 2, 29, 8]}]'
    assert objects(one_confidence) == 0.0
    assert objects(one_confidence, graded=True) == 1.0


def test_json_is_read_from_the_one_answer_only():
    inside = f"<think>{ONE}</think>"
    assert json_format(read(inside), None) == 0.0
    assert json_format(read(f"{inside}<answer>none</answer>"), None) == 0.0
    assert json_format(read(in_answer(ONE) + f"<answer>{TWO}</answer>"), None) == 0.0
    assert json_format(read(""), None) == 0.0
    assert json_format(read(in_answer(ONE), answer_format="text"), None) == 1.0


# --- length_budget


@pytest.mark.parametrize(
    ("words", "settings", "expected"),
    [
        (100, {"limit": 100}, 1.0),
        (150, {"limit": 100, "margin": 100}, 0.5),
        (200, {"limit": 100, "margin": 100}, 0.0),
        (900, {"limit": 100, "margin": 100}, 0.0),
        (101, {"limit": 100, "margin": 0}, 0.0),
        (100, {"limit": 100, "margin": 0}, 1.0),
        (5, {"limit": 100, "minimum": 20}, 0.25),
        (19, {"limit": 100, "minimum": 20}, 0.95),
        (20, {"limit": 100, "minimum": 20}, 1.0),
        (25, {"limit": 100, "unit": "characters"}, 1.0),
        (30, {"limit": 100, "margin": 100, "unit": "characters"}, 0.8),
    ],
)
def test_length_known_values(words, settings, expected):
    assert thinks("word " * words, length_budget, part="reasoning", **settings) == pytest.approx(expected)


def test_length_of_the_parts():
    prediction = read("<think>one two three</think> <answer>[ ]</answer>")
    lengths = {part: length_budget(prediction, None, minimum=100, part=part) * 100 for part in ("reasoning", "answer")}
    assert lengths == {"reasoning": pytest.approx(3), "answer": pytest.approx(2)}
    assert length_budget(prediction, None, minimum=100, limit=100) == pytest.approx(0.05)


# --- repetition and non_repeat


def test_repetition_known_values():
    assert thinks("a b c d e f", repetition) == 1.0
    assert thinks("a b a b a b", repetition, n=2) == pytest.approx(2 / 5)
    assert thinks("A b a B a b", repetition, n=2) == pytest.approx(2 / 5)
    assert thinks("short", repetition) == 1.0
    assert thinks("no lesion " * 500, repetition) == pytest.approx(2 / 997)
    assert thinks("左肺左肺左肺", repetition, n=2, unit="characters") == pytest.approx(2 / 5)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30), st.integers(1, 5))
def test_repetition_equals_a_slow_count(words, n):
    runs = [words[start : start + n] for start in range(len(words) - n + 1)]
    first = [run for index, run in enumerate(runs) if run not in runs[:index]]
    expected = len(first) / len(runs) if runs else 1.0
    assert thinks(" ".join(words), repetition, n=n) == pytest.approx(expected)


def test_non_repeat_known_values():
    assert thinks("It is dark. It is round.", non_repeat) == 1.0
    assert thinks("It is dark. It  is DARK.", non_repeat) == 1.0
    assert thinks("It is dark. It is dark!", non_repeat, allowed=0) == 0.0
    assert thinks("It is dark. It is dark. It is dark", non_repeat) == 0.0
    assert thinks("It is dark\nIt is dark\nIt is dark", non_repeat) == 0.0
    assert thinks("很暗。很暗。很暗。", non_repeat) == 0.0


def test_decimals_are_no_sentences_and_the_answer_is_not_the_reasoning():
    assert thinks("About 1.5 to 2.5 cm and 3.5 cm.", non_repeat, allowed=0) == 1.0
    prediction = says(*[[1.5, 2.5, 3.5, 4.5]] * 5, reasoning="Dark.")
    assert non_repeat(prediction, None, allowed=0) == 1.0
    assert non_repeat(prediction, None, allowed=0, part="answer") == 1.0


# --- traps


@pytest.mark.parametrize("reward", TEXT_REWARDS)
@pytest.mark.parametrize("text", ["", " ", "<seg>", "no", "<answer></answer>", "<think></think><answer></answer>"])
def test_an_empty_or_formless_text_scores_nothing(reward, text):
    assert make_reward(reward).score(read(text), None) == 0.0


@pytest.mark.parametrize("reward", [length_budget, repetition, non_repeat])
def test_an_invalid_text_scores_nothing_unless_asked_for(reward):
    invalid = read(GOOD + " Done.")
    assert not invalid.valid
    assert reward(invalid, None) == 0.0
    assert reward(invalid, None, require_valid=False) == 1.0


@pytest.mark.parametrize("reward", TEXT_REWARDS)
def test_no_truth_is_needed(reward):
    made = make_reward(reward)
    assert not made.needs_target
    assert made.score(says([1, 2, 9, 8]), None) == 1.0
    assert made(completions=[GOOD]) is not None


@pytest.mark.parametrize(
    ("reward", "settings", "message"),
    [
        (json_format, {"keys": ()}, r"keys=\(\); expected a list as"),
        (json_format, {"keys": "bbox_2d"}, "keys='bbox_2d'; expected a list as"),
        (length_budget, {"minimum": 300}, "minimum=300; expected a number from 0 to limit=256"),
        (length_budget, {"minimum": -1}, "minimum=-1"),
        (length_budget, {"margin": -1}, "margin=-1; expected 0 or more"),
        (length_budget, {"unit": "tokens"}, "unit='tokens'; expected 'words' or 'characters'"),
        (length_budget, {"part": "prompt"}, "part='prompt'; expected 'text', 'reasoning' or 'answer'"),
        (repetition, {"n": 0}, "n=0; expected a whole number from 1 to 16"),
        (repetition, {"n": 1000}, "n=1000"),
        (repetition, {"unit": "tokens"}, "unit='tokens'"),
        (non_repeat, {"allowed": -1}, "allowed=-1; expected 0 or more"),
        (non_repeat, {"part": "prompt"}, "part='prompt'"),
    ],
)
def test_bad_settings(reward, settings, message):
    with pytest.raises(RewardError, match=message):
        reward(says([1, 2, 9, 8]), None, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "settings"),
    [
        (think_answer_format, {"graded": True}),
        (json_format, {"graded": True, "keys": ["bbox_2d", "point_2d"]}),
        (length_budget, {"limit": 10, "margin": 5, "minimum": 2, "unit": "characters", "part": "answer"}),
        (repetition, {"n": 2, "part": "text", "unit": "characters"}),
        (non_repeat, {"allowed": 0, "part": "text"}),
    ],
)
def test_what_is_declared_holds_for_these_settings_too(reward, settings):
    check_reward(reward, max_examples=20, **settings)


# --- one megabyte of hostile text


@pytest.mark.parametrize("name", hostile_texts(1000))
def test_work_is_linear_in_hostile_text(name):
    rewards = [make_reward(reward, require_valid=False) for reward in TEXT_REWARDS[2:]]
    rewards += [make_reward(reward, graded=True) for reward in TEXT_REWARDS[:2]]

    def scored(size):
        prediction = read(hostile_texts(size)[name])
        return lambda: [reward.score(prediction, None) for reward in rewards]

    assert all(value is not None and 0 <= value <= 1 for value in scored(MEGABYTE)())
    assert grows_linearly(scored, 4000)
