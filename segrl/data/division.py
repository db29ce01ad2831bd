"""Another division of a data set into training and test rows than the one it comes with: folds, and a source left out.

What is shared must not be torn apart: rows of one patient, and rows of one image or scan, are in the same fold.
"""

# n rows; K folds

from __future__ import annotations

import hashlib
import re
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Image

from segrl.data.groups import balanced_folds, joined
from segrl.errors import DataError, SegRLError, unknown_name

__all__ = ["Division", "check_fraction", "hold_out"]

_STRATA = ("modality", "lesion")  # of which every fold gets its share
_LISTED = 3


@dataclass(frozen=True, kw_only=True)
class Division:
    """Plan by which all rows of a data set, of whichever split, are divided anew into "train" and "test".

    Attributes:
        folds: K, the number of folds, 2 or more; None makes none. Every modality and lesion is spread over the folds.
        fold: The fold that is the test split, 1 to K; the others are the training split.
        patients: Regular expression that is searched in the names of rows: rows in which it finds the same text are of
            one patient. None: the column patient, if there is one, else every image is a patient of its own.
        source: Text of the column source whose rows are the test split; all others are the training split.

    Raises:
        SegRLError: Folds and a source at once or neither, a number out of range, or an expression that is none.

    Example:
        >>> rows = Dataset.from_dict({"name": ["a_1", "b_1", "a_2", "c_1"], "scan": ["1", "2", "3", "4"]})
        >>> splits = Division(folds=3, fold=1, patients="^[a-z]").divide(rows)
        >>> splits["train"]["name"][:], splits["test"]["name"][:]
        (['b_1', 'c_1'], ['a_1', 'a_2'])
    """

    folds: int | None = None
    fold: int | None = None
    patients: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        if (self.folds is None) == (self.source is None):
            raise SegRLError("--folds and --hold_out_source: expected one of the two")
        if self.folds is None:
            extra = [name for name in ("fold", "patients") if getattr(self, name) is not None]
            if extra:
                raise SegRLError(f"--{extra[0]} {getattr(self, extra[0])} belongs to --folds; drop it")
            return
        if self.folds < 2:
            raise SegRLError(f"--folds {self.folds}: expected 2 or more")
        if self.fold is None or not 1 <= self.fold <= self.folds:
            raise SegRLError(f"--fold {self.fold}: expected 1 to {self.folds}, the fold to test on")
        try:
            re.compile(self.patients or "")
        except re.error as error:
            raise SegRLError(f"--patients '{self.patients}' is no regular expression: {error}") from error

    def divide(self, rows: Dataset) -> dict[str, Dataset]:
        """Return the splits "train" and "test", each with its rows in the order of `rows`.

        Args:
            rows: All rows of a data set, with the column image or scan.

        Raises:
            DataError: A row without a patient, fewer patients than folds, no column source, no other source.
            UnknownNameError: No such source.

        Warns:
            UserWarning: The source that is left out shares images with others.
        """
        test = self._of_source(rows) if self.folds is None else self._of_fold(rows)
        chosen = {"train": [n for n in range(len(rows)) if n not in test], "test": sorted(test)}
        return {split: rows.select(numbers) for split, numbers in chosen.items()}

    def _of_source(self, rows: Dataset) -> set[int]:
        if "source" not in rows.column_names:
            raise DataError(
                f"--hold_out_source {self.source!r}: the data has no column source, only {rows.column_names}; add one "
                "that says where each row is from"
            )
        sources = [str(value) for value in rows["source"]]
        if self.source not in sources:
            raise unknown_name("source", str(self.source), sorted(set(sources)))
        if len(set(sources)) == 1:
            raise DataError(
                f"--hold_out_source {self.source!r}: all {len(rows)} rows are of it, none is left to train on"
            )
        test = {n for n, source in enumerate(sources) if source == self.source}
        pictures = _contents(rows)
        shared = {pictures[n] for n in test} & {pictures[n] for n in range(len(rows)) if n not in test}
        if shared:
            seen = [n for n in sorted(test) if pictures[n] in shared]
            names = ", ".join(_names(rows)[n] for n in seen[:_LISTED])
            warnings.warn(
                f"{len(seen)} rows of the source {self.source!r} show images of other sources, which are trained on "
                f"({names}{', ...' if len(seen) > _LISTED else ''})",
                UserWarning,
                stacklevel=3,
            )
        return test

    def _of_fold(self, rows: Dataset) -> set[int]:
        assert self.folds is not None
        assert self.fold is not None
        names = _names(rows)
        patients = joined(_contents(rows), _patients(rows, names, self.patients))
        count = len(set(patients))
        if count < self.folds:
            raise DataError(f"--folds {self.folds}: expected at most as many as patients, which are {count}")
        strata = list(zip(*(rows[name][:] for name in _STRATA if name in rows.column_names), strict=True))
        strata = strata or [()] * len(rows)
        keys = [_digest(name.encode()) for name in names]
        return balanced_folds(patients, strata, keys, self.folds)[self.fold - 1]


