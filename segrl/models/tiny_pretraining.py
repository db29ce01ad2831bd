"""In place of pretraining: a tiny model with random weights learns to see, and to say what it sees.

A published vision-language model has seen millions of images and read their captions. A random one gives words nothing
to hold on to, and with the answers of a few thousand images as its only teacher it takes ten times as long to begin to
see (docs/log.md). `pretrain_vision` teaches the vision tower alone, `pretrain_captions` the language model on top of
it. Both are made for models of `segrl.models.tiny`; whatever has weights needs neither.
"""

# H, W pixels of a picture; T tokens of a picture; K kinds; B pictures of a step

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import track
from scipy import ndimage
from torch import Tensor, nn

__all__ = ["Finding", "Picture", "list_findings", "pretrain_captions", "pretrain_vision", "take_step", "warming_up"]

CAPTION_QUESTION = "List the findings."
HELD_OUT = 0.05  # share of the pictures that only measure
BINS = 24  # of the width or height, for the sides of a box
REACH = 8  # bins; a side that is further from its token than this counts as this far
MOST = 4  # findings of a mask; a long list is not learned
COVERED = 0.15  # share of a token's cell above which the cell shows a finding


@dataclass(frozen=True, eq=False)
class Finding:
    """One lesion of a picture.

    Attributes:
        kind: Its name, such as "dark cyst".
        mask: (H, W) bool with some foreground.

    Example:
        >>> Finding("cyst", np.eye(4, dtype=bool)[:3]).box
        (0, 0, 3, 3)
    """

    kind: str
    mask: np.ndarray

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom, half-open, pixels."""
        y, x = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(x[0]), int(y[0]), int(x[-1]) + 1, int(y[-1]) + 1


@dataclass(frozen=True, eq=False)
class Picture:
    """An image and what is known about it.

    Attributes:
        image: As the model sees it.
        findings: Lesions with masks of the image's size.
        known: Kinds of which every lesion is among the findings; None for all kinds.
    """

    image: Image.Image
    findings: Sequence[Finding]
    known: frozenset[str] | None = None

    @classmethod
    def from_mask(cls, image: Image.Image, mask: np.ndarray, kind: str) -> Picture:
        """Make a picture of a row of data, which knows one kind: a finding for each of the `MOST` largest components.

        Args:
            image: (W, H).
            mask: (H, W) bool.
            kind: What the mask shows.

        Example:
            >>> picture = Picture.from_mask(Image.new("RGB", (3, 3)), np.array([[1, 0, 1]] * 3, dtype=bool), "cyst")
            >>> [finding.box for finding in picture.findings], sorted(picture.known)
            ([(0, 0, 1, 3), (2, 0, 3, 3)], ['cyst'])
        """
        parts, count = ndimage.label(mask, structure=np.ones((3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
        areas = np.bincount(parts.ravel(), minlength=count + 1)[1:]
        largest = sorted(np.argsort(-areas, kind="stable")[:MOST].tolist())
        return cls(image, [Finding(kind, parts == 1 + n) for n in largest], frozenset([kind]))


def list_findings(picture: Picture) -> str:
    """Say what a picture holds and where, in the words of the tiny models: "dark cyst 2142 5678, ring abscess none.".

    Every known kind has its entry, in the order of the alphabet. The digits are left, top, right and bottom of a
    finding in tenths of the width and height; the findings of a kind come from top to bottom and from left to right.
    Short words in a fixed order are what a model of two million parameters can learn, and "none" is what it has to say
    before it can answer that there is none (docs/log.md).

    Example:
        >>> image = Image.new("RGB", (10, 10))
        >>> mask = np.zeros((10, 10), dtype=bool)
        >>> mask[2:4, 3:6] = True
        >>> kinds = frozenset(["abscess", "cyst"])
        >>> list_findings(Picture(image, [Finding("cyst", mask)], kinds)), list_findings(Picture(image, []))
        ('abscess none, cyst 3264.', 'nothing.')
    """
    size = np.array([picture.image.width, picture.image.height] * 2)
    places: dict[str, list[tuple[int, int, str]]] = {kind: [] for kind in picture.known or ()}
    for finding in picture.findings:
        left, top, right, bottom = finding.box
        place = (np.array([left, top, right, bottom]) * 10 // size).clip(0, 9)
        row = (top + bottom) * 3 // picture.image.height  # sixths of the height
        places.setdefault(finding.kind, []).append((row, left, "".join(map(str, place))))
    entries = (
        f"{kind} {' '.join(text for *_, text in sorted(found)) or 'none'}" for kind, found in sorted(places.items())
    )
    return ", ".join(entries) + "." if places else "nothing."


def warming_up(optimizer: torch.optim.Optimizer, learning_rate: float, steps: int, title: str) -> Iterable[int]:
    """Yield the numbers of steps with a progress bar; the learning rate rises for 20 steps and falls along a cosine.

    Example:
        >>> weight = nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.AdamW([weight])
        >>> rates = [optimizer.param_groups[0]["lr"] for _ in warming_up(optimizer, 0.1, 2, "example")]
        example ... 100% ...
        >>> [round(rate, 4) for rate in rates]
        [0.005, 0.005]
    """
    for step in track(range(steps), title):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        yield step


def pretrain_vision(
    model: Any,
    processor: Any,
    pictures: Sequence[Picture],
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> float:
    """Train the vision tower to tell which lesions the part of an image behind a token shows, and where they are.

    Linear layers on each token, thrown away afterwards, give for each kind of lesion its presence and the sides of its
    box, each as one of `BINS` classes: once counted from the edge of the image, which is what words will need, and once
    from the token itself, which is learned ten times as fast and brings the other with it.

    Args:
        model: A Qwen-VL model, trained in place.
        processor: Its processor.
        pictures: What it learns from; a few only measure.
        steps: Steps of AdamW, 1 or more.
        batch_size: Pictures of a step.
        learning_rate: Its peak.
        seed: Seed of the layers and batches; the global random state does not change.

    Returns:
        Share of the held-out lesions that are seen: their kind is called present where they lie, with every side of the
        box right to about an eighth of the image. NaN if no held-out picture has a lesion.

    Example:
        >>> from segrl.models.tiny import tiny_qwen3_vl
        >>> model, processor = tiny_qwen3_vl(layers=1, vision_layers=1)
        >>> square = np.pad(np.ones((16, 16), dtype=bool), 24)
        >>> pictures = [Picture(Image.new("RGB", (64, 64)), [Finding("cyst", square)])] * 3
        >>> 0 <= pretrain_vision(model, processor, pictures, steps=1, batch_size=2) <= 1
        vision tower ... 100% ...
        True
    """
    kinds = sorted({finding.kind for picture in pictures for finding in picture.findings})
    width = model.config.get_text_config().hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(width, len(kinds) * (1 + 4 * BINS + 4 * (2 * REACH + 1)))
    parameters = [*model.model.visual.parameters(), *layer.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    rng = np.random.default_rng(seed)
    test, train = _split(len(pictures), rng)
    merge = processor.image_processor.merge_size
    model.train()

    def predict(chosen: Sequence[Picture]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Logits of presence (N, K), of sides (N, K, 4, .) twice, and the truth, for all tokens of some pictures."""
        inputs = processor.image_processor(images=[picture.image for picture in chosen], return_tensors="pt")
        tokens = torch.cat(list(model.model.get_image_features(**_on(model, inputs)).pooler_output))
        found = layer(tokens.float()).unflatten(-1, (len(kinds), -1))
        grids = [(int(h) // merge, int(w) // merge) for _, h, w in inputs["image_grid_thw"]]
        truth = [_cells(picture, grid, kinds) for picture, grid in zip(chosen, grids, strict=True)]
        true, own = (torch.from_numpy(np.concatenate(part)) for part in zip(*truth, strict=True))
        sides, near = found[..., 1:].split([4 * BINS, 4 * (2 * REACH + 1)], -1)
        return (
            found[..., 0],
            sides.unflatten(-1, (4, -1)),
            near.unflatten(-1, (4, -1)),
            true[..., 0],
            true[..., 1:],
            own,
        )

    for _ in warming_up(optimizer, learning_rate, steps, "vision tower"):
        chosen = [pictures[n] for n in rng.choice(train, batch_size)]
        presence, sides, near, there, true, own = predict(chosen)
        known = there >= 0
        loss = 4 * F.binary_cross_entropy_with_logits(presence[known], there[known].float())
        seen = there > 0
        if seen.any():
            offsets = (true[seen] - own[:, None].expand_as(true)[seen]).clamp(-REACH, REACH) + REACH
            loss = loss + F.cross_entropy(sides[seen].flatten(0, 1), true[seen].flatten())
            loss = loss + F.cross_entropy(near[seen].flatten(0, 1), offsets.flatten())
        take_step(optimizer, loss, parameters)
    model.eval()
    right = []
    with torch.no_grad():
        for start in range(0, len(test), 64):
            presence, sides, _, there, true, _ = predict([pictures[n] for n in test[start : start + 64]])
            close = (sides.argmax(-1) - true).abs().amax(-1) <= BINS // 8
            right.append(((presence > 0) & close)[there > 0])
    return float(torch.cat(right).float().mean())


def pretrain_captions(
    model: Any,
    processor: Any,
    pictures: Sequence[Picture],
    *,
    steps: int,
    describe: Callable[[Picture], str] = list_findings,
    batch_size: int = 16,
    learning_rate: float = 4e-3,
    seed: int = 0,
) -> float:
    """Train the language model to describe pictures; the vision tower is left alone.

    Args:
        model: A vision-language model, trained in place.
        processor: Its processor.
        pictures: What it learns from; a few only measure.
        steps: Steps of AdamW, 1 or more.
        describe: The text of a picture.
        batch_size: Pictures of a step.
        learning_rate: Its peak.
        seed: Seed of the batches.

    Returns:
        Share of the tokens of held-out texts that are predicted right.

    Example:
        >>> from segrl.models.tiny import tiny_qwen3_vl
        >>> model, processor = tiny_qwen3_vl(layers=1, vision_layers=1)
        >>> square = np.pad(np.ones((16, 16), dtype=bool), 24)
        >>> pictures = [Picture(Image.new("RGB", (64, 64)), [Finding("cyst", square)])] * 3
        >>> 0 <= pretrain_captions(model, processor, pictures, steps=1, batch_size=2) <= 1
        language model ... 100% ...
        True
    """
    own = [p for name, p in model.named_parameters() if "visual." not in name and not name.startswith("mask_head.")]
    optimizer = torch.optim.AdamW(own, weight_decay=0.01, betas=(0.9, 0.98))
    rng = np.random.default_rng(seed)
    test, train = _split(len(pictures), rng)
    question = [{"type": "image"}, {"type": "text", "text": CAPTION_QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    end = processor.tokenizer.eos_token

    def predict(chosen: Sequence[Picture]) -> tuple[Tensor, Tensor]:
        """Logits (N, V) and tokens (N,) of the texts."""
        texts = [describe(picture) + end for picture in chosen]
        inputs = processor(
            images=[picture.image for picture in chosen],
            text=[prompt + text for text in texts],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        lengths = inputs["attention_mask"].sum(1)
        counts = torch.tensor([len(ids) for ids in processor.tokenizer(texts)["input_ids"]])
        place = torch.arange(inputs["input_ids"].size(1))[None]
        written = (place >= (lengths - counts)[:, None]) & (place < lengths[:, None])
        logits = model(**_on(model, inputs), use_cache=False).logits
        return logits[:, :-1][written[:, 1:]].float(), inputs["input_ids"][written].to(logits.device)

    trained = [p.requires_grad for p in model.model.visual.parameters()]
    model.model.visual.requires_grad_(False)
    model.train()
    for _ in warming_up(optimizer, learning_rate, steps, "language model"):
        logits, ids = predict([pictures[n] for n in rng.choice(train, batch_size)])
        take_step(optimizer, F.cross_entropy(logits, ids), own)
    model.eval()
    for parameter, before in zip(model.model.visual.parameters(), trained, strict=True):
        parameter.requires_grad_(before)
    with torch.no_grad():
        parts = [predict([pictures[n] for n in test[start : start + 32]]) for start in range(0, len(test), 32)]
    return float(torch.cat([logits.argmax(-1) == ids for logits, ids in parts]).float().mean())


def _cells(picture: Picture, grid: tuple[int, int], kinds: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return targets of tokens: (T, K, 5) presence (-1: not known) and side bins; and (T, 4) the bins of centres."""
    rows, columns = grid
    truth = np.zeros((rows, columns, len(kinds), 5), dtype=np.int64)
    if picture.known is not None:
        truth[..., [n for n, kind in enumerate(kinds) if kind not in picture.known], 0] = -1
    best = np.zeros((rows, columns, len(kinds)))
    size = np.array([picture.image.width, picture.image.height] * 2)
    for finding in picture.findings:
        kind, box = kinds.index(finding.kind), np.array(finding.box)
        mask = torch.from_numpy(finding.mask).float()[None, None]
        share = F.adaptive_avg_pool2d(mask, grid)[0, 0].numpy()
        middle = (box[:2] + box[2:]) * [columns, rows] // (2 * size[:2])
        share[min(middle[1], rows - 1), min(middle[0], columns - 1)] += 1  # the middle is its, however small it is
        shown = (share > COVERED) & (share > best[..., kind])
        best[shown, kind] = share[shown]
        truth[shown, kind] = [1, *(box * BINS // size).clip(0, BINS - 1)]
    y, x = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
    own = (np.stack([x, y, x, y], -1) * BINS).astype(np.int64)
    return truth.reshape(-1, len(kinds), 5), own.reshape(-1, 4)


def _split(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pictures that measure, at least one, and those to learn from; a single one does both."""
    order = rng.permutation(count)
    held = math.ceil(HELD_OUT * count)
    return order[:held], order[held:] if held < count else order


def _on(model: Any, inputs: Any) -> dict[str, Any]:
    return {name: value.to(model.device) for name, value in inputs.items()}


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Take a step against the gradient of a loss (), whose norm over `parameters` is clipped to 1."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
