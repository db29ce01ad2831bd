"""SAM, MedSAM, SAM 2 and SAM 3's tracker through the classes of `transformers`, by hub name or folder.

Kirillov et al., "Segment Anything", arXiv:2304.02643; Ma et al., "Segment anything in medical images" (MedSAM),
arXiv:2304.12306; Ravi et al., "SAM 2", arXiv:2408.00714.
"""

# B unique images, N masks to decode, S input side in pixels, h mask side, C prompt width, K prompts per mask

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from segrl.errors import CheckpointError, unknown_name
from segrl.hub import reraise_as
from segrl.segmenters import original_sam
from segrl.segmenters.base import ExactPositions, ImageFeatures, square_pixels
from segrl.segmenters.registry import register_segmenter
from segrl.segmenters.sam2 import IMAGENET_MEAN, IMAGENET_STD, read_checkpoint

__all__ = ["Sam2TransformersSegmenter", "Sam3TrackerSegmenter", "SamSegmenter"]

Scaling = Literal["imagenet", "half", "minmax"]
# A mask loss on one mask never reaches these parts of a decoder: they stay as they were loaded.
_UNTRAINED = ("mask_decoder.iou_prediction_head.", "mask_decoder.pred_obj_score_head.")


class _TransformersSegmenter(ExactPositions):
    """Common part of the models of `transformers`; the decoder's single-mask token gives the mask."""

    model_class: ClassVar[str]
    config_class: ClassVar[str]
    own_scaling: ClassVar[Scaling] = "imagenet"
    also: ClassVar[tuple[str, ...]] = ()  # configs of larger models that hold this one

    def __init__(self, config: Any = None, *, scaling: Scaling | None = None, model: Any = None) -> None:
        super().__init__()
        if scaling is not None and scaling not in get_args(Scaling):
            raise unknown_name("scaling of pixels", scaling, get_args(Scaling))
        self.scaling: Scaling = scaling or self.own_scaling
        if model is None:
            model = getattr(transformers, self.model_class)(config or getattr(transformers, self.config_class)())
        self.sam: Any = model
        self.freeze(encoder=False)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, *, scaling: Scaling | None = None) -> Self:
        """Load weights of `transformers`' layout.

        Args:
            name: A folder with `config.json`, or `owner/name` on the hub.
            scaling: See the class.

        Raises:
            CheckpointError: There is no such model, it is of another family, or weights are missing.
        """
        where = f"segmenter {os.fspath(name)!r}"
        with reraise_as(where, CheckpointError):
            family = type(transformers.AutoConfig.from_pretrained(name)).__name__
        if family not in (cls.config_class, *cls.also):
            raise CheckpointError(f"{where} is of {family}, expected {cls.config_class} for {cls.__name__}")
        with reraise_as(where, CheckpointError):
            model, info = getattr(transformers, cls.model_class).from_pretrained(name, output_loading_info=True)
        if info["missing_keys"]:
            raise CheckpointError(f"{where}: weights are missing: {sorted(info['missing_keys'])[:8]}")
        return cls(model=model, scaling=scaling)

    @property
    def image_size(self) -> int:
        """Side S of the square input, pixels."""
        return int(self.sam.prompt_encoder.input_image_size)

    @property
    def mask_size(self) -> int:
        """Side of the mask logits, S / 4 pixels: four times that of the image embedding."""
        return 4 * int(self.sam.prompt_encoder.image_embedding_size[0])

    @property
    def prompt_dim(self) -> int:
        """Width C of one prompt embedding."""
        return int(self.sam.prompt_encoder.hidden_size)

    def freeze(self, *, encoder: bool) -> None:
        """Let the mask decoder train, and the image encoder unless it is frozen; see `Segmenter.freeze`."""
        for name, parameter in self.sam.named_parameters():
            trains = name.startswith("mask_decoder.") and not name.startswith(_UNTRAINED)
            parameter.requires_grad_(trains or (name.startswith("vision_encoder.") and not encoder))

    def position_matrices(self) -> list[tuple[nn.Module, str]]:
        name = "positional_embedding"
        return [(part, name) for part in self.sam.modules() if isinstance(getattr(part, name, None), Tensor)]

    def preprocess(self, image: Image.Image | np.ndarray) -> Tensor:
        """Return an image as (3, S, S), resized to a square; see `Segmenter.preprocess`."""
        pixels = square_pixels(image, self.image_size)
        if self.scaling == "minmax":
            return (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-8)
        if self.scaling == "half":
            return pixels / 127.5 - 1
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return (pixels / 255 - mean) / std

    def encode(self, images: Tensor) -> ImageFeatures:
        """Return features; see `Segmenter.encode`."""
        return ImageFeatures((self.sam.vision_encoder(images).last_hidden_state,))

    def decode(self, features: ImageFeatures, prompts: Tensor, index: Tensor) -> Tensor:
        """Return mask logits (N, h, h); see `Segmenter.decode`."""
        count, side = len(prompts), self.mask_size
        if not count:
            return prompts.new_zeros(0, side, side)
        embedding = features.tensors[0][index]
        dense = self.sam.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        places = self.sam.get_image_wide_positional_embeddings().to(embedding.dtype)
        masks = self.sam.mask_decoder(
            image_embeddings=embedding,
            image_positional_embeddings=places.expand(count, -1, -1, -1),
            sparse_prompt_embeddings=prompts[:, None],
            dense_prompt_embeddings=dense.expand(count, -1, *embedding.shape[-2:]),
            multimask_output=False,
            **self._finer(features, index),
        )[0]
        return masks[:, 0, 0]

    def _finer(self, features: ImageFeatures, index: Tensor) -> dict[str, Any]:
        """More arguments of the mask decoder."""
        return {}

    def decode_boxes(
        self, features: ImageFeatures, boxes: Tensor | None, index: Tensor, points: Tensor | None = None
    ) -> Tensor:
        """Return mask logits (N, h, h) for boxes (N, 4), points (N, P, 2) or both; see `Segmenter.decode_boxes`."""
        if not len(index):
            return features.tensors[0].new_zeros(0, self.mask_size, self.mask_size)
        corners, places = (
            None if given is None else (given.float() * self.image_size)[:, None] for given in (boxes, points)
        )
        labels = None if places is None else torch.ones(places.shape[:3], dtype=torch.int, device=places.device)
        sparse, _ = self.sam.prompt_encoder(
            input_points=places, input_labels=labels, input_boxes=corners, input_masks=None
        )
        return self.decode(features, sparse[:, 0].to(features.tensors[0].dtype), index)

    def to_config(self) -> dict[str, Any]:
        """Return JSON-ready settings from which `from_config` builds the same architecture."""
        return {"model": self.sam.config.to_dict(), "scaling": self.scaling}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **context: Any) -> Self:
        """Build a segmenter with random weights from `to_config`'s settings."""
        return cls(getattr(transformers, cls.config_class).from_dict(dict(config["model"])), scaling=config["scaling"])


