"""Hypothesis strategies for arrays, public as `segrl.testing.strategies`: masks, volumes, boxes and points."""

# D slices, H/W pixels, N, M boxes, P points

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError(
        "segrl.testing.strategies and check_reward need hypothesis; pip install 'segrl[testing]'"
    ) from error

__all__ = ["MAX_SIZE", "boxes", "masks", "points", "volumes"]

Draw = st.DrawFn
MAX_SIZE = 16  # pixels: large enough for several lesions, small enough to be read


@st.composite
def masks(
    draw: Draw,
    height: int | None = None,
    width: int | None = None,
    *,
    max_size: int = MAX_SIZE,
    empty: bool | None = None,
    near: np.ndarray | None = None,
) -> np.ndarray:
    """Draw masks: empty and full ones, one or several rectangles and ellipses, and random pixels.

    Args:
        draw: Passed by hypothesis; callers omit it, here and below.
        height: Rows; drawn from 1 to `max_size` if None.
        width: Columns, drawn in the same way if None.
        max_size: Largest drawn edge, pixels.
        empty: True for masks without foreground, False for masks with some; None for both.
        near: (H, W) bool; half of the masks are this one, moved or with some pixels wrong.

    Returns:
        Strategy for writable (H, W) bool arrays.
    """
    if near is not None:
        height, width = near.shape
    height = draw(st.integers(1, max_size)) if height is None else height
    width = draw(st.integers(1, max_size)) if width is None else width
    mask = np.zeros((height, width), dtype=bool)
    if empty:
        return mask
    # Hypothesis shrinks towards fewer choices: an empty mask must take the fewest, a full one not fewer than a small
    # rectangle.
    kind = draw(st.sampled_from(["shapes", "pixels", *(["moved", "wrong pixels"] if near is not None else [])]))
    if kind == "shapes":
        for _ in range(draw(st.sampled_from([1, 2, 3] if empty is False else [0, 1, 2, 3, 0]))):
            _add_shape(draw, mask)
    elif kind == "pixels" or near is None:
        mask = _pixels(draw, height, width)
    else:
        mask = near.copy()
        if kind == "wrong pixels":
            mask ^= _pixels(draw, height, width)
        elif draw(st.booleans()):
            mask = np.roll(mask, (draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))), axis=(0, 1))
    if empty is False and not mask.any():
        mask[draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))] = True
    return mask


def _add_shape(draw: Draw, mask: np.ndarray) -> None:
    height, width = mask.shape
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    tall, wide = draw(st.integers(1, height - top)), draw(st.integers(1, width - left))
    part = mask[top : top + tall, left : left + wide]
    shape = draw(st.sampled_from(["rectangle", "ellipse", "the whole image"]))
    if shape == "ellipse":
        y, x = np.ogrid[:tall, :wide]
        part |= ((y + 0.5) / tall * 2 - 1) ** 2 + ((x + 0.5) / wide * 2 - 1) ** 2 <= 1
        part[tall // 2, wide // 2] = True
    else:
        (part if shape == "rectangle" else mask)[:] = True


def _pixels(draw: Draw, height: int, width: int) -> np.ndarray:
    size = -(-height * width // 8)
    raw = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype=np.uint8)
    return np.unpackbits(raw)[: height * width].reshape(height, width).astype(bool)


@st.composite
def volumes(
    draw: Draw,
    depth: int | None = None,
    height: int | None = None,
    width: int | None = None,
    *,
    max_depth: int = 4,
    max_size: int = MAX_SIZE,
    empty: bool | None = None,
    near: np.ndarray | None = None,
) -> np.ndarray:
    """Draw volumes whose slices are `masks`, about half of them empty.

    Args:
        draw: Passed by hypothesis.
        depth: Slices; drawn from 1 to `max_depth` if None.
        height: Rows, as in `masks`.
        width: Columns.
        max_depth: Largest drawn number of slices.
        max_size: Largest drawn edge, pixels.
        empty: True for volumes without foreground, False for volumes with some; None for both.
        near: (D, H, W) bool; about half of the slices that are not empty are those of this one, moved or with some
            pixels wrong.

    Returns:
        Strategy for (D, H, W) bool arrays.
    """
    if near is not None:
        depth, height, width = near.shape
    depth = draw(st.integers(1, max_depth)) if depth is None else depth
    height = draw(st.integers(1, max_size)) if height is None else height
    width = draw(st.integers(1, max_size)) if width is None else width
    full = draw(st.integers(0, depth - 1)) if empty is False else None
    nothing = [empty is True or (k != full and draw(st.booleans())) for k in range(depth)]
    slices = [
        draw(masks(height, width, empty=nothing[k] or (False if k == full else None), near=_slice_of(near, k)))
        for k in range(depth)
    ]
    return np.stack(slices)


def _slice_of(volume: np.ndarray | None, k: int) -> np.ndarray | None:
    return None if volume is None else volume[k]


@st.composite
def boxes(
    draw: Draw, width: int, height: int, *, near: ArrayLike = (), min_boxes: int = 0, max_boxes: int = 4
) -> np.ndarray:
    """Draw boxes inside an image, some of them repeated or without area.

    Args:
        draw: Passed by hypothesis.
        width: Width of the image, pixels.
        height: Height of the image, pixels.
        near: (M, 4) boxes in pixels; most of the drawn ones are one of these, exactly or a few pixels off.
        min_boxes: Smallest number of boxes.
        max_boxes: Largest number of boxes.

    Returns:
        Strategy for (N, 4) float64 xyxy arrays of whole numbers.
    """
    wanted = np.rint(np.asarray(near, dtype=np.float64)).astype(int).reshape(-1, 4).tolist()
    limits = (width, height, width, height)
    found: list[list[int]] = []
    for _ in range(draw(st.integers(min_boxes, max_boxes))):
        kind = draw(st.sampled_from(["any", *(["same", "near"] if wanted else []), *(["again"] if found else [])]))
        if kind == "any":
            box = [draw(st.integers(0, limit)) for limit in limits]
        else:
            box = draw(st.sampled_from(found if kind == "again" else wanted))
        if kind == "near":
            box = [min(max(edge + draw(st.integers(-2, 2)), 0), limit) for edge, limit in zip(box, limits, strict=True)]
        found.append([min(box[0::2]), min(box[1::2]), max(box[0::2]), max(box[1::2])])
    return np.array(found, dtype=np.float64).reshape(-1, 4)


@st.composite
def points(
    draw: Draw, width: int, height: int, *, near: ArrayLike = (), min_points: int = 0, max_points: int = 4
) -> np.ndarray:
    """Draw points at the centres of pixels.

    Args:
        draw: Passed by hypothesis.
        width: Width of the image, pixels.
        height: Height of the image, pixels.
        near: (M, 2) points; about half of the drawn ones are the pixels of these.
        min_points: Smallest number of points.
        max_points: Largest number of points.

    Returns:
        Strategy for (P, 2) float64 (x, y) arrays, each number a whole one and a half.
    """
    pixels = np.floor(np.asarray(near, dtype=np.float64)).astype(int).reshape(-1, 2)
    wanted = np.clip(pixels, 0, [width - 1, height - 1]).tolist()  # the middle of a box without area may be outside
    found = []
    for _ in range(draw(st.integers(min_points, max_points))):
        if wanted and draw(st.booleans()):
            found.append(draw(st.sampled_from(wanted)))
        else:
            found.append([draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))])
    return np.array(found, dtype=np.float64).reshape(-1, 2) + 0.5
