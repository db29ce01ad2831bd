"""Several sampled answers to one question, combined, and how sure the model is of what they say together."""

# N samples, H/W pixels (of a volume D slices, too)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from segrl.errors import DataError
from segrl.metrics.overlap import dice
from segrl.predictions.prediction import Prediction

__all__ = ["Confidence", "combine_answers"]


@dataclass(frozen=True)
class Confidence:
    """Certainty of an answer.

    Attributes:
        samples: Number of answers that were drawn, N.
        probability: Mean foreground probability over the pixels of the mask, in [0, 1]; of an empty mask 1 minus the
            highest probability anywhere. None if the model makes no masks, or for one answer whose segmenter gives no
            probabilities, as one that propagates through a volume.
        agreement: Mean Dice over all pairs of the N masks, in [0, 1]; an answer with an invalid text agrees with none.
            None for fewer than two answers.
        valid: Share of answers with a valid text.

    Example:
        >>> sure = Confidence(samples=8, probability=0.9, agreement=0.75, valid=1.0)
        >>> sure.value, sure.to_dict()["agreement"]
        (0.9, 0.75)
    """

    samples: int
    probability: float | None
    agreement: float | None
    valid: float

    @property
    def value(self) -> float | None:
        """The number by which answers are ordered and abstained from: the probability, 0 without any valid answer.

        Disagreement lowers it, since it is that of the mean over the answers; it orders answers better than the
        agreement does (docs/log.md).
        """
        return self.probability if self.valid else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with `value`."""
        return {"value": self.value, **asdict(self)}


def combine_answers(answers: Sequence[Prediction]) -> tuple[Prediction, Confidence]:
    """Combine N answers to one question.

    The mask holds the pixels whose foreground probability, averaged over the answers, is above one half. An answer that
    carries no probabilities counts with its mask, 0 or 1, and one without a mask with 0 everywhere. Text, boxes and
    slice are those of the answer whose mask has the highest Dice with the combined one, a valid answer before invalid
    ones, and the first of equal ones.

    Args:
        answers: One or more, with masks of equal shape where they have one.

    Returns:
        The combined answer, with `probability`, and its confidence. One answer is returned as it is, and without any
        mask the first valid one.

    Raises:
        DataError: No answers, or masks of different shapes.

    Example:
        >>> from segrl.predictions import Frame, parse_completion
        >>> text = "<think>a</think><answer>The cyst is located at [0, 0, 2, 1].<seg></answer>"
        >>> answer = parse_completion(text, Frame("original_px", (3, 1)))
        >>> masks = np.array([[[1, 1, 0]], [[1, 1, 0]], [[0, 1, 1]]], dtype=bool)
        >>> combined, confidence = combine_answers([answer.with_mask(mask) for mask in masks])
        >>> combined.mask.tolist(), round(confidence.agreement, 3), round(confidence.probability, 3)
        ([[True, True, False]], 0.667, 0.833)
    """
    if not answers:
        raise DataError("answers: expected one or more, got none")
    valid = [answer.valid for answer in answers]
    share = sum(valid) / len(answers)
    shapes = {answer.mask.shape for answer in answers if answer.mask is not None}
    if len(shapes) > 1:
        raise DataError(f"answers: masks of the shapes {sorted(shapes)}; expected one shape")
    if not shapes:
        agreement = None if len(answers) < 2 else 0.0
        return answers[valid.index(True) if any(valid) else 0], Confidence(len(answers), None, agreement, share)
    (shape,) = shapes
    mean = _mean_probability(answers, shape)
    only = answers[0] if len(answers) == 1 else None
    mask = only.mask if only is not None else mean > 0.5
    assert mask is not None
    certain = float(mean[mask].mean() if mask.any() else 1 - mean.max())
    if only is not None:
        known = only.probability is not None
        return only, Confidence(1, certain if known else None, None, share)
    masks = [answer.mask if answer.mask is not None else np.zeros(shape, dtype=bool) for answer in answers]
    near = [(ok, dice(own, mask)) for ok, own in zip(valid, masks, strict=True)]
    chosen = answers[near.index(max(near))]
    pairs = [
        dice(masks[one], masks[other]) if valid[one] and valid[other] else 0.0
        for one, other in combinations(range(len(answers)), 2)
    ]
    return replace(chosen, mask=mask, probability=mean), Confidence(len(answers), certain, float(np.mean(pairs)), share)


def _mean_probability(answers: Sequence[Prediction], shape: tuple[int, ...]) -> np.ndarray:
    """Return the mean foreground probability, float32; one array is in memory, whatever the number of answers."""
    total = np.zeros(shape, dtype=np.float32)
    for answer in answers:
        shown = answer.mask if answer.probability is None else answer.probability
        if shown is not None:
            total += shown
    return total / len(answers)
