"""Shared prompts on real batches: which shapes have gone through packed, and whether their scores are TRL's."""

from __future__ import annotations

from torch import Tensor

from segrl.sharing.packing import Packed

__all__ = ["TriedShapes", "score_difference"]


class TriedShapes:
    """The largest packed row that has gone through a model, and the largest whose scores were compared with TRL's.

    Attributes:
        tokens: Tokens of the longest row.
        images: Images of the row with the most.

    Example:
        >>> import torch
        >>> tried, row = TriedShapes(), Packed({"input_ids": torch.zeros(1, 9)}, torch.zeros(2, 4))
        >>> tried.outgrown(row), tried.needs_comparison(row)  # there are no images, so the trial before training holds
        (True, False)
        >>> tried.passed(row)
        >>> tried.outgrown(row)
        False
    """

    def __init__(self) -> None:
        self.tokens = self.images = 0
        self._compared = (0, 0)

    def outgrown(self, packed: Packed) -> bool:
        """Return whether a packed row has more tokens or images than any that has gone through."""
        tokens, images = _shape(packed)
        return tokens > self.tokens or images > self.images

    def needs_comparison(self, packed: Packed) -> bool:
        """Return whether a packed row shows images and has twice the tokens or images that were compared."""
        tokens, images = _shape(packed)
        return images > 0 and (tokens > 2 * self._compared[0] or images > 2 * self._compared[1])

    def passed(self, packed: Packed, compared: bool = False) -> None:
        """Remember that a packed row has gone through, or that its scores were compared."""
        tokens, images = _shape(packed)
        if compared:
            self._compared = (max(tokens, self._compared[0]), max(images, self._compared[1]))
        else:
            self.tokens, self.images = max(tokens, self.tokens), max(images, self.images)


def _shape(packed: Packed) -> tuple[int, int]:
    grid, pixels = packed.inputs.get("image_grid_thw"), packed.inputs.get("pixel_values")
    shown = grid if grid is not None else pixels
    return packed.inputs["input_ids"].size(1), 0 if shown is None else len(shown)


def score_difference(found: Tensor, expected: Tensor, labels: Tensor) -> float:
    """Return the largest difference of two scores (B, T) of tokens; `labels` (B, T) are -100 where there is none.

    Example:
        >>> import torch
        >>> score_difference(torch.tensor([[-1.0, 0.0]]), torch.tensor([[-1.5, -9.0]]), torch.tensor([[5, -100]]))
        0.5
    """
    difference = (found - expected).float().abs().masked_fill(labels == -100, 0.0)
    return float(difference.max()) if difference.numel() else 0.0
