"""Load one split of a data set from a folder, a `DatasetDict` saved to disk, or the hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk

from segrl.data.contents import SplitContents
from segrl.data.images.folder import check_rows, load_folder
from segrl.data.images.kept import KeptPixels
from segrl.data.text_columns import name_classes
from segrl.errors import DataError, unknown_name
from segrl.hub import check_source, reraise_as
from segrl.predictions.target import METADATA_COLUMNS

__all__ = ["load_split"]


def load_split(
    source: str,
    split: str | None,
    *,
    folder: Callable[..., Dataset] = load_folder,
    check: Callable[..., None] = check_rows,
    contents: SplitContents | None = None,
    kept: KeptPixels | None = None,
    allow_outside: bool = False,
    limit: int | None = None,
    texts: Sequence[str] = METADATA_COLUMNS,
    argument: str = "--data",
) -> Dataset:
    """Load one split of `source` and check every row.

    Args:
        source: A folder that holds `dataset_dict.json` (a `DatasetDict` saved to disk), any other folder, or a data set
            `owner/name` on the hub.
        split: For example "train" or "test"; None: the rows of all splits, one after the other.
        folder: Function `folder(source, split)` that loads and checks a split of a folder of files; by default images
            and masks with a manifest.
        check: Function that raises for bad rows of any other source; by default for images and masks.
        contents: Collects what the splits of `source` hold, to warn of what they share; passed on to `folder` and
            `check` (there with `split=`) where it is given.
        kept: Keeps the pixels that are checked, by the number of their row; passed on to both where it is given. For
            one split of images.
        allow_outside: Whether a manifest may name files outside its folder; passed on to `folder` where it is set.
        limit: Keep only the first rows; of the others no file is read. Passed on to `folder` where it is given.
        texts: Text columns that are added to such a data set if they are missing: empty, but `name` is `row <index>`.
        argument: Name of `source` in errors, as the user knows it.

    Returns:
        The rows, in the order of the source.

    Raises:
        UnknownNameError: The data has no such split; the closest is suggested.
        DataError: No such data, one data set instead of splits, or bad rows (see `folder` and `check`).

    Example:
        >>> import tempfile
        >>> from segrl.data import make_synthetic
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     DatasetDict({"test": make_synthetic(2, size=32).remove_columns("name")}).save_to_disk(folder)
        ...     load_split(folder, "test")["name"][:]
        ['row 0', 'row 1']
    """
    path = Path(source)
    if contents is not None:
        folder, check = partial(folder, contents=contents), partial(check, contents=contents, split=split)
    if kept is not None:
        folder, check = partial(folder, kept=kept), partial(check, kept=kept)
    if allow_outside:
        folder = partial(folder, allow_outside=True)
    if limit is not None:
        folder = partial(folder, limit=limit)
    if (path / "dataset_dict.json").is_file():
        return _of_columns(_load(load_from_disk, source, argument), source, split, check, texts, limit)
    if (path / "dataset_info.json").is_file():
        raise DataError(
            f"{argument} {source!r} is one data set; expected the splits train and test: save "
            "DatasetDict({'train': ..., 'test': ...})"
        )
    if path.is_dir():
        return folder(source, split)
    check_source(argument, source, "data set", DataError)
    return _of_columns(_load(load_dataset, source, argument), source, split, check, texts, limit)


def _load(load: Any, source: str, argument: str) -> DatasetDict:
    with reraise_as(f"{argument} {source!r} cannot be loaded", DataError):
        return load(source)


def _of_columns(
    splits: DatasetDict,
    source: str,
    split: str | None,
    check: Callable[[Dataset], None],
    texts: Sequence[str],
    limit: int | None = None,
) -> Dataset:
    if split is None:
        parts: list[Dataset] = []
        for name in splits:
            left = None if limit is None else limit - sum(map(len, parts))
            if left != 0:
                parts.append(_of_columns(splits, source, str(name), check, texts, left))
        for name, part in zip(splits, parts, strict=False):
            if set(part.column_names) != set(parts[0].column_names):
                raise DataError(
                    f"{source}: split {str(name)!r} has the columns {part.column_names}, the first one "
                    f"{parts[0].column_names}; expected the same, as all splits are read together"
                )
        return concatenate_datasets(parts)
    alike = [str(name) for name in splits if str(name).strip().casefold() == split.strip().casefold()]
    if split not in splits and len(alike) == 1:
        split = alike[0]  # only its capitals differ
    if split not in splits:
        raise unknown_name(f"split of {source}", split, map(str, splits))
    rows = splits[split]
    if limit is not None and limit < len(rows):
        rows = rows.select(range(limit))
    try:
        check(rows)
    except DataError as error:
        raise DataError(f"split {split!r} of {source}: {error}") from error
    rows = name_classes(rows)
    for column in texts:
        given = rows[column] if column in rows.column_names else [None] * len(rows)
        values = [str(text) if text is not None else "" for text in given]
        if column == "name":
            values = [text or f"row {number}" for number, text in enumerate(values)]
        if column in rows.column_names:
            rows = rows.remove_columns(column)
        rows = rows.add_column(column, values)  # type: ignore[call-arg]
    return rows
