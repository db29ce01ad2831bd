"""Synthetic lesions: a small, free data set in which the query decides what has to be segmented.

A scene is a grey or coloured background in the style of one modality, with lesions of up to three kinds. The kinds
differ only in their contrast with the tissue around them, so the answer cannot be guessed from position or size:
`bright nodule` (filled, brighter), `dark cyst` (filled, darker) and `ring abscess` (bright rim, dark centre).

Hard scenes (`hard=True`) leave something to find by trying: some questions choose one of several lesions ("the leftmost
dark cyst"), some ask for a kind that is not there, and contrast goes down to the noise of ultrasound.
"""

# H, W pixels (both `size`); coordinates are x to the right and y down, in original pixels.

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from segrl.data.manifest import write_manifest
from segrl.data.reasoning import build_query
from segrl.errors import DataError, unknown_name
from segrl.models.tiny_pretraining import Finding, Picture
from segrl.predictions.target import METADATA_COLUMNS

__all__ = ["LESIONS", "Scene", "make_scene", "make_synthetic", "write_folder"]

LESIONS: tuple[str, ...] = ("bright nodule", "dark cyst", "ring abscess")

_REFERENCE_SIZE = 112  # the radii below are pixels at this size
_RADIUS_PX = (6.0, 14.0)
_GAP_PX = 3.0  # free tissue between two lesions
_MIN_SIZE = 32
_CONTRAST = 0.30  # of the full grey range, against the tissue around the lesion
_RIM = 0.38  # width of an abscess's bright rim as a fraction of its radius
_TRIES = 40

# of hard scenes
_HARD_RADIUS_PX = (11.5, 21.0)
_HARD_CONTRAST = (0.16, 0.36)
_ABSENT, _CHOSEN = 0.15, 0.25  # shares of scenes
_CHOICES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {  # of rows y and columns x: the least is chosen
    "largest": lambda y, x: -len(y),
    "smallest": lambda y, x: len(y),
    "leftmost": lambda y, x: x.mean(),
    "rightmost": lambda y, x: -x.mean(),
    "uppermost": lambda y, x: y.mean(),
    "lowest": lambda y, x: -y.mean(),
}


@dataclass(frozen=True)
class Scene:
    """One rendered image with its labels and metadata.

    Attributes:
        image: (H, W, 3) uint8.
        labels: (H, W) uint8, 0 for tissue and `1 + LESIONS.index(kind)` inside a lesion.
        modality: For example "CT".
        anatomy: For example "Abdomen".
        lesion: The kind that the data set's row asks for; always present unless the scene is hard.
        instances: (H, W) uint8, 0 for tissue and the number of the lesion, from 1, inside one.
        choice: Which of several lesions of this kind is asked for, such as "leftmost"; "" for all of them.

    Example:
        >>> scene = make_scene(0, size=32)
        >>> scene.image.shape, scene.modality, scene.lesion
        ((32, 32, 3), 'Dermoscopy', 'ring abscess')
    """

    image: np.ndarray
    labels: np.ndarray
    modality: str
    anatomy: str
    lesion: str
    instances: np.ndarray
    choice: str = ""

    def mask(self, lesion: str | None = None) -> np.ndarray:
        """Return the (H, W) bool mask of what is asked for, or of all lesions of one kind; empty if there are none.

        Raises:
            UnknownNameError: A kind that is not in `LESIONS`.

        Example:
            >>> scene = make_scene(0, size=32)
            >>> np.unique(scene.labels[scene.mask()]).tolist(), 1 + LESIONS.index(scene.lesion)
            ([3], 3)
        """
        kind = self.lesion if lesion is None else lesion
        if kind not in LESIONS:
            raise unknown_name("synthetic lesion", kind, LESIONS)
        every = self.labels == 1 + LESIONS.index(kind)
        if lesion is not None or not self.choice:
            return every
        least = _CHOICES[self.choice]
        numbers = np.unique(self.instances[every])
        return self.instances == min(numbers, key=lambda number: least(*np.nonzero(self.instances == number)))

    def picture(self) -> Picture:
        """Return the image with every lesion, its kind and its own mask, to pretrain a tiny model on.

        Example:
            >>> [finding.kind for finding in make_scene(0, size=32).picture().findings]
            ['ring abscess', 'ring abscess', 'bright nodule', 'bright nodule']
        """
        masks = [self.instances == number for number in np.unique(self.instances) if number]
        findings = [Finding(LESIONS[int(self.labels[mask][0]) - 1], mask) for mask in masks]
        return Picture(PILImage.fromarray(self.image), findings, frozenset(LESIONS))


