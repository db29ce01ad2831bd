"""MedSegBench: arrays of images and labels in one file (Kuş and Aydin, Scientific Data 2024).

Layout as in the `medsegbench` package, found in 2026-11; the downloads were not seen. Its sets have licences of their
own; nothing is fetched here.

    {flag}_{128,256,512}.npz     {train,val,test}_images (N, H, W[, 3]), {train,val,test}_label (N, H, W)
                                 of idrib {train,val,test}_label_{C1,C2,C3,C4}, a structure each

Names of labels are those of `medsegbench/info.py` of zekikus/MedSegBench, 3e5d4c3, read on 2026-11-30. It calls the one
label of a binary set "foreground": such names are those of the data sets that it refers to. COVID-QU-Ex has masks of
lungs and of infections, and nothing says which of them covidquex holds.
"""

# N images, H, W pixels

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from segrl.data.formats.rows import FormatRow
from segrl.data.formats.sources import listed
from segrl.errors import DataError

__all__ = ["read_medsegbench", "read_medsegbench_folder"]

_Labels = Mapping[int, str] | Mapping[str, str]
_DERMOSCOPY, _ENDOSCOPY, _FUNDUS = "Dermoscopy", "Endoscopy", "Fundus photography"
_MICROSCOPY, _PATHOLOGY, _ULTRASOUND, _XRAY = "Microscopy", "Pathology", "Ultrasound", "X-ray"


def _values(names: str) -> dict[int, str]:
    return dict(enumerate(names.split(", "), 1))


_SETS: dict[str, tuple[str, str | _Labels | None]] = {
    "abdomenus": (
        _ULTRASOUND,
        _values("liver, kidney, pancreas, vessels, adrenals, gallbladder, bones, spleen"),
    ),
    "bbbc010": (_MICROSCOPY, "worm"),
    "bkai-igh": (_ENDOSCOPY, {1: "neoplastic polyp", 2: "non-neoplastic polyp"}),
    "brifiseg": (_MICROSCOPY, "cell nucleus"),
    "busi": (_ULTRASOUND, "breast tumor"),
    "cellnuclei": (_MICROSCOPY, "cell nucleus"),
    "chasedb1": (_FUNDUS, "retinal vessel"),
    "chuac": (_XRAY, "coronary artery"),
    "covid19radio": (_XRAY, "lung"),
    "covidquex": (_XRAY, None),
    "cystoidfluid": ("OCT", "cystoid macular edema"),
    "dca1": (_XRAY, "coronary artery"),
    "deepbacs": (_MICROSCOPY, "bacterium"),
    "drive": (_FUNDUS, "retinal vessel"),
    "dynamicnuclear": (_MICROSCOPY, "cell nucleus"),
    "fhpsaop": (_ULTRASOUND, {1: "pubic symphysis", 2: "fetal head"}),
    "idrib": (_FUNDUS, {"C1": "microaneurysm", "C2": "hemorrhage", "C3": "hard exudate", "C4": "optic disc"}),
    "isic2016": (_DERMOSCOPY, "skin lesion"),
    "isic2018": (_DERMOSCOPY, "skin lesion"),
    "kvasir": (_ENDOSCOPY, "polyp"),
    "m2caiseg": (
        _ENDOSCOPY,
        _values(
            "grasper, bipolar, hook, scissors, clipper, irrigator, specimen bag, trocar, clip, liver, gallbladder, "
            "fat, organ, artery, intestine, bile, blood, black"
        ),
    ),
    "monusac": (_PATHOLOGY, _values("epithelial cell, lymphocyte, macrophage, neutrophil, ambiguous cell")),
    "mosmedplus": ("CT", "COVID-19 lesion"),
    "nuclei": (_PATHOLOGY, "cell nucleus"),
    "nuset": (_MICROSCOPY, "cell nucleus"),
    "pandental": (_XRAY, "mandible"),
    "polypgen": (_ENDOSCOPY, "polyp"),
    "promise12": ("MRI", "prostate"),
    "robotool": (_ENDOSCOPY, "surgical tool"),
    "tnbcnuclei": (_PATHOLOGY, "cell nucleus"),
    "ultrasoundnerve": (_ULTRASOUND, "nerve"),
    "usforkidney": (_ULTRASOUND, "kidney"),
    "uwaterlooskincancer": (_DERMOSCOPY, "skin lesion"),
    "wbc": (_MICROSCOPY, {1: "cytoplasm", 2: "nucleus"}),
    "yeaz": (_MICROSCOPY, "yeast cell"),
}
"""Modality of each set, and what its masks show; None: no source says it."""


