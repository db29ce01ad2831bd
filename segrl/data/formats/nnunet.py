"""nnU-Net's raw data: `dataset.json`, `imagesTr`, `labelsTr`, and their siblings of the test set; images or scans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from segrl.data.formats.rows import FormatRow, ScanRow
from segrl.data.formats.sources import read_object
from segrl.errors import DataError, unknown_name
from segrl.geometry.image_files import open_image

__all__ = ["read_nnunet"]

_SCANS = (".nii", ".nii.gz")
_IGNORE = "ignore"  # its reserved name for what was not annotated
_FOLDERS = {"train": ("imagesTr", "labelsTr"), "test": ("imagesTs", "labelsTs")}


def read_nnunet(
    source: str | Path, *, texts: Mapping[str, str], channel: str | None = None
) -> Iterator[FormatRow | ScanRow]:
    """Read a data set of nnU-Net (version 2), one row for each case and label; its label "ignore" counts in no score.

    Args:
        source: The folder that holds `dataset.json`.
        texts: Columns that every row gets; without a modality it is the name of the channel.
        channel: Name or number of the channel that is taken; None takes the only one.

    Yields:
        Rows of scans where files are NIfTI, else of images. Of images only labels that occur; of scans all, since their
        files are not opened here.

    Raises:
        DataError: Another layout, several channels and none named, labels that are no whole numbers or regions of
            several, or cases without an image: all of these are counted, some named.

    Example:
        >>> list(read_nnunet("no/such/folder", texts={}))
        Traceback (most recent call last):
        segrl.errors.DataError: no/such/folder: no dataset.json; pass the folder of an nnU-Net data set
    """
    home = Path(source)
    path = home / "dataset.json"
    if not path.is_file():
        raise DataError(f"{home}: no dataset.json; pass the folder of an nnU-Net data set")
    content = read_object(path)
    ending = str(content.get("file_ending") or "")
    if not ending.startswith("."):
        raise DataError(f"{path}: file_ending {content.get('file_ending')!r}; expected one such as '.nii.gz'")
    number, name = _channel(path, content.get("channel_names") or content.get("modality"), channel)
    labels = _labels(path, content.get("labels"))
    ignored = labels.pop(_IGNORE, None)
    kept = {"modality": name, **texts}
    found = False
    for split, (images, folder) in _FOLDERS.items():
        cases = sorted(file for file in (home / folder).glob(f"*{ending}") if file.is_file())
        lacking = [file.name for file in cases if not _image(home / images, file, ending, number).is_file()]
        if lacking:
            raise DataError(
                f"{home}: {len(lacking)} labels have no image, such as {lacking[0]}; expected "
                f"{images}/{lacking[0][: -len(ending)]}_{number:04d}{ending}"
            )
        for file in cases:
            found = True
            yield from _rows(_image(home / images, file, ending, number), file, labels, ignored, split, kept, ending)
    if not found:
        raise DataError(f"{home}: no labels that end in {ending} in labelsTr or labelsTs")


def _rows(
    image: Path,
    label: Path,
    labels: Mapping[str, int],
    ignored: int | None,
    split: str,
    texts: Mapping[str, str],
    ending: str,
) -> Iterator[FormatRow | ScanRow]:
    if ending.lower() in _SCANS:
        for lesion, value in labels.items():
            kept = "" if ignored is None else str(ignored)
            yield ScanRow(image, label, str(value), split, {**texts, "lesion": lesion}, kept)
        return
    with open_image(label, f"label {label}") as opened:
        values = np.asarray(opened)  # of a palette the indices: nnU-Net reads values, not colours
    if values.ndim != 2:
        raise DataError(f"{label}: a label with {values.shape[2]} channels; expected one, with whole numbers")
    for lesion, value in labels.items():
        mask = values == value
        if mask.any():
            unsure = None if ignored is None else values == ignored
            yield FormatRow(image, mask, image.name, split, {**texts, "lesion": lesion}, unsure)


def _image(folder: Path, label: Path, ending: str, channel: int) -> Path:
    return folder / f"{label.name[: -len(ending)]}_{channel:04d}{ending}"


def _channel(path: Path, names: Any, wanted: str | None) -> tuple[int, str]:
    if not isinstance(names, dict) or not names or not all(str(key).isdigit() for key in names):
        raise DataError(f"{path}: channel_names {names!r:.80}; expected names by number")
    known = {int(key): str(value) for key, value in names.items()}
    if wanted is None:
        if len(known) > 1:
            listed = ", ".join(known.values())
            raise DataError(f"{path}: several channels ({listed}), and a model here sees one; pass --channel")
        return next(iter(known.items()))
    for number, name in known.items():
        if wanted.casefold() in (name.casefold(), str(number)):
            return number, name
    raise unknown_name("channel", wanted, known.values())


def _labels(path: Path, labels: Any) -> dict[str, int]:
    if not isinstance(labels, dict) or not labels:
        raise DataError(f"{path}: labels {labels!r:.80}; expected values by name")
    if all(str(key).isdigit() for key in labels):  # version 1: names by value
        labels = {str(name): int(value) for value, name in labels.items()}
    found = {}
    for name, value in labels.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise DataError(f"{path}: label {name!r} is {value!r}; regions of several labels are not read")
        if value:
            found[str(name)] = value
    if len({name.casefold() for name in found}) < len(found):
        raise DataError(f"{path}: two labels have the same name; rename one")
    return found
