"""ISPY1: NIfTI masks found on the grid of NIfTI scans or of DICOM series, in a small copy of the documented layout."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_builders import write_series

from segrl.cli.main import main
from segrl.data import load_volumes, read_case, read_volume
from segrl.data.dicom import open_dicom_volumes
from segrl.data.formats import read_ispy1
from segrl.errors import DataError

NORMALISED, ACQUIRED = "images_bias-corrected_resampled_zscored_nifti", "images_bias-corrected_nifti"
SHAPE = (6, 10, 12)  # (Z, Y, X) of a series
SPACING = (3.0, 1.0, 2.0)
CASES = ("ISPY1_1001", "ISPY1_1002", "ISPY1_1007")


def truth(case: str, shape: tuple[int, ...]) -> np.ndarray:
    found = np.zeros(shape, dtype=bool)
    at = CASES.index(case) + 1
    found[at : at + 3, at : at + 4, at : at + 5] = True
    return found


def scan(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def save(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def ispy1(home: Path, cases=CASES) -> Path:
    """The set of masks: manual ones on the grid of 1 mm, functional ones on the grid of the acquisition."""
    fine, coarse = np.diag([-1.0, -1.0, 1.0, 1.0]), np.diag([-2.0, -1.0, 3.0, 1.0])
    for number, case in enumerate(cases):
        files, shapes = home / "NIfTI-Files", ((12, 10, 14), (6, 10, 5))
        for phase in range(3):
            name = f"{case}_DCE_{phase:04d}_N3"
            save(files / NORMALISED / case / f"{name}_zscored.nii.gz", scan(10 * number + phase, shapes[0]), fine)
            save(files / ACQUIRED / case / f"{name}.nii.gz", scan(100 + 10 * number + phase, shapes[1]), coarse)
        for kind, shape, affine, high in (("stv_manual", *shapes[:1], fine, 1), ("ftv", shapes[1], coarse, 255)):
            save(files / f"masks_{kind}" / f"{case}.nii.gz", truth(case, shape).astype(np.uint8) * high, affine)
    return home


def collection(home: Path, masks: Path, cases=CASES) -> dict[str, np.ndarray]:
    """DICOM files of the collection, and masks on their grid; returned are voxels of the first phase after it.

    Of each patient two visits, the first with one series of three phases, a map that was computed from them on the same
    grid, a localizer of another, and a report without pixels.
    """
    phases = {}
    for number, case in enumerate(cases):
        rng = np.random.default_rng(number)
        for visit, date in (("b_baseline", "19850101"), ("a_later", "19850401")):
            study: Any = {"StudyInstanceUID": f"1.2.{number}.{date}", "StudyDate": date, "StudyTime": "101500"}
            folder, uid = home / case / visit, f"1.2.3.{number}.{date}"
            for phase in (2, 0, 1):
                values = rng.integers(0, 900, SHAPE, dtype=np.int16)
                times: Any = {
                    "TemporalPositionIdentifier": phase + 1,
                    "AcquisitionTime": f"10{phase}000",
                    "Modality": "MR",
                }
                order = range(phase * 10, phase * 10 + len(values))
                write_series(folder / "4.0-Dynamic", values, spacing=SPACING, order=order, RescaleSlope=1,
                             RescaleIntercept=0, **study, **times, SeriesInstanceUID=uid)  # fmt: skip
                if visit == "b_baseline" and phase == 1:
                    phases[case] = values
            kind: Any = {"ImageType": ["DERIVED", "SECONDARY"], "AcquisitionTime": "100500", **study}
            write_series(folder / "41.0-SER", rng.integers(0, 9, SHAPE, dtype=np.int16), spacing=SPACING, **kind)
            write_series(folder / "1.0-scout", rng.integers(0, 9, (3, 4, 5), dtype=np.int16), **study)
        (home / case / "b_baseline" / "notes.txt").write_text("no DICOM")
        affine = np.array([[-2.0, 0, 0, 10], [0, -1, 0, 20], [0, 0, 3, 30], [0, 0, 0, 1]])
        label = truth(case, SHAPE).transpose(2, 1, 0)
        save(masks / "NIfTI-Files" / "masks_stv_manual" / f"{case}.nii.gz", label.astype(np.uint8), affine)
    return phases


def test_checked_and_converted_and_readable(tmp_path, capsys):
    home = ispy1(tmp_path / "ISPY1-Tumor-SEG-Radiomics")
    assert main(["data", "check", str(home), "--benchmark", "ispy1"]) == 0
    out = capsys.readouterr().out
    assert f"{home}: all 3 rows can be read" in out
    assert "train: 2 rows about 2 volumes: 2 breast tumor" in out
    argv = ["data", "convert", "ispy1", str(home), str(tmp_path / "data"), "--test_fraction", "0.4"]
    assert main(argv) == 0
    rows = [dict(row) for split in ("train", "test") for row in map(dict, load_volumes(tmp_path / "data", split))]
    assert sorted(row["patient"] for row in rows) == sorted(CASES)
    for row in rows:
        case, number = read_case(row), CASES.index(row["patient"])
        assert case.mask is not None
        assert case.mask.sum() == truth(row["patient"], (12, 10, 14)).sum()
        voxels = read_volume(row["scan"]).voxels
        assert np.array_equal(voxels, scan(10 * number + 1, (12, 10, 14)).transpose(2, 1, 0))
        assert np.array_equal(case.mask, truth(row["patient"], (12, 10, 14)).transpose(2, 1, 0))
        assert case.scan.spacing_mm == (1.0, 1.0, 1.0)


def test_functional_volumes_lie_on_the_acquired_grid(tmp_path):
    home = ispy1(tmp_path)
    rows = list(read_ispy1(home / "NIfTI-Files", texts={"anatomy": "Left breast"}, masks="ftv", phase=2))
    assert [row.scan.name for row in rows] == [f"{case}_DCE_0002_N3.nii.gz" for case in CASES]
    assert {row.scan.parts[-3] for row in rows} == {ACQUIRED}
    assert rows[0].texts == {
        "lesion": "breast tumor",
        "modality": "MRI",
        "anatomy": "Left breast",
        "patient": CASES[0],
    }


@pytest.mark.parametrize("hardlink", [False, True])
def test_masks_on_dicom_grids(tmp_path, hardlink):
    phases = collection(tmp_path / "ISPY1", tmp_path / "masks")
    argv = ["data", "convert", "ispy1", str(tmp_path / "masks"), str(tmp_path / "data"), "--test_fraction", "0.4"]
    assert main([*argv, "--dicom", str(tmp_path / "ISPY1"), *(["--hardlink"] if hardlink else [])]) == 0
    rows = [dict(row) for split in ("train", "test") for row in map(dict, load_volumes(tmp_path / "data", split))]
    assert sorted(row["patient"] for row in rows) == sorted(CASES)
    for row in rows:
        assert sorted(path.name for path in Path(row["scan"]).iterdir()) == [f"{n:04d}.dcm" for n in range(SHAPE[0])]
        volume, case = read_volume(row["scan"]), read_case(row)
        assert np.array_equal(volume.voxels, phases[row["patient"]])
        assert case.mask is not None
        assert np.array_equal(case.mask, truth(row["patient"], SHAPE))
        assert case.scan.spacing_mm == SPACING
    assert main(["data", "check", str(tmp_path / "data")]) == 0


def test_the_volumes_of_a_patient(tmp_path):
    collection(tmp_path / "ISPY1", tmp_path / "masks", CASES[:1])
    volumes, problems = open_dicom_volumes(tmp_path / "ISPY1" / CASES[0])
    assert problems == []
    assert [
        (one.files[0].parts[-3], one.files[0].parts[-2], one.derived) for one in volumes if len(one.files) == 6
    ] == [
        (visit, series, series == "41.0-SER")
        for visit in ("b_baseline", "a_later")
        for series in ("4.0-Dynamic", "41.0-SER", "4.0-Dynamic", "4.0-Dynamic")
    ]
    series = tmp_path / "ISPY1" / CASES[0] / "a_later" / "4.0-Dynamic"
    (series / "IM013.dcm").unlink()
    volumes, problems = open_dicom_volumes(tmp_path / "ISPY1" / CASES[0])
    assert problems == [f"{series}: some positions of the series have 2 slices and some 3"]
    assert not any(series in file.parents for one in volumes for file in one.files)


def test_masks_without_a_scan_are_counted_and_left_out(tmp_path):
    home = ispy1(tmp_path)
    label = home / "NIfTI-Files" / "masks_stv_manual" / f"{CASES[1]}.nii.gz"
    save(label, np.ones((5, 5, 5), np.uint8), np.eye(4))
    with pytest.warns(UserWarning, match=rf"1 masks lie on the grid of no scan and were left out: {CASES[1]}"):
        assert [row.texts["patient"] for row in read_ispy1(home, texts={})] == [CASES[0], CASES[2]]
    for case in CASES:
        save(label.with_name(f"{case}.nii.gz"), np.ones((5, 5, 5), np.uint8), np.eye(4))
    with pytest.raises(DataError, match=rf"1 problems in 3 masks:\n  {', '.join(CASES)}: the mask lies on the grid of"):
        list(read_ispy1(home, texts={}))


def test_what_is_no_such_layout(tmp_path, capsys):
    home = ispy1(tmp_path / "set")
    files = home / "NIfTI-Files"
    with pytest.raises(DataError, match=r"no masks_stv_resunet in it or in its NIfTI-Files; it has masks_stv_manual, "):
        list(read_ispy1(home, texts={}, masks="stv_resunet"))
    with pytest.raises(DataError, match=r"masks='stv': expected one of stv_manual, stv_resunet, ftv"):
        list(read_ispy1(home, texts={}, masks="stv"))
    with pytest.raises(DataError, match="phase=-1: expected 0, before the contrast agent, or more"):
        list(read_ispy1(home, texts={}, phase=-1))
    with pytest.raises(DataError, match=r"nowhere: no such folder; expected the collection ISPY1"):
        list(read_ispy1(home, texts={}, dicom=tmp_path / "nowhere"))
    with pytest.raises(
        DataError, match=rf"3 problems in 3 masks:\n  {CASES[0]}: no {CASES[0]}_DCE_0003_\*.nii.gz in a"
    ):
        list(read_ispy1(home, texts={}, phase=3))
    (tmp_path / "ISPY1" / CASES[0]).mkdir(parents=True)
    with pytest.raises(DataError, match=rf"{CASES[0]}: no DICOM volume in .*{CASES[0]}"):
        list(read_ispy1(home, texts={}, dicom=tmp_path / "ISPY1"))
    manual = files / "masks_stv_manual"
    (manual / f"{CASES[0]}.nii.gz").write_bytes(b"none")
    (manual / "patient.nii.gz").write_bytes(b"none")
    nib.save(nib.Nifti1Image(np.ones((2, 2, 2), np.uint8), np.eye(4)), manual / f"{CASES[1]}.nii")
    assert main(["data", "check", str(home), "--benchmark", "ispy1"]) == 2
    error = capsys.readouterr().err
    assert "4 problems in 3 masks" in error
    assert f"{CASES[1]}: the mask lies on the grid of no scan" in error
    assert f"{CASES[1]}: has the masks {CASES[1]}.nii and {CASES[1]}.nii.gz; keep one" in error
    assert "patient.nii.gz: expected ISPY1_NUMBER.nii.gz" in error
    assert "cannot be read as NIfTI" in error
    assert "ispy1: cancerimagingarchive.net" in error


def test_a_phase_that_was_not_taken(tmp_path):
    collection(tmp_path / "ISPY1", tmp_path / "masks", CASES[:1])
    with pytest.raises(DataError, match=r"3 volumes lie on the grid of the mask; phase 3 needs 4"):
        list(read_ispy1(tmp_path / "masks", texts={}, dicom=tmp_path / "ISPY1", phase=3))
    (first,) = read_ispy1(tmp_path / "masks", texts={}, dicom=tmp_path / "ISPY1", phase=0)
    assert {pydicom.dcmread(path).TemporalPositionIdentifier for path in first.slices} == {1}
