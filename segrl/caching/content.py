"""Keys of content: equal images, arrays and values have equal keys, whichever object holds them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ImageKeys", "content_key", "raw_bytes"]


def content_key(*parts: Any) -> str:
    """Compute a key of the content of `parts`, the same in every process and run.

    Args:
        *parts: PIL images (mode, size, palette, EXIF and pixels count), arrays and tensors (type, shape and values
            count; an array and a CPU or CUDA tensor of equal values are equal), and plain values: text, bytes, numbers,
            booleans, None, and lists, tuples and mappings of all these.

    Returns:
        32 hexadecimal digits. Other content, another order or another grouping of the parts gives another key.

    Raises:
        TypeError: A part of another type, whose content is not known.

    Example:
        >>> import numpy as np
        >>> image = np.zeros((2, 3), dtype=np.uint8)
        >>> content_key(image, "CT") == content_key(image.copy(), "CT")
        True
        >>> content_key(image, "CT") == content_key(image.T, "CT")
        False
    """
    digest = hashlib.blake2b(digest_size=16)
    _update(digest, parts)
    return digest.hexdigest()


class ImageKeys:
    """Content keys of images; each object is read once in the life of this object.

    An object that `content_key` cannot read gets a unique key.

    Example:
        >>> import numpy as np
        >>> keys = ImageKeys()
        >>> keys(np.zeros(3)) == keys(np.zeros(3)), keys(object()) == keys(object())
        (True, False)
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
        try:
            return content_key(image)
        except TypeError:
            return f"unknown {next(self._unknown)}"


def raw_bytes(tensor: Tensor) -> Any:
    """Return the bytes of a tensor's values as a buffer, without a copy where it is contiguous and on the CPU."""
    import torch  # here and below, because checking data should not wait for torch to load

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _update(digest: Any, part: Any) -> None:
    """Add a part to a hash. The header fixes the number of following bytes, so different lists never look equal."""
    if isinstance(part, Image.Image):
        palette = part.getpalette() if part.mode == "P" else None
        _add(digest, (part.mode, part.size, palette, sorted(part.getexif().items())), part.tobytes())
    elif isinstance(part, np.ndarray | np.generic) and not part.dtype.hasobject:
        _add(digest, (part.dtype.str, part.shape), np.ascontiguousarray(part).reshape(-1).view(np.uint8))
    elif isinstance(part, list | tuple):
        _add(digest, ("list", len(part)))
        for item in part:
            _update(digest, item)
    elif isinstance(part, Mapping):
        _update(digest, ["mapping", *part.items()])
    elif part is None or isinstance(part, str | bytes | bool | int | float):
        _add(digest, part)
    else:
        _update_tensor(digest, part)


def _update_tensor(digest: Any, part: Any) -> None:
    import torch

    if not isinstance(part, torch.Tensor):
        raise TypeError(f"{type(part).__name__}: expected images, arrays, tensors or plain values")
    if part.dtype == torch.bfloat16:  # numpy has no such type
        _add(digest, (str(part.dtype), tuple(part.shape)), raw_bytes(part))
    else:
        _update(digest, part.detach().cpu().numpy())


def _add(digest: Any, header: Any, content: Any = b"") -> None:
    text = repr(header).encode()
    digest.update(len(text).to_bytes(8, "little") + text)
    digest.update(content)
