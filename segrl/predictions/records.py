"""Answers and truths as plain values, in files, JSON and data set columns, read into predictions and targets.

Columns of a truth:

- `mask` or `target_mask`: a path to a PNG or .npy file, run lengths (`segrl.geometry.mask_to_rle`; also as JSON text),
  an encoded image `{"bytes": ...}`, a PIL image or an array, (H, W);
- `boxes`: [[x1, y1, x2, y2], ...] in original pixels. With `mask` they replace the boxes of its components. Without it
  `size`, [width, height], is needed, and the inside of the boxes stands for the mask;
- `volume`: a path to a .npy file, run lengths or an array, (D, H, W), with `spacing_mm`, [z, y, x];
- `query`, `modality`, `anatomy`, `lesion`, `name`: texts.

An answer has the columns `completion`, `predicted_mask` (of a volume in the forms of `volume`), `probability`, and
`frame` where the frame of its boxes, and which slices of a volume were shown, is known: the attributes of a `Frame`.

None and "" stand for a missing value.
"""

# H/W pixels of the original image, D slices, M true boxes

from __future__ import annotations

import io
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
from segrl.geometry.masks import MAX_RLE_PIXELS as MAX_PIXELS
from segrl.geometry.masks import binarize, foreground, mask_to_rle, rle_to_mask
from segrl.predictions.completion_format import CompletionFormat
from segrl.predictions.frames import Frame
from segrl.predictions.parsing import completion_text
from segrl.predictions.prediction import Prediction
from segrl.predictions.target import Target, VolumeTarget

__all__ = [
    "TEXT_COLUMNS",
    "TRUTH_COLUMNS",
    "answer_record",
    "read_answer",
    "read_frame",
    "read_mask",
    "read_probability",
    "read_target",
]

TEXT_COLUMNS = ("query", "modality", "anatomy", "lesion", "name")
TRUTH_COLUMNS = ("mask", "target_mask", "boxes", "size", "volume", "spacing_mm")
UNKNOWN_SIZE = (1000, 1000)  # of an image of which nothing is known; only boxes in pixels depend on it
_BAD_FILE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)  # of PIL and numpy


def answer_record(prediction: Prediction, target: Target | VolumeTarget, frame: Frame) -> dict[str, Any]:
    """A prediction with its truth as plain values that JSON can hold, from which `segrl rewards score` reads both back.

    Args:
        prediction: Its text and mask are kept; what the text says is parsed again when it is read.
        target: Its mask and texts are kept.
        frame: The frame in which the model wrote boxes, with the slices of a volume that were shown.

    Returns:
        The columns `completion`, `predicted_mask` (None where no mask was decoded), `frame`, the truth and the texts
        that are there. The truth is `target_mask` and `boxes`, of a volume `volume` and `spacing_mm`. Masks are run
        lengths, so a volume takes space for its foreground only.
    """
    mask, truth = prediction.mask, mask_to_rle(target.mask)
    volume = isinstance(target, VolumeTarget)
    return {
        **{key: getattr(target, key) for key in TEXT_COLUMNS if getattr(target, key)},
        "completion": prediction.text,
        "predicted_mask": None if mask is None else mask_to_rle(mask),
        "frame": asdict(frame),
        **(
            {"volume": truth, "spacing_mm": [float(size) for size in target.spacing_mm]}
            if volume
            else {"target_mask": truth, "boxes": target.boxes.tolist()}
        ),
    }


def read_frame(value: Any) -> Frame:
    """Read the column `frame`: a mapping with the attributes of a `Frame`, or the same as JSON text.

    Raises:
        DataError: If it is no frame.
    """
    found = _from_json(value, "column 'frame'")
    try:
        sizes = {key: tuple(size) for key, size in found.items() if key != "kind" and size is not None}
        return Frame(found["kind"], **sizes)
    except (SegRLError, TypeError, AttributeError, KeyError) as error:
        raise DataError(f"column 'frame': {value!r:.100}: {error}; expected the attributes of a Frame") from error


