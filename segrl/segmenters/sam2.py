"""SAM 2.x and MedSAM2 through the `sam2` package.

The model is `sam2.modeling.sam2_base.SAM2Base`, whole: the memory modules that a single image does not need are built
too, so that a published checkpoint loads with every key matched and the same object can propagate through a video or
volume.

Ravi et al., "SAM 2: Segment Anything in Images and Videos", arXiv:2408.00714; Ma et al., "MedSAM2", arXiv:2504.03600.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from segrl.errors import CheckpointError, SegRLError, unknown_name
from segrl.files.whole import whole_file
from segrl.models.saved_files import ShapesOnly, check_counts, read_object, read_weights, require_shapes
from segrl.segmenters.base import ExactPositions, ImageFeatures, square_pixels
from segrl.segmenters.registry import register_segmenter

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Sam2Config",
    "Sam2Segmenter",
    "build_sam2",
    "check_sam2_source",
    "read_checkpoint",
    "sam2_config",
]

SEGMENTER_CONFIG, SEGMENTER_WEIGHTS = "segmenter.json", "segmenter.safetensors"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Sam2Config:
    """Sizes of a SAM 2 model. The defaults are SAM 2.1 hiera-tiny at 512 px, the model of MedSAM2.

    Attributes:
        image_size: Input side S in pixels, a multiple of 32.
        embed_dim: Width of the Hiera trunk's first stage.
        num_heads: Attention heads of that stage.
        stages: Blocks of each stage.
        global_att_blocks: Blocks that attend to the whole image.
        window_spec: Window side of each stage.
        pos_embed_size: Side of the position embedding before it is resized.
        hidden_dim: Width of the neck, prompt encoder and mask decoder (a multiple of 8).
        memory_dim: Width of the memories (video only, as all below).
        memory_layers: Layers of the memory attention.
        memory_feedforward: Inner width of these layers.
        num_maskmem: Memories that the video predictor keeps.

    Raises:
        SegRLError: `image_size` or `hidden_dim` is no such multiple.

    Example:
        >>> Sam2Config(image_size=1000)
        Traceback (most recent call last):
        segrl.errors.SegRLError: image_size=1000: a SAM 2 input side must be a positive multiple of 32 pixels
    """

    image_size: int = 512
    embed_dim: int = 96
    num_heads: int = 1
    stages: tuple[int, ...] = (1, 2, 7, 2)
    global_att_blocks: tuple[int, ...] = (5, 7, 9)
    window_spec: tuple[int, ...] = (8, 4, 14, 7)
    pos_embed_size: tuple[int, int] = (7, 7)
    hidden_dim: int = 256
    memory_dim: int = 64
    memory_layers: int = 4
    memory_feedforward: int = 2048
    num_maskmem: int = 7

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            numbers = value if isinstance(item.default, tuple) and isinstance(value, list | tuple) else [value]
            if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
                raise SegRLError(f"{item.name}={value!r}: expected whole numbers, as in {item.default!r}")
        if self.image_size <= 0 or self.image_size % 32:
            raise SegRLError(
                f"image_size={self.image_size}: a SAM 2 input side must be a positive multiple of 32 pixels"
            )
        if self.hidden_dim % 8:
            raise SegRLError(f"hidden_dim={self.hidden_dim}: must be a multiple of 8 (the decoder's number of heads)")
        for item in fields(self):  # JSON turns tuples into lists
            value = getattr(self, item.name)
            if isinstance(value, list):
                object.__setattr__(self, item.name, tuple(value))


_NAMED_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {
        "image_size": 128,
        "embed_dim": 32,
        "stages": (1, 2, 2, 1),
        "global_att_blocks": (4,),
        "window_spec": (8, 4, 8, 4),
        "pos_embed_size": (4, 4),
        "hidden_dim": 64,
        "memory_dim": 16,
        "memory_layers": 1,
        "memory_feedforward": 128,
    },
    "sam2.1_hiera_tiny": {},
    "sam2.1_hiera_small": {"stages": (1, 2, 11, 2), "global_att_blocks": (7, 10, 13)},
    "sam2.1_hiera_base_plus": {
        "embed_dim": 112,
        "num_heads": 2,
        "stages": (2, 3, 16, 3),
        "global_att_blocks": (12, 16, 20),
        "pos_embed_size": (14, 14),
    },
    "sam2.1_hiera_large": {
        "embed_dim": 144,
        "num_heads": 2,
        "stages": (2, 6, 36, 4),
        "global_att_blocks": (23, 33, 43),
        "window_spec": (8, 4, 16, 8),
    },
}


def sam2_config(name: str, **changes: Any) -> Sam2Config:
    """Return the sizes of a published model, or of one that trains on a CPU.

    Args:
        name: `sam2.1_hiera_tiny`, `_small`, `_base_plus` or `_large`; or `tiny`, segrl's own: 2.3 M parameters,
            128 px, for random weights.
        **changes: Fields of `Sam2Config`, such as `image_size=1024`.

    Raises:
        UnknownNameError: No such model.

    Example:
        >>> config = sam2_config("sam2.1_hiera_large", image_size=1024)
        >>> config.embed_dim, config.stages, config.image_size
        (144, (2, 6, 36, 4), 1024)
    """
    if name not in _NAMED_CONFIGS:
        raise unknown_name("SAM 2 size", name, _NAMED_CONFIGS)
    return Sam2Config(**{**_NAMED_CONFIGS[name], **changes})


def build_sam2(config: Sam2Config) -> nn.Module:
    """Build a `SAM2Base` with random weights and the parameter names of the published SAM 2.1 checkpoints."""
    from sam2.modeling.backbones.hieradet import Hiera
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
    from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
    from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine
    from sam2.modeling.sam.transformer import RoPEAttention
    from sam2.modeling.sam2_base import SAM2Base

    dim, memory_dim, side = config.hidden_dim, config.memory_dim, config.image_size // 16

    def sine(width: int) -> PositionEmbeddingSine:
        return PositionEmbeddingSine(num_pos_feats=width, normalize=True, scale=None, temperature=10000)

    trunk: Any = Hiera(
        embed_dim=config.embed_dim,
        num_heads=config.num_heads,
        stages=config.stages,
        global_att_blocks=config.global_att_blocks,
        window_spec=config.window_spec,
        window_pos_embed_bkg_spatial_size=config.pos_embed_size,
    )
    neck = FpnNeck(
        position_encoding=sine(dim),
        d_model=dim,
        backbone_channel_list=trunk.channel_list,
        fpn_top_down_levels=[2, 3],
        fpn_interp_model="nearest",
    )
    attention = {
        "rope_theta": 10000.0,
        "feat_sizes": [side, side],
        "embedding_dim": dim,
        "num_heads": 1,
        "downsample_rate": 1,
        "dropout": 0.1,
    }
    layer = MemoryAttentionLayer(
        activation="relu",
        dim_feedforward=config.memory_feedforward,
        dropout=0.1,
        pos_enc_at_attn=False,
        self_attention=RoPEAttention(**attention),
        d_model=dim,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        cross_attention=RoPEAttention(**attention, rope_k_repeat=True, kv_in_dim=memory_dim),
    )
    fuser_block = CXBlock(dim=dim, kernel_size=7, padding=3, layer_scale_init_value=1e-6, use_dwconv=True)
    memory_encoder = MemoryEncoder(
        out_dim=memory_dim,
        in_dim=dim,
        position_encoding=sine(memory_dim),
        mask_downsampler=MaskDownSampler(embed_dim=dim, kernel_size=3, stride=2, padding=1),
        fuser=Fuser(layer=fuser_block, num_layers=2),
    )
    return SAM2Base(
        image_encoder=ImageEncoder(trunk=trunk, neck=neck, scalp=1),
        memory_attention=MemoryAttention(
            d_model=dim, pos_enc_at_input=True, layer=layer, num_layers=config.memory_layers
        ),
        memory_encoder=memory_encoder,
        num_maskmem=config.num_maskmem,
        image_size=config.image_size,
        sigmoid_scale_for_mem_enc=20.0,
        sigmoid_bias_for_mem_enc=-10.0,
        use_mask_input_as_output_without_sam=True,
        directly_add_no_mem_embed=True,
        no_obj_embed_spatial=True,
        use_high_res_features_in_sam=True,
        multimask_output_in_sam=True,
        iou_prediction_use_sigmoid=True,
        use_obj_ptrs_in_encoder=True,
        add_tpos_enc_to_obj_ptrs=True,
        proj_tpos_enc_in_obj_ptrs=True,
        use_signed_tpos_enc_to_obj_ptrs=True,
        only_obj_ptrs_in_the_past_for_eval=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        fixed_no_obj_ptr=True,
        multimask_output_for_tracking=True,
        use_multimask_token_for_obj_ptr=True,
        multimask_min_pt_num=0,
        multimask_max_pt_num=1,
        use_mlp_for_obj_ptr_proj=True,
    )


# A mask loss on one mask never reaches these parts of the decoder: they stay as they were loaded.
_UNTRAINED = ("sam_mask_decoder.iou_prediction_head.", "sam_mask_decoder.pred_obj_score_head.")


@register_segmenter("sam2")
class Sam2Segmenter(ExactPositions):
    """SAM 2 as a `Segmenter`: prompt embeddings go straight into its mask decoder, which returns one mask for each.

    `decode` uses the decoder's single-mask token and no output other than its logits: stride 4, so `mask_size` is S /
    4. The projections `conv_s0` and `conv_s1` belong to the decoder and may train, so they run in `decode`, on unique
    images; features of a frozen encoder therefore never go stale.

    Args:
        config: Its sizes; by default those of `Sam2Config`.

    Example:
        >>> segmenter = Sam2Segmenter(Sam2Config(image_size=64))
        >>> features = segmenter.encode(torch.zeros(1, 3, 64, 64))
        >>> segmenter.decode(features, torch.zeros(2, 1, 256), torch.tensor([0, 0])).shape  # two masks of one image
        torch.Size([2, 16, 16])
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: Sam2Config | None = None) -> None:
        super().__init__()
        self.config = config or Sam2Config()
        self.sam: Any = build_sam2(self.config)
        self.register_buffer("pixel_mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        self.freeze(encoder=False)

    # read off the config, which nobody can change: a size set here would be obeyed by one of the parts only

    @property
    def image_size(self) -> int:
        """Side S of the square input, pixels."""
        return self.config.image_size

    @property
    def mask_size(self) -> int:
        """Side of the mask logits, S / 4 pixels."""
        return self.config.image_size // 4

    @property
    def prompt_dim(self) -> int:
        """Width C of one prompt embedding."""
        return self.config.hidden_dim

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path, config: Sam2Config | None = None) -> Sam2Segmenter:
        """Load published weights, or what `save_pretrained` wrote.

        Pickles are read with `torch.load(weights_only=True)`: a pickle that holds anything but tensors is refused.

        Args:
            checkpoint: A `.pt` file in the layout `{"model": state_dict}`, `owner/repo:file.pt` on the hub, or a folder
                of `save_pretrained`, which brings its own config.
            config: Sizes of the model that wrote the file.

        Raises:
            CheckpointError: File missing, not a plain weights file, or any parameter of the model missing, unexpected
                or of another shape (all named).
        """
        if (Path(checkpoint) / SEGMENTER_CONFIG).is_file():
            return cls._from_folder(Path(checkpoint))
        state = read_checkpoint(checkpoint)
        segmenter = cls(config)
        segmenter._load(state, str(checkpoint))
        return segmenter

    @classmethod
    def _from_folder(cls, folder: Path) -> Sam2Segmenter:
        path, weights = folder / SEGMENTER_CONFIG, folder / SEGMENTER_WEIGHTS
        values = read_object(path)
        check_counts(path, values, weights)
        try:
            config = Sam2Config(**values)
            with ShapesOnly():
                expected = cls(config).sam.state_dict()
        except (SegRLError, TypeError, ValueError, AssertionError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        require_shapes(weights, {name: value.shape for name, value in expected.items()})
        segmenter = cls(config)
        segmenter.sam.load_state_dict(read_weights(weights))
        return segmenter

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `segmenter.json` and `segmenter.safetensors`, which `from_pretrained` reads from the folder."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous().clone() for name, value in self.sam.state_dict().items()}
        with whole_file(path / SEGMENTER_WEIGHTS) as unfinished:
            save_file(state, unfinished, metadata={"format": "pt"})
        text = json.dumps(self.to_config(), indent=2, sort_keys=True) + "\n"
        (path / SEGMENTER_CONFIG).write_text(text, encoding="utf-8")

    def _load(self, state: Mapping[str, Tensor], name: str) -> None:
        """Load weights, or name what does not fit."""
        own = self.sam.state_dict()
        problems = [f"missing {key}" for key in own if key not in state]
        problems += [f"unexpected {key}" for key in state if key not in own]
        problems += [
            f"{key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}"
            for key, value in own.items()
            if key in state and state[key].shape != value.shape
        ]
        if problems:
            shown = "; ".join(problems[:8])
            raise CheckpointError(
                f"{name}: does not fit {self.config} ({len(problems)} parameters): {shown}. "
                "Pass the config of the model that wrote the file."
            )
        self.sam.load_state_dict(state)

    def freeze(self, *, encoder: bool) -> None:
        """Let the mask decoder train, and the image encoder unless it is frozen; see `Segmenter.freeze`."""
        for name, parameter in self.sam.named_parameters():
            trains = name.startswith("sam_mask_decoder.") and not name.startswith(_UNTRAINED)
            parameter.requires_grad_(trains or (name.startswith("image_encoder.") and not encoder))

    def preprocess(self, image: Image.Image | np.ndarray) -> Tensor:
        """Return an image as (3, S, S), normalised as ImageNet; see `Segmenter.preprocess`."""
        pixels = square_pixels(image, self.image_size) / 255
        return (pixels - self.pixel_mean.cpu()) / self.pixel_std.cpu()

    def encode(self, images: Tensor) -> ImageFeatures:
        """Return features of strides 16, 8 and 4; see `Segmenter.encode`."""
        stride4, stride8, stride16 = self._levels(images)
        embedding = stride16 + self.sam.no_mem_embed.view(1, -1, 1, 1)  # SAM 2 adds it to a frame without memory
        return ImageFeatures((embedding, stride8, stride4))

    def encode_frames(self, images: Tensor) -> ImageFeatures:
        """Return what `segrl.segmenters.tracking` reads of images (B, 3, S, S): strides 16, 8 and 4.

        Nothing is added to stride 16, since a frame meets the memory of others there. Strides 8 and 4 have gone through
        the decoder's own projections, which makes them a fifth of the size of `encode`'s, and stale as soon as the
        decoder trains.
        """
        stride4, stride8, stride16 = self._levels(images)
        decoder = self.sam.sam_mask_decoder
        return ImageFeatures((stride16, decoder.conv_s1(stride8), decoder.conv_s0(stride4)))

    def _levels(self, images: Tensor) -> list[Tensor]:
        levels = self.sam.image_encoder(images)["backbone_fpn"]
        if images.dtype == torch.float32:
            return levels
        return [level.to(images.dtype) for level in levels]  # the neck adds in float32

    def decode(
        self, features: ImageFeatures, prompts: Tensor, index: Tensor, *, mask_prompt: Tensor | None = None
    ) -> Tensor:
        """Return mask logits (N, S / 4, S / 4); see `Segmenter.decode`.

        Args:
            features: Of B images.
            prompts: (N, K, C).
            index: (N,) image of each mask.
            mask_prompt: (N, 1, S / 4, S / 4) logits of a first guess, which SAM 2's prompt encoder reads beside the
                prompts; None for none.

        Raises:
            SegRLError: `mask_prompt` has another shape.
        """
        embedding, stride8, stride4 = features.tensors
        decoder, encoder = self.sam.sam_mask_decoder, self.sam.sam_prompt_encoder
        count, side = len(prompts), self.mask_size
        if mask_prompt is not None and tuple(mask_prompt.shape) != (count, 1, side, side):
            expected = (count, 1, side, side)
            raise SegRLError(f"mask_prompt: expected logits of shape {expected}, got {tuple(mask_prompt.shape)}")
        if not count:
            return prompts.new_zeros(0, side, side)
        if mask_prompt is None:
            dense = encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand(count, -1, *embedding.shape[-2:])
        else:
            dense = encoder.mask_downscaling(mask_prompt)
        masks, _, _, _ = decoder(
            image_embeddings=embedding[index],
            image_pe=encoder.get_dense_pe().to(embedding.dtype),
            sparse_prompt_embeddings=prompts,
            dense_prompt_embeddings=dense,
            multimask_output=False,
            repeat_image=False,
            high_res_features=[decoder.conv_s0(stride4)[index], decoder.conv_s1(stride8)[index]],
        )
        return masks[:, 0]

    def decode_boxes(
        self, features: ImageFeatures, boxes: Tensor | None, index: Tensor, points: Tensor | None = None
    ) -> Tensor:
        """Return mask logits (N, h, h) for boxes (N, 4), points (N, P, 2) or both; see `Segmenter.decode_boxes`."""
        # SAM 2 was trained on boxes as two points with the labels 2 and 3 and the padding point that comes with points
        corners = [] if boxes is None else [boxes.reshape(-1, 2, 2)]
        places = torch.cat([*corners, *([] if points is None else [points])], 1) * self.image_size
        kinds = [2, 3] * len(corners) + [1] * (places.size(1) - 2 * len(corners))
        labels = torch.tensor([kinds], dtype=torch.int, device=places.device).expand(len(places), -1)
        sparse, _ = self.sam.sam_prompt_encoder(points=(places, labels), boxes=None, masks=None)
        return self.decode(features, sparse.to(features.tensors[0].dtype), index)

    def position_matrices(self) -> list[tuple[nn.Module, str]]:
        return [(self.sam.sam_prompt_encoder.pe_layer, "positional_encoding_gaussian_matrix")]

    def to_config(self) -> dict[str, Any]:
        """Return JSON-ready settings from which `from_config` builds the same architecture."""
        return asdict(self.config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **context: Any) -> Sam2Segmenter:
        """Build a segmenter with random weights from `to_config`'s settings."""
        return cls(Sam2Config(**config))


def check_sam2_source(checkpoint: str | Path) -> None:
    """Refuse what is neither a file, nor a folder of `save_pretrained`, nor a file's name on the hub.

    Raises:
        CheckpointError: It is none of them.

    Example:
        >>> check_sam2_source("wanglab/MedSAM2:MedSAM2_latest.pt")
    """
    path = Path(checkpoint)
    if path.is_file() or (path / SEGMENTER_CONFIG).is_file() or (":" in str(checkpoint) and not path.exists()):
        return
    raise CheckpointError(
        f"SAM 2 checkpoint {str(checkpoint)!r} does not exist. Pass the path of a .pt file, or 'owner/repo:file.pt' "
        "for the hub."
    )


def read_checkpoint(checkpoint: str | Path) -> Mapping[str, Tensor]:
    """Read the weights of a PyTorch checkpoint without running what it may hold.

    Args:
        checkpoint: A file in the layout `state_dict` or `{"model": state_dict}`, or `owner/repo:file` on the hub.

    Raises:
        CheckpointError: File missing, or not a plain weights file.
    """
    path = _fetch(checkpoint)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{checkpoint}: refused, since it is not a plain weights file (weights_only=True): {error}"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise CheckpointError(f"{checkpoint}: cannot be read as a PyTorch checkpoint: {error}") from error
    state = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{checkpoint}: expected a dict of tensors, or one under the key 'model'")
    return state


def _fetch(checkpoint: str | Path) -> Path:
    check_sam2_source(checkpoint)
    path = Path(checkpoint)
    if not path.exists():
        from huggingface_hub import hf_hub_download

        repository, filename = str(checkpoint).split(":", 1)
        return Path(hf_hub_download(repository, filename))
    return path
