"""Hugging Face data sets, whatever their columns are called."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image as PILImage

from segrl.data.formats.pairs import divided
from segrl.data.formats.rows import FormatRow, ScanRow, empty_folder
from segrl.data.formats.writing import rows_of_images
from segrl.data.text_columns import name_classes
from segrl.errors import DataError, unknown_name
from segrl.geometry.mask_images import binarize

if TYPE_CHECKING:  # imported where rows are read or written, so that the list of benchmarks is quick
    from datasets import Dataset

__all__ = ["COLUMNS", "read_columns", "write_columns"]

_TEXTS = ("query", "lesion", "modality", "anatomy", "source", "reasoning", "patient", "name")
COLUMNS = ("image", "mask", *_TEXTS)


def read_columns(
    source: str | Path,
    *,
    columns: Mapping[str, str | Sequence[str]],
    texts: Mapping[str, str],
    test_fraction: float = 0.0,
    seed: int = 0,
) -> Iterator[FormatRow]:
    """Read a data set of images and masks.

    A list of one image, as data of verl hold it, is that image, and a list of messages is the content of the first.

    Args:
        source: A folder of `save_to_disk`, any folder or file that `datasets.load_dataset` reads, or `owner/name` on
            the hub.
        columns: The data set's columns by what they are here: "image", "mask" and "query" or "lesion", and other texts
            of the manifest; those that have the right name need no entry. Of several names the first that there is.
        texts: Columns that every row gets.
        test_fraction: Share of images, or of patients where there is such a column, whose split is "test", drawn at
            random, where "train" is the only split. Equal images stay together.
        seed: Of the draw.

    Raises:
        DataError: It cannot be loaded, columns are missing or of another type, `test_fraction` is out of range, or a
            mask is not binary; names the row.
        UnknownNameError: A column that the data set has not.

    Example:
        >>> from segrl.data import make_synthetic
        >>> rows = make_synthetic(1, size=32).rename_columns({"query": "text", "mask": "gt"})
        >>> rows.save_to_disk("theirs")
        >>> (row,) = read_columns("theirs", columns={"query": "text", "mask": "gt"}, texts={})
        >>> row.split, row.mask.shape, row.texts["lesion"]
        ('train', (32, 32), 'ring abscess')
    """
    from datasets import Image, List

    found = _loaded(source)
    for split, rows in found.items():
        names = {here: here for here in COLUMNS}
        for here, theirs in columns.items():
            if isinstance(theirs, str) and theirs not in rows.column_names:
                raise unknown_name(f"column of {source} for {here}", theirs, rows.column_names)
            given_names = [theirs] if isinstance(theirs, str) else theirs
            names[here] = next((name for name in given_names if name in rows.column_names), here)
        lacking = [here for here in ("image", "mask") if names[here] not in rows.column_names]
        given = [here for here in _TEXTS if names[here] in rows.column_names]
        if lacking or not ({"query", "lesion"} & ({*given, *texts})):
            what = ", ".join(lacking) or "query or lesion"
            raise DataError(f"{source}, split {split}: no column for {what}, only {rows.column_names}; pass --columns "
                            "theirs=ours, such as text=query")  # fmt: skip
        named = name_classes(rows)
        for column in (names["image"], names["mask"]):
            wanted = List(Image()) if isinstance(named.features[column], List) else Image()
            if named.features[column] != wanted:
                named = named.cast_column(column, wanted)
        keys, splits = [split] * len(named), {split: split}
        if test_fraction and list(found) == ["train"]:
            keys = _drawn_together(named, names)
            splits = divided(keys, test_fraction, seed)
        for number, (key, row) in enumerate(zip(keys, map(dict, named), strict=True)):
            yield _row(row, names, given, splits[key], texts, f"{source}, split {split}, row {number}")


def _drawn_together(rows: Dataset, names: Mapping[str, str]) -> list[str]:
    """A key for each row: its patient, or the file of its image."""
    from datasets import Image, List

    if names["patient"] in rows.column_names:
        return [f"patient {text}" for text in rows[names["patient"]]]
    column = names["image"]
    stored = Image(decode=False)
    files = rows.select_columns([column]).cast_column(
        column, List(stored) if isinstance(rows.features[column], List) else stored
    )
    return [hashlib.sha256(repr(dict(row)[column]).encode()).hexdigest() for row in files]  # type: ignore[call-overload]


def _row(
    row: Mapping[str, Any], names: Mapping[str, str], given: list[str], split: str, texts: Mapping[str, str], where: str
) -> FormatRow:
    image, mask = (_one_image(row[names[here]], f"{here} of {where}") for here in ("image", "mask"))
    own = {here: _text(row[names[here]]) for here in given}
    name = own.pop("name", "") or where.rpartition(" ")[2]
    return FormatRow(image, binarize(mask, f"mask of {where}"), name, split, {**texts, **own})


def _one_image(value: Any, where: str) -> PILImage.Image:
    images = value if isinstance(value, list) else [value]
    if len(images) != 1 or not isinstance(images[0], PILImage.Image):
        raise DataError(f"{where}: {len(images)} images, expected one" if len(images) != 1 else f"{where}: no image")
    return images[0]


def _text(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = value[0].get("content")
    return str(value or "")


def _loaded(source: str | Path) -> dict[str, Dataset]:
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = Path(source)
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found: Any = load_from_disk(str(path))
        else:
            found = load_dataset(str(source))
    except Exception as error:  # whatever the library makes of a folder or of the hub
        raise DataError(f"{source}: cannot be loaded as a data set: {type(error).__name__}: {error}") from error
    return {str(name): part for name, part in found.items()} if isinstance(found, DatasetDict) else {"train": found}


def write_columns(rows: Iterable[FormatRow | ScanRow], folder: str | Path) -> dict[str, int]:
    """Write a `DatasetDict` on disk, with the columns image, mask and the texts; trainers and `read_columns` read it.

    Args:
        rows: Images.
        folder: A new folder.

    Returns:
        Number of rows of each split.

    Raises:
        DataError: The folder is not empty, a scan, or pixels that do not count.

    Example:
        >>> row = FormatRow(PILImage.new("RGB", (2, 2)), np.eye(2, dtype=bool), "a", "train", {"lesion": "cyst"})
        >>> write_columns([row], "as_columns")
        export ...
        {'train': 1}
        >>> [row.texts["lesion"] for row in read_columns("as_columns", columns={}, texts={})]
        ['cyst']
    """
    from datasets import Dataset, DatasetDict, Features, Image, Value

    splits: dict[str, list[dict[str, Any]]] = {}
    with empty_folder(folder) as home:
        for row in rows_of_images(rows, "hf"):
            files = {"image": _stored(row.image), "mask": _stored(PILImage.fromarray(row.mask.astype(np.uint8) * 255))}
            splits.setdefault(row.split or "train", []).append({**row.texts, **files, "name": row.name})
        names = sorted({name for found in splits.values() for row in found for name in row} - {"image", "mask"})
        features = Features({"image": Image(), "mask": Image(), **{name: Value("string") for name in names}})
        made = {
            split: Dataset.from_dict({name: [row.get(name, "") for row in found] for name in features}, features)
            for split, found in splits.items()
        }
        DatasetDict(made).save_to_disk(home)  # type: ignore[arg-type]
    return {split: len(found) for split, found in sorted(splits.items())}


def _stored(image: Path | PILImage.Image) -> dict[str, Any]:
    """A file by its path, whose bytes are stored with the data set, or an image as PNG."""
    if isinstance(image, Path):
        return {"path": str(image), "bytes": None}
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"path": None, "bytes": buffer.getvalue()}
