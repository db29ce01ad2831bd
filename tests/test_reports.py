"""Tables, result files and contact sheets."""

import io
import json
import re
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

import segrl
from segrl import metrics
from segrl.errors import DataError, SegRLError
from segrl.predictions import Prediction, Status, Target
from segrl.reports import contact_sheet, drawing, results_table, versions, write_results
from segrl.reports.contact_sheets import LINE, MARGIN
from segrl.reports.table import VOLUME_COLUMNS, VOLUME_STAGES
from segrl.scripts.results import ImageResults

SUMMARY = {"mdice": 0.3706, "miou": 0.2779, "fail": 0.1842, "n": 2421}
CI95 = {"mdice": [0.35, 0.391], "miou": [0.26, 0.3], "fail": [0.17, 0.2]}


def printed(results, width=100) -> list[str]:
    stream = io.StringIO()
    results_table(results, Console(file=stream, width=width))
    return stream.getvalue().splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│┃ ").split("│")]


def test_table_shows_percentages_with_intervals():
    (row,) = [line for line in printed({"stage1": {**SUMMARY, "ci95": CI95}}) if "stage1" in line]
    assert cells(row) == ["stage1", "37.06 [35.0, 39.1]", "27.79 [26.0, 30.0]", "18.42 [17.0, 20.0]", "2421"]


def test_one_sample_has_no_interval():
    (row,) = [line for line in printed({"stage1": {**SUMMARY, "n": 1, "ci95": CI95}}) if "stage1" in line]
    assert cells(row) == ["stage1", "37.06", "27.79", "18.42", "1"]


def test_a_difference_that_one_row_has_is_no_interval(tmp_path, capsys):
    gains = {"dice": [0.02, 0.01, 0.03], "box_f1": [0.02, 0.02, 0.02]}
    ImageResults(tmp_path).write({"stage1": SUMMARY, "gain": gains}, {}, "stage1")
    shown = capsys.readouterr().out
    assert "stage 2 - stage 1, dice: +2.0 points, 95 % interval [+1.0, +3.0]" in shown
    assert "stage 2 - stage 1, box_f1: +2.0 points, in every row, so no interval" in shown


def test_table_puts_stages_in_order_then_groups_by_modality_and_anatomy():
    group = {"modality": {"MRI": SUMMARY, "CT": SUMMARY}, "anatomy": {"Head": SUMMARY}}
    lines = printed({"stage2": {**SUMMARY, "groups": group}, "baseline": SUMMARY, "config": {"seed": 0}})
    names = [cells(line)[0] for line in lines if line.startswith("│")]
    assert names == [
        "baseline",
        "stage2",
        "modality: CT",
        "stage2",
        "modality: MRI",
        "stage2",
        "anatomy: Head",
        "stage2",
    ]


def test_table_of_a_real_summary():
    records = [
        {"dice": 0.5, "iou": 1 / 3, "fail": False, "modality": "CT"},
        {"dice": 0.0, "iou": 0.0, "fail": True, "modality": "CT"},
    ]
    rows = [cells(line) for line in printed({"baseline": metrics.summarise(records)}) if "baseline" in line]
    assert rows[0][0] == "baseline"
    assert rows[0][1] == "25.00 [0.0, 50.0]"
    assert rows[0] == rows[1] == rows[2]  # all samples, the only modality, the only anatomy


def test_table_escapes_names_from_the_data():
    name = "[red]C\x1b[31mT"
    text = "\n".join(printed({"stage1": {**SUMMARY, "groups": {"modality": {name: SUMMARY}}}}))
    assert "[red]C\\x1b[31mT" in text
    stream = io.StringIO()
    results_table({name: SUMMARY}, Console(file=stream, width=100), stages=[name])
    text += stream.getvalue()
    assert text.count("[red]C\\x1b[31mT") == 2
    assert "\x1b" not in text


def test_table_without_a_terminal_is_wide_enough_for_its_cells(capsys):
    results_table({"stage1": {**SUMMARY, "ci95": CI95}})
    assert "37.06 [35.0, 39.1]" in capsys.readouterr().out


def test_table_refuses_no_stage_and_values_that_are_no_fractions():
    with pytest.raises(
        DataError, match=r"at least one of baseline, oracle, stage1, stage2, control, model, got the keys \['config'\]"
    ):
        printed({"config": {}})
    with pytest.raises(DataError, match=r"stage1: mdice is 37.06; expected a fraction"):
        printed({"stage1": {**SUMMARY, "mdice": 37.06}})
    with pytest.raises(DataError, match="stage2: miou is None"):
        printed({"stage2": {"mdice": 0.1, "n": 1, "fail": 0.0}})
    with pytest.raises(DataError, match="stage1, modality 'CT': fail is nan"):
        printed({"stage1": {**SUMMARY, "groups": {"modality": {"CT": {**SUMMARY, "fail": float("nan")}}}}})


