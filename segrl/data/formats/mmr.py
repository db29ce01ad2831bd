"""MMR: questions about objects and parts, with several masks to an answer (Jang et al., arXiv:2503.13881).

Layout as in the README and `utils/multi_part_reason_seg_dataset.py` of jdg900/MMR, 702a7b6, read on 2026-11-30; the
download was not seen. Images are those of COCO, under its terms; nothing is fetched here.

    MMR_{train,val,test_mixed,test_obj_only,test_part_only}.json
        [{"file_name", "height", "width", "questions": [...], "answers": [[{"segmentation", "bbox"}, ...], ...]}]

In MMR's own folders (README, 09933e8, and the file above) the images are in `refer_seg/images/mscoco/images/train2017`
and `val2017`, beside `MMR/`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from segrl.data.formats.coco import coco_mask
from segrl.data.formats.coco_images import find_coco_images
from segrl.data.formats.rows import FormatRow
from segrl.data.formats.sources import listed, named_file, read_json
from segrl.errors import DataError, unknown_name

__all__ = ["read_mmr", "read_mmr_folder"]

_KEYS = ("file_name", "height", "width", "questions", "answers")


def read_mmr(
    annotations: str | Path,
    images: str | Path,
    *,
    texts: Mapping[str, str],
    split: str | None = None,
    masks: str = "union",
) -> Iterator[FormatRow]:
    """Read one file of MMR, one row for each question: the union of the masks of its answer.

    MMR's own evaluation takes every mask of an answer by itself, in the order of its tokens. So do rows of
    `masks="each"`, to score answers of such systems: a row for each mask, whose name is STEM#QUESTION#MASK, with
    numbers from 0. Rows of one question say different things about it, so that nothing is trained on them.

    Args:
        annotations: The JSON file.
        images: The folder in which `file_name` is found.
        texts: Columns that every row gets.
        split: Split of all rows; None: what the file is called after "MMR_", such as "test_mixed".
        masks: "union" or "each".

    Raises:
        UnknownNameError: Other `masks`.
        DataError: No JSON, or of another layout; images that are not there or outside the folder, masks of another
            size, another number of answers than of questions: all are listed.

    Example:
        >>> list(read_mmr("no.json", "images", texts={}))
        Traceback (most recent call last):
        segrl.errors.DataError: no.json: cannot be read: No such file or directory
    """
    if masks not in ("union", "each"):
        raise unknown_name("masks", masks, ("union", "each"))
    path = Path(annotations)
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: expected a list of images, with {', '.join(_KEYS)}")
    problems = [problem for number, entry in enumerate(entries) for problem in _problems(number, entry, Path(images))]
    if problems:
        raise DataError(f"{path}: {len(problems)} problems, expected none:{listed(problems)}")
    named = split or path.stem.removeprefix("MMR_")
    for entry in entries:
        image = Path(images) / entry["file_name"]
        for number, (question, answer) in enumerate(zip(entry["questions"], entry["answers"], strict=True)):
            row = {**texts, "query": question}
            if masks == "union":
                yield FormatRow(image, _mask(entry, answer), entry["file_name"], named, row)
                continue
            for index, part in enumerate(answer):
                row["name"] = f"{image.stem}#{number}#{index}"
                yield FormatRow(image, _mask(entry, [part]), entry["file_name"], named, dict(row))


def read_mmr_folder(source: str | Path, *, texts: Mapping[str, str], masks: str = "union") -> Iterator[FormatRow]:
    """Read every file of MMR in a folder, as `read_mmr` reads one: the splits are those whose files are there.

    Args:
        source: The folder `MMR`, or the one that holds it. Images are found by `find_coco_images`.
        texts: Columns that every row gets.
        masks: See `read_mmr`.

    Raises:
        DataError: No such files, no folder of COCO's images; or as `read_mmr`.

    Example:
        >>> list(read_mmr_folder("no/such/folder", texts={}))
        Traceback (most recent call last):
        segrl.errors.DataError: no/such/folder: no MMR_train.json, MMR_val.json or MMR_test_*.json in it or in MMR
    """
    home = Path(source)
    files = sorted(home.glob("MMR_*.json")) or sorted((home / "MMR").glob("MMR_*.json"))
    if not files:
        raise DataError(f"{home}: no MMR_train.json, MMR_val.json or MMR_test_*.json in it or in MMR")
    images = find_coco_images(files[0].parent, ["train2017", "val2017"])
    for path in files:
        yield from read_mmr(path, images, texts=texts, masks=masks)


def _mask(entry: Mapping[str, Any], answer: list[Mapping[str, Any]]) -> np.ndarray:
    size = entry["height"], entry["width"]
    parts = [coco_mask(part["segmentation"], *size, entry["file_name"]) for part in answer]
    return np.any([np.zeros(size, dtype=bool), *parts], axis=0)


def _problems(number: int, entry: Any, images: Path) -> Iterator[str]:
    missing = [key for key in _KEYS if not isinstance(entry, dict) or key not in entry]
    if missing:
        yield f"image {number}: no {', '.join(missing)}"
        return
    try:
        named_file(images, entry["file_name"])
    except DataError as error:
        yield f"image {error}"
    if len(entry["questions"]) != len(entry["answers"]):
        yield f"image {entry['file_name']}: {len(entry['questions'])} questions, {len(entry['answers'])} answers"
    for answer in entry["answers"]:
        try:
            _mask(entry, answer)
        except DataError as error:
            yield str(error)
        except (KeyError, TypeError):
            yield f"image {entry['file_name']}: an answer is not a list of objects with a segmentation"
