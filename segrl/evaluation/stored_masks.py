"""Evaluation of masks that another system has written into a folder, for images and volumes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from segrl.data.formats.sources import listed
from segrl.data.images.kept import KeptPixels, KeptRows
from segrl.data.volumes.case import CaseReader
from segrl.data.volumes.labels import read_label
from segrl.errors import DataError
from segrl.evaluation.base import OnAnswer, overlap_record, score_rows
from segrl.evaluation.images import read_image_target, whole_image
from segrl.evaluation.volumes import volume_record
from segrl.files.whole import is_unfinished
from segrl.geometry.mask_images import read_mask_file
from segrl.metrics.registry import Metric
from segrl.predictions.prediction import Prediction, Status

__all__ = ["StoredMasks", "evaluate_masks"]

_IMAGES = (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg", ".gif")
_VOLUMES = (".nii.gz", ".nii", ".npy")
_OF_SLICES = ("slice_visibility", "slice_boxes", "slice_index")  # of an answer that names a slice; a mask has none


class StoredMasks:
    """The mask files of a folder, one for each row of a data set.

    The file of a row has the row's name, with or without its folders and its ending: `images/a.jpg` is answered by
    `images/a.png` or `a.png`, `scans/b.nii.gz` by `b.nii.gz`. Rows that share an image need names of their own.

    Args:
        folder: The folder; files in folders within it count.
        dataset: Rows of images or volumes.
        missing_empty: Whether a row without a file was answered with an empty mask, instead of an error.

    Raises:
        DataError: No such folder, rows without a file or with several, files of no row, rows that share a name: all are
            listed.

    Example:
        >>> from segrl.data import make_synthetic
        >>> StoredMasks("no/such/folder", make_synthetic(1, size=32))
        Traceback (most recent call last):
        segrl.errors.DataError: no/such/folder: no such folder; expected one mask file for each row
    """

    def __init__(self, folder: str | Path, dataset: Dataset, *, missing_empty: bool = False) -> None:
        self.folder, self.volumes = Path(folder), "scan" in dataset.column_names
        endings = _VOLUMES if self.volumes else _IMAGES
        if not self.folder.is_dir():
            what = "is a file, and no .json of answers" if self.folder.is_file() else "no such folder"
            raise DataError(f"{self.folder}: {what}; expected one mask file for each row")
        files: dict[str, list[Path]] = {}
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and path.name.lower().endswith(endings) and not is_unfinished(path):
                whole = _stem(path.relative_to(self.folder).as_posix(), endings)
                for key in {whole, whole.rpartition("/")[2]}:
                    files.setdefault(key, []).append(path)
        if not files:
            raise DataError(f"{self.folder}: no files that end in {', '.join(endings)}; expected one mask for each row")
        self.paths: list[Path | None] = []
        problems: dict[str, list[str]] = {"no file": [], "several files": [], "the file of an earlier row": []}
        used: set[Path] = set()
        for number, name in enumerate(_names(dataset)):
            stem = _stem(name, (*endings, *_IMAGES))
            found = files.get(stem) or files.get(stem.rpartition("/")[2]) or []
            kind = "no file" if not found else "several files" if len(found) > 1 else ""
            if found and not kind and found[0] in used:
                kind = "the file of an earlier row"
            if kind and not (kind == "no file" and missing_empty):
                problems[kind].append(f"row {number} ({name})")
            self.paths.append(found[0] if found and not kind else None)
            used.update(found[:1])
        rest = sorted({path for paths in files.values() for path in paths} - used)
        if rest:
            problems["files of no row"] = [path.relative_to(self.folder).as_posix() for path in rest]
        if any(problems.values()):
            lines = [f"{kind}: {name}" for kind, found in problems.items() for name in found]
            counts = ", ".join(f"{kind}: {len(found)}" for kind, found in problems.items() if found)
            raise DataError(
                f"{self.folder} does not hold one mask for each of {len(dataset)} rows: {counts}:{listed(lines)}\nGive "
                "every file the name of its row"
                + ("" if missing_empty else ", or pass --missing_empty if no file means an empty mask")
            )

    def read(self, number: int, shown: Any, target: Any) -> Prediction:
        """Return the mask of a row as a prediction without text; its scan or image is `shown`.

        Raises:
            DataError: A file that is no mask, or of another size than the image or grid than the scan; names it.
        """
        path = self.paths[number]
        mask = np.zeros_like(target.mask)
        if path is not None:
            mask = read_label(path, shown.scan, allow_empty=True) if self.volumes else read_mask_file(path, str(path))
        return self.checked(mask, target, str(path))

    def checked(self, mask: np.ndarray, target: Any, where: str) -> Prediction:
        """Return a mask as a prediction without text.

        Raises:
            DataError: It has another size than the true one; begins with `where`.
        """
        if mask.shape != target.mask.shape:
            raise DataError(
                f"{where}: the mask is {' x '.join(map(str, mask.shape))}, the true one of {target.name or 'its row'} "
                f"{' x '.join(map(str, target.mask.shape))} (rows x columns); save predictions at the image's own size"
            )
        return Prediction("", None, None, np.zeros((0, 4)), Status.VALID, has_seg=False, mask=mask)


def evaluate_masks(
    masks: StoredMasks | str | Path,
    dataset: Dataset,
    *,
    batch_size: int = 16,
    metrics: Sequence[str | Metric] = (),
    progress: bool = True,
    on_answer: OnAnswer | None = None,
    kept: KeptPixels | None = None,
) -> list[dict[str, Any]]:
    """Score the masks of a folder, whichever system wrote them.

    Args:
        masks: The folder, or the `StoredMasks` of it and these rows.
        dataset: Rows of `segrl.data.load_folder` or `load_volumes`, or of a data set with their columns.
        batch_size: Rows in memory at once.
        metrics: See `segrl.evaluation.evaluate`.
        progress: Show a progress bar.
        on_answer: See `segrl.evaluation.evaluate` and `evaluate_volumes`.
        kept: See `segrl.evaluation.evaluate`; for images.

    Returns:
        One record per row as of `segrl.evaluation.overlap_record`, of volumes with "hd95_mm" and "nsd"; "fail" is Dice
        = 0, since there is no text. What is scored of an answer's text, such as a named slice, is not in them.

    Raises:
        DataError: As `StoredMasks`, or masks that cannot be read or are of another size: all are listed.

    Example:
        >>> from segrl.data import make_synthetic
        >>> rows = make_synthetic(2, size=32)
        >>> for row in rows:
        ...     Path("theirs").mkdir(exist_ok=True)
        ...     row["mask"].save(f"theirs/{row['name']}.png")
        >>> [record["dice"] for record in evaluate_masks("theirs", rows, progress=False)]
        [1.0, 1.0]
    """
    stored = masks if isinstance(masks, StoredMasks) else StoredMasks(masks, dataset)
    read_case = CaseReader(0)
    count, problems = iter(range(len(dataset))), []

    def read(row: dict[str, Any]) -> tuple[Any, Any]:
        if not stored.volumes:
            return whole_image(row), read_image_target(row)
        case = read_case(row, allow_empty=True)
        return case, case.target(row)

    def answer(batch: list[tuple[Any, Any]]) -> list[Prediction]:
        found = []
        for shown, target in batch:
            try:
                found.append(stored.read(next(count), shown, target))
            except DataError as error:
                problems.append(str(error))
                found.append(stored.checked(np.zeros_like(target.mask), target, ""))
        return found

    def record(prediction: Prediction, target: Any) -> dict[str, Any]:
        if not stored.volumes:
            return overlap_record(prediction, target, metrics)
        found = volume_record(prediction, target, metrics=metrics)
        return {name: value for name, value in found.items() if name not in _OF_SLICES}

    settings: dict[str, Any] = {"title": "score", "batch_size": batch_size, "progress": progress}
    rows = dataset if kept is None else KeptRows(dataset, kept)
    records = score_rows(rows, read, answer, record, **settings, on_answer=on_answer, ahead=not stored.volumes)
    if problems:
        raise DataError(f"{stored.folder}: {len(problems)} of {len(records)} masks do not fit:{listed(problems)}")
    return records


def _names(dataset: Dataset) -> Iterable[str]:
    if "name" not in dataset.column_names:
        return (f"row {number}" for number in range(len(dataset)))
    return (str(name) for name in dataset["name"])


def _stem(name: str, endings: Sequence[str]) -> str:
    """The name without its ending."""
    for ending in endings:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name
