import re
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from segrl.data import (
    build_prompt,
    build_query,
    build_reasoning,
    load_folder,
    make_synthetic,
    prepare,
)
from segrl.errors import DataError, UnknownNameError
from segrl.geometry import boxes_from_mask
from segrl.models import tiny_qwen2_5_vl, tiny_qwen3_vl
from segrl.predictions import ImagePromptSettings, frame_for, parse_completion

LESIONS2D = Path(__file__).parents[2] / "shared" / "data" / "lesions2d"
TEXTS = ("query", "modality", "anatomy", "lesion", "name")

words = st.text(st.characters(categories=["Ll"]), min_size=1, max_size=12)


def masks(height=24, width=30):
    """Up to twelve single-pixel or larger specks."""
    corner = st.tuples(st.integers(0, height - 1), st.integers(0, width - 1), st.integers(1, 12))

    def paint(corners):
        mask = np.zeros((height, width), bool)
        for y, x, side in corners:
            mask[y : y + side, x : x + side] = True
        return mask

    return st.lists(corner, max_size=12).map(paint)


def dataset_of(image, mask, **texts):
    fields = dict.fromkeys(TEXTS, "") | {"query": "Where is the cyst?", "lesion": "cyst", "name": "a.png"} | texts
    row = {"image": [image], "mask": [PILImage.fromarray(mask)]} | {key: [value] for key, value in fields.items()}
    features = {key: Value("string") for key in fields} | {"image": Image(), "mask": Image()}
    return Dataset.from_dict(row, features=Features({key: features[key] for key in row}))


def one_box(width, height, box, **texts):
    mask = np.zeros((height, width), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 255
    return dataset_of(PILImage.new("RGB", (width, height)), mask, **texts)


def completion(dataset, index=0):
    (message,) = dataset[index]["completion"]
    assert message["role"] == "assistant"
    return message["content"]


# ---- queries


@given(words, words, words, st.text())
def test_every_query_names_everything_and_never_changes(lesion, anatomy, modality, key):
    query = build_query(lesion, anatomy, modality, key)
    assert f"{lesion} in this {modality} image of the {anatomy}" in query
    assert query == build_query(lesion, anatomy, modality, key)
    assert build_query(lesion, "", "", key).rstrip("?.").endswith("in this image")


def test_keys_spread_over_six_templates_or_more():
    assert len({build_query("cyst", "Head", "CT", f"row {key}") for key in range(200)}) >= 6


def test_the_template_does_not_depend_on_the_machine():
    assert build_query("dark cyst", "Breast", "Ultrasound", "row 3") == (
        "Find and segment the dark cyst in this ultrasound image of the breast."
    )


def test_query_without_a_lesion():
    with pytest.raises(DataError, match=r"lesion=' ' of 'a\.png': expected a name; fill the lesion column"):
        build_query(" ", "Head", "CT", "a.png")


# ---- reasoning


@given(masks(), st.text(), st.booleans())
def test_reasoning_holds_no_coordinates_or_tags_and_keeps_its_length(mask, key, brief):
    text = build_reasoning(lesion="dark cyst", anatomy="Head", modality="MRI", mask=mask, key=key, brief=brief)
    assert not re.search(r"[0-9<>\[\]]", text)
    assert "dark cyst" in text
    assert "head" in text
    assert len(text.split()) <= (20 if brief else 45)


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([(0, 0, 9, 9)], "one small dark cyst in the upper left part"),
        ([(40, 45, 60, 55)], "one medium dark cyst in the centre"),
        ([(0, 60, 99, 100)], "one large dark cyst in the lower part"),
        ([(80, 40, 99, 60), (0, 0, 2, 2)], "two medium dark cysts, the largest in the right part"),
        (
            [(x, 90, x + 2, 93) for x in range(0, 60, 10)],
            "several small dark cysts, the largest in the lower left part",
        ),
        ([(x, 10, x + 2, 12) for x in range(0, 100, 10)], "many small dark cysts, the largest in the upper left part"),
    ],
)
def test_count_size_and_place_in_words(boxes, expected):
    mask = np.zeros((100, 100), bool)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = True
    fields = {"lesion": "dark cyst", "anatomy": "Skin", "modality": "", "mask": mask, "key": "k"}
    assert build_reasoning(**fields, brief=True) == f"The skin looks normal around {expected}."
    assert f"shows {expected}." in build_reasoning(**fields)


