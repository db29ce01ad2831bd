"""COCO's results, a list of image, category, segmentation and score: those of another system read, answers written."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from segrl.data.formats.coco import coco_mask, coco_tables
from segrl.data.formats.coco_writing import CocoWriter
from segrl.data.formats.rows import plain_name
from segrl.data.formats.sources import listed, read_json
from segrl.errors import DataError
from segrl.evaluation.stored_masks import StoredMasks
from segrl.files.whole import write_whole
from segrl.geometry.masks import mask_to_rle, rle_to_mask
from segrl.geometry.run_lengths import rle_counts
from segrl.predictions.prediction import Prediction

__all__ = ["CocoMasks", "CocoResults", "is_coco_results"]


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
            another size, polygons that cannot be filled, two images or two rows of one name: all are listed.

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


class CocoResults:
    """Writes the masks of answers as COCO's results; `CocoMasks` and pycocotools read the same masks back.

    An answer is one detection, in the image that has the name of its row and in the category of its lesion; one with an
    empty mask, or without a mask, is none. Its score is its confidence, or 1 where none is known.

    Args:
        names: Of the images of all rows, in order.
        lesions: Of the rows.
        annotations: JSON with the ids of images and categories; None: a file of annotations, with the true masks, is
            written beside the results, `NAME_annotations.json`.

    Raises:
        DataError: Rows that COCO cannot tell apart or that have no lesion, images and categories without an id: all are
            listed; or annotations of another layout.

    Example:
        >>> from segrl.geometry import mask_to_rle
        >>> mask = mask_to_rle(np.eye(2, dtype=bool), compressed=True)
        >>> record = {"name": "a.png", "lesion": "cyst", "predicted_mask": mask, "target_mask": mask}
        >>> CocoResults(["a.png"], ["cyst"]).write("found.json", [record])
        >>> read_json(Path("found.json"))
        [{'image_id': 1, 'category_id': 1, 'segmentation': {'size': [2, 2], 'counts': '0120'}, 'score': 1.0}]
        >>> is_coco_results(Path("found.json")), coco_tables(Path("found_annotations.json"))[1]
        (True, {1: 'cyst'})
    """

    def __init__(self, names: Sequence[str], lesions: Sequence[str], annotations: str | Path | None = None) -> None:
        self.annotations = None if annotations is None else Path(annotations)
        self._keys = [_key(name, lesion) for name, lesion in zip(names, lesions, strict=True)]
        rows = list(enumerate(zip(names, self._keys, strict=True)))
        problems = [f"row {number} ({name}): no lesion, and COCO has a category for each detection"
                    for number, (name, key) in rows if not key[1]]  # fmt: skip
        first: dict[tuple[str, str], int] = {}
        stems: dict[str, str] = {}
        for number, (name, key) in rows:
            if first.setdefault(key, number) != number:
                problems.append(f"row {number} ({name}): asks for {key[1]!r} as row {first[key]} does, of that name")
            elif stems.setdefault(key[0], name) != name:
                problems.append(f"row {number} ({name}): has the name of {stems[key[0]]}")
        if self.annotations is not None:
            pictures, categories = self._tables(self.annotations)
            for number, (name, key) in rows:
                if key[0] not in pictures or key[1] not in categories:
                    what = "the image" if key[0] not in pictures else f"the category {key[1]!r}"
                    problems.append(f"row {number} ({name}): {what} is not in {annotations}")
        if problems:
            raise DataError(f"COCO's results: {len(problems)} problems, expected none:{listed(problems)}")

    def write(self, path: str | Path, records: Sequence[Mapping[str, Any]]) -> None:
        """Write the answers; existing files are replaced.

        Args:
            path: JSON file of the results.
            records: One for each row, of `segrl.evaluation.overlap_record`.
        """
        path, annotations = Path(path), self.annotations
        if annotations is None:
            annotations, terms = path.with_name(f"{path.stem}_annotations.json"), dict[str, str]()
            writer = CocoWriter()
            for record in records:
                true = rle_to_mask(record["target_mask"])
                category = terms.setdefault(record["lesion"].casefold(), record["lesion"])
                writer.add(record["name"], true.shape[::-1], true, category=category)
            writer.write(annotations)
        pictures, categories = self._tables(annotations)
        found = []
        for (name, lesion), record in zip(self._keys, records, strict=True):
            mask = record["predicted_mask"]
            if mask is not None and rle_counts(mask)[1::2].any():
                sure = (record.get("confidence") or {}).get("value")
                ids = {"image_id": pictures[name], "category_id": categories[lesion]}
                found.append({**ids, "segmentation": mask, "score": 1.0 if sure is None else sure})
        write_whole(path, json.dumps(found))

    @staticmethod
    def _tables(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Ids of images by the name of their file, and of categories by their name."""
        pictures, categories = coco_tables(path)
        names: dict[str, Any] = {}
        shared = []
        for number, entry in pictures.items():
            name = plain_name(Path(entry["file_name"]).stem)
            if names.setdefault(name, number) != number:
                shared.append(f"image {name}: ids {names[name]} and {number}")
        if shared:
            raise DataError(f"{path}: {len(shared)} images have the name of another one:{listed(shared)}")
        return names, {name.casefold(): number for number, name in categories.items()}


def _key(name: str, lesion: str) -> tuple[str, str]:
    """Return the name of the image and the lesion, which tell rows apart."""
    return plain_name(Path(str(name)).stem), str(lesion).strip().casefold()


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
        found.setdefault(_key(name, lesion), []).append(number)
    return found