def hold_out(rows: Dataset, fraction: float, patients: str | None = None) -> tuple[Dataset, Dataset]:
    """Divide training rows into those that are trained on and those that are held out, by patient and by image.

    Which are held out follows from their names alone, so a run that goes on, and every stage, has the same division.

    Args:
        rows: With the column image or scan.
        fraction: Share of the rows to hold out; a little more where a patient has several.
        patients: As in `Division`; None: the column patient, if there is one.

    Returns:
        Both parts, each in the order of `rows`.

    Raises:
        DataError: One of the two would be empty.

    Example:
        >>> rows = Dataset.from_dict({"name": list("abcdef"), "scan": list("123456"), "patient": ["x", "x", *"yyzz"]})
        >>> kept, held = hold_out(rows, 0.2)
        >>> len(kept), len(held), set(kept["patient"]) & set(held["patient"])
        (4, 2, set())
    """
    wanted = check_fraction(fraction, len(rows))
    names = _names(rows)
    members: dict[int, list[int]] = defaultdict(list)
    for number, patient in enumerate(joined(_contents(rows), _patients(rows, names, patients))):
        members[patient].append(number)
    held: set[int] = set()
    order = sorted(members.values(), key=lambda found: _digest(names[found[0]].encode()))
    for found in order:
        if len(held) + len(found) <= wanted:
            held.update(found)
    if not held:  # every patient has more rows than are wanted
        held.update(min(order, key=len))
    if len(held) == len(rows):
        raise DataError(
            f"--val_fraction {fraction}: all {len(rows)} training rows are of one patient, or show one image, none is "
            "left to train on; pass --val_split NAME, or drop the flag"
        )
    return rows.select([n for n in range(len(rows)) if n not in held]), rows.select(sorted(held))


def check_fraction(fraction: float, rows: int) -> int:
    """Return how many of `rows` rows a share of them is.

    Raises:
        DataError: None, or all.

    Example:
        >>> check_fraction(0.1, 500)
        50
    """
    wanted = round(fraction * rows)
    if not 0 < wanted < rows:
        which = "held out" if wanted <= 0 else "left to train on"
        raise DataError(f"--val_fraction {fraction} of {rows} training rows is {wanted}: none is {which}; pass a share "
                        f"from {1 / max(rows, 1):.2g} to {1 - 1 / max(rows, 1):.2g}")  # fmt: skip
    return wanted


def _patients(rows: Dataset, names: list[str], expression: str | None) -> list[str]:
    if expression is None:
        known = rows["patient"][:] if "patient" in rows.column_names else [None] * len(rows)
        return [f"patient {patient}" if patient else f"row {n}" for n, patient in enumerate(known)]
    found = [re.search(expression, name) for name in names]
    without = [name for name, match in zip(names, found, strict=True) if match is None]
    if without:
        raise DataError(
            f"--patients '{expression}' is not found in {len(without)} of {len(names)} names, such as "
            f"{', '.join(map(repr, without[:_LISTED]))}; expected in all: add an alternative, such as "
            f"'{expression}|.*'"
        )
    return [match[0] for match in found if match]


def _names(rows: Dataset) -> list[str]:
    return [str(name) for name in rows["name"]] if "name" in rows.column_names else list(map(str, range(len(rows))))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _contents(rows: Dataset) -> list[str]:
    """Return a key of the image or scan of every row: rows with one key show the same."""
    if "scan" in rows.column_names:
        return [str(scan) for scan in rows["scan"]]
    encoded = rows.select_columns("image").cast_column("image", Image(decode=False))
    return [_digest(dict(row)["image"]["bytes"] or Path(dict(row)["image"]["path"]).read_bytes()) for row in encoded]
