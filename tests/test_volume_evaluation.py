"""Scores of answers about volumes, against every pair of surface elements measured."""

import io
import json
import math
import re
from typing import Any

import numpy as np
import pytest
import references
from builders import tiny_model, tiny_segmenter
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from volume_builders import blocks, row_of

from segrl.data import read_grey
from segrl.errors import DataError
from segrl.evaluation import evaluate_oracle_boxes, evaluate_volumes, summarise_volumes, volume_record
from segrl.geometry import mask_to_rle
from segrl.geometry.run_lengths import counts_to_text
from segrl.inference import VolumeSegmenter
from segrl.metrics import bootstrap_ci
from segrl.predictions import Prediction, Status, VolumePromptSettings, VolumeTarget
from segrl.reports import VOLUME_COLUMNS, results_table, write_results
from segrl.segmenters import PropagationRequest, VolumePropagator
from segrl.testing.strategies import volume_targets


def answer(mask=None, index=None, boxes=(), status=Status.VALID, text="words") -> Prediction:
    boxes = np.array(boxes, dtype=float).reshape(-1, 4)
    return Prediction(
        text=text,
        reasoning="r",
        answer="a",
        boxes=boxes,
        status=status,
        has_seg=False,
        mask=mask,
        slice_index=index,
    )


def block(*slices: int, shape=(6, 8, 10), columns=(2, 6)) -> np.ndarray:
    """Rows 2 to 4 of some slices, of the given columns."""
    mask = np.zeros(shape, dtype=bool)
    mask[list(slices), 2:5, columns[0] : columns[1]] = True
    return mask


TARGET = VolumeTarget.from_mask(
    block(1, 2, 3), (5.0, 1.0, 0.5), query="the cyst?", lesion="cyst", modality="CT", anatomy="Abdomen", name="scan_3"
)


def test_a_known_record():
    record = volume_record(answer(block(2, 3, 4), 2, [[2, 2, 6, 5]], text="said"), TARGET)
    assert record == {
        "query": "the cyst?",
        "modality": "CT",
        "anatomy": "Abdomen",
        "lesion": "cyst",
        "name": "scan_3",
        "dice": pytest.approx(2 / 3),
        "iou": pytest.approx(1 / 2),
        "fail": False,
        "hd95_mm": 5.0,  # one slice of 5 mm too far up
        "nsd": pytest.approx(22 / 34),  # the 12 surface voxels of a slice, of 34, lie 5 mm away
        "slice_visibility": 1.0,
        "slice_boxes": 1.0,
        "slice_index": 2,
        "boxes": [[2.0, 2.0, 6.0, 5.0]],
        "status": "valid",
        "text": "said",
        "spacing_mm": [5.0, 1.0, 0.5],
        "predicted_mask": mask_to_rle(block(2, 3, 4), compressed=True),
        "target_mask": mask_to_rle(block(1, 2, 3), compressed=True),
    }
    assert json.loads(json.dumps(record)) == record


def test_the_tolerance_is_in_millimetres():
    shifted = answer(block(1, 2, 3, columns=(3, 7)), 2)  # half a millimetre to the side
    assert volume_record(shifted, TARGET, nsd_tolerance_mm=0.5)["nsd"] == 1.0
    assert volume_record(shifted, TARGET, nsd_tolerance_mm=0.4)["nsd"] < 1.0
    up = answer(block(2, 3, 4), 2)
    assert volume_record(up, TARGET, nsd_tolerance_mm=5.0)["nsd"] == 1.0
    assert volume_record(up, TARGET)["nsd"] < 1.0  # 2 mm by default