def read_medsegbench(
    source: str | Path, *, texts: Mapping[str, str], labels: _Labels | None = None
) -> Iterator[FormatRow]:
    """Read a file of MedSegBench, one row for each image and label that occurs in it.

    Args:
        source: The `.npz` file; pickled arrays in it are refused.
        texts: Columns that every row gets.
        labels: Names of the labels by their value, or by the category "C1" of an array of their own,
            `{train,val,test}_label_C1`; None: every value above 0 is the lesion of `texts`.

    Raises:
        DataError: No such file, arrays that are missing or of another shape, labels without a name.

    Example:
        >>> images, label = np.zeros((1, 4, 4), dtype=np.uint8), np.eye(4, dtype=np.uint8)[None]
        >>> np.savez("polyp_256.npz", train_images=images, train_label=label)
        >>> [row.name for row in read_medsegbench("polyp_256.npz", texts={"lesion": "polyp"})]
        ['train_00000']
    """
    path = Path(source)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        known = error.strerror if isinstance(error, OSError) else None
        reason = known or "damaged, another format, or with pickled objects in it, which are never loaded"
        raise DataError(f"{path}: cannot be read as .npz: {reason}; download it again") from error
    splits = [split for split in ("train", "val", "test") if f"{split}_images" in arrays]
    if not splits:
        raise DataError(f"{path}: no array train_images, val_images or test_images, only {', '.join(sorted(arrays))}")
    for split in splits:
        images = arrays[f"{split}_images"]
        for array, names in _arrays(split, texts, labels).items():
            truth = arrays.get(array)
            if truth is None or truth.shape != images.shape[:3] or images.dtype != np.uint8:
                shape = None if truth is None else truth.shape
                raise DataError(
                    f"{path}: {split}_images is {images.dtype} {images.shape}, {array} {shape}; expected uint8 "
                    "(N, H, W) or (N, H, W, 3) with labels (N, H, W)"
                )
            for number, (image, label) in enumerate(zip(images, truth, strict=True)):
                picture = Image.fromarray(image)
                values = [int(value) for value in np.unique(label) if value > 0]
                unnamed = [value for value in values if not isinstance(names, str) and value not in names]
                if unnamed:
                    where = f"label {unnamed[0]} of {split} {number}"
                    raise DataError(f"{path}: {where} has no name; pass --labels {unnamed[0]}=NAME")
                wanted = {None: names} if isinstance(names, str) else {value: names[value] for value in values}
                for value, lesion in wanted.items():
                    mask = label > 0 if value is None else label == value
                    yield FormatRow(picture, mask, f"{split}_{number:05d}", split, {**texts, "lesion": lesion})


def _arrays(split: str, texts: Mapping[str, str], labels: _Labels | None) -> dict[str, str | Mapping[int, str]]:
    """Arrays of labels with their names: one for all values above 0, or one for each value."""
    if labels is None:
        return {f"{split}_label": texts.get("lesion", "")}
    values = {value: name for value, name in labels.items() if isinstance(value, int)}
    of_arrays = {f"{split}_label_{key}": name for key, name in labels.items() if isinstance(key, str)}
    return {**({f"{split}_label": values} if values else {}), **of_arrays}


def read_medsegbench_folder(source: str | Path, *, texts: Mapping[str, str]) -> Iterator[FormatRow]:
    """Read all sets of MedSegBench in a folder, with the names of their structures; the set is the column source.

    Of a set in several sizes the largest is read: 512 is the package's default.

    Args:
        source: The folder of the `.npz` files, or one of them.
        texts: Columns that every row gets, in place of modality and source.

    Raises:
        DataError: No such files; files that are none of the 35 sets, or covidquex: all are named; or as
            `read_medsegbench`.

    Example:
        >>> images, label = np.zeros((1, 4, 4), dtype=np.uint8), np.eye(4, dtype=np.uint8)[None]
        >>> np.savez("kvasir_128.npz", test_images=images, test_label=label)
        >>> [(row.name, row.texts["lesion"]) for row in read_medsegbench_folder("kvasir_128.npz", texts={})]
        [('kvasir_test_00000', 'polyp')]
    """
    home = Path(source)
    sets: dict[str, list[tuple[int, Path]]] = {}
    problems = []
    for path in [home] if home.is_file() else sorted(home.glob("*.npz")):
        flag, _, size = path.stem.rpartition("_")
        if size not in ("128", "256", "512") or _SETS.get(flag, ("", None))[1] is None:
            problems.append(
                f"{path.name}: {'nothing says what its masks show' if flag in _SETS else 'no set of MedSegBench'}"
            )
        else:
            sets.setdefault(flag, []).append((int(size), path))
    if problems:
        raise DataError(f"{home}: {len(problems)} files cannot be read; move them, and convert each with --lesion or "
                        f"--labels:{listed(problems)}")  # fmt: skip
    if not sets:
        raise DataError(f"{home}: no SET_128.npz, SET_256.npz or SET_512.npz")
    for flag, sizes in sets.items():
        modality, names = _SETS[flag]
        words = {"modality": modality, "source": flag, **texts}
        if isinstance(names, str):
            words, names = {**words, "lesion": names}, None
        for row in read_medsegbench(max(sizes)[1], texts=words, labels=names):
            yield replace(row, name=f"{flag}_{row.name}")
