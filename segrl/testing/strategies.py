"""Hypothesis strategies for masks, boxes, completions, predictions and ground truths, to test rewards and metrics with.

They shrink towards empty masks, boxes at the origin, no boxes and valid texts. Coordinates are whole numbers of
original pixels, or half numbers for points, so that mirroring and enlarging them is exact.

Example:
    ```python
    from hypothesis import given
    from segrl.testing import strategies

    @given(strategies.targets().flatmap(lambda target: strategies.predictions(target, mask=True)))
    def test_my_metric(prediction): ...
    ```
"""

# D slices, H/W pixels of the original image, N boxes, P points

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from segrl.predictions.characters import is_blank
from segrl.predictions.completion_format import CompletionFormat
from segrl.predictions.frames import Frame
from segrl.predictions.prediction import Prediction
from segrl.predictions.target import Target, VolumeTarget
from segrl.testing.answers import NOTATIONS, REASONING, broken_completions, write_answer, write_completion
from segrl.testing.shapes import MAX_SIZE, boxes, masks, points, st, volumes

__all__ = [
    "batches",
    "boxes",
    "completions",
    "masks",
    "points",
    "predictions",
    "targets",
    "volume_targets",
    "volumes",
]

Draw = st.DrawFn
_SCORES = (0.5, 0.0, 0.25, 0.9, 1.0)
_FREE_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>[]{}"), min_size=1, max_size=12)
_DECOYS = (
    'The boxes are [{"bbox_2d": [1, 2, 9, 8]}].',
    "Perhaps [1, 2, 9, 8].",
    "Dark spot. " * 5,
    "看 \u202e \U0001f9ff",
)


def _is_shown(text: str) -> bool:
    return not is_blank(text)


QUERY = "Where is the lesion?"


def _texts() -> st.SearchStrategy[dict[str, str]]:
    """Draw the texts of a row, each of which may be missing."""
    examples = {"query": QUERY, "modality": "MRI", "anatomy": "liver", "lesion": "cyst", "name": "scan_7"}
    some = st.fixed_dictionaries({column: st.sampled_from(["", text]) for column, text in examples.items()})
    return st.one_of(st.just({"query": QUERY}), some)


def targets(*, max_size: int = MAX_SIZE, empty: bool | None = None) -> st.SearchStrategy[Target]:
    """Draw ground truths of images, with and without texts; their boxes are those of the mask's components.

    Args:
        max_size: Largest edge, pixels.
        empty: True for images without a lesion, False for images with one or more; None for both.
    """
    return st.builds(
        lambda mask, texts: Target.from_mask(mask, **texts), masks(max_size=max_size, empty=empty), _texts()
    )


def volume_targets(
    *, max_depth: int = 4, max_size: int = MAX_SIZE, empty: bool | None = None
) -> st.SearchStrategy[VolumeTarget]:
    """Draw ground truths of volumes, with cubic, flat and unknown voxels, with and without texts.

    Args:
        max_depth: Largest number of slices.
        max_size: Largest edge of a slice, pixels.
        empty: True for volumes without foreground, False for volumes with some; None for both.
    """
    return st.builds(
        lambda mask, spacing, texts: VolumeTarget.from_mask(mask, spacing, **texts),
        volumes(max_depth=max_depth, max_size=max_size, empty=empty),
        st.sampled_from([(1.0, 1.0, 1.0), (5.0, 0.5, 0.5), None]),
        _texts(),
    )


@st.composite
def completions(
    draw: Draw,
    frame: Frame,
    *,
    valid: bool | None = True,
    near: ArrayLike = (),
    depth: int | None = None,
    completion_format: CompletionFormat | None = None,
    empty: bool | None = None,
) -> str:
    """Draw completions in the grammar of `segrl.predictions.parsing`, or broken as published systems have accepted.

    Valid ones may reason in any script, also with boxes in the reasoning, write boxes in any notation that is read, and
    end in end tokens; in JSON they may hold points and confidences.
    Broken ones: text around the blocks, two answers, an answer in the reasoning, blocks left open, a token that is
    missing, repeated or in the wrong place, boxes with x2 < x1 or with NaN, malformed JSON, a copy of the prompt, and
    more; see `segrl.testing.answers.broken_completions`.

    Args:
        draw: Passed by hypothesis.
        frame: The frame in which the model writes.
        valid: False for broken completions; None mixes them in.
        near: (M, 4) boxes in original pixels; many boxes are these or near them.
        depth: Number of slices of a volume: a JSON answer names one of them, or one too many, with a list of boxes, or
            rarely none.
        completion_format: How they will be parsed; its `frame` is not used.
        empty: True for answers that find nothing, False for answers with at least one box; None for both.

    Returns:
        Strategy for texts.
    """
    completion_format = completion_format or CompletionFormat()
    width, height = frame.original_size
    found = draw(boxes(width, height, near=near, min_boxes=int(empty is False), max_boxes=0 if empty else 4))
    said: dict[str, Any] = {"rounding": frame.kind != "original_px"}
    said["notation"] = draw(st.sampled_from(NOTATIONS[completion_format.answer_format]))
    if completion_format.answer_format == "json" and not empty:
        if depth is not None and (empty is False or draw(st.sampled_from([True, True, True, False]))):
            said["slice_index"] = draw(st.integers(0, depth if empty is None else depth - 1))
        elif draw(st.booleans()):
            centres = (found[:, :2] + found[:, 2:] - 1) / 2
            said["points_px"] = draw(points(width, height, near=centres, max_points=4))
        elif draw(st.booleans()):
            said["scores"] = [draw(st.sampled_from(_SCORES)) for _ in found]
    reasoning = draw(st.one_of(st.just(REASONING), st.sampled_from(_DECOYS), _FREE_TEXT.filter(_is_shown)))
    if valid is None:
        valid = draw(st.sampled_from([True, True, True, False]))
    if not valid:
        texts = broken_completions(reasoning, write_answer(found, frame, completion_format, **said), completion_format)
        return texts[draw(st.sampled_from(list(texts)))]
    if not completion_format.require_seg and completion_format.seg_token and draw(st.booleans()):
        completion_format = replace(completion_format, seg_token="")
    text = write_completion(found, frame, completion_format, reasoning=reasoning, **said)
    if not completion_format.require_reasoning and draw(st.booleans()):
        text = text.partition("</think>")[2]
    return draw(st.sampled_from(["{}", "\n{}\n", "{}<|im_end|>\n<|endoftext|>"])).format(text)