@register_segmenter("sam")
class SamSegmenter(_TransformersSegmenter):
    """SAM 1, MedSAM or SAM-Med2D through `transformers.SamModel`.

    Images are resized to a square, as MedSAM and SAM 2 do; SAM 1 itself was trained on images with padding.

    Args:
        config: A `SamConfig`; None builds ViT-B at 1024 px with random weights.
        scaling: Of pixels. "imagenet" (SAM, SAM 2): mean and deviation of ImageNet. "half" (SAM 3): from -1 to 1.
            "minmax" (MedSAM): from 0 to 1 between the smallest and the largest value of the image. None: the model's.
        model: A `SamModel` with weights, in place of `config`.
        adapters: Whether the blocks of the encoder have SAM-Med2D's adapters.

    Raises:
        UnknownNameError: Another scaling.

    Example:
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64}
        >>> vision = {**sizes, "output_channels": 32, "num_pos_feats": 16, "global_attn_indexes": [0]}
        >>> parts = {"prompt_encoder_config": {"hidden_size": 32, "image_size": 64}, "vision_config": vision}
        >>> config = transformers.SamConfig(**parts, mask_decoder_config={"hidden_size": 32})
        >>> segmenter = SamSegmenter(config, scaling="minmax")
        >>> segmenter.image_size, segmenter.mask_size, segmenter.prompt_dim
        (64, 16, 32)
    """

    model_class = "SamModel"
    config_class = "SamConfig"

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, *, scaling: Scaling | None = None) -> Self:
        """Load weights of `transformers`' layout, or a checkpoint of SAM's own code.

        Args:
            name: A folder with `config.json`, or `owner/name` on the hub; or a `.pth` file of SAM, MedSAM or SAM-Med2D,
                or `owner/name:file.pth`. Of such a file the sizes are read off the weights, and SAM-Med2D's adapters
                are built.
            scaling: See the class.

        Raises:
            CheckpointError: There is no such model, it is of another family, or weights are missing or left over.
        """
        if not (Path(name).is_file() or ":" in os.fspath(name)):
            return super().from_pretrained(name, scaling=scaling)
        where, state = os.fspath(name), read_checkpoint(os.fspath(name))
        made = cls(original_sam.config_of(state, where), scaling=scaling, adapters=original_sam.has_adapters(state))
        missing, unexpected = made.sam.load_state_dict(original_sam.renamed(state), strict=False)
        if missing or unexpected:
            raise CheckpointError(f"{where}: weights are missing {missing[:4]} or left over {unexpected[:4]}")
        return made.eval()

    def __init__(
        self, config: Any = None, *, scaling: Scaling | None = None, model: Any = None, adapters: bool = False
    ) -> None:
        super().__init__(config, scaling=scaling, model=model)
        self.adapters = adapters
        if adapters:
            original_sam.add_adapters(self.sam)
            self.freeze(encoder=False)

    def to_config(self) -> dict[str, Any]:
        """Return JSON-ready settings from which `from_config` builds the same architecture."""
        return {**super().to_config(), "adapters": self.adapters}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **context: Any) -> Self:
        """Build a segmenter with random weights from `to_config`'s settings."""
        sizes = transformers.SamConfig.from_dict(dict(config["model"]))
        return cls(sizes, scaling=config["scaling"], adapters=config["adapters"])


