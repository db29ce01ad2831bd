"""Checkpoints in the layout of SAM's own code: SAM, MedSAM and SAM-Med2D, as `transformers` names their parts.

Sizes are read off the weights. Cheng et al., "SAM-Med2D", arXiv:2308.16184.
"""

# D width of the image encoder, H/W tokens

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SamConfig

from segrl.errors import CheckpointError

__all__ = ["MlpWithAdapter", "add_adapters", "config_of", "has_adapters", "renamed"]

_RULES = (
    (r"^image_encoder\.blocks\.(\d+)\.Adapter\.", r"vision_encoder.layers.\1.mlp.adapter."),
    (r"^image_encoder\.blocks\.", "vision_encoder.layers."),
    (r"^image_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
    (r"^image_encoder\.neck\.0\.", "vision_encoder.neck.conv1."),
    (r"^image_encoder\.neck\.1\.", "vision_encoder.neck.layer_norm1."),
    (r"^image_encoder\.neck\.2\.", "vision_encoder.neck.conv2."),
    (r"^image_encoder\.neck\.3\.", "vision_encoder.neck.layer_norm2."),
    (r"^image_encoder\.", "vision_encoder."),
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", "shared_image_embedding.positional_embedding"),
    (r"^prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embed."),
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
    (r"(hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.1\.", r"\1.layers.0."),
    (r"(hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.2\.", r"\1.proj_out."),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
)


class MlpWithAdapter(nn.Module):
    """The feed-forward part of a block of SAM-Med2D's encoder: SAM's own, and beside it the adapter.

    Args:
        mlp: SAM's own, whose weights keep their names.
        width: D.
        hidden: Width of the adapter's channel attention.
    """

    def __init__(self, mlp: nn.Module, width: int, hidden: int) -> None:
        super().__init__()
        for name, part in mlp.named_children():
            self.add_module(name, part)
        self.act: Any = getattr(mlp, "act", None)
        adapter = nn.Module()
        adapter.channel = nn.Sequential(
            *(nn.Linear(width, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, width, bias=False), nn.Sigmoid())
        )
        adapter.spatial = nn.Sequential(
            *(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False), nn.ReLU()),
            *(nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, bias=False), nn.ReLU()),
        )
        adapter.norm = nn.LayerNorm(width)
        self.adapter: Any = adapter

    def forward(self, states: Tensor) -> Tensor:
        """Return (B, H, W, D) for (B, H, W, D)."""
        parts: Any = self
        own = parts.lin2(self.act(parts.lin1(states)))
        maps = states.permute(0, 3, 1, 2)
        weighted = self.adapter.channel(maps.mean((2, 3)))[..., None, None] * maps
        return own + self.adapter.norm((maps + self.adapter.spatial(weighted)).permute(0, 2, 3, 1))


def has_adapters(state: Mapping[str, Tensor]) -> bool:
    """Return whether a checkpoint is of SAM-Med2D."""
    return any(".Adapter." in name for name in state)


def add_adapters(model: Any) -> Any:
    """Give every block of a `SamModel`'s encoder an adapter of SAM-Med2D with random weights; return the model."""
    width = model.config.vision_config.hidden_size
    for layer in model.vision_encoder.layers:
        layer.mlp = MlpWithAdapter(layer.mlp, width, width // 4)
    return model


def config_of(state: Mapping[str, Tensor], name: str) -> SamConfig:
    """Read the sizes of a model off its weights.

    Args:
        state: In the layout of SAM's own code.
        name: Of the file, for errors.

    Raises:
        CheckpointError: The weights are not of this layout; what is missing is named.
    """
    needed = ("image_encoder.pos_embed", "image_encoder.patch_embed.proj.weight", "image_encoder.neck.0.weight")
    needed = (*needed, "mask_decoder.iou_token.weight", "prompt_encoder.not_a_point_embed.weight")
    missing = [key for key in needed if key not in state]
    if missing:
        raise CheckpointError(
            f"{name}: no weights of SAM's own code, {missing[0]} is missing; a SAM 2 file is for Sam2Segmenter"
        )
    places, patch = state["image_encoder.pos_embed"], state["image_encoder.patch_embed.proj.weight"].shape[-1]
    side, width = places.shape[1], places.shape[-1]
    depth = 1 + max(int(found[1]) for key in state if (found := re.match(r"image_encoder\.blocks\.(\d+)\.", key)))
    tokens = [(state[f"image_encoder.blocks.{n}.attn.rel_pos_h"].shape[0] + 1) // 2 for n in range(depth)]
    narrow = [found for found in tokens if found != side]
    head = state["image_encoder.blocks.0.attn.rel_pos_h"].shape[1]
    dim = state["image_encoder.neck.0.weight"].shape[0]
    vision = {
        **{"hidden_size": width, "output_channels": dim, "num_hidden_layers": depth, "image_size": side * patch},
        **{"patch_size": patch, "num_attention_heads": width // head, "window_size": narrow[0] if narrow else 0},
        **{"global_attn_indexes": [n for n, found in enumerate(tokens) if found == side], "num_pos_feats": dim // 2},
        "mlp_dim": state["image_encoder.blocks.0.mlp.lin1.weight"].shape[0],
    }
    prompts = {"hidden_size": dim, "image_size": side * patch, "patch_size": patch}
    prompts["mask_input_channels"] = state["prompt_encoder.mask_downscaling.3.weight"].shape[0]
    layer = "mask_decoder.transformer.layers.0"
    decoder = {
        **{"hidden_size": dim, "mlp_dim": state[f"{layer}.mlp.lin1.weight"].shape[0]},
        "iou_head_hidden_dim": state["mask_decoder.iou_prediction_head.layers.0.weight"].shape[0],
        **{"num_attention_heads": 8, "layer_norm_eps": 1e-5},  # which no weight tells: those of SAM's own code
    }
    return SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of SAM's own code under the names of `transformers.SamModel`."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in ("pixel_mean", "pixel_std"):
            continue
        new = name
        for pattern, replacement in _RULES:
            new = re.sub(pattern, replacement, new)
        found[new] = value
    places = found["shared_image_embedding.positional_embedding"]
    found["prompt_encoder.shared_embedding.positional_embedding"] = places
    return {name: value.detach().to(torch.float32) for name, value in found.items()}
