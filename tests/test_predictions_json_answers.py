"""Answers in JSON: bad model text is data, and what is good in it is never lost."""

import json

import numpy as np
import pytest
from growth import grows_linearly
from hypothesis import given
from hypothesis import strategies as st

from segrl.errors import DataError
from segrl.predictions import Frame, Status, parse_completion, read_json_answer

FRAME = Frame("original_px", (64, 48))
LARGEST = 1e6


def read(answer, **options):
    options = {"require_seg": False, "answer_format": "json", **options}
    return parse_completion(f"<think>Dark.</think><answer>{answer}</answer>", FRAME, **options)


def test_objects_with_boxes_points_and_confidences():
    found = read(
        '[{"bbox_2d": [1, 2, 9.5, 8], "point_2d": [3, 4], "score": 0.5}, {"bbox": [0, 0, 2, 2], "confidence": 1}]'
    )
    assert found.status is Status.VALID
    assert found.boxes.tolist() == [[1, 2, 9.5, 8], [0, 0, 2, 2]]
    assert found.points.tolist() == [[3, 4]]
    assert found.scores is not None
    assert found.scores.tolist() == [0.5, 1.0]
    assert found.slice_index is None


def test_one_object_a_slice_and_a_list_of_boxes():
    found = read('{"slice": 12, "bbox_2d_list": [[1, 2, 9, 8], [0, 0, 2, 2]], "label": "liver"}')
    assert found.valid
    assert found.slice_index == 11
    assert len(found.boxes) == 2
    assert read('{"bbox": [1, 2, 9, 8], "points_1": [3, 4], "points_2": [5, 6]}').points.tolist() == [[3, 4], [5, 6]]
    assert read('{"slice": 1, "bbox_2d_list": []}').valid


@pytest.mark.parametrize("answer", ["[]", "{}", " [ ] "])
def test_nothing_found_is_valid(answer):
    found = read(answer)
    assert found.valid
    assert len(found.boxes) == len(found.points) == 0


def test_numbers_are_converted_and_clipped_like_any_others():
    text = '<answer>[{"bbox_2d": [500, 500, 2000, 1000], "point_2d": [250, 0]}]</answer>'
    options = {"require_seg": False, "require_reasoning": False, "answer_format": "json"}
    found = parse_completion(text, Frame("relative_1000", (64, 48)), **options)
    assert found.boxes.tolist() == [[32, 24, 64, 48]]
    assert found.points.tolist() == [[16, 0]]


def test_the_token_may_follow_the_json_and_nothing_else():
    assert read('[{"bbox_2d": [1, 2, 9, 8]}]<seg>', require_seg=True).valid
    assert read('[{"bbox_2d": [1, 2, 9, 8]}]', require_seg=True).status is Status.NO_SEG_TOKEN
    assert read('<seg>[{"bbox_2d": [1, 2, 9, 8]}]', require_seg=True).status is Status.MALFORMED_JSON
    assert read('[{"bbox_2d": [1, 2, 9, 8]}] <seg>.', require_seg=True).status is Status.MALFORMED_JSON


GOOD = '{"bbox_2d": [1, 2, 9, 8]}'


@pytest.mark.parametrize(
    ("answer", "boxes"),
    [
        ("no json", 0),
        ("See:\n```json\n[" + GOOD + "]\n```", 0),
        ("```json\n[" + GOOD + "]\n```\nDone.", 0),
        ("```json\n[" + GOOD + "]\n```\n```json\n[]\n```", 0),
        ("```json\n[" + GOOD + "]", 0),
        ("[" + GOOD + "]\n```", 0),
        ("``````", 0),
        ("```", 0),
        ("```json\n```", 0),
        ("`[" + GOOD + "]`", 0),
        (f"[{GOOD}] and text", 0),
        (f"[{GOOD}", 0),
        (f"[{GOOD}, {{}}]", 1),
        (f"[{GOOD}, 3]", 1),
        (f"[{GOOD}, [1, 2, 9, 8]]", 1),
        (f'[{GOOD}, {{"label": "cyst"}}]', 1),
        (f'[{GOOD}, {{"bbox_2d": [1, 2, 9]}}]', 1),
        (f'[{GOOD}, {{"bbox_2d": [9, 2, 1, 8]}}]', 1),
        (f'[{GOOD}, {{"bbox_2d": ["1", 2, 9, 8]}}]', 1),
        (f'[{GOOD}, {{"bbox_2d": [true, 2, 9, 8]}}]', 1),
        (f'[{GOOD}, {{"bbox_2d": [NaN, 2, 9, 8]}}]', 1),
        (f'[{GOOD}, {{"bbox_2d": [1, 2, 1e999, 8]}}]', 1),
        (f'[{GOOD}, {{"bbox_2d": [1, 2, 9, 8], "bbox_2d": [0, 0, 64, 48]}}]', 1),
        (f'[{GOOD}, {{"bbox_2d": [1, 2, 9, 8], "bbox": [0, 0, 64, 48]}}]', 2),
        (f'[{GOOD}, {{"point_2d": [1, 2, 3]}}]', 1),
        (f'[{GOOD}, {{"slice": 0}}]', 1),
        (f'[{GOOD}, {{"slice": 1.0}}]', 1),
        (f'[{GOOD}, {{"slice": true}}]', 1),
        (f'[{GOOD}, {{"slice": 1}}, {{"slice": 2}}]', 1),
        ('[{"bbox_2d": [1, 2, 9, 8], "score": 0.5}, ' + GOOD + "]", 2),
        ('[{"bbox_2d": [1, 2, 9, 8], "score": 1.5}]', 1),
        ('[{"bbox_2d": [1, 2, 9, 8], "score": -0.5}]', 1),
        ('{"bbox_2d_list": [[1, 2, 9, 8], [1]]}', 1),
        ('{"bbox_2d_list": {"a": 1}}', 0),
        ('{"bbox_2d": [1, 2, 9, 8], "bbox_2d_list": [[1, 2, 9, 8]]}', 2),
        ("3", 0),
        ("null", 0),
        ("[null]", 0),
        ("[" * 100_000, 0),
        ('{"bbox_2d":' * 50_000, 0),
        ("9" * 10_000, 0),
    ],
)
def test_what_is_malformed_keeps_what_is_good(answer, boxes):
    found = read(answer)
    assert found.status is Status.MALFORMED_JSON
    assert len(found.boxes) == boxes
    assert found.scores is None or len(found.scores) == boxes