def test_size_counts_pixels_and_not_boxes():
    mask = np.eye(100, dtype=bool)  # box: the whole image, pixels: 1 %
    assert "one small line" in build_reasoning(lesion="line", anatomy="", modality="", mask=mask, key="k")


@pytest.mark.parametrize(
    ("lesion", "plural"),
    [("ring abscess", "ring abscesses"), ("hard exudates", "hard exudates"), ("glioma", "gliomas")],
)
def test_plurals(lesion, plural):
    mask = np.eye(8, dtype=bool) & (np.arange(8) % 3 == 0)
    text = build_reasoning(lesion=lesion, anatomy="", modality="", mask=mask, key="k", brief=True)
    assert f"three large {plural}, the" in text or f"three small {plural}, the" in text


def test_reasoning_of_an_empty_mask():
    fields = {"lesion": "cyst", "anatomy": "Breast", "modality": "MRI", "mask": np.zeros((4, 4), bool), "key": "k"}
    for brief in (True, False):
        assert build_reasoning(**fields, brief=brief) == "The breast looks normal. No cyst is visible."


def test_the_aim_is_said_only_when_the_query_hides_it():
    fields = {"lesion": "glioma", "anatomy": "Head", "modality": "MRI", "mask": np.ones((4, 4), bool), "key": "k"}
    assert "The question is about the glioma." in build_reasoning(**fields, query="What is abnormal here?")
    assert "question" not in build_reasoning(**fields, query="Where is the Glioma?")


# ---- prompts and completions


def test_prompt():
    assert build_prompt("Where?", "Look.") == [{"role": "user", "content": "Where? Look."}]
    assert build_prompt("Where?", "") == [{"role": "user", "content": "Where?"}]
    for reasoning in (True, False):
        instruction = ImagePromptSettings(reasoning=reasoning).full_instruction
        assert ("<think>" in instruction) == reasoning
        assert "<seg>" not in instruction


def test_known_completion():
    prepared = prepare(
        one_box(40, 20, (4, 5, 10, 9)),
        None,
        ImagePromptSettings(frame_kind="original_px"),
        completions=True,
        brief=True,
    )
    assert completion(prepared) == (
        "<think>The tissue looks normal around one medium cyst in the left part.</think>"
        "<answer>The cyst is located at [4, 5, 10, 9].<seg></answer>"
    )
    assert prepared[0]["prompt"] == build_prompt("Where is the cyst?", ImagePromptSettings().full_instruction)


def test_relative_frame_counts_in_thousandths():
    prepared = prepare(
        one_box(40, 20, (4, 5, 10, 10)), None, ImagePromptSettings(frame_kind="relative_1000"), completions=True
    )
    assert "[100, 250, 250, 500]" in completion(prepared)


def test_qwen2_5_boxes_are_pixels_of_the_image_that_the_model_sees():
    _, processor = tiny_qwen2_5_vl(max_pixels=112 * 112)
    dataset = one_box(200, 200, (50, 100, 100, 200))
    for max_edge in (None, 150, 96):
        prepared = prepare(dataset, processor, ImagePromptSettings(max_edge=max_edge), completions=True)
        grid = processor.image_processor(prepared[0]["image"], return_tensors="pt")[
            "image_grid_thw"
        ]  # patches of 14 px
        edge = 14 * int(grid[0, 1])
        assert edge == {None: 112, 150: 84, 96: 84}[max_edge]
        assert f"[{edge // 4}, {edge // 2}, {edge // 2}, {edge}]" in completion(prepared)
    assert "[250, 500, 500, 1000]" in completion(
        prepare(dataset, processor, ImagePromptSettings(frame_kind="relative_1000"), completions=True)
    )


