"""Data set rows to targets, frames and segmenter inputs; equal content gives one object, so it is encoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from segrl.errors import DataError, SegRLError
from segrl.geometry.masks import binarize, soft_target
from segrl.heads.mask_head import MaskHead, SegInput
from segrl.predictions.frames import Frame, FrameKind, frame_for
from segrl.predictions.parsing import SEG_TOKEN
from segrl.predictions.target import Target

__all__ = []

SEG_COLUMNS = ("mask", "query", "modality", "anatomy", "lesion", "name")  # what is read beside the image


@dataclass(eq=False)
class SegRow:
    """One data set row, read: the truth, the frame of the boxes that the model writes, and the segmenter's input."""

    target: Target
    frame: Frame
    seg_input: SegInput | None


class RowReader:
    """Reads rows with the columns `image` (or `images`, of which the first is segmented) and `mask`.

    Args:
        processor: the model's processor; it decides the frame of written boxes.
        segmenter: prepares the segmenter's input; None when there is no mask head, and then rows need no image.
        frame_kind: overrides the frame that the processor implies.
    """

    def __init__(self, processor, segmenter=None, frame_kind: FrameKind | None = None) -> None:
        self.processor, self.segmenter = processor, segmenter
        self.frame_kind: FrameKind | None = frame_kind

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[SegRow]:
        """Rows of a batch in order. Repeated rows (the G samples of a group) share one `SegRow`.

        Raises:
            DataError: a row has no image or no mask, or the mask is not binary; names the row.
        """
        known: dict[bytes, SegRow] = {}
        first: dict[bytes, SegInput] = {}
        result = []
        for number, row in enumerate(rows):
            name = str(row.get("name") or f"row {number} of the batch")
            image, mask = _image(row, name, needed=self.segmenter is not None), _mask(row, name)
            fields = {key: str(row.get(key) or "") for key in ("query", "modality", "anatomy", "lesion")}
            digest = hashlib.blake2b(digest_size=16)
            if image is not None:
                digest.update(str(image.size).encode() + image.tobytes())
            image_key = digest.digest()
            digest.update(str((mask.shape, mask.dtype, fields)).encode() + mask.tobytes())
            key = digest.digest()
            if key not in known:
                known[key] = self._read(image, mask, name, fields, first.get(image_key), image_key.hex())
                own = known[key].seg_input
                if own is not None:
                    first.setdefault(image_key, own)
            result.append(known[key])
        return result

    def _read(
        self,
        image: Image.Image | None,
        mask: np.ndarray,
        name: str,
        fields: dict[str, str],
        same: SegInput | None,
        key: str,
    ) -> SegRow:
        target = Target.from_mask(binarize(mask, name), name=name, **fields)
        size = (target.width, target.height)
        shown = size if image is None else image.size
        frame = frame_for(self.processor, shown, original_size=size, kind=self.frame_kind)
        if self.segmenter is None:
            return SegRow(target, frame, None)
        side = self.segmenter.mask_size
        truth = soft_target(target.mask, (side, side), quantised=True)
        pixels = partial(self.segmenter.preprocess, image)  # called only if the image has to be encoded
        return SegRow(target, frame, SegInput(pixels, target=truth, same_image=same, key=key))


def check_columns(datasets: Mapping[str, Any], needed: Collection[str]) -> None:
    """Check before training that every data set has the columns that masks need; a stream may not know its columns.

    Args:
        datasets: `{"train_dataset": ..., "eval_dataset": ...}`; a value may be None or a dict of data sets.
        needed: column names; `images` counts as `image`.

    Raises:
        DataError: a column is missing; names the data set and the columns that it has.
    """
    for name, dataset in datasets.items():
        if isinstance(dataset, Mapping):
            check_columns({f"{name}[{key!r}]": value for key, value in dataset.items()}, needed)
            continue
        columns = getattr(dataset, "column_names", None)
        if not columns:
            continue
        have = set(columns) | ({"image"} if "images" in columns else set())
        missing = sorted(set(needed) - have)
        if missing:
            raise DataError(
                f"{name}: no column {missing} (it has {sorted(columns)}); masks and their rewards need {sorted(needed)}"
            )


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
    return image.convert("RGB")


def _mask(row: Mapping[str, Any], name: str) -> np.ndarray:
    mask = row.get("mask")
    if mask is None:
        raise DataError(f"{name}: no mask; expected a PIL image or array in the column 'mask' (columns: {sorted(row)})")
    return np.asarray(mask)


def _check_token(head: MaskHead, tokenizer: Any) -> None:
    token_id = getattr(head.probe, "token_id", None)
    if token_id is None:
        return
    known = tokenizer.added_tokens_decoder.get(token_id)
    if known is None or known.content != SEG_TOKEN:
        found = "no added token" if known is None else repr(known.content)
        raise SegRLError(
            f"{type(head.probe).__name__}(token_id={token_id}): {found} of this tokenizer, expected {SEG_TOKEN!r}; "
            "add it with segrl.models.ensure_seg_token(model, processor) and build the head with the id it returns"
        )
    if known.special:
        raise SegRLError(
            f"{known.content!r} is a special token: TRL drops those from the text that rewards read. "
            "Add it as a normal token (segrl.models.ensure_seg_token)"
        )
