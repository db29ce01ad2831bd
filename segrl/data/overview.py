"""Contents of the splits of a data set, after every file was read as training reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_from_disk

from segrl.data.contents import SplitContents
from segrl.data.csv_files import read_csv
from segrl.data.images.folder import check_rows, load_folder
from segrl.data.splits import load_split
from segrl.data.volumes.folder import check_volumes, load_volumes
from segrl.errors import DataError
from segrl.geometry.mask_images import binarize

__all__ = ["data_overview", "holds_volumes", "manifest_task"]

_QUERIES = 4


def data_overview(
    path: str | Path,
    *,
    allow_outside: bool = False,
    allow_empty: bool = False,
    on_splits: Callable[[str, dict[str, Dataset]], None] | None = None,
) -> dict[str, Any]:
    """Read every file of a data set, and say what its splits hold.

    Args:
        path: A folder with `manifest.csv`, of images or of scans, or a `DatasetDict` saved to disk.
        allow_outside: Whether the manifest may name files outside its folder.
        allow_empty: Whether labels of scans may have no voxel of what a row asks for; masks of images may.
        on_splits: Called with the task and the rows of each split, once all are read; to draw them, for example.

    Returns:
        Plain Python values: "task", "images" or "volumes"; "splits", for each "rows", "images" (distinct ones),
        "empty", "lesions" and "modalities" with their numbers of rows, "sizes", "foreground" (smallest, median and
        largest share of masks that are not empty, None for volumes), and a few "queries".

    Raises:
        DataError: As the loaders: all problems of a split in one message.

    Warns:
        UserWarning: Images that splits share, masks that are all empty or all full, as training warns.

    Example:
        >>> from segrl.data import make_synthetic, write_folder
        >>> _ = write_folder(make_synthetic(4, size=32), "mine", split=["train", "train", "train", "test"])
        >>> found = data_overview("mine")
        >>> found["task"], {name: split["rows"] for name, split in found["splits"].items()}
        ('images', {'test': 1, 'train': 3})
    """
    home = Path(path)
    task, names = _layout(home)
    contents, empty = SplitContents(), {"allow_empty": allow_empty}
    readers = (
        {"folder": partial(load_volumes, **empty), "check": partial(check_volumes, **empty)}
        if task == "volumes"
        else {"folder": load_folder, "check": check_rows}
    )
    splits = {
        name: load_split(str(path), name, contents=contents, allow_outside=allow_outside, argument="", **readers)
        for name in names
    }
    if on_splits is not None:
        on_splits(task, splits)
    described = {name: _described(rows, task, contents.empty_rows(name)) for name, rows in splits.items()}
    return {"task": task, "splits": described}


def _layout(home: Path) -> tuple[str, list[str]]:
    """The task, and the names of the splits."""
    if (home / "dataset_dict.json").is_file():
        found: Any = load_from_disk(str(home))
        return ("volumes" if holds_volumes(home) else "images"), sorted(map(str, found))
    manifest = home / "manifest.csv"
    if not manifest.is_file():
        raise DataError(f"{home}: no manifest.csv and no dataset_dict.json; segrl data convert makes such a folder")
    table = read_csv(manifest, (), ("image", "scan", "mask", "label", "split"))
    at = table.header.index("split") if "split" in table.header else None
    names = {cells[at] for _, cells in table.lines if at is not None and at < len(cells) and cells[at]}
    if not names:
        raise DataError(f"{manifest}: no split; add the column split with train and test")
    return ("volumes" if "label" in table.header else "images"), sorted(names)


def holds_volumes(home: Path) -> bool:
    """Return whether a folder with `manifest.csv`, or a `DatasetDict` saved to disk, holds volumes; else False.

    Raises:
        DataError: A `manifest.csv` that cannot be read.

    Example:
        >>> holds_volumes(Path("no/such/folder"))
        False
    """
    if (home / "dataset_dict.json").is_file():
        found: Any = load_from_disk(str(home))
        return any("scan" in part.column_names for part in found.values())
    return (home / "manifest.csv").is_file() and manifest_task(home) == "volumes"


def manifest_task(home: Path) -> str:
    """Return what a folder with `manifest.csv` holds, "images" or "volumes".

    Raises:
        DataError: No such file, or one that cannot be read.
    """
    if not (home / "manifest.csv").is_file():
        raise DataError(f"{home}: no manifest.csv; segrl data convert makes such a folder")
    table = read_csv(home / "manifest.csv", (), ("image", "scan", "mask", "label"))
    return "volumes" if "label" in table.header else "images"


def _described(rows: Dataset, task: str, empty: int) -> dict[str, Any]:
    file = "image" if task == "images" else "scan"
    shares, sizes = [], Counter()
    if task == "images":
        for row in rows.select_columns(["mask"]):
            mask = binarize(dict(row)["mask"])  # type: ignore[call-overload]
            shares.append(float(mask.mean()))
            sizes[f"{mask.shape[1]} x {mask.shape[0]} px"] += 1
    found = [share for share in shares if share]
    listed = [f"{count} of {size}" for size, count in sizes.most_common(3)]
    return {
        "rows": len(rows),
        "images": len(set(rows["name"])) if file == "image" else len(set(rows["scan"])),
        "empty": empty,
        "lesions": dict(Counter(name or "unnamed" for name in rows["lesion"]).most_common()),
        "modalities": dict(Counter(name or "unspecified" for name in rows["modality"]).most_common()),
        "sizes": ", ".join(listed) + (f" and {len(sizes) - 3} other sizes" if len(sizes) > 3 else ""),
        "foreground": [min(found), float(np.median(found)), max(found)] if found else None,
        "queries": list(dict.fromkeys(rows["query"]))[:_QUERIES],
    }
