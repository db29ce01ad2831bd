"""nnU-Net's raw data: `dataset.json`, `imagesTr`, `labelsTr`, and their siblings of the test set; images or scans."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from segrl.data.formats.pairs import divided
from segrl.data.formats.rows import FormatRow, ScanRow, empty_folder, free_name
from segrl.data.formats.sources import listed, read_object
from segrl.data.formats.writing import ImageFiles
from segrl.errors import DataError, unknown_name
from segrl.geometry.image_files import open_image

__all__ = ["read_nnunet", "write_nnunet"]

_SCANS = (".nii", ".nii.gz")
_IGNORE = "ignore"  # its reserved name for what was not annotated
_FOLDERS = {"train": ("imagesTr", "labelsTr"), "test": ("imagesTs", "labelsTs")}


def read_nnunet(
    source: str | Path,
    *,
    texts: Mapping[str, str],
    channel: str | None = None,
    test_fraction: float = 0.0,
    seed: int = 0,
) -> Iterator[FormatRow | ScanRow]:
    """Read a data set of nnU-Net (version 2), one row for each case and label; its label "ignore" counts in no score.

    Args:
        source: The folder that holds `dataset.json`.
        texts: Columns that every row gets; without a modality it is the name of the channel.
        channel: Name or number of the channel that is taken; None takes the only one.
        test_fraction: Share of cases whose split is "test", drawn at random, where `labelsTs` holds none.
        seed: Of the draw.

    Yields:
        Rows of scans where files are NIfTI, else of images. Of images only labels that occur; of scans all, since their
        files are not opened here.

    Raises:
        DataError: Another layout, several channels and none named, labels that are no whole numbers, regions of
            several or two of one value, `test_fraction` out of range, or cases without an image: all of these are
            listed.

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
    if not ending.startswith(".") or "/" in ending:
        raise DataError(f"{path}: file_ending {content.get('file_ending')!r}; expected one such as '.nii.gz'")
    number, name = _channel(path, content.get("channel_names") or content.get("modality"), channel)
    labels = _labels(path, content.get("labels"))
    ignored = labels.pop(_IGNORE, None)
    kept = {"modality": name, **texts}
    cases = {
        split: {
            file: _image(home / images, file, ending, number)
            for file in sorted((home / folder).glob(f"*{ending}"))
            if file.is_file()
        }
        for split, (images, folder) in _FOLDERS.items()
    }
    lacking = [
        f"{label.parent.name}/{label.name}: no {image.parent.name}/{image.name}"
        for found in cases.values()
        for label, image in found.items()
        if not image.is_file()
    ]
    if lacking:
        raise DataError(f"{home}: {len(lacking)} labels have no image:{listed(lacking)}")
    if not any(cases.values()):
        raise DataError(f"{home}: no labels that end in {ending} in labelsTr or labelsTs")
    drawn = divided(list(cases["train"]), 0.0 if cases["test"] else test_fraction, seed)
    for split, found in cases.items():
        for label, image in found.items():
            yield from _rows(image, label, labels, ignored, drawn.get(label, split), kept, ending)


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
    if len(known) < len(names):
        raise DataError(f"{path}: channel_names {names!r:.80}: two have one number; number them from 0")
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
        if len(set(map(str, labels.values()))) < len(labels):
            raise DataError(f"{path}: two labels have the same name; rename one")
        labels = {str(name): int(value) for value, name in labels.items()}
    found: dict[str, int] = {}
    for name, value in labels.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise DataError(f"{path}: label {name!r} is {value!r}; regions of several labels are not read")
        if other := next((known for known, taken in found.items() if taken == value), None):
            raise DataError(f"{path}: labels {other!r} and {name!r} both have the value {value}; give each its own")
        if value:
            found[str(name)] = value
    if len({name.casefold() for name in found}) < len(found):
        raise DataError(f"{path}: two labels have the same name; rename one")
    return found


