"""Boxes that an answer names, to a mask, by a frozen segmenter: the cascade of Seg-Zero and of zero-shot evaluation.

Liu et al., "Seg-Zero", arXiv:2503.06520.
"""

# B boxes of an answer, H/W pixels of an image, S input side and h mask side of the segmenter

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segrl.errors import SegRLError
from segrl.segmenters.base import ImageFeatures, Segmenter, evaluating

__all__ = ["BoxSegmenter"]

_BOXES_AT_ONCE = 64


class BoxSegmenter:
    """A frozen segmenter, prompted with the boxes of answers about images; `VolumePropagator` is that of volumes.

    Args:
        segmenter: Put into evaluation mode; nothing in it is trained.

    Raises:
        SegRLError: It is no `Segmenter`.

    Example:
        >>> from segrl.segmenters import Sam2Config, Sam2Segmenter
        >>> boxes = BoxSegmenter(Sam2Segmenter(Sam2Config(image_size=64)))
        >>> pixels = [torch.zeros(3, 64, 64)] * 2  # one image, two answers about it
        >>> named = [np.array([[0, 0, 20, 10]]), np.zeros((0, 4))]
        >>> [mask.shape for mask in boxes(pixels, named, [(30, 40)] * 2)], boxes.encoded_images
        ([(30, 40), (30, 40)], 1)
    """

    def __init__(self, segmenter: Any) -> None:
        if not isinstance(segmenter, Segmenter):
            raise SegRLError(f"segmenter={type(segmenter).__name__}: not a segrl.segmenters.Segmenter")
        self.segmenter: Any = segmenter
        self.segmenter.requires_grad_(False)
        self.encoded_images = 0

    @torch.no_grad()
    def __call__(
        self, pixels: Sequence[Tensor], boxes: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]
    ) -> list[np.ndarray]:
        """Return one mask for each answer: the union of the masks of its boxes.

        Args:
            pixels: (3, S, S) of each answer's image (`Segmenter.preprocess`); the same object is encoded once.
            boxes: (B, 4) of each answer, xyxy in pixels of its size; what lies outside the image is cut off.
            sizes: (H, W) of each mask.

        Returns:
            (H, W) bool in order; empty without a box that has an area.
        """
        masks = [np.zeros(size, dtype=bool) for size in sizes]
        answers, prompts = [], []
        for number, (named, (height, width)) in enumerate(zip(boxes, sizes, strict=True)):
            inside = np.asarray(named, dtype=np.float64).reshape(-1, 4) / [width, height, width, height]
            inside = inside.clip(0, 1)
            for box in inside[(inside[:, 2] > inside[:, 0]) & (inside[:, 3] > inside[:, 1])]:
                answers.append(number)
                prompts.append(box)
        features = self._features([pixels[number] for number in answers])
        with evaluating(self.segmenter):
            for start in range(0, len(answers), _BOXES_AT_ONCE):
                numbers = answers[start : start + _BOXES_AT_ONCE]
                found, index = self._gathered(features, [id(pixels[number]) for number in numbers])
                given = torch.from_numpy(np.stack(prompts[start : start + _BOXES_AT_ONCE])).float()
                logits = self.segmenter.decode_boxes(found, given.to(index.device), index)
                for number, mask in zip(numbers, logits, strict=True):
                    whole = F.interpolate(mask[None, None].float(), size=sizes[number], mode="bilinear")[0, 0]
                    masks[number] |= (whole > 0).cpu().numpy()
        return masks

    def _features(self, pixels: Sequence[Tensor]) -> dict[int, ImageFeatures]:
        parameter = next(self.segmenter.parameters())
        found: dict[int, ImageFeatures] = {}
        with evaluating(self.segmenter):
            for image in pixels:
                if id(image) not in found:
                    found[id(image)] = self.segmenter.encode(image[None].to(parameter.device, parameter.dtype))
                    self.encoded_images += 1
        return found

    @staticmethod
    def _gathered(features: dict[int, ImageFeatures], wanted: Sequence[int]) -> tuple[ImageFeatures, Tensor]:
        """Features of the distinct images, and the number of the image of each box."""
        distinct = list(dict.fromkeys(wanted))
        joined = ImageFeatures.cat([features[image] for image in distinct])
        index = [distinct.index(image) for image in wanted]
        return joined, torch.tensor(index, device=joined.tensors[0].device)
