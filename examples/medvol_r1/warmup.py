"""Stand-in for pretraining in the tiny preset: its vision tower learns to see lesions before words come in.

A published vision-language model has seen millions of images. A random vision tower gives a language model nothing to
look at, and with words as the only teacher it took ten times as long to begin to see (docs/log.md).
"""

# N slices, C kinds of lesion, D slices of a volume

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from rich.progress import track
from torch import Tensor, nn

from segrl.data import CaseReader, render_slices, uniform_slices
from segrl.geometry import mask_to_box

HELD_OUT = 0.1  # share of the slices that only measure
BINS = 8  # of the edge of a slice
SIZES = ("none", "small", "medium", "large")
AREAS = (0.0, 0.035, 0.075)  # of the slice: above so much each next size begins


def add_reasoning(rows: Dataset, slices: int) -> Dataset:
    """Add a column `reasoning`: what each shown slice holds, in order, and where.

    "3 large 1245": slice 3 has more than the last of `AREAS` of its pixels in lesions, in a box with these left, top,
    right and bottom sides in bins of the edge. Short words in a fixed order are what a model of a few million
    parameters can learn, and every text teaches about every slice. A size that compared slices with each other was not
    learned (docs/log.md).
    """
    texts = []
    read = CaseReader(0)
    for row in _dicts(rows):
        mask = read(row).mask
        assert mask is not None
        shares = mask.mean(axis=(1, 2))
        parts = []
        for number, k in enumerate(uniform_slices(len(mask), slices), 1):
            size = SIZES[np.searchsorted(AREAS, shares[k])]
            parts.append(f"{number} {size} {''.join(map(str, _sides(mask[k])))}".strip())
        texts.append(", ".join(parts) + ".")
    return rows.add_column("reasoning", texts)  # type: ignore[call-arg]


def pretrain_vision(
    model: Any,
    processor: Any,
    rows: Dataset,
    *,
    size: int,
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    volumes: int = 400,
    seed: int = 0,
) -> float:
    """Train the vision tower to tell, of single slices, whether a lesion is there and where.

    A linear layer on all tokens of a slice, thrown away afterwards, gives for each kind of lesion its presence and its
    box, each side as one of `BINS` classes. A row teaches about its own kind only.

    Args:
        model: Qwen3-VL, trained in place.
        processor: Its processor.
        rows: Rows of `load_volumes`.
        size: Edge of a slice as the model sees it, pixels.
        steps: Steps of AdamW; the learning rate falls along a cosine.
        batch_size: Slices of a step.
        learning_rate: Its peak.
        volumes: Use the slices of at most this many volumes.
        seed: Seed of the batches.

    Returns:
        Share of held-out slices of which the presence of the lesion is predicted right.
    """
    pixels, grid, kinds, target = _slices(processor, rows.select(range(min(volumes, len(rows)))), size)
    tower = model.model.visual
    width = sum(len(part) for part in _features(model, pixels[:1], grid))
    layer = nn.Linear(width * model.config.text_config.hidden_size, (1 + max(kinds.tolist())) * (1 + 4 * BINS))
    parameters = [*tower.parameters(), *layer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pixels), generator=rng)
    test = order[: math.ceil(HELD_OUT * len(order))]
    train = order[len(test) :] if len(test) < len(order) else order  # a single slice is all there is

    def predict(index: Tensor) -> Tensor:
        """Logit of presence, and those of the bins of each side, (N, 1 + 4 * BINS)."""
        tokens = torch.stack(_features(model, pixels[index], grid)).flatten(1)
        found = layer(tokens).unflatten(1, (-1, 1 + 4 * BINS))
        return found[torch.arange(len(index)), kinds[index]]

    for step in track(range(steps), "vision tower"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        index = train[torch.randint(len(train), (batch_size,), generator=rng)]
        found, true = predict(index), target[index]
        loss = F.binary_cross_entropy_with_logits(found[:, 0], true[:, 0].float())
        seen = true[:, 0] > 0
        if seen.any():
            loss = loss + F.cross_entropy(found[seen, 1:].reshape(-1, BINS), true[seen, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    with torch.no_grad():
        right = [((predict(part)[:, 0] > 0) == (target[part][:, 0] > 0)).float() for part in test.split(256)]
    return float(torch.cat(right).mean())


def _slices(processor: Any, rows: Dataset, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All slices of the rows: patches (N, P, 3 * 2 * p * p), grid (3,), kinds (N,), presence and `_sides` (N, 5)."""
    names = sorted(set(rows["lesion"]))
    patches, kinds, target = [], [], []
    grid = torch.zeros(3, dtype=torch.long)
    read = CaseReader(0)
    for row in _dicts(rows):
        case = read(row)
        assert case.mask is not None
        images = render_slices(case.grey, np.arange(len(case.grey)), size, case.scan.spacing_mm)
        images = [image.resize((size, size)) for image in images]  # volumes of any aspect, in one batch
        batch = processor.image_processor(images=images, return_tensors="pt")
        grid = batch["image_grid_thw"][0]
        patches.append(batch["pixel_values"].view(len(images), int(grid.prod()), -1))
        kinds += [names.index(row["lesion"])] * len(images)
        for section in case.mask:
            sides = _sides(section)
            target.append([1, *sides] if sides else [0] * 5)
    return torch.cat(patches), grid, torch.tensor(kinds), torch.tensor(target)


def _features(model: Any, pixels: Tensor, grid: Tensor) -> list[Tensor]:
    """Tokens of each slice."""
    return list(model.model.get_image_features(pixels.flatten(0, 1), grid.expand(len(pixels), -1)).pooler_output)


def _sides(section: np.ndarray) -> list[int]:
    """Bins of the left, top, right and bottom side of the box around all foreground of a slice (H, W); [] without."""
    box, (height, width) = mask_to_box(section), section.shape
    if box is None:
        return []
    return (box / [width, height, width, height] * BINS).astype(int).clip(0, BINS - 1).tolist()


def _dicts(rows: Dataset) -> list[dict[str, Any]]:
    return [dict(rows[number]) for number in range(len(rows))]
