"""BiomedParseData: masks whose file names say what they show (Zhao et al., "BiomedParse", arXiv:2405.12971).

Layout as in public loaders, found in 2026-11 (`SET/{train,train_mask,test,test_mask}`); the download was not seen. Its
sets have licences of their own; nothing is fetched here.

    SET/train/NAME_MODALITY_SITE.png      SET/train_mask/NAME_MODALITY_SITE_TARGET+WITH+PLUS.png
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from segrl.data.formats.rows import FormatRow, ScanRow, empty_folder, plain_name
from segrl.data.formats.sources import listed
from segrl.data.formats.writing import ImageFiles, rows_of_images
from segrl.errors import DataError
from segrl.geometry.mask_images import read_mask_file, write_mask_image

__all__ = ["read_biomedparse", "write_biomedparse"]


def read_biomedparse(source: str | Path, *, texts: Mapping[str, str]) -> Iterator[FormatRow]:
    """Read one set of BiomedParseData, or the folder that holds several; one row for each mask.

    Args:
        source: A folder with `train` and `train_mask`, or `test` and `test_mask`, or of such folders.
        texts: Columns that every row gets, in place of what the file names say.

    Raises:
        DataError: No such folders, masks whose name says no target or whose image is not there: all are listed.

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
        raise DataError(
            f"{home}: {len(problems)} of {len(problems) + len(found)} masks cannot be read:{listed(problems)}"
        )
    for image, path, split, row in found:
        yield FormatRow(image, read_mask_file(path, f"mask {path}"), image.name, split, row)


def write_biomedparse(rows: Iterable[FormatRow | ScanRow], folder: str | Path) -> dict[str, int]:
    """Write BiomedParse's layout, file names that say what masks show; `read_biomedparse` gives them back.

    Args:
        rows: Images of the splits train, val and test with modality, anatomy and lesion. The set is their source.
            Queries are not written.
        folder: A new folder.

    Returns:
        Number of rows of each split.

    Raises:
        DataError: The folder is not empty, a scan, a row without one of the three texts or with a character in it that
            file names cannot give back, two rows about one image and lesion, or pixels that do not count.
        UnknownNameError: Another split.

    Example:
        >>> import numpy as np
        >>> from PIL import Image
        >>> texts = {"modality": "CT", "anatomy": "liver", "lesion": "large cyst", "source": "mine"}
        >>> row = FormatRow(Image.new("RGB", (2, 2)), np.eye(2, dtype=bool), "a", "train", texts)
        >>> write_biomedparse([row], "as_biomedparse")
        export ...
        {'train': 1}
        >>> [path.name for path in Path("as_biomedparse/mine/train_mask").iterdir()]
        ['a_CT_liver_large+cyst.png']
    """
    with empty_folder(folder) as home:
        files, counts, seen = ImageFiles(home), Counter(), set()
        for row in rows_of_images(rows, "biomedparse", splits=("train", "val", "test")):
            modality, site, target = (_part(row, name) for name in ("modality", "anatomy", "lesion"))
            of_set = plain_name(row.texts.get("source") or "data")
            image, _ = files.add(row, f"{of_set}/{row.split}", f"{{}}_{modality}_{site}", png=True)
            mask = home / of_set / f"{row.split}_mask" / f"{image.stem}_{target}.png"
            if str(mask).casefold() in seen:
                raise DataError(f"{row.name}: two rows ask for {row.texts['lesion']!r}; join their masks")
            seen.add(str(mask).casefold())
            mask.parent.mkdir(exist_ok=True)
            write_mask_image(mask, row.mask)
            counts[row.split] += 1
    return dict(sorted(counts.items()))


def _part(row: FormatRow, name: str) -> str:
    """A text as a part of a file name."""
    text = row.texts.get(name) or ""
    allowed = " " if name == "lesion" else ""  # written as "+"
    if not text or any(not (letter.isalnum() or letter in f"-.,(){allowed}") for letter in text):
        raise DataError(
            f"{row.name}: {name} {text!r}; biomedparse writes it into file names, and needs letters, digits and -.,() "
            "there" + (", or blanks" if allowed else "; pass --modality or --anatomy with another word")
        )
    return text.replace(" ", "+")
