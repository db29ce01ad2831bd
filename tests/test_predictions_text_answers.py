"""Boxes in words: Qwen's notations are read, coordinates in any other are malformed, and numbers of prose are prose."""

import json
from typing import Any

import numpy as np
import pytest
from growth import grows_linearly
from hypothesis import given
from hypothesis import strategies as st

from segrl.errors import DataError
from segrl.geometry import mask_to_rle
from segrl.predictions import (
    Frame,
    Status,
    Target,
    VolumeTarget,
    format_answer,
    format_completion,
    parse_completion,
    read_answer,
)
from segrl.predictions.coordinates import names_coordinates
from segrl.predictions.text_answers import read_text_answer
from segrl.rewards import easyr1_compute_score, make_reward, swift_orm, verl_compute_score
from segrl.scoring import score_file
from segrl.testing.answers import UNREAD

FRAME = Frame("original_px", (1000, 1000))
BOX = [100.0, 200.0, 300.0, 400.0]


def parse(answer, frame=FRAME):
    return parse_completion(f"<think>Dark.</think><answer>{answer}<seg></answer>", frame)


@pytest.mark.parametrize(
    ("answer", "boxes"),
    [
        ("(100,200),(300,400)", [BOX]),
        ("The cyst is at ( 100 , 200.0 ) ,\n(300.,400).", [BOX]),
        ("<|box_start|>(100,200),(300,400)<|box_end|>", [BOX]),
        (
            "<|object_ref_start|>the cyst<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>"
            "<|box_start|>(1,2),(3,4)<|box_end|>",
            [BOX, [1, 2, 3, 4]],
        ),
        ("<ref>the cyst</ref><box>(100,200),(300,400)</box>", [BOX]),
        ("<|box_start|> [100, 200, 300, 400] <|box_end|>", [BOX]),
        ("[(100,200),(300,400)]", [BOX]),
        ("(1,2),(3,4), (100,200),(300,400)", [[1, 2, 3, 4], BOX]),
        ("[1, 2, 3, 4], (100,200),(300,400) and [5, 6, 7, 8]", [[1, 2, 3, 4], BOX, [5, 6, 7, 8]]),
        ("(100,200),(300,400), 12 mm, 3 of 4", [BOX]),
        ("(0,0),(5000,5000)", [[0, 0, 1000, 1000]]),
    ],
)
def test_the_notations_of_qwen_are_read(answer, boxes):
    found = parse(answer)
    assert found.status is Status.VALID
    assert found.boxes.tolist() == boxes


def test_they_are_read_in_the_frame_of_the_model():
    found = parse("<|box_start|>(500,0),(1000,500)<|box_end|>", Frame("relative_1000", (200, 100)))
    assert found.boxes.tolist() == [[100, 0, 200, 50]]


UNREAD_ANSWERS = [
    *(template.format(100, 200, 300, 400) for template in UNREAD),
    "100 200 300 400",
    "100;200;300;400",
    "100-200-300-400",
    "100/200/300/400",
    "100:200:300:400",
    "nothing, 1, 2, 3, 4",
    "100 px, 200 px, 300 px, 400 px",
    "<100,200,300,400>",
    "\\boxed{100,200,300,400}",
    "(100,200)-(300,400)",
    "(100,200) (300,400)",
    "10,20 to 30,40",
    "{100,200},{300,400}",
    "top-left (1, 2), bottom-right (3, 4)",
    "(120, 80)",
    "x: 10",
    '"x1": 10, "y1": 20',
    "x1 10, y1 20, x2 30, y2 40",
    "x 10 y 20",
    "x from 10 to 30 and y from 20 to 40",
    "x-axis 10 to 30, y-axis 20 to 40",
    "cx=10, cy=20, w=5, h=5",
    "rows 10 to 20, columns 30 to 40",
    "coordinates 10, 20",
    '<point x="10" y="20">cyst</point>',
    "<|quad_start|>(1,2),(3,4),(5,6),(7,8)<|quad_end|>",
    "<|quad_start|>(1,2),(3,4)<|quad_end|>",
    "<|box_start|>100<|box_end|>",
    "<bin_10><bin_20>",
    "(100，200，300，400)",
    "１００, ２００, ３００, ４００",
    "١٠٠, ٢٠٠, ٣٠٠, ٤٠٠",
    "［100, 200, 300, 400］",
    "【100, 200, 300, 400】",
    "1\u200b00, 20\u20600, 300, 400",
]


