"""The folder of COCO's images, where loaders of data sets about them keep it: beside the files of annotations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from segrl.errors import DataError

__all__ = ["find_coco_images"]

_PLACES = ("images/mscoco/images", "refer_seg/images/mscoco/images", "coco", "COCO", "images", ".")


def find_coco_images(home: Path, parts: Sequence[str]) -> Path:
    """Return the folder that holds COCO's own folders, such as train2014, for annotations in another folder.

    The place of `refer.py` of lichengunc/refer (2fe1dfe), of LISA and of MMR is `images/mscoco/images` beside the
    folder of the annotations. `coco/`, `images/` and the folder itself are looked at too, each in the folder of the
    annotations and in the two above it; links are followed.

    Args:
        home: The folder of the annotations.
        parts: COCO's folders, of which one has to be there.

    Raises:
        DataError: None of the places has any; names the places, and the fix.

    Example:
        >>> Path("refer_seg/images/mscoco/images/train2014").mkdir(parents=True)
        >>> find_coco_images(Path("refer_seg/refcoco"), ["train2014"]).parts[-4:]
        ('refer_seg', 'images', 'mscoco', 'images')
    """
    start = Path(os.path.abspath(home))
    for base in (start, *start.parents[:2]):
        for place in _PLACES:
            if any((base / place / part).is_dir() for part in parts):
                return base / place
    usual = start.parent / _PLACES[0] / parts[0]
    raise DataError(
        f"{home}: no folder {' or '.join(parts)} with COCO's images in {', '.join(_PLACES[:-1])}, neither in it nor in "
        f"the two folders above; get it from cocodataset.org, and move or link it: ln -s /path/to/{parts[0]} {usual}"
    )
