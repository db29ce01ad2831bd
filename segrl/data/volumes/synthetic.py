"""Synthetic volumes with ellipsoid lesions, written as NIfTI files: data for the tiny preset, the tests and demos.

A volume holds one or two lesions of the kind that its row asks for, and often one of the other kind, so that the query
matters. Lesions are widest on their middle slice and smaller above and below it, so that some slices show them better
than others.
"""

# D slices, H/W pixels of a slice

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from scipy import ndimage

from segrl.data.manifest import write_manifest
from segrl.data.volumes.folder import load_volumes
from segrl.errors import DataError

__all__ = ["VOLUME_LESIONS", "SyntheticVolume", "make_synthetic_volumes", "make_volume"]

VOLUME_LESIONS: tuple[str, ...] = ("bright nodule", "dark cyst")
_SPACING_MM = (3.0, 1.0, 1.0)
_LEAST = (4, 32, 32)  # slices, pixels
_RADIUS = (0.12, 0.22)  # of a lesion in its slice, as a share of the edge
_REACH = (0.10, 0.20)  # of a lesion along the slices, as a share of the depth
_CONTRAST = 0.4  # of the full grey range
_TRIES = 40


@dataclass(frozen=True, eq=False)
class SyntheticVolume:
    """One volume with its labels.

    Attributes:
        voxels: (D, H, W) float32, in arbitrary units as in MR.
        labels: (D, H, W) uint8, 0 for tissue and `1 + VOLUME_LESIONS.index(kind)` inside a lesion.
        spacing_mm: Size of a voxel along D, H and W.
        lesion: The kind that the row asks for; always present.

    Example:
        >>> volume = make_volume(0, depth=4, size=32)
        >>> volume.voxels.shape, volume.spacing_mm, volume.lesion
        ((4, 32, 32), (3.0, 1.0, 1.0), 'bright nodule')
    """

    voxels: np.ndarray
    labels: np.ndarray
    spacing_mm: tuple[float, float, float]
    lesion: str


def make_volume(
    index: int, *, depth: int = 24, size: int = 64, seed: int = 0, distractors: bool = True
) -> SyntheticVolume:
    """Render one volume; the same arguments give the same voxels on every machine.

    Args:
        index: Number of the volume, from 0.
        depth: Slices D, at least 4.
        size: Height and width of a slice in pixels, at least 32; lesions scale with it.
        seed: Another family of volumes; two seeds share none.
        distractors: Whether half of the volumes also hold a lesion of the other kind.

    Raises:
        DataError: A volume that is too small, or a negative number.

    Example:
        >>> volume = make_volume(0, depth=4, size=32)
        >>> np.unique(volume.labels).tolist(), 1 + VOLUME_LESIONS.index(volume.lesion)
        ([0, 1], 1)
    """
    if depth < _LEAST[0] or size < _LEAST[1]:
        raise DataError(f"depth={depth}, size={size}: expected at least {_LEAST[0]} slices of {_LEAST[1]} px")
    if index < 0 or seed < 0:
        raise DataError(f"index={index}, seed={seed}: expected both to be 0 or more")
    rng = np.random.default_rng((seed, index, 3))
    z, y, x = np.meshgrid(
        (np.arange(depth) + 0.5) / depth, *[(np.arange(size) + 0.5) / size] * 2, indexing="ij", sparse=True
    )
    a, b = rng.uniform(0.42, 0.48, 2)
    inside = ((x - 0.5) / a) ** 2 + ((y - 0.5) / b) ** 2
    folds = ndimage.gaussian_filter(rng.standard_normal((depth, size, size), np.float32), (1.5, size / 16, size / 16))
    voxels = np.where(inside < 1, 0.5 + 0.05 * folds / folds.std(), 0.03).astype(np.float32)
    labels = np.zeros((depth, size, size), np.uint8)
    asked = int(rng.integers(2))
    kinds = [asked] * int(rng.choice([1, 1, 2])) + [1 - asked] * (int(rng.integers(2)) * distractors)
    placed: list[np.ndarray] = []
    for number, kind in enumerate(kinds):
        half = np.array([rng.uniform(*_REACH), *rng.uniform(*_RADIUS, 2)])
        for _ in range(_TRIES):
            centre = np.array([rng.uniform(half[0], 1 - half[0]), *rng.uniform(0.5 - 0.30, 0.5 + 0.30, 2)])
            apart = all(np.linalg.norm((centre - c) / (half + h)) > 1.15 for c, h in placed)
            if apart and np.linalg.norm(centre[1:] - 0.5) + half[1:].max() < 0.46:
                break
            half[1:] = np.maximum(_RADIUS[0], 0.95 * half[1:])
        else:
            if number:  # a lesion that does not fit is left out, but never the first
                continue
        placed.append(np.stack([centre, half]))
        depth_in = 1 - np.sqrt(sum(((axis - c) / h) ** 2 for axis, c, h in zip((z, y, x), centre, half, strict=True)))
        edge = np.clip(depth_in * size * half[1:].min() / 1.5 + 0.5, 0, 1)
        tone = _CONTRAST * rng.uniform(0.85, 1.15) * (1 if kind == 0 else -1)
        voxels += (tone * edge).astype(np.float32)
        labels[depth_in > 0] = 1 + kind
    voxels += 0.03 * rng.standard_normal(voxels.shape, np.float32)
    gain = rng.uniform(200, 900)  # MR has no fixed unit
    return SyntheticVolume(np.clip(voxels, 0, None) * gain, labels, _SPACING_MM, VOLUME_LESIONS[asked])