@pytest.mark.parametrize("answer", UNREAD_ANSWERS)
@pytest.mark.parametrize("sentence", ["{}", "The lesion is located at {}.", "No lesion is visible.\n{}"])
def test_coordinates_in_another_notation_are_malformed_and_not_nothing(answer, sentence):
    found = parse(sentence.replace("{}", answer))
    assert found.status is Status.MALFORMED_BOXES
    assert found.boxes.tolist() == []


@pytest.mark.parametrize("answer", ["(5,6),(1,2)", "(1,2),(3,NaN)", f"(1,2),(3,{'9' * 400})", "(1,2),(3,2e6)"])
def test_bad_corners_are_no_box(answer):
    assert parse(answer).status is Status.MALFORMED_BOXES
    assert parse(f"[100, 200, 300, 400] and {answer}").boxes.tolist() == [BOX]


@pytest.mark.parametrize(
    "prose",
    [
        "No lesion is visible.",
        "3 lesions of 12 mm",
        "one lesion (12 mm) on slice 14 of 64",
        "slices 12, 13, 14, 15",
        "slice numbers 12, 13, 14, 15 are free",
        "12, 8, 6, 4 mm",
        "12, 8, 6 and 4 mm",
        "12, 8, 6, 4 and 2 cm",
        "2.5 x 3 x 4 cm",
        "(12 x 8 mm)",
        "(3.5 cm, 2.1 cm)",
        "12.5 % to 30 %",
        "10%, 20%, 30%, 40%",
        "2024-03-14",
        "14.03.2024, 10:30",
        "03/14/2024 and 24/7",
        "(2019, 2020)",
        "in 2018, 2019, 2020, 2021",
        "T2, T3, T4, T5 and L3, L4, L5, S1",
        "BI-RADS 4a, grade 3, 4",
        "Gleason 3+4=7",
        "Gleason score: 3, 4",
        "p < 0.05, n = 12",
        "HU -50 to 100, then 3-4 mm, 5-6 mm",
        "left: 3 nodules, right: 2",
        "at 3 and 9 o'clock",
        "ICD-10 C22.0",
        "a 60-year-old, 2 lesions, 12 mm, 14 mm",
        "Fig. 3 (b), (c)",
        "magnified 10x, 20x",
        "1.5 cm, 2.5 cm and 3 cm",
        "see the box, the point and the region",
        "x-ray of the y-shaped branch",
        "x-ray 3 of 4",
        "[] (none)",
        "series 3, image 14 of 64, 12 mm, 4 HU",
    ],
)
def test_numbers_of_prose_are_no_coordinates(prose):
    for answer in (prose, f"No lesion is visible: {prose}.", f"{prose}\n[100, 200, 300, 400]"):
        assert parse(answer).status is Status.VALID, answer


@given(st.lists(st.sampled_from(["mild", "3", "12 mm", "2 lesions", "20%", "2024", "left,", "and", "4.5 cm,", "(b)"])))
def test_words_with_single_numbers_are_no_coordinates(words):
    pauses = [word if n % 3 else f"{word} then" for n, word in enumerate(words)]
    assert not names_coordinates(" ".join(pauses))


