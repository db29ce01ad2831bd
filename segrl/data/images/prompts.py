"""Prompts and target completions for images."""

# H, W pixels of the original image; boxes (N, 4) xyxy, half-open, original pixels.

from __future__ import annotations

import functools
import io
from typing import Any

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from segrl.data.completions import check_preparation, target_completion
from segrl.data.coordinates import CoordinatePolicy, check_coordinates, given_reasoning
from segrl.data.reasoning import build_reasoning
from segrl.data.text_columns import check_lesions, check_texts, lesion_name, name_classes
from segrl.errors import DataError
from segrl.geometry.image_files import image_orientation, open_image, read_image
from segrl.geometry.mask_images import binarize
from segrl.geometry.masks import boxes_from_mask, deepest_points
from segrl.predictions.frames import Frame, frame_for, shrunk_size
from segrl.predictions.parsing import format_answer
from segrl.predictions.prompt_settings import ImagePromptSettings
from segrl.predictions.target import METADATA_COLUMNS

__all__ = ["FULL_IMAGE", "build_prompt", "prepare", "shown_image"]

FULL_IMAGE = "full_image"  # column of the original, as a file, where the image that the model sees is smaller


def build_prompt(query: str, instruction: str) -> list[dict[str, str]]:
    """Build the conversation that asks one question, text only: TRL puts the image in front of it.

    No default instruction spells the segmentation token: a `<seg>` in the prompt could be taken for the model's.

    Args:
        query: The question.
        instruction: Follows it, see `PromptSettings.full_instruction`; "" adds nothing.

    Returns:
        One user message, `[{"role": "user", "content": "<query> <instruction>"}]`.

    Example:
        >>> build_prompt("Where is the cyst?", "Answer with a box.")
        [{'role': 'user', 'content': 'Where is the cyst? Answer with a box.'}]
    """
    return [{"role": "user", "content": f"{query} {instruction}".strip()}]


def prepare(
    dataset: Dataset,
    processor: Any,
    settings: ImagePromptSettings | None = None,
    *,
    completions: bool,
    brief: bool = False,
    max_boxes: int | None = None,
    coordinates: CoordinatePolicy = "refuse",
    num_proc: int | None = None,
) -> Dataset:
    """Add the columns that the trainers read: `prompt`, and `completion` for supervised fine-tuning.

    Args:
        dataset: Canonical columns (image, mask, query, modality, anatomy, lesion, name, optional reasoning).
        processor: The model's processor; it decides the frame in which boxes are written. May be None when the
            settings' `frame_kind` is "original_px" or "relative_1000".
        settings: How the model is asked; the defaults of `ImagePromptSettings` when None. With `reasoning` the answer
            has a `<think>` block, from the reasoning column where it is filled, else from templates. Images are scaled
            down to `max_edge`; masks keep the original size.
        completions: Also build target completions; leave it off for GRPO.
        brief: Short template reasoning, for tiny models.
        max_boxes: Write only the boxes of the largest components; a mask with a hundred specks makes a long answer.
            Rewards still compare with all of them.
        coordinates: What to do with coordinates in the reasoning column: "refuse" them, "strip" them as CORE-Seg does,
            or "keep" them. See `find_coordinates`.
        num_proc: Processes for `Dataset.map`.

    Returns:
        The data set with its columns kept, plus `prompt` and, if asked for, `completion`, both as message lists; and
        `full_image`, the original as a file where `image` was scaled down: the segmenter of a mask head sees that.

    Raises:
        DataError: There are no rows, a column is missing or holds no texts, a row has no lesion although its query asks
            for something (completions only), a limit is below 1, there is neither processor nor frame,
            given reasoning holds coordinates, a mask is not binary or has another size than its image, or a row's texts
            give a completion that does not parse.

    Example:
        >>> from segrl.data import make_synthetic, prepare
        >>> from segrl.predictions import ImagePromptSettings
        >>> settings = ImagePromptSettings(frame_kind="original_px", reasoning=False)
        >>> rows = prepare(make_synthetic(1, seed=1), None, settings, completions=True)
        >>> rows[0]["completion"][0]["content"].endswith("<seg></answer>")
        True
    """
    settings = settings or ImagePromptSettings()
    check_texts(dataset)
    dataset = name_classes(dataset)
    columns = ("image", "mask", *METADATA_COLUMNS) if completions else ("image", "query")
    limits = {"max_boxes": max_boxes}
    check_preparation(
        dataset,
        processor,
        settings,
        columns,
        limits,
        source="segrl.data.load_folder",
        needs_frame=completions,
    )
    if completions:
        check_lesions(dataset)
    if completions and settings.reasoning:
        check_coordinates(dataset, coordinates)
    row_columns = functools.partial(
        _row_columns,
        processor=processor,
        settings=settings,
        completions=completions,
        brief=brief,
        max_boxes=max_boxes,
        coordinates=coordinates,
    )
    encoded = dataset.cast_column("image", Image(decode=False))  # images that keep their size keep their bytes
    message = List({"role": Value("string"), "content": Value("string")})
    features = {**encoded.features, "prompt": message}
    if completions:
        features["completion"] = message
    if FULL_IMAGE in features:  # prepared before: from the originals again
        encoded = encoded.cast_column(FULL_IMAGE, Image(decode=False))
    if settings.max_edge is not None or FULL_IMAGE in features:
        features[FULL_IMAGE] = Image(decode=False)
    made = encoded.map(row_columns, num_proc=num_proc, desc="prompts", features=Features(features))
    return made.cast_column("image", Image())


