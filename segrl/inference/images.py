"""`ReasoningSegmenter`: an image and a question in, reasoning, boxes and a mask out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageOps

from segrl.data.images.prompts import ANSWER_ONLY_INSTRUCTION, INSTRUCTION, build_prompt
from segrl.errors import DataError
from segrl.heads.attach import find_mask_head
from segrl.heads.decoding import add_masks, generation_states, pad_ids
from segrl.heads.mask_head import SegInput
from segrl.inference.base import SegmenterBase
from segrl.models.backbone import base_instance
from segrl.predictions.frames import frame_for, shrunk_size
from segrl.predictions.parsing import parse_completion
from segrl.predictions.prediction import Prediction


class ReasoningSegmenter(SegmenterBase):
    """A trained model that segments images.

    Args:
        model: a vision-language model with a mask head, or without (then predictions have no mask).
        processor: its processor.
        settings: how the training data was built: `instruction`, `max_edge`, `reasoning`, `frame_kind`,
            `max_new_tokens`. What is missing gets the defaults of `segrl.data.prepare` and 512 new tokens.
    """

    def predict(self, image: Image.Image, query: str, **generation: Any) -> Prediction:
        """Answer one question about one image; see `predict_batch`."""
        return self.predict_batch([image], [query], **generation)[0]

    @torch.no_grad()
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
            queries: one question each.
            sizes: (width, height) of boxes and masks in the predictions; each image's own size when None.
            generation: to `model.generate`.

        Returns:
            Predictions in order; boxes and masks in pixels of `sizes`.

        Raises:
            DataError: lengths differ, something is not an image of 8 bits a channel, or several beams are asked for.
        """
        images, queries = list(images), list(queries)  # a lazy column makes a new object at every access
        if len(images) != len(queries):
            raise DataError(f"{len(images)} images for {len(queries)} queries; expected one query per image")
        if not images:
            return []
        shown = {id(image): self._shown(image) for image in images}
        small = [shown[id(image)] for image in images]
        if sizes is not None and len(sizes) != len(images):
            raise DataError(f"{len(sizes)} sizes for {len(images)} images; expected one (width, height) per image")
        original = list(sizes if sizes is not None else [ImageOps.exif_transpose(image).size for image in images])
        head = find_mask_head(self.model)
        written, texts, recording = self._answer(self._conversations(small, queries), generation, head)
        kind, reasoning = self.settings.get("frame_kind"), self.settings.get("reasoning", True)
        predictions = [
            parse_completion(
                text,
                frame_for(self.processor, image.size, size, kind=kind),
                require_seg=head is not None,
                require_reasoning=reasoning,
            )
            for text, image, size in zip(texts, small, original, strict=True)
        ]
        if head is None or recording is None:
            return predictions
        ready = {key: SegInput(head.segmenter.preprocess(image)) for key, image in shown.items()}
        return add_masks(
            head,
            predictions,
            pad_ids([self._trimmed(row) for row in written], base_instance(self.model).device),
            generation_states(recording, written),
            [ready[id(image)] for image in images],
            [(height, width) for width, height in original],
        )

    def _shown(self, image: Image.Image) -> Image.Image:
        """What the model sees: upright, RGB, the longest edge at most `max_edge`, as `segrl.data.prepare` does it."""
        if not isinstance(image, Image.Image):
            raise DataError(f"expected a PIL image, got {type(image).__name__}")
        if image.mode == "F" or image.mode.startswith("I"):
            raise DataError(f"image of mode {image.mode!r}: expected 8 bits a channel; scale it to 0..255 first")
        upright = ImageOps.exif_transpose(image)
        size = shrunk_size(upright.size, self.settings.get("max_edge"))
        if size != upright.size:
            upright = upright.resize(size, Image.Resampling.BICUBIC)
        return upright.convert("RGB")

    def _conversations(self, images: Sequence[Image.Image], queries: Sequence[str]) -> list[Any]:
        default = INSTRUCTION if self.settings.get("reasoning", True) else ANSWER_ONLY_INSTRUCTION
        instruction = self.settings.get("instruction")
        conversations = []
        for image, query in zip(images, queries, strict=True):
            text = build_prompt(query, default if instruction is None else instruction)[0]["content"]
            content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
            conversations.append([{"role": "user", "content": content}])
        return conversations
