"""Predictions and ground truths as plain values (files, JSON, data set columns), written and read back.

Columns of a ground truth:

- `mask` or `target_mask`: a path to a PNG or .npy file, run lengths (`segrl.geometry.mask_to_rle`; also as JSON text),
  an encoded image `{"bytes": ...}`, a PIL image or an array, (H, W);
- `boxes`: [[x1, y1, x2, y2], ...] in original pixels. With `mask` they replace the boxes of its components. Without it
  `size`, [width, height], is needed, and the inside of the boxes is the mask;
- `volume`: a path to a .npy file, run lengths or an array, (D, H, W), with `spacing_mm`, [z, y, x], if it is known;
- `query`, `modality`, `anatomy`, `lesion`, `name`: texts.

A prediction has the columns `completion`, `predicted_mask` (for a volume in one of the forms of `volume`),
`probability`, and `frame`: the attributes of the `Frame` of its boxes, if it is known.

None and "" are missing values.
"""

# H/W pixels of the original image, D slices, M ground truth boxes

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segrl.errors import DataError, SegRLError
from segrl.geometry.boxes import validate_boxes
from segrl.geometry.image_files import check_file
from segrl.geometry.mask_images import binarize, read_mask_file
from segrl.geometry.masks import MAX_RLE_PIXELS as MAX_PIXELS
from segrl.geometry.masks import foreground, mask_to_rle, rle_to_mask
from segrl.predictions.completion_format import CompletionFormat
from segrl.predictions.frames import Frame
from segrl.predictions.parsing import completion_text
from segrl.predictions.prediction import Prediction
from segrl.predictions.target import METADATA_COLUMNS, Target, VolumeTarget, text_of

__all__ = [
    "TARGET_COLUMNS",
    "answer_record",
    "read_answer",
    "read_frame",
    "read_mask",
    "read_probability",
    "read_target",
]

TARGET_COLUMNS = ("mask", "target_mask", "boxes", "size", "volume", "spacing_mm")
UNKNOWN_SIZE = (1000, 1000)  # px, of an image without ground truth; only boxes in pixels depend on it
_BAD_FILE = (OSError, ValueError, EOFError, OverflowError, MemoryError)  # raised by numpy


def answer_record(prediction: Prediction, target: Target | VolumeTarget, frame: Frame) -> dict[str, Any]:
    """Return a prediction with its ground truth as plain values for JSON; `segrl rewards score` reads both back.

    Args:
        prediction: Its text and mask are kept; the text is parsed again when it is read.
        target: Its mask and metadata are kept.
        frame: The frame in which the model wrote boxes, with the slices of a volume that were shown.

    Returns:
        The columns `completion`, `predicted_mask` (None if no mask was decoded), `frame`, the metadata that is not
        empty, and the ground truth: `target_mask` and `boxes`, for a volume `volume` and `spacing_mm`. Masks are run
        lengths, so a volume takes space for its foreground only.

    Example:
        >>> from segrl.predictions import parse_completion
        >>> target, frame = Target.from_mask([[0, 1, 1]], lesion="cyst"), Frame("original_px", (3, 1))
        >>> record = answer_record(parse_completion("None.", frame), target, frame)
        >>> record["lesion"], record["completion"], record["target_mask"], record["boxes"]
        ('cyst', 'None.', {'size': [1, 3], 'counts': [1, 2]}, [[1.0, 0.0, 3.0, 1.0]])
    """
    mask, true_mask = prediction.mask, mask_to_rle(target.mask)
    volume = isinstance(target, VolumeTarget)
    return {
        **{column: text for column, text in target.to_dict().items() if text},
        "completion": prediction.text,
        "predicted_mask": None if mask is None else mask_to_rle(mask),
        "frame": asdict(frame),
        **(
            {"volume": true_mask, "spacing_mm": target.spacing_mm and list(map(float, target.spacing_mm))}
            if volume
            else {"target_mask": true_mask, "boxes": target.boxes.tolist()}
        ),
    }


