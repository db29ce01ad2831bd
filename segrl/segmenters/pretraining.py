"""In place of pretraining: a tiny SAM 2 with random weights learns to segment what a box encloses."""

# H, W pixels of a picture; S input side and h mask side of the segmenter; K kinds; N lesions of a step

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segrl.geometry.masks import soft_target
from segrl.losses import dice_ce
from segrl.models.tiny_pretraining import Picture, take_step, warming_up
from segrl.segmenters.sam2 import Sam2Segmenter

__all__ = ["pretrain_segmenter"]

JITTER = 0.08  # of a box's sides, relative to its edges: a language model's boxes are never exact
BACKGROUND = 0.3  # weight of background pixels beside 1 for a lesion's


def pretrain_segmenter(
    segmenter: Sam2Segmenter,
    pictures: Sequence[Picture],
    *,
    encoder_steps: int,
    decoder_steps: int,
    encoder_batch_size: int = 8,
    decoder_batch_size: int = 16,
    unprompted: float = 0.0,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> float:
    """Train the image encoder to tell kinds of lesions apart, then the rest to segment the lesion in a box.

    In one go, box and mask took ten times as long: a decoder learns nothing from features that say nothing
    (docs/log.md). What is trainable afterwards is what was trainable before.

    Args:
        segmenter: Trained in place.
        pictures: What it learns from.
        encoder_steps: Steps of AdamW in which three linear layers on the encoder's features, thrown away afterwards,
            give the kind of each pixel.
        decoder_steps: Steps in which the lesions of pictures are segmented from their boxes (DiceCE), 1 or more.
        encoder_batch_size: Pictures of a step of the first part.
        decoder_batch_size: Pictures of a step of the second.
        unprompted: Share of pictures of the second part whose prompt is a box around the whole picture, for all of its
            findings at once. 0 suits pictures of several kinds, where only a prompt tells which one is meant; where
            every picture has one kind, a segmenter that finds it by itself survives wrong prompts.
        learning_rate: Its peak in both.
        seed: Seed of the layers and batches; the global random state does not change.

    Returns:
        Mean DiceCE of the last tenth of the steps; NaN if no picture has a finding.

    Example:
        >>> from PIL import Image
        >>> from segrl.models import Finding
        >>> from segrl.segmenters import sam2_config
        >>> square = np.pad(np.ones((16, 16), dtype=bool), 24)
        >>> pictures = [Picture(Image.new("RGB", (64, 64)), [Finding("cyst", square)])]
        >>> segmenter = Sam2Segmenter(sam2_config("tiny", image_size=64))
        >>> pretrain_segmenter(segmenter, pictures, encoder_steps=1, decoder_steps=1) > 0
        segmenter, encoder ... 100% ...
        segmenter, decoder ... 100% ...
        True
    """
    before = [parameter.requires_grad for parameter in segmenter.parameters()]
    segmenter.requires_grad_(True)
    segmenter.train()
    rng = np.random.default_rng(seed)
    pictures = [picture for picture in pictures if picture.findings] or pictures
    _train_encoder(segmenter, pictures, rng, encoder_steps, encoder_batch_size, learning_rate, seed)
    segmenter.eval()
    losses = _train_decoder(segmenter, pictures, rng, decoder_steps, decoder_batch_size, unprompted, learning_rate)
    for parameter, trains in zip(segmenter.parameters(), before, strict=True):
        parameter.requires_grad_(trains)
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last) if last else math.nan


def _train_encoder(
    segmenter: Sam2Segmenter,
    pictures: Sequence[Picture],
    rng: np.random.Generator,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> None:
    kinds = sorted({finding.kind for picture in pictures for finding in picture.findings})
    side = segmenter.mask_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.ModuleList(nn.Conv2d(segmenter.prompt_dim, 1 + len(kinds), 1) for _ in range(3))
    layers.to(next(segmenter.parameters()).device)
    parameters = [*segmenter.sam.image_encoder.parameters(), *layers.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    weight = torch.tensor([BACKGROUND] + [1.0] * len(kinds)).to(parameters[0].device)
    for _ in warming_up(optimizer, learning_rate, steps, "segmenter, encoder"):
        chosen = [pictures[n] for n in rng.integers(len(pictures), size=batch_size)]
        truth = torch.stack([_kind_map(picture, kinds, side) for picture in chosen]).to(parameters[0].device)
        levels = segmenter.encode(_pixels(segmenter, chosen)).tensors
        maps = [layer(level) for layer, level in zip(layers, levels, strict=True)]
        wide = [F.interpolate(found, size=(side, side), mode="bilinear") for found in maps]
        losses = [F.cross_entropy(found, truth, weight=weight) for found in wide]
        take_step(optimizer, torch.stack(losses).sum(), parameters)


def _train_decoder(
    segmenter: Sam2Segmenter,
    pictures: Sequence[Picture],
    rng: np.random.Generator,
    steps: int,
    batch_size: int,
    unprompted: float,
    learning_rate: float,
) -> list[float]:
    parameters = [p for name, p in segmenter.sam.named_parameters() if not name.startswith("image_encoder.")]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    losses = []
    for _ in warming_up(optimizer, learning_rate, steps, "segmenter, decoder"):
        chosen = [pictures[n] for n in rng.integers(len(pictures), size=batch_size)]
        boxes, masks, index = [], [], []
        for number, picture in enumerate(chosen):
            found = [(_box(finding.box, picture, rng), finding.mask) for finding in picture.findings]
            if found and unprompted and rng.random() < unprompted:
                found = [(np.array([0.0, 0.0, 1.0, 1.0]), np.any([mask for _, mask in found], axis=0))]
            for box, mask in found:
                boxes.append(box)
                masks.append(soft_target(mask, (segmenter.mask_size, segmenter.mask_size)))
                index.append(number)
        if not boxes:
            continue
        with torch.no_grad():
            features = segmenter.encode(_pixels(segmenter, chosen))
        device = parameters[0].device
        prompts = torch.from_numpy(np.stack(boxes)).float().to(device)
        logits = segmenter.decode_boxes(features, prompts, torch.tensor(index, device=device))
        loss = dice_ce(logits, torch.stack(masks).to(device)).mean()
        take_step(optimizer, loss, parameters)
        losses.append(float(loss.detach()))
    return losses


def _pixels(segmenter: Sam2Segmenter, pictures: Sequence[Picture]) -> Tensor:
    pixels = torch.stack([segmenter.preprocess(picture.image) for picture in pictures])
    return pixels.to(next(segmenter.parameters()).device)


def _kind_map(picture: Picture, kinds: Sequence[str], side: int) -> Tensor:
    """0 or 1 + the number of the kind, (h, h)."""
    labels = torch.zeros(side, side, dtype=torch.long)
    for finding in picture.findings:
        labels[soft_target(finding.mask, (side, side)) >= 0.5] = 1 + kinds.index(finding.kind)
    return labels


def _box(box: Sequence[int], picture: Picture, rng: np.random.Generator) -> np.ndarray:
    """A box as fractions of the image, its sides moved a little."""
    sides = np.array(box, dtype=np.float64)
    sides += rng.normal(0, JITTER, 4) * np.tile(sides[2:] - sides[:2], 2)
    return (sides / ([picture.image.width, picture.image.height] * 2)).clip(0, 1)
