"""Data set rows about volumes to targets, frames and grey values; what was read is kept while there is room."""

# D slices, H/W pixels of a slice

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from segrl.data.volumes.case import read_grey, read_truth
from segrl.data.volumes.slices import shown_frame
from segrl.errors import DataError, SegRLError, unknown_name
from segrl.heads.mask_head import MaskHead
from segrl.predictions.frames import Frame, FrameKind
from segrl.predictions.target import VolumeTarget
from segrl.rewards.reward import Reward
from segrl.segmenters.propagated_masks import PromptBoxes
from segrl.segmenters.propagation import VolumePropagator

__all__ = []

VOLUME_COLUMNS = ("scan", "label", "label_value", "intensity", "slices")  # beside `images`
_TEXTS = ("query", "modality", "anatomy", "lesion", "name")


@dataclass(frozen=True, eq=False)
class VolumeRow:
    """One data set row, read.

    Attributes:
        target: The truth.
        frame: Of the boxes and of the numbers of slices that the model writes.
        grey: (D, H, W) uint8, what a segmenter sees.
        key: Content of `grey` as text: equal volumes have equal keys.
    """

    target: VolumeTarget
    frame: Frame
    grey: np.ndarray
    key: str

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.grey.nbytes + self.target.mask.nbytes


class VolumeReader:
    """Reads rows with the columns of `VOLUME_COLUMNS`, as `segrl.data.prepare_volumes` makes them.

    Args:
        processor: The model's processor; it decides the frame of written boxes.
        frame_kind: Overrides the frame that the processor implies.
        memory_bytes: Volumes that were read last are kept within this budget, the last one in any case.
    """

    def __init__(self, processor: Any, frame_kind: FrameKind | None = None, *, memory_bytes: int = 2**31) -> None:
        self.processor, self.memory_bytes = processor, memory_bytes
        self.frame_kind: FrameKind | None = frame_kind
        self._kept: OrderedDict[tuple[Any, ...], VolumeRow] = OrderedDict()

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[VolumeRow]:
        """Rows of a batch in order. Equal rows (the G answers to a prompt) share one `VolumeRow`.

        Raises:
            DataError: A row lacks a value, a file cannot be read, label and scan differ, or the pictures are not
                those of slices of the scan. A label without foreground is fine: the right answer is then that there is
                nothing.
        """
        return [self._row(row, number) for number, row in enumerate(rows)]

    def _row(self, row: Mapping[str, Any], number: int) -> VolumeRow:
        where = row.get("name") or f"row {number} of the batch"
        missing = [column for column in ("images", *VOLUME_COLUMNS) if _lacks(row, column)]
        if missing:
            raise DataError(f"{where}: no value for {missing}; expected rows of prepare_volumes with labels")
        if len(row["images"]) != len(row["slices"]):
            raise DataError(
                f"{where}: {len(row['images'])} images for {len(row['slices'])} slices; expected one each, as "
                "prepare_volumes makes them"
            )
        fields = {name: str(row.get(name) or "") for name in _TEXTS}
        size = row["images"][0].size
        key = (*(str(row[column]) for column in VOLUME_COLUMNS), size, *fields.values())
        if key not in self._kept:
            self._kept[key] = self._read(row, fields, size, where)
            while len(self._kept) > 1 and sum(item.nbytes for item in self._kept.values()) > self.memory_bytes:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _read(self, row: Mapping[str, Any], fields: dict[str, str], size: tuple[int, int], where: str) -> VolumeRow:
        volume, grey = read_grey(row["scan"], modality=fields["modality"], intensity=row["intensity"])
        if max(row["slices"]) >= len(grey):
            raise DataError(
                f"{where}: slice {max(row['slices'])} of {row['scan']}, which has {len(grey)}; the scan is not the one "
                "that was shown: run prepare_volumes again"
            )
        mask = read_truth(row, volume, allow_empty=True)
        frame = shown_frame(self.processor, grey.shape, row["slices"], size, self.frame_kind)
        return VolumeRow(
            VolumeTarget(mask, volume.spacing_mm, **fields),
            frame,
            grey,
            hashlib.blake2b(grey.tobytes() + str(grey.shape).encode(), digest_size=16).hexdigest(),
        )


def _lacks(row: Mapping[str, Any], column: str) -> bool:
    value = row.get(column)
    return value is None or (column in ("images", "scan", "label", "slices") and not len(value))


def _check_volumes(
    rewards: list[Reward], head: MaskHead | None, propagator: VolumePropagator | None, prompt_boxes: str
) -> None:
    """Volumes and images do not mix, and a reward must not read masks where nothing was propagated."""
    if prompt_boxes not in get_args(PromptBoxes):
        raise unknown_name("prompt_boxes", prompt_boxes, get_args(PromptBoxes))
    if head is not None:
        raise SegRLError("a mask head segments images; for volumes pass propagator=VolumePropagator(...) and no head")
    for reward in rewards:
        if reward.needs_truth and not reward.volume:
            raise SegRLError(
                f"reward {reward.name!r} reads the truth of an image, and the rows are volumes; train with rewards of "
                "volumes only, such as slice_visibility"
            )
        if reward.needs_mask and propagator is None:
            raise SegRLError(f"reward {reward.name!r} reads masks; pass propagator=VolumePropagator(segmenter)")
        delta = _reads_within(reward)
        if propagator is not None and propagator.reach is not None and delta > propagator.reach:
            raise SegRLError(
                f"reward {reward.name!r} reads masks up to {delta} slices from the named one, and the propagator goes "
                f"reach={propagator.reach} slices; pass VolumePropagator(..., reach={delta})"
            )


def _reads_within(reward: Reward) -> int:
    """How many slices from the named one a reward reads masks: the largest `delta` of its parts and gates, else 0."""
    if not reward.needs_mask:
        return 0
    own = {**reward.info.settings, **reward.settings}.get("delta")
    return max([own if isinstance(own, int) else 0, *map(_reads_within, reward.inner)])
