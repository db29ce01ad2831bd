"""ISPY1: tumors of the breast in contrast-enhanced MR scans (Chitalia et al., Scientific Data 9, 2022).

The masks are those of TCIA's "ISPY1-Tumor-SEG-Radiomics", the scans its own or the DICOM files of the collection ISPY1.
Layout as in the set's own description and in public loaders, read on 2026-11-30; the download was not seen. Nothing is
fetched here.

    NIfTI-Files/masks_stv_manual/ISPY1_1002.nii.gz       structural tumor volume, drawn by hand; also masks_stv_resunet
    NIfTI-Files/masks_ftv/ISPY1_1002.nii.gz              functional tumor volume, which is another thing
    NIfTI-Files/images_bias-corrected_resampled_zscored_nifti/ISPY1_1002/ISPY1_1002_DCE_0001_N3_zscored.nii.gz
    NIfTI-Files/images_bias-corrected_nifti/ISPY1_1002/ISPY1_1002_DCE_0001_N3.nii.gz
    ISPY1/ISPY1_1002/VISIT/SERIES/*.dcm                  the collection; phases of the contrast agent in one series

A mask belongs to the scan on whose grid it lies: the first of these folders, mostly, or an original series. Nothing is
resampled.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from segrl.data.dicom.series import open_dicom_volumes
from segrl.data.formats.pairs import divided
from segrl.data.formats.rows import ScanRow
from segrl.data.formats.sources import listed
from segrl.data.volumes.nifti import lies_on
from segrl.data.volumes.voxel_files import open_voxels
from segrl.errors import DataError

__all__ = ["ISPY1_MASKS", "read_ispy1"]

ISPY1_MASKS = ("stv_manual", "stv_resunet", "ftv")
"""Kinds of masks: structural tumor volume by hand and by a network, functional tumor volume."""
_SCANS = ("images_bias-corrected_resampled_zscored_nifti", "images_bias-corrected_nifti")
_CASE = re.compile(r"(ISPY1_\d+)\.nii(\.gz)?")


def read_ispy1(
    source: str | Path,
    *,
    texts: Mapping[str, str],
    dicom: str | Path | None = None,
    masks: str = "stv_manual",
    phase: int = 1,
    test_fraction: float = 0.0,
    seed: int = 0,
) -> Iterator[ScanRow]:
    """Read ISPY1, one row for each mask; there is one of each patient.

    Masks that lie on the grid of no scan, which public loaders leave out too, are left out with a warning that counts
    them.

    Args:
        source: The download of the masks: the folder of `NIfTI-Files`, or that folder.
        texts: Columns that every row gets, in place of breast tumor, MRI and breast.
        dicom: The folder of the collection ISPY1, with a folder for each patient, whose scans are taken. Of the
            original volumes of the first visit that has any on the mask's grid, in the order in which they were taken,
            `phase` counts. None takes the scans that come with the masks.
        masks: Their kind, see `ISPY1_MASKS`.
        phase: Of the contrast agent: 0 before it, 1 the first after it.
        test_fraction: Share of patients whose split is "test", drawn at random; no split is published.
        seed: Of the draw.

    Raises:
        DataError: Another kind of masks, folders that are not there, names of other files, several masks of a patient,
            masks that cannot be read, patients without scans or with too few: all are listed; or no mask
            lies on a scan.
        SegRLError: pydicom is not installed, with `dicom`.

    Example:
        >>> list(read_ispy1("no/such/folder", texts={}))
        Traceback (most recent call last):
        segrl.errors.DataError: no/such/folder: no masks_stv_manual in it or in its NIfTI-Files; it has none of ...
    """
    if phase < 0:
        raise DataError(f"phase={phase}: expected 0, before the contrast agent, or more")
    home, scans = _home(Path(source), masks), None if dicom is None else Path(dicom)
    if scans is not None and not scans.is_dir():
        raise DataError(f"{scans}: no such folder; expected the collection ISPY1, a folder for each patient")
    problems: list[str] = []
    cases: dict[str, Path] = {}
    for path in sorted(path for path in (home / f"masks_{masks}").iterdir() if not path.name.startswith(".")):
        match = _CASE.fullmatch(path.name)
        if match is None:
            problems.append(f"{path.name}: expected ISPY1_NUMBER.nii.gz")
        elif match[1] in cases:
            problems.append(f"{match[1]}: has the masks {cases[match[1]].name} and {path.name}; keep one")
        else:
            cases[match[1]] = path
    rows: dict[str, tuple[Path, tuple[Path, ...]]] = {}
    elsewhere: list[str] = []
    for case, label in cases.items():
        try:
            found = _of_nifti(home, case, label, phase) if scans is None else _of_dicom(scans, case, label, phase)
        except DataError as error:
            problems.append(str(error))
            continue
        if found is None:
            elsewhere.append(case)
        else:
            rows[case] = found
    if problems or not rows:
        if elsewhere:
            problems.append(f"{_listed_cases(elsewhere)}: the mask lies on the grid of no scan")
        raise DataError(f"{home}: {len(problems)} problems in {len(cases)} masks:{listed(problems)}")
    if elsewhere:
        warnings.warn(f"{home}: {len(elsewhere)} masks lie on the grid of no scan and were left out: "
                      f"{_listed_cases(elsewhere)}", stacklevel=2)  # fmt: skip
    splits = divided(list(rows), test_fraction, seed)
    for case, (scan, slices) in rows.items():
        words = {"lesion": "breast tumor", "modality": "MRI", "anatomy": "Breast", "patient": case, **texts}
        yield ScanRow(scan, cases[case], "0", splits[case], words, slices=slices)


def _home(source: Path, masks: str) -> Path:
    if masks not in ISPY1_MASKS:
        raise DataError(f"masks={masks!r}: expected one of {', '.join(ISPY1_MASKS)}")
    for home in (source, source / "NIfTI-Files"):
        if (home / f"masks_{masks}").is_dir():
            return home
    there = [f"masks_{name}" for name in ISPY1_MASKS for home in (source, source / "NIfTI-Files")
             if (home / f"masks_{name}").is_dir()]  # fmt: skip
    has = f"it has {', '.join(there)}" if there else "it has none of masks_stv_manual, masks_stv_resunet, masks_ftv"
    raise DataError(f"{source}: no masks_{masks} in it or in its NIfTI-Files; {has}")


def _of_nifti(home: Path, case: str, label: Path, phase: int) -> tuple[Path, tuple[Path, ...]] | None:
    """Return the scan of a phase on whose grid a mask lies; None if it is none of them."""
    found = [path for part in _SCANS for path in sorted((home / part / case).glob(f"{case}_DCE_{phase:04d}_*.nii*"))]
    if not found:
        raise DataError(f"{case}: no {case}_DCE_{phase:04d}_*.nii.gz in a folder {case} of {' or '.join(_SCANS)}")
    mask = open_voxels(label, "label")
    for path in found:
        scan = open_voxels(path, "scan")
        if lies_on(mask.shape, mask.affine, scan.shape, scan.affine):
            return path, ()
    return None


def _of_dicom(home: Path, case: str, label: Path, phase: int) -> tuple[Path, tuple[Path, ...]] | None:
    """Return folder and files of the volume on whose grid a mask lies; None if it is none of them."""
    volumes, reasons = open_dicom_volumes(home / case)
    mask = open_voxels(label, "label")
    original = [volume for volume in volumes if not volume.derived]
    on_grid = [one for one in original if lies_on(mask.shape, mask.affine, one.shape, one.affine)]
    if not volumes:
        why = f" ({reasons[0]})" if reasons else ""
        raise DataError(f"{case}: no DICOM volume in {home / case}{why}")
    if not on_grid:
        return None
    visit = [volume for volume in on_grid if volume.study == on_grid[0].study]
    if len(visit) <= phase:
        raise DataError(f"{case}: {len(visit)} volumes lie on the grid of the mask; phase {phase} needs {phase + 1}")
    return home / case, visit[phase].files


def _listed_cases(cases: list[str]) -> str:
    more = f" and {len(cases) - 5} more" if len(cases) > 5 else ""
    return ", ".join(cases[:5]) + more