@st.composite
def predictions(
    draw: Draw,
    target: Target | VolumeTarget,
    *,
    valid: bool | None = None,
    mask: bool | None = False,
    probability: bool = False,
    completion_format: CompletionFormat | None = None,
    empty: bool | None = None,
) -> Prediction:
    """Draw predictions for a ground truth, parsed from `completions` in original pixels, many of them close to it.

    Args:
        draw: Passed by hypothesis.
        target: The ground truth.
        valid: As in `completions`; None mixes broken ones in.
        mask: Whether a mask is decoded. As in training, an answer without the segmentation token has none. The mask of
            a volume is propagated from boxes on a slice instead, so it is empty without either, and only invalid texts
            may have none. None mixes predictions in that have none, and some whose mask does not follow from the text,
            as files may hold them.
        probability: Whether half of the masks have probabilities, which exceed 0.5 just inside the mask.
        completion_format: As in `completions`; the frame is always original pixels.
        empty: True for answers that find nothing, False for answers with a box and foreground; None for both.

    Returns:
        Strategy for predictions; the mask has the shape of the true one. A slice outside of the volume is either kept,
        or counts as not shown, as with a frame that lists the slices.
    """
    completion_format = completion_format or CompletionFormat()
    shown, depth, slices = target, None, None
    if isinstance(target, VolumeTarget):
        depth = target.depth
        shown = target.at(draw(st.integers(0, depth - 1)))
        slices = draw(st.sampled_from([None, tuple(range(depth))]))
    assert isinstance(shown, Target)
    frame = Frame("original_px", (target.width, target.height), slices=slices)
    text = draw(
        completions(frame, valid=valid, near=shown.boxes, depth=depth, completion_format=completion_format, empty=empty)
    )
    prediction = completion_format.parse(text, frame)
    kind = draw(st.sampled_from(["none", "decoded", "any"])) if mask is None else "decoded" if mask else "none"
    if kind == "none":
        return prediction
    if kind == "any":
        decoded = draw((volumes if isinstance(target, VolumeTarget) else masks)(near=target.mask, empty=empty))
    elif isinstance(target, VolumeTarget):
        if not prediction.valid and draw(st.booleans()):
            return prediction
        decoded = draw(volumes(near=target.mask, empty=empty if _can_propagate(prediction, target) else True))
    elif prediction.has_seg:
        decoded = draw(masks(near=target.mask, empty=empty))
    else:
        return prediction
    levels = None
    if probability and draw(st.booleans()):
        inside, outside = draw(st.sampled_from([1.0, 0.75])), draw(st.sampled_from([0.0, 0.25]))
        levels = np.where(decoded, inside, outside).astype(np.float32)
    return prediction.with_mask(decoded, levels)


def _can_propagate(prediction: Prediction, target: VolumeTarget) -> bool:
    k = prediction.slice_index
    return k is not None and 0 <= k < target.depth and len(prediction.boxes) > 0


@st.composite
def batches(
    draw: Draw,
    *,
    volume: bool = False,
    mask: bool | None = False,
    probability: bool = False,
    max_groups: int = 2,
    group_size: int | None = None,
    valid: bool | None = None,
    formats: Sequence[CompletionFormat] = (CompletionFormat(), CompletionFormat(answer_format="json")),
    max_size: int = MAX_SIZE,
) -> tuple[list[Prediction], list[Target | VolumeTarget], list[Hashable]]:
    """Draw batches as in GRPO: several consecutive predictions for each of some ground truths.

    Args:
        draw: Passed by hypothesis.
        volume: Whether ground truths are volumes.
        mask: Whether masks are decoded, as in `predictions`.
        probability: Whether masks may have probabilities.
        max_groups: Largest number of ground truths.
        group_size: Predictions for each ground truth; 1 to 3 if None.
        valid: Whether completions are valid.
        formats: Completion formats, one of which is drawn for the whole batch.
        max_size: Largest edge of an image, pixels.

    Returns:
        Strategy for (predictions, targets, groups), one of each per row; a group's rows share one target object.
    """
    completion_format = draw(st.sampled_from(list(formats)))
    rows: list[tuple[Prediction, Target | VolumeTarget, Hashable]] = []
    for group in range(draw(st.integers(1, max_groups))):
        target = draw(volume_targets(max_size=max_size) if volume else targets(max_size=max_size))
        for _ in range(draw(st.integers(1, 3)) if group_size is None else group_size):
            given = draw(
                predictions(
                    target, valid=valid, mask=mask, probability=probability, completion_format=completion_format
                )
            )
            rows.append((given, target, group))
    found, shown, groups = zip(*rows, strict=True)
    return list(found), list(shown), list(groups)
