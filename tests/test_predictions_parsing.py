import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segrl.errors import DataError
from segrl.predictions import (
    Frame,
    Prediction,
    Status,
    format_answer,
    format_completion,
    parse_completion,
    strip_end_tokens,
)

FRAME = Frame("original_px", (100, 80))
THINK = "<think>A dark spot.</think>"
ANSWER = "<answer>The cyst is located at [10, 20, 30, 40].<seg></answer>"
PIECES = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<seg>",
    "[",
    "]",
    "[1, 2, 3, 4]",
    "(1,2),(3,4)",
    "(5, 6)",
    "<|box_start|>",
    "x1=7",
    "1, 2, 3, 4",
    "<|im_end|>",
    "\u200b",
    ",",
    "nan",
    "1e9",
    " ",
    "x",
]
HOSTILE = [
    *PIECES,
    "<",
    "</",
    "[" * 3,
    "9",
    "<answer>[",
    "[1,2,3,4]",
    "<think></think>",
    "\n",
    "<answer></answer>",
    "-",
    "(1,",
    "1 ",
    "x=(",
    "1/",
    "\u200b1",
    "\ufdfa",
    "</s>\n",
]


def parse(text, **options):
    return parse_completion(text, FRAME, **options)


def answer(content):
    return parse(f"{THINK}<answer>{content}<seg></answer>")


def test_known_value():
    prediction = parse(f"\n {THINK}\n{ANSWER} ")
    assert prediction.status is Status.VALID
    assert prediction.reasoning == "A dark spot."
    assert prediction.answer == "The cyst is located at [10, 20, 30, 40].<seg>"
    assert prediction.boxes.tolist() == [[10, 20, 30, 40]]
    assert prediction.has_seg
    assert prediction.mask is None


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("", Status.NO_ANSWER),
        ("  \n", Status.NO_ANSWER),
        ("<seg>", Status.NO_ANSWER),
        (THINK, Status.NO_ANSWER),
        (f"{THINK}<answer>[1, 2, 3, 4]<seg>", Status.NO_ANSWER),
        (f"{THINK}<answer> </answer>", Status.NO_ANSWER),
        (f"<think>so {ANSWER}</think>", Status.NO_ANSWER),
        (f"<think>so {ANSWER}", Status.NO_ANSWER),
        (ANSWER, Status.NO_REASONING),
        (f"<think> </think>{ANSWER}", Status.NO_REASONING),
        (f"so {ANSWER}", Status.NO_REASONING),
        (f"{THINK}{ANSWER} done", Status.EXTRA_TEXT),
        (f"Well: {THINK}{ANSWER}", Status.EXTRA_TEXT),
        (f"{THINK} so {ANSWER}", Status.EXTRA_TEXT),
        (f"{ANSWER}{THINK}", Status.EXTRA_TEXT),
        (f"{THINK}{THINK}{ANSWER}", Status.EXTRA_TEXT),
        (f"{THINK}{ANSWER}{ANSWER}", Status.EXTRA_TEXT),
        (f"{THINK}{ANSWER}</answer>", Status.EXTRA_TEXT),
        (f"{THINK}<answer>{THINK}[1, 2, 3, 4]<seg></answer>", Status.EXTRA_TEXT),
        (f"<think>a<think>b</think></think>{ANSWER}", Status.EXTRA_TEXT),
        (f"<think>The <seg> token.</think>{ANSWER}", Status.EXTRA_TEXT),
        (f"{THINK}<answer>[1, 2, 3, 4]<seg><seg></answer>", Status.EXTRA_TEXT),
        (f"{THINK}<answer>[1, 2, 3]<seg></answer>", Status.MALFORMED_BOXES),
        (f"{THINK}<answer>[1, 2, 3]</answer>", Status.MALFORMED_BOXES),
        (f"{THINK}<answer>[1, 2, 3, 4]</answer>", Status.NO_SEG_TOKEN),
        ("<think>The <seg> token.</think><answer>[1, 2, 3, 4]</answer>", Status.NO_SEG_TOKEN),
        (f"{THINK}<answer>No cyst is visible.<seg></answer>", Status.VALID),
        ("<THINK>a</THINK><ANSWER>b<seg></ANSWER>", Status.NO_ANSWER),
    ],
)
def test_status(text, status):
    assert parse(text).status is status


