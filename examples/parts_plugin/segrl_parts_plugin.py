"""An adapter, a small U-Net and a dense loss for segrl's mask heads."""

# N masks, B images, K probe states, D width of the language model, C prompt width, S image side, h = S / 4 mask side

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from segrl.heads import register_adapter, register_dense_loss
from segrl.segmenters import ImageFeatures, register_segmenter


@register_adapter("gated")
class GatedAdapter(nn.Module):
    """Weigh each state by a learned gate and project the mean to one prompt.

    Args:
        input_dim: D.
        prompt_dim: C.
        temperature: Divides the gates' logits; higher values weigh the states more evenly.
    """

    def __init__(self, input_dim: int, prompt_dim: int, *, temperature: float = 1.0) -> None:
        super().__init__()
        self._settings = {"input_dim": input_dim, "prompt_dim": prompt_dim, "temperature": temperature}
        self.temperature = temperature
        self.norm, self.gate = nn.LayerNorm(input_dim), nn.Linear(input_dim, 1)
        self.projection = nn.Linear(input_dim, prompt_dim)

    def forward(self, states: Tensor, state_mask: Tensor) -> Tensor:
        """Return prompts (N, 1, C) for states (N, K, D) and their mask (N, K)."""
        states = self.norm(states)
        gates = (self.gate(states)[..., 0] / self.temperature).sigmoid() * state_mask
        mean = torch.einsum("nk,nkd->nd", gates, states) / state_mask.sum(1, keepdim=True).clamp(min=1)
        return self.projection(mean)[:, None]

    def to_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return dict(self._settings)


@register_segmenter("small_unet")
class SmallUNet(nn.Module):
    """A U-Net of two levels whose coarse features a prompt scales and shifts.

    Args:
        image_size: S, a multiple of 8.
        prompt_dim: C.
        width: Channels of the finest level.
    """

    def __init__(self, image_size: int = 64, prompt_dim: int = 32, width: int = 8) -> None:
        super().__init__()
        self.image_size, self.mask_size, self.prompt_dim, self.width = image_size, image_size // 4, prompt_dim, width
        self.fine = nn.Sequential(_block(3, width, 2), _block(width, 2 * width, 2))
        self.coarse = _block(2 * width, 4 * width, 2)
        self.condition = nn.Linear(prompt_dim, 8 * width)
        self.box = nn.Linear(4, prompt_dim)
        self.up = _block(6 * width, 2 * width, 1)
        self.out = nn.Conv2d(2 * width, 1, 1)

    def preprocess(self, image: Image.Image | np.ndarray) -> Tensor:
        """Return an RGB image as (3, S, S) in -1..1."""
        picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
        resized = picture.convert("RGB").resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 127.5 - 1

    def encode(self, images: Tensor) -> ImageFeatures:
        """Return features of strides 4 and 8 of images (B, 3, S, S)."""
        fine = self.fine(images)
        return ImageFeatures((fine, self.coarse(fine)))

    def decode(self, features: ImageFeatures, prompts: Tensor, index: Tensor) -> Tensor:
        """Return mask logits (N, h, h) for prompts (N, K, C), mask n on image `index[n]`."""
        if not len(prompts):
            return prompts.new_zeros(0, self.mask_size, self.mask_size)
        fine, coarse = (level[index] for level in features.tensors)
        scale, shift = self.condition(prompts.mean(1))[..., None, None].chunk(2, dim=1)
        coarse = F.interpolate(coarse * (1 + scale) + shift, scale_factor=2.0)
        return self.out(self.up(torch.cat([fine, coarse], dim=1)))[:, 0]

    def decode_boxes(self, features: ImageFeatures, boxes: Tensor, index: Tensor) -> Tensor:
        """Return mask logits (N, h, h) for boxes (N, 4), xyxy in fractions of the image."""
        return self.decode(features, self.box(boxes)[:, None], index)

    def freeze(self, *, encoder: bool) -> None:
        """Let everything train that a mask loss reaches, the encoder only where it is not frozen."""
        self.requires_grad_(True)
        self.box.requires_grad_(False)  # prompts of a mask head do not go through it
        for part in (self.fine, self.coarse):
            part.requires_grad_(not encoder)

    def to_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return {"image_size": self.image_size, "prompt_dim": self.prompt_dim, "width": self.width}


def _block(inner: int, outer: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inner, outer, 3, stride, 1), nn.GroupNorm(1, outer), nn.GELU())


@register_dense_loss("rim")
def rim(mask_logits: Tensor, target: Tensor) -> Tensor:
    """Compute the cross-entropy over the pixels at the border of the target, 0 where it has none.

    Args:
        mask_logits: (N, h, h).
        target: (N, h, h) in 0..1.

    Returns:
        (N,), at least 0.
    """
    wide = F.max_pool2d(target[:, None], 3, 1, 1) + F.max_pool2d(-target[:, None], 3, 1, 1)
    border = (wide[:, 0] > 0.5).to(mask_logits.dtype)
    values = F.binary_cross_entropy_with_logits(mask_logits, target, reduction="none")
    return (values * border).sum((1, 2)) / border.sum((1, 2)).clamp(min=1)