@register_segmenter("sam2_transformers")
class Sam2TransformersSegmenter(_TransformersSegmenter):
    """SAM 2 through `transformers.Sam2Model`: single images, on the features of strides 16, 8 and 4.

    `Sam2Segmenter` takes the files of the `sam2` package and tracks through volumes as well.

    Args:
        config: A `Sam2Config` of transformers; None builds hiera-tiny at 1024 px with random weights.
        scaling: See `SamSegmenter`.
        model: A model of this class with weights, in place of `config`.

    Raises:
        UnknownNameError: Another scaling.

    Example:
        >>> Sam2TransformersSegmenter(scaling="mean")
        Traceback (most recent call last):
        segrl.errors.UnknownNameError: unknown scaling of pixels 'mean'; ...
    """

    model_class = "Sam2Model"
    config_class = "Sam2Config"

    def __init__(self, config: Any = None, *, scaling: Scaling | None = None, model: Any = None) -> None:
        super().__init__(config, scaling=scaling, model=model)
        self.sam.mask_decoder.dynamic_multimask_via_stability = False  # the token that trains is the one that answers

    def encode(self, images: Tensor) -> ImageFeatures:
        """Return features of strides 16, 8 and 4; see `Segmenter.encode`."""
        stride4, stride8, stride16 = self.sam.vision_encoder(images).fpn_hidden_states[:3]
        return ImageFeatures((stride16 + self.sam.no_memory_embedding.view(1, -1, 1, 1), stride8, stride4))

    def _finer(self, features: ImageFeatures, index: Tensor) -> dict[str, Any]:
        # these projections belong to the decoder and may train, so they do not run in `encode`
        decoder, (_, stride8, stride4) = self.sam.mask_decoder, features.tensors
        return {"high_resolution_features": [decoder.conv_s0(stride4)[index], decoder.conv_s1(stride8)[index]]}


@register_segmenter("sam3_tracker")
class Sam3TrackerSegmenter(Sam2TransformersSegmenter):
    """The tracker of SAM 3 through `transformers.Sam3TrackerModel`, as a segmenter of single images.

    Of a pyramid with four levels the coarsest is dropped before the embedding of a frame without memory is added, as in
    SAM 3's own code; transformers 5.24 adds it to that level, which nothing reads.

    Args:
        config: A `Sam3TrackerConfig`; None builds the published sizes with random weights.
        scaling: See `SamSegmenter`.
        model: A model of this class with weights, in place of `config`.

    Raises:
        UnknownNameError: Another scaling.

    Example:
        >>> Sam3TrackerSegmenter(scaling="mean")
        Traceback (most recent call last):
        segrl.errors.UnknownNameError: unknown scaling of pixels 'mean'; ...
    """

    model_class = "Sam3TrackerModel"
    config_class = "Sam3TrackerConfig"
    own_scaling = "half"
    also = ("Sam3VideoConfig",)
