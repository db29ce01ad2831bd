"""Columns of texts in data sets of others: classes by their names, and nothing else in place of a text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from segrl.errors import DataError
from segrl.predictions.target import METADATA_COLUMNS

if TYPE_CHECKING:  # imported when a data set is read, so that settings and manifests are not slow to load
    from datasets import Dataset

__all__ = ["check_lesions", "check_texts", "lesion_name", "name_classes"]

_TEXTS = (*METADATA_COLUMNS, "reasoning")


def name_classes(dataset: Dataset) -> Dataset:
    """Return the data set with names in place of class numbers in its columns of texts.

    Args:
        dataset: Any data set. Of query, modality, anatomy, lesion, name and reasoning, those with the type
            `datasets.ClassLabel` are changed; a class that is missing (None, or -1) becomes "".

    Example:
        >>> from datasets import ClassLabel, Dataset, Features
        >>> features = Features({"lesion": ClassLabel(names=["cyst", "mass"])})
        >>> name_classes(Dataset.from_dict({"lesion": [1, None, 0]}, features=features))["lesion"][:]
        ['mass', '', 'cyst']
    """
    from datasets import ClassLabel

    for column in _TEXTS:
        kind = dataset.features.get(column)
        if isinstance(kind, ClassLabel):
            names = ["" if n is None or n < 0 else str(kind.int2str(n)) for n in dataset[column]]
            order, numbers = dataset.column_names, f"{column} as numbers"
            named = dataset.rename_column(column, numbers).add_column(column, names)  # type: ignore[call-arg]
            dataset = named.select_columns(order)
    return dataset


def check_texts(dataset: Dataset) -> None:
    """Refuse columns of texts that hold something else: numbers or lists would be written into questions and answers.

    Args:
        dataset: Any data set. Columns that are missing are no problem, nor are names that are numbers.

    Raises:
        DataError: A column of another type; names it and the fix.

    Example:
        >>> from datasets import Dataset
        >>> check_texts(Dataset.from_dict({"query": [["Where?", "Find it."]]}))
        Traceback (most recent call last):
        segrl.errors.DataError: column 'query' has the type List(Value('string')), expected one text a row; ...
    """
    from datasets import ClassLabel, Value

    for column in _TEXTS:
        kind = dataset.features.get(column)
        if kind is None or isinstance(kind, ClassLabel):
            continue
        plain = isinstance(kind, Value)
        if plain and (column == "name" or kind.dtype in ("string", "large_string", "string_view", "null")):
            continue
        fix = (
            f"write names for the numbers, as dataset.map(lambda row: {{{column!r}: NAMES[row[{column!r}]]}})"
            if plain
            else f"keep one of them, as dataset.map(lambda row: {{{column!r}: row[{column!r}][0]}}), or make a row of "
            "each"
        )
        raise DataError(f"column {column!r} has the type {kind}, expected one text a row; {fix}")


def check_lesions(dataset: Dataset) -> None:
    """Check that the written answer of every row has a name for what it found, see `lesion_name`.

    Args:
        dataset: With the columns lesion, query and name.

    Raises:
        DataError: For rows without: their number, and the first one.
    """
    problems = []
    for row in dataset.select_columns(["lesion", "query", "name"]):
        try:
            lesion_name(dict(row))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(f"{len(problems)} of {len(dataset)} rows name no lesion; {problems[0]}")


def lesion_name(row: Mapping[str, Any]) -> str:
    """Return the name that the written answer gives to what it found: that of the row, else "lesion" if so asked.

    Args:
        row: With the columns lesion, query and name.

    Raises:
        DataError: The row names no lesion and its question asks for something else: the answer would contradict it.

    Example:
        >>> lesion_name({"name": "a", "lesion": "", "query": "Segment every lesion."})
        'lesion'
    """
    lesion = str(row["lesion"] or "").strip()
    if lesion:
        return lesion
    if re.search(r"\blesions?\b", row["query"], re.IGNORECASE):
        return "lesion"
    raise DataError(
        f"{row['name']}: the column lesion is empty, and the query {row['query']!r:.100} does not ask for a lesion; "
        "expected the name of what it asks for, since the written answer gives it; fill the column lesion (if the "
        "queries are such names: dataset.map(lambda row: {'lesion': row['query']}))"
    )
