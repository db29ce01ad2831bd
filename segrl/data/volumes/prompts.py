"""Prompts and target completions for volumes: slices with their numbers, a question, and an answer in JSON.

MedVol-R1 shows 64 slices of 256 px, each after an identifier such as `<slice 1>`, and lets the model answer with the
number of a key slice and the boxes on it. For supervised fine-tuning the slices are ranked by foreground area, and the
answer names one of the K largest; its boxes are those of the connected components there.
"""

# D slices of the volume, S slices shown, H/W pixels of a slice

from __future__ import annotations

import functools
import io
import json
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from segrl.data.completions import check_preparation, target_completion
from segrl.data.coordinates import CoordinatePolicy, check_coordinates, given_reasoning
from segrl.data.reasoning import build_reasoning, pick_by_hash
from segrl.data.text_columns import check_texts, lesion_name, name_classes
from segrl.data.volumes.case import CaseReader
from segrl.data.volumes.folder import rows_by_scan
from segrl.data.volumes.slices import render_slices, shown_frame, uniform_slices
from segrl.errors import DataError
from segrl.geometry.masks import boxes_from_mask
from segrl.predictions.frames import Frame
from segrl.predictions.json_answers import BOX_LIST_KEY, SLICE_KEY
from segrl.predictions.prompt_settings import VolumePromptSettings
from segrl.predictions.target import METADATA_COLUMNS

__all__ = ["NOTHING", "build_volume_prompt", "format_slice_answer", "prepare_volumes"]

_COLUMNS = ("scan", "label", "label_value", "intensity", *METADATA_COLUMNS)
_THIRDS = ("lowest", "middle", "highest")
NOTHING = "{}"  # the answer where there is nothing: neither a slice nor boxes
_TEXT = Value("string")
_SHOWN = {
    "images": List(Image()),
    "slices": List(Value("int64")),
    "prompt": List({"role": _TEXT, "content": List({"type": _TEXT, "text": _TEXT})}),
}
_FEATURES = {**_SHOWN, "completion": List({"role": _TEXT, "content": _TEXT}), "key_slice": Value("int64")}