@pytest.mark.slow
@given(
    volume_targets(max_depth=3, max_size=5).flatmap(
        lambda target: st.tuples(st.just(target), st.lists(st.booleans(), min_size=75, max_size=75))
    )
)
def test_masks_equal_a_slow_recomputation(case):
    target, bits = case
    mask = np.resize(np.array(bits), target.mask.shape)
    record = volume_record(answer(mask), target)
    assert record["dice"] == pytest.approx(references.dice(mask, target.mask))
    assert record["iou"] == pytest.approx(references.iou(mask, target.mask))
    if target.spacing_mm is None:
        assert (record["hd95_mm"], record["nsd"]) == (None, None)
        return
    there = references.directed_distances(mask, target.mask, target.spacing_mm)
    back = references.directed_distances(target.mask, mask, target.spacing_mm)
    if not there and not back:
        assert (record["hd95_mm"], record["nsd"], record["fail"]) == (0.0, 1.0, False)
    elif not there or not back:
        assert (record["hd95_mm"], record["nsd"], record["fail"]) == (None, 0.0, True)
    else:
        assert record["hd95_mm"] == pytest.approx(max(references.percentile(each, 95) for each in (there, back)))
        near = sum(distance <= 2.0 for distance in there + back)
        assert record["nsd"] == pytest.approx(near / len(there + back))
        assert record["fail"] == (record["dice"] == 0)


def test_empty_masks():
    nothing = VolumeTarget.from_mask(np.zeros((3, 4, 5), dtype=bool), (1.0, 1.0, 1.0))
    none = volume_record(answer(), nothing)  # no slice, no mask, nothing to find
    assert (none["dice"], none["iou"], none["hd95_mm"], none["nsd"], none["fail"]) == (1.0, 1.0, 0.0, 1.0, False)
    assert (none["slice_visibility"], none["slice_boxes"], none["slice_index"], none["boxes"]) == (1.0, 1.0, None, [])
    empty = {"size": [3, 4, 5], "counts": counts_to_text(np.array([60]))}
    assert none["predicted_mask"] is None
    assert volume_record(answer(np.zeros((3, 4, 5), dtype=bool)), nothing) == {**none, "predicted_mask": empty}
    missed = volume_record(answer(), TARGET)
    assert (missed["dice"], missed["hd95_mm"], missed["nsd"], missed["fail"]) == (0.0, None, 0.0, True)
    invented = volume_record(answer(np.ones((3, 4, 5), dtype=bool), 1, [[0, 0, 5, 4]]), nothing)
    assert (invented["dice"], invented["hd95_mm"], invented["nsd"], invented["fail"]) == (0.0, None, 0.0, True)
    assert (invented["slice_visibility"], invented["slice_boxes"]) == (0.0, 0.0)


def test_without_a_spacing_nothing_has_millimetres():
    """Three slices too far up are 15 mm if they are 5 mm apart, and nobody knows how much if not."""
    up, wrong = answer(block(4, 5), 4, [[2, 2, 6, 5]]), VolumeTarget.from_mask(block(1, 2), (5.0, 1.0, 0.5))
    assert volume_record(up, wrong)["hd95_mm"] == 15.0
    unknown = VolumeTarget.from_mask(block(1, 2), lesion="cyst")
    record = volume_record(up, unknown)
    assert (record["dice"], record["hd95_mm"], record["nsd"]) == (0.0, None, None)
    assert volume_record(answer(block(1, 2), 1), unknown)["hd95_mm"] is None  # not even 0 of an unknown unit
    summary = summarise_volumes([record, volume_record(up, wrong)])
    assert (summary["hd95_mm"], summary["n_scored"]) == (15.0, {"hd95_mm": 1, "nsd": 1})
    alone = summarise_volumes([record])
    assert (alone["hd95_mm"], alone["nsd"], alone["n_scored"]) == (None, None, {"hd95_mm": 0, "nsd": 0})
    shown = io.StringIO()
    results_table({"stage1": alone}, Console(file=shown, width=200), columns=VOLUME_COLUMNS, groupings=())
    assert re.search(r"│ +- │ +- │", shown.getvalue())


def test_an_invalid_text_fails_whatever_the_mask():
    record = volume_record(answer(TARGET.mask, 2, [[2, 2, 6, 5]], Status.NO_REASONING), TARGET)
    assert (record["dice"], record["fail"], record["status"]) == (1.0, True, "no_reasoning")
    assert (record["slice_visibility"], record["slice_boxes"]) == (0.0, 0.0)


