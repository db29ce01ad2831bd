"""Paired files: an image and its mask by their names, beside each other or in two folders."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from segrl.data.formats.rows import FormatRow, ScanRow, empty_folder
from segrl.data.formats.sources import listed
from segrl.data.formats.writing import ImageFiles, rows_of_images
from segrl.errors import DataError
from segrl.geometry.image_files import open_image
from segrl.geometry.mask_images import read_mask_file, write_mask_image

__all__ = ["divided", "read_pairs", "write_pairs"]

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
_ENDINGS = ("_mask", "_masks", "_seg", "_segmentation", "_label", "_gt", "-mask", "_lesion")
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def read_pairs(
    source: str | Path,
    *,
    texts: Mapping[str, str],
    test_fraction: float = 0.0,
    seed: int = 0,
    group: Callable[[str], str] | None = None,
) -> Iterator[FormatRow]:
    """Read a folder of paired files.

    `x.jpg` belongs to `x_mask.png` (or `_seg`, `_segmentation`, `_label`, `_gt`, ...) beside it; where two folders lie
    side by side whose names are those of images and masks, such as `images/` and `masks/`, to the file of the same
    stem, with or without such an ending. Folders `train`, `val` and `test` on the way are the splits.

    Args:
        source: The folder.
        texts: Columns that every row gets, such as {"lesion": "polyp", "modality": "Endoscopy"}.
        test_fraction: Share of images whose split is "test", drawn at random, where no folder is a split.
        seed: Of the draw.
        group: Name of the patient or sequence of an image, of its stem; they are drawn whole, and become the column
            patient. None draws every image by itself.

    Raises:
        DataError: No such folder, no pairs, files without a partner, all of them listed, masks of another
            size, or `test_fraction` out of range.

    Example:
        >>> list(read_pairs("no/such/folder", texts={}))
        Traceback (most recent call last):
        segrl.errors.DataError: no/such/folder: no such folder
    """
    home = Path(source)
    if not home.is_dir():
        raise DataError(f"{home}: no such folder")
    files = sorted(path for path in home.rglob("*") if path.suffix.lower() in _IMAGES and path.is_file())
    masks: dict[tuple[str, str], list[Path]] = {}
    images: dict[tuple[str, str], list[Path]] = {}
    for path in files:
        parts = path.relative_to(home).parts[:-1]
        stem, ended = _without_ending(path.stem)
        is_mask = ended or any(_is_masks(part) for part in parts)
        place = "/".join(part for part in parts if not _is_masks(part) and not _is_images(part))
        (masks if is_mask else images).setdefault((place, stem if is_mask else path.stem), []).append(path)
    alone = [paths[0] for key, paths in images.items() if key not in masks]
    alone += [paths[0] for key, paths in masks.items() if key not in images]
    if alone or not images:
        raise DataError(_unpaired(home, len(images), alone))
    several = [paths for paths in (*images.values(), *masks.values()) if len(paths) > 1]
    if several:
        raise DataError(
            f"{home}: {len(several)} names are those of several files; keep one of each:"
            + listed([", ".join(str(path.relative_to(home)) for path in paths) for paths in several])
        )
    groups = {key: key if group is None else group(key[1]) for key in images}
    splits = divided([groups[key] for key in images if _split(key[0]) is None], test_fraction, seed)
    for key, (image,) in images.items():
        mask = read_mask_file(masks[key][0], f"mask {masks[key][0]}")
        with open_image(image, f"image {image}") as opened:
            size = opened.size
        if size != mask.shape[::-1] and size != mask.shape:  # an EXIF rotation swaps the two
            raise DataError(
                f"{masks[key][0]}: the mask is {mask.shape[1]} x {mask.shape[0]} px, the image {size[0]} x {size[1]}"
            )
        words = texts if group is None else {"patient": groups[key], **texts}
        yield FormatRow(image, mask, "/".join(filter(None, key)), _split(key[0]) or splits[groups[key]], words)


def divided(keys: list, fraction: float, seed: int) -> dict:
    """Return "train" or "test" for each key, equal ones counting once: a share, drawn at random, is "test".

    Raises:
        DataError: The share is below 0, or not below 1.

    Example:
        >>> divided(["a", "b"], 0.5, seed=1)
        {'a': 'train', 'b': 'test'}
    """
    if not 0 <= fraction < 1:
        raise DataError(f"test_fraction={fraction}: expected a number from 0 to 1, such as 0.2")
    order = sorted(set(keys), key=str)
    random.Random(seed).shuffle(order)
    test = set(order[: round(fraction * len(order))])
    return {key: "test" if key in test else "train" for key in keys}


def _without_ending(stem: str) -> tuple[str, bool]:
    for ending in _ENDINGS:
        if stem.lower().endswith(ending) and len(stem) > len(ending):
            return stem[: -len(ending)], True
    return stem, False


def _is_masks(folder: str) -> bool:
    return folder.lower().strip("_- ") in ("mask", "masks", "label", "labels", "gt", "ground truth", "groundtruth",
                                           "annotations", "segmentation", "segmentations")  # fmt: skip


def _is_images(folder: str) -> bool:
    return folder.lower() in ("image", "images", "img", "imgs", "original", "data", "jpegimages")


def _split(place: str) -> str | None:
    return next((_SPLITS[part.lower()] for part in place.split("/") if part.lower() in _SPLITS), None)


def _unpaired(home: Path, count: int, alone: list[Path]) -> str:
    if not alone:
        return f"{home}: no files that end in {', '.join(_IMAGES)}"
    names = [str(path.relative_to(home)) for path in sorted(alone)]
    return (
        f"{home}: {len(alone)} files have no partner ({count} images); expected x.jpg with x_mask.png, or images/x.jpg "
        f"with masks/x.png:{listed(names)}"
    )


def write_pairs(rows: Iterable[FormatRow | ScanRow], folder: str | Path) -> dict[str, int]:
    """Write images with their masks beside them, `SPLIT/x.png` and `SPLIT/x_mask.png`; `read_pairs` gives them back.

    Args:
        rows: One for each image, of the splits train, val and test. Texts are not written, the layout has no place for
            them.
        folder: A new folder.

    Returns:
        Number of rows of each split.

    Raises:
        DataError: The folder is not empty, a scan, several rows about one image, or pixels that do not count.
        UnknownNameError: Another split.

    Example:
        >>> import numpy as np
        >>> from PIL import Image
        >>> row = FormatRow(Image.new("RGB", (2, 2)), np.eye(2, dtype=bool), "a", "train")
        >>> write_pairs([row], "pairs"), (Path("pairs") / "train" / "a_mask.png").is_file()
        export ...
        ({'train': 1}, True)
    """
    with empty_folder(folder) as home:
        files, counts = ImageFiles(home), Counter()
        for row in rows_of_images(rows, "pairs", splits=("train", "val", "test")):
            reserved = _without_ending(Path(row.name).stem)[1]  # would be read as a mask
            image, new = files.add(row, row.split, "{}_image" if reserved else "{}")
            if not new:
                raise DataError(f"{row.name}: has several rows, and pairs hold one mask for each image; export coco")
            write_mask_image(home / image.with_name(f"{image.stem}_mask.png"), row.mask)
            counts[row.split] += 1
    return dict(sorted(counts.items()))
