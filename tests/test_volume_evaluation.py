"""Scores of answers about volumes, against every pair of surface elements measured."""

import json
import math

import numpy as np
import pytest
import references
from hypothesis import given
from hypothesis import strategies as st

from segrl.errors import DataError
from segrl.metrics import bootstrap_ci
from segrl.prediction import Prediction, Status, VolumeTarget
from segrl.report import write_results
from segrl.testing.strategies import volume_targets
from segrl.volume_evaluation import summarise_volumes, volume_record


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
    }
    assert json.loads(json.dumps(record)) == record


def test_the_tolerance_is_in_millimetres():
    shifted = answer(block(1, 2, 3, columns=(3, 7)), 2)  # half a millimetre to the side
    assert volume_record(shifted, TARGET, nsd_tolerance_mm=0.5)["nsd"] == 1.0
    assert volume_record(shifted, TARGET, nsd_tolerance_mm=0.4)["nsd"] < 1.0
    up = answer(block(2, 3, 4), 2)
    assert volume_record(up, TARGET, nsd_tolerance_mm=5.0)["nsd"] == 1.0
    assert volume_record(up, TARGET)["nsd"] < 1.0  # 2 mm by default


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
    nothing = VolumeTarget.from_mask(np.zeros((3, 4, 5), dtype=bool))
    none = volume_record(answer(), nothing)  # no slice, no mask, nothing to find
    assert (none["dice"], none["iou"], none["hd95_mm"], none["nsd"], none["fail"]) == (1.0, 1.0, 0.0, 1.0, False)
    assert (none["slice_visibility"], none["slice_boxes"], none["slice_index"], none["boxes"]) == (1.0, 1.0, None, [])
    assert volume_record(answer(np.zeros((3, 4, 5), dtype=bool)), nothing) == none
    missed = volume_record(answer(), TARGET)
    assert (missed["dice"], missed["hd95_mm"], missed["nsd"], missed["fail"]) == (0.0, None, 0.0, True)
    invented = volume_record(answer(np.ones((3, 4, 5), dtype=bool), 1, [[0, 0, 5, 4]]), nothing)
    assert (invented["dice"], invented["hd95_mm"], invented["nsd"], invented["fail"]) == (0.0, None, 0.0, True)
    assert (invented["slice_visibility"], invented["slice_boxes"]) == (0.0, 0.0)


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
    other = VolumeTarget.from_mask(block(0, 1), lesion="tumour")
    records = [
        volume_record(answer(block(2, 3, 4), 3, [[2, 2, 6, 5]]), TARGET),
        volume_record(answer(), TARGET),
        volume_record(answer(block(0, 1), 0, [[2, 2, 6, 5]]), other),
    ]
    summary = summarise_volumes(records)
    assert summary["n"] == 3
    assert summary["n_scored"] == {"hd95_mm": 2}
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
    assert (written["hd95_mm"], written["ci95"]["hd95_mm"], written["n_scored"]) == (None, None, {"hd95_mm": 0})
