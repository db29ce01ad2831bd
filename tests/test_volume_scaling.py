"""A scan has the same grey values wherever it is read: training rows, predictions, evaluation, loaded runs."""

# D slices, H/W pixels of a slice

import json
from typing import Any

import numpy as np
import pytest
from builders import tiny_model, tiny_segmenter
from datasets import Dataset

from segrl.data import Volume, intensity_for, prepare_volumes, read_case, read_volume, write_mask, write_volume
from segrl.errors import DataError, SegRLError
from segrl.evaluation import evaluate_oracle_boxes, evaluate_volumes
from segrl.inference import VolumeSegmenter, load
from segrl.predictions import VolumePromptSettings
from segrl.predictions.modalities import modality_kind
from segrl.segmenters import VolumePropagator

SETTINGS = VolumePromptSettings(slices=2, size=32, max_new_tokens=2, frame_kind="original_px")
LIVER, TUMOUR = (slice(None), slice(10, 20), slice(2, 12)), (slice(None), slice(10, 20), slice(14, 24))
SPELLINGS = ["CT", "ct", "CT scan", "CT-scan", "abdominal CT", "Computed Tomography", "Computed tomography (CT)", "CTA"]


class Seen(VolumeSegmenter):
    """Keeps the pictures that the model was shown."""

    def _inputs(self, conversations: Any) -> Any:
        blocks = [block for conversation in conversations for block in conversation[0]["content"]]
        self.pictures = [np.array(block["image"]) for block in blocks if block["type"] == "image"]
        return super()._inputs(conversations)


@pytest.fixture(scope="module")
def row(tmp_path_factory) -> dict[str, Any]:
    """A CT in Hounsfield units: air, a liver of 100, a tumour of 50, and bone."""
    folder = tmp_path_factory.mktemp("ct")
    voxels = np.full((4, 32, 32), -1000, np.float32)
    voxels[LIVER], voxels[TUMOUR], voxels[:, 25:30] = 100, 50, 1500
    mask = np.zeros(voxels.shape, bool)
    mask[TUMOUR] = True
    scan = Volume(voxels, (5.0, 1.0, 1.0))
    write_volume(folder / "scan.nii.gz", scan)
    write_mask(folder / "label.nii.gz", mask, scan)
    files = {"scan": str(folder / "scan.nii.gz"), "label": str(folder / "label.nii.gz"), "label_value": 0}
    texts = {"query": "Where?", "modality": "CT", "anatomy": "Abdomen", "lesion": "tumour", "name": "ct_1"}
    return {**files, "intensity": "", **texts}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3_vl", min_pixels=32 * 32, max_pixels=32 * 32)


def contrast(grey: np.ndarray) -> float:
    """Grey levels between the liver and the tumour."""
    return float(grey[LIVER].mean()) - float(grey[TUMOUR].mean())


def trained(*rows) -> tuple[VolumePromptSettings, list[np.ndarray]]:
    """Settings of a run on some rows, and the pictures of the first."""
    data: Any = prepare_volumes(Dataset.from_list(list(rows)), None, SETTINGS, completions=False)
    return SETTINGS.for_rows(data), [np.array(image) for image in data[0]["images"]]


@pytest.mark.parametrize("intensity", ["", "window:0:200"])
@pytest.mark.parametrize("written", ["CT", "Computed Tomography"])
def test_liver_and_tumour_are_as_far_apart_in_inference_as_in_training(row, model, intensity, written, tmp_path):
    row = {**row, "modality": written, "intensity": intensity}
    settings, pictures = trained(row)
    expected = read_case(row).grey
    assert contrast(expected) == (32 if intensity == "" else 64)
    by_percentiles = read_case({**row, "modality": "", "intensity": ""}).grey
    assert contrast(by_percentiles) < 10  # what a scan of no known modality gets
    segmenter = Seen(model[0], model[1], settings)
    segmenter.save_pretrained(tmp_path / "run")
    loaded = load(tmp_path / "run", device="cpu")
    assert loaded.settings == settings
    for asked in (segmenter, Seen(loaded.model, loaded.processor, loaded.settings)):  # type: ignore[arg-type]
        for spelling in ("", *SPELLINGS):
            for scan in (row["scan"], read_volume(row["scan"]), read_case(row)):
                asked.predict(scan, "Where?", modality=spelling)
                assert all(map(np.array_equal, asked.pictures, pictures))
    case = segmenter.read_case(row["scan"], "CT scan", "")
    assert np.array_equal(case.grey, expected)
    assert case.intensity == (intensity or "window:-160:240")


