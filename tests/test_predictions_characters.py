"""Invisible characters are no text, and end tokens behind a completion are not part of it, at every door."""

import csv
import json

import pytest
from answers import LEFT, RIGHT, in_answer, target_of
from growth import grows_linearly
from hypothesis import given
from hypothesis import strategies as st

from segrl.errors import DataError
from segrl.models import tiny_qwen2_5_vl
from segrl.predictions import (
    END_TOKENS,
    CompletionFormat,
    Frame,
    Status,
    format_completion,
    is_blank,
    parse_completion,
    read_answer,
    strip_end_tokens,
    visible_text,
)
from segrl.rewards import dump_reward, easyr1_compute_score, load_reward, make_reward, swift_orm, verl_compute_score
from segrl.scoring import score_file

INVISIBLE = {
    "zero-width space": "\u200b",
    "zero-width joiner": "\u200d",
    "word joiner": "\u2060",
    "byte order mark": "\ufeff",
    "NUL": "\0",
    "other controls": "\x01\x7f\x85",
    "Hangul fillers": "\u115f\u1160\u3164\uffa0",
    "variation selectors": "\ufe0f\U000e0101",
    "Mongolian selectors": "\u180b\u180e",
    "soft hyphen": "\xad",
    "directions": "\u202e\u2066",
    "blank of Braille": "\u2800",
    "tags": "\U000e0041",
    "combining marks": "\u0301\u20dd",
    "combining grapheme joiner": "\u034f",
    "private": "\ue000",
    "unassigned": "\u0378",
    "half of a pair": "\ud800",
    "spaces": " \xa0\u2003\u3000\n",
}
FRAME = Frame("original_px", (64, 64))


@pytest.mark.parametrize("hidden", INVISIBLE.values(), ids=INVISIBLE)
@pytest.mark.parametrize("times", [1, 30])
def test_invisible_characters_are_neither_reasoning_nor_an_answer(hidden, times):
    blank = f" {hidden * times}\n"
    assert is_blank(blank)
    said = parse_completion(f"<think>{blank}</think><answer>None.<seg></answer>", FRAME)
    assert said.status is Status.NO_REASONING
    assert parse_completion(f"<think>Dark.</think><answer>{blank}</answer>", FRAME).status is Status.NO_ANSWER
    prediction = read_answer(f"<think>{blank}</think><answer>None.<seg></answer>", CompletionFormat())
    assert make_reward("format").score(prediction, None) == 0.0
    assert make_reward("think_answer_format").score(prediction, None) == 0.0
    for name in ("length_budget", "repetition", "non_repeat"):
        assert make_reward(name, part="reasoning", require_valid=False).score(prediction, None) == 0.0


@pytest.mark.parametrize(
    "text", ["a", ".", "看", "é", "e\u0301", "🧿", "क्षि", "\u200bx\u200b", "한", "1", "®", "م\u200cن"]
)
def test_text_of_any_script_is_reasoning(text):
    assert not is_blank(text)
    assert parse_completion(f"<think>{text}</think><answer>None.<seg></answer>", FRAME).valid
    assert make_reward("think_answer_format").score(
        read_answer(f"<think>{text}</think><answer>None.</answer>", CompletionFormat(require_seg=False)), None
    )


def test_invisible_characters_do_not_make_words_or_sentences_different():
    def thinks(reasoning):
        return read_answer(f"<think>{reasoning}</think><answer>None.<seg></answer>", CompletionFormat())

    honest = thinks("Look again. Look again. Look again.")
    evasive = thinks("Look again. Lo\u200bok again. \u2060Look aga\xadin.")
    for reward in (make_reward("repetition", n=2), make_reward("non_repeat")):
        assert reward.score(evasive, None) == reward.score(honest, None) != 1.0
    padded = thinks("Dark." + " \u200b" * 50)
    assert make_reward("length_budget", part="reasoning", minimum=10).score(padded, None) == 0.1


def test_visible_text_keeps_marks_and_spaces():
    assert visible_text("e\u0301 \u200bx\n") == "e\u0301 x\n"
    assert visible_text("plain") == "plain"


@given(st.text())
def test_what_is_left_is_blank_together(text):
    assert is_blank(text) == is_blank(visible_text(text))
    assert visible_text(visible_text(text)) == visible_text(text)


# --- end tokens

ANSWER = in_answer(json.dumps([{"bbox_2d": LEFT}, {"bbox_2d": RIGHT}]))
ENDS = [
    "<|im_end|>",
    "<|endoftext|>",
    "</s>",
    "<eos>",
    "<|im_end|>\n<|endoftext|>",
    " <|im_end|>\n" + "<|endoftext|>" * 40,
]
TRUTH = {"boxes": [LEFT, RIGHT], "size": [40, 32]}
JSON = {"frame": "original_px", "require_seg": False, "answer_format": "json"}


