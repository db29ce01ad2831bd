"""M3D-Seg (Bai et al., M3D, arXiv:2404.00578), the data of the published 3D results of MedVol-R1.

The layout is the one that M3D's code writes and reads: `Data/process/m3d_seg_data_preprocess.py` and
`m3d_seg_data_prepare.py` of https://github.com/BAAI-DCAI/M3D, and `data_load_demo.py` beside the files at
https://huggingface.co/datasets/GoodBaiBai88/M3D-Seg. Names of structures: `LaMed/src/dataset/dataset_info.py` there.
No file of M3D-Seg was available when this was written; the tests use small files of the same layout.

    M3D_Seg/0012/0012.json                     splits, names of the labels
    M3D_Seg/0012/<case>/image.npy              (1, X, Y, Z) float
    M3D_Seg/0012/<case>/mask_(6, X, Y, Z).npz  sparse (6, X * Y * Z), one row per structure
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import Dataset, DatasetDict, concatenate_datasets

from segrl.data.contents import SplitContents
from segrl.data.listed_files import refuse_outside
from segrl.data.manifest import raise_all
from segrl.data.reasoning import build_query
from segrl.data.volumes.folder import file_problems, volume_dataset
from segrl.data.volumes.intensity import Intensity
from segrl.data.volumes.labels import label_values
from segrl.errors import DataError, unknown_name

__all__ = ["M3D_SEG_DATASETS", "load_m3d_seg", "m3d_seg_splits"]

M3D_SEG_DATASETS = {"AbdomenCT-1K": "0003", "KiTS23": "0004", "CT-ORG": "0012"}
"""Numbers of the data sets that MedVol-R1 is evaluated on; any other number of M3D-Seg loads as well."""

_STRUCTURES = {
    "0003": ("liver", "kidney", "spleen", "pancreas"),
    "0004": ("kidney", "kidney tumor", "kidney cyst"),
    "0012": ("liver", "bladder", "lungs", "kidneys", "bone", "brain"),
}
_ANATOMY = {"0003": "Abdomen", "0004": "Abdomen"}  # CT-ORG shows the whole body


def load_m3d_seg(
    path: str | Path,
    dataset: str,
    split: str | None = None,
    *,
    validate: bool = True,
    limit: int | None = None,
    intensity: str = "percentile:0:100",
    allow_outside: bool = False,
    contents: SplitContents | None = None,
) -> Dataset:
    """Load a data set of M3D-Seg, one row per case and present structure; a case without any gives no row.

    The images of M3D-Seg are not in Hounsfield units, and their affines are lost: they were clipped to the percentiles
    0.05 and 99.95 of the voxels above their mean and standardised. The default intensity therefore takes their whole
    range, as M3D's code does; neither spacing nor orientation is known (see `read_volume`), so no distance is
    scored, unless a column `spacing_mm`, [z, y, x], is added.

    Args:
        path: The folder of the data sets' folders (`M3D_Seg`), the folder above it, or the folder of the data set.
        dataset: "CT-ORG", "AbdomenCT-1K" or "KiTS23", or a number such as "0012".
        split: A split of the data set's JSON file, "train" or "test"; None takes all.
        validate: Read every file now; the three data sets are tens of gigabytes.
        limit: Keep only the first rows, after the split.
        intensity: Intensity scaling of every row, see `segrl.data.Intensity`.
        allow_outside: Whether the JSON file may name files outside `path`, by `..` or links.
        contents: Collects what the split holds, so that it is compared with the others (see `check_volumes`).

    Returns:
        A data set with the columns of `load_volumes`, where label_value is the number of the structure in the JSON file
        and lesion its name, and the columns split and source, the name of the data set. M3D-Seg has no queries: they
        are built from the structure.

    Raises:
        DataError: If the folder has no such data set, its JSON file does not have this layout, there are no rows, or,
            with all problems in one message, for bad cases and files.
        UnknownNameError: For an unknown data set or split.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from scipy import sparse
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = Path(folder, "0012")
        ...     (root / "a").mkdir(parents=True)
        ...     case = {"image": "0012/a/image.npy", "label": "0012/a/mask_(6, 4, 4, 2).npz"}
        ...     _ = (root / "0012.json").write_text(json.dumps({"train": [], "test": [case]}))
        ...     np.save(root / "a/image.npy", np.arange(32.0).reshape(1, 4, 4, 2))
        ...     sparse.save_npz(root / "a/mask_(6, 4, 4, 2).npz", sparse.csr_matrix(np.eye(2, 32)[[0, 1, 1, 1, 1, 1]]))
        ...     load_m3d_seg(folder, "CT-ORG", "test", limit=2)["lesion"][:]
        ['liver', 'bladder']
    """
    code = M3D_SEG_DATASETS.get(dataset, dataset)  # such as "0012"
    if not (code.isdecimal() and len(code) == 4):
        raise unknown_name("data set of M3D-Seg", dataset, [*M3D_SEG_DATASETS, *M3D_SEG_DATASETS.values()])
    Intensity.parse(intensity)
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: expected 1 or more rows, or None for all")
    listing = _find_listing(Path(path), code)
    content = _read_listing(listing)
    splits = {name: cases for name, cases in content.items() if isinstance(cases, list)}
    if split is not None and split not in splits:
        raise unknown_name(f"split of {listing}", split, splits)
    structures = _structures(listing, content, code)
    source = next((name for name, number in M3D_SEG_DATASETS.items() if number == code), code)
    rows: list[dict[str, Any]] = []
    locations: list[str] = []
    problems: list[str] = []
    chosen = splits if split is None else {split: splits[split]}
    total = 0
    for location, case in _cases(chosen):
        if limit is not None and len(rows) >= limit:
            break
        total += 1
        try:
            scan, label = (_resolve(case, key, listing, code) for key in ("image", "label"))
            for file in () if allow_outside else (scan, label):
                refuse_outside(Path(path), file, str(file))
            values = label_values(label)
            if values and values[-1] > len(structures):
                raise DataError(
                    f"{label}: has the structure {values[-1]}, but the labels of {listing.name} end at "
                    f"{len(structures)}; complete them"
                )
        except DataError as error:
            problems.append(f"{location}: {error}")
            continue
        for value in values:
            name = f"{code}/{scan.parent.name}/{structures[value - 1]}"
            texts = (structures[value - 1], _ANATOMY.get(code, ""), "CT")
            rows.append(
                {"scan": str(scan), "label": str(label), "label_value": value, "intensity": intensity}
                | {"query": build_query(*texts, name, noun="scan"), "modality": "CT", "anatomy": texts[1]}
                | {"lesion": texts[0], "name": name, "split": location.split()[0], "source": source}
            )
            locations.append(f"{location}: {texts[0]}")
    made = volume_dataset(rows[:limit])
    if validate:
        problems += file_problems(made, locations[:limit], allow_empty=False, contents=contents)
    raise_all(problems, total, str(listing))
    if contents is not None:
        contents.warn(str(listing))
    if not rows:
        raise DataError(
            f"{listing}: no structure in any case of {list(chosen)}; expected at least one; check the split"
        )
    return made


def m3d_seg_splits(path: str | Path, split: str | None = None) -> DatasetDict:
    """Load every data set of M3D-Seg in a folder, as `load_m3d_seg` loads one; files are not read, but for labels.

    Args:
        path: As of `load_m3d_seg`.
        split: Read the labels of this one alone; None takes all.

    Returns:
        The rows by their split, data set after data set.

    Raises:
        DataError: No such data set, or as `load_m3d_seg`.
        UnknownNameError: A data set has no such split.

    Example:
        >>> m3d_seg_splits("no/such/folder")
        Traceback (most recent call last):
        segrl.errors.DataError: no/such/folder: no data set of M3D-Seg; expected 0012/0012.json or others in it
    """
    home = Path(path)
    found = {
        listing.stem
        for pattern in ("*.json", "*/*.json", "M3D_Seg/*/*.json", "*/*/*.json")
        for listing in home.glob(pattern)
        if listing.stem.isdecimal() and len(listing.stem) == 4 and listing.parent.name in (listing.stem, home.name)
    }
    if not found:
        raise DataError(f"{home}: no data set of M3D-Seg; expected 0012/0012.json or others in it")
    rows = concatenate_datasets([load_m3d_seg(home, code, split, validate=False) for code in sorted(found)])
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(rows["split"]):
        numbers.setdefault(name, []).append(number)
    return DatasetDict({name: rows.select(chosen) for name, chosen in numbers.items()})


def _find_listing(folder: Path, code: str) -> Path:
    name = f"{code}.json"
    tried = [folder / code / name, folder / "M3D_Seg" / code / name, folder / code / code / name, folder / name]
    for listing in tried:
        if listing.is_file():
            return listing
    raise DataError(
        f"{folder}: no data set {code} of M3D-Seg; expected {tried[0]}; unpack {code}.zip there, or give the folder "
        "that holds it"
    )


def _read_listing(listing: Path) -> dict[str, Any]:
    try:
        content = json.loads(listing.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{listing}: not a JSON file ({error}); replace it") from error
    if not isinstance(content, dict) or not any(isinstance(cases, list) for cases in content.values()):
        raise DataError(f"{listing}: expected the lists 'train' and 'test' of image and label; replace the file")
    return content


def _structures(listing: Path, content: dict[str, Any], code: str) -> tuple[str, ...]:
    """Return the names of the channels; the first one is label 1."""
    labels = content.get("labels")
    if labels is None and code in _STRUCTURES:
        return _STRUCTURES[code]
    names = [labels.get(str(number)) for number in range(1, len(labels))] if isinstance(labels, dict) else []
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError(
            f"{listing}: labels {labels!r}; expected names by number, as {{'0': 'background', '1': 'liver'}}"
        )
    return tuple(str(name) for name in names)


def _cases(splits: dict[str, list[Any]]) -> Iterator[tuple[str, Any]]:
    for split, cases in splits.items():
        for number, case in enumerate(cases):
            yield f"{split} case {number}", case


def _resolve(case: Any, key: str, listing: Path, code: str) -> Path:
    """Find a file of a case; the folders that its path in the JSON file begins with do not matter."""
    text = case.get(key) if isinstance(case, dict) else None
    if not isinstance(text, str) or not text:
        raise DataError(f"{case!r}: expected the paths 'image' and 'label'")
    parts = PurePosixPath(text).parts
    start = len(parts) - parts[::-1].index(code) if code in parts else 0
    if key == "label" and not text.endswith(".npz"):
        raise DataError(
            f"{text}: expected a sparse .npz label; M3D's own preparation, which squeezes every scan into 32 slices, "
            "writes others; use the files as they are published"
        )
    return listing.parent.joinpath(*parts[start:])
