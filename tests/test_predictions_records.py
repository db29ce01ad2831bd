"""Plain values read into targets and predictions: every form of a mask, and every wrong value."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from segrl.errors import DataError
from segrl.geometry import boxes_from_mask, mask_to_rle
from segrl.predictions import (
    Frame,
    Target,
    VolumeTarget,
    answer_record,
    read_answer,
    read_frame,
    read_mask,
    read_probability,
    read_target,
)
from segrl.rewards import CompletionFormat

HEIGHT, WIDTH = 12, 20
MASK = np.zeros((HEIGHT, WIDTH), dtype=bool)
MASK[2:5, 3:9] = MASK[8:11, 12:14] = True
BOXES = [[3, 2, 9, 5], [12, 8, 14, 11]]
TEXT = "<think>Two.</think><answer>[150, 167, 450, 417], [600, 667, 700, 917]<seg></answer>"


def png(mask: np.ndarray = MASK, value: int = 255) -> bytes:
    out = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * np.uint8(value)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "mask.png").write_bytes(png())
    (tmp_path / "cut.png").write_bytes(png()[:60])
    (tmp_path / "three.png").write_bytes(png(np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 3, 1))
    np.save(tmp_path / "mask.npy", MASK)
    np.save(tmp_path / "volume.npy", np.stack([~MASK & False, MASK, MASK]))
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "several.npz", MASK, MASK)
    return tmp_path


RLE = mask_to_rle(MASK)


@pytest.mark.parametrize(
    "value",
    [
        "mask.png",
        Path("mask.png"),
        "mask.npy",
        {"path": "mask.png", "bytes": None},
        {"path": None, "bytes": png()},
        RLE,
        json.dumps(RLE),
        {key: np.array(numbers) for key, numbers in RLE.items()},
        Image.fromarray(MASK),
        MASK,
        MASK.astype(np.uint8) * 255,
        MASK.astype(int).tolist(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_form_of_a_mask_is_the_same_target(value, folder):
    assert read_mask(value, folder=folder).tolist() == MASK.tolist()
    for column in ("mask", "target_mask"):
        target = read_target({column: value, "query": "Where?", "name": "b", "prompt": "ignored"}, folder)
        assert isinstance(target, Target)
        assert (target.mask == MASK).all()
        assert target.boxes.tolist() == boxes_from_mask(MASK).tolist()
        assert (target.query, target.name, target.lesion) == ("Where?", "b", "")


@pytest.mark.parametrize("value", [RLE, json.dumps(RLE), json.dumps({"mask": RLE}), {"mask": RLE}, MASK])
def test_a_mask_alone_is_a_truth_and_json_text_is_one_too(value):
    target = read_target(value)
    assert isinstance(target, Target)
    assert (target.mask == MASK).all()


@pytest.mark.parametrize("value", [None, "", {}, "{}", {"name": "a", "mask": None, "boxes": None}, {"mask": ""}])
def test_no_truth(value):
    assert read_target(value) is None


@given(
    st.lists(
        st.tuples(st.floats(0, WIDTH), st.floats(0, HEIGHT), st.floats(0, WIDTH), st.floats(0, HEIGHT)).filter(
            lambda box: box[0] < box[2] and box[1] < box[3]
        ),
        max_size=3,
    )
)
def test_the_inside_of_boxes_stands_for_a_mask(boxes):
    target = read_target({"boxes": boxes, "size": [WIDTH, HEIGHT]})
    assert isinstance(target, Target)
    touched = [
        [any(x1 < x + 1 and x < x2 and y1 < y + 1 and y < y2 for x1, y1, x2, y2 in boxes) for x in range(WIDTH)]
        for y in range(HEIGHT)
    ]
    assert target.mask.tolist() == touched
    assert target.boxes.tolist() == [list(box) for box in boxes]
    assert target.empty == (not boxes)


def test_boxes_replace_those_of_the_mask(folder):
    for boxes in (BOXES[:1], json.dumps(BOXES[:1]), np.array([np.array(BOXES[0]), None], dtype=object)[:1]):
        target = read_target({"mask": "mask.png", "boxes": boxes}, folder)
        assert isinstance(target, Target)
        assert target.boxes.tolist() == BOXES[:1]


def test_volume(folder):
    target = read_target({"volume": "volume.npy", "spacing_mm": [5, 1, 1], "name": "v"}, folder)
    assert isinstance(target, VolumeTarget)
    assert (target.spacing_mm, target.name, target.slice_areas.tolist()) == ((5, 1, 1), "v", [0, 24, 24])
    alone = read_target({"volume": np.zeros((2, 3, 4), dtype=bool)})
    assert isinstance(alone, VolumeTarget)
    assert alone.spacing_mm is None
    frame = Frame("original_px", (4, 3))
    record = json.loads(json.dumps(answer_record(JSON_FORMAT.parse("", frame), alone, frame)))
    assert record["spacing_mm"] is None
    again = read_target(record)
    assert isinstance(again, VolumeTarget)
    assert again.spacing_mm is None


VOLUME = np.stack([~MASK & False, MASK, MASK[::-1], ~MASK & False])
VOLUME_RLE = mask_to_rle(VOLUME)


@pytest.mark.parametrize(
    "value",
    [
        "whole.npy",
        Path("whole.npy"),
        VOLUME_RLE,
        json.dumps(VOLUME_RLE),
        {key: np.array(numbers) for key, numbers in VOLUME_RLE.items()},
        VOLUME,
        VOLUME.astype(np.uint8) * 255,
        VOLUME.astype(int).tolist(),
        json.dumps(VOLUME.astype(int).tolist()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_form_of_a_volume_is_the_same_target(value, folder):
    np.save(folder / "whole.npy", VOLUME)
    target = read_target({"volume": value, "spacing_mm": json.dumps([5, 1, 1])}, folder)
    assert isinstance(target, VolumeTarget)
    assert (target.mask == VOLUME).all()
    assert (read_mask(value, folder=folder, volume=True) == VOLUME).all()


JSON_FORMAT = CompletionFormat(answer_format="json", require_seg=False)
SLICE_TEXT = '<think>Two.</think><answer>{"slice": 2, "bbox_2d_list": [[150, 167, 450, 417]]}</answer>'


def test_a_record_of_a_volume_reads_back():
    target = VolumeTarget.from_mask(VOLUME, (5.0, 0.7, 0.7), query="Where?", lesion="cyst", name="ct_1")
    frame = Frame("relative_1000", (WIDTH, HEIGHT), slices=(0, 2, 3))
    said = JSON_FORMAT.parse(SLICE_TEXT, frame).with_mask(~VOLUME)
    record = json.loads(json.dumps(answer_record(said, target, frame)))
    assert record.keys() == {"completion", "predicted_mask", "frame", "volume", "spacing_mm", "query", "lesion", "name"}
    truth = read_target(record)
    assert isinstance(truth, VolumeTarget)
    assert (truth.mask == VOLUME).all()
    assert (truth.spacing_mm, truth.query, truth.name) == ((5.0, 0.7, 0.7), "Where?", "ct_1")
    known = read_frame(record["frame"])
    assert known == frame
    mask = read_mask(record["predicted_mask"], volume=True)
    again = read_answer(record["completion"], JSON_FORMAT, truth, frame=known, mask=mask)
    assert again.slice_index == said.slice_index == 2
    np.testing.assert_allclose(again.boxes, said.boxes)
    assert again.mask is not None
    assert (again.mask == ~VOLUME).all()
    assert answer_record(JSON_FORMAT.parse("", frame), target, frame)["predicted_mask"] is None


def test_a_record_of_an_image_reads_back():
    target, frame = Target.from_mask(MASK, name="a.png"), Frame("relative_1000", (WIDTH, HEIGHT))
    record = json.loads(json.dumps(answer_record(CompletionFormat().parse(TEXT, frame).with_mask(MASK), target, frame)))
    assert record.keys() == {"completion", "predicted_mask", "frame", "target_mask", "boxes", "name"}
    truth = read_target(record)
    assert isinstance(truth, Target)
    assert (truth.mask == MASK).all()
    assert truth.boxes.tolist() == target.boxes.tolist()
    assert read_frame(json.dumps(record["frame"])) == frame


@pytest.mark.parametrize("slices", [[], [2, 1], [0, 0], [-1, 2], [0.5], 3])
def test_slices_of_a_frame_are_checked(slices):
    with pytest.raises(DataError, match=r"column 'frame': .*(slices|iterable).*; expected the attributes of a Frame"):
        read_frame({"kind": "relative_1000", "original_size": [4, 4], "slices": slices})


def test_a_frame_of_another_volume_is_refused():
    target, frame = VolumeTarget.from_mask(VOLUME), Frame("relative_1000", (WIDTH, HEIGHT), slices=(0, 4))
    with pytest.raises(DataError, match="column 'frame': slice 4 of a volume with 4; expected 0 to 3; is it the truth"):
        read_answer(SLICE_TEXT, JSON_FORMAT, target, frame=frame)
    assert read_answer(SLICE_TEXT, JSON_FORMAT, frame=frame).slice_index == 4


def test_a_mask_of_another_volume_is_refused():
    target = VolumeTarget.from_mask(VOLUME)
    for mask, size in ((VOLUME[:3], "20 x 12 px on 3 slices"), (MASK, "20 x 12 px")):
        message = f"column 'predicted_mask': the mask is {size}, the truth 20 x 12 px on 4 slices; resize"
        with pytest.raises(DataError, match=message):
            read_answer(SLICE_TEXT, JSON_FORMAT, target, mask=mask)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"mask": "lost.png"}, r"column 'mask': .*lost\.png: no such file; relative paths start from the folder"),
        ({"mask": "."}, r"column 'mask': .*: cannot be decoded \(a directory\)"),
        ({"mask": "cut.png"}, r"column 'mask': .*cut\.png: cannot be decoded"),
        ({"mask": "volume.npy"}, r"column 'mask': .*volume\.npy: expected a mask of shape"),
        ({"mask": "pickled.npy"}, r"pickled\.npy: cannot be read: .*Python objects"),
        ({"target_mask": "three.png"}, r"column 'target_mask': .*three\.png: a mask may hold 0 and one positive value"),
        ({"mask": '{"size": [2'}, r"column 'mask': .* is not valid JSON"),
        ({"mask": "[" * 100_000}, "is not valid JSON"),
        ({"mask": {"size": [2, 2], "counts": [3]}}, "column 'mask': the counts cover 3 pixels; expected 4"),
        ({"mask": {"path": None}}, "column 'mask': .*expected run lengths"),
        ({"mask": [[0, 1], [1]]}, "column 'mask': "),
        ({"mask": 3}, "column 'mask': 3; expected a path, run lengths, an image or an array"),
        ({"mask": "mask.png", "size": [5, 5]}, "the mask is 20 x 12 px; expected 5 x 5, as the column 'size' says"),
        ({"boxes": BOXES}, "column 'boxes': without a mask the column 'size' is needed"),
        (
            {"boxes": [[1, 2, 3]], "size": [9, 9]},
            r"column 'boxes': \[\[1, 2, 3\]\]; expected numbers of shape \(n, 4\)",
        ),
        ({"boxes": [1, 2, 3, 4], "size": [9, 9]}, r"column 'boxes': .*expected numbers of shape \(n, 4\)"),
        ({"boxes": [[1, 2, 3, "4"]], "size": [9, 9]}, "column 'boxes': .*expected numbers"),
        ({"boxes": [[1, 2, 3, None]], "size": [9, 9]}, "column 'boxes': .*expected numbers"),
        ({"boxes": [[1, 2, math.nan, 4]], "size": [9, 9]}, r"column 'boxes'.*expected finite coordinates"),
        ({"boxes": [[5, 2, 3, 4]], "size": [9, 9]}, r"column 'boxes'.*expected \[x1, y1, x2, y2\] with x1 <= x2"),
        ({"boxes": [[3, 2, 3, 4]], "size": [9, 9]}, r"\[3.0, 2.0, 3.0, 4.0\] has no area or leaves the image of 9 x 9"),
        (
            {"boxes": [[0, 0, 900, 900]], "mask": "mask.png"},
            "leaves the image of 20 x 12 px; expected .*original pixels",
        ),
        ({"boxes": BOXES, "size": [0, 9]}, r"column 'size': \[0, 9\]; expected \[width, height\]"),
        ({"boxes": BOXES, "size": [2.5, 9]}, r"column 'size': \[2.5, 9\]"),
        ({"boxes": BOXES, "size": [math.nan, 9]}, "column 'size'"),
        ({"boxes": BOXES, "size": [10**9, 10**9]}, "column 'size'"),
        ({"boxes": BOXES, "size": {}}, r"column 'size': {}; expected numbers of shape \(2\)"),
        ({"volume": "mask.png"}, r"column 'volume': 'mask.png'; expected a path to a \.npy file.*, or run lengths"),
        ({"volume": 3}, r"column 'volume': 3; expected a path to a \.npy file"),
        ({"volume": RLE}, r"column 'volume': expected 3 dimensions, got shape \(12, 20\)"),
        ({"volume": {"size": [2, 2, 2], "counts": [3]}}, "column 'volume': the counts cover 3 pixels; expected 8"),
        ({"volume": [[[0, 1], [1]]]}, "column 'volume': not an array"),
        ({"volume": "[[[0"}, "column 'volume': .* is not valid JSON"),
        ({"mask": {"size": [4, 2, 3], "counts": [24]}}, r"column 'mask': expected 2 dimensions, got shape \(4, 2, 3\)"),
        ({"volume": "lost.npy"}, r"column 'volume': .*lost\.npy: no such file"),
        ({"volume": "mask.npy"}, "column 'volume': .*expected 3 dimensions"),
        ({"volume": np.zeros((2, 2, 2))}, "column 'volume': .*expected a bool or integer mask"),
        (
            {"volume": "volume.npy", "spacing_mm": [1, 1]},
            r"column 'spacing_mm': \[1, 1\]; expected numbers of shape \(3\)",
        ),
        ({"volume": "volume.npy", "spacing_mm": [1, 0, 1]}, "column 'volume': .*expected three positive millimetres"),
        ("{", "the truth: '{' is not valid JSON"),
    ],
)
def test_wrong_truths_name_column_value_and_fix(row, message, folder):
    with pytest.raises(DataError, match=message):
        read_target(row, folder)


def test_a_bomb_of_a_png_is_refused(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"mask\.png: declares too many pixels .*decompression bomb"):
        read_mask("mask.png", folder=folder)


def test_the_truth_tells_the_size_of_the_image():
    target = Target.from_mask(MASK)
    for prediction in (
        read_answer(TEXT, CompletionFormat(), target),
        read_answer(TEXT, CompletionFormat(), size=(WIDTH, HEIGHT)),
    ):
        np.testing.assert_allclose(prediction.boxes, BOXES, atol=0.011)
    messages = [{"role": "assistant", "content": [{"type": "text", "text": TEXT}]}]
    assert read_answer(messages, CompletionFormat(), target).text == TEXT


def test_a_frame_may_be_a_function_of_the_size():
    completion_format = CompletionFormat(frame=lambda shown, original: Frame("relative_1000", original))
    np.testing.assert_allclose(read_answer(TEXT, completion_format, Target.from_mask(MASK)).boxes, BOXES, atol=0.011)


def test_mask_and_probability_are_carried(folder):
    np.save(folder / "p.npy", MASK * 0.75)
    probability = read_probability("p.npy", folder)
    prediction = read_answer(TEXT, CompletionFormat(), Target.from_mask(MASK), mask=MASK, probability=probability)
    assert prediction.mask is MASK
    assert prediction.probability is not None
    assert prediction.probability.max() == 0.75


@pytest.mark.parametrize("completion", [None, 3, [{"role": "assistant"}], ["text"], b"bytes"])
def test_a_completion_is_a_text_or_messages(completion):
    with pytest.raises(DataError, match=r"column 'completion': .*expected a text or"):
        read_answer(completion, CompletionFormat())


def test_masks_of_different_sizes_are_refused():
    with pytest.raises(DataError, match="column 'predicted_mask': the mask is 4 x 3 px, the truth 20 x 12 px; resize"):
        read_answer(TEXT, CompletionFormat(), Target.from_mask(MASK), mask=np.zeros((3, 4), dtype=bool))
    with pytest.raises(DataError, match="column 'probability': "):
        read_answer(TEXT, CompletionFormat(), Target.from_mask(MASK), mask=MASK, probability=np.zeros((3, 4)))
