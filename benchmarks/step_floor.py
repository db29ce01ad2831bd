"""The arithmetic of a step: floating-point operations of both arms from token counts, and the ratio that they allow.

A multiply-add counts as two. With P prompt tokens, C completion tokens, G completions of a prompt, h, L, I, V width,
layers, feed-forward width and vocabulary, and n_kv of n heads for keys and values, a prompt of a step costs:

    token           w = 2 L (2 h^2 + 2 h^2 n_kv / n + 3 h I)            all matrices of the decoder's layers
    pair            a = 4 h L                                           a query meets a key: two products
    scored token    v = 2 h V
    image           e = patches * 2 Lv (4 hv^2 + 3 hv Iv) + pairs of the windows * 4 hv Lv + patch embedding + merger
    causal pairs    t(n) = n (n + 1) / 2

    forward of a scoring pass     A  G ((P + C) w + t(P + C) a + C v + images e)
                                  B  P w + t(P) a + G (C w + (C P + t(C)) a + C v) + images e
    prefill                       the same with C = 0 and one v for each completion
    decoding                      A and B  G (C w + (C P + t(C)) a + C v)
    backward                      twice the forward; once in matrices that are not trained (LoRA), and nothing in a
                                  frozen vision tower; checkpointing repeats the forward of the decoder's layers

B encodes an image once in a step if the vision tower is frozen, and once in the rollout and once in the loss if it is
trained. B also runs the segmenter (counted by running it once): the encoder once for each prompt, without gradients,
and the decoder for each completion, in the rollout and, with a backward pass, in the loss. Attention of a completion
to its prompt is not shared: a completion meets every key of its prompt in both arms.

A floor says what a perfect implementation could reach on a machine whose speed is the same everywhere. Decoding is
limited by memory on most machines, so the floors of `generate` and `step` are not times.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from step_arms import Settings
from step_shapes import MERGE, PATCH, SAM_SIZES, ModelSize, Shape, image_tokens
from torch.utils.flop_counter import FlopCounterMode

from segrl import Sam2Segmenter

WINDOW = 112 // PATCH  # patches along the side of an attention window of the vision tower


def arithmetic(shape: Shape, group: int, settings: Settings) -> dict[str, Any]:
    """Operations of a step of both arms by phase, and the ratios B / A.

    Returns:
        `{"flops": {"trl": {...}, "segrl": {...}}, "ratio": {...}}`, both with the keys `generate`, `old_ref`, `masks`,
        `forward`, `backward`, `recomputed` (by checkpointing; part of the step, not of the loss), `loss` and `step`. A
        ratio without operations in A is left out.
    """
    segmenter = segmenter_flops(settings.sam or shape.sam)
    flops = {arm: _step(shape, group, settings, arm == "segrl", segmenter) for arm in ("trl", "segrl")}
    theirs, ours = flops["trl"], flops["segrl"]
    ratio = {name: ours[name] / value for name, value in theirs.items() if value}
    return {"flops": flops, "ratio": ratio}


def _step(shape: Shape, group: int, settings: Settings, ours: bool, segmenter: dict[str, float]) -> dict[str, float]:
    """Operations of one rollout and the losses on it."""
    size, shared = shape.model, ours and settings.share
    frozen = settings.frozen_vision
    cost = Cost(size)
    prompt, answer = shape.prompt_tokens, shape.completion_tokens
    copies = 1 if shared else group
    own = group * (answer * cost.token + (answer * prompt + _causal(answer)) * cost.pair)
    prompts = copies * (prompt * cost.token + _causal(prompt) * cost.pair)
    head = group * answer * cost.scored
    images = copies * shape.images * image_flops(shape)
    later = 0.0 if shared and frozen else images  # in passes after generation
    scoring = prompts + own + head
    passes = (settings.rollouts > 1) * (scoring + later)
    if settings.beta:
        passes += scoring + (later if settings.lora else images)  # without LoRA the reference has a tower of its own
    matrices = 1 if settings.lora else 2
    attention = (copies * _causal(prompt) + group * (answer * prompt + _causal(answer))) * cost.pair
    backward = matrices * (scoring - attention) + 2 * attention + (0 if frozen else 2 * images)
    masks = segmenter["encode"] + group * segmenter["decode"] if ours else 0.0
    dense = group * segmenter["decode"] if ours else 0.0
    found = {
        "generate": prompts + group * cost.scored + images + own + head,
        "old_ref": passes,
        "masks": masks,
        "forward": scoring + later + dense,
        "backward": backward + 2 * dense,
        "recomputed": (prompts + own) if settings.checkpointing else 0.0,
    }
    found = {name: value * shape.prompts * settings.rollouts for name, value in found.items()}
    return {**found, "loss": found["forward"] + found["backward"], "step": sum(found.values())}


@dataclass(frozen=True)
class Cost:
    """Operations of a decoder by unit, see the head of this file."""

    size: ModelSize

    @property
    def token(self) -> float:
        size = self.size
        keys = 2 * size.hidden**2 * size.kv_heads / size.heads
        return 2 * size.layers * (2 * size.hidden**2 + keys + 3 * size.hidden * size.intermediate)

    @property
    def pair(self) -> float:
        return 4 * self.size.hidden * self.size.layers

    @property
    def scored(self) -> float:
        return 2 * self.size.hidden * self.size.vocabulary


def image_flops(shape: Shape) -> float:
    """Operations of the vision tower for one image of the shape."""
    size, tokens = shape.model, image_tokens(shape)
    side = round(tokens**0.5) * MERGE
    width, patches = size.vision_hidden, side**2
    matrices = 2 * size.vision_layers * (4 * width**2 + 3 * width * size.vision_intermediate)
    edges = [min(WINDOW, side - start) for start in range(0, side, WINDOW)]
    windowed = sum((high * wide) ** 2 for high in edges for wide in edges)
    full = len(size.vision_full)
    pairs = (size.vision_layers - full) * windowed + full * patches**2
    embedding = 2 * width * 3 * 2 * PATCH**2
    merger = 2 * ((MERGE**2 * width) ** 2 + MERGE**2 * width * size.hidden)
    return patches * (matrices + embedding) + 4 * width * pairs + tokens * merger


@cache
@torch.no_grad()
def segmenter_flops(name: str) -> dict[str, float]:
    """Operations of SAM 2 for one image (`encode`) and for one mask (`decode`), counted while it runs."""
    segmenter = Sam2Segmenter(SAM_SIZES[name])
    side, one = segmenter.image_size, torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as encoder:
        features = segmenter.encode(torch.zeros(1, 3, side, side))
    with FlopCounterMode(display=False) as decoder:
        segmenter.decode(features, torch.zeros(1, 1, segmenter.prompt_dim), one)
    return {"encode": float(encoder.get_total_flops()), "decode": float(decoder.get_total_flops())}


def _causal(tokens: int) -> float:
    return tokens * (tokens + 1) / 2
