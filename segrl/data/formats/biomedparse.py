"""BiomedParseData: masks whose file names say what they show (Zhao et al., "BiomedParse", arXiv:2405.12971).

Layout as in public loaders, found in 2026-11 (`SET/{train,train_mask,test,test_mask}`); the download was not seen. Its
sets have licences of their own; nothing is fetched here.

    SET/train/NAME_MODALITY_SITE.png      SET/train_mask/NAME_MODALITY_SITE_TARGET+WITH+PLUS.png
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from segrl.data.formats.rows import FormatRow
from segrl.errors import DataError
from segrl.geometry.mask_images import read_mask_file

__all__ = ["read_biomedparse"]

_LISTED = 8


def read_biomedparse(source: str | Path, *, texts: Mapping[str, str]) -> Iterator[FormatRow]:
    """Read one set of BiomedParseData, or the folder that holds several; one row for each mask.

    Args:
        source: A folder with `train` and `train_mask`, or `test` and `test_mask`, or of such folders.
        texts: Columns that every row gets, in place of what the file names say.

    Raises:
        DataError: No such folders, masks whose name says no target or whose image is not there: all are counted.

    Example:
        >>> list(read_biomedparse("no/such/folder", texts={}))
        Traceback (most recent call last):
        segrl.errors.DataError: no/such/folder: no folders train and train_mask, or test and test_mask
    """
    home = Path(source)
    parts = [
        (folder, split)
        for split in ("train", "val", "test")
        for folder in (home, *sorted(path for path in home.glob("*") if path.is_dir()))
        if (folder / split).is_dir() and (folder / f"{split}_mask").is_dir()
    ]
    if not parts:
        raise DataError(f"{home}: no folders train and train_mask, or test and test_mask")
    found, problems = [], []
    for folder, split in parts:
        for path in sorted((folder / f"{split}_mask").glob("*.png")):
            image_name, _, target = path.stem.rpartition("_")
            names = image_name.split("_")
            image = folder / split / f"{image_name}.png"
            if len(names) < 3 or not target:
                problems.append(f"{path.name}: expected NAME_MODALITY_SITE_TARGET.png")
            elif not image.is_file():
                problems.append(f"{path.name}: no {split}/{image.name}")
            else:
                words = {"modality": names[-2], "anatomy": names[-1], "lesion": target.replace("+", " ")}
                found.append((image, path, split, {"source": folder.name, **words, **texts}))
    if problems or not found:
        listed = "; ".join(problems[:_LISTED]) or "there are none"
        raise DataError(f"{home}: {len(problems)} masks cannot be read: {listed}")
    for image, path, split, row in found:
        yield FormatRow(image, read_mask_file(path, f"mask {path}"), image.name, split, row)