@pytest.mark.parametrize("index", [-1, 6, None])
def test_a_slice_that_is_not_there_pays_nothing(index):
    record = volume_record(answer(TARGET.mask, index, [[2, 2, 6, 5]]), TARGET)
    assert (record["slice_visibility"], record["slice_boxes"], record["slice_index"]) == (0.0, 0.0, index)


def test_errors_name_the_volume():
    with pytest.raises(
        DataError, match=r"scan_3: the predicted mask has shape \(2, 8, 10\), the true one \(6, 8, 10\)"
    ):
        volume_record(answer(np.ones((2, 8, 10), dtype=bool)), TARGET)
    with pytest.raises(DataError, match="tolerance=-1"):
        volume_record(answer(), TARGET, nsd_tolerance_mm=-1)
    with pytest.raises(DataError, match="records: expected at least one"):
        summarise_volumes([])


def test_the_summary_says_over_how_many_volumes_a_distance_is(tmp_path):
    other = VolumeTarget.from_mask(block(0, 1), (1.0, 1.0, 1.0), lesion="tumour")
    records = [
        volume_record(answer(block(2, 3, 4), 3, [[2, 2, 6, 5]]), TARGET),
        volume_record(answer(), TARGET),
        volume_record(answer(block(0, 1), 0, [[2, 2, 6, 5]]), other),
    ]
    summary = summarise_volumes(records)
    assert summary["n"] == 3
    assert summary["n_scored"] == {"hd95_mm": 2, "nsd": 3}
    assert summary["hd95_mm"] == 2.5
    assert summary["ci95"]["hd95_mm"] == list(bootstrap_ci([5.0, 0.0]))
    for name, key in {
        "mdice": "dice",
        "miou": "iou",
        "fail": "fail",
        "nsd": "nsd",
        "slice_boxes": "slice_boxes",
    }.items():
        assert summary[name] == pytest.approx(math.fsum(record[key] for record in records) / 3)
    assert list(summary["groups"]) == ["lesion"]
    groups = summary["groups"]["lesion"]
    assert (list(groups), groups["cyst"]["n"], groups["tumour"]["mdice"]) == (["cyst", "tumour"], 2, 1.0)
    assert list(summarise_volumes(records, groupings=["modality"])["groups"]) == ["modality"]
    write_results(tmp_path / "results.json", {"stage2": summarise_volumes(records[1:2])})
    written = json.loads((tmp_path / "results.json").read_text())["stage2"]
    assert (written["hd95_mm"], written["ci95"]["hd95_mm"], written["n_scored"]) == (
        None,
        None,
        {"hd95_mm": 0, "nsd": 1},
    )


# ---- whole data sets -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Any:
    """Volumes of different depth and shape, the last without the structure that is asked for."""
    folder = tmp_path_factory.mktemp("volumes")
    masks = [blocks([0, 3, 9, 7, 0]), blocks([0, 0, 4], 32, 20), blocks([5]), blocks([9, 9])]
    made = [row_of(folder, mask, f"volume {n}", query=f"Where, {n}?") for n, mask in enumerate(masks)]
    made[1]["intensity"] = "window:0:100"
    return Dataset.from_list([*made[:3], {**made[3], "label_value": "5"}])


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3_vl", min_pixels=32 * 32, max_pixels=32 * 32)


def keep(answers):
    return lambda *given: answers.append(given)


SETTINGS = VolumePromptSettings(slices=4, size=32, max_new_tokens=8)