def test_two_answers_are_ambiguous_so_none_is_read():
    prediction = parse(f"{THINK}{ANSWER}<answer>[1, 2, 3, 4]<seg></answer>")
    assert (prediction.answer, prediction.boxes.shape, prediction.has_seg) == (None, (0, 4), False)


def test_json_and_boxes_in_the_reasoning_are_not_read():
    prediction = parse('<think>{"bbox_2d": [1, 2, 3, 4]} or [5, 6, 7, 8]; [oops</think>' + ANSWER)
    assert prediction.valid
    assert prediction.boxes.tolist() == [[10, 20, 30, 40]]


def test_boxes_outside_the_answer_are_not_read():
    assert parse(f"{THINK}[1, 2, 3, 4]{ANSWER}").boxes.tolist() == [[10, 20, 30, 40]]


@pytest.mark.parametrize(
    ("content", "boxes"),
    [
        ("[1, 2, 3, 4], [5,6,7,8]", [[1, 2, 3, 4], [5, 6, 7, 8]]),
        ("[1, 2, 3, 4] and [1, 2, 3, 4]", [[1, 2, 3, 4], [1, 2, 3, 4]]),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "cyst"}, {"bbox_2d": [5, 6, 7, 8]}]', [[1, 2, 3, 4], [5, 6, 7, 8]]),
        ("[[1, 2, 3, 4], [5, 6, 7, 8]]", [[1, 2, 3, 4], [5, 6, 7, 8]]),
        ("[1.5, .5, 3., +4]", [[1.5, 0.5, 3, 4]]),
        ("[-5, -5, 500, 500]", [[0, 0, 100, 80]]),
        ("[200, 200, 300, 300]", [[100, 80, 100, 80]]),
        ("[7, 7, 7, 7]", [[7, 7, 7, 7]]),
        ("[7, 7, 8, 8]", [[7, 7, 8, 8]]),
        ("[]", []),
        ("nothing, 1, 2 and 3, 4 mm", []),
    ],
)
def test_well_formed_boxes(content, boxes):
    prediction = answer(content)
    assert prediction.valid
    assert prediction.boxes.tolist() == boxes


@pytest.mark.parametrize(
    "bad",
    [
        "[1, 2, 3]",
        "[1, 2, 3, 4, 5]",
        "[5, 2, 3, 4]",
        "[1, 5, 3, 4]",
        "[NaN, 1, 2, 3]",
        "[1, 2, 3, inf]",
        "[1, 2, 3, 1e3]",
        "[0, 0, 1, 1000001]",
        f"[0, 0, 1, {'9' * 5000}]",
        "[x1, y1, x2, y2]",
        "[1 2 3 4]",
        "[１, ２, ３, ４]",
        "[1, 2, 3, 4",
        "1, 2, 3, 4]",
        "[1, 2,, 4]",
        "nothing, 1, 2, 3, 4",  # was valid: without a lesion a box in this notation scored as nothing found
    ],
)
def test_malformed_boxes_are_dropped_and_the_others_kept(bad):
    prediction = answer(f"[10, 20, 30, 40], {bad}")
    assert prediction.status is Status.MALFORMED_BOXES
    assert prediction.boxes.tolist() == [[10, 20, 30, 40]]


def test_the_token_does_not_repair_a_box():
    assert parse(f"{THINK}<answer>[1, 2, 3<seg>, 4]</answer>").status is Status.MALFORMED_BOXES


def test_a_bracketed_token_is_not_a_box():
    prediction = parse(f"{THINK}<answer>[1, 2, 3, 4].[SEG]</answer>", seg_token="[SEG]")
    assert (prediction.valid, prediction.has_seg) == (True, True)


def test_boxes_are_read_in_the_frame_of_the_model():
    relative = Frame("relative_1000", (100, 80))
    assert parse_completion(THINK + ANSWER, relative).boxes.tolist() == [[1.0, 1.6, 3.0, 3.2]]


