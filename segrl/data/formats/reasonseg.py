"""ReasonSeg: an image, polygons with regions to ignore, and questions (Lai et al., "LISA", arXiv:2308.00692).

Layout as in `utils/data_processing.py` of dvlab-research/LISA, 6f95195, read on 2026-11-29; the download was not seen.
It is linked from LISA's page, whose data are for research only; nothing is fetched here.

    ReasonSeg/{train,val,test}/NAME.jpg + NAME.json    {"shapes": [{"label", "points"}], "text": [...], "is_sentence"}
"""

# H, W pixels of an image

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from segrl.data.formats.rows import FormatRow
from segrl.data.formats.sources import listed
from segrl.errors import DataError, unknown_name
from segrl.geometry.image_files import open_image

__all__ = ["read_reasonseg", "reasonseg_mask"]

Questions = Literal["first", "all"]
_SPLITS = ("train", "val", "test")


def read_reasonseg(
    source: str | Path, *, texts: Mapping[str, str], questions: Questions = "first"
) -> Iterator[FormatRow]:
    """Read ReasonSeg, or data in its layout.

    Args:
        source: The folder with train, val or test.
        texts: Columns that every row gets.
        questions: "first": one row for each image, as LISA evaluates; "all": one for each of its texts.

    Raises:
        DataError: No such splits; files without a partner, JSON that cannot be read or lacks a key, shapes without
            three points: all are listed; or OpenCV is not installed.
        UnknownNameError: Another choice of questions.

    Example:
        >>> list(read_reasonseg("no/such/folder", texts={}))
        Traceback (most recent call last):
        segrl.errors.DataError: no/such/folder: none of the folders train, val, test
    """
    if questions not in get_args(Questions):
        raise unknown_name("choice of questions", questions, get_args(Questions))
    home = Path(source)
    splits = [split for split in _SPLITS if (home / split).is_dir()]
    if not splits:
        raise DataError(f"{home}: none of the folders {', '.join(_SPLITS)}")
    files = [(split, path) for split in splits for path in sorted((home / split).glob("*.json"))]
    alone = {path.with_suffix(".json") for split in splits for path in (home / split).glob("*.jpg")}
    problems = [f"{path.with_suffix('.jpg')}: no .json beside it" for path in sorted(alone - {p for _, p in files})]
    contents = []
    for split, path in files:
        try:
            contents.append((split, path.with_suffix(".jpg"), _content(path)))
        except DataError as error:
            problems.append(str(error))
    if problems or not files:
        raise DataError(f"{home}: {len(problems)} problems in {len(files)} files:{listed(problems)}")
    for split, image, content in contents:
        with open_image(image, f"image {image}") as opened:
            size = opened.height, opened.width
        target, ignored = reasonseg_mask(content["shapes"], size, str(image.with_suffix(".json")))
        for text in content["text"][:1] if questions == "first" else content["text"]:
            yield FormatRow(image, target, image.name, split, {**texts, "query": text}, ignored)


def reasonseg_mask(
    shapes: Sequence[Mapping[str, Any]], size: tuple[int, int], where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return target and ignored pixels of one image, drawn as LISA draws them.

    Larger shapes first, each with its outline; a label with "ignore" marks pixels to ignore, "flag" nothing; later
    shapes paint over earlier ones.

    Args:
        shapes: Mappings with "label" and "points".
        size: (H, W) of the image.
        where: The file, for errors.

    Returns:
        Two (H, W) bool.

    Raises:
        DataError: OpenCV is not installed, whose rules of filling LISA uses.

    Example:
        >>> square = {"label": "target", "points": [[1, 1], [3, 1], [3, 3], [1, 3]]}
        >>> target, ignored = reasonseg_mask([square, {**square, "label": "flag"}], (5, 5), "a.json")
        >>> int(target.sum()), int(ignored.sum())  # with the outline
        (9, 0)
    """
    try:
        import cv2
    except ImportError as error:
        raise DataError(
            f"{where}: ReasonSeg's polygons are filled by OpenCV; pip install opencv-python-headless"
        ) from error

    drawn = []
    for shape in shapes:
        label = str(shape["label"]).lower()
        if label == "flag":
            continue
        points = np.array([shape["points"]], dtype=np.int32)  # decimals are cut off, as in the source
        alone = np.zeros(size, dtype=np.uint8)
        _paint(cv2, alone, points, 1)
        drawn.append((int(alone.sum()), points, 255 if "ignore" in label else 1))
    canvas = np.zeros(size, dtype=np.uint8)
    for number in np.argsort([area for area, _, _ in drawn])[::-1]:  # ties in the order of the source
        _, points, value = drawn[number]
        _paint(cv2, canvas, points, value)
    return canvas == 1, canvas == 255


def _paint(cv2: Any, canvas: np.ndarray, points: np.ndarray, value: int) -> None:
    cv2.polylines(canvas, points, True, value, 1)
    cv2.fillPoly(canvas, points, value)


def _content(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("cp1252", "replace")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    missing = [key for key in ("shapes", "text") if not isinstance(content, dict) or not content.get(key)]
    if missing or not path.with_suffix(".jpg").is_file():
        raise DataError(f"{path}: no {', '.join(missing) or path.with_suffix('.jpg').name}")
    content["text"] = [content["text"]] if isinstance(content["text"], str) else list(map(str, content["text"]))
    for number, shape in enumerate(content["shapes"]):
        given = shape if isinstance(shape, dict) else {}
        points = given.get("points")
        drawn = str(given.get("label", "")).lower() != "flag"
        if drawn and ("label" not in given or not isinstance(points, list) or len(points) < 3):
            raise DataError(f"{path}: shape {number} has no label, or fewer than three points")
    return content