def read_frame(value: Any) -> Frame:
    """Read the column `frame`: a mapping with the attributes of a `Frame`, or the same as JSON text.

    Raises:
        DataError: If it is no frame.

    Example:
        >>> read_frame('{"kind": "relative_1000", "original_size": [200, 100]}').to_original([[500, 0, 1000, 500]])
        array([[100.,   0., 200.,  50.]])
    """
    found = _from_json(value, "column 'frame'")
    try:
        sizes = {key: tuple(size) for key, size in found.items() if key != "kind" and size is not None}
        return Frame(found["kind"], **sizes)
    except (SegRLError, TypeError, AttributeError, KeyError) as error:
        raise DataError(f"column 'frame': {value!r:.100}: {error}; expected the attributes of a Frame") from error


def read_target(value: Any, folder: Path | None = None) -> Target | VolumeTarget | None:
    """Read a ground truth.

    Args:
        value: A mapping with the columns of a ground truth (others are ignored), the same as JSON text, or a mask.
        folder: Folder that relative paths start from.

    Returns:
        A `VolumeTarget` if there is a `volume`, else a `Target`; None if there is neither mask nor boxes.

    Raises:
        DataError: If a value does not fit its column; names the column, the value and the fix.

    Example:
        >>> read_target({"boxes": [[1, 2, 5, 4]], "size": [8, 6], "lesion": "cyst"}).mask.sum()
        np.int64(8)
    """
    row = _row(value)
    texts = {key: text_of(row[key], key) for key in METADATA_COLUMNS if _given(row, key)}
    if _given(row, "volume"):
        given = _numbers(row["spacing_mm"], "spacing_mm", (3,)).tolist() if _given(row, "spacing_mm") else None
        volume = read_mask(row["volume"], "column 'volume'", folder, volume=True)
        spacing = None if given is None else tuple(given)
        return _named("column 'volume'", VolumeTarget.from_mask, volume, spacing, **texts)
    column = next((column for column in ("mask", "target_mask") if _given(row, column)), None)
    boxes = _numbers(row["boxes"], "boxes", (-1, 4)) if _given(row, "boxes") else None
    size = _size(row["size"]) if _given(row, "size") else None
    if column is not None:
        mask = read_mask(row[column], f"column {column!r}", folder)
        if size is not None and mask.shape != size[::-1]:
            raise DataError(
                f"column {column!r}: the mask is {mask.shape[1]} x {mask.shape[0]} px; expected {size[0]} x {size[1]}, "
                "as the column 'size' says (width, height)"
            )
    elif boxes is None:
        return None
    elif size is None:
        raise DataError("column 'boxes': without a mask the column 'size' is needed, [width, height] in pixels")
    else:
        mask = _inside(boxes, size)
    if boxes is None:
        return _named(f"column {column!r}", Target.from_mask, mask, **texts)
    _check_true_boxes(boxes, mask.shape)
    return _named("column 'boxes'", Target, mask, boxes, **texts)


def read_mask(value: Any, name: str = "mask", folder: Path | None = None, *, volume: bool = False) -> np.ndarray:
    """Read a mask in any of the forms that the module's docstring lists.

    Args:
        value: The mask.
        name: Name of the mask in error messages.
        folder: Folder that a relative path starts from.
        volume: Whether it is the mask of a volume, where every nonzero number is foreground.

    Returns:
        (H, W) bool; (D, H, W) for a volume.

    Raises:
        DataError: A missing or broken file, or not a binary mask with this number of dimensions.

    Example:
        >>> read_mask({"size": [2, 2], "counts": [3, 1]}).astype(int).tolist()
        [[0, 0], [0, 1]]
    """
    value = _from_json(value, name)
    if volume:
        return _volume(value, name, folder)
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        return read_mask_file(value, name)
    if isinstance(value, Mapping) and "counts" not in value and value.get("path"):
        value = value["path"]
    if isinstance(value, Mapping):
        return foreground(rle_to_mask(value, name), name)
    if isinstance(value, str | os.PathLike):
        path = Path(folder or "", value)
        name = f"{name}: {path}"
        if path.suffix == ".npy":
            return binarize(_load_npy(path, name), name)
        _must_exist(path, name)
        return read_mask_file(path, name)
    if isinstance(value, Image.Image | np.ndarray | list):
        return binarize(value, name)
    raise DataError(f"{name}: {value!r:.100}; expected a path, run lengths, an image or an array")


