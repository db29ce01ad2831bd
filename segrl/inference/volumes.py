"""`VolumeSegmenter`: a volume and a question in; a key slice, boxes on it and a mask of the whole volume out."""

# D slices, H/W pixels of a slice

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

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
from segrl.inference.asking import Asked, modalities_for, queries_for, split_settings
from segrl.inference.base import SegmenterBase
from segrl.inference.batches import VOLUMES, in_batches
from segrl.inference.result import InferenceResult, result_of
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

    @overload
    def predict(
        self, volume: list[Any] | tuple[Any, ...], query: str | Sequence[str], **settings: Any
    ) -> list[InferenceResult]: ...

    @overload
    def predict(
        self, volume: Case | Volume | np.ndarray | str | os.PathLike, query: str, **settings: Any
    ) -> InferenceResult: ...

    def predict(
        self,
        volume: Any,
        query: Any,
        *,
        modality: Sequence[str] | str = "",
        intensity: Intensity | str = "",
        spacing_mm: Any = None,
        batch_size: int | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> Any:
        """Answer a question about a volume, or about each of several.

        Args:
            volume: A path of a NIfTI file, of an array, or of a folder with a DICOM series (or one of its files); a
                `Volume`, a `Case`, an array (D, H, W) uint8; or a list of those. See `predict_batch`.
            query: The question; for a list also one each.
            modality: Such as "CT"; for a list also one each.
            intensity: The scaling to grey values, in the place of that of training.
            spacing_mm: Of scans whose file does not say it, see `segrl.data.read_volume`.
            batch_size: Volumes answered together; None: as many as fit into memory, at most 4.
            progress: Show a progress bar of volumes, and one of the slices that the segmenter has done.
            settings: `samples`, `seed`, `abstain_below`, `probabilities` and settings of `model.generate`, see
                `ReasoningSegmenter.predict_batch`.

        Returns:
            An `InferenceResult`, or a list of them in the order of the volumes.

        Raises:
            DataError: As `predict_batch`.
            UnknownNameError: An unknown keyword.
        """
        several = isinstance(volume, list | tuple)
        asked = split_settings(settings)
        inputs = list(volume) if several else [volume]
        queries = queries_for(query, len(inputs), several)
        self._check_texts(queries)

        def read(given: tuple[Any, str]) -> Case:
            return self.read_case(*given, str(intensity), spacing_mm)

        def answer(cases: Sequence[Case], texts: Sequence[str]) -> list[InferenceResult]:
            return self._answers(cases, texts, asked, progress)

        found = in_batches(
            self,
            list(zip(inputs, modalities_for(modality, len(inputs)), strict=True)),
            queries,
            read,
            answer,
            lambda case: case.grey.size,
            lambda case, text: self._tokens(self._ask(case, text)[0]),
            asked,
            most=VOLUMES if batch_size is None else batch_size,
            fit=batch_size is None,
            progress=progress and len(inputs) > 1,
        )
        return found if several else found[0]

    def predict_batch(
        self,
        volumes: Sequence[Case | Volume | np.ndarray | str | Path],
        queries: Sequence[str],
        *,
        modality: Sequence[str] | str = "",
        intensity: Intensity | str = "",
        progress: bool = False,
        **settings: Any,
    ) -> list[InferenceResult]:
        """Answer one question per volume, in one batch; greedy unless the settings say otherwise.

        Args:
            volumes: Paths of scans, `Volume`s, or what has its grey values already: a `Case`, or an array (D, H, W)
                uint8 in the order of `segrl.data.volumes.intensity`, whose pixels are shown as squares since nobody
                knows its spacing. Equal objects are read and encoded once.
            queries: One question each.
            modality: Such as "CT", one for all or one each. A scan is scaled to grey values as the training rows of
                its modality were; see `VolumePromptSettings.scaling_for`.
            intensity: The scaling itself, in the place of that of training.
            progress: Show a progress bar of the slices that the segmenter has done.
            settings: As in `ReasoningSegmenter.predict_batch`.

        Returns:
            Results in order: the named slice as its index in the volume, boxes in pixels of that slice, and, with a
            segmenter, the mask (D, H, W). Features are alive for slices in flight only, whatever the volume's depth.

        Raises:
            DataError: Lengths differ, a scan cannot be read, an array is not uint8 (D, H, W), or a question holds a
                token with a meaning for the processor.
            UnknownNameError: An unknown keyword.
        """
        volumes, queries = list(volumes), list(queries)  # a lazy column makes a new object at every access
        asked = split_settings(settings)
        if len(volumes) != len(queries):
            raise DataError(f"{len(volumes)} volumes for {len(queries)} queries; expected one query per volume")
        kinds = modalities_for(modality, len(volumes))
        self._check_texts(queries)
        if not volumes:
            return []
        known: dict[tuple[Any, str], Case] = {}
        cases = []
        for volume, kind in zip(volumes, kinds, strict=True):
            key = (str(volume) if isinstance(volume, str | Path) else id(volume), kind)
            if key not in known:
                known[key] = self.read_case(volume, kind, str(intensity))
            cases.append(known[key])
        return self._answers(cases, queries, asked, progress)

    def _answers(
        self, cases: Sequence[Case], queries: Sequence[str], asked: Asked, progress: bool
    ) -> list[InferenceResult]:
        conversations, rows = [], []
        for case, query in zip(cases, queries, strict=True):
            conversation, row = self._ask(case, query)
            conversations.append(conversation)
            rows.append(row)
        with Progress(disable=not progress) if progress else nullcontext() as bar:
            task = None if bar is None else bar.add_task("propagate", total=None)

            def show(done: int, total: int) -> None:
                if bar is not None and task is not None:
                    bar.update(task, completed=done, total=total)

            groups = self._predict(conversations, rows, asked, progress=show)
        known = zip(groups, cases, queries, rows, strict=True)
        return [
            replace(result_of(group, asked, query, case, row.frame), name=case.scan.name, intensity=case.intensity)
            for group, case, query, row in known
        ]

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

    def read_case(
        self,
        volume: Case | Volume | np.ndarray | str | os.PathLike,
        modality: str = "",
        intensity: str = "",
        spacing_mm: Any = None,
    ) -> Case:
        """Read a volume and its grey values, scaled as in training.

        Args:
            volume: See `predict`.
            modality: Such as "CT".
            intensity: The scaling, in the place of that of training; "" for none.
            spacing_mm: See `segrl.data.read_volume`.

        Raises:
            DataError: The scan cannot be read, or an array is not uint8 (D, H, W).
        """
        if isinstance(volume, Case):
            return volume
        if isinstance(volume, np.ndarray):
            if volume.dtype != np.uint8 or volume.ndim != 3 or not volume.size:
                raise DataError(
                    f"volume: {volume.dtype} array of shape {volume.shape}; expected grey values (D, H, W) uint8, as "
                    "segrl.data.scale_intensity gives them, or a Volume or path"
                )
            return Case(Volume(volume), content_key(volume))
        if not isinstance(volume, Volume | str | os.PathLike):
            raise DataError(
                f"volume: {type(volume).__name__}; expected a path, a Volume, a Case or grey values (D, H, W) uint8"
            )
        scan = volume if isinstance(volume, Volume) else read_volume(Path(volume), spacing_mm)
        modality, intensity = self.settings.scaling_for(modality, intensity)
        return case_of(scan, modality=modality, intensity=intensity)
