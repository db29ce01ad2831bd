"""The networks of a committee: built, trained without one fold, and asked about it."""

# n images; S side of the square that images are resized to

from __future__ import annotations

import difflib
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from segrl.caching.content import content_key
from segrl.curation.case import Case
from segrl.curation.committee_settings import CommitteeSettings, Membership
from segrl.curation.packages import require
from segrl.data.images.augmentation import random_view
from segrl.errors import SegRLError
from segrl.geometry.image_files import read_image
from segrl.geometry.mask_images import read_mask_file
from segrl.geometry.masks import mask_to_rle, resize_mask
from segrl.metrics.overlap import dice
from segrl.models.saved_files import ShapesOnly

__all__ = ["check_encoders", "trained_alone"]

_CHANNELS = (64, 32, 16, 16, 16)  # of the decoder: a quarter of the package's default
_HELD_BACK = 0.15  # of the groups of the training folds, which stop the training


def check_encoders(settings: CommitteeSettings) -> None:
    """Build every network, so that a name that is wrong is found before anything is made; weights are downloaded.

    Raises:
        SegRLError: An encoder that is not known, or the extra `curation` is not installed.
    """
    with ShapesOnly() if settings.weights is None else nullcontext():
        for member in range(len(settings.encoders)):
            _built(settings, member)


def trained_alone(job: Membership) -> dict[str, Any]:
    """Train and predict on one thread, and leave torch's random state as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums of several threads differ in their last bits from those of one
    devices = [torch.cuda.current_device()] if job.settings.device.startswith("cuda") else []
    try:
        with torch.random.fork_rng(devices=devices):
            return _train_and_predict(job)
    finally:
        torch.set_num_threads(threads)


def _train_and_predict(job: Membership) -> dict[str, Any]:
    seed = int(content_key(job.settings.seed, job.member, *(job.cases[n].id for n in job.held_out)), 16) % 2**32
    held_out = set(job.held_out)
    rng = np.random.default_rng(seed)
    groups = sorted({group for n, group in enumerate(job.groups) if n not in held_out})
    stopping = set(rng.permutation(groups)[: max(1, round(_HELD_BACK * len(groups)))].tolist()) if groups[1:] else set()
    rest = [n for n in range(len(job.cases)) if n not in held_out]
    train = [n for n in rest if job.groups[n] not in stopping]
    images, masks = _pixels([job.cases[n] for n in rest], job.settings.size)
    place = {n: k for k, n in enumerate(rest)}
    torch.manual_seed(seed)
    network = _trained(images, masks, [place[n] for n in train], [place[n] for n in rest if n not in train], job, rng)
    found = {}
    for n in job.held_out:
        case = job.cases[n]
        image, _ = _pixels([case], job.settings.size)
        logits = _logits(network, image, job.settings)[0, 0]
        target = read_mask_file(case.mask, str(case.mask))
        full = torch.nn.functional.interpolate(logits[None, None], size=target.shape, mode="bilinear")[0, 0] > 0
        found[case.id] = {"error": 1 - dice(full.numpy(), target), "mask": mask_to_rle((logits > 0).numpy())}
    return found


def _pixels(cases: Sequence[Case], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images (n, S, S, 3) and masks (n, S, S), uint8; both are stretched to the square."""
    images = np.stack([_resized(read_image(case.image, f"image {case.image}"), size) for case in cases])
    masks = [resize_mask(read_mask_file(case.mask, str(case.mask)), (size, size)) for case in cases]
    return images, np.stack(masks).astype(np.uint8)


def _resized(image: Image.Image, size: int) -> np.ndarray:
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def _trained(
    images: np.ndarray, masks: np.ndarray, train: list[int], stopping: list[int], job: Membership, rng: Any
) -> torch.nn.Module:
    settings = job.settings
    network = _built(settings, job.member).to(settings.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=1e-4)
    warmup = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1.0, (n + 1) / warmup, (settings.steps - n) / (settings.steps - warmup + 1e-9))
    )
    best, since, kept = -1.0, 0, {}
    for step in range(1, settings.steps + 1):
        network.train()
        batch = [_view(images[n], masks[n], rng) for n in rng.choice(train, settings.batch)]
        inputs, targets = (
            _tensor(np.stack([view for view, _ in batch]), settings),
            np.stack([mask for _, mask in batch]),
        )
        loss = _loss(network(inputs)[:, 0], torch.from_numpy(targets).to(settings.device).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if stopping and (step % settings.check == 0 or step == settings.steps):
            score = _mean_dice(network, images[stopping], masks[stopping], settings)
            since = 0 if score > best else since + 1
            if score > best:
                best, kept = score, {name: value.clone() for name, value in network.state_dict().items()}
            if since >= settings.patience:
                break
    if kept:
        network.load_state_dict(kept)
    return network.eval()


def _built(settings: CommitteeSettings, member: int) -> torch.nn.Module:
    unet = require("segmentation_models_pytorch").Unet
    encoder = settings.encoders[member]
    try:
        return unet(
            encoder, encoder_depth=4, encoder_weights=settings.weights, decoder_channels=_CHANNELS[:4], classes=1
        )
    except (KeyError, ValueError, RuntimeError, OSError) as error:
        raise SegRLError(f"encoders: {encoder!r}{_why_not(encoder, settings.weights, error)}") from error


def _why_not(encoder: str, weights: str | None, error: Exception) -> str:
    """Say what is wrong with an encoder; packages list all that they know, which is hundreds."""
    known = require("segmentation_models_pytorch").encoders.get_encoder_names()
    if encoder in known or encoder.startswith("tu-"):
        return f" with weights={weights!r}: {' '.join(str(error).split())[:200]}"
    near = difflib.get_close_matches(encoder, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f" is no encoder of segmentation_models_pytorch{hint} Expected such as resnet18, or tu- and a name of timm"


def _view(image: np.ndarray, mask: np.ndarray, rng: Any) -> tuple[np.ndarray, np.ndarray]:
    size = len(mask)
    view, moved = random_view(image, mask, rng)
    moved = Image.fromarray(moved).resize((size, size), Image.Resampling.NEAREST)
    return _resized(Image.fromarray(view), size), np.asarray(moved)


def _tensor(images: np.ndarray, settings: CommitteeSettings) -> Tensor:
    """Return (n, 3, S, S) float with mean 0 and deviation 1 in every image."""
    values = torch.from_numpy(images).to(settings.device).permute(0, 3, 1, 2).float()
    mean, deviation = values.mean((1, 2, 3), keepdim=True), values.std((1, 2, 3), keepdim=True)
    return (values - mean) / (deviation + 1e-3)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy and soft Dice, of (n, S, S)."""
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    shares = logits.sigmoid()
    overlap = 2 * (shares * targets).sum((1, 2)) + 1
    return entropy + (1 - overlap / (shares.sum((1, 2)) + targets.sum((1, 2)) + 1)).mean()


@torch.no_grad()
def _logits(network: torch.nn.Module, images: np.ndarray, settings: CommitteeSettings) -> Tensor:
    network.eval()
    parts = [images[begin : begin + settings.batch] for begin in range(0, len(images), settings.batch)]
    return torch.cat([network(_tensor(part, settings)).float().cpu() for part in parts])


def _mean_dice(network: torch.nn.Module, images: np.ndarray, masks: np.ndarray, settings: CommitteeSettings) -> float:
    found = _logits(network, images, settings)[:, 0].numpy() > 0
    return float(np.mean([dice(one, mask) for one, mask in zip(found, masks, strict=True)]))
