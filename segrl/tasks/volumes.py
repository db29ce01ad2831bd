"""Volumes: rows of `prepare_volumes`, answers that name a slice, masks by propagation, by a mask head, or by both."""

# D slices, H/W pixels of a slice

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import numpy as np
from PIL import Image

from segrl.data.volumes.case import Case, CaseReader
from segrl.data.volumes.slices import shown_frame
from segrl.errors import DataError, SegRLError, unknown_name
from segrl.geometry.masks import soft_target
from segrl.heads.decoding import Completions, add_masks, check_token
from segrl.heads.mask_head import MaskHead
from segrl.heads.requests import SegInput
from segrl.predictions.frames import Frame
from segrl.predictions.prediction import Prediction
from segrl.predictions.prompt_settings import VolumePromptSettings
from segrl.predictions.target import METADATA_COLUMNS, VolumeTarget
from segrl.rewards.reward import Reward
from segrl.segmenters.propagated_masks import PromptBoxes, add_volume_masks
from segrl.segmenters.propagation import VolumePropagator

__all__ = ["VolumeRow", "VolumeTask"]

_SCAN_COLUMNS = ("scan", "label", "label_value", "intensity", "slices")


@dataclass(eq=False)
class VolumeRow:
    """One data set row, read.

    Attributes:
        target: The ground truth; None in inference, where nobody knows it.
        frame: Of the boxes and of the slice numbers that the model writes.
        case: The scan's grey values and the label.
        key_slice: Index in the volume of the slice that the reference answer names; None without one.
    """

    target: VolumeTarget | None
    frame: Frame
    case: Case
    key_slice: int | None = None
    inputs: dict[int, SegInput] = field(default_factory=dict, repr=False)