class TestEvaluate:
    @pytest.mark.slow
    @pytest.mark.parametrize("batch_size", [1, 3, 9])
    def test_one_record_per_row_in_order(self, batch_size, rows, model):
        segmenter, answers = VolumeSegmenter(model[0], model[1], SETTINGS, tiny_segmenter()), []
        records = evaluate_volumes(
            segmenter, rows, batch_size=batch_size, progress=False, on_answer=keep(answers), nsd_tolerance_mm=1.0
        )
        assert [record["name"] for record in records] == list(rows["name"])
        assert [number for number, *_ in answers] == [0, 1, 2, 3]
        for row, record, (_, case, prediction, target) in zip(rows, records, answers, strict=True):
            grey = case.grey
            assert np.array_equal(grey, read_grey(row["scan"], modality="MRI", intensity=row["intensity"])[1])
            assert target.query == record["query"] == row["query"]
            assert target.spacing_mm == (3.0, 1.0, 1.0)
            assert prediction.text == segmenter.predict(grey, row["query"]).text
            assert record == volume_record(prediction, target, nsd_tolerance_mm=1.0)
        assert [target.empty for *_, target in answers] == [False, False, False, True]
        assert records[3]["dice"] == 1.0  # nothing found where there is nothing

    def test_without_segmenter_masks_count_as_empty(self, rows, model):
        records = evaluate_volumes(VolumeSegmenter(model[0], model[1], SETTINGS), rows.select([0]), progress=False)
        assert (records[0]["dice"], records[0]["fail"]) == (0.0, True)

    def test_progress(self, rows, model, capsys):
        segmenter = VolumeSegmenter(model[0], model[1], SETTINGS)
        evaluate_volumes(segmenter, rows.select([2]), progress=False)
        assert capsys.readouterr().out == ""
        evaluate_volumes(segmenter, rows.select([2]))
        assert "evaluate" in capsys.readouterr().out

    def test_errors(self, rows, model):
        segmenter = VolumeSegmenter(model[0], model[1], SETTINGS)
        with pytest.raises(DataError, match="batch_size=0: expected 1 or more rows per generation"):
            evaluate_volumes(segmenter, rows, batch_size=0)
        with pytest.raises(DataError, match="batch_size=-1: expected 1 or more rows per generation"):
            evaluate_oracle_boxes(VolumePropagator(tiny_segmenter()), rows, batch_size=-1)
        unlabelled = Dataset.from_list([{**rows[0], "label": ""}])
        message = "volume 0: no label; expected a path in the column 'label'"
        with pytest.raises(DataError, match=message):
            evaluate_volumes(segmenter, unlabelled, progress=False)
        with pytest.raises(DataError, match=message):
            evaluate_oracle_boxes(VolumePropagator(tiny_segmenter()), unlabelled, progress=False)


class TestOracle:
    @pytest.mark.slow
    @pytest.mark.parametrize("size", [1, 3])
    def test_the_true_boxes_of_the_largest_slice_propagate(self, rows, size):
        propagator, answers = VolumePropagator(tiny_segmenter(), reach=None), []
        records = evaluate_oracle_boxes(propagator, rows, batch_size=size, progress=False, on_answer=keep(answers))
        assert [number for number, *_ in answers] == [0, 1, 2, 3]
        assert [record["slice_index"] for record in records] == [2, 2, 0, None]
        boxes = [[[5, 2, 13, 3], [7, 10, 8, 11]], [[5, 2, 8, 3], [7, 10, 8, 11]], [[5, 2, 9, 3], [7, 10, 8, 11]], []]
        assert [record["boxes"] for record in records] == boxes
        for record, (_, case, prediction, target) in zip(records, answers, strict=True):
            assert (record["status"], record["slice_visibility"], record["slice_boxes"]) == ("valid", 1.0, 1.0)
            assert record == volume_record(prediction, target)
            expected = np.zeros_like(target.mask)
            if record["boxes"]:
                request = PropagationRequest(case.grey, "", record["slice_index"], np.array(record["boxes"]))
                expected = propagator([request])[0]
            assert np.array_equal(prediction.mask, expected)
            assert record["dice"] == pytest.approx(references.dice(expected, target.mask))
        assert (records[3]["dice"], records[3]["fail"]) == (1.0, False)

    def test_no_model_could_pay_more_for_slice_and_boxes(self, rows):
        summary = summarise_volumes(evaluate_oracle_boxes(VolumePropagator(tiny_segmenter()), rows, progress=False))
        assert (summary["slice_visibility"], summary["slice_boxes"], summary["n"]) == (1.0, 1.0, 4)

    def test_progress(self, rows, capsys):
        evaluate_oracle_boxes(VolumePropagator(tiny_segmenter()), rows.select([3]))
        assert "oracle" in capsys.readouterr().out