def make_scene(index: int, *, size: int = 112, seed: int = 0, hard: bool = False) -> Scene:
    """Render one scene; the same (index, size, seed) gives the same pixels on every machine.

    The modality cycles with the index, so that any four neighbouring scenes have all modalities.

    Args:
        index: Number of the scene, from 0.
        size: Height and width in pixels, at least 32; lesion radii scale with it (6 to 14 px at 112, 12 to 21 in hard
            scenes).
        seed: Another family of scenes; two seeds share no scene.
        hard: Contrast differs from lesion to lesion, some scenes lack the kind that is asked for, and some questions
            choose one lesion of several.

    Returns:
        A scene with 1 to 3 lesions of `scene.lesion` and up to 3 of other kinds, none of them overlapping; a hard one
        has 1 to 3 in all.

    Raises:
        DataError: If `size` is too small or `index` or `seed` is negative.

    Example:
        >>> [(scene.modality, scene.lesion) for scene in (make_scene(n, size=32) for n in range(2))]
        [('Dermoscopy', 'ring abscess'), ('Ultrasound', 'ring abscess')]
    """
    if size < _MIN_SIZE:
        raise DataError(
            f"size={size}: expected at least {_MIN_SIZE} px, or lesions shrink to nothing; pass a larger size"
        )
    if index < 0 or seed < 0:
        raise DataError(f"index={index}, seed={seed}: expected both to be 0 or more")
    rng = np.random.default_rng((seed, index))
    modality, anatomy, reach, paint = _LOOKS[index % len(_LOOKS)]
    grey = paint(rng, size)  # (H, W) float32 in about [0, 1]
    asked = int(rng.integers(len(LESIONS)))
    others = [kind for kind in range(len(LESIONS)) if kind != asked]
    choice = ""
    if hard:
        kinds = rng.integers(len(LESIONS), size=int(rng.integers(1, 4))).tolist()
        draw, word = rng.random(), list(_CHOICES)[int(rng.integers(len(_CHOICES)))]
        absent, chosen = draw < _ABSENT, draw > 1 - _CHOSEN
        kinds = [kind if kind != asked else others[0] for kind in kinds] if absent else [asked, *kinds[1:]]
        if chosen:
            kinds, choice = [asked, asked, *kinds[2:]], word
    else:
        kinds = [asked] * int(rng.integers(1, 4)) + [
            others[int(i)] for i in rng.integers(0, 2, size=int(rng.integers(0, 4)))
        ]
    labels, instances = np.zeros((size, size), np.uint8), np.zeros((size, size), np.uint8)
    radii = _HARD_RADIUS_PX if hard else _RADIUS_PX
    for number, ((x, y, radius), kind) in enumerate(_lesion_circles(rng, kinds, reach, size, radii), 1):
        strength = float(rng.uniform(*_HARD_CONTRAST)) if hard else _CONTRAST
        _draw_lesion(rng, grey, labels, x, y, radius, kind, strength)
        instances[(labels > 0) & (instances == 0)] = number
    if choice and np.unique(instances[labels == 1 + asked]).size < 2:
        choice = ""  # the second one found no place
    image = _finish(rng, grey, modality)
    return Scene(image, labels, modality, anatomy, LESIONS[asked], instances, choice)