@pytest.mark.parametrize("build", [tiny_qwen2_5_vl, tiny_qwen3_vl])
@pytest.mark.parametrize("reasoning", [True, False])
def test_completions_parse_back_to_the_boxes_of_the_mask(build, reasoning):
    _, processor = build()
    dataset = make_synthetic(8)
    prepared = prepare(dataset, processor, ImagePromptSettings(reasoning=reasoning, max_edge=100), completions=True)
    for index, row in enumerate(prepared):
        assert isinstance(row, dict)
        assert row["image"].size == (100, 100)
        assert row["mask"].size == (112, 112)
        frame = frame_for(processor, row["image"].size, row["mask"].size)
        prediction = parse_completion(completion(prepared, index), frame, require_reasoning=reasoning)
        assert prediction.valid
        assert (prediction.reasoning is not None) == reasoning
        np.testing.assert_allclose(prediction.boxes, boxes_from_mask(np.asarray(row["mask"])), atol=1)


def test_prompts_only_leave_rows_and_bytes_alone():
    dataset = make_synthetic(3, size=48)
    prepared = prepare(dataset, None, completions=False)
    assert prepared.column_names == [*dataset.column_names, "prompt"]
    encoded = [d.cast_column("image", Image(decode=False))["image"] for d in (dataset, prepared)]
    assert list(encoded[0]) == list(encoded[1])
    assert prepared.features["image"] == Image()


def test_max_edge_keeps_the_aspect_and_never_enlarges():
    dataset = one_box(64, 16, (1, 2, 3, 4))
    assert prepare(dataset, None, ImagePromptSettings(max_edge=32), completions=False)[0]["image"].size == (32, 8)
    assert prepare(dataset, None, ImagePromptSettings(max_edge=4), completions=False)[0]["image"].size == (4, 1)
    assert prepare(dataset, None, ImagePromptSettings(max_edge=65), completions=False)[0]["image"].size == (64, 16)


def test_a_rotated_photo_is_turned_before_it_is_shrunk(tmp_path):
    photo = PILImage.fromarray(np.repeat(np.array([[[250, 0, 0]], [[0, 0, 250]]], np.uint8), 20, 0).repeat(20, 1))
    photo.getexif()[0x0112] = 6  # stored 20 x 40 px with red on top; shown 40 x 20 px with red on the right
    photo.save(tmp_path / "photo.png", exif=photo.getexif())
    mask = np.zeros((20, 40), np.uint8)
    mask[5:10, 20:40] = 255
    dataset = dataset_of(str(tmp_path / "photo.png"), mask)
    prepared = prepare(dataset, None, ImagePromptSettings(max_edge=20, frame_kind="original_px"), completions=True)
    assert prepared[0]["image"].size == (20, 10)
    assert np.asarray(prepared[0]["image"])[5, 18].argmax() == 0
    assert "[20, 5, 40, 10]" in completion(prepared)


def test_own_reasoning_is_used_and_gaps_are_filled():
    dataset = make_synthetic(2, size=48).add_column("reasoning", ["Own words.", ""])  # pyright: ignore[reportCallIssue]
    prepared = prepare(dataset, None, ImagePromptSettings(frame_kind="original_px"), completions=True, brief=True)
    assert completion(prepared, 0).startswith("<think>Own words.</think>")
    assert completion(prepared, 1).startswith("<think>The breast looks normal around")


def test_without_reasoning_the_instruction_asks_for_none():
    prepared = prepare(
        make_synthetic(1), None, ImagePromptSettings(reasoning=False, frame_kind="original_px"), completions=True
    )
    assert "<think>" not in prepared[0]["prompt"][0]["content"] + completion(prepared)
    assert prepared[0]["prompt"][0]["content"].endswith(ImagePromptSettings(reasoning=False).full_instruction)


def test_max_boxes_keeps_the_largest():
    dataset = one_box(60, 60, (0, 0, 2, 2))
    mask = np.asarray(dataset[0]["mask"]).copy()
    mask[30:40, 30:40] = 255
    dataset = dataset_of(dataset[0]["image"], mask)
    prepared = prepare(dataset, None, ImagePromptSettings(frame_kind="original_px"), completions=True, max_boxes=1)
    assert re.findall(r"\[.*?\]", completion(prepared)) == ["[30, 30, 40, 40]"]


