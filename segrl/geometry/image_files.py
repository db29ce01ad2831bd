"""Image files: opened with care, and read in one way by every part of segrl.

A file may hang (a FIFO), declare more pixels than fit into memory, or hold more than one picture. All of that is known
before a pixel is decoded.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from segrl.errors import DataError, SegRLError

__all__ = ["check_file", "image_orientation", "opaque", "open_image", "read_image"]

_ORIENTATION = 0x0112  # EXIF tag
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_BAD_FILE = (OSError, SyntaxError, ValueError, EOFError)  # PIL raises these for broken files


@contextmanager
def open_image(source: Any, name: str = "image") -> Iterator[Image.Image]:
    """Open an image without decoding its pixels, and close it again.

    Args:
        source: A path, the bytes of a file, a mapping with `bytes` or `path` (as `datasets.Image(decode=False)` gives
            it), or a PIL image, which is left open.
        name: File, row or column in error messages.

    Yields:
        The PIL image, not yet rotated as its EXIF tag says.

    Raises:
        DataError: No such file, no regular file (a folder, a FIFO, a device), no image, damage that shows up inside the
            `with` block, several pages, or more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, which is the setting for it.

    Example:
        >>> with open_image(Image.new("L", (3, 2)), "scan") as image:
        ...     image.size
        (3, 2)
    """
    if isinstance(source, Mapping):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if source is None:
        raise DataError(f"{name}: is missing (None); give a file or delete the row")
    file = f" {os.fspath(source)}" if isinstance(source, str | os.PathLike) else ""
    if file:
        check_file(Path(source), name)
    try:
        if isinstance(source, Image.Image):
            _check_declared(source, name)
            yield source
        else:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes | bytearray) else source) as image:
                _check_declared(image, name)
                yield image
    except SegRLError:
        raise
    except _BOMBS as error:
        raise DataError(
            f"{name}: declares too many pixels ({error}); expected at most {Image.MAX_IMAGE_PIXELS}; scale the file "
            f"down, or set PIL.Image.MAX_IMAGE_PIXELS{file and ' [' + file.strip() + ']'}"
        ) from error
    except _BAD_FILE as error:
        raise DataError(
            f"{name}: cannot be decoded ({error}); replace the file{file}{_polygon_advice(file)}"
        ) from error


def read_image(source: Any, name: str = "image") -> Image.Image:
    """Read an image as models see it: upright, RGB, 8 bits a channel.

    Args:
        source: As in `open_image`.
        name: File, row or column in error messages.

    Returns:
        A decoded PIL image in RGB, rotated as its EXIF tag says.

    Raises:
        DataError: As `open_image`; 16-bit or float pixels, whose window is a choice; or transparent pixels, whose
            colour is not known.

    Example:
        >>> read_image(Image.new("L", (3, 2), 7)).getpixel((0, 0))
        (7, 7, 7)
    """
    with open_image(source, name) as image:
        if image.mode[0] in "IF":
            raise DataError(
                f"{name}: has {image.mode} pixels, expected 8 bits per channel; window it and scale it to 0-255"
            )
        upright = ImageOps.exif_transpose(image) if image_orientation(image) != 1 else image
        if not opaque(upright):
            raise DataError(
                f"{name}: has transparent pixels, and what is under them is not known; put it on a background and save "
                "it without an alpha channel"
            )
        return upright.convert("RGB")


def image_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 to 8; 1, upright, without the tag."""
    found = image.getexif().get(_ORIENTATION, 1)
    return found if found in range(1, 9) else 1


def opaque(image: Image.Image) -> bool:
    """Return whether no pixel of an image is transparent."""
    if not image.has_transparency_data:
        return True
    return bool((np.asarray(image.convert("RGBA"))[..., 3] == 255).all())


def check_file(path: Path, name: str) -> None:
    """Refuse a path that is no regular file: opening a FIFO waits for ever.

    Raises:
        DataError: No such file, or a folder, a FIFO or a device.
    """
    if path.is_file():
        return
    if path.is_dir():
        raise DataError(f"{name}: cannot be decoded (a directory); give a file instead of the folder {path}")
    if path.exists():
        raise DataError(f"{name}: {path} is a FIFO or a device, expected a file; copy its content into a file")
    raise DataError(f"{name}: no such file {path}; copy it there or delete the row")


def _check_declared(image: Image.Image, name: str) -> None:
    """Refuse what is known before decoding: too many pixels, several pages."""
    width, height = image.size
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise DataError(
            f"{name}: declares {width} x {height} px, expected at most {most} pixels; scale the file down, or set "
            "PIL.Image.MAX_IMAGE_PIXELS"
        )
    # Photos in MPO have previews behind the main image, which the format puts first.
    pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if pages > 1:
        raise DataError(f"{name}: has {pages} pages, expected one; save each page as a file of its own")


def _polygon_advice(file: str) -> str:
    if file.lower().endswith((".json", ".xml", ".txt", ".svg", ".csv")):
        return "; an outline (polygon) is no mask: fill it with PIL.ImageDraw.Draw(image).polygon and save that as PNG"
    return ""
