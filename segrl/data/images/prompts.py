"""Text for training: queries, template reasoning, prompts and target completions.

Every choice between templates hangs on a stable hash of the row's name, so that the text of a row never changes between
epochs, repeats, processes or machines. Reasoning is built from the mask and never holds a coordinate (CORE-Seg strips
them from its reasoning, so that the boxes come from looking and not from copying).
"""

# H, W pixels of the original image; boxes (N, 4) xyxy, half-open, original pixels.

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
from datasets import Dataset, Image
from PIL import Image as PILImage
from PIL import ImageOps

from segrl.data.reasoning import build_reasoning
from segrl.errors import DataError, SegRLError
from segrl.geometry.masks import binarize, boxes_from_mask
from segrl.predictions.frames import Frame, FrameKind, frame_for, shrunk_size
from segrl.predictions.parsing import format_answer, format_completion, parse_completion
from segrl.predictions.prediction import Status

INSTRUCTION = (
    "Think in <think></think>, then answer in <answer></answer>: name the lesion, give its boxes [x1, y1, x2, y2] and "
    "end with the mask token."
)
ANSWER_ONLY_INSTRUCTION = (
    "Answer in <answer></answer>: name the lesion, give its boxes [x1, y1, x2, y2] and end with the mask token."
)


def build_prompt(query: str, instruction: str = INSTRUCTION) -> list[dict[str, str]]:
    """The conversation that asks one question, text only: TRL puts the image in front of it.

    Neither default instruction spells the segmentation token: a `<seg>` in the prompt could be taken for the model's.

    Returns:
        One user message, `[{"role": "user", "content": "<query> <instruction>"}]`.
    """
    return [{"role": "user", "content": f"{query} {instruction}".strip()}]


def prepare(
    dataset: Dataset,
    processor: Any,
    *,
    completions: bool,
    max_edge: int | None = None,
    instruction: str | None = None,
    reasoning: bool = True,
    brief: bool = False,
    max_boxes: int | None = None,
    frame_kind: FrameKind | None = None,
    seg_token: str = "<seg>",
    num_proc: int | None = None,
) -> Dataset:
    """Adds the columns that the trainers read: `prompt`, and `completion` for supervised fine-tuning.

    Args:
        dataset: canonical columns (image, mask, query, modality, anatomy, lesion, name, optional reasoning).
        processor: the model's processor; decides the frame in which boxes are written. May be None when `frame_kind` is
            "original_px" or "relative_1000".
        completions: also build target completions; leave it off for GRPO.
        max_edge: images with a longer edge are scaled down to it, keeping the aspect; masks keep the original size.
        instruction: appended to every query; None picks INSTRUCTION, or ANSWER_ONLY_INSTRUCTION without reasoning.
        reasoning: write a `<think>` block, from the reasoning column where it is filled, else from templates. False
            drops the block ("CoT off"); parse such completions with `require_reasoning=False`.
        brief: short template reasoning, for tiny models.
        max_boxes: write only the boxes of the largest components; a mask with a hundred specks makes a long answer.
            Rewards still compare with all of them.
        frame_kind: overrides the frame that the processor implies.
        seg_token: ends every answer; "" leaves it out.
        num_proc: processes for `Dataset.map`.

    Returns:
        The data set with its columns kept, plus `prompt` and, if asked for, `completion`, both as message lists.

    Raises:
        DataError: if a column is missing, a limit is below 1, there is neither processor nor frame, a mask is not
            binary or has another size than its image, or a row's texts give a completion that does not parse.
    """
    needed = ("image", "mask", "query", "modality", "anatomy", "lesion", "name") if completions else ("image", "query")
    missing = [column for column in needed if column not in dataset.column_names]
    if missing:
        raise DataError(f"dataset lacks the columns {missing}: expected {list(needed)}, found {dataset.column_names}")
    for setting, value in (("max_edge", max_edge), ("max_boxes", max_boxes)):
        if value is not None and value < 1:
            raise DataError(f"{setting}={value}: expected 1 or more, or None for no limit")
    if completions and processor is None and frame_kind not in ("original_px", "relative_1000"):
        raise DataError(
            f"processor=None with frame_kind={frame_kind!r}: pass the model's processor, or one of the frames that "
            "need none, 'original_px' or 'relative_1000'"
        )
    if instruction is None:
        instruction = INSTRUCTION if reasoning else ANSWER_ONLY_INSTRUCTION
    row_columns = functools.partial(
        _row_columns,
        processor=processor if completions else None,
        completions=completions,
        max_edge=max_edge,
        instruction=instruction,
        reasoning=reasoning,
        brief=brief,
        max_boxes=max_boxes,
        frame_kind=frame_kind,
        seg_token=seg_token,
    )
    encoded = dataset.cast_column("image", Image(decode=False))  # images that keep their size keep their bytes
    return encoded.map(row_columns, num_proc=num_proc, desc="prompts").cast_column("image", Image())


def _row_columns(
    row: dict[str, Any],
    *,
    processor: Any,
    completions: bool,
    max_edge: int | None,
    instruction: str,
    reasoning: bool,
    brief: bool,
    max_boxes: int | None,
    frame_kind: FrameKind | None,
    seg_token: str,
) -> dict[str, Any]:
    columns: dict[str, Any] = {"prompt": build_prompt(row["query"], instruction)}
    if not completions and max_edge is None:
        return columns
    with _open(row["image"]) as image:
        original_size = _upright_size(image)
        image_size = shrunk_size(original_size, max_edge)
        if image_size != original_size:
            smaller = ImageOps.exif_transpose(image).resize(image_size, PILImage.Resampling.BICUBIC)
            buffer = io.BytesIO()
            smaller.save(buffer, format="PNG", compress_level=1)
            columns["image"] = {"bytes": buffer.getvalue(), "path": None}
    if not completions:
        return columns
    mask = binarize(np.asarray(row["mask"]), f"mask of {row['name']}")
    if mask.shape[::-1] != original_size:
        raise DataError(
            f"{row['name']}: the mask is {mask.shape[1]} x {mask.shape[0]} px, the image {original_size[0]} x "
            f"{original_size[1]}; expected the same size; resize the mask with nearest neighbour"
        )
    if processor is None:
        assert frame_kind is not None  # checked in `prepare`
        frame = Frame(frame_kind, original_size)
    else:
        frame = frame_for(processor, image_size, original_size, kind=frame_kind)
    thought = None
    if reasoning:
        thought = (row.get("reasoning") or "").strip() or build_reasoning(
            lesion=row["lesion"],
            anatomy=row["anatomy"],
            modality=row["modality"],
            mask=mask,
            key=row["name"],
            query=row["query"],
            brief=brief,
        )
    try:
        answer = format_answer(row["lesion"] or "lesion", boxes_from_mask(mask)[:max_boxes], frame, seg_token=seg_token)
        text = format_completion(thought, answer)
    except SegRLError as error:
        raise DataError(f"{row['name']}: {error}") from error
    status = parse_completion(
        text, frame, seg_token=seg_token, require_seg=bool(seg_token), require_reasoning=reasoning
    ).status
    if status is not Status.VALID:
        raise DataError(
            f"{row['name']}: the completion {text[:200]!r} parses as {status.value!r}, expected 'valid'; remove "
            f"tags and {seg_token!r} from the reasoning column"
        )
    return columns | {"completion": [{"role": "assistant", "content": text}]}


def _open(value: dict[str, Any]) -> PILImage.Image:
    return PILImage.open(value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"]))


def _upright_size(image: PILImage.Image) -> tuple[int, int]:
    """(width, height) after the EXIF rotation, without decoding the pixels."""
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else (image.width, image.height)
