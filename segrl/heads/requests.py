"""Requests to a mask head: images, masks of the next forward pass, and states to be kept."""

# B rows, T tokens, K probe states per mask, D width of the language model, N masks, S input side, h mask side

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from segrl.segmenters.base import ImageFeatures

__all__ = ["MaskRequest", "Recording", "SegInput"]


class SegInput:
    """The segmenter's view of one image, shared by every completion about it, so that it is encoded once.

    Args:
        pixels: The segmenter's input, (3, S, S) (`Segmenter.preprocess`), or a function that makes it, called once and
            only if the image has to be encoded.
        features: Features of this one image, kept when the encoder is frozen.
        target: What a dense loss compares with, (h, h) uint8, 255 = foreground; None without ground truth.
        same_image: The first `SegInput` of this image, where another question about it has another target; its pixels
            and features serve both.
        key: Hash of the image's content, under which `MaskHead.cache` keeps its features; None: this object only.

    Example:
        >>> import torch
        >>> first = SegInput(lambda: torch.ones(3, 4, 4))
        >>> SegInput(lambda: torch.zeros(3, 4, 4), same_image=first).pixels.sum()
        tensor(48.)
    """

    def __init__(
        self,
        pixels: Tensor | Callable[[], Tensor],
        features: ImageFeatures | None = None,
        target: Tensor | None = None,
        same_image: SegInput | None = None,
        key: str | None = None,
    ) -> None:
        self._pixels = pixels
        self.features, self.target, self.same_image, self.key = features, target, same_image, key

    @property
    def pixels(self) -> Tensor:
        if callable(self._pixels):
            self._pixels = self._pixels() if self.same_image is None else self.same_image.pixels
        return self._pixels

    def __getstate__(self) -> dict[str, Any]:
        """For another process: a data loader's worker sends pixels, not the segmenter that makes them."""
        return {**self.__dict__, "_pixels": self.pixels}


@dataclass(eq=False)
class MaskRequest:
    """Masks wanted from the next forward pass, and where they arrive.

    Attributes:
        index: (B, K) positions of the probe's states.
        valid: (B, K), which of them exist.
        inputs: The image of each row; the same object for the same image; None for a row without one.
        last: How many tokens at the end of each row the positions count within; None: all of them.
        rows: (N,) rows that have a mask; set by the forward pass.
        logits: (N, h, h) mask logits of these rows, with gradients; set by the forward pass.
        aux: The adapter's auxiliary outputs for these rows, by name; set by the forward pass.
    """

    index: Tensor
    valid: Tensor
    inputs: Sequence[SegInput | None]
    last: int | None = None
    rows: Tensor | None = None
    logits: Tensor | None = None
    aux: dict[str, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class Recording:
    """Backbone states of the forward passes inside `MaskHead.record`, one tensor (B, T, D) for each."""

    last_only: bool
    calls: list[Tensor] = field(default_factory=list)
