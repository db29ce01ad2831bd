"""SA-Med2D-20M: a file for each instance, named by image, class and number (Ye et al., arXiv:2311.11969).

Layout as in public loaders, read on 2026-11-30; the download was not seen. Its sets have licences of their own; nothing
is fetched here. Two faults of the data are those that constantinpape/torch-em found in it (its `sa_med2d.py` and the
history of that file): masks of one set are 0 at the optic disc and above elsewhere, and images of two are binary brain
masks.

    SAMed2Dv1/images/ct_00--SET--CASE--x_0040.png      SAMed2Dv1/masks/ct_00--SET--CASE--x_0040--CCCC_III.png
    SAMed2Dv1/SAMed2D_v1.json                          {"images/...": ["masks/...", ...]}
    SAMed2Dv1/SAMed2D_v1_class_mapping_id.json         {SET: {name of the class: "CCCC"}}
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from segrl.data.formats.modality import modality_name
from segrl.data.formats.pairs import divided
from segrl.data.formats.rows import FormatRow
from segrl.data.formats.sources import listed, named_file, read_object
from segrl.errors import DataError, unknown_name
from segrl.geometry.image_files import open_image
from segrl.geometry.mask_images import read_mask_file

__all__ = ["read_sa_med2d"]

_INDEX, _CLASSES = "SAMed2D_v1.json", "SAMed2D_v1_class_mapping_id.json"
_INVERTED = "ichallenge_adam_task2"  # set whose masks are 0 at the optic disc
_BRAIN_MASKS, _OF_BRAINS = "brain-growth", "Brain_PTM"  # cases whose images are masks; a set with such images
_INSTANCE = re.compile(r"--(\d+)_(\d+)\.png$")


def read_sa_med2d(
    source: str | Path,
    *,
    texts: Mapping[str, str],
    sets: Sequence[str] | None = None,
    test_fraction: float = 0.0,
    seed: int = 0,
) -> Iterator[FormatRow]:
    """Read SA-Med2D-20M, one row for each image and class: the union of the instances of that class.

    Instances whose mask has another size than the image, of which the data hold some, are left out, and so are images
    that are themselves the binary mask of a brain: cases named "brain-growth", and images of two values in Brain_PTM.
    Warnings count them. Masks of ichallenge_adam_task2, which hold 0 for the optic disc, are inverted.

    Args:
        source: The folder `SAMed2Dv1`, or the one that holds it.
        texts: Columns that every row gets, in place of what the file names say.
        sets: Names of the sets to read, such as "kvasir_seg"; None: all.
        test_fraction: Share of cases whose split is "test", drawn at random; slices of one case stay together.
        seed: Of the draw.

    Raises:
        DataError: One of the two JSON files cannot be read or has another layout; files that are not there or outside
            the folder, names that do not say set, case and class, classes without a name: all are listed.
        UnknownNameError: A set that the file does not name.

    Example:
        >>> list(read_sa_med2d("no/such/folder", texts={}))
        Traceback (most recent call last):
        segrl.errors.DataError: no/such/folder/SAMed2D_v1.json: cannot be read: No such file or directory
    """
    home = Path(source)
    if (home / "SAMed2Dv1" / _INDEX).is_file():
        home /= "SAMed2Dv1"
    index, classes = read_object(home / _INDEX), read_object(home / _CLASSES)
    names = {found: _parts(found) for found in index}
    known = sorted({parts[1] for parts in names.values() if parts is not None})
    for name in sets or ():
        if name not in known:
            raise unknown_name("set of SA-Med2D-20M", name, known)
    problems = [
        f"{found}: expected images/MODALITY--SET--CASE--SLICE.png" for found, parts in names.items() if not parts
    ]
    wanted = {found: parts for found, parts in names.items() if parts and (sets is None or parts[1] in sets)}
    by_class: dict[str, dict[str, list[str]]] = {}
    for found, (_, of_set, _) in wanted.items():
        problems += _absent(home, found)
        terms = classes.get(of_set)
        terms = {str(number): term for term, number in terms.items()} if isinstance(terms, dict) else {}
        for path in index[found] if isinstance(index[found], list) else ():
            match = _INSTANCE.search(str(path))
            if match is None:
                problems.append(f"{path}: expected a name that ends in --CLASS_INSTANCE.png")
            elif absent := _absent(home, path):
                problems += absent
            elif match[1] not in terms:
                problems.append(f"{path}: class {match[1]} of {of_set} has no name in {_CLASSES}")
            else:
                by_class.setdefault(found, {}).setdefault(terms[match[1]], []).append(path)
    if problems or not by_class:
        raise DataError(f"{home}: {len(problems)} problems in {len(wanted)} images:{listed(problems)}")
    splits = divided(list(dict.fromkeys(parts[1:] for parts in wanted.values())), test_fraction, seed)
    other_size, no_images = [], []
    for found, terms in by_class.items():
        modality, of_set, case = wanted[found]
        with open_image(home / found, f"image {home / found}") as opened:
            size = opened.height, opened.width
            if _BRAIN_MASKS in case or (of_set == _OF_BRAINS and len(np.unique(np.asarray(opened))) == 2):
                no_images.append(found)
                continue
        for term, paths in terms.items():
            masks = {path: _mask(home / path, inverted=of_set == _INVERTED) for path in paths}
            other_size += [path for path, mask in masks.items() if mask.shape != size]
            kept = [mask for mask in masks.values() if mask.shape == size]
            if kept:
                words = {"modality": modality, "source": of_set, "lesion": term.replace("_", " ")}
                name = Path(found).name
                yield FormatRow(home / found, np.any(kept, axis=0), name, splits[of_set, case], {**words, **texts})
    if no_images:
        warnings.warn(
            f"{len(no_images)} images are binary masks of brains and were left out, such as {no_images[0]}",
            stacklevel=2,
        )
    if other_size:
        warnings.warn(
            f"{len(other_size)} masks have another size than their image and were left out, such as {other_size[0]}",
            stacklevel=2,
        )


def _absent(home: Path, name: str) -> list[str]:
    try:
        named_file(home, name)
    except DataError as error:
        return [str(error)]
    return []


def _mask(path: Path, *, inverted: bool) -> np.ndarray:
    mask = read_mask_file(path, f"mask {path}")
    return ~mask if inverted else mask


def _parts(found: str) -> tuple[str, str, str] | None:
    """Modality, set and case."""
    parts = Path(found).name.split("--")
    if len(parts) < 4 or not all(parts):
        return None
    return modality_name(parts[0]), parts[1], parts[2]
