"""Training of a small SAM 2 with random weights, on box prompts and their propagation through volumes.

Only the tiny preset needs it: MedSAM2 comes with weights. Clips grow: single slices first, then short runs of
slices, then long ones that also end where the lesion ends.
"""

# D slices, H/W pixels, T frames of a clip, S input side

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from rich.progress import track
from scipy import ndimage

from segrl.data import CaseReader
from segrl.segmenters import Sam2Segmenter, track_clip, tracking_loss

Lesion = tuple[np.ndarray, np.ndarray]  # (D, H, W) uint8 grey and bool mask of one lesion
STAGES = ((0.67, 1, 18), (0.95, 3, 9), (1.0, 6, 6))  # until this share of the steps: frames of a clip, clips of a step
DEPTH = 16  # slices of the synthetic volumes, and where SAM 2's scale of time ends
JITTER = 0.05  # of a box's corners, relative to its edges: a language model's boxes are never exact


def lesions_of(rows: Iterable[Any]) -> list[Lesion]:
    """Return every connected lesion of rows of `load_volumes` that has at least 20 voxels."""
    found, read = [], CaseReader(0)
    for row in rows:
        case = read(row, allow_empty=True)
        parts, count = ndimage.label(case.mask)  # pyright: ignore[reportGeneralTypeIssues]
        found += [(case.grey, parts == n) for n in range(1, count + 1) if np.count_nonzero(parts == n) >= 20]
    return found


def train_segmenter(
    segmenter: Sam2Segmenter,
    lesions: Sequence[Lesion],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Train all of a SAM 2.

    Args:
        segmenter: Trained in place; frozen and in eval mode afterwards.
        lesions: Clips are cut out of them.
        steps: Steps of AdamW, 1 or more.
        learning_rate: Its peak; it warms up for 30 steps and falls to 0 along a cosine.
        seed: Seed of the clips.
        progress: Show a progress bar.

    Returns:
        The loss of every step.
    """
    rng = np.random.default_rng(seed)
    segmenter.requires_grad_(True)
    segmenter.train()
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=learning_rate, weight_decay=0.01)
    losses: list[float] = []
    for step in track(range(steps), "segmenter", disable=not progress):
        _, length, count = next(stage for stage in STAGES if (step + 1) / steps <= stage[0])
        images, boxes, masks = _batch(segmenter, lesions, rng, length, count)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 30) * (1 + math.cos(math.pi * step / steps)) / 2
        clip = track_clip(segmenter, images, boxes, num_frames=DEPTH)
        # on single slices an object is always there, and its score would learn just that
        loss = tracking_loss(clip, masks, object_weight=float(length > 1)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(segmenter.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    segmenter.requires_grad_(False)
    segmenter.eval()
    return losses


def _batch(
    segmenter: Sam2Segmenter, lesions: Sequence[Lesion], rng: np.random.Generator, length: int, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (B, T, 3, S, S), boxes (B, 4) on the first frame as fractions, and masks (B, T, S, S)."""
    side = segmenter.image_size
    clips, boxes, targets = [], [], []
    while len(clips) < count:
        grey, mask = lesions[int(rng.integers(len(lesions)))]
        areas = mask.sum(axis=(1, 2))
        start = int(rng.choice(np.flatnonzero(areas >= 0.3 * areas.max())))
        direction = int(rng.choice([-1, 1]))
        slices = [min(max(start + direction * step, 0), len(grey) - 1) for step in range(length)]
        clips.append(torch.stack([segmenter.preprocess(grey[k]) for k in slices]))
        boxes.append(_box(mask[start], rng))
        resized = torch.from_numpy(mask[slices]).float()[:, None]
        targets.append(torch.nn.functional.interpolate(resized, size=(side, side), mode="area")[:, 0] >= 0.5)
    return torch.stack(clips), torch.tensor(np.stack(boxes), dtype=torch.float32), torch.stack(targets)


def _box(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float64)
    box += rng.normal(0, JITTER, 4) * np.tile(box[2:] - box[:2], 2)
    return np.clip(box / np.tile([mask.shape[1], mask.shape[0]], 2), 0, 1)