class VolumeTask:
    """Rows of `segrl.data.prepare_volumes`; see `segrl.tasks.base.Task`.

    Masks come from a `propagator`, which takes the boxes of an answer through the volume (MedVol-R1); from a `head`,
    which decodes the state of `<seg>` on the named slice and leaves the others empty; or from both: then the head's
    mask on the named slice is propagated, in the place of the boxes.

    Args:
        processor: The model's processor; it decides the frame of written boxes.
        settings: How the model is asked.
        head: The model's mask head, if it has one.
        propagator: The frozen segmenter, if there is one.
        prompt_boxes: Boxes that prompt the propagator in training: those matched to a true box on the named slice
            (MedVol-R1; then more boxes never hurt R_c, only slice_boxes), or "all".
        memory_bytes: Scans and labels read last are kept within this budget, the last ones in any case.

    Raises:
        UnknownNameError: An unknown `prompt_boxes`.

    Example:
        >>> from segrl.data import make_synthetic_volumes, prepare_volumes
        >>> settings = VolumePromptSettings(slices=4, size=32, frame_kind="original_px")
        >>> volumes = make_synthetic_volumes(1, "volumes", depth=4, size=32)
        >>> rows = prepare_volumes(volumes, None, settings, completions=True)
        >>> (row,) = VolumeTask(None, settings).read(list(rows))
        >>> row.frame.slices, row.case.grey.shape, row.key_slice in row.frame.slices
        ((0, 1, 2, 3), (4, 32, 32), True)
    """

    columns = (*_SCAN_COLUMNS, "spacing_mm", "key_slice", *METADATA_COLUMNS)
    needed = ("images", *_SCAN_COLUMNS)

    def __init__(
        self,
        processor: Any,
        settings: VolumePromptSettings | None = None,
        head: MaskHead | None = None,
        propagator: VolumePropagator | None = None,
        *,
        prompt_boxes: PromptBoxes = "matched",
        memory_bytes: int = 2**31,
    ) -> None:
        if prompt_boxes not in get_args(PromptBoxes):
            raise unknown_name("prompt_boxes", prompt_boxes, get_args(PromptBoxes))
        self.processor, self.head, self.propagator = processor, head, propagator
        self.settings = settings or VolumePromptSettings()
        self.prompt_boxes: PromptBoxes = prompt_boxes
        self._read_case = CaseReader(memory_bytes)
        self._rows: OrderedDict[tuple[Any, ...], VolumeRow] = OrderedDict()
        self._logged_slices = 0 if propagator is None else propagator.encoded_slices

    @property
    def makes_masks(self) -> bool:
        return self.head is not None or self.propagator is not None

    def check(self, rewards: Sequence[Reward], tokenizer: Any) -> None:
        if self.head is not None:
            check_token(self.head, tokenizer)
        reach = 0 if self.propagator is None else self.propagator.reach
        for reward in rewards:
            if reward.needs_target and not reward.volume:
                raise SegRLError(
                    f"reward {reward.name!r} reads the ground truth of an image, and the rows are volumes; train with "
                    "rewards of volumes only, such as slice_visibility"
                )
            if reward.needs_mask and not self.makes_masks:
                raise SegRLError(
                    f"reward {reward.name!r} reads masks; pass propagator=VolumePropagator(segmenter), or a model with "
                    "a mask head"
                )
            delta = _reads_within(reward)
            if self.propagator is not None and reach is not None and delta > reach:
                raise SegRLError(
                    f"reward {reward.name!r} reads masks up to {delta} slices from the named one, and the propagator "
                    f"goes reach={reach} slices; pass VolumePropagator(..., reach={delta})"
                )

    def read(self, rows: Sequence[Mapping[str, Any]]) -> list[VolumeRow]:
        """Read rows; equal rows share one `VolumeRow`.

        Raises:
            DataError: A row lacks a value, a file cannot be read, label and scan differ, or the pictures are not
                those of slices of the scan. A label without foreground is fine: the right answer is then that there is
                nothing.
        """
        return [self._row(row, number) for number, row in enumerate(rows)]

    def _row(self, row: Mapping[str, Any], number: int) -> VolumeRow:
        where = row.get("name") or f"row {number} of the batch"
        missing = [column for column in self.needed if _lacks(row, column)]
        if missing:
            raise DataError(f"{where}: no value for {missing}; expected rows of prepare_volumes with labels")
        if len(row["images"]) != len(row["slices"]):
            raise DataError(
                f"{where}: {len(row['images'])} images for {len(row['slices'])} slices; expected one each, as "
                "prepare_volumes makes them"
            )
        texts, size = VolumeTarget.texts_of(row), row["images"][0].size
        key = (*(str(row.get(column)) for column in (*_SCAN_COLUMNS, "spacing_mm", "key_slice")), size, *texts.values())
        if key not in self._rows:
            case = self._read_case(row, allow_empty=True)
            if max(row["slices"]) >= len(case.grey):
                raise DataError(
                    f"{where}: slice {max(row['slices'])} of {row['scan']}, which has {len(case.grey)}; the scan is "
                    "not the one that was shown: run prepare_volumes again"
                )
            frame = shown_frame(self.processor, case.grey.shape, row["slices"], size, self.settings.frame_kind)
            self._rows[key] = VolumeRow(case.target(row), frame, case, row.get("key_slice"))
            while len(self._rows) > 1 and _nbytes(self._rows.values()) > self._read_case.memory_bytes:
                self._rows.popitem(last=False)
        self._rows.move_to_end(key)
        return self._rows[key]

    def seg_inputs(
        self, rows: Sequence[VolumeRow], predictions: Sequence[Prediction] | None = None
    ) -> list[SegInput | None]:
        """The named slice of each answer, with the ground truth on it; None where no slice of the volume is named."""
        if self.head is None:
            return [None] * len(rows)
        named = [row.key_slice for row in rows] if predictions is None else [p.slice_index for p in predictions]
        first: dict[str | None, SegInput] = {}
        found: list[SegInput | None] = []
        for row, index in zip(rows, named, strict=True):
            item = None
            if index is not None and 0 <= index < len(row.case.grey):
                if index not in row.inputs:
                    row.inputs[index] = self._slice_input(row, index, first)
                item = row.inputs[index]
                first.setdefault(item.key, item)
            found.append(item)
        return found

    def _slice_input(self, row: VolumeRow, index: int, first: Mapping[str | None, SegInput]) -> SegInput:
        assert self.head is not None
        segmenter, key = self.head.segmenter, f"{row.case.key} {index}"
        side, dense = segmenter.mask_size, None
        if row.target is not None:
            dense = soft_target(row.target.mask[index], (side, side), quantised=True)
        pixels = partial(segmenter.preprocess, row.case.grey[index])
        return SegInput(pixels, target=dense, same_image=first.get(key), key=key)

    def add_masks(
        self,
        predictions: Sequence[Prediction],
        rows: Sequence[VolumeRow],
        completions: Completions | None,
        inputs: Sequence[SegInput | None],
        *,
        probabilities: bool = False,
        progress: Any = None,
    ) -> list[Prediction]:
        on_slice: list[np.ndarray | None] | None = None
        result = list(predictions)
        if self.head is not None and completions is not None:
            sizes = [(row.case.grey.shape[1], row.case.grey.shape[2]) for row in rows]
            result = add_masks(self.head, predictions, completions, inputs, sizes)
            on_slice = [prediction.mask for prediction in result]
            result = [_as_volume(prediction, row) for prediction, row in zip(result, rows, strict=True)]
        if self.propagator is None:
            return result
        targets = None if any(row.target is None for row in rows) else [row.target for row in rows]
        return add_volume_masks(
            self.propagator,
            result,
            [row.case.grey for row in rows],
            [row.case.key for row in rows],
            targets,  # type: ignore[arg-type]
            prompt_boxes=self.prompt_boxes if targets is not None else "all",
            slice_masks=on_slice,
            progress=progress,
        )

    def view(self, given: Mapping[str, Any], row: VolumeRow) -> tuple[Image.Image | None, int | None]:
        """The slice with most of the ground truth, the middle one without any."""
        grey = row.case.grey
        areas = np.zeros(len(grey)) if row.target is None else row.target.mask.sum(axis=(1, 2))
        index = int(areas.argmax()) if areas.any() else len(grey) // 2
        return Image.fromarray(grey[index]), index

    def log(self) -> dict[str, float]:
        if self.propagator is None:
            return {}
        new = self.propagator.encoded_slices - self._logged_slices
        self._logged_slices += new
        return {"encoded_slices": float(new)}


def _as_volume(prediction: Prediction, row: VolumeRow) -> Prediction:
    """The mask of the named slice as the mask of the volume, empty elsewhere."""
    volume = np.zeros(row.case.grey.shape, dtype=bool)
    if prediction.mask is not None and prediction.slice_index is not None:
        volume[prediction.slice_index] = prediction.mask
    return prediction.with_mask(volume)


def _nbytes(rows: Iterable[VolumeRow]) -> int:
    """Bytes of the rows' scans and masks; a scan that several rows share counts once."""
    arrays = {id(array): array for row in rows for array in (row.case.grey, row.case.mask) if array is not None}
    return sum(array.nbytes for array in arrays.values())


def _lacks(row: Mapping[str, Any], column: str) -> bool:
    value = row.get(column)
    return value is None or (column in ("images", "scan", "label", "slices") and not len(value))


def _reads_within(reward: Reward) -> int:
    """Return how far from the named slice a reward reads masks: the largest `delta` of its parts and gates, else 0."""
    if not reward.needs_mask:
        return 0
    own = {**reward.info.settings, **reward.settings}.get("delta")
    return max([own if isinstance(own, int) else 0, *map(_reads_within, reward.inner)])
