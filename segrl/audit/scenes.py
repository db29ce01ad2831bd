"""Ground truths for the audit: images and volumes with elliptic lesions of known kinds."""

# D slices, H/W pixels

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from segrl.predictions.target import Target, VolumeTarget

__all__ = ["KINDS", "Scene", "make_scenes"]

KINDS = ("one", "several", "tiny", "large", "at the border", "none")
SIZE, VOLUME_SIZE, DEPTH = 256, 96, 11  # pixels of an image, pixels of a slice, slices
AXES = {"tiny": (0.02, 0.05), "large": (0.25, 0.29)}  # half axes of a lesion as shares of the edge
MEDIUM = (0.06, 0.11)


@dataclass(frozen=True, eq=False)
class Scene:
    """A ground truth to be answered.

    Attributes:
        target: The ground truth.
        number: Its index; picks the IoU within a grade, and how a lesion is missed.
        kind: One of `KINDS`, or "given".
        seed: Seed of the noise.
    """

    target: Target | VolumeTarget
    number: int = 0
    kind: str = "given"
    seed: int = 0


def make_scenes(count: int, *, volume: bool = False, seed: int = 0) -> list[Scene]:
    """Make scenes with elliptic lesions: one, several, tiny, large, at the border, none, in turn.

    No lesion covers more than about a third of its image, so that neither a box over the whole image nor a fixed one
    overlaps it well.

    Args:
        count: Number of scenes.
        volume: Volumes instead of images.
        seed: The same seed gives the same scenes.

    Returns:
        The scenes; images of 256 x 256 pixels, or volumes of 11 slices of 96 x 96.
    """
    scenes = []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        kind = KINDS[number % len(KINDS)]
        query, name = "Where is the lesion?", f"{kind} ({number})"
        if volume:
            target = VolumeTarget.from_mask(_volume(rng, kind), query=query, lesion="lesion", name=name)
        else:
            target = Target.from_mask(_drawn(_ellipses(rng, kind), SIZE), query=query, lesion="lesion", name=name)
        scenes.append(Scene(target, number, kind, seed))
    return scenes


def _ellipses(rng: np.random.Generator, kind: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return centres and half axes (y, x) in shares of the edge; lesions are in quarters of their own, so apart."""
    low, high = AXES.get(kind, MEDIUM)
    quarters = rng.permutation(4)
    found = []
    for n in range({"none": 0, "several": 3}.get(kind, 1)):
        half = rng.uniform(low, high, 2)
        quarter = np.array(divmod(int(quarters[n]), 2))
        centre = 0.25 + 0.5 * quarter + rng.uniform(-0.1, 0.1, 2)
        if kind == "at the border":
            centre[0] = quarter[0] + (0.5 - quarter[0]) * half[0]  # half of the lesion is outside
        found.append((np.clip(centre, half / 2, 1 - half / 2), half))
    return found


def _drawn(ellipses: list[tuple[np.ndarray, np.ndarray]], size: int, factor: float = 1.0) -> np.ndarray:
    """Return the mask of ellipses whose axes are multiplied by a factor."""
    mask = np.zeros((size, size), dtype=bool)
    y, x = np.ogrid[:size, :size]
    for centre, half in ellipses:
        (y0, x0), (tall, wide) = centre * size, half * size * factor
        mask |= ((y + 0.5 - y0) / tall) ** 2 + ((x + 0.5 - x0) / wide) ** 2 <= 1
    return mask


def _volume(rng: np.random.Generator, kind: str) -> np.ndarray:
    """Return ellipsoids that are widest on the same slice."""
    ellipses = _ellipses(rng, kind)
    key, reach = int(rng.integers(0, DEPTH)), rng.uniform(1.5, 3.0)
    shares = [1 - ((k - key) / reach) ** 2 for k in range(DEPTH)]  # of the area of the widest slice
    return np.stack([_drawn(ellipses if share > 0 else [], VOLUME_SIZE, max(share, 0.0) ** 0.5) for share in shares])
