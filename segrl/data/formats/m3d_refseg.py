"""M3D-RefSeg: questions about structures of CT scans (Bai et al., "M3D", arXiv:2404.00578).

Layout as in M3D's preparation and in public copies of it, read on 2026-11-30; the download was not seen. Scans come
from TotalSegmentator, under its terms; nothing is fetched here.

    M3D_RefSeg.csv, M3D_RefSeg_test.csv     Image, Mask, Mask_ID, Question_Type, Question, Answer
    CASE/ct.nii.gz, CASE/mask.nii.gz
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from segrl.data.csv_files import read_csv
from segrl.data.formats.pairs import divided
from segrl.data.formats.rows import ScanRow
from segrl.data.formats.sources import listed, named_file
from segrl.errors import DataError

__all__ = ["read_m3d_refseg"]

_NEEDED = ("Image", "Mask", "Mask_ID", "Question")
_ALL, _TRAIN, _TEST = "M3D_RefSeg.csv", "M3D_RefSeg_train.csv", "M3D_RefSeg_test.csv"


def read_m3d_refseg(
    source: str | Path, *, texts: Mapping[str, str], test_fraction: float = 0.0, seed: int = 0
) -> Iterator[ScanRow]:
    """Read M3D-RefSeg, one row for each question.

    `M3D_RefSeg_test.csv` holds the questions of the split "test"; `M3D_RefSeg_train.csv`, or without it
    `M3D_RefSeg.csv`, those of "train", which leaves out the cases of the test set, with a warning that counts them.

    Args:
        source: The folder of the CSV files and the cases.
        texts: Columns that every row gets.
        test_fraction: Share of cases whose split is "test", drawn at random, without `M3D_RefSeg_test.csv`; all
            questions about one case stay together.
        seed: Of the draw.

    Raises:
        DataError: No CSV file, one without the columns, or rows whose files are not there or outside the folder or
            whose `Mask_ID` is no whole number above 0: all are listed.

    Example:
        >>> list(read_m3d_refseg("no/such/folder", texts={}))
        Traceback (most recent call last):
        segrl.errors.DataError: no/such/folder: no M3D_RefSeg.csv, M3D_RefSeg_train.csv or M3D_RefSeg_test.csv
    """
    home = Path(source)
    there = [name for name in (_TRAIN, _ALL, _TEST) if (home / name).is_file()]
    if not there:
        raise DataError(f"{home}: no {_ALL}, {_TRAIN} or {_TEST}")
    problems: list[str] = []
    rest = next((_rows(home / name, problems) for name in there if name != _TEST), [])
    test = _rows(home / _TEST, problems) if _TEST in there else []
    if problems:
        raise DataError(f"{home}: {len(problems)} problems, expected none:{listed(problems)}")
    cases = {row["Image"] for row in test}
    train = [row for row in rest if row["Image"] not in cases]
    if len(train) < len(rest):
        count = len(rest) - len(train)
        warnings.warn(f"{count} questions about cases of {_TEST} were left out of the split train", stacklevel=2)
    splits = divided(list(dict.fromkeys(row["Image"] for row in train)), 0.0 if test else test_fraction, seed)
    for row in (*train, *test):
        words = {"query": row["Question"], "modality": "CT", **texts}
        split = splits.get(row["Image"], "test")
        yield ScanRow(home / row["Image"], home / row["Mask"], str(int(row["Mask_ID"])), split, words)


def _rows(path: Path, problems: list[str]) -> list[dict[str, str]]:
    content, found = read_csv(path, _NEEDED, _NEEDED), []
    for number, cells in content.lines:
        where, problem = f"{path.name} line {number}", content.problem(cells)
        row = dict(zip(content.header, cells, strict=False))
        if problem is None and not (row["Mask_ID"].isascii() and row["Mask_ID"].isdigit() and int(row["Mask_ID"])):
            problem = f"Mask_ID {row['Mask_ID']!r}; expected a whole number above 0"
        if problem is None and not row["Question"]:
            problem = "no Question"
        if problem is None:
            try:
                for name in ("Image", "Mask"):
                    named_file(path.parent, row[name])
            except DataError as error:
                problem = str(error)
        if problem is None:
            found.append(row)
        else:
            problems.append(f"{where}: {problem}")
    return found
