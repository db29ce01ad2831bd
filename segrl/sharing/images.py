"""Preprocess each image once: the G rows of a group hold G decoded copies of the same image."""

# N images

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature

from segrl.caching.content import ImageKeys

__all__ = ["image_indices", "images_of", "pixels_of", "preprocess_once"]


@contextmanager
def preprocess_once(processor: Any, keys: ImageKeys) -> Iterator[None]:
    """Inside the context, `processor` prepares each image once, however often it is called with it.

    Works for image processors that return `pixel_values`, and `image_grid_thw` if they cut images into patches; the
    output of others is returned unchanged.

    Args:
        processor: The model's processor; its image processor is replaced inside the context.
        keys: Content keys of the images.

    Example:
        >>> from types import SimpleNamespace
        >>> from PIL import Image
        >>> prepared = []
        >>> def image_processor(images, **settings):
        ...     prepared.extend(images)
        ...     return {"pixel_values": torch.zeros(len(images), 3, 4, 4)}
        >>> processor, image = SimpleNamespace(image_processor=image_processor), Image.new("RGB", (4, 4))
        >>> with preprocess_once(processor, ImageKeys()):
        ...     pixels = processor.image_processor([image, image.copy()], return_tensors="pt")["pixel_values"]
        >>> len(prepared), len(pixels)
        (1, 2)
    """
    inner = getattr(processor, "image_processor", None)
    if inner is None:
        yield
        return
    processor.image_processor = _Once(inner, keys)
    try:
        yield
    finally:
        processor.image_processor = inner


class _Once:
    """An image processor that keeps its outputs; every other attribute is that of the real one."""

    def __init__(self, inner: Any, keys: ImageKeys) -> None:
        self._inner, self._keys = inner, keys
        self._done: dict[tuple[str, str], tuple[Tensor, Tensor | None]] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":  # while a copy is made
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __call__(self, images: Any = None, **settings: Any) -> Any:
        flat, form = _flat(images), settings.get("return_tensors")
        if not flat or any(image is None for image in flat):
            return self._inner(images=images, **settings)
        # TRL requests lists for generation and "pt" for scoring: the pixels are the same.
        own = {**settings, "return_tensors": None if form == "pt" else form}
        settings_key = repr(sorted(own.items(), key=lambda item: item[0]))
        wanted = [(self._keys(image), settings_key) for image in flat]
        missing = {key: image for key, image in zip(wanted, flat, strict=True) if key not in self._done}
        if missing:
            output = self._inner(images=list(missing.values()), **settings)
            parts = _split(output, len(missing))
            if parts is None:
                return output if len(missing) == len(flat) else self._inner(images=images, **settings)
            self._done.update(zip(missing, parts, strict=True))
        pieces = [self._done[key] for key in wanted]
        pixels, grids = [pixels for pixels, _ in pieces], [grid for _, grid in pieces if grid is not None]
        if grids:
            return BatchFeature({"pixel_values": torch.cat(pixels), "image_grid_thw": torch.stack(grids)})
        return BatchFeature({"pixel_values": torch.cat(pixels) if form else [one[0] for one in pixels]})


def _flat(images: Any) -> list[Any]:
    if isinstance(images, (list, tuple)):
        return [image for part in images if part is not None for image in _flat(part)]
    return [images]


def _split(output: Any, images: int) -> list[tuple[Tensor, Tensor | None]] | None:
    """Split the output of an image processor by image; None if it has another form."""
    pixels, grid = output.get("pixel_values"), output.get("image_grid_thw")
    if isinstance(pixels, list) and all(isinstance(one, Tensor) for one in pixels):
        pixels = torch.stack(pixels) if len({one.shape for one in pixels}) == 1 else None
    if not isinstance(pixels, Tensor) or set(output) - {"pixel_values", "image_grid_thw"}:
        return None
    if grid is None:
        return [(one, None) for one in pixels.split(1)] if len(pixels) == images else None
    if not isinstance(grid, Tensor) or len(grid) != images:
        return None
    return list(zip(pixels.split(grid.prod(-1).tolist()), grid, strict=True))


def image_indices(rows: Sequence[int], num_images: Sequence[int]) -> list[int]:
    """Return the positions of the images of some rows among the images of all rows.

    Args:
        rows: Rows, in the order of the result.
        num_images: Number of images of each row.

    Example:
        >>> image_indices([2, 0], num_images=[1, 2, 2])
        [3, 4, 0]
    """
    bounds = [0, *accumulate(num_images)]
    return [n for row in rows for n in range(bounds[row], bounds[row + 1])]


def pixels_of(images: Sequence[int], pixels: Tensor, grid: Tensor | None) -> dict[str, Tensor]:
    """Return some images as keyword arguments of a backbone.

    Args:
        images: Positions of the images, in order; at least one.
        pixels: All images, flattened to patches (patches, D) as in Qwen-VL, or one per row (N, 3, H, W).
        grid: Patches of each image along time, height and width, (N, 3); None for one row per image.

    Returns:
        `pixel_values`, and `image_grid_thw` if there is a grid.
    """
    chosen = list(images)
    if grid is None:
        return {"pixel_values": pixels[chosen]}
    parts = pixels.split(grid.prod(-1).tolist())
    return {"pixel_values": torch.cat([parts[n] for n in chosen]), "image_grid_thw": grid[chosen]}


def images_of(prompt: Any) -> list[Any]:
    """Return the images in a conversation whose messages are lists of parts, in order; [] for a text.

    Example:
        >>> parts = [{"type": "image", "image": "first"}, {"type": "text", "text": "Where?"}]
        >>> images_of([{"role": "user", "content": parts}, {"role": "user", "content": "text"}])
        ['first']
    """
    if not isinstance(prompt, Sequence) or isinstance(prompt, str):
        return []
    contents = [message.get("content") for message in prompt if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part["image"] for part in parts if part.get("type") == "image" and "image" in part]
