"""COCO annotations: polygons and run lengths, one row for each image and category."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from shapely.geometry import Polygon
from shapely.validation import explain_validity

from segrl.data.formats.pairs import divided
from segrl.data.formats.rows import FormatRow, ScanRow, empty_folder
from segrl.data.formats.sources import by_id, listed, named_file, read_json
from segrl.data.formats.writing import ImageFiles, rows_of_images
from segrl.errors import DataError
from segrl.geometry.image_files import open_image
from segrl.geometry.masks import mask_to_rle, rle_to_mask

__all__ = ["coco_annotations", "coco_mask", "coco_tables", "read_coco", "write_coco"]


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
        DataError: No JSON, or of another layout; images or categories with one id, categories whose names are equal;
            annotations that refer to nothing, polygons with fewer than three points or that cross themselves, run
            lengths of another size, images that are not there, are outside the folder or have another size than the
            file says: all are listed.

    Example:
        >>> list(read_coco("no.json", "images", texts={}))
        Traceback (most recent call last):
        segrl.errors.DataError: no.json: cannot be read: No such file or directory
    """
    content = _content(Path(annotations), ("images", "annotations", "categories"))
    pictures, categories = coco_tables(Path(annotations))
    problems = [problem for picture in pictures.values() for problem in _image_problems(picture, Path(images))]
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


def _image_problems(picture: Mapping[str, Any], images: Path) -> Iterator[str]:
    """Yield the problem of an image, if it has one; at another size its masks would be drawn elsewhere."""
    name, said = picture["file_name"], (picture["width"], picture["height"])
    try:
        path = named_file(images, name)
    except DataError as error:
        yield f"image {error}"
        return
    try:
        with open_image(path, f"image {name}") as opened:
            size = opened.size
    except DataError as error:
        yield str(error)
        return
    if said not in (size, size[::-1]):  # an EXIF rotation swaps the two
        yield f"image {name}: {size[0]} x {size[1]} px, expected {said[0]} x {said[1]} as the file says"


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


def coco_tables(path: Path) -> tuple[dict[Any, dict[str, Any]], dict[Any, str]]:
    """Return the images of a file of annotations by their id, and the names of its categories.

    Raises:
        DataError: No JSON, or of another layout; different images or categories with one id, categories whose names
            are equal.

    Example:
        >>> _ = Path("c.json").write_text('{"images": [], "categories": [{"id": 3, "name": "cyst"}]}')
        >>> coco_tables(Path("c.json"))
        ({}, {3: 'cyst'})
    """
    content = _content(path, ("images", "categories"))
    return by_id(content["images"], f"images of {path}"), _categories(content["categories"], str(path))


def _content(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        *first, last = keys
        raise DataError(f"{path}: expected an object with the lists {', '.join(first)} and {last}")
    for key, needed in (("images", ("id", "file_name", "height", "width")), ("categories", ("id", "name"))):
        for number, entry in enumerate(content[key]):
            missing = [name for name in needed if not isinstance(entry, dict) or name not in entry]
            if missing:
                raise DataError(f"{path}: {key}[{number}] has no {', '.join(missing)}")
    return content


def _categories(entries: Sequence[Mapping[str, Any]], where: str) -> dict[Any, str]:
    found: dict[Any, str] = {}
    names: dict[str, Any] = {}
    for entry in by_id(entries, f"categories of {where}").values():
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
    made = _Annotations()
    for row in rows:
        made.add(row, row.name)
    return made.content()


class _Annotations:
    """Annotations of rows that come one by one, without their masks."""

    def __init__(self) -> None:
        self.pictures: dict[str, dict[str, Any]] = {}
        self.categories: dict[str, int] = {}
        self.found: list[dict[str, Any]] = []
        self.asked: set[tuple[str, str]] = set()

    def add(self, row: FormatRow, name: str) -> None:
        lesion = row.texts.get("lesion") or "lesion"
        height, width = row.mask.shape
        picture = {"id": len(self.pictures) + 1, "file_name": name, "height": height, "width": width}
        places = {
            "id": len(self.found) + 1,
            "image_id": self.pictures.setdefault(name, picture)["id"],
            "category_id": self.categories.setdefault(lesion, len(self.categories) + 1),
            "iscrowd": 1,
        }
        ys, xs = np.nonzero(row.mask)
        box = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1] if len(xs) else [0, 0, 0, 0]
        self.found.append({**places, "segmentation": mask_to_rle(row.mask), "bbox": box, "area": len(xs)})

    def content(self) -> dict[str, Any]:
        categories = [{"id": number, "name": name} for name, number in self.categories.items()]
        return {"images": list(self.pictures.values()), "annotations": self.found, "categories": categories}


def write_coco(rows: Iterable[FormatRow | ScanRow], folder: str | Path) -> dict[str, int]:
    """Write COCO's annotations, `SPLIT.json` beside `images/`; `read_coco` gives each split back.

    Args:
        rows: Images with a lesion, which is the category. Other texts are not written.
        folder: A new folder.

    Returns:
        Number of rows of each split.

    Raises:
        DataError: The folder is not empty, a scan, a row without a lesion, two rows about one image and lesion, or
            pixels that do not count.

    Example:
        >>> from PIL import Image
        >>> row = FormatRow(Image.new("RGB", (2, 2)), np.eye(2, dtype=bool), "a", "train", {"lesion": "cyst"})
        >>> write_coco([row], "as_coco")
        export ...
        {'train': 1}
        >>> [row.mask.tolist() for row in read_coco("as_coco/train.json", "as_coco/images", texts={})]
        [[[True, False], [False, True]]]
    """
    with empty_folder(folder) as home:
        files = ImageFiles(home)
        splits: dict[str, _Annotations] = {}
        for row in rows_of_images(rows, "coco"):
            lesion = row.texts.get("lesion") or ""
            if not lesion:
                raise DataError(f"{row.name}: has no lesion, and coco needs a category; fill the column lesion")
            path, _ = files.add(row, "images")
            made = splits.setdefault(row.split or "train", _Annotations())
            if (path.name, lesion.casefold()) in made.asked:
                raise DataError(f"{row.name}: two rows ask for {lesion!r}, and coco has one mask for both; join them")
            made.asked.add((path.name, lesion.casefold()))
            made.add(row, path.name)
        for split, made in splits.items():
            (home / f"{split}.json").write_text(json.dumps(made.content()), encoding="utf-8")
    return {split: len(made.found) for split, made in sorted(splits.items())}
