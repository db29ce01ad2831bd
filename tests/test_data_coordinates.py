"""Coordinates in given reasoning: found, refused, stripped; through every door, for images and volumes."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from volume_builders import blocks, row_of

from segrl.data import (
    build_reasoning,
    find_coordinates,
    load_folder,
    make_synthetic,
    prepare,
    prepare_volumes,
    strip_coordinates,
    write_folder,
)
from segrl.errors import DataError, UnknownNameError
from segrl.predictions import ImagePromptSettings, VolumePromptSettings

SHARED = Path(__file__).parents[2] / "shared" / "data"
GIVEN = "Dark, at [12, 34, 56, 78], with a thin wall."
LEFT = "Dark, with a thin wall."
IMAGES = ImagePromptSettings(frame_kind="original_px")
VOLUMES = VolumePromptSettings(slices=4, size=32, frame_kind="original_px")


@pytest.mark.parametrize(
    ("text", "found", "left"),
    [
        (GIVEN, ["[12, 34, 56, 78]"], LEFT),
        ("Two cysts, located at (12, 34), (56, 78), are dark.", ["(12, 34)", "(56, 78)"], "Two cysts, are dark."),
        ("Boxes [[1,2,3,4],[5,6,7,8]] are dark.", ["[1,2,3,4]", "[5,6,7,8]"], "Boxes are dark."),
        (
            "<|box_start|>(1,2),(30,40)<|box_end|> is dark.",
            ["<|box_start|>", "(1,2)", "(30,40)", "<|box_end|>"],
            "is dark.",
        ),
        ("Seen at 12.5, 34, 56.0, 78 only.", ["12.5, 34, 56.0, 78"], "Seen only."),
        ("It has x1=12 and y_max: 40.", ["x1=12", "y_max: 40"], "It has and."),
        ("A spot near pixel 120, 84 is dark.", ["pixel 120, 84"], "A spot is dark."),
        ("Its coordinates 12 and 40 are low.", ["coordinates 12 and 40"], "Its are low."),
        ("A <loc0123> spot.", ["<loc0123>"], "A spot."),
    ],
)
def test_what_is_a_coordinate(text, found, left):
    assert find_coordinates(text) == found
    assert strip_coordinates(text) == left
    assert not find_coordinates(left, volume=True)


@pytest.mark.parametrize(
    "text",
    [
        "A 3 x 4 cm mass, 12 mm thick, in segments 4, 5 and 7.",
        "T2 bright [1], BI-RADS 4, L4, L5; 12 % of 30 patients (2021), 1.5, 2.5 and 3.5 cm.",
        "Three lesions: one small, two large (the second is dark). Aged 40, 50, 60.",
        "The axis x is long; grade 2 (of 3).",
    ],
)
def test_what_is_none(text):
    assert find_coordinates(text, volume=True) == []
    assert strip_coordinates(text, volume=True) == text


def test_the_number_of_a_slice_is_a_coordinate_of_volumes_only():
    text = "Best seen on slice 12, less on slices 3 to 5 and <slice 9>."
    assert find_coordinates(text) == []
    assert find_coordinates(text, volume=True) == ["slice 12", "slices 3 to 5", "<slice 9>"]
    assert strip_coordinates(text, volume=True) == "Best seen, less and."


@given(st.text(alphabet="[](){}<>|,;:= 0123456789.xylocboxslice\n", max_size=80))
def test_nothing_is_left_to_find(text):
    assert not find_coordinates(strip_coordinates(text, volume=True), volume=True)


def images(tmp_path: Path, reasoning: list[str]) -> Any:
    """Rows of a folder, its manifest with a column `reasoning`."""
    rows = make_synthetic(len(reasoning), size=32)
    folder = write_folder(rows, tmp_path / "images", split=["train"] * len(reasoning))
    with (folder / "manifest.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(name for name in listed[0] if name != "reasoning"), "reasoning"])
        writer.writeheader()
        writer.writerows({**row, "reasoning": text} for row, text in zip(listed, reasoning, strict=True))
    return load_folder(folder, "train")


def volumes(tmp_path: Path, reasoning: list[str]) -> Any:
    mask = blocks([0, 3, 9, 20, 9, 0])
    return Dataset.from_list(
        [{**row_of(tmp_path, mask, name=f"v{n}"), "reasoning": r} for n, r in enumerate(reasoning)]
    )


DOORS = [
    pytest.param(images, prepare, IMAGES, id="images"),
    pytest.param(volumes, prepare_volumes, VOLUMES, id="volumes"),
]


def thought(row: Any) -> str:
    return row["completion"][0]["content"].split("</think>")[0].removeprefix("<think>")


@pytest.mark.parametrize(("rows_of", "prepared", "settings"), DOORS)
def test_given_reasoning_with_coordinates(tmp_path, rows_of, prepared, settings):
    rows = rows_of(tmp_path, ["A plain text.", GIVEN, "", "Near [1, 2]. Dark."])
    said = "column 'reasoning' of 2 of 4 rows holds coordinates .*: '\\[12, 34, 56, 78\\]'; .*: '\\[1, 2\\]'.*--coordin"
    with pytest.raises(DataError, match=said):
        prepared(rows, None, settings, completions=True)
    texts = [thought(row) for row in prepared(rows, None, settings, completions=True, coordinates="strip")]
    assert (texts[0], texts[1]) == ("A plain text.", LEFT)
    assert texts[2]
    assert not find_coordinates(texts[2], volume=True)  # from a template
    assert [thought(row) for row in prepared(rows, None, settings, completions=True, coordinates="keep")][1] == GIVEN
    with pytest.raises(UnknownNameError, match="coordinates 'remove'"):
        prepared(rows, None, settings, completions=True, coordinates="remove")
    prepared(rows, None, settings, completions=False)  # reasoning is not read


@pytest.mark.parametrize(("rows_of", "prepared", "settings"), DOORS)
def test_reasoning_of_nothing_but_coordinates_is_not_left_blank(tmp_path, rows_of, prepared, settings):
    rows = rows_of(tmp_path, ["[1, 2, 3, 4], [5, 6, 7, 8]."])
    with pytest.raises(DataError, match="is nothing but coordinates; expected words"):
        prepared(rows, None, settings, completions=True, coordinates="strip")


def test_templates_hold_none():
    for row in make_synthetic(40, size=64):
        texts = {name: row[name] for name in ("lesion", "anatomy", "modality", "query")}  # type: ignore[index]
        for brief in (True, False):
            text = build_reasoning(mask=np.asarray(row["mask"]) > 0, key=row["name"], brief=brief, **texts)  # type: ignore[index]
            assert not find_coordinates(text, volume=True)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data set is not on this machine")
def test_no_false_alarm_in_the_texts_of_real_data():
    texts = []
    for manifest in SHARED.rglob("*.csv"):
        with manifest.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                texts += [text for key, text in row.items() if key in ("query", "lesion", "reasoning") and text]
    assert texts
    assert not [text for text in texts if find_coordinates(text, volume=True)]