def test_without_a_required_token():
    text = f"{THINK}<answer>[1, 2, 3, 4]</answer>"
    assert parse(text, require_seg=False).valid
    assert not parse(text, require_seg=False).has_seg
    assert parse(text, require_seg=False, seg_token="").valid


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (ANSWER, Status.VALID),
        (THINK + ANSWER, Status.VALID),
        ("<think></think>" + ANSWER, Status.VALID),
        ("so " + ANSWER, Status.EXTRA_TEXT),
        (ANSWER + ANSWER, Status.EXTRA_TEXT),
        (ANSWER + THINK, Status.EXTRA_TEXT),
        ("<think>" + ANSWER, Status.NO_ANSWER),
        ("", Status.NO_ANSWER),
    ],
)
def test_without_reasoning_the_grammar_is_one_answer_block(text, status):
    assert parse(text, require_reasoning=False).status is status


@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)), st.booleans(), st.booleans())
def test_total_and_consistent_on_any_text(text, seg, reasoning):
    prediction = parse(text, require_seg=seg, require_reasoning=reasoning)
    assert prediction.text in (text, strip_end_tokens(text))
    assert strip_end_tokens(prediction.text) == strip_end_tokens(text)
    assert np.isfinite(prediction.boxes).all()
    assert (prediction.boxes >= 0).all()
    assert (prediction.boxes <= [100, 80, 100, 80]).all()
    if prediction.valid:
        assert prediction.answer
        assert prediction.reasoning or not reasoning
        assert prediction.has_seg or not seg
        assert parse(text + "x", require_seg=seg, require_reasoning=reasoning).status is Status.EXTRA_TEXT


@pytest.mark.parametrize("piece", HOSTILE)
@pytest.mark.parametrize("shell", ["{}", THINK + "<answer>{}</answer>", "<think>{}</think>" + ANSWER])
def test_a_megabyte_of_hostile_text_is_read(piece, shell):
    text = shell.format(piece * (1_000_000 // len(piece)))
    assert isinstance(parse(text), Prediction)  # quadratic time would run into the limit of pytest


@st.composite
def cases(draw):
    width, height = draw(st.integers(1, 1000)), draw(st.integers(1, 1000))
    boxes = []
    for _ in range(draw(st.integers(0, 4))):
        x1, y1 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        boxes.append([x1, y1, draw(st.integers(x1 + 1, width)), draw(st.integers(y1 + 1, height))])
    kind = draw(st.sampled_from(["original_px", "resized_px", "relative_1000"]))
    return Frame(kind, (width, height), (draw(st.integers(28, 512)), draw(st.integers(28, 512)))), boxes


@given(cases(), st.sampled_from(["Dark.", "", " two [1, 2] <b>\n", None]))
def test_what_is_formatted_is_read_back(case, reasoning):
    frame, boxes = case
    text = format_completion(reasoning, format_answer("brain tumour", boxes, frame))
    prediction = parse_completion(text, frame, require_reasoning=bool(reasoning))
    assert prediction.valid
    assert prediction.reasoning == (None if reasoning is None else reasoning.strip())
    assert prediction.boxes.shape == (len(boxes), 4)
    unit = np.array([*frame.original_size] * 2) / np.array([*frame.size] * 2)
    assert (np.abs(prediction.boxes - np.array(boxes).reshape(-1, 4)) <= unit + 1e-9).all()


def test_format_known_values():
    assert format_answer("cyst", [[1, 2, 3, 4], [5, 6, 7, 8]], FRAME) == (
        "The cyst is located at [1, 2, 3, 4], [5, 6, 7, 8].<seg>"
    )
    assert format_answer("cyst", [], FRAME) == "No cyst is visible.<seg>"
    assert format_answer("cyst", [[1, 2, 3, 4]], FRAME, seg_token="") == "The cyst is located at [1, 2, 3, 4]."
    assert format_completion(None, "b") == "<answer>b</answer>"
    assert format_completion("a", "b") == "<think>a</think><answer>b</answer>"


def test_format_refuses_what_would_not_be_read_back():
    with pytest.raises(DataError, match=r"lesion 'cyst \[left\]' holds a bracket"):
        format_answer("cyst [left]", [], FRAME)
    with pytest.raises(DataError, match="reasoning holds the tag '</think>'"):
        format_completion("a</think>b", "c")
    with pytest.raises(DataError, match="answer holds the tag '<answer>'"):
        format_completion("a", "<answer>c")