@pytest.mark.parametrize("seg_token", ["<seg>", "<|mask|>", ""])
def test_other_segmentation_tokens(seg_token):
    prepared = prepare(
        make_synthetic(1), None, ImagePromptSettings(frame_kind="original_px", seg_token=seg_token), completions=True
    )
    assert completion(prepared).endswith(f"].{seg_token}</answer>")


def test_an_empty_mask_gives_a_valid_answer_without_boxes():
    dataset = one_box(16, 16, (0, 0, 0, 0))
    prepared = prepare(dataset, None, ImagePromptSettings(frame_kind="original_px"), completions=True)
    prediction = parse_completion(completion(prepared), frame_for(None, (16, 16), kind="original_px"))
    assert prediction.valid
    assert len(prediction.boxes) == 0


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"lesion": "cyst [left]"}, r"a\.png: lesion 'cyst \[left\]' holds .*bracket"),
        ({"reasoning": "I </think> so."}, r"a\.png: reasoning holds the tag '</think>'"),
        ({"reasoning": "Here: <seg>"}, r"a\.png, reasoning 'Here: <seg>' holds '<seg>', a token of the model"),
    ],
)
def test_texts_that_break_the_grammar(texts, message):
    with pytest.raises(DataError, match=message):
        prepare(
            one_box(9, 9, (1, 1, 4, 4), **texts), None, ImagePromptSettings(frame_kind="original_px"), completions=True
        )


def test_bad_masks_name_the_row():
    image, grey = PILImage.new("RGB", (8, 6)), np.arange(48, dtype=np.uint8).reshape(6, 8)
    with pytest.raises(DataError, match=r"a\.png: the mask is 4 x 4 px, the image 8 x 6; expected the same size"):
        prepare(
            dataset_of(image, np.zeros((4, 4), np.uint8)),
            None,
            ImagePromptSettings(frame_kind="original_px"),
            completions=True,
        )
    with pytest.raises(DataError, match=r"mask of a\.png: a mask may hold 0 and one positive value, got 48 values"):
        prepare(dataset_of(image, grey), None, ImagePromptSettings(frame_kind="original_px"), completions=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"processor=None with frame_kind=None: pass the model's processor, or one of the frames"),
        ({"frame_kind": "resized_px"}, r"processor=None with frame_kind='resized_px': pass the model's processor"),
        ({"frame_kind": "original_px", "max_edge": 0}, r"max_edge=0: expected a whole number, 1 or more or null"),
        ({"frame_kind": "original_px", "max_boxes": 0}, r"max_boxes=0: expected 1 or more, or None for no limit"),
    ],
)
def test_bad_settings(settings, message):
    limits = {name: value for name, value in settings.items() if name == "max_boxes"}
    asked = {name: value for name, value in settings.items() if name not in limits}
    with pytest.raises(DataError, match=message):
        prepare(make_synthetic(1, size=32), None, ImagePromptSettings(**asked), completions=True, **limits)


def test_unknown_frame():
    _, processor = tiny_qwen3_vl()
    with pytest.raises(UnknownNameError, match=r"'pixels'"):
        prepare(make_synthetic(1), processor, ImagePromptSettings(frame_kind="pixels"), completions=True)  # type: ignore[arg-type]


def test_missing_columns():
    with pytest.raises(DataError, match=r"dataset lacks the columns \['lesion'\]: expected .*'name'\], found"):
        prepare(
            make_synthetic(1).remove_columns("lesion"),
            None,
            ImagePromptSettings(frame_kind="original_px"),
            completions=True,
        )


@pytest.mark.skipif(not LESIONS2D.is_dir(), reason="the real data set is not on this machine")
def test_real_lesions_of_every_source():
    dataset = load_folder(LESIONS2D, validate=False)
    first = [dataset["source"].index(source) for source in sorted(set(dataset["source"]))]
    prepared = prepare(
        dataset.select(first), None, ImagePromptSettings(frame_kind="original_px", max_edge=128), completions=True
    )
    for index, row in enumerate(prepared):
        assert isinstance(row, dict)
        assert row["lesion"] in row["query"]
        prediction = parse_completion(
            completion(prepared, index), frame_for(None, row["mask"].size, kind="original_px")
        )
        assert prediction.valid
        np.testing.assert_array_equal(prediction.boxes, boxes_from_mask(np.asarray(row["mask"])))