@given(
    st.text() | st.lists(st.sampled_from(["(1,2)", ",", "[", "]", "<|box_start|>", "x=", "9", " ", "mm"])).map("".join)
)
def test_any_text_is_read(text):
    found = read_text_answer(text)
    assert all(len(box) == 4 for box in found.boxes)
    assert found.boxes == [] or found.well_formed in (True, False)
    if found.well_formed and not found.boxes:
        assert not names_coordinates(text.replace("[", "").replace("]", "")) or "[" in text


def test_a_lesion_is_not_named_by_coordinates():
    with pytest.raises(DataError, match=r"lesion 'cyst \(3, 4\)' names coordinates"):
        format_answer("cyst (3, 4)", [], FRAME)
    assert parse_completion(format_completion("Dark.", format_answer("grade 3 cyst (12 mm)", [], FRAME)), FRAME).valid


@pytest.mark.parametrize(
    "unit",
    ["1 ", "1, ", "(1,2)", "(1,2),", "(1,", "1    ", "x ", "x=(", "x1 1", " ", "{1 ", "<box", "1-", "1 1 1 1 and ",
     "1,2,3,4 mm ", "left=1 ", "\u200b1", "1e", "\ufdfa1"],
)  # fmt: skip
def test_work_is_linear_in_the_text(unit):
    assert grows_linearly(lambda n: lambda: read_text_answer("1, 2" + unit * (n // len(unit)) + "x"), 20_000)


# --- an image or a volume without a lesion must not score an answer with a box

IN_WORDS = {"frame": "original_px", "require_seg": False}
IN_JSON = {**IN_WORDS, "answer_format": "json"}
NOTHING = np.zeros((32, 40), dtype=bool)
CASES = [
    *(("box_f1", IN_WORDS, f"At {template.format(4, 4, 16, 14)}.", "Nothing.") for template in UNREAD),
    ("box_f1", IN_WORDS, "(4,4),(16,14)", "Nothing."),
    ("box_f1", IN_JSON, '{"bbox_2d_list": [], "box": [4, 4, 16, 14]}', "[]"),
    ("box_f1", IN_JSON, '[{"label": "at (4,4),(16,14)", "bbox_2d_list": []}]', "[]"),
    ("slice_boxes", IN_JSON, '{"slice": 2, "bbox_2d_list": [], "boxes": [[4, 4, 16, 14]]}', "{}"),
    ("slice_boxes", IN_JSON, '{"bbox_2d_list": [], "x1": 4, "y1": 4, "x2": 16, "y2": 14}', "{}"),
]


@pytest.mark.parametrize(("name", "options", "answer", "nothing"), CASES)
def test_without_a_lesion_a_box_in_any_notation_scores_nothing_at_every_door(name, options, answer, nothing, tmp_path):
    reward = make_reward(name, **options)
    volume = reward.volume
    mask = np.stack([NOTHING] * 3) if volume else NOTHING
    target = VolumeTarget.from_mask(mask) if volume else Target.from_mask(mask)
    truth = {"volume" if volume else "mask": mask_to_rle(mask)}
    for said, score in ((answer, 0.0), (nothing, 1.0)):
        text = format_completion("Dark.", said)
        frame = Frame("original_px", (40, 32))
        assert reward.score(reward.completion_format.parse(text, frame), target) == score
        assert reward.score(read_answer(text, reward.completion_format, target), target) == score
        columns: dict[str, Any] = {"volume" if volume else "mask": [mask]}
        assert reward(completions=[text], **columns) == [score]
        assert verl_compute_score(reward)("lesions", text, json.dumps(truth)) == score
        assert verl_compute_score(reward, batch=True)(["lesions"], [text], [truth]) == [score]
        assert easyr1_compute_score(reward)([{"response": text, "ground_truth": truth}]) == [{"overall": score}]
        assert swift_orm(reward)()([text], **{name: [value] for name, value in truth.items()}) == [score]
        path = tmp_path / "answers.jsonl"
        path.write_text(json.dumps({"completion": text, **truth}), encoding="utf-8")
        assert score_file(reward, path).columns[name] == [score]