def make_synthetic(n: int, *, size: int = 112, seed: int = 0, hard: bool = False) -> Dataset:
    """Build a data set of synthetic lesions in memory.

    Use different seeds for training and test: row `i` depends on (seed, i) only, so a longer set extends a shorter one.

    Args:
        n: Number of rows; 0 gives an empty data set with the same columns.
        size: Height and width of every image in pixels.
        seed: Family of scenes.
        hard: See `make_scene`.

    Returns:
        A data set with the columns image, mask (8-bit, 0 or 255), query, modality, anatomy, lesion and name.

    Raises:
        DataError: If `n` or `seed` is negative or `size` is too small.

    Example:
        >>> row = make_synthetic(1, size=64)[0]
        >>> row["image"].size, row["query"]
        ((64, 64), 'Segment every ring abscess in this dermoscopy image of the skin.')
    """
    if n < 0:
        raise DataError(f"n={n}: expected the number of rows, 0 or more")
    columns: dict[str, list] = {column: [] for column in _FEATURES}
    for index in range(n):
        scene = make_scene(index, size=size, seed=seed, hard=hard)
        name = f"synthetic_{seed}_{index:05d}"
        asked = f"{scene.choice} {scene.lesion}".strip()
        query = build_query(asked, scene.anatomy, scene.modality, name)
        query = query.replace(" every ", " the ") if scene.choice else query
        values = (
            _png(scene.image, f"{name}.png"),
            _png(scene.mask().astype(np.uint8) * 255, f"{name}_mask.png"),
            *(query, scene.modality, scene.anatomy, scene.lesion, name),
        )
        for column, value in zip(_FEATURES, values, strict=True):
            columns[column].append(value)
    return Dataset.from_dict(columns, features=Features(_FEATURES))


def write_folder(dataset: Dataset, path: str | Path, *, split: str | Sequence[str] | None = None) -> Path:
    """Write a data set as `images/`, `masks/` and `manifest.csv`, the layout that `load_folder` reads.

    Args:
        dataset: A data set with at least one row and the columns image, mask and name; text columns are written to the
            manifest.
        path: Folder to create; an existing manifest is not overwritten.
        split: Value of a `split` column, one for all rows or one per row; None writes no such column.

    Returns:
        The folder.

    Raises:
        DataError: If a column or all rows are missing, two rows share a name, `split` has the wrong length, or a
            manifest exists.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as path:
        ...     folder = write_folder(make_synthetic(1, size=32), path)
        ...     sorted(file.relative_to(path).as_posix() for file in folder.rglob("*.*"))
        ['images/synthetic_0_00000.png', 'manifest.csv', 'masks/synthetic_0_00000.png']
    """
    folder = Path(path)
    manifest = folder / "manifest.csv"
    missing = [column for column in ("image", "mask", "name") if column not in dataset.column_names]
    if missing:
        raise DataError(f"dataset has no column {missing}: expected image, mask and name, found {dataset.column_names}")
    names = [str(name) for name in dataset["name"]]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DataError(
            f"column 'name' repeats {twice[:3]}: expected one name per row, because it becomes the file name"
        )
    splits = [split] * len(names) if isinstance(split, str) else split
    if splits is not None and len(splits) != len(names):
        raise DataError(f"split has {len(splits)} values for {len(names)} rows: pass one string or one value per row")
    if manifest.exists():
        raise DataError(f"{manifest} exists already: write into another folder or delete it first")
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    texts = [c for c, feature in dataset.features.items() if isinstance(feature, Value) and c != "split"]
    rows = []
    for index, row in enumerate(dataset):
        assert isinstance(row, dict)
        files = {kind: f"{kind}s/{names[index]}.png" for kind in ("image", "mask")}
        for kind, relative in files.items():
            row[kind].save(folder / relative)
        rows.append({**files, **({} if splits is None else {"split": splits[index]}), **{c: row[c] for c in texts}})
    write_manifest(folder, rows)
    return folder


_FEATURES = {"image": Image(), "mask": Image()} | {column: Value("string") for column in METADATA_COLUMNS}


def _png(array: np.ndarray, name: str) -> dict[str, object]:
    buffer = io.BytesIO()
    PILImage.fromarray(array).save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": name}


# ---- lesions -------------------------------------------------------------------------------------------------------


