"""Images: rows with `image` and `mask`, masks decoded by the head from the states of answers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from segrl.caching.content import content_key
from segrl.data.images.prompts import FULL_IMAGE
from segrl.errors import DataError, SegRLError
from segrl.geometry.image_files import read_image
from segrl.geometry.mask_images import binarize, mask_values
from segrl.geometry.masks import soft_target
from segrl.heads.decoding import Completions, add_masks, check_token
from segrl.heads.mask_head import MaskHead
from segrl.heads.requests import SegInput
from segrl.predictions.frames import Frame, frame_for
from segrl.predictions.prediction import Prediction
from segrl.predictions.prompt_settings import ImagePromptSettings
from segrl.predictions.target import METADATA_COLUMNS, Target
from segrl.rewards.reward import Reward
from segrl.segmenters.box_segmenter import BoxSegmenter

__all__ = ["ImageRow", "ImageTask"]


@dataclass(eq=False)
class ImageRow:
    """One data set row, read.

    Attributes:
        target: The ground truth; None in inference, where nobody knows it.
        frame: Of the boxes that the model writes.
        seg_input: What the segmenter sees; None without a head and without a box segmenter.
    """

    target: Target | None
    frame: Frame
    seg_input: SegInput | None = None


class ImageTask:
    """Rows with the columns `image` (or `images`, whose first is segmented) and `mask`; see `segrl.tasks.base.Task`.

    The segmenter sees the original, `full_image`, where `segrl.data.prepare` has scaled `image` down for the model.

    Args:
        processor: The model's processor; it decides the frame of written boxes.
        settings: How the model is asked.
        head: The model's mask head; None when there is none.
        box_segmenter: A frozen segmenter that makes masks of the boxes of answers, for a model without a head; without
            either, rows need no image and answers have no mask.

    Raises:
        SegRLError: A head and a box segmenter.

    Example:
        >>> import numpy as np
        >>> task = ImageTask(None, ImagePromptSettings(frame_kind="original_px"))
        >>> (row,) = task.read([{"mask": np.eye(3, dtype=bool), "lesion": "cyst"}])
        >>> row.target.lesion, row.target.boxes.tolist(), row.frame.original_size
        ('cyst', [[0.0, 0.0, 3.0, 3.0]], (3, 3))
    """

    columns = ("mask", FULL_IMAGE, *METADATA_COLUMNS)

    def __init__(
        self,
        processor: Any,
        settings: ImagePromptSettings | None = None,
        head: MaskHead | None = None,
        box_segmenter: BoxSegmenter | None = None,
    ) -> None:
        if head is not None and box_segmenter is not None:
            raise SegRLError("box_segmenter: the model has a mask head, which makes the masks; drop one of the two")
        self.processor, self.head, self.box_segmenter = processor, head, box_segmenter
        self._logged_images = 0 if box_segmenter is None else box_segmenter.encoded_images
        self.settings = settings or ImagePromptSettings()

    @property
    def needed(self) -> tuple[str, ...]:
        return ("image", "mask") if self.makes_masks else ("mask",)

    @property
    def makes_masks(self) -> bool:
        return self.head is not None or self.box_segmenter is not None

    def check(self, rewards: Sequence[Reward], tokenizer: Any) -> None:
        for reward in rewards:
            if reward.volume:
                raise SegRLError(f"reward {reward.name!r} reads the ground truth of a volume, and the rows are images")
        if self.head is not None:
            check_token(self.head, tokenizer)

    def read(self, rows: Sequence[Mapping[str, Any]]) -> list[ImageRow]:
        """Read rows; equal content gives one object, so that an image is encoded once.

        Raises:
            DataError: A row has no image or no mask, or the mask is not binary; names the row.
        """
        known: dict[str, ImageRow] = {}
        first: dict[str, SegInput] = {}
        result = []
        for number, row in enumerate(rows):
            name = str(row.get("name") or f"row {number} of the batch")
            image, mask = _image(row, name, needed=self.makes_masks), _mask(row, name)
            texts = Target.texts_of(row)
            full = row.get(FULL_IMAGE) if self.makes_masks else None
            image_key = content_key(image) if full is None else _file_key(full, name)
            key = content_key(image_key, None if image is None else image.size, mask, texts)
            if key not in known:
                target = Target.from_mask(binarize(mask, name), **{**texts, "name": name})
                seg_input = self._input(image if full is None else full, target, first.get(image_key), image_key)
                known[key] = ImageRow(target, self._frame(image, target), seg_input)
                if seg_input is not None:
                    first.setdefault(image_key, seg_input)
            result.append(known[key])
        return result

    def _frame(self, image: Image.Image | None, target: Target) -> Frame:
        size = (target.width, target.height)
        return frame_for(self.processor, size if image is None else image.size, size, kind=self.settings.frame_kind)

    def _input(self, image: Any, target: Target, same: SegInput | None, key: str) -> SegInput | None:
        maker = self.head or self.box_segmenter
        if maker is None or image is None:
            return None
        segmenter = maker.segmenter
        dense = soft_target(target.mask, (segmenter.mask_size, segmenter.mask_size), quantised=True)

        def pixels() -> Any:  # called only if the image has to be encoded
            name = target.name if isinstance(image, Image.Image) else f"{target.name}: {FULL_IMAGE}"
            return segmenter.preprocess(read_image(image, name))

        return SegInput(pixels, target=dense, same_image=same, key=key)

    def seg_inputs(
        self, rows: Sequence[ImageRow], predictions: Sequence[Prediction] | None = None
    ) -> list[SegInput | None]:
        return [row.seg_input for row in rows]

    def add_masks(
        self,
        predictions: Sequence[Prediction],
        rows: Sequence[ImageRow],
        completions: Completions | None,
        inputs: Sequence[SegInput | None],
        *,
        probabilities: bool = False,
    ) -> list[Prediction]:
        sizes = [(row.frame.original_size[1], row.frame.original_size[0]) for row in rows]
        if self.box_segmenter is not None:
            return self._from_boxes(self.box_segmenter, predictions, rows, sizes)
        if self.head is None or completions is None:
            return list(predictions)
        return add_masks(self.head, predictions, completions, inputs, sizes, probabilities=probabilities)

    @staticmethod
    def _from_boxes(
        box_segmenter: BoxSegmenter,
        predictions: Sequence[Prediction],
        rows: Sequence[ImageRow],
        sizes: Sequence[tuple[int, int]],
    ) -> list[Prediction]:
        """Masks of the boxes that answers name; an answer that names none has an empty mask."""
        seen = [(n, item.pixels) for n, row in enumerate(rows) if (item := row.seg_input) is not None]
        numbers, pixels = [n for n, _ in seen], [shown for _, shown in seen]
        masks = box_segmenter(
            pixels,
            [predictions[n].boxes for n in numbers],
            [sizes[n] for n in numbers],
            [predictions[n].points for n in numbers],
        )
        found = dict(zip(numbers, masks, strict=True))
        return [p.with_mask(found[n]) if n in found else p for n, p in enumerate(predictions)]

    def view(self, given: Mapping[str, Any], row: ImageRow) -> tuple[Image.Image | None, int | None]:
        return _image(given, "row", needed=False), None

    def log(self) -> dict[str, float]:
        if self.box_segmenter is None:
            return {}
        new = self.box_segmenter.encoded_images - self._logged_images
        self._logged_images = self.box_segmenter.encoded_images
        return {"encoded_images": float(new)}


def _image(row: Mapping[str, Any], name: str, *, needed: bool) -> Image.Image | None:
    image = row.get("image")
    if image is None and row.get("images"):
        image = row["images"][0]
    if image is None and not needed:
        return None
    if not isinstance(image, Image.Image):
        raise DataError(
            f"{name}: no image; expected a PIL image in the column 'image' (or a list in 'images'), got {image!r}"
        )
    return read_image(image, name)


def _file_key(value: Any, name: str) -> str:
    """A key of an image as `datasets.Image` gives it; a file on disk is not read for it."""
    if isinstance(value, Image.Image):
        return content_key(value)
    if value["bytes"] is not None:
        return content_key(value["bytes"])
    try:
        file = os.stat(value["path"])
    except OSError as error:
        raise DataError(f"{name}: {FULL_IMAGE}: {error}; put the file back, or run prepare again") from error
    return content_key("file", value["path"], file.st_size, file.st_mtime_ns)


def _mask(row: Mapping[str, Any], name: str) -> np.ndarray:
    mask = row.get("mask")
    if mask is None:
        raise DataError(f"{name}: no mask; expected a PIL image or array in the column 'mask' (columns: {sorted(row)})")
    return mask_values(mask, name)
