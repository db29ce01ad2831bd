"""IMed-361M: sparse masks of all structures of an image in one file (Cheng et al., arXiv:2411.12814).

Layout as in the samples of uni-medical/IMIS-Bench, f4519c0, and its `data_loader.py`, read on 2026-11-30; nothing is
fetched here, and its sets have licences of their own.

    SET/dataset.json                        {"modality", "labels": {"1": name, ...}, "training": [...], "test": [...]}
    SET/image/NAME.png, SET/label/NAME.(C, H, W, 1).npz       label 1 is the first of C masks
"""

# C structures, H, W pixels

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from segrl.data.formats.modality import modality_name
from segrl.data.formats.rows import FormatRow
from segrl.data.formats.sources import listed, named_file, read_object
from segrl.data.volumes.arrays import sparse_label
from segrl.errors import DataError
from segrl.geometry.image_files import open_image

__all__ = ["read_imed_361m"]

_SPLITS = {"train": "training", "val": "validation", "test": "test"}


def read_imed_361m(source: str | Path, *, texts: Mapping[str, str]) -> Iterator[FormatRow]:
    """Read one set of IMed-361M, or the folder that holds several; one row for each image and structure in it.

    The interactive masks (`imask`) have no names and are not read.

    Args:
        source: A folder with `dataset.json`, or of such folders.
        texts: Columns that every row gets, in place of what `dataset.json` says.

    Raises:
        DataError: No `dataset.json`, or one of another layout; files that are not there or outside the folder: all are
            listed; labels of another size than their image, or with another number of masks than there are
            names.

    Example:
        >>> list(read_imed_361m("no/such/folder", texts={}))
        Traceback (most recent call last):
        segrl.errors.DataError: no/such/folder: no dataset.json, and no folder with one
    """
    home = Path(source)
    folders = [path.parent for path in (home / "dataset.json", *sorted(home.glob("*/dataset.json"))) if path.is_file()]
    if not folders:
        raise DataError(f"{home}: no dataset.json, and no folder with one")
    found, problems = [], []
    for folder in folders:
        content = read_object(folder / "dataset.json")
        names = _names(folder / "dataset.json", content.get("labels"))
        modality = next(iter(content["modality"].values())) if isinstance(content.get("modality"), dict) else ""
        words = {"source": str(content.get("name") or folder.name), "modality": modality_name(str(modality)), **texts}
        for split, key in _SPLITS.items():
            for entry in content.get(key) or ():
                parts = entry if isinstance(entry, dict) else {}
                try:
                    image, label = (named_file(folder, parts.get(part)) for part in ("image", "label"))
                    found.append((image, label, split, names, words))
                except DataError as error:
                    problems.append(f"{folder.name}, {key}: {error}")
    if problems or not found:
        raise DataError(f"{home}: {len(problems)} problems, {len(found)} images can be read:{listed(problems)}")
    for image, label, split, names, words in found:
        (height, width, _), masks = sparse_label(label)
        with open_image(image, f"image {image}") as opened:
            size = opened.height, opened.width
        if (height, width) != size or masks.get_shape()[0] != len(names):
            raise DataError(
                f"{label}: {masks.get_shape()[0]} masks of {height} x {width}; the image is {size[0]} x "
                f"{size[1]} px, and dataset.json names {len(names)} structures"
            )
        for number, name in enumerate(names):
            mask = masks[[number]].toarray().reshape(height, width) > 0
            if mask.any():
                yield FormatRow(image, mask, image.name, split, {**words, "lesion": name})


def _names(path: Path, labels: Any) -> list[str]:
    """Names of the labels 1, 2, ... in their order."""
    if not isinstance(labels, dict) or sorted(labels) != sorted(map(str, range(len(labels)))) or len(labels) < 2:
        raise DataError(f"{path}: labels {labels!r:.80}; expected names by number, from 0 for the background")
    return [str(labels[str(number)]).replace("_", " ") for number in range(1, len(labels))]
