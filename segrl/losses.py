"""Segmentation losses: one value per mask, so that the caller decides on weights and reduction.

Every loss takes `mask_logits` (N, H, W), any floating dtype, and `target` (N, H, W) in [0, 1]: bool, or floating and
possibly soft (see `segrl.geometry.soft_target`). It computes in float32 at least, is differentiable in the logits,
returns (N,), and for N = 0 returns shape (0,). A wrong shape or dtype raises `SegRLError`; the range of the target is
not checked, since that would stall an accelerator.
"""

# N masks, H/W pixels

from __future__ import annotations

import torch
import torch.nn.functional as F

from segrl.errors import SegRLError

__all__ = ["cross_entropy", "dice", "dice_ce", "focal"]

DICE_SMOOTHING = 1.0


def dice(mask_logits: torch.Tensor, target: torch.Tensor, *, smoothing: float = DICE_SMOOTHING) -> torch.Tensor:
    """Compute the soft Dice loss, `1 - (2 sum(p t) + s) / (sum(p) + sum(t) + s)` with `p = sigmoid(logits)`.

    After Milletari et al. 2016, with areas in place of squares in the denominator. For a soft target the
    minimum is above 0, at a hard prediction. The empty-mask rule of `segrl.geometry.masks` holds in the limit: with an
    empty target a confidently empty prediction costs 0, and if exactly one of the two is empty the loss is
    `1 - s / (area + s)`, close to 1.

    Args:
        mask_logits: (N, H, W) logits.
        target: (N, H, W) in [0, 1].
        smoothing: `s`, in pixels; positive, or an empty target divides by zero.

    Returns:
        (N,) in [0, 1].

    Raises:
        SegRLError: Wrong shape or dtype, or `smoothing` is not positive.

    Example:
        >>> logits = torch.tensor([[[30.0, 30.0, -30.0]], [[-30.0, -30.0, -30.0]]])  # two pixels of three, and none
        >>> dice(logits, torch.tensor([[[1.0, 0.0, 1.0]], [[0.0, 0.0, 0.0]]]))  # 1 - (2 + 1) / (4 + 1), and both empty
        tensor([0.4000, 0.0000])
    """
    if not smoothing > 0:
        raise SegRLError(f"smoothing: expected a positive number of pixels, got {smoothing}")
    logits, target = _checked(mask_logits, target)
    probability = logits.sigmoid()
    overlap = (probability * target).sum(dim=(1, 2))
    areas = (probability + target).sum(dim=(1, 2))
    return 1 - (2 * overlap + smoothing) / (areas + smoothing)


def cross_entropy(mask_logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the binary cross-entropy, averaged over the pixels of each mask; empty targets are no exception.

    Args:
        mask_logits: (N, H, W) logits.
        target: (N, H, W) in [0, 1].

    Returns:
        (N,), at least 0.

    Raises:
        SegRLError: Wrong shape or dtype.

    Example:
        >>> cross_entropy(torch.tensor([[[0.0, 30.0]]]), torch.tensor([[[1.0, 1.0]]]))  # (log 2 + 0) / 2
        tensor([0.3466])
    """
    logits, target = _checked(mask_logits, target)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=(1, 2))


def dice_ce(
    mask_logits: torch.Tensor, target: torch.Tensor, *, dice_weight: float = 1.0, ce_weight: float = 1.0
) -> torch.Tensor:
    """Compute the weighted sum of `dice` and `cross_entropy`, CORE-Seg's mask loss (the paper gives no weights).

    Args:
        mask_logits: (N, H, W) logits.
        target: (N, H, W) in [0, 1]; the empty case is that of `dice`.
        dice_weight: Weight of the Dice loss.
        ce_weight: Weight of the cross-entropy.

    Returns:
        (N,).

    Raises:
        SegRLError: Wrong shape or dtype.

    Example:
        >>> logits, target = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
        >>> dice_ce(logits, target, ce_weight=2.0) == dice(logits, target) + 2.0 * cross_entropy(logits, target)
        tensor([True])
    """
    return dice_weight * dice(mask_logits, target) + ce_weight * cross_entropy(mask_logits, target)


def focal(
    mask_logits: torch.Tensor, target: torch.Tensor, *, alpha: float | None = 0.25, gamma: float = 2.0
) -> torch.Tensor:
    """Compute the focal loss (Lin et al. 2017), averaged over the pixels of each mask; empty targets are no exception.

    Args:
        mask_logits: (N, H, W) logits.
        target: (N, H, W) in [0, 1]; for soft targets the weights are interpolated linearly.
        alpha: Weight of foreground against `1 - alpha` of background; `None` weighs both by 1.
        gamma: How strongly well-classified pixels are played down; 0 gives the cross-entropy.

    Returns:
        (N,), at least 0.

    Raises:
        SegRLError: Wrong shape or dtype.

    Example:
        >>> focal(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))  # 0.25 * 0.5**2 * log 2
        tensor([0.0433])
    """
    logits, target = _checked(mask_logits, target)
    probability = logits.sigmoid()
    miss = probability * (1 - target) + (1 - probability) * target
    loss = miss**gamma * F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if alpha is not None:
        loss = (alpha * target + (1 - alpha) * (1 - target)) * loss
    return loss.mean(dim=(1, 2))


def _checked(mask_logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = tuple(mask_logits.shape)
    if mask_logits.ndim != 3 or 0 in shape[1:]:
        raise SegRLError(f"mask_logits: expected shape (N, H, W) with at least one pixel, got {shape}")
    if tuple(target.shape) != shape:
        raise SegRLError(
            f"target: expected the shape of mask_logits {shape}, got {tuple(target.shape)}; resize the target"
        )
    if not mask_logits.is_floating_point():
        raise SegRLError(f"mask_logits: expected a floating dtype, got {mask_logits.dtype}")
    if not (target.is_floating_point() or target.dtype == torch.bool):
        raise SegRLError(
            f"target: expected bool or floating values in [0, 1], got {target.dtype}; divide a 0..255 target by 255"
        )
    # float16 overflows when it sums 256 x 256 pixels, bfloat16 stops counting at 256.
    dtype = torch.promote_types(mask_logits.dtype, torch.float32)
    return mask_logits.to(dtype), target.to(dtype)
