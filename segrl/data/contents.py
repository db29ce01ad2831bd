"""What the splits of a data set hold, collected while their files are checked: no file is read for it again.

Found before training: contradicting rows, images that are their own mask, and, said per split, images that two splits
share, masks that are all empty or all full, and a split with one class beside a split with several.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from segrl.data.reasoning import is_built
from segrl.predictions.target import Metadata, answer_of

__all__ = ["SplitContents"]

_LISTED = 3  # images named in one warning
_CHANCE = 1e-3  # rows that are all of one lesion are warned of if drawing them at random is less likely


@dataclass
class _Split:
    images: dict[str, str] = field(default_factory=dict)  # key of the content, where it was seen first
    asked: dict[tuple[str, Any], tuple[str, str]] = field(default_factory=dict)  # image and question: mask, location
    lesions: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    empty: int = 0
    full: int = 0


class SplitContents:
    """Contents of the splits of one data set; pass the same object for each of its splits.

    Example:
        >>> contents = SplitContents()
        >>> row = {"query": "Segment the cyst.", "lesion": "cyst"}
        >>> contents.add("train", "line 2", row, image="a", mask="b", share=0.1)
        >>> contents.add("train", "line 3", row, image="a", mask="c", share=0.1)
        'asks the same of the same image as line 2, with another mask; ...'
    """

    def __init__(self) -> None:
        self._splits: dict[str, _Split] = {}
        self._said: set[str] = set()

    def add(
        self, split: str, location: str, row: Mapping[str, Any], *, image: str, mask: str, share: float
    ) -> str | None:
        """Add a row.

        Args:
            split: Its split; "" if there is only one.
            location: Where the row is, for messages.
            row: Its texts.
            image: Key of the image's content.
            mask: Key of the mask's content.
            share: Part of the image that is foreground, 0 to 1.

        Returns:
            The problem of a row that contradicts an earlier one, or None.
        """
        known = self._splits.setdefault(split, _Split())
        known.rows += 1
        known.empty += int(share == 0)  # of numpy, too: the overview is JSON
        known.full += share == 1
        known.images.setdefault(image, location)
        texts = Metadata.texts_of(row)
        if texts["lesion"]:
            known.lesions[texts["lesion"].casefold()] += 1
        other, where = known.asked.setdefault((image, _question(texts)), (mask, location))
        if other == mask:
            return None
        return (
            f"asks the same of the same image as {where}, with another mask; expected one mask for all that was asked "
            "for: of images name the masks in one row, as masks/a.png;masks/a_1.png in the column mask of "
            "manifest.csv; of volumes write the labels into one file"
        )

    def empty_rows(self, split: str) -> int:
        """Return how many rows of a split have an empty mask.

        Example:
            >>> contents = SplitContents()
            >>> contents.add("train", "line 2", {"lesion": "cyst"}, image="a", mask="b", share=0.0)
            >>> contents.empty_rows("train"), contents.empty_rows("test")
            (1, 0)
        """
        return self._splits[split].empty if split in self._splits else 0

    def warn(self, source: str) -> None:
        """Warn of what is odd about the splits so far; each warning is given once.

        Args:
            source: The data set, for messages.
        """
        for message in self._messages():
            if message not in self._said:
                self._said.add(message)
                warnings.warn(f"{source}: {message}", UserWarning, stacklevel=3)

    def _messages(self) -> Iterator[str]:
        for name, split in self._splits.items():
            label = f"split {name!r}" if name else "the data set"
            if split.rows > 1 and split.empty == split.rows:
                yield f"all {split.rows} masks of {label} are empty: nothing to find; are they the right files?"
            if split.rows > 1 and split.full == split.rows:
                yield f"all {split.rows} masks of {label} cover the whole image; are they the right files?"
        names = list(self._splits)
        for number, first in enumerate(names):
            for second in names[number + 1 :]:
                yield from self._between(first, second)

    def _between(self, first: str, second: str) -> Iterator[str]:
        one, two = self._splits[first], self._splits[second]
        shared = [f"{location} and {two.images[key]}" for key, location in one.images.items() if key in two.images]
        if shared:
            more = f", and {len(shared) - _LISTED} more" if len(shared) > _LISTED else ""
            yield (
                f"{len(shared)} images are in the splits {first!r} and {second!r} ({'; '.join(shared[:_LISTED])}"
                f"{more}): scores on images that were trained on say little"
            )
        for name, single, other, several in ((first, one, second, two), (second, two, first, one)):
            if len(single.lesions) != 1 or len(several.lesions) < 2:
                continue
            lesion = next(iter(single.lesions))
            share = several.lesions[lesion] / several.lesions.total()
            if share**single.rows < _CHANCE:
                yield (
                    f"split {name!r} has one lesion only ({lesion!r}), split {other!r} has {len(several.lesions)}; was "
                    "a sorted table cut in two?"
                )


def _question(texts: Mapping[str, str]) -> Any:
    """Return a key of what a row asks: its query, or what a query from templates was built from, or a mask of it."""
    query = " ".join(texts["query"].casefold().split())
    if answer_of(texts["name"]):
        return query, texts["name"]
    return tuple(texts[name].casefold() for name in ("lesion", "anatomy", "modality")) if is_built(texts) else query
