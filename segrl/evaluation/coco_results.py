"""Masks that another system wrote as COCO's results: a list of image, category, segmentation and score."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from segrl.data.formats.coco import coco_mask, coco_tables
from segrl.data.formats.rows import plain_name
from segrl.data.formats.sources import listed, read_json
from segrl.errors import DataError
from segrl.evaluation.stored_masks import StoredMasks
from segrl.geometry.masks import mask_to_rle, rle_to_mask
from segrl.predictions.prediction import Prediction

__all__ = ["CocoMasks", "is_coco_results"]


class CocoMasks(StoredMasks):
    """The masks of a file of COCO's results, one for each row of a data set: the union of its detections.

    A detection belongs to the row about its image, by the name of the file, and its category, by the lesion. A row
    without any was answered with an empty mask. Detections of categories that no row about the image asks for are left
    out, with a warning that counts them.

    Args:
        results: JSON, a list of `image_id`, `category_id`, `segmentation` (polygons, or run lengths) and perhaps
            `score`.
        annotations: JSON with the `images` and `categories` that the ids stand for, such as the annotations that the
            data were converted from.
        dataset: Rows of images.
        min_score: Detections with a lower score are left out; those without a score count.

    Raises:
        DataError: Files of another layout, ids that the annotations do not have, images that no row is about, masks of
            another size, polygons that cannot be filled, two images or two rows of one name: all are counted, ten
            named.

    Example:
        >>> from segrl.data import make_synthetic
        >>> CocoMasks("results.json", "no.json", make_synthetic(1, size=32))
        Traceback (most recent call last):
        segrl.errors.DataError: no.json: cannot be read: No such file or directory
    """

    def __init__(
        self, results: str | Path, annotations: str | Path, dataset: Dataset, *, min_score: float = 0.5
    ) -> None:
        self.folder, self.volumes = Path(results), False
        if "scan" in dataset.column_names:
            raise DataError(f"{results}: holds masks of images, and the rows are volumes; pass a folder of masks")
        pictures, categories = coco_tables(Path(annotations))
        rows = _rows(dataset)
        problems = [f"image {name}: {len(found)} rows ask for {lesion!r}, expected one"
                    for (name, lesion), found in rows.items() if len(found) > 1]  # fmt: skip
        names = {number: plain_name(Path(entry["file_name"]).stem) for number, entry in pictures.items()}
        asked = {name for name, _ in rows}
        shared = [name for name, count in Counter(names.values()).items() if count > 1 and name in asked]
        problems += [f"image {name}: several images of {annotations} have this name" for name in sorted(shared)]
        found: dict[int, list[Any]] = {}
        other = 0
        for number, entry in enumerate(_detections(Path(results))):
            where = f"result {number}"
            picture, category = pictures.get(entry["image_id"]), categories.get(entry["category_id"])
            score = entry.get("score")
            if picture is None or category is None:
                what = "image_id" if picture is None else "category_id"
                problems.append(f"{where}: {what} {entry[what]!r} is not in {annotations}")
            elif not (score is None or (isinstance(score, int | float) and not isinstance(score, bool))):
                problems.append(f"{where}: score {score!r}, expected a number")
            elif names[entry["image_id"]] not in asked:
                problems.append(f"{where}: no row is about {picture['file_name']}")
            elif score is not None and score < min_score:
                continue
            elif not (row := rows.get((names[entry["image_id"]], category.casefold()))):
                other += 1
            else:
                size = picture["height"], picture["width"]
                try:
                    mask = coco_mask(entry["segmentation"], *size, where, crossing=True)  # systems trace what they drew
                except DataError as error:
                    problems.append(str(error))
                    continue
                found.setdefault(row[0], []).append(mask_to_rle(mask, compressed=True))
        if problems:
            raise DataError(f"{results}: {len(problems)} problems, expected none:{listed(problems)}")
        if other:
            warnings.warn(f"{results}: {other} detections are of categories that no row about their image asks for; "
                          "they were left out", stacklevel=2)  # fmt: skip
        self._found = found

    def read(self, number: int, shown: Any, target: Any) -> Prediction:
        """Return the union of the detections of a row as a prediction without text.

        Raises:
            DataError: It has another size than the image of the row; names the row.
        """
        masks = [rle_to_mask(mask) for mask in self._found.get(number, [])]
        mask = np.any(masks, axis=0) if masks else np.zeros_like(target.mask)
        return self.checked(mask, target, f"{self.folder}, row {number}")


def is_coco_results(path: Path) -> bool:
    """Return whether a JSON file is a list of detections, and not of segrl's records.

    Raises:
        DataError: It cannot be read, or is not JSON.

    Example:
        >>> _ = Path("r.json").write_text('[{"image_id": 1, "category_id": 1, "segmentation": []}]')
        >>> is_coco_results(Path("r.json"))
        True
    """
    content = read_json(path)
    first = content[0] if isinstance(content, list) and content else None
    return isinstance(first, dict) and "image_id" in first and "query" not in first


def _detections(path: Path) -> list[Mapping[str, Any]]:
    content = read_json(path)
    if not isinstance(content, list):
        raise DataError(f"{path}: holds a {type(content).__name__}; expected a list of detections")
    needed = ("image_id", "category_id", "segmentation")
    for number, entry in enumerate(content):
        missing = [key for key in needed if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise DataError(f"{path}: result {number} has no {', '.join(missing)}; expected {', '.join(needed)}, score")
    return content


def _rows(dataset: Dataset) -> dict[tuple[str, str], list[int]]:
    """Numbers of the rows by the name of their image and their lesion."""
    found: dict[tuple[str, str], list[int]] = {}
    columns = [dataset[name] if name in dataset.column_names else [""] * len(dataset) for name in ("name", "lesion")]
    for number, (name, lesion) in enumerate(zip(*columns, strict=True)):
        found.setdefault((plain_name(Path(str(name)).stem), str(lesion).casefold()), []).append(number)
    return found