def make_synthetic_volumes(
    n: int, folder: str | Path, *, depth: int = 24, size: int = 64, seed: int = 0, distractors: bool = True
) -> Dataset:
    """Write `n` volumes with their labels and a manifest into a folder, and load them.

    Args:
        n: Number of volumes, 1 or more.
        folder: Created if needed; existing files of the same settings are reused.
        depth: Slices, see `make_volume`.
        size: Height and width of a slice.
        seed: Family of volumes.
        distractors: See `make_volume`.

    Returns:
        The rows that `load_volumes` loads.

    Raises:
        DataError: `n` is not positive, or as `make_volume`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (row,) = make_synthetic_volumes(1, folder, depth=4, size=32)
        >>> Path(row["scan"]).name, row["lesion"], row["label_value"]
        ('synthetic_0_4x32_00000.nii.gz', 'bright nodule', '1')
    """
    import nibabel

    if n < 1:
        raise DataError(f"n={n}: expected the number of volumes, 1 or more")
    path = Path(folder)
    rows = []
    for index in range(n):
        name = f"synthetic_{seed}_{depth}x{size}{'' if distractors else '_plain'}_{index:05d}"
        row = {kind: f"{kind}s/{name}.nii.gz" for kind in ("image", "label")}
        volume = make_volume(index, depth=depth, size=size, seed=seed, distractors=distractors)
        for kind, array in (("image", volume.voxels.round().astype(np.int16)), ("label", volume.labels)):
            file = path / row[kind]
            if file.exists():
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            dz, dy, dx = volume.spacing_mm
            image = nibabel.Nifti1Image(np.ascontiguousarray(array.transpose(2, 1, 0)), np.diag([-dx, -dy, dz, 1.0]))
            image.header.set_xyzt_units("mm")
            unfinished = file.with_name(f".{file.name}")  # a name that ends in .nii.gz, or it would not be compressed
            nibabel.save(image, unfinished)
            unfinished.replace(file)
        value = 1 + VOLUME_LESIONS.index(volume.lesion)
        rows.append(row | {"label_value": value, "modality": "MRI", "anatomy": "Head", "lesion": volume.lesion,
                           "name": name})  # fmt: skip
    write_manifest(path, rows)
    return load_volumes(path, validate=False)
