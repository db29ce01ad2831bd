"""Binary masks: reading them, their boxes, their size, and the one rule for empty masks.

A mask is an array (H, W), bool or integer; every nonzero pixel is foreground, so {0, 1} and {0, 255} mean the same.

The empty-mask rule, `empty_score`, is used by every metric and reward of segrl: an empty prediction of an empty ground
truth scores 1.0, and if exactly one of the two is empty the score is 0.0. The losses tend to the same limits.
"""

# N components, D slices, H/W pixels

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from segrl.errors import DataError
from segrl.geometry.boxes import validate_boxes
from segrl.geometry.run_lengths import counts_to_text, text_to_counts

if TYPE_CHECKING:
    import torch

__all__ = [
    "BOTH_EMPTY_SCORE",
    "ONE_EMPTY_SCORE",
    "boxes_from_mask",
    "deepest_points",
    "empty_score",
    "foreground",
    "mask_to_box",
    "mask_to_rle",
    "resize_mask",
    "rle_to_mask",
    "soft_target",
]

BOTH_EMPTY_SCORE = 1.0
ONE_EMPTY_SCORE = 0.0
EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)
MAX_RLE_PIXELS = 2**30  # 4,096 slices of 512 x 512 px; a few bytes of text must not ask for all memory


def empty_score(pred_empty: bool, true_empty: bool) -> float | None:
    """Return the score of two masks (or lists of boxes) if at least one of them is empty.

    Args:
        pred_empty: Whether the prediction is empty.
        true_empty: Whether the ground truth is empty.

    Returns:
        1.0 if both are empty, 0.0 if exactly one is, `None` if neither is and the ordinary formula applies.

    Example:
        >>> empty_score(True, True), empty_score(True, False), empty_score(False, False)
        (1.0, 0.0, None)
    """
    if pred_empty and true_empty:
        return BOTH_EMPTY_SCORE
    return ONE_EMPTY_SCORE if pred_empty or true_empty else None


def foreground(mask: ArrayLike, name: str = "mask", *, ndim: int | None = 2) -> np.ndarray:
    """Return the foreground (nonzero pixels) of a bool or integer mask.

    Args:
        mask: (H, W), or any shape with `ndim=None`; bool or integer.
        name: Name of the mask in error messages.
        ndim: Required number of dimensions; `None` accepts any.

    Returns:
        bool array of the same shape; the input itself if it is bool already.

    Raises:
        DataError: Wrong number of dimensions, negative values, which mark something else than a foreground, or a float
            mask: the foreground of logits or probabilities is a choice.

    Example:
        >>> foreground([[0, 255], [1, 0]]).tolist()
        [[False, True], [True, False]]
    """
    array = np.asarray(mask)
    if ndim is not None and array.ndim != ndim:
        raise DataError(f"{name}: expected {ndim} dimensions, got shape {array.shape}")
    if array.dtype == np.bool_:
        return array
    if not np.issubdtype(array.dtype, np.integer):
        raise DataError(
            f"{name}: expected a bool or integer mask, got {array.dtype}; threshold it first, as in mask > 0"
        )
    if np.issubdtype(array.dtype, np.signedinteger) and array.min(initial=0) < 0:
        raise DataError(
            f"{name}: has negative values, down to {array.min()}; expected 0 for the background; threshold it first, "
            "as in mask > 0"
        )
    return array != 0


