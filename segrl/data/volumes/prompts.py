"""Prompts and target completions for volumes: slices with their numbers, a question, and an answer in JSON.

MedVol-R1 shows 64 slices of 256 px, each after an identifier such as `<slice 1>`, and lets the model answer with the
number of a key slice and the boxes on it. For supervised fine-tuning the slices are ranked by foreground area and one
of the K largest is the answer's; the boxes are those of the connected components there.
"""

# D slices of the volume, S slices shown, H/W pixels of a slice

from __future__ import annotations

import functools
import hashlib
import io
import json
from typing import Any

import numpy as np
from datasets import Dataset, Image, List
from PIL import Image as PILImage

from segrl.data.reasoning import build_reasoning
from segrl.data.volumes.case import read_grey, read_truth
from segrl.data.volumes.slices import render_slices, shown_frame, uniform_slices
from segrl.errors import DataError, SegRLError
from segrl.geometry.masks import boxes_from_mask
from segrl.predictions.frames import Frame, FrameKind
from segrl.predictions.json_answers import BOX_LIST_KEY, SLICE_KEY
from segrl.predictions.parsing import format_completion

__all__ = ["SLICE_INSTRUCTION", "build_volume_prompt", "format_slice_answer", "prepare_volumes"]

SLICE_INSTRUCTION = (
    "Think in <think></think>, then answer in <answer></answer> with JSON: the slice that shows it best and its boxes "
    'on that slice, {"slice": number, "bbox_2d_list": [[x1, y1, x2, y2]]}.'
)
_COLUMNS = ("scan", "label", "label_value", "intensity", "query", "modality", "anatomy", "lesion", "name")
_PLACES = ("lowest", "middle", "highest")


def build_volume_prompt(query: str, count: int, instruction: str = SLICE_INSTRUCTION) -> list[dict[str, Any]]:
    """The conversation that asks one question about a stack of slices.

    Args:
        query: The question.
        count: Number of slices shown, S; they are numbered from 1.
        instruction: Follows the question.

    Returns:
        One user message with 2 S + 1 blocks, each image after its identifier; TRL fills in the images in order.

    Example:
        >>> (message,) = build_volume_prompt("Where is it?", 2, "")
        >>> " ".join(block["text"] or "(image)" for block in message["content"])
        '<slice 1> (image) <slice 2> (image) Where is it?'
    """
    blocks: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        blocks += [{"type": "text", "text": f"<slice {number}>"}, {"type": "image", "text": None}]
    blocks.append({"type": "text", "text": f"{query} {instruction}".strip()})
    return [{"role": "user", "content": blocks}]


def format_slice_answer(place: int, boxes_px: np.ndarray, frame: Frame) -> str:
    """Write the answer: the number of a slice and the boxes on it.

    Args:
        place: Place of the slice among those shown, from 0; the written number is one more.
        boxes_px: (N, 4) boxes in original pixels.
        frame: See `shown_frame`.

    Returns:
        JSON that `parse_completion(..., answer_format="json")` reads back.

    Example:
        >>> format_slice_answer(2, np.array([[1, 2, 9, 8]]), Frame("original_px", (64, 64), slices=(0, 3, 6)))
        '{"slice": 3, "bbox_2d_list": [[1, 2, 9, 8]]}'
    """
    return json.dumps({SLICE_KEY: place + 1, BOX_LIST_KEY: frame.from_original(boxes_px).tolist()})