def build_volume_prompt(query: str, count: int, instruction: str) -> list[dict[str, Any]]:
    """Build the conversation that asks one question about a stack of slices.

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


def format_slice_answer(position: int, boxes_px: np.ndarray, frame: Frame, *, seg_token: str = "") -> str:
    """Write the answer: the number of a slice and the boxes on it.

    Args:
        position: Position of the slice among those shown, from 0; the written number is one more.
        boxes_px: (N, 4) boxes in original pixels.
        frame: See `shown_frame`.
        seg_token: Ends the answer of a model with a mask head.

    Returns:
        JSON that `parse_completion(..., answer_format="json")` reads back.

    Example:
        >>> format_slice_answer(2, np.array([[1, 2, 9, 8]]), Frame("original_px", (64, 64), slices=(0, 3, 6)))
        '{"slice": 3, "bbox_2d_list": [[1, 2, 9, 8]]}'
    """
    return json.dumps({SLICE_KEY: position + 1, BOX_LIST_KEY: frame.from_original(boxes_px).tolist()}) + seg_token


def prepare_volumes(
    dataset: Dataset,
    processor: Any,
    settings: VolumePromptSettings | None = None,
    *,
    completions: bool,
    top_k: int = 5,
    brief: bool = False,
    max_boxes: int | None = None,
    seed: int = 0,
    coordinates: CoordinatePolicy = "refuse",
    num_proc: int | None = None,
) -> Dataset:
    """Add the columns that the trainers read: `images`, `slices`, `prompt`, and `completion` for fine-tuning.

    Args:
        dataset: Rows of `segrl.data.load_volumes`; a column `reasoning` is used where it is filled.
        processor: The model's processor; it decides the frame in which boxes are written. May be None when the
            settings' `frame_kind` is "original_px" or "relative_1000".
        settings: How the model is asked; the defaults of `VolumePromptSettings` when None. With `reasoning` the answer
            has a `<think>` block, which never holds a coordinate or the number of a slice.
        completions: Also build target completions; leave it off for GRPO.
        top_k: The answer's slice is one of the K with the most foreground among those shown, drawn by a stable hash of
            name and seed. The paper is silent on K.
        brief: Short template reasoning, for tiny models.
        max_boxes: Write only the boxes of the largest components. Rewards still compare with all of them.
        seed: Draws other key slices.
        coordinates: What to do with coordinates and numbers of slices in the reasoning column: "refuse", "strip" or
            "keep" them. See `find_coordinates`.
        num_proc: Processes for `Dataset.map`.

    Returns:
        The data set with its columns kept, plus `images` (S pictures), `slices` (S indices in the volume), `prompt`
        and, if asked for, `completion` and `key_slice` (the index in the volume of the answer's slice). Where the label
        has no foreground, the answer names neither slice nor boxes, `{}`, and `key_slice` is None.

    Raises:
        DataError: There are no rows, a column is missing or holds no texts, a row that needs template reasoning has no
            lesion although its query asks for something, a text holds a token with a meaning for the processor
            (`segrl.predictions.check_reserved`), a number is below 1, a file cannot be read, or, for
            completions, given reasoning holds coordinates, a row has no label or a lesion that no shown slice holds;
            names the row or file.

    Example:
        >>> from segrl.data import make_synthetic_volumes
        >>> settings = VolumePromptSettings(slices=4, size=32, frame_kind="original_px")
        >>> volumes = make_synthetic_volumes(1, "volumes", depth=8, size=32)
        >>> rows = prepare_volumes(volumes, None, settings, completions=True)
        >>> rows[0]["slices"], rows[0]["key_slice"] in rows[0]["slices"], len(rows[0]["images"])
        ([0, 2, 5, 7], True, 4)
    """
    settings = settings or VolumePromptSettings()
    check_texts(dataset)
    dataset = name_classes(dataset)
    limits = {"top_k": top_k, "max_boxes": max_boxes}
    check_preparation(dataset, processor, settings, _COLUMNS, limits, source="segrl.data.load_volumes")
    if completions and settings.reasoning:
        check_coordinates(dataset, coordinates, volume=True)
    row_columns = functools.partial(
        _row_columns,
        processor=processor,
        settings=settings,
        completions=completions,
        top_k=top_k,
        brief=brief,
        max_boxes=max_boxes,
        seed=seed,
        coordinates=coordinates,
        read_case=CaseReader(0),
    )
    # Rows of a scan side by side, so that it is read once, and back again.
    order = rows_by_scan(dataset.select_columns(list(_COLUMNS)).to_list())
    moved = order != list(range(len(order)))
    rows = dataset.select(order) if moved else dataset
    features = Features({**rows.features, **(_FEATURES if completions else _SHOWN)})
    rows = rows.map(row_columns, num_proc=num_proc, desc="slices", features=features)
    return rows.select(np.argsort(order)) if moved else rows


def _row_columns(
    row: dict[str, Any],
    *,
    processor: Any,
    settings: VolumePromptSettings,
    completions: bool,
    top_k: int,
    brief: bool,
    max_boxes: int | None,
    seed: int,
    coordinates: CoordinatePolicy,
    read_case: CaseReader,
) -> dict[str, Any]:
    case = read_case(row, label=completions, allow_empty=True)
    mask = case.mask
    shown = uniform_slices(len(case.grey), settings.slices)
    images = render_slices(case.grey, shown, settings.size, case.scan.spacing_mm)
    columns: dict[str, Any] = {
        "images": [_png(image) for image in images],
        "slices": shown.tolist(),
        "prompt": build_volume_prompt(row["query"], len(shown), settings.full_instruction),
    }
    if mask is None:
        return columns
    frame = shown_frame(processor, case.grey.shape, shown, images[0].size, settings.frame_kind)
    position, key, where = None, None, ""
    if mask.any():
        position = _key_position(mask[shown], top_k, f"{row['name']} {seed}", row)
        key = int(shown[position])
        third = _THIRDS[min(2, int(3 * (position + 0.5) / len(shown)))]  # of the slice's middle in the stack
        where = f" It is best seen in the {third} third of the slices."
    reasoning = _reasoning(row, mask[key or 0], where, brief, coordinates) if settings.reasoning else None

    def answer() -> str:
        if position is None:
            return NOTHING + settings.seg_token
        return format_slice_answer(
            position, boxes_from_mask(mask[key])[:max_boxes], frame, seg_token=settings.seg_token
        )

    completion = target_completion(row["name"], reasoning, answer, frame, settings)
    return columns | {"completion": completion, "key_slice": key}


def _key_position(shown: np.ndarray, top_k: int, key: str, row: dict[str, Any]) -> int:
    """Position of one of the `top_k` slices with the most foreground, (S, H, W); those without any never count."""
    areas = shown.sum(axis=(1, 2))
    ranked = np.argsort(-areas, kind="stable")[:top_k]
    visible = ranked[areas[ranked] > 0]
    if not len(visible):
        raise DataError(
            f"{row['label']}: none of the {len(shown)} slices shown holds foreground (label_value="
            f"{row['label_value']}); show more slices, or remove the row"
        )
    return pick_by_hash(visible.tolist(), key)


def _reasoning(row: dict[str, Any], mask: np.ndarray, where: str, brief: bool, policy: CoordinatePolicy) -> str:
    if written := given_reasoning(row, policy, volume=True):
        return written
    texts = {name: row[name] for name in ("anatomy", "modality", "query")} | {"lesion": lesion_name(row)}
    return build_reasoning(mask=mask, key=row["name"], brief=brief, **texts) + where


def _png(image: PILImage.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}