VOLUMES = {
    **{"mdice": 0.8543, "miou": 0.75, "fail": 0.05, "nsd": 0.9, "slice_visibility": 0.875, "slice_boxes": 0.5, "n": 20},
    **{"hd95_mm": 12.346, "n_scored": {"hd95_mm": 19}},
    "ci95": {"mdice": [0.8, 0.9], "hd95_mm": [7.04, 21.5]},
}
FOR_VOLUMES = {"columns": VOLUME_COLUMNS, "stages": VOLUME_STAGES, "groupings": ("lesion",)}


def test_table_of_volumes_has_millimetres_and_says_over_how_many(capsys):
    results_table(
        {
            "stage2": {**VOLUMES, "groups": {"lesion": {"liver": VOLUMES}, "modality": {"CT": VOLUMES}}},
            "oracle": VOLUMES,
        },
        **FOR_VOLUMES,
    )
    lines = capsys.readouterr().out.splitlines()
    (header,) = [line for line in lines if "HD95" in line]
    assert [cell.strip() for cell in header.split("┃")[2:-1]] == [
        "Dice %", "IoU %", "HD95 mm", "NSD %", "visibility %", "boxes %", "Failure Rate %", "n",
    ]  # fmt: skip
    rows = [cells(line) for line in lines if line.startswith("│")]
    assert [row[0] for row in rows] == ["oracle", "stage2", "lesion: liver", "stage2"]
    scores = ["85.43 [80.0, 90.0]", "75.00", "12.35 [7.0, 21.5] (n 19)", "90.00", "87.50", "50.00", "5.00", "20"]
    assert rows[0][1:] == rows[1][1:] == rows[3][1:] == scores


def test_table_of_volumes_shows_a_dash_for_what_applies_to_none():
    nowhere = {**VOLUMES, "hd95_mm": None, "n_scored": {"hd95_mm": 0}, "ci95": {"hd95_mm": None}}
    stream = io.StringIO()
    results_table({"model": nowhere}, Console(file=stream, width=200), **FOR_VOLUMES)
    (row,) = [line for line in stream.getvalue().splitlines() if "model" in line]
    assert cells(row)[3] == "-"


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan"), None, "3.5"])
def test_table_refuses_distances_that_are_none(value):
    with pytest.raises(DataError, match=f"stage1: hd95_mm is {value}; expected a finite number of at least 0"):
        results_table({"stage1": {**VOLUMES, "hd95_mm": value}}, Console(file=io.StringIO()), **FOR_VOLUMES)
    with pytest.raises(
        DataError, match="expected at least one of oracle, stage1, stage2, control, model, got the keys"
    ):
        results_table({"baseline": SUMMARY}, **FOR_VOLUMES)


def test_versions_names_what_a_result_depends_on():
    import torch

    found = versions()
    assert list(found) == [
        "python", "segrl", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "sam2",
    ]  # fmt: skip
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["segrl"] == segrl.__version__
    assert str(torch.__version__).startswith(found["torch"] or "missing")
    assert all(re.match(r"\d+\.\d+", version or "") for version in found.values())