def prepare_volumes(
    dataset: Dataset,
    processor: Any,
    *,
    completions: bool,
    slices: int = 64,
    size: int = 256,
    top_k: int = 5,
    instruction: str = SLICE_INSTRUCTION,
    reasoning: bool = True,
    brief: bool = False,
    max_boxes: int | None = None,
    frame_kind: FrameKind | None = None,
    seed: int = 0,
    num_proc: int | None = None,
) -> Dataset:
    """Adds the columns that the trainers read: `images`, `slices`, `prompt`, and `completion` for fine-tuning.

    Args:
        dataset: Rows of `segrl.data.load_volumes`; a column `reasoning` is used where it is filled.
        processor: The model's processor; decides the frame in which boxes are written. May be None with `frame_kind`
            "original_px" or "relative_1000".
        completions: Also build target completions; leave it off for GRPO.
        slices: Slices shown, at equal distances; a volume with fewer shows all of them. MedVol-R1: 64.
        size: Longest edge of a shown slice, pixels. MedVol-R1: 256.
        top_k: The answer's slice is one of so many with the most foreground among those shown, drawn by a stable hash
            of name and seed. The paper is silent on K.
        instruction: Follows every question.
        reasoning: Write a `<think>` block. It never holds a coordinate or a number of a slice.
        brief: Short template reasoning, for tiny models.
        max_boxes: Write only the boxes of the largest components. Rewards still compare with all of them.
        frame_kind: Overrides the frame that the processor implies.
        seed: Draws other key slices.
        num_proc: Processes for `Dataset.map`.

    Returns:
        The data set with its columns kept, plus `images` (S pictures), `slices` (S indices in the volume), `prompt`
        and, if asked for, `completion` and `key_slice` (the index in the volume of the answer's slice).

    Raises:
        DataError: There are no rows, a column is missing, a number is below 1, a file cannot be read, or, for
            completions, a row has no label or a lesion that no shown slice holds; names the row or file.
    """
    if not len(dataset):
        raise DataError("dataset has no rows: expected at least one; check the split and the filters before it")
    missing = [column for column in _COLUMNS if column not in dataset.column_names]
    if missing:
        raise DataError(f"dataset lacks the columns {missing}: expected {list(_COLUMNS)}; load_volumes gives them")
    for name, value in {"slices": slices, "size": size, "top_k": top_k, "max_boxes": max_boxes}.items():
        if value is not None and value < 1:
            raise DataError(f"{name}={value}: expected 1 or more")
    if processor is None and frame_kind not in ("original_px", "relative_1000"):
        raise DataError(f"processor=None with frame_kind={frame_kind!r}: pass the model's processor")
    row_columns = functools.partial(
        _row_columns,
        processor=processor,
        completions=completions,
        count=slices,
        size=size,
        top_k=top_k,
        instruction=instruction,
        reasoning=reasoning,
        brief=brief,
        max_boxes=max_boxes,
        frame_kind=frame_kind,
        seed=seed,
    )
    return dataset.map(row_columns, num_proc=num_proc, desc="slices").cast_column("images", List(Image()))


def _row_columns(
    row: dict[str, Any], *, processor: Any, completions: bool, count: int, size: int, instruction: str, **settings: Any
) -> dict[str, Any]:
    volume, grey = read_grey(row["scan"], modality=row["modality"], intensity=row["intensity"])
    shown = uniform_slices(len(grey), count)
    images = render_slices(grey, shown, size)
    columns: dict[str, Any] = {
        "images": [_png(image) for image in images],
        "slices": shown.tolist(),
        "prompt": build_volume_prompt(row["query"], len(shown), instruction),
    }
    if not completions:
        return columns
    frame = shown_frame(processor, grey.shape, shown, images[0].size, settings["frame_kind"])
    mask = read_truth(row, volume)
    place = _key_place(mask[shown], settings["top_k"], f"{row['name']} {settings['seed']}", row)
    key = int(shown[place])
    boxes = boxes_from_mask(mask[key])[: settings["max_boxes"]]
    try:
        height = (place + 0.5) / len(shown)  # of the slice's middle in the stack
        thought = _reasoning(row, mask[key], height, settings["brief"]) if settings["reasoning"] else None
        text = format_completion(thought, format_slice_answer(place, boxes, frame))
    except SegRLError as error:
        raise DataError(f"{row['name']}: {error}") from error
    return columns | {"completion": [{"role": "assistant", "content": text}], "key_slice": key}


def _key_place(shown: np.ndarray, top_k: int, key: str, row: dict[str, Any]) -> int:
    """Place of one of the `top_k` slices with the most foreground, (S, H, W); those without any never count."""
    areas = shown.sum(axis=(1, 2))
    ranked = np.argsort(-areas, kind="stable")[:top_k]
    visible = ranked[areas[ranked] > 0]
    if not len(visible):
        raise DataError(
            f"{row['label']}: none of the {len(shown)} slices shown holds foreground (label_value="
            f"{row['label_value']}); show more slices, or remove the row"
        )
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"segrl").digest()
    return int(visible[int.from_bytes(digest, "big") % len(visible)])


def _reasoning(row: dict[str, Any], mask: np.ndarray, height: float, brief: bool) -> str:
    if (row.get("reasoning") or "").strip():
        return row["reasoning"].strip()
    texts = {name: row[name] for name in ("lesion", "anatomy", "modality", "query")}
    place = f"It is best seen in the {_PLACES[min(2, int(3 * height))]} third of the slices."
    return f"{build_reasoning(mask=mask, key=row['name'], brief=brief, **texts)} {place}"


def _png(image: PILImage.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}
