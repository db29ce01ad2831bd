"""`VolumeSegmenter`: a volume and a question in; a key slice, boxes on it and a mask of the whole volume out."""

# D slices, H/W pixels of a slice

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from segrl.caching.content import content_key
from segrl.data.volumes.case import Case, case_of
from segrl.data.volumes.intensity import Intensity
from segrl.data.volumes.nifti import read_volume
from segrl.data.volumes.prompts import build_volume_prompt
from segrl.data.volumes.slices import render_slices, shown_frame, uniform_slices
from segrl.data.volumes.volume import Volume
from segrl.errors import DataError
from segrl.heads.attach import find_mask_head
from segrl.inference.base import SegmenterBase
from segrl.predictions.prediction import Prediction
from segrl.predictions.prompt_settings import VolumePromptSettings
from segrl.segmenters.propagation import VolumePropagator
from segrl.segmenters.sam2 import Sam2Segmenter
from segrl.tasks.volumes import VolumeRow, VolumeTask

__all__ = ["VolumeSegmenter"]


class VolumeSegmenter(SegmenterBase):
    """A trained model that answers about volumes, and the frozen segmenter that turns its boxes into a mask.

    Args:
        model: A vision-language model, with a mask head or without.
        processor: Its processor.
        settings: How the training data was prepared; the defaults of `VolumePromptSettings` when None.
        segmenter: SAM 2, which propagates boxes (or the head's mask of the named slice) through the volume; None leaves
            predictions with the head's mask, or without masks.

    Example:
        >>> from segrl.models import tiny_qwen3_vl
        >>> segmenter = VolumeSegmenter(*tiny_qwen3_vl(), VolumePromptSettings(slices=2, size=32, max_new_tokens=3))
        >>> answer = segmenter.predict(np.zeros((5, 24, 40), dtype=np.uint8), "Where is the cyst?")
        >>> answer.valid, answer.slice_index, segmenter.propagator
        (False, None, None)
    """

    settings_class = VolumePromptSettings
    settings: VolumePromptSettings

    def __init__(
        self,
        model: Any,
        processor: Any,
        settings: VolumePromptSettings | None = None,
        segmenter: Sam2Segmenter | None = None,
    ) -> None:
        super().__init__(model, processor, settings, segmenter)
        self.propagator: VolumePropagator | None = None
        if segmenter is not None:
            self.propagator = VolumePropagator(segmenter, reach=None, postprocessing=self.settings.postprocessing)

    @property
    def task(self) -> VolumeTask:
        return VolumeTask(
            self.processor, self.settings, find_mask_head(self.model), self.propagator, prompt_boxes="all"
        )

    def predict(
        self, volume: Case | Volume | np.ndarray | str | Path, query: str, *, progress: bool = False, **settings: Any
    ) -> Prediction:
        """Answer one question about one volume; see `predict_batch`."""
        return self.predict_batch([volume], [query], progress=progress, **settings)[0]

    def predict_batch(
        self,
        volumes: Sequence[Case | Volume | np.ndarray | str | Path],
        queries: Sequence[str],
        *,
        modalities: Sequence[str] | str = "",
        intensity: Intensity | str = "",
        progress: bool = False,
        **generation: Any,
    ) -> list[Prediction]:
        """Answer one question per volume, in one batch; greedy unless `generation` says otherwise.

        Args:
            volumes: Paths of scans, `Volume`s, or what has its grey values already: a `Case`, or an array (D, H, W)
                uint8 in the order of `segrl.data.volumes.intensity`, whose pixels are shown as squares since nobody
                knows its spacing. Equal objects are read and encoded once.
            queries: One question each.
            modalities: Such as "CT", one for all or one each. A scan is scaled to grey values as the training rows of
                its modality were; see `VolumePromptSettings.scaling_for`.
            intensity: The scaling itself, in the place of that of training.
            progress: Show a progress bar of the slices that the segmenter has done.
            generation: To `model.generate`.

        Returns:
            Predictions in order: the named slice as its index in the volume, boxes in pixels of that slice, and, with a
            segmenter, the mask (D, H, W). Features are alive for slices in flight only, whatever the volume's depth.

        Raises:
            DataError: Lengths differ, a scan cannot be read, an array is not uint8 (D, H, W), or a question holds a
                token with a meaning for the processor.
        """
        volumes, queries = list(volumes), list(queries)  # a lazy column makes a new object at every access
        if len(volumes) != len(queries):
            raise DataError(f"{len(volumes)} volumes for {len(queries)} queries; expected one query per volume")
        kinds = [modalities] * len(volumes) if isinstance(modalities, str) else list(modalities)
        if len(kinds) != len(volumes):
            raise DataError(f"{len(kinds)} modalities for {len(volumes)} volumes; expected one per volume, or one text")
        self._check_texts(queries)
        if not volumes:
            return []
        cases: dict[tuple[Any, str], Case] = {}
        conversations, rows = [], []
        for volume, kind, query in zip(volumes, kinds, queries, strict=True):
            key = (str(volume) if isinstance(volume, str | Path) else id(volume), kind)
            if key not in cases:
                cases[key] = self._case(volume, kind, str(intensity))
            conversation, row = self._ask(cases[key], query)
            conversations.append(conversation)
            rows.append(row)
        with Progress(disable=not progress) if progress else nullcontext() as bar:
            task = None if bar is None else bar.add_task("propagate", total=None)

            def show(done: int, total: int) -> None:
                if bar is not None and task is not None:
                    bar.update(task, completed=done, total=total)

            return self._predict(conversations, rows, generation, progress=show)

    def _ask(self, case: Case, query: str) -> tuple[list[dict[str, Any]], VolumeRow]:
        """The conversation with its images, and what it is about, as `prepare_volumes` and the task build them."""
        shown = uniform_slices(len(case.grey), self.settings.slices)
        images = render_slices(case.grey, shown, self.settings.size, case.scan.spacing_mm)
        conversation = build_volume_prompt(query, len(shown), self.settings.full_instruction)
        waiting = iter(images)
        for block in conversation[0]["content"]:
            if block["type"] == "image":
                block["image"] = next(waiting)
        frame = shown_frame(self.processor, case.grey.shape, shown, images[0].size, self.settings.frame_kind)
        return conversation, VolumeRow(None, frame, case)

    def _case(self, volume: Case | Volume | np.ndarray | str | Path, modality: str, intensity: str) -> Case:
        """The grey values of a volume, scaled as in training."""
        if isinstance(volume, Case):
            return volume
        if isinstance(volume, np.ndarray):
            if volume.dtype != np.uint8 or volume.ndim != 3 or not volume.size:
                raise DataError(
                    f"volume: {volume.dtype} array of shape {volume.shape}; expected grey values (D, H, W) uint8, as "
                    "segrl.data.scale_intensity gives them, or a Volume or path"
                )
            return Case(Volume(volume), content_key(volume))
        if not isinstance(volume, Volume | str | Path):
            raise DataError(
                f"volume: {type(volume).__name__}; expected a path, a Volume, a Case or grey values (D, H, W) uint8"
            )
        scan = volume if isinstance(volume, Volume) else read_volume(volume)
        modality, intensity = self.settings.scaling_for(modality, intensity)
        return case_of(scan, modality=modality, intensity=intensity)