def write_nnunet(rows: Iterable[FormatRow | ScanRow], folder: str | Path) -> dict[str, int]:
    """Write a data set of nnU-Net (version 2): a label file for each case, with a value for each lesion.

    Args:
        rows: Images or NIfTI scans, not both, of the splits train and test, with a lesion and one modality.
        folder: A new folder.

    Returns:
        Number of rows of each split.

    Raises:
        DataError: The folder is not empty; no rows; several modalities; a row without a lesion; masks of one image that
            overlap, for a pixel has one value; of scans, structures of several values or whose value differs.
        UnknownNameError: Another split.

    Example:
        >>> row = FormatRow(Image.new("RGB", (2, 2)), np.eye(2, dtype=bool), "a", "train", {"lesion": "cyst"})
        >>> write_nnunet([row], "Dataset001_Mine")
        export ...
        {'train': 1}
        >>> [row.mask.tolist() for row in read_nnunet("Dataset001_Mine", texts={})]
        [[[True, False], [False, True]]]
    """
    with empty_folder(folder) as home:
        for part in ("imagesTr", "labelsTr"):
            (home / part).mkdir()
        writer: _Images | _Scans | None = None
        modality, counts = "", Counter()
        for row in track(rows, "export"):
            kind = _Scans if isinstance(row, ScanRow) else _Images
            if writer is None:
                writer, modality = kind(home), _modality(row)
            _check_row(row, modality, isinstance(writer, kind))
            writer.add(row)  # type: ignore[arg-type]
            counts[row.split] += 1
        if writer is None:
            raise DataError(f"{home}: nothing to write, there are no rows")
        content = {
            "channel_names": {"0": modality},
            "labels": {"background": 0, **writer.finish()},
            "numTraining": len(list((home / "labelsTr").iterdir())),
            "file_ending": writer.ending,
        }
        (home / "dataset.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    return dict(sorted(counts.items()))


_ENDS = {"train": "Tr", "test": "Ts"}
_CHANNEL = re.compile(r"_\d{4}$")  # of a case that comes from nnU-Net


def _modality(row: FormatRow | ScanRow) -> str:
    return row.texts.get("modality") or "image"


def _check_row(row: FormatRow | ScanRow, modality: str, alike: bool) -> None:
    name = row.scan if isinstance(row, ScanRow) else row.name
    if not alike:
        raise DataError(f"{name}: the rows are images and scans, and nnU-Net has one kind; export them apart")
    if _modality(row) != modality:
        raise DataError(
            f"{name}: the rows have the modalities {modality}, {_modality(row)}, and one channel has one; export them "
            "apart, or pass --modality"
        )
    if row.split not in _ENDS:
        raise unknown_name("split of nnunet", row.split, _ENDS)
    if not row.texts.get("lesion") or row.texts["lesion"].casefold() in (_IGNORE, "background"):
        raise DataError(f"{name}: lesion {row.texts.get('lesion')!r}; nnunet needs the name of a structure")


class _Images:
    """Images and the labels that are drawn of their masks."""

    ending = ".png"

    def __init__(self, home: Path) -> None:
        self.home, self.files = home, ImageFiles(home)
        self.values: dict[str, int] = {}
        self.drawn: dict[Path, np.ndarray] = {}  # 65535 where pixels do not count, until their value is known

    def add(self, row: FormatRow) -> None:
        end, name = _ENDS[row.split], _CHANNEL.sub("", Path(row.name).stem)
        image, _ = self.files.add(replace(row, name=name), f"images{end}", "{}_0000", png=True)
        path = self.home / f"labels{end}" / f"{_CHANNEL.sub('', image.stem)}.png"
        label = self.drawn.setdefault(path, np.zeros(row.mask.shape, np.uint16))
        if ((label > 0) & (label < _UNSURE))[row.mask].any():
            raise DataError(f"{row.name}: masks overlap, and nnU-Net has one value a pixel; export coco")
        label[row.mask] = self.values.setdefault(row.texts["lesion"], len(self.values) + 1)
        if row.ignored is not None:
            label[row.ignored & (label == 0)] = _UNSURE

    def finish(self) -> dict[str, int]:
        ignored = len(self.values) + 1
        ignores = any((label == _UNSURE).any() for label in self.drawn.values())
        for path, label in self.drawn.items():
            label[label == _UNSURE] = ignored
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(label.astype(np.uint8 if ignored < 256 else np.uint16)).save(path)
        return self.values | ({_IGNORE: ignored} if ignores else {})


_UNSURE = 65535


class _Scans:
    """Files that are copied, so that a structure must have one value in all of them."""

    ending = ".nii.gz"

    def __init__(self, home: Path) -> None:
        self.home = home
        self.values: dict[str, int] = {}
        self.labels: dict[Path, Path] = {}  # by scan
        self.taken: set[str] = set()

    def add(self, row: ScanRow) -> None:
        for name, text in ((row.texts["lesion"], row.label_value), (_IGNORE, row.ignored_value or None)):
            if text is None:
                continue
            if not text.isdigit() or not int(text) or self.values.setdefault(name, int(text)) != int(text):
                raise DataError(
                    f"{row.label}: {name} has the value {text}; nnunet needs one value above 0, the same in all files"
                )
        if self.labels.setdefault(row.scan, row.label) != row.label:
            raise DataError(
                f"{row.scan}: has the labels {self.labels[row.scan]} and {row.label}; nnunet needs one file"
            )
        stem = row.scan.name.removesuffix(self.ending)
        if not row.scan.name.endswith(self.ending) or not row.label.name.endswith(self.ending):
            raise DataError(f"{row.scan}: expected .nii.gz files of scan and label")
        key = f"{row.split} {row.scan}"
        if key in self.taken:
            return
        self.taken.add(key)
        name, end = free_name(self.taken, _CHANNEL.sub("", stem)), _ENDS[row.split]
        for part, path, file in (("images", row.scan, f"{name}_0000"), ("labels", row.label, name)):
            (self.home / f"{part}{end}").mkdir(exist_ok=True)
            shutil.copyfile(path, self.home / f"{part}{end}" / f"{file}{self.ending}")

    def finish(self) -> dict[str, int]:
        if len(set(self.values.values())) < len(self.values):
            raise DataError(f"{self.home}: two structures have one value: {self.values}")
        return self.values