def read_answer(
    completion: Any,
    completion_format: CompletionFormat,
    target: Target | VolumeTarget | None = None,
    *,
    size: tuple[int, int] | None = None,
    frame: Frame | None = None,
    mask: np.ndarray | None = None,
    probability: np.ndarray | None = None,
) -> Prediction:
    """Parse a completion and add the mask that was decoded for it.

    Args:
        completion: A text, or messages; see `segrl.predictions.completion_text`.
        completion_format: Grammar and frame of the completion.
        target: The ground truth; the frame needs the size of its image.
        size: (width, height) of the image, if there is no ground truth.
        frame: The frame of the written boxes, if it is known; replaces that of `completion_format`.
        mask: (H, W) bool, the decoded mask; (D, H, W) for a volume.
        probability: Foreground probabilities of the mask, float of the same shape.

    Raises:
        DataError: The completion is neither a text nor messages, the size of the mask is not that of the ground truth,
            or the frame shows slices that the volume does not have.

    Example:
        >>> answer = "<think>Dark.</think><answer>At [500, 0, 1000, 500].<seg></answer>"
        >>> read_answer(answer, CompletionFormat(), size=(200, 100)).boxes.tolist()
        [[100.0, 0.0, 200.0, 50.0]]
    """
    try:
        text = completion_text(completion)
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(f"column 'completion': {completion!r:.100}; expected a text or a list of messages") from error
    original = (target.width, target.height) if target is not None else size or UNKNOWN_SIZE
    if frame is None:
        frame = completion_format.frame_of(original, original)
    if isinstance(target, VolumeTarget) and frame.slices is not None and frame.slices[-1] >= target.depth:
        raise DataError(
            f"column 'frame': slice {frame.slices[-1]} of a volume with {target.depth}; expected 0 to "
            f"{target.depth - 1}; is it the truth of another volume?"
        )
    prediction = completion_format.parse(text, frame)
    if mask is None:
        return prediction
    if target is not None and mask.shape != target.mask.shape:
        raise DataError(
            f"column 'predicted_mask': the mask is {_size_text(mask.shape)}, the truth "
            f"{_size_text(target.mask.shape)}; resize "
            "the prediction to original pixels"
        )
    return _named("column 'probability'", prediction.with_mask, mask, probability)


def read_probability(value: Any, folder: Path | None = None) -> np.ndarray:
    """Read foreground probabilities.

    Args:
        value: Path to a .npy file, or an array.
        folder: Folder that a relative path starts from.

    Returns:
        (H, W) float32.

    Raises:
        DataError: A missing or broken file, or other numbers than (H, W).

    Example:
        >>> read_probability([[0.25, 1]])
        array([[0.25, 1.  ]], dtype=float32)
    """
    path = Path(folder or "", value) if isinstance(value, str | os.PathLike) else None
    values = value if path is None else _load_npy(path, f"column 'probability': {path}")
    return np.asarray(_numbers(values, "probability", (-1, -1)), dtype=np.float32)


def _row(value: Any) -> Mapping[str, Any]:
    value = _from_json(value, "the truth")
    if value is None or (isinstance(value, Mapping) and "counts" not in value and "bytes" not in value):
        return value or {}
    return {"mask": value}


