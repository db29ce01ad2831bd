"""Slices of a volume: which ones are shown, and how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image as PILImage

from segrl.errors import DataError, FrameError
from segrl.predictions.frames import Frame, FrameKind, frame_for

__all__ = ["render_slices", "shown_frame", "uniform_slices"]

_SQUARE = 1e-3  # relative difference of the edges of a pixel up to which it is square: headers are rounded


def render_slices(
    grey: np.ndarray,
    slices: Sequence[int] | np.ndarray,
    size: int,
    spacing_mm: Sequence[float] | None = None,
) -> list[PILImage.Image]:
    """Render slices as the model sees them.

    Args:
        grey: (D, H, W) uint8.
        slices: Indices of the slices to show.
        size: Longest edge in pixels; smaller slices are enlarged to it.
        spacing_mm: Size of a voxel along D, H and W in millimetres: the picture keeps the aspect of the slice in
            millimetres. None, or square pixels, keep that of the pixels.

    Returns:
        One RGB image per slice.

    Example:
        >>> [image.size for image in render_slices(np.zeros((4, 6, 12), np.uint8), [0, 3], 48)]
        [(48, 24), (48, 24)]
        >>> render_slices(np.zeros((1, 256, 24), np.uint8), [0], 256, (1.0, 0.8, 3.9))[0].size  # of a sagittal scan
        (117, 256)
    """
    height, width = (float(edge) for edge in grey.shape[1:])
    if spacing_mm is not None and not math.isclose(spacing_mm[1], spacing_mm[2], rel_tol=_SQUARE):
        height, width = height * spacing_mm[1], width * spacing_mm[2]
    scale = size / max(width, height)
    shown = max(1, round(width * scale)), max(1, round(height * scale))
    images = [PILImage.fromarray(grey[int(index)]) for index in slices]
    return [image.resize(shown, PILImage.Resampling.BICUBIC).convert("RGB") for image in images]


def shown_frame(
    processor: Any,
    shape: Sequence[int],
    slices: Sequence[int] | np.ndarray,
    shown_size: tuple[int, int],
    kind: FrameKind | None = None,
) -> Frame:
    """Return the frame in which a model answers about a volume: of its boxes, and of the numbers of its slices.

    Args:
        processor: The model's processor; may be None where `kind` is "original_px" or "relative_1000".
        shape: (D, H, W) of the volume.
        slices: Indices of the slices that are shown.
        shown_size: (width, height) of a shown slice, pixels.
        kind: Overrides the frame that the processor implies.

    Raises:
        FrameError: As `frame_for`, or neither a processor nor a kind.

    Example:
        >>> frame = shown_frame(None, (10, 40, 60), [0, 5, 9], (30, 20), "relative_1000")
        >>> frame.original_slice(1), frame.to_original([[0, 0, 500, 500]]).tolist()
        (5, [[0.0, 0.0, 30.0, 20.0]])
    """
    original = int(shape[2]), int(shape[1])
    if processor is None:
        if kind is None:
            raise FrameError("processor=None: pass the model's processor, or kind='original_px' or 'relative_1000'")
        frame = Frame(kind, original)
    else:
        frame = frame_for(processor, shown_size, original, kind=kind)
    return replace(frame, slices=tuple(int(index) for index in slices))


def uniform_slices(depth: int, count: int) -> np.ndarray:
    """Choose slices at equal distances over the whole volume, both ends among them.

    Args:
        depth: Slices of the volume, 1 or more.
        count: Slices wanted, 1 or more.

    Returns:
        (min(depth, count),) int64, strictly increasing: all slices when there are no more than wanted, the middle one
        for a count of 1, else from 0 to depth - 1.

    Raises:
        DataError: If a number is below 1.

    Example:
        >>> uniform_slices(10, 4).tolist()
        [0, 3, 6, 9]
    """
    for name, value in (("depth", depth), ("count", count)):
        if value < 1:
            raise DataError(f"{name}={value}: expected 1 slice or more")
    if depth <= count:
        return np.arange(depth, dtype=np.int64)
    if count == 1:
        return np.array([depth // 2], dtype=np.int64)
    steps = np.arange(count, dtype=np.int64)
    return (2 * steps * (depth - 1) + count - 1) // (2 * (count - 1))  # rounded, in exact integers
