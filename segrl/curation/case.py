"""One case of a build: an image, the mask of one lesion in it, and what is known of both."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from segrl.caching.content import content_key
from segrl.errors import DataError, unknown_name
from segrl.files.whole import write_whole
from segrl.geometry.image_files import read_image
from segrl.geometry.mask_images import read_mask_file

__all__ = ["Case", "case_id", "read_cases", "write_cases"]

ID_DIGITS = 16  # hexadecimal; 64 bits tell a billion cases apart


@dataclass(frozen=True)
class Case:
    """An image and the mask of one lesion in it.

    Attributes:
        id: Of the content of image and mask, and of the lesion's name: the same in every build, see `case_id`.
        image: Its file, 8 bits a channel; read it with `segrl.geometry.read_image`.
        mask: Its file, on the image's grid; read it with `segrl.geometry.read_mask_file`.
        source: The data set that it comes from.
        patient: Of whom it is; "" if that is not known.
        modality: Imaging modality.
        anatomy: Body region.
        lesion: Name of the lesion or structure.
        licence: Of the source.
        difficulty: Vote of the committee, an error from 0 to 1; None before that stage.
        name: File name or row of the source, for messages.
        split: That the source gives it, "" for none.
        volume: Of a slice the scan that it was cut from, else "".
        slice: Of a slice its number in the scan from 0, along the first axis of the oriented scan; else None.

    Example:
        >>> case = Case("00ff", Path("a.png"), Path("a_mask.png"), "mine", "", "CT", "Lung", "nodule", "CC0-1.0")
        >>> case.difficulty is None
        True
    """

    id: str
    image: Path
    mask: Path
    source: str
    patient: str
    modality: str
    anatomy: str
    lesion: str
    licence: str
    difficulty: float | None = None
    name: str = ""
    split: str = ""
    volume: str = ""
    slice: int | None = None


def case_id(image: Path, mask: Path, lesion: str) -> str:
    """Compute the id of a case from the pixels of its files and the name of its lesion, capitals aside.

    Returns:
        16 hexadecimal digits.

    Raises:
        DataError: A file cannot be read.

    Example:
        >>> from PIL import Image
        >>> for name in ("a.png", "b.png"):
        ...     Image.new("L", (2, 2)).save(name)
        >>> case_id(Path("a.png"), Path("b.png"), "cyst") == case_id(Path("b.png"), Path("a.png"), "Cyst")
        True
    """
    pixels = content_key(read_image(image, f"image {image}").tobytes(), read_mask_file(mask, f"mask {mask}"))
    return content_key(pixels, lesion.casefold())[:ID_DIGITS]


def write_cases(path: str | os.PathLike[str], cases: Iterable[Case]) -> None:
    """Write cases as JSON lines, one a case. The file is replaced at once: a reader never sees half of it.

    Files inside the folder of `path` are written relative to it, others as absolute paths.

    Args:
        path: The file; its folder exists.
        cases: In the order to write.

    Example:
        >>> case = Case("00ff", Path("a.png"), Path("m.png"), "mine", "", "CT", "Lung", "nodule", "CC0-1.0", 0.5)
        >>> write_cases("cases.jsonl", [case])
        >>> read_cases("cases.jsonl")[0].difficulty
        0.5
    """
    home = Path(path).absolute().parent
    lines = []
    for case in cases:
        row = {item.name: getattr(case, item.name) for item in fields(Case)}
        lines.append(json.dumps({**row, "image": _stored(case.image, home), "mask": _stored(case.mask, home)}))
    write_whole(path, "".join(f"{line}\n" for line in lines))


def read_cases(path: str | os.PathLike[str]) -> list[Case]:
    """Read what `write_cases` wrote; paths are relative to the file's folder unless they are absolute.

    Raises:
        DataError: No such file, a line that is no case, or an id that occurs twice; names file and line.

    Example:
        >>> read_cases("no/cases.jsonl")
        Traceback (most recent call last):
        segrl.errors.DataError: no/cases.jsonl: cannot be read: No such file or directory
    """
    home = Path(path).absolute().parent
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    cases = [_case(line, f"{path}, line {number}", home) for number, line in enumerate(lines, 1)]
    known: set[str] = set()
    for number, case in enumerate(cases, 1):
        if case.id in known:
            raise DataError(f"{path}, line {number}: id {case.id!r} occurs twice; delete one of the lines")
        known.add(case.id)
    return cases


def _stored(path: Path, home: Path) -> str:
    whole = Path(os.path.abspath(path))
    return (whole.relative_to(home) if whole.is_relative_to(home) else whole).as_posix()


def _case(line: str, where: str, home: Path) -> Case:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: holds a {type(row).__name__}, expected an object")
    known = [item.name for item in fields(Case)]
    for key in row:
        if key not in known:
            raise DataError(f"{where}: {unknown_name('key', str(key), known)}")
    for name in known:
        value = row.get(name)
        if name == "difficulty":
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            fits, expected = value is None or number, "a number, or null"
        elif name == "slice":
            fits, expected = value is None or type(value) is int, "a whole number, or null"
        else:
            optional = name in ("name", "split", "volume")
            fits, expected = isinstance(value, str) or (optional and name not in row), "a text"
        if not fits:
            raise DataError(f"{where}: {name}={value!r:.80}; expected {expected}")
    return Case(**{**row, "image": home / row["image"], "mask": home / row["mask"]})