@pytest.mark.parametrize("fence", ["```json\n{}\n```", "```\n{}```", "```JSON {} ```", " ```{}``` "])
@pytest.mark.parametrize("answer", ["[" + GOOD + "]", GOOD, "[]", "{}"])
def test_one_code_fence_around_the_whole_answer_is_read(fence, answer):
    found = read(fence.replace("{}", answer))
    assert found.valid
    assert found.boxes.tolist() == read(answer).boxes.tolist()
    assert read(fence.replace("{}", answer) + "\n<seg>", require_seg=True).valid


@pytest.mark.parametrize(
    "extra",
    [
        '"boxes": [[4, 4, 16, 14]]',
        '"box": [1, 2, 9, 8]',
        '"box": "1, 2, 9, 8"',
        '"x1": 1, "y1": 2, "x2": 9, "y2": 8',
        '"xmin": 1, "ymin": 2',
        '"left": 1, "top": 2, "right": 9, "bottom": 8',
        '"center": [4, 5]',
        '"coordinates": {"a": 1, "b": 2}',
        '"corners": [[1, 2], [9, 8]]',
        '"where": {"x": 4, "y": 5}',
        '"label": "cyst (100,200),(300,400)"',
        '"label": "cyst at [1, 2, 9, 8]"',
        '"label": ["a", {"b": "x1=10, y1=20"}]',
        '"polygon": [1, 2, 9, 2, 9, 8]',
        '"numbers": [1, 2, 9, 8]',
    ],
)
@pytest.mark.parametrize("claim", ['"bbox_2d_list": []', '"slice": 2, "bbox_2d_list": []', '"bbox_2d": [1, 2, 9, 8]'])
def test_coordinates_under_another_key_are_malformed(claim, extra):
    """Else a finding under a key that is not read would count as nothing found, and be right without a lesion."""
    plain, found = read(f"{{{claim}}}"), read(f"{{{claim}, {extra}}}")
    assert plain.valid
    assert found.status is Status.MALFORMED_JSON
    assert found.boxes.tolist() == plain.boxes.tolist()


@pytest.mark.parametrize(
    "extra",
    [
        '"label": "cyst"',
        '"label": "cyst of 12 mm, 2 of 3"',
        '"id": 3',
        '"size_mm": [12, 8, 6.5]',
        '"location": "left lung, segment 3"',
        '"boxes": 2',
        '"date": "2024-03-14"',
        '"axis": "x"',
        '"confidence_low": 0.2, "confidence_high": 0.9',
        '"right": 1, "left": 2',
        '"note": null, "sure": true',
    ],
)
def test_other_keys_without_coordinates_are_ignored(extra):
    found = read(f'[{{"bbox_2d": [1, 2, 9, 8], {extra}}}]')
    assert found.valid
    assert found.boxes.tolist() == [[1, 2, 9, 8]]


def test_nested_values_of_other_keys_are_read_without_recursion():
    deep = '{"a":' * 400 + '{"x1": 3}' + "}" * 400
    assert read(f'{{"bbox_2d_list": [], "note": {deep}}}').status is Status.MALFORMED_JSON


def test_two_slices_are_no_slice():
    assert read('[{"slice": 1}, {"slice": 2}]').slice_index is None
    assert read('[{"slice": 3}, {"slice": 3}]').slice_index == 2


numbers = st.integers(-10, 70) | st.floats(allow_nan=True, allow_infinity=True, width=32)
keys = st.sampled_from(["bbox_2d", "bbox_2d_list", "point_2d", "score", "slice", "x"])
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(
            st.sampled_from(["bbox_2d", "bbox_2d_list", "point_2d", "score", "slice", "x"]), inner, max_size=4
        )
    ),
    max_leaves=20,
)


@given(values)
def test_any_json_is_read_and_what_is_read_is_sound(value):
    found = read(json.dumps(value))
    assert found.status in (Status.VALID, Status.MALFORMED_JSON, Status.EXTRA_TEXT, Status.NO_ANSWER)
    assert np.isfinite(found.boxes).all()
    assert (found.boxes[:, 2:] >= found.boxes[:, :2]).all()
    assert ((found.points >= 0) & (found.points <= [64, 48])).all()


@given(st.text(max_size=60))
def test_any_text_is_read(text):
    read_json_answer(text, LARGEST)


def test_squares_are_not_linear():
    assert not grows_linearly(lambda n: lambda: [0 for _ in range(n) for _ in range(n)], 200)
    assert not grows_linearly(lambda n: lambda: np.zeros((n, n)), 200)


def test_work_is_linear_in_the_text():
    def reading(n):
        text = "[" + ", ".join(['{"bbox_2d": [1, 2, 9, 8], "label": "x"}'] * (n // 40)) + "]"
        return lambda: read_json_answer(text, LARGEST)

    assert len(reading(1_000_000)().boxes) == 25_000
    assert grows_linearly(reading, 20_000)


def test_an_unknown_answer_format():
    with pytest.raises(DataError, match="answer_format='xml'; expected one of text, json"):
        read("[]", answer_format="xml")