def boxes_from_mask(mask: ArrayLike, min_area: int = 1) -> np.ndarray:
    """Compute the bounding boxes of the connected components (8-connectivity).

    Args:
        mask: (H, W) bool or integer.
        min_area: Components with fewer pixels are left out.

    Returns:
        (N, 4) float64 xyxy half-open boxes in the pixels of the mask, sorted by component area (largest first), then by
        y1, then by x1; a one-pixel component has a box of area 1. (0, 4) for an empty mask.

    Raises:
        DataError: As `foreground`.

    Example:
        >>> boxes_from_mask([[1, 0, 0, 1], [0, 1, 0, 0]]).tolist()
        [[0.0, 0.0, 2.0, 2.0], [3.0, 0.0, 4.0, 1.0]]
    """
    inside = foreground(mask)
    whole = mask_to_box(inside)
    if whole is None:
        return np.zeros((0, 4))
    left, top, right, bottom = whole.astype(int)
    # Only the box around the foreground is labelled: labelling is slow, and lesions are small.
    labels, count = ndimage.label(inside[top:bottom, left:right], structure=EIGHT_CONNECTED)  # pyright: ignore[reportGeneralTypeIssues]
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    boxes = np.array([(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(labels)], dtype=np.float64)
    order = np.lexsort((boxes[:, 0], boxes[:, 1], -areas))
    return boxes[order[areas[order] >= min_area]] + (left, top, left, top)


def deepest_points(mask: ArrayLike, boxes: ArrayLike) -> np.ndarray:
    """Compute one point well inside the lesion of each box: its foreground pixel farthest from any background.

    Args:
        mask: (H, W) bool or integer.
        boxes: (N, 4) xyxy half-open boxes in the pixels of the mask.

    Returns:
        (N, 2) float64 (x, y), the centre of that pixel (the first one in reading order); the centre of the box where it
        holds no foreground. The border of the box counts as background. (0, 2) for no boxes.

    Raises:
        DataError: As `foreground`, or invalid boxes.

    Example:
        >>> deepest_points(np.ones((5, 5), dtype=bool), [[0, 0, 5, 3]]).tolist()
        [[1.5, 1.5]]
    """
    inside = foreground(mask)
    array = validate_boxes(boxes)
    points = (array[:, :2] + array[:, 2:]) / 2
    for n, (x1, y1, x2, y2) in enumerate(array):
        left, top = max(int(np.floor(x1)), 0), max(int(np.floor(y1)), 0)
        crop = inside[top : max(int(np.ceil(y2)), top), left : max(int(np.ceil(x2)), left)]
        if crop.any():
            depth = np.asarray(ndimage.distance_transform_edt(np.pad(crop, 1)))
            y, x = np.unravel_index(np.argmax(depth), depth.shape)
            points[n] = left + x - 0.5, top + y - 0.5
    return points


def mask_to_box(mask: ArrayLike) -> np.ndarray | None:
    """Compute the bounding box of the whole foreground.

    Args:
        mask: (H, W) bool or integer.

    Returns:
        (4,) float64 xyxy half-open box in the pixels of the mask, or `None` for an empty mask.

    Raises:
        DataError: As `foreground`.

    Example:
        >>> mask_to_box([[0, 1, 0, 0], [0, 0, 0, 1]]).tolist()
        [1.0, 0.0, 4.0, 2.0]
    """
    inside = foreground(mask)
    # The first and last foreground pixel, in reading order: a search in memory is faster than a reduction of each row.
    eights = np.packbits(inside)  # 8 pixels a byte, the first in the highest bit
    used = (eights != 0).tobytes()
    first, last = used.find(1), used.rfind(1)
    if first < 0:
        return None
    after = int(eights[last])
    first = 8 * first + 8 - int(eights[first]).bit_length()
    last = 8 * last + 8 - (after & -after).bit_length()
    top, bottom = first // inside.shape[1], last // inside.shape[1] + 1
    columns = np.flatnonzero(inside[top:bottom].any(axis=0))
    return np.array([columns[0], top, columns[-1] + 1, bottom], dtype=np.float64)


def mask_to_rle(mask: ArrayLike, *, compressed: bool = False) -> dict[str, Any]:
    """Encode a mask as run lengths in one of COCO's formats, which pycocotools reads too.

    The pixels are read column by column; `counts` are the lengths of the runs, background first (0 if the first pixel
    is foreground). A volume has the counts of its slices side by side, (H, D * W).

    Args:
        mask: (H, W) or a volume (D, H, W), bool or integer.
        compressed: Write the counts as a text, about a tenth as long in JSON.

    Returns:
        `{"size": [H, W], "counts": [...]}` or `{"size": [D, H, W], "counts": [...]}`, which JSON and parquet can hold;
        the counts are one text if `compressed`.

    Raises:
        DataError: Another number of dimensions, a float mask, negative values, or more than 2**30 pixels.

    Example:
        >>> mask_to_rle(np.array([[0, 1, 1], [0, 1, 0]]))
        {'size': [2, 3], 'counts': [2, 3, 1]}
        >>> mask_to_rle(np.array([[0, 1, 1], [0, 1, 0]]), compressed=True)
        {'size': [2, 3], 'counts': '231'}
    """
    inside = foreground(mask, ndim=3 if np.ndim(mask) == 3 else 2)
    if inside.size > MAX_RLE_PIXELS:
        raise DataError(f"mask: shape {inside.shape}; expected at most {MAX_RLE_PIXELS} pixels, what rle_to_mask reads")
    first, columns = 0, inside
    if inside.ndim == 2:  # lesions are small: columns without one are one run
        box = mask_to_box(inside)
        left, right = (0, 0) if box is None else (int(box[0]), int(box[2]))
        first, columns = left * inside.shape[0], inside[:, left:right]
    pixels = np.zeros(columns.size + 2, dtype=bool)  # background around them
    pixels[1:-1] = columns.swapaxes(-1, -2).ravel()
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + first
    if changes.size and changes[-1] == inside.size:
        changes = changes[:-1]
    counts = np.diff(changes, prepend=0, append=inside.size)
    return {"size": list(inside.shape), "counts": counts_to_text(counts) if compressed else counts.tolist()}


def rle_to_mask(rle: Mapping[str, Any], name: str = "mask") -> np.ndarray:
    """Decode run lengths, the inverse of `mask_to_rle`.

    Args:
        rle: A mapping with `size`, [H, W] or [D, H, W], and `counts`, compressed or not. Runs of length 0 are accepted.
        name: Name of the mask in error messages.

    Returns:
        (H, W) or (D, H, W) bool.

    Raises:
        DataError: A missing key, a size that is not two or three positive integers, more than 2**30 pixels, or counts
            that are not whole numbers of 0 or more with the sum H * W or D * H * W, or no text of such.

    Example:
        >>> rle_to_mask({"size": [2, 3], "counts": [2, 3, 1]}).astype(int).tolist()
        [[0, 1, 1], [0, 1, 0]]
    """
    if not isinstance(rle, Mapping) or not {"size", "counts"} <= rle.keys():
        raise DataError(f"{name}: {rle!r:.100}; expected run lengths, such as {{'size': [2, 3], 'counts': [2, 3, 1]}}")
    given = rle["counts"]
    given = text_to_counts(given, name) if isinstance(given, str | bytes) else given
    size, counts = _whole_numbers(rle["size"]), _whole_numbers(given)
    if size is None or size.shape not in ((2,), (3,)) or size.min() < 1 or size.max() > MAX_RLE_PIXELS:
        raise DataError(
            f"{name}: size {rle['size']!r:.100}; expected [height, width], two positive whole numbers, or for a volume "
            "[slices, height, width]"
        )
    pixels = math.prod(size.tolist())  # Python's integers do not overflow
    if pixels > MAX_RLE_PIXELS:
        raise DataError(f"{name}: size {size.tolist()}; expected at most {MAX_RLE_PIXELS} pixels")
    if counts is None or counts.ndim != 1 or counts.size == 0 or counts.min() < 0:
        raise DataError(f"{name}: counts {rle['counts']!r:.100}; expected a list of whole numbers, 0 or more")
    total = sum(counts.tolist())
    if total != pixels:
        raise DataError(
            f"{name}: the counts cover {total} pixels; expected {pixels}, for the size {size.tolist()} (height, width; "
            "for a volume after the slices)"
        )
    runs = np.repeat(np.arange(counts.size) % 2 == 1, counts)
    *depth, height, width = size.tolist()
    return np.ascontiguousarray(runs.reshape(*depth, width, height).swapaxes(-1, -2))


def resize_mask(mask: ArrayLike, size_hw: tuple[int, int]) -> np.ndarray:
    """Resize by nearest neighbour, taking pixel centres as sample points.

    Args:
        mask: (H, W) bool or integer.
        size_hw: New (height, width).

    Returns:
        (height, width) bool; an empty mask stays empty, a lesion smaller than the sampling step can vanish.

    Raises:
        DataError: As `foreground`, a mask without pixels, or a new size below 1.

    Example:
        >>> resize_mask([[1, 0]], (2, 4)).astype(int).tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0]]
    """
    inside = foreground(mask)
    _check_sizes(inside.shape, size_hw)
    rows, columns = (
        # Integers keep ties exact: the centre of new pixel i is (i + 1/2) * old / new.
        (2 * np.arange(new) + 1) * old // (2 * new)
        for old, new in zip(inside.shape, size_hw, strict=True)
    )
    return inside[rows[:, None], columns[None]]


def soft_target(mask: ArrayLike, size_hw: tuple[int, int], *, quantised: bool = False) -> torch.Tensor:
    """Resize by exact area averaging: each value is the share of its pixel that is covered, so no lesion vanishes.

    Args:
        mask: (H, W) bool or integer.
        size_hw: New (height, width), for example that of the mask logits.
        quantised: Return `round(255 * share)` as uint8, a quarter of the memory; divide by 255 before the loss.

    Returns:
        (height, width) CPU tensor, float32 in [0, 1] or uint8 in 0..255. The mean over the float values equals the mean
        over the mask; an empty mask gives zeros.

    Raises:
        DataError: As `resize_mask`.

    Example:
        >>> soft_target([[1, 0, 0, 0], [1, 1, 0, 0]], (1, 2)).tolist()
        [[0.75, 0.0]]
    """
    import torch  # here, because checking data and reading reports should not wait for torch to load

    inside = foreground(mask)
    _check_sizes(inside.shape, size_hw)
    rows, columns = (_area_weights(old, new) for old, new in zip(inside.shape, size_hw, strict=True))
    share = np.clip(rows @ inside.astype(np.float32) @ columns.T, 0.0, 1.0)
    return torch.from_numpy(np.rint(share * 255).astype(np.uint8) if quantised else share)


def _whole_numbers(values: Any) -> np.ndarray | None:
    """Return `values` as int64, or None if they are not whole numbers."""
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        return None
    return array.astype(np.int64) if np.issubdtype(array.dtype, np.integer) else None


def _area_weights(old: int, new: int) -> np.ndarray:
    """Compute the share of new pixel i that old pixel j covers, (new, old) float32; rows sum to 1."""
    start = np.arange(new)[:, None] * old
    left, right = np.arange(old)[None] * new, (np.arange(old)[None] + 1) * new
    overlap = np.minimum(start + old, right) - np.maximum(start, left)
    return (np.maximum(overlap, 0) / old).astype(np.float32)


def _check_sizes(old_hw: tuple[int, ...], new_hw: tuple[int, int]) -> None:
    if min(old_hw) < 1 or len(new_hw) != 2 or min(new_hw) < 1:
        raise DataError(
            f"cannot resize a mask of shape {old_hw} to {tuple(new_hw)}; both need a height and width of at least 1"
        )
