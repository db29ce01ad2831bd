"""The `Segmenter` protocol of mask heads: `preprocess`, `encode`, `decode`, `decode_boxes`, `freeze`."""

# B unique images, N masks to decode, S input side in pixels, h = w mask side, C prompt width, K prompts per mask

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

__all__ = ["ExactPositions", "ImageFeatures", "Segmenter", "evaluating", "square_pixels"]


@dataclass(frozen=True)
class ImageFeatures:
    """Features of B images: a tuple of tensors whose first dimension is B.

    Rows can be selected (`features[index]`), moved (`features.to(device)`), split into single images and joined again
    (`ImageFeatures.cat`), so that a cache can hold one image at a time.

    Example:
        >>> features = ImageFeatures((torch.zeros(2, 8, 4, 4), torch.zeros(2, 1)))
        >>> len(features[:1]), len(ImageFeatures.cat([features[:1], features])), features[[1, 1, 1]].tensors[1].shape
        (1, 3, torch.Size([3, 1]))
    """

    tensors: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: Tensor | slice | list[int]) -> ImageFeatures:
        return ImageFeatures(tuple(tensor[index] for tensor in self.tensors))

    def to(self, *args, **kwargs) -> ImageFeatures:
        """Return the same features on another device or in another dtype (arguments of `Tensor.to`)."""
        return ImageFeatures(tuple(tensor.to(*args, **kwargs) for tensor in self.tensors))

    @staticmethod
    def cat(parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """Join features along the first dimension; a single part is returned as it is. `parts` must not be empty."""
        if len(parts) == 1:
            return parts[0]
        return ImageFeatures(tuple(torch.cat(tensors) for tensors in zip(*(p.tensors for p in parts), strict=True)))


@runtime_checkable
class Segmenter(Protocol):
    """A promptable segmenter, an `nn.Module` with these members; `register_segmenter` gives one a name.

    Attributes:
        image_size: Side S of the square input, pixels.
        mask_size: Side h of the mask logits that `decode` returns, pixels.
        prompt_dim: Width C of one prompt embedding.
    """

    image_size: int
    mask_size: int
    prompt_dim: int

    def preprocess(self, image) -> Tensor:
        """Return an RGB image (PIL, or array (H, W, 3) uint8) as (3, S, S); its aspect ratio is not kept."""
        ...

    def encode(self, images: Tensor) -> ImageFeatures:
        """Return features of images (B, 3, S, S).

        Features of a frozen encoder are kept, also beyond a run: nothing that trains while `freeze(encoder=True)` holds
        may take part.
        """
        ...

    def decode(self, features: ImageFeatures, prompts: Tensor, index: Tensor) -> Tensor:
        """Return mask logits (N, h, h) for prompts (N, K, C), mask n on image `index[n]`; N = 0 gives (0, h, h).

        A segmenter may also take `mask_prompt=`, (N, 1, h', h') logits of a first guess, or None.
        """
        ...

    def decode_boxes(self, features: ImageFeatures, boxes: Tensor, index: Tensor) -> Tensor:
        """Return mask logits (N, h, h) for boxes (N, 4), xyxy in fractions of the image's width and height.

        A segmenter may also take `points=`, (N, P, 2) foreground points in the same fractions, P of them beside each
        box; `boxes` is None then where points stand alone.
        """
        ...

    def freeze(self, *, encoder: bool) -> None:
        """Set `requires_grad` of all parameters: on for what a mask loss trains; `encoder` freezes the encoder."""
        ...


def square_pixels(image: Image.Image | np.ndarray, side: int) -> Tensor:
    """Return an RGB image (PIL, or array (H, W, 3) uint8) resized to (3, S, S), float32 from 0 to 255.

    Example:
        >>> square_pixels(np.full((2, 4, 3), 51, dtype=np.uint8), 3).unique().tolist()
        [51.0]
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image))
    resized = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()


class ExactPositions(nn.Module):
    """A segmenter whose position encoding keeps its precision when the whole model is cast.

    It multiplies coordinates by a fixed random matrix and takes sines of the products: in bfloat16 they would be those
    of other positions. Whatever casts a model, such as an engine, calls `_apply`.
    """

    def position_matrices(self) -> list[tuple[nn.Module, str]]:
        """Return the modules with these matrices, each with the name of its buffer or parameter."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        exact = [(module, name, getattr(module, name).detach()) for module, name in self.position_matrices()]
        super()._apply(fn, recurse)
        for module, name, before in exact:
            now = getattr(module, name)
            if now.dtype == before.dtype:
                continue
            if isinstance(now, nn.Parameter):
                now.data = before.to(now.device)
            else:
                setattr(module, name, before.to(now.device))
        return self


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode inside: kept features must not depend on dropout or on the batch."""
    trains = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in trains:
            part.training = True