@pytest.mark.parametrize("given", ["CT", "CT scan", ""])
def test_an_evaluated_row_without_intensity_is_scaled_as_the_training_rows(row, model, given):
    settings, pictures = trained({**row, "intensity": "window:0:200"})
    segmenter, seen = Seen(model[0], model[1], settings), []
    rows = Dataset.from_list([{**row, "modality": given}])
    evaluate_volumes(segmenter, rows, progress=False, on_answer=lambda *answer: seen.append(answer))
    assert all(map(np.array_equal, segmenter.pictures, pictures))
    propagator = VolumePropagator(tiny_segmenter(), reach=None)
    options: dict[str, Any] = {"progress": False, "on_answer": lambda *answer: seen.append(answer)}
    evaluate_oracle_boxes(propagator, rows, settings=settings, **options)
    for _, case, _, target in seen:
        assert (contrast(case.grey), case.intensity, target.modality) == (64, "window:0:200", given)
    own = Dataset.from_list([{**row, "intensity": "window:0:100"}])
    evaluate_volumes(segmenter, own, progress=False, on_answer=lambda *answer: seen.append(answer))
    assert seen[-1][1].intensity == "window:0:100"  # a row that says it has its own


def test_a_row_that_several_scalings_fit_is_named(row, model):
    settings, _ = trained({**row, "intensity": "window:0:200"}, {**row, "intensity": "window:0:80"})
    segmenter = VolumeSegmenter(model[0], model[1], settings)
    message = r"ct_1: modality 'CT scan': the run was trained with several scalings \(.*\); fill its column 'intensity'"
    with pytest.raises(DataError, match=message):
        evaluate_volumes(segmenter, Dataset.from_list([{**row, "modality": "CT scan"}]), progress=False)
    with pytest.raises(DataError, match=r"several scalings \(.*\); pass intensity="):
        segmenter.predict(row["scan"], "Where?", modality="CT scan")
    both, _ = trained(row, {**row, "intensity": "window:0:80"})
    assert both.scaling_of_row(row) == ("CT", "")  # rows like it were in training
    assert both.scaling_of_row({**row, "intensity": "window:0:80"}) == ("CT", "window:0:80")


def test_spellings_of_one_modality_are_one():
    for spelling in SPELLINGS:
        assert modality_kind(spelling) == "ct"
        assert str(intensity_for(spelling, [[[-1000, 60]]])) == "window:-160:240"
    for spelling in ("MR", "mri", "MRI scan", "Magnetic Resonance Imaging", "MR image"):
        assert modality_kind(spelling) == "mr"
    assert [modality_kind(text) for text in ("", "scan", "T1 MRI", "PET", "octa")] == [
        "",
        "scan",
        "t1 mri",
        "pet",
        "octa",
    ]
    same = VolumePromptSettings(scaling=(("CT", ""), ("CT scan", "")))
    assert same.scaling_for() == same.scaling_for("computed tomography") == ("CT scan", "")
    two = VolumePromptSettings(scaling=(("CT", "window:0:1"), ("CT scan", "window:0:2")))
    assert two.scaling_for("ct scan") == ("CT scan", "window:0:2")  # as it was written in training
    window = VolumePromptSettings(scaling=(("CT", "window:0:1"),))
    window.check_continues(VolumePromptSettings(scaling=(("CT scan", "window:0:1"),)), "run")
    with pytest.raises(SegRLError, match="run was trained with scaling="):
        window.check_continues(VolumePromptSettings(scaling=(("CT scan", ""),)), "run")
    assert json.loads(json.dumps(two.to_dict()))["scaling"] == [["CT", "window:0:1"], ["CT scan", "window:0:2"]]