def _lesion_circles(
    rng: np.random.Generator,
    kinds: list[int],
    reach: tuple[float, float],
    size: int,
    radii: tuple[float, float],
):
    """Yield ((x, y, radius), kind) of lesions inside the tissue ellipse; one that does not fit is left out."""
    scale = size / _REFERENCE_SIZE
    placed: list[tuple[float, float, float]] = []
    for kind in kinds:
        radius = scale * float(rng.uniform(*radii))
        for _ in range(_TRIES):
            angle, distance = 2 * np.pi * rng.random(), np.sqrt(rng.random())
            x = size / 2 + np.cos(angle) * distance * (reach[0] * size - radius)
            y = size / 2 + np.sin(angle) * distance * (reach[1] * size - radius)
            # The wobbling outline leaves its circle by at most 25 % of the radius.
            if all(np.hypot(x - u, y - v) > 1.25 * (radius + r) + scale * _GAP_PX for u, v, r in placed):
                placed.append((x, y, radius))
                yield placed[-1], kind
                break
            radius = max(scale * radii[0], 0.95 * radius)


def _draw_lesion(
    rng: np.random.Generator,
    grey: np.ndarray,
    labels: np.ndarray,
    x: float,
    y: float,
    radius: float,
    kind: int,
    contrast: float,
) -> None:
    """Add one lesion to `grey` and `labels` in place: an ellipse with a wobbling outline and a soft edge."""
    size = grey.shape[0]
    left, top = (max(0, int(c - 1.4 * radius) - 2) for c in (x, y))
    right, bottom = (min(size, int(c + 1.4 * radius) + 3) for c in (x, y))
    v, u = np.mgrid[top:bottom, left:right].astype(np.float32)
    u, v = u + np.float32(0.5 - x), v + np.float32(0.5 - y)
    tilt, squeeze = rng.uniform(0, np.pi), rng.uniform(0.72, 1.0)
    along, across = u * np.cos(tilt) + v * np.sin(tilt), v * np.cos(tilt) - u * np.sin(tilt)
    theta = np.arctan2(across, along)
    outline = np.ones_like(theta)
    for waves in (2, 3, 5):
        outline += rng.uniform(0.02, 0.16 / waves) * np.cos(waves * theta + rng.uniform(0, 2 * np.pi))
    depth = 1 - np.hypot(along, across / squeeze) / (radius * outline)  # 1 at the centre, 0 on the outline
    inside = 1 / (1 + np.exp(-np.clip(depth * radius / 0.7, -30, 30)))
    contrast = contrast * rng.uniform(0.85, 1.2)
    if kind == 0:
        tone = np.full_like(depth, contrast)
    elif kind == 1:
        tone = np.full_like(depth, -contrast)
    else:
        core = 1 / (1 + np.exp(-np.clip((depth - _RIM) * radius / 0.7, -30, 30)))
        tone = contrast * (1 - 1.9 * core)
    grey[top:bottom, left:right] += inside * tone
    labels[top:bottom, left:right][depth > 0] = 1 + kind


# ---- backgrounds, each (H, W) float32 with tissue between about 0.40 and 0.60 --------------------------------------