def reward(**more):
    return make_reward("vlm_r1", **JSON, **more)


@pytest.mark.parametrize("end", ENDS)
def test_end_tokens_at_every_door(end, tmp_path):
    """A perfect answer stays perfect: parser, records, TRL's call, verl, EasyR1, ms-swift and score files."""
    text, best = ANSWER + end, 2.0
    target = target_of(LEFT, RIGHT)
    made = reward()
    assert made.score(made.completion_format.parse(text, Frame("original_px", (40, 32))), target) == best
    assert made.score(read_answer(text, made.completion_format, target), target) == best
    assert (
        made.score(read_answer([{"role": "assistant", "content": text}], made.completion_format, target), target)
        == best
    )
    assert made(completions=[text], mask=[target.mask], boxes=[target.boxes]) == [best]
    assert verl_compute_score(made)("lesions", text, json.dumps(TRUTH))["score"] == best
    assert verl_compute_score(made, batch=True)(["lesions"], [text], [TRUTH])[0]["score"] == best
    assert easyr1_compute_score(made)([{"response": text, "ground_truth": TRUTH}])[0]["overall"] == best
    columns = {name: [value] for name, value in TRUTH.items()}
    assert swift_orm(made)()([text], **columns) == [best]
    lines = tmp_path / "answers.jsonl"
    lines.write_text(json.dumps({"completion": text, **TRUTH}), encoding="utf-8")
    assert score_file(made, lines).columns["total"] == [best]
    with (tmp_path / "answers.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["completion", "boxes", "size"], [text, *map(json.dumps, TRUTH.values())]])
    assert score_file(made, tmp_path / "answers.csv").columns["total"] == [best]


@pytest.mark.parametrize("end", ENDS)
def test_end_tokens_and_rewards_of_the_text(end):
    said = read_answer(ANSWER + end, CompletionFormat(**JSON))
    assert said.text == ANSWER
    for name in ("think_answer_format", "json_format", "format"):
        assert make_reward(name).score(said, None) == 1.0
    assert make_reward("length_budget", limit=len(ANSWER.split())).score(said, None) == 1.0


@pytest.mark.parametrize(
    "text",
    [f"{ANSWER}<|im_end|> I am sure.", f"<|im_end|>{ANSWER}", f"{ANSWER}<|im_start|>", f"{ANSWER}<|im_end|>{ANSWER}"],
)
def test_end_tokens_elsewhere_are_text(text):
    assert read_answer(text, CompletionFormat(**JSON)).status is Status.EXTRA_TEXT
    assert read_answer(text, CompletionFormat(**JSON)).text == text


def test_end_tokens_of_another_model():
    text = format_completion("Dark.", "None.<seg>") + "<|stop|>\n"
    assert read_answer(text, CompletionFormat()).status is Status.EXTRA_TEXT
    assert read_answer(text, CompletionFormat(end_tokens=["<|stop|>"])).valid
    assert make_reward("format", end_tokens=["<|stop|>"])(completions=[text]) == [1.0]
    with pytest.raises(DataError, match="end_tokens='<a>'; expected a list of texts"):
        CompletionFormat(end_tokens="<a>")


def test_end_tokens_in_a_file_of_rewards(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("reward: format\ncompletion_format: {end_tokens: ['<|stop|>']}\n")
    loaded = load_reward(path)
    assert loaded.completion_format.end_tokens == ("<|stop|>",)
    path.write_text(dump_reward(loaded))
    assert load_reward(path) == loaded


def test_end_tokens_of_a_tokenizer():
    _, processor = tiny_qwen2_5_vl()
    found = CompletionFormat().for_tokenizer(processor.tokenizer)
    assert {processor.tokenizer.eos_token, processor.tokenizer.pad_token} <= {*found.end_tokens}
    token = processor.tokenizer.eos_token
    assert token not in CompletionFormat(seg_token=token).for_tokenizer(processor.tokenizer).end_tokens


def test_a_segmentation_token_is_never_an_end_token():
    assert (
        parse_completion("<think>a</think><answer>b</answer></s>", FRAME, seg_token="</s>").status is Status.EXTRA_TEXT
    )
    assert strip_end_tokens("a<eos></s>", keep="<eos>") == "a<eos>"


@given(st.lists(st.sampled_from([*END_TOKENS[:4], " ", "\n"])), st.sampled_from(["", "x", ANSWER]))
def test_only_end_tokens_and_spaces_are_left_out(ends, text):
    assert strip_end_tokens(text + "".join(ends)) == text


def test_work_is_linear_in_the_end_tokens():
    assert grows_linearly(lambda n: lambda: strip_end_tokens("x" + "</s>\n" * (n // 5)), 20_000)
    assert strip_end_tokens("x" + "<|endoftext|>" * 80_000) == "x"
    assert strip_end_tokens("<pad>" * 200_000) == ""