def read_target(value: Any, folder: Path | None = None) -> Target | VolumeTarget | None:
    """Read a truth.

    Args:
        value: A mapping with the columns of a truth (others are ignored), the same as JSON text, or a mask alone.
        folder: What relative paths start from.

    Returns:
        A `VolumeTarget` if there is a `volume`, else a `Target`; None if there is no truth at all.

    Raises:
        DataError: If a value is not what its column says; names the column, the value and the fix.

    Example:
        >>> read_target({"boxes": [[1, 2, 5, 4]], "size": [8, 6], "lesion": "cyst"}).mask.sum()
        np.int64(8)
    """
    row = _row(value)
    texts = {key: str(row[key]) for key in TEXT_COLUMNS if _given(row, key)}
    if _given(row, "volume"):
        spacing = _numbers(row["spacing_mm"], "spacing_mm", (3,)) if _given(row, "spacing_mm") else np.ones(3)
        volume = read_mask(row["volume"], "column 'volume'", folder, volume=True)
        return _named("column 'volume'", VolumeTarget.from_mask, volume, tuple(spacing.tolist()), **texts)
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
    """Read a mask in any of its forms; see the module's docstring.

    Args:
        value: The mask.
        name: What it is called in the error message.
        folder: What a relative path starts from.
        volume: Whether it is the mask of a volume, where every positive number is foreground.

    Returns:
        (H, W) bool; (D, H, W) for a volume.

    Raises:
        DataError: A missing or broken file, or anything but a binary mask of so many dimensions.
    """
    value = _from_json(value, name)
    if volume:
        return _volume(value, name, folder)
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        return binarize(_pixels(io.BytesIO(value["bytes"]), name), name)
    if isinstance(value, Mapping) and "counts" not in value and value.get("path"):
        value = value["path"]
    if isinstance(value, Mapping):
        return foreground(rle_to_mask(value, name), name)
    if isinstance(value, str | os.PathLike):
        path = Path(folder or "", value)
        name = f"{name}: {path}"
        return binarize(_load_npy(path, name) if path.suffix == ".npy" else _pixels(path, name), name)
    if isinstance(value, Image.Image | np.ndarray | list):
        try:
            return binarize(np.asarray(value), name)
        except ValueError as error:
            raise error if isinstance(error, SegRLError) else DataError(f"{name}: not an array: {error}") from error
    raise DataError(f"{name}: {value!r:.100}; expected a path, run lengths, an image or an array")


def read_answer(
    completion: Any,
    reading: CompletionFormat,
    target: Target | VolumeTarget | None = None,
    *,
    size: tuple[int, int] | None = None,
    frame: Frame | None = None,
    mask: np.ndarray | None = None,
    probability: np.ndarray | None = None,
) -> Prediction:
    """Parse a completion.

    Args:
        completion: A text, or messages of which the assistant's count.
        reading: How it is read.
        target: The truth, which tells the size of the image.
        size: (width, height) of the image, where there is no truth.
        frame: The frame of the written boxes, where it is known; instead of the reading's.
        mask: (H, W) bool, the decoded mask; (D, H, W) of a volume.
        probability: Its foreground probabilities, float of the same shape.

    Raises:
        DataError: The completion is neither a text nor messages, the mask has another size than the truth, or the frame
            shows slices that the volume does not have.
    """
    try:
        text = completion_text(completion)
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(f"column 'completion': {completion!r:.100}; expected a text or a list of messages") from error
    original = (target.width, target.height) if target is not None else size or UNKNOWN_SIZE
    if frame is None:
        frame = reading.frame(original, original) if callable(reading.frame) else Frame(reading.frame, original)
    if isinstance(target, VolumeTarget) and frame.slices is not None and frame.slices[-1] >= target.depth:
        raise DataError(
            f"column 'frame': slice {frame.slices[-1]} of a volume with {target.depth}; expected 0 to "
            f"{target.depth - 1}; is it the truth of another volume?"
        )
    prediction = reading.parse(text, frame)
    if mask is None:
        return prediction
    if target is not None and mask.shape != target.mask.shape:
        raise DataError(
            f"column 'predicted_mask': the mask is {_told(mask.shape)}, the truth {_told(target.mask.shape)}; resize "
            "the prediction to original pixels"
        )
    return _named("column 'probability'", prediction.with_mask, mask, probability)


def read_probability(value: Any, folder: Path | None = None) -> np.ndarray:
    """Read foreground probabilities, (H, W) float32: a .npy file, or an array.

    Raises:
        DataError: A missing or broken file.
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
    """The value of a JSON text; any other value, such as a path, as it is."""
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
    """`value` as float64 of a shape, in which -1 stands for any length."""
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


def _told(shape: tuple[int, ...]) -> str:
    """The size of a mask: width x height, and of a volume how many slices of it."""
    *depth, height, width = shape
    return f"{width} x {height} px" + (f" on {depth[0]} slices" if depth else "")


def _load_npy(path: Path, name: str) -> np.ndarray:
    try:
        loaded = np.load(path, allow_pickle=False)
    except _BAD_FILE as error:
        raise _unreadable(name, error) from error
    if not isinstance(loaded, np.ndarray):
        raise DataError(f"{name}: holds several arrays; expected one, saved by numpy.save")
    return loaded


def _pixels(source: Path | io.BytesIO, name: str) -> np.ndarray:
    try:
        with Image.open(source) as image:
            return np.asarray(image)
    except _BAD_FILE as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: BaseException) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{name}: no such file; relative paths start from the folder of the file that names them")
    return DataError(f"{name}: cannot be read: {error}")


def _inside(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: every pixel that a box touches."""
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
    """Call a function; its errors name the column."""
    try:
        return function(*args, **kwargs)
    except (DataError, ValueError) as error:
        message = str(error)
        raise DataError(message if message.startswith(name) else f"{name}: {message}") from error
