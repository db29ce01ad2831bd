"""`ReasoningSegmenter`: an image and a question in, reasoning, boxes and a mask out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Self

import torch
from PIL import Image
from transformers import AutoConfig

from segrl.data.images.prompts import build_prompt, shown_image
from segrl.errors import CheckpointError, DataError
from segrl.geometry.image_files import read_image
from segrl.heads.attach import find_mask_head
from segrl.heads.requests import SegInput
from segrl.hub import reraise_as
from segrl.inference.base import SegmenterBase
from segrl.models.loading import load_vlm
from segrl.predictions.families import zero_shot_settings
from segrl.predictions.frames import FrameKind, frame_for
from segrl.predictions.prediction import Prediction
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
        """
        with reraise_as(f"model {os.fspath(name)!r}", CheckpointError):
            model_type = AutoConfig.from_pretrained(name).model_type
        settings = zero_shot_settings(model_type, frame_kind)
        model, processor = load_vlm(os.fspath(name), seg_token=None, **kwargs)
        made = load_segmenter(segmenter) if isinstance(segmenter, str | os.PathLike) else segmenter
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model.to(where)  # pyright: ignore[reportArgumentType]
        return cls(model.eval(), processor, settings, made if made is None else made.to(where))

    def predict(self, image: Image.Image, query: str, **generation: Any) -> Prediction:
        """Answer one question about one image; see `predict_batch`."""
        return self.predict_batch([image], [query], **generation)[0]

    def predict_batch(
        self,
        images: Sequence[Image.Image],
        queries: Sequence[str],
        *,
        sizes: Sequence[tuple[int, int]] | None = None,
        **generation: Any,
    ) -> list[Prediction]:
        """Answer one question per image, in one batch; greedy unless `generation` says otherwise.

        Args:
            images: PIL images of any size and mode. The same object several times is encoded by the segmenter once.
            queries: One question each.
            sizes: (width, height) of boxes and masks in the predictions; each image's own size when None.
            generation: To `model.generate`.

        Returns:
            Predictions in order; boxes and masks in pixels of `sizes`.

        Raises:
            DataError: Lengths differ, something is not an image of 8 bits a channel, see `segrl.geometry.read_image`, a
                question holds a token with a meaning for the processor, or several beams are asked for.
        """
        images, queries = list(images), list(queries)  # a lazy column makes a new object at every access
        if len(images) != len(queries):
            raise DataError(f"{len(images)} images for {len(queries)} queries; expected one query per image")
        if sizes is not None and len(sizes) != len(images):
            raise DataError(f"{len(sizes)} sizes for {len(images)} images; expected one (width, height) per image")
        self._check_texts(queries)
        if not images:
            return []
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
        return self._predict(conversations, rows, generation)

    def _ask(
        self, shown: Image.Image, query: str, size: tuple[int, int], seg_input: SegInput | None = None
    ) -> tuple[list[dict[str, Any]], ImageRow]:
        """The conversation with its image, and what it is about, as `prepare` and the task build them."""
        text = build_prompt(query, self.settings.full_instruction)[0]["content"]
        content = [{"type": "image", "image": shown}, {"type": "text", "text": text}]
        frame = frame_for(self.processor, shown.size, size, kind=self.settings.frame_kind)
        return [{"role": "user", "content": content}], ImageRow(None, frame, seg_input)


def _whole(image: Image.Image) -> Image.Image:
    """Return an image upright, in RGB and its own size, as the segmenter sees it."""
    if not isinstance(image, Image.Image):
        raise DataError(f"expected a PIL image, got {type(image).__name__}")
    return read_image(image)