def _from_json(value: Any, name: str) -> Any:
    """Decode a JSON text; return any other value, such as a path, unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: {value!r:.100} is not valid JSON: {error}") from error


def _given(row: Mapping[str, Any], column: str) -> bool:
    value = row.get(column)
    return value is not None and not (isinstance(value, str) and not value)


def _size(value: Any) -> tuple[int, int]:
    numbers = _numbers(value, "size", (2,))
    if (numbers < 1).any() or (numbers != np.floor(numbers)).any() or numbers.prod() > MAX_PIXELS:
        raise DataError(f"column 'size': {value!r:.100}; expected [width, height] in pixels")
    return int(numbers[0]), int(numbers[1])


def _numbers(value: Any, column: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return `value` as float64 of a shape, in which -1 is any length."""
    expected = "(" + ", ".join("n" if edge < 0 else str(edge) for edge in shape) + ")"
    value = _from_json(value, f"column {column!r}")
    if isinstance(value, np.ndarray) and value.dtype == object:  # nested lists that came through parquet
        value = [item.tolist() if isinstance(item, np.ndarray) else item for item in value]
    try:
        array = np.asarray(value)
        array = array.astype(np.float64) if array.dtype.kind in "iuf" else None
    except ValueError:  # lists of different lengths
        array = None
    if array is not None and array.size == 0 and shape[0] < 0:
        array = array.reshape(0, *shape[1:])
    fits = array is not None and array.ndim == len(shape)
    if array is None or not fits or any(a != b for a, b in zip(array.shape, shape, strict=True) if b >= 0):
        raise DataError(f"column {column!r}: {value!r:.100}; expected numbers of shape {expected}")
    return array


def _volume(value: Any, name: str, folder: Path | None) -> np.ndarray:
    if isinstance(value, Mapping):
        found = rle_to_mask(value, name)
    elif isinstance(value, np.ndarray | list):
        try:
            found = np.asarray(value)
        except ValueError as error:  # lists of different lengths
            raise DataError(f"{name}: not an array: {error}") from error
    elif isinstance(value, str | os.PathLike) and Path(value).suffix == ".npy":
        path = Path(folder or "", value)
        name = f"{name}: {path}"
        found = _load_npy(path, name)
    else:
        raise DataError(f"{name}: {value!r:.100}; expected a path to a .npy file, saved by numpy.save, or run lengths")
    return foreground(found, name, ndim=3)


def _size_text(shape: tuple[int, ...]) -> str:
    """Format the size of a mask: width x height, and the number of slices of a volume."""
    *depth, height, width = shape
    return f"{width} x {height} px" + (f" on {depth[0]} slices" if depth else "")


def _load_npy(path: Path, name: str) -> np.ndarray:
    _must_exist(path, name)
    try:  # mapped, because the header may declare more than the file holds, and more than fits into memory
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    except _BAD_FILE as error:
        raise DataError(f"{name}: cannot be read: {error}") from error
    if not isinstance(loaded, np.ndarray):
        raise DataError(f"{name}: holds several arrays; expected one, saved by numpy.save")
    return loaded


def _must_exist(path: Path, name: str) -> None:
    if not os.path.lexists(path):
        raise DataError(f"{name}: no such file; relative paths start from the folder of the file that names them")
    check_file(path, name)


def _inside(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return every pixel that a box touches, (H, W) bool."""
    mask = np.zeros(size[::-1], dtype=bool)
    _check_true_boxes(boxes, mask.shape)
    for x1, y1, x2, y2 in boxes:
        mask[int(np.floor(y1)) : int(np.ceil(y2)), int(np.floor(x1)) : int(np.ceil(x2))] = True
    return mask


def _check_true_boxes(boxes: np.ndarray, shape_hw: tuple[int, ...]) -> None:
    _named("column 'boxes'", validate_boxes, boxes)
    for box in boxes.tolist():
        x1, y1, x2, y2 = box
        if not (0 <= x1 < x2 <= shape_hw[1] and 0 <= y1 < y2 <= shape_hw[0]):
            raise DataError(
                f"column 'boxes': {box} has no area or leaves the image of {shape_hw[1]} x {shape_hw[0]} px; expected "
                "[x1, y1, x2, y2] in original pixels"
            )


def _named(name: str, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Call a function and put the name of the column before its errors."""
    try:
        return function(*args, **kwargs)
    except (DataError, ValueError) as error:
        message = str(error)
        raise DataError(message if message.startswith(name) else f"{name}: {message}") from error
