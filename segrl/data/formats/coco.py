"""COCO annotations: polygons and run lengths, one row for each image and category."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from shapely.geometry import Polygon
from shapely.validation import explain_validity

from segrl.data.formats.pairs import divided
from segrl.data.formats.rows import FormatRow
from segrl.data.formats.sources import listed, read_json
from segrl.errors import DataError
from segrl.geometry.masks import mask_to_rle, rle_to_mask

__all__ = ["coco_annotations", "coco_mask", "read_coco"]


def read_coco(
    annotations: str | Path,
    images: str | Path,
    *,
    texts: Mapping[str, str],
    split: str | None = None,
    test_fraction: float = 0.0,
    seed: int = 0,
    crossing: bool = False,
) -> Iterator[FormatRow]:
    """Read a COCO file of annotations, and the folder of its images.

    All annotations of one category on one image are one row, whose lesion is the category.

    Args:
        annotations: JSON with `images`, `annotations` and `categories`.
        images: The folder in which `file_name` is found.
        texts: Columns that every row gets.
        split: Split of all rows; None: "train", but for `test_fraction`.
        test_fraction: Share of images whose split is "test", drawn at random.
        seed: Of the draw.
        crossing: See `coco_mask`.

    Raises:
        DataError: No JSON, or of another layout; categories whose names are equal; annotations that refer to nothing,
            polygons with fewer than three points or that cross themselves, run lengths of another size: all are
            counted, ten named; images that are not there.

    Example:
        >>> list(read_coco("no.json", "images", texts={}))
        Traceback (most recent call last):
        segrl.errors.DataError: no.json: cannot be read: No such file or directory
    """
    content = _content(Path(annotations))
    categories = _categories(content["categories"], str(annotations))
    pictures = {entry["id"]: entry for entry in content["images"]}
    missing = [entry["file_name"] for entry in pictures.values() if not (Path(images) / entry["file_name"]).is_file()]
    problems = [f"image {name}: not in {images}" for name in missing]
    shapes: dict[tuple[Any, Any], list[Any]] = {}
    for number, entry in enumerate(content["annotations"]):
        where = f"annotation {entry.get('id', number)}"
        picture, category = pictures.get(entry.get("image_id")), categories.get(entry.get("category_id"))
        if picture is None or category is None:
            what = "image_id" if picture is None else "category_id"
            problems.append(f"{where}: {what} {entry.get(what)!r} is not in the file")
            continue
        try:
            mask = coco_mask(entry.get("segmentation"), picture["height"], picture["width"], where, crossing=crossing)
        except DataError as error:
            problems.append(str(error))
            continue
        shapes.setdefault((picture["id"], entry["category_id"]), []).append(mask_to_rle(mask))
    if problems:
        raise DataError(f"{annotations}: {len(problems)} problems, expected none:{listed(problems)}")
    splits = divided(list(pictures), test_fraction, seed)
    for (image, category), parts in shapes.items():
        picture = pictures[image]
        mask = np.any([rle_to_mask(part) for part in parts], axis=0)
        row = {**texts, "lesion": categories[category]}
        yield FormatRow(Path(images) / picture["file_name"], mask, picture["file_name"], split or splits[image], row)


def coco_mask(
    segmentation: Any, height: int, width: int, where: str = "annotation", *, crossing: bool = False
) -> np.ndarray:
    """Return the mask of one annotation, as pycocotools fills it.

    Args:
        segmentation: Polygons, [[x1, y1, x2, y2, ...], ...], or run lengths, compressed or not.
        height: Of the image, pixels.
        width: Of the image, pixels.
        where: Name of the annotation, for errors.
        crossing: Fill polygons that cross themselves, too, as COCO's own data has them.

    Returns:
        (H, W) bool.

    Raises:
        DataError: Neither; a polygon with fewer than three points, an odd number of numbers, or, without `crossing`,
            that crosses itself; run lengths of another size.

    Example:
        >>> coco_mask([[0, 0, 2, 0, 2, 2, 0, 2]], 3, 3).astype(int).tolist()
        [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    """
    from pycocotools import mask as coco

    if isinstance(segmentation, Mapping):
        size = segmentation.get("size")
        if list(size or ()) != [height, width]:
            raise DataError(f"{where}: run lengths of the size {size}, expected {[height, width]} as the image has")
        counts = segmentation.get("counts")
        if isinstance(counts, str | bytes):
            packed = counts.encode("ascii", "replace") if isinstance(counts, str) else counts
            try:
                return _decoded({"size": [height, width], "counts": packed})
            except (ValueError, TypeError) as error:
                raise DataError(f"{where}: compressed run lengths cannot be read: {error}") from error
        return rle_to_mask(segmentation, where)
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, str) or not segmentation:
        raise DataError(f"{where}: segmentation {segmentation!r:.60}; expected polygons or run lengths")
    for polygon in segmentation:
        _check_polygon(polygon, where, crossing)
    polygons: Any = [list(map(float, polygon)) for polygon in segmentation]
    joined: Any = coco.merge(coco.frPyObjects(polygons, height, width))
    return _decoded(joined)


def _decoded(packed: Any) -> np.ndarray:
    from pycocotools import mask as coco

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools 2.0.11 with NumPy 2
        return np.asarray(coco.decode(packed), dtype=bool)


def _check_polygon(polygon: Any, where: str, crossing: bool) -> None:
    numbers = polygon if isinstance(polygon, Sequence) and not isinstance(polygon, str) else None
    if (
        numbers is None
        or len(numbers) % 2
        or not all(
            isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value) for value in numbers
        )
    ):
        raise DataError(
            f"{where}: polygon {polygon!r:.60}; expected an even number of finite numbers x1, y1, x2, y2, ..."
        )
    points = np.asarray(numbers, dtype=np.float64).reshape(-1, 2)
    if len(points) < 3:
        raise DataError(f"{where}: a polygon of {len(points)} points; expected three or more")
    shape = Polygon(points)
    if not (crossing or shape.is_valid):
        raise DataError(
            f"{where}: a polygon that cannot be filled: {explain_validity(shape)}; draw it anew, or pass --crossing to "
            "fill it as pycocotools does"
        )


def _content(path: Path) -> dict[str, Any]:
    content = read_json(path)
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        raise DataError(f"{path}: expected an object with the lists images, annotations and categories")
    for key, needed in (("images", ("id", "file_name", "height", "width")), ("categories", ("id", "name"))):
        for number, entry in enumerate(content[key]):
            missing = [name for name in needed if not isinstance(entry, dict) or name not in entry]
            if missing:
                raise DataError(f"{path}: {key}[{number}] has no {', '.join(missing)}")
    return content


def _categories(entries: Sequence[Mapping[str, Any]], where: str) -> dict[Any, str]:
    found: dict[Any, str] = {}
    names: dict[str, Any] = {}
    for entry in entries:
        name = str(entry["name"]).strip()
        if (other := names.setdefault(name.casefold(), entry["id"])) != entry["id"]:
            raise DataError(f"{where}: categories {other} and {entry['id']} are both called {name!r}; rename one")
        found[entry["id"]] = name
    return found


def coco_annotations(rows: Sequence[FormatRow]) -> dict[str, Any]:
    """Return rows as COCO's annotations, with run lengths; `read_coco` gives the same masks back.

    Args:
        rows: Images are named by their `name`; a row's category is its lesion.

    Example:
        >>> from PIL import Image
        >>> row = FormatRow(Image.new("RGB", (2, 2)), np.eye(2, dtype=bool), "a.png", "train", {"lesion": "cyst"})
        >>> coco_annotations([row])["annotations"][0]["segmentation"]
        {'size': [2, 2], 'counts': [0, 1, 2, 1]}
    """
    categories = list(dict.fromkeys(row.texts.get("lesion") or "lesion" for row in rows))
    names = list(dict.fromkeys(row.name for row in rows))
    sizes = {row.name: row.mask.shape for row in rows}
    annotations = []
    for number, row in enumerate(rows, 1):
        ys, xs = np.nonzero(row.mask)
        box = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1] if len(xs) else [0, 0, 0, 0]
        category = categories.index(row.texts.get("lesion") or "lesion") + 1
        places = {"id": number, "image_id": names.index(row.name) + 1, "category_id": category, "iscrowd": 1}
        annotations.append({**places, "segmentation": mask_to_rle(row.mask), "bbox": box, "area": len(xs)})
    pictures = [
        {"id": n, "file_name": name, "height": sizes[name][0], "width": sizes[name][1]}
        for n, name in enumerate(names, 1)
    ]
    listed = [{"id": n, "name": name} for n, name in enumerate(categories, 1)]
    return {"images": pictures, "annotations": annotations, "categories": listed}