@functools.lru_cache(maxsize=4)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the x and y of pixel centres in [-1, 1], (H, W) each."""
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / size) * 2 - 1
    x, y = np.meshgrid(axis, axis)
    return x, y


def _smooth_noise(rng: np.random.Generator, size: int, cells: tuple[int, int]) -> np.ndarray:
    """Draw noise of unit variance or less whose detail is about `size / cells` pixels wide (rows, columns)."""
    coarse = PILImage.fromarray(rng.standard_normal(cells, dtype=np.float32))
    return np.asarray(coarse.resize((size, size), PILImage.Resampling.BICUBIC))


def _disc(size: int, x: float, y: float, a: float, b: float, softness: float = 0.03) -> np.ndarray:
    """Draw a soft ellipse with centre (x, y) and half axes (a, b), all in units of half the image."""
    u, v = _grid(size)
    distance = np.sqrt(((u - x) / a) ** 2 + ((v - y) / b) ** 2)
    return np.clip((1 - distance) * min(a, b) / softness + 0.5, 0, 1)


def _skin(rng: np.random.Generator, size: int) -> np.ndarray:
    u, v = _grid(size)
    grey = 0.56 + 0.025 * _smooth_noise(rng, size, (5, 5)) + 0.02 * _smooth_noise(rng, size, (28, 28))
    for _ in range(int(rng.integers(0, 4))):  # hairs: thin dark arcs
        angle, offset, bend = rng.uniform(0, np.pi), rng.uniform(-0.8, 0.8), rng.uniform(-0.3, 0.3)
        along, across = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
        grey -= 0.14 * np.clip(1.2 - np.abs(across - offset - bend * along**2) * size / 2, 0, 1)
    return grey - 0.22 * np.clip(u * u + v * v - 0.75, 0, None)  # dark corners of the dermoscope


def _breast(rng: np.random.Generator, size: int) -> np.ndarray:
    u, v = _grid(size)
    layers = 0.06 * np.sin(v * rng.uniform(5, 8) + 0.4 * _smooth_noise(rng, size, (3, 3)) + rng.uniform(0, 6))
    skin_line = 0.25 * np.exp(-(((v + 0.93 + 0.04 * u * u) / 0.05) ** 2))
    return 0.48 + layers + skin_line - 0.12 * np.clip(v - 0.55, 0, None) + 0.03 * _smooth_noise(rng, size, (6, 6))


def _head(rng: np.random.Generator, size: int) -> np.ndarray:
    a, b = rng.uniform(0.84, 0.90), rng.uniform(0.92, 0.96)
    skull, gap, brain = (
        _disc(size, 0, 0, a, b),
        _disc(size, 0, 0, a - 0.05, b - 0.05),
        _disc(size, 0, 0, a - 0.1, b - 0.1),
    )
    folds = 0.05 * np.tanh(1.6 * _smooth_noise(rng, size, (14, 14)))
    u, v = _grid(size)
    fissure = 0.12 * np.exp(-((u / 0.02) ** 2)) * (np.abs(v) > 0.35)
    ventricle = sum(_disc(size, side * 0.10, -0.02, 0.06, rng.uniform(0.16, 0.24)) for side in (-1, 1))
    return 0.03 + 0.72 * (skull - gap) + brain * (0.47 + folds - fissure) - 0.12 * ventricle


def _abdomen(rng: np.random.Generator, size: int) -> np.ndarray:
    a, b = rng.uniform(0.92, 0.97), rng.uniform(0.84, 0.92)
    grey = 0.02 + 0.30 * _disc(size, 0, 0, a, b) + 0.17 * _disc(size, 0, 0, a - 0.09, b - 0.09)
    side = rng.choice((-1.0, 1.0))
    grey += 0.08 * _disc(size, side * 0.38, -0.12, 0.40, 0.48)  # liver
    grey += 0.06 * _disc(size, -side * 0.50, 0.0, 0.22, 0.34)  # spleen
    grey += 0.35 * _disc(size, 0, b - 0.17, 0.10, 0.10)  # spine
    return grey + 0.02 * _smooth_noise(rng, size, (9, 9))


def _finish(rng: np.random.Generator, grey: np.ndarray, modality: str) -> np.ndarray:
    """Add the modality's noise and colour; return (H, W, 3) uint8."""
    noise = rng.standard_normal(grey.shape, dtype=np.float32)
    grey = np.clip(grey * (1 + 0.11 * noise) if modality == "Ultrasound" else grey + 0.025 * noise, 0, 1)
    tint = (1.0, 1.0, 1.0)
    if modality == "Dermoscopy":
        tint = (1.18, 0.86, 0.76)
    return (np.clip(grey[..., None] * np.asarray(tint, np.float32), 0, 1) * 255).astype(np.uint8)


_LOOKS: tuple[tuple[str, str, tuple[float, float], Callable[[np.random.Generator, int], np.ndarray]], ...] = (
    # modality, anatomy, half axes of the tissue that may hold lesions (fractions of the image), painter
    ("Dermoscopy", "Skin", (0.46, 0.46), _skin),
    ("Ultrasound", "Breast", (0.46, 0.42), _breast),
    ("MRI", "Head", (0.36, 0.40), _head),
    ("CT", "Abdomen", (0.40, 0.36), _abdomen),
)