def shown_image(image: PILImage.Image, max_edge: int | None) -> PILImage.Image:
    """Return the image as the model sees it: upright, in RGB, the longest edge at most `max_edge` pixels, aspect kept.

    Example:
        >>> from PIL import Image
        >>> shown_image(Image.new("RGB", (1024, 512)), 512).size
        (512, 256)
    """
    upright = read_image(image)
    size = shrunk_size(upright.size, max_edge)
    return upright if size == upright.size else upright.resize(size, PILImage.Resampling.BICUBIC)


def _row_columns(
    row: dict[str, Any],
    *,
    processor: Any,
    settings: ImagePromptSettings,
    completions: bool,
    brief: bool,
    max_boxes: int | None,
    coordinates: CoordinatePolicy,
) -> dict[str, Any]:
    columns: dict[str, Any] = {"prompt": build_prompt(row["query"], settings.full_instruction)}
    whole = row.get(FULL_IMAGE) or row["image"]
    if settings.max_edge is not None or FULL_IMAGE in row:
        columns |= {"image": whole, FULL_IMAGE: None}
    elif not completions:
        return columns
    with open_image(whole, f"image of {row.get('name', '')}") as image:
        original_size = _upright_size(image)
        image_size = shrunk_size(original_size, settings.max_edge)
        if image_size != original_size:
            buffer = io.BytesIO()
            shown_image(image, settings.max_edge).save(buffer, format="PNG", compress_level=1)
            columns |= {"image": {"bytes": buffer.getvalue(), "path": None}, FULL_IMAGE: whole}
    if not completions:
        return columns
    mask = binarize(row["mask"], f"mask of {row['name']}")
    if mask.shape[::-1] != original_size:
        raise DataError(
            f"{row['name']}: the mask is {mask.shape[1]} x {mask.shape[0]} px, the image {original_size[0]} x "
            f"{original_size[1]}; expected the same size; resize the mask with nearest neighbour"
        )
    if processor is None:
        assert settings.frame_kind is not None  # checked in `prepare`
        frame = Frame(settings.frame_kind, original_size)
    else:
        frame = frame_for(processor, image_size, original_size, kind=settings.frame_kind)
    reasoning = None
    if settings.reasoning:
        texts = {name: row[name] for name in ("lesion", "anatomy", "modality", "query")}
        reasoning = given_reasoning(row, coordinates) or build_reasoning(
            mask=mask, key=row["name"], brief=brief, **texts
        )

    def answer() -> str:
        boxes = boxes_from_mask(mask)[:max_boxes]
        points = deepest_points(mask, boxes) if settings.answer_form == "json" else None
        more = {"form": settings.answer_form, "points_px": points}
        return format_answer(lesion_name(row), boxes, frame, seg_token=settings.seg_token, **more)

    return columns | {"completion": target_completion(row["name"], reasoning, answer, frame, settings)}


def _upright_size(image: PILImage.Image) -> tuple[int, int]:
    """(width, height) after the EXIF rotation, without decoding the pixels."""
    turned = image_orientation(image) >= 5
    return (image.height, image.width) if turned else (image.width, image.height)
