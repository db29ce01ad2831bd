"""Masks as they come out of files and columns, turned into bool arrays in one way by every part of segrl."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageOps

from segrl.errors import DataError
from segrl.geometry.image_files import image_orientation, opaque, open_image
from segrl.geometry.masks import foreground

__all__ = ["binarize", "mask_values", "read_mask_file", "write_mask_image"]


def read_mask_file(source: Any, name: str = "mask") -> np.ndarray:
    """Read a mask from an image file.

    Args:
        source: A path, the bytes of a file, or a mapping with `bytes` or `path`.
        name: File, row or column in error messages.

    Returns:
        (H, W) bool, upright.

    Raises:
        DataError: As `segrl.geometry.open_image` and `binarize`.

    Example:
        >>> import io
        >>> file = io.BytesIO()
        >>> Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).save(file, format="PNG")
        >>> read_mask_file(file.getvalue()).tolist()
        [[False, True]]
    """
    with open_image(source, name) as image:
        return binarize(image, name)


def write_mask_image(path: str | os.PathLike, mask: ArrayLike) -> None:
    """Write a mask as an image of one channel, 0 and 255; `read_mask_file` reads it back.

    Args:
        path: Its suffix sets the format, which must be without loss, such as PNG; an existing file is replaced.
        mask: (H, W) bool or integer, nonzero being foreground.

    Raises:
        DataError: Another shape, or a format with loss.

    Example:
        >>> write_mask_image("mask.png", np.array([[0, 1]]))
        >>> read_mask_file("mask.png").tolist()
        [[False, True]]
    """
    if Path(path).suffix.lower() not in _WITHOUT_LOSS:
        raise DataError(f"{os.fspath(path)}: expected a name that ends in {', '.join(_WITHOUT_LOSS)}")
    Image.fromarray(foreground(mask, f"mask for {os.fspath(path)}").astype(np.uint8) * 255).save(path)


def mask_values(mask: Any, name: str = "mask") -> np.ndarray:
    """Return the values of a mask as an array, for `binarize`.

    Of an image with a palette the colours count: an index is a position in a list whose order the writing program
    chose, and 0 may be white. An EXIF rotation is applied.

    Args:
        mask: A PIL image, or an array, which is returned as it is.
        name: File or row named in the error message.

    Returns:
        (H, W) or (H, W, C). Of a palette: bool, True where the colour is not black.

    Raises:
        DataError: An image with several pages or with transparent pixels, or a palette with more than two colours in
            use, or two of which none is black; or a list of corners (a polygon).

    Example:
        >>> image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
        >>> image.putpalette([255, 255, 255, 0, 0, 0])
        >>> mask_values(image).tolist()
        [[True, False]]
    """
    if not isinstance(mask, Image.Image):
        try:
            values = np.asarray(mask)
        except ValueError as error:  # lists of different lengths
            raise DataError(f"{name}: not an array: {error}; {_FILL}") from error
        # Corners can look like a mask of two values; arrays are taken at their word.
        if isinstance(mask, list | tuple) and _corners(values) and values.max() not in (0, 1, 255):
            raise DataError(f"{name}: {mask!r:.80} looks like the corners of a polygon; {_FILL}")
        return values
    with open_image(mask, name):
        if not opaque(mask):
            raise DataError(
                f"{name}: the mask has transparent pixels, and what is under them is not known; save it without an "
                "alpha channel, or save that channel itself as the mask"
            )
        upright = ImageOps.exif_transpose(mask) if image_orientation(mask) != 1 else mask
        if upright.mode in ("P", "PA"):
            return _shown(upright, name)
        values = np.asarray(upright)
        return values[..., 0] if upright.mode == "LA" else values[..., :3] if upright.mode == "RGBA" else values


def binarize(array: Any, name: str = "mask") -> np.ndarray:
    """Return a mask read from a file as bool; raise if it is not a binary mask.

    Args:
        array: A PIL image, see `mask_values`, or (H, W), (H, W, 1) or (H, W, 3) with equal channels. Values {0, v} for
            one positive v; a constant zero mask is empty and a constant positive mask is all foreground.
        name: File or row named in the error message.

    Returns:
        (H, W) bool.

    Raises:
        DataError: More than two values, a background that is not 0, NaN, differing channels, or no pixels; and as
            `mask_values`.

    Example:
        >>> binarize([[0, 255]]).tolist(), binarize([[7, 7]]).tolist()
        ([[False, True]], [[True, True]])
    """
    values = mask_values(array, name)
    if values.ndim == 3 and values.shape[2] in (1, 3):
        if (values != values[:, :, :1]).any():
            raise DataError(f"{name}: the 3 channels of the mask differ; save it as an 8-bit mask with one channel")
        values = values[:, :, 0]
    if values.ndim != 2 or values.size == 0:
        raise DataError(f"{name}: expected a mask of shape (H, W) with at least one pixel, got shape {values.shape}")
    if values.dtype == np.bool_:
        return values
    if not np.issubdtype(values.dtype, np.number):
        raise DataError(f"{name}: expected numbers, got {values.dtype}")
    high = values.max()
    inside = values == high
    # NaN fails both comparisons, so it is refused here as well.
    if not (inside | (values == 0)).all() or high < 0:
        found = np.unique(values)
        listed = ", ".join(str(value) for value in found[:5]) + (", ..." if found.size > 5 else "")
        if _corners(values):
            raise DataError(f"{name}: {values.tolist()!r:.80} looks like the corners of a polygon; {_FILL}")
        raise DataError(
            f"{name}: a mask may hold 0 and one positive value, got {found.size} values ({listed}); "
            "threshold it first, as in mask > 127 (a JPEG has grey edges, also when it is saved as PNG), then save it "
            "as PNG with background 0 and one mask per lesion type"
        )
    return inside if high > 0 else np.zeros(values.shape, dtype=bool)


_WITHOUT_LOSS = (".png", ".tif", ".tiff", ".bmp")
_FILL = "a polygon is no mask: fill it with PIL.ImageDraw.Draw(image).polygon on a black image of the image's size"


def _shown(image: Image.Image, name: str) -> np.ndarray:
    """Return where the colour of an image with a palette is not black, (H, W) bool."""
    values = np.asarray(image.convert("RGB"))
    colours = np.unique(values.reshape(-1, 3), axis=0)
    if len(colours) > 2 or (len(colours) == 2 and colours[0].any()):
        listed = ", ".join(str(tuple(map(int, colour))) for colour in colours[:5])
        raise DataError(
            f"{name}: the mask has a palette with {len(colours)} colours in use ({listed}); expected black and one "
            "other colour; save one mask per lesion type"
        )
    return np.asarray(values.any(axis=2))


def _corners(values: np.ndarray) -> bool:
    """Return whether values may be corners of an outline: (N, 2), or x and y in turn in one row (COCO)."""
    if values.ndim != 2 or values.size < 6 or values.dtype.kind not in "iuf":
        return False
    return values.shape[1] == 2 or (values.shape[0] == 1 and values.shape[1] % 2 == 0)
