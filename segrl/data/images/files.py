"""Images as users have them: files, arrays and PIL images, of 8 bits or more, turned into what models see."""

# H/W pixels

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segrl.data.dicom.files import is_dicom, read_dicom_image
from segrl.data.volumes.case import say_note, shades
from segrl.data.volumes.intensity import Intensity
from segrl.data.volumes.volume import Volume
from segrl.errors import DataError
from segrl.geometry.image_files import open_image, read_image

__all__ = ["LoadedImage", "load_image"]


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """An image as a model sees it.

    Attributes:
        image: Upright, RGB, 8 bits a channel, in its own size.
        name: Path of the file; "" for one in memory.
        intensity: Text form of the scaling to grey values; "" for an image that has 8 bits.

    Example:
        >>> LoadedImage(Image.new("RGB", (3, 2))).name
        ''
    """

    image: Image.Image
    name: str = ""
    intensity: str = ""


def load_image(source: Any, *, modality: str = "", intensity: str = "") -> LoadedImage:
    """Load one image.

    What has more than 8 bits a channel is scaled to grey values: by `intensity`; else by the window that a DICOM file
    holds; else as `segrl.data.intensity_for` chooses for the modality, which a DICOM file names. The scaling is part of
    the result, since a model answers best about images that are scaled as those of its training were.

    Args:
        source: A path of an image file (PNG, JPEG, TIFF ...) or of a DICOM file with one grey frame; a PIL image; or an
            array (H, W) or (H, W, 3).
        modality: Such as "CT", for images with more than 8 bits.
        intensity: Text form of the scaling, such as "window:-160:240" or "percentile:0.5:99.5".

    Raises:
        DataError: No such file, no image, several pages or frames, transparent pixels, too many pixels (see
            `segrl.geometry.open_image`), an array of another shape or type, or an intensity for an image of 8 bits.

    Example:
        >>> loaded = load_image(np.array([[0, 500], [1000, 4000]], dtype=np.uint16), intensity="window:0:1000")
        >>> np.asarray(loaded.image)[..., 0].tolist(), loaded.intensity
        ([[0, 128], [255, 255]], 'window:0:1000')
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if is_dicom(path):
            return _dicom(path, modality, intensity)
        return _opened(path, str(path), str(path), modality, intensity)
    if isinstance(source, Image.Image | Mapping | bytes):
        return _opened(source, "image", "", modality, intensity)
    if not isinstance(source, np.ndarray):
        raise DataError(f"image: {type(source).__name__}; expected a path, a PIL image or an array (H, W) or (H, W, 3)")
    grey = source.ndim == 2 or (source.ndim == 3 and source.shape[2] == 1)
    if not source.size or not (grey or (source.ndim == 3 and source.shape[2] == 3 and source.dtype == np.uint8)):
        raise DataError(
            f"image: {source.dtype} array of shape {source.shape}; expected (H, W), or (H, W, 3) uint8, with pixels"
        )
    if source.dtype == np.uint8:
        _no_intensity("image", intensity)
        return LoadedImage(Image.fromarray(source[..., 0] if source.ndim == 3 and grey else source).convert("RGB"))
    return _scaled(source.reshape(source.shape[:2]), "image", modality=modality, intensity=intensity)


def _scaled(
    pixels: np.ndarray, where: str, *, name: str = "", modality: str = "", intensity: str = "", inverted: bool = False
) -> LoadedImage:
    """Scale grey pixels (H, W) of any real type to 8 bits, as one slice of a volume.

    Raises:
        DataError: Other numbers, NaN or infinity, or an intensity that is none or blanks the image; begins with
            `where`.
    """
    if pixels.dtype.kind not in "iuf":
        raise DataError(f"{where}: {pixels.dtype} pixels; expected real numbers; scale a mask or a label to 0-255")
    slices = Volume(pixels[np.newaxis].astype(np.float32), name=where, inverted=inverted)
    grey, chosen, _ = shades(slices, modality, intensity)
    return LoadedImage(Image.fromarray(grey[0]).convert("RGB"), name, str(chosen))


def _opened(source: Any, where: str, name: str, modality: str, intensity: str) -> LoadedImage:
    with open_image(source, where) as image:
        if image.mode[0] in "IF":
            return _scaled(np.asarray(image), where, name=name, modality=modality, intensity=intensity)
    _no_intensity(where, intensity)
    return LoadedImage(read_image(source, where), name)


def _dicom(path: Path, modality: str, intensity: str) -> LoadedImage:
    frame = read_dicom_image(path)
    if frame.note and not intensity:
        say_note(f"{str(path)!r}: {frame.note}")
    if not intensity and frame.window is not None:
        intensity = str(Intensity("window", *frame.window))
    kind = modality or frame.modality
    shown = {"modality": kind, "intensity": intensity, "inverted": frame.inverted}
    return _scaled(frame.pixels, str(path), name=str(path), **shown)


def _no_intensity(where: str, intensity: str) -> None:
    if intensity:
        raise DataError(f"{where}: intensity={intensity!r}, and the image has 8 bits; leave the intensity out")
