"""`ReasoningSegmenter`: an image and a question in, reasoning, boxes and a mask out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self, overload

import numpy as np
from PIL import Image
from transformers import AutoConfig

from segrl.data.images.files import LoadedImage, load_image
from segrl.data.images.prompts import build_prompt, shown_image
from segrl.errors import CheckpointError, DataError
from segrl.geometry.image_files import read_image
from segrl.heads.attach import find_mask_head
from segrl.heads.requests import SegInput
from segrl.hub import reraise_as
from segrl.inference.asking import Asked, modalities_for, queries_for, split_settings
from segrl.inference.base import SegmenterBase, find_device
from segrl.inference.batches import MOST, in_batches
from segrl.inference.result import InferenceResult, result_of
from segrl.models.loading import load_vlm
from segrl.predictions.families import zero_shot_settings
from segrl.predictions.frames import FrameKind, frame_for
from segrl.predictions.prompt_settings import ImagePromptSettings
from segrl.segmenters.box_segmenter import BoxSegmenter
from segrl.segmenters.stored import load_segmenter
from segrl.tasks.images import ImageRow, ImageTask

__all__ = ["ReasoningSegmenter"]


class ReasoningSegmenter(SegmenterBase):
    """A trained model that segments images.

    Args:
        model: A vision-language model with a mask head, or without.
        processor: Its processor.
        settings: How the training data was prepared; the defaults of `ImagePromptSettings` when None.
        segmenter: A `Segmenter`, which turns the boxes that a model without a head writes into masks; without either,
            predictions have no mask. A model with a head does without it.

    Example:
        >>> from segrl.models import tiny_qwen2_5_vl
        >>> segmenter = ReasoningSegmenter(*tiny_qwen2_5_vl(), ImagePromptSettings(max_edge=56, max_new_tokens=3))
        >>> answer = segmenter.predict(Image.new("RGB", (112, 84)), "Where is the cyst?")
        >>> answer.valid, answer.mask, segmenter.task.settings.max_edge
        (False, None, 56)
    """

    settings_class = ImagePromptSettings
    settings: ImagePromptSettings

    @property
    def task(self) -> ImageTask:
        head = find_mask_head(self.model)
        boxes = None
        if head is None and self.segmenter is not None:
            boxes = BoxSegmenter(self.segmenter, points=self.settings.answer_form == "json")
        return ImageTask(self.processor, self.settings, head, boxes)

    @classmethod
    def zero_shot(
        cls,
        name: str | os.PathLike,
        segmenter: Any = None,
        *,
        frame_kind: FrameKind | None = None,
        device: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a chat model that was not trained by segrl; a frozen segmenter makes masks of the boxes that it writes.

        Args:
            name: A folder, or `owner/name` on the hub.
            segmenter: A `Segmenter`, or what `load_segmenter` takes; None leaves answers without masks.
            frame_kind: Frame of its boxes; None takes that of its family, `segrl.predictions.FAMILIES`.
            device: A CUDA device if there is one when None.
            kwargs: To `load_vlm`.

        Raises:
            CheckpointError: There is no such model, or its weights are not complete.
            FrameError: The family is not known, and no frame is given.
            SegRLError: There is no such device.
        """
        where = find_device(device)
        with reraise_as(f"model {os.fspath(name)!r}", CheckpointError):
            model_type = AutoConfig.from_pretrained(name).model_type
        settings = zero_shot_settings(model_type, frame_kind)
        model, processor = load_vlm(os.fspath(name), seg_token=None, **kwargs)
        made = load_segmenter(segmenter) if isinstance(segmenter, str | os.PathLike) else segmenter
        model.to(where)  # pyright: ignore[reportArgumentType]
        return cls(model.eval(), processor, settings, made if made is None else made.to(where))

    @overload
    def predict(
        self, image: list[Any] | tuple[Any, ...], query: str | Sequence[str], **settings: Any
    ) -> list[InferenceResult]: ...

    @overload
    def predict(
        self, image: Image.Image | np.ndarray | str | os.PathLike, query: str, **settings: Any
    ) -> InferenceResult: ...

    def predict(
        self,
        image: Any,
        query: Any,
        *,
        modality: Sequence[str] | str = "",
        intensity: str = "",
        batch_size: int | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> Any:
        """Answer a question about an image, or about each of several.

        Args:
            image: A path (PNG, JPEG, TIFF, DICOM ...), a PIL image, an array (H, W) or (H, W, 3), a
                `LoadedImage`, or a list of those.
                What has more than 8 bits is scaled to grey values, see `segrl.data.load_image`.
            query: The question; for a list also one each.
            modality: Such as "CT", for images with more than 8 bits; for a list also one each. See `load_image`.
            intensity: Scaling of images with more than 8 bits, such as "window:-160:240"; see `load_image`.
            batch_size: Images answered together; None: as many as fit into memory, at most 16.
            progress: Show a progress bar.
            settings: `samples`, `seed`, `abstain_below`, `probabilities` and settings of `model.generate`, see
                `predict_batch`.

        Returns:
            An `InferenceResult`, or a list of them in the order of the images.

        Raises:
            DataError: A file that cannot be read, an array of another shape, or as `predict_batch`.
            UnknownNameError: An unknown keyword.
        """
        several = isinstance(image, list | tuple)
        asked = split_settings(settings)
        inputs = list(image) if several else [image]
        queries = queries_for(query, len(inputs), several)
        self._check_texts(queries)

        def read(given: tuple[Any, str]) -> LoadedImage:
            value, kind = given
            return value if isinstance(value, LoadedImage) else load_image(value, modality=kind, intensity=intensity)

        def answer(loaded: Sequence[LoadedImage], texts: Sequence[str]) -> list[InferenceResult]:
            results = self._answers([one.image for one in loaded], texts, None, asked)
            known = zip(results, loaded, strict=True)
            return [replace(result, name=one.name, intensity=one.intensity) for result, one in known]

        found = in_batches(
            self,
            list(zip(inputs, modalities_for(modality, len(inputs)), strict=True)),
            queries,
            read,
            answer,
            lambda one: one.image.width * one.image.height,
            lambda one, text: self._tokens(self._conversation(shown_image(one.image, self.settings.max_edge), text)),
            asked,
            most=MOST if batch_size is None else batch_size,
            fit=batch_size is None,
            progress=progress and len(inputs) > 1,
        )
        return found if several else found[0]

    def predict_batch(
        self,
        images: Sequence[Image.Image],
        queries: Sequence[str],
        *,
        sizes: Sequence[tuple[int, int]] | None = None,
        **settings: Any,
    ) -> list[InferenceResult]:
        """Answer one question per image, in one batch; greedy unless the settings say otherwise.

        Args:
            images: PIL images of any size and mode. The same object several times is encoded by the segmenter once.
            queries: One question each.
            sizes: (width, height) of boxes and masks in the predictions; each image's own size when None.
            settings: `samples`, the number of answers drawn for each question from one prefill, which are combined
                (`segrl.inference.combine_answers`); `seed` of the draw; `abstain_below`, a confidence; `probabilities`,
                whether one greedy answer has a confidence, too; all others to `model.generate`.

        Returns:
            Results in order; boxes and masks in pixels of `sizes`.

        Raises:
            DataError: Lengths differ, something is not an image of 8 bits a channel, see `segrl.geometry.read_image`, a
                question holds a token with a meaning for the processor, or several beams are asked for.
            UnknownNameError: An unknown keyword.
        """
        images, queries = list(images), list(queries)  # a lazy column makes a new object at every access
        asked = split_settings(settings)
        if len(images) != len(queries):
            raise DataError(f"{len(images)} images for {len(queries)} queries; expected one query per image")
        if sizes is not None and len(sizes) != len(images):
            raise DataError(f"{len(sizes)} sizes for {len(images)} images; expected one (width, height) per image")
        self._check_texts(queries)
        return self._answers(images, queries, sizes, asked) if images else []

    def _answers(
        self,
        images: Sequence[Image.Image],
        queries: Sequence[str],
        sizes: Sequence[tuple[int, int]] | None,
        asked: Asked,
    ) -> list[InferenceResult]:
        head = find_mask_head(self.model)
        segmenter = self.segmenter if head is None else head.segmenter
        whole = {id(image): _whole(image) for image in images}
        shown = {name: shown_image(image, self.settings.max_edge) for name, image in whole.items()}
        made = {} if segmenter is None else {k: segmenter.preprocess(image) for k, image in whole.items()}
        inputs = {name: SegInput(pixels) for name, pixels in made.items()}
        conversations, rows = [], []
        for n, (image, query) in enumerate(zip(images, queries, strict=True)):
            size = sizes[n] if sizes is not None else whole[id(image)].size
            conversation, row = self._ask(shown[id(image)], query, size, inputs.get(id(image)))
            conversations.append(conversation)
            rows.append(row)
        groups = self._predict(conversations, rows, asked)
        known = zip(groups, images, queries, rows, strict=True)
        return [result_of(group, asked, query, whole[id(image)], row.frame) for group, image, query, row in known]

    def _ask(
        self, shown: Image.Image, query: str, size: tuple[int, int], seg_input: SegInput | None = None
    ) -> tuple[list[dict[str, Any]], ImageRow]:
        """The conversation with its image, and what it is about, as `prepare` and the task build them."""
        frame = frame_for(self.processor, shown.size, size, kind=self.settings.frame_kind)
        return self._conversation(shown, query), ImageRow(None, frame, seg_input)

    def _conversation(self, shown: Image.Image, query: str) -> list[dict[str, Any]]:
        text = build_prompt(query, self.settings.full_instruction)[0]["content"]
        return [{"role": "user", "content": [{"type": "image", "image": shown}, {"type": "text", "text": text}]}]


def _whole(image: Image.Image) -> Image.Image:
    """Return an image upright, in RGB and its own size, as the segmenter sees it."""
    if not isinstance(image, Image.Image):
        raise DataError(f"expected a PIL image, got {type(image).__name__}")
    return read_image(image)
