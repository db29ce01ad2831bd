"""Keys of content: equal images have equal keys, whichever object holds them."""

from __future__ import annotations

import hashlib
from itertools import count
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

__all__ = ["ImageKeys"]


class ImageKeys:
    """Content of images as short strings; each object is read once in the life of this object.

    What is no PIL image, array or tensor has a key of its own, so that nothing unknown is ever taken for equal.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, str]] = {}  # the image is kept, so that its id stays its own
        self._unknown = count()

    def __call__(self, image: Any) -> str:
        known = self._known.get(id(image))
        if known is None:
            known = self._known[id(image)] = image, self._read(image)
        return known[1]

    def _read(self, image: Any) -> str:
        if isinstance(image, Image.Image):
            palette = image.getpalette() if image.mode == "P" else None
            return _digest((image.mode, image.size, palette, sorted(image.getexif().items())), image.tobytes())
        if isinstance(image, np.ndarray):
            return _digest((image.dtype.str, image.shape), np.ascontiguousarray(image).tobytes())
        if isinstance(image, Tensor):
            return self._read(image.detach().cpu().numpy())
        return f"unknown {next(self._unknown)}"


def _digest(header: Any, content: bytes) -> str:
    digest = hashlib.blake2b(repr(header).encode(), digest_size=16)
    digest.update(content)
    return digest.hexdigest()
