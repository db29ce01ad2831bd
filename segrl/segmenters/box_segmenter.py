"""Boxes and points of an answer, to a mask, by a frozen segmenter: the cascade of Seg-Zero and of zero-shot evaluation.

Liu et al., "Seg-Zero", arXiv:2503.06520.
"""

# B boxes and P points of an answer, H/W pixels of an image, S input side of the segmenter

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segrl.errors import SegRLError
from segrl.segmenters.base import ImageFeatures, Segmenter, evaluating

__all__ = ["BoxSegmenter"]

_PROMPTS_AT_ONCE = 64


class _Prompt(NamedTuple):
    """One object of an answer, in fractions of the image's width and height."""

    answer: int
    box: np.ndarray | None
    points: np.ndarray

    @property
    def kind(self) -> tuple[bool, int]:
        return self.box is not None, len(self.points)


class BoxSegmenter:
    """A frozen segmenter, prompted with what answers about images name; `VolumePropagator` is that of volumes.

    Args:
        segmenter: Put into evaluation mode; nothing in it is trained.
        points: Whether the points of answers prompt it too, as in Seg-Zero: beside the boxes where there are P / B
            points for each of the B boxes, in order; alone, one object each, in an answer without boxes.

    Raises:
        SegRLError: It is no `Segmenter`, or takes no points.

    Example:
        >>> from segrl.segmenters import Sam2Config, Sam2Segmenter
        >>> boxes = BoxSegmenter(Sam2Segmenter(Sam2Config(image_size=64)), points=True)
        >>> pixels = [torch.zeros(3, 64, 64)] * 2  # one image, two answers about it
        >>> named = [np.array([[0, 0, 20, 10]]), np.zeros((0, 4))]
        >>> masks = boxes(pixels, named, [(30, 40)] * 2, points=[np.array([[10, 5]]), np.zeros((0, 2))])
        >>> [mask.shape for mask in masks], boxes.encoded_images
        ([(30, 40), (30, 40)], 1)
    """

    def __init__(self, segmenter: Any, *, points: bool = False) -> None:
        if not isinstance(segmenter, Segmenter):
            raise SegRLError(f"segmenter={type(segmenter).__name__}: not a segrl.segmenters.Segmenter")
        if points and "points" not in inspect.signature(segmenter.decode_boxes).parameters:
            raise SegRLError(
                f"segmenter={type(segmenter).__name__}: its decode_boxes takes no points; expected a segmenter such as "
                "Sam2Segmenter, or points=False"
            )
        self.segmenter: Any = segmenter
        self.points = points
        self.segmenter.requires_grad_(False)
        self.encoded_images = 0

    @torch.no_grad()
    def __call__(
        self,
        pixels: Sequence[Tensor],
        boxes: Sequence[np.ndarray],
        sizes: Sequence[tuple[int, int]],
        points: Sequence[np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        """Return one mask for each answer: the union of the masks of its objects.

        Args:
            pixels: (3, S, S) of each answer's image (`Segmenter.preprocess`); the same object is encoded once.
            boxes: (B, 4) of each answer, xyxy in pixels of its size; what lies outside the image is cut off.
            sizes: (H, W) of each mask.
            points: (P, 2) of each answer, (x, y) in the same pixels; left out unless the segmenter is asked for them.

        Returns:
            (H, W) bool in order; empty without a box that has an area and without a point.
        """
        masks = [np.zeros(size, dtype=bool) for size in sizes]
        named: list[_Prompt] = []
        for number, (found, (height, width)) in enumerate(zip(boxes, sizes, strict=True)):
            own = points[number] if self.points and points is not None else np.zeros((0, 2))
            named += _prompts(number, found, own, np.array([width, height], dtype=np.float64))
        features = self._features([pixels[prompt.answer] for prompt in named])
        with evaluating(self.segmenter):
            for kind in dict.fromkeys(prompt.kind for prompt in named):
                alike = [prompt for prompt in named if prompt.kind == kind]
                for start in range(0, len(alike), _PROMPTS_AT_ONCE):
                    some = alike[start : start + _PROMPTS_AT_ONCE]
                    known, index = self._gathered(features, [id(pixels[prompt.answer]) for prompt in some])
                    for prompt, mask in zip(some, self._decoded(known, some, index), strict=True):
                        size = sizes[prompt.answer]
                        whole = F.interpolate(mask[None, None].float(), size=size, mode="bilinear")[0, 0]
                        masks[prompt.answer] |= (whole > 0).cpu().numpy()
        return masks

    def _decoded(self, features: ImageFeatures, prompts: Sequence[_Prompt], index: Tensor) -> Tensor:
        """Mask logits (N, h, h) of prompts of one kind."""

        def stacked(arrays: Sequence[Any]) -> Tensor:
            return torch.from_numpy(np.stack(arrays)).float().to(index.device)

        boxed, count = prompts[0].kind
        boxes = stacked([prompt.box for prompt in prompts]) if boxed else None
        more = {"points": stacked([prompt.points for prompt in prompts])} if count else {}
        return self.segmenter.decode_boxes(features, boxes, index, **more)

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


def _prompts(answer: int, boxes: np.ndarray, points: np.ndarray, size: np.ndarray) -> list[_Prompt]:
    """The objects of one answer. Points of which no equal number falls to each box are left out."""
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) / np.tile(size, 2)
    places = (np.asarray(points, dtype=np.float64).reshape(-1, 2) / size).clip(0, 1)
    if not len(corners):
        return [_Prompt(answer, None, place[None]) for place in places]
    each = len(places) // len(corners) if len(places) % len(corners) == 0 else 0
    own = places[: each * len(corners)].reshape(len(corners), each, 2)
    return [
        _Prompt(answer, box, near)
        for box, near in zip(corners.clip(0, 1), own, strict=True)
        if box[2] > box[0] and box[3] > box[1]
    ]