def test_results_file_is_sorted_json_of_plain_values(tmp_path):
    results = {"b": np.float32(0.5), "a": {"z": (1, None), "y": np.arange(2), "x": True}, "path": tmp_path / "model"}
    path = write_results(tmp_path / "deep" / "results.json", results)
    text = path.read_text()
    assert json.loads(text) == {
        "a": {"x": True, "y": [0, 1], "z": [1, None]}, "b": 0.5, "path": str(tmp_path / "model"),
    }  # fmt: skip
    assert text.index('"x"') < text.index('"y"') < text.index('"z"') < text.index('"b"')
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
def test_results_file_round_trips(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("results") / "results.json"
    assert json.loads(write_results(path, {"value": value}).read_text(encoding="utf-8")) == {"value": value}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"results\['stage1'\]\['values'\]\[1\] is nan; expected a finite number"),
        (np.float64("inf"), r"results\['stage1'\]\['values'\]\[1\] is inf"),
        ({1, 2}, r"results\['stage1'\]\['values'\]\[1\] is a set"),
    ],
)
def test_results_file_is_kept_when_the_new_one_cannot_be_written(tmp_path, value, message):
    path = write_results(tmp_path / "results.json", {"old": 1})
    with pytest.raises(DataError, match=message):
        write_results(path, {"stage1": {"values": [0.0, value]}})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def make_row(*, box=None, mask=None, text="", query="", image_size=(96, 96)) -> dict:
    """A grey image of a 48 x 48 truth whose lesion is the square 12..36; drawn at 2 or more pixels to one."""
    truth = np.zeros((48, 48), dtype=bool)
    truth[12:36, 12:36] = True
    boxes = np.zeros((0, 4)) if box is None else np.array([box], dtype=float)
    prediction = Prediction(
        text=text, reasoning=None, answer=None, boxes=boxes, status=Status.NO_ANSWER, has_seg=False, mask=mask
    )
    image = Image.new("RGB", image_size, (128, 128, 128))
    return {"image": image, "prediction": prediction, "target": Target.from_mask(truth, query=query), "dice": 0.5}


def draw_first_cell(row, tmp_path, cell=192) -> np.ndarray:
    """The drawn image of a one-cell sheet, (cell, cell, 3)."""
    sheet = np.array(Image.open(contact_sheet([row], tmp_path / "sheet.png", cell=cell)))
    top, left = LINE + 2 * MARGIN, MARGIN
    return sheet[top : top + cell, left : left + cell]


def test_sheet_outlines_the_truth_and_leaves_its_inside(tmp_path):
    drawn = draw_first_cell(make_row(), tmp_path)
    green = (drawn == drawing.TARGET).all(axis=2)
    expected = np.zeros((192, 192), dtype=bool)
    expected[48:144, 48:144] = True
    expected[49:143, 49:143] = False
    assert np.array_equal(green, expected)
    assert (drawn[~expected] == 128).all()


def test_sheet_tints_the_predicted_mask_and_frames_the_boxes(tmp_path):
    mask = np.zeros((48, 48), dtype=bool)
    mask[:6, :6] = True
    # An image of another size than the mask (scaled down for the model): masks and boxes are in the mask's pixels.
    drawn = draw_first_cell(make_row(mask=mask, box=(40, 2, 46, 5), image_size=(30, 30)), tmp_path)
    tinted = (drawn[:24, :24].astype(int) - (168, 92, 92)).ravel()
    assert np.abs(tinted).max() <= 1  # 0.6 * 128 + 0.4 * (230, 40, 40)
    rows, columns = np.nonzero((drawn == drawing.BOX).all(axis=2))
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (160, 8, 184, 20)
    assert (drawn[12, 165] == 128).all()


def test_sheet_keeps_the_aspect_and_fills_the_grid(tmp_path):
    row = make_row()
    wide = Target.from_mask(np.ones((20, 40), dtype=bool))
    path = contact_sheet([{**row, "target": wide}] * 3, tmp_path / "new" / "sheet.png", columns=2, cell=100)
    sheet = np.array(Image.open(path))
    assert sheet.shape[1] == 3 * MARGIN + 200
    green = (sheet == drawing.TARGET).all(axis=2)
    top = LINE + 2 * MARGIN
    rows, columns = np.nonzero(green[top : top + 100, MARGIN : MARGIN + 100])
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (0, 99, 25, 74)


def test_sheet_draws_degenerate_boxes_and_hostile_text(tmp_path):
    row = make_row(box=(10, 10, 10, 10), text="\x1b[31m</think>\x00\ud800é漢\n" * 40_000, query="%s {0} \\ \u202e")
    drawn = draw_first_cell(row, tmp_path)
    assert (drawn == drawing.BOX).all(axis=2).any()  # a box without area is still a dot


def test_sheet_refuses_what_it_cannot_draw(tmp_path):
    path = tmp_path / "sheet.png"
    row = make_row()
    with pytest.raises(DataError, match="got 0 rows"):
        contact_sheet([], path)
    with pytest.raises(DataError, match="cell=8"):
        contact_sheet([row], path, cell=8)
    with pytest.raises(DataError, match=r"rows\[1\]: missing \['dice'\]"):
        contact_sheet([row, {key: row[key] for key in row if key != "dice"}], path)
    with pytest.raises(SegRLError, match=r"rows\[0\]: the predicted mask has shape \(4, 4\), the true one \(48, 48\)"):
        contact_sheet([make_row(mask=np.ones((4, 4), dtype=bool))], path)
    assert not path.exists()
