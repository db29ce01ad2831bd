"""The card of a published data set, as Hugging Face shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import yaml

from segrl.curation.case import Case

__all__ = ["dataset_card"]

_COLUMNS = {
    "image, mask": "the picture, and the mask of the lesion on its pixels (0 and 1, or 0 and 255)",
    "boxes": "[x1, y1, x2, y2], half-open, original pixels, one for each component of the mask",
    "query, reasoning, answer": "texts; reasoning is empty where none was written",
    "modality, anatomy, lesion": "what is shown",
    "source, patient, licence": "where it is from; patient is empty where it is not known",
    "difficulty": "error of the committee of U-Nets, 1 - Dice, out of fold",
    "scores": "of the judge, JSON; {} where nobody judged",
    "name": "id, of the content of image and mask and of the lesion's name",
    "volume, slice": "of a slice the scan and the number of the slice in it, from 0",
}


def dataset_card(
    cases: Sequence[Case],
    splits: Mapping[str, int],
    statistics: Mapping[str, Mapping[str, int]],
    title: str,
    figure: str,
    *,
    with_texts: bool,
) -> str:
    """Build the card: front matter, licences of the sources, columns, counts.

    Args:
        cases: Published ones.
        splits: Number of rows of each split.
        statistics: As `case_statistics` counts them.
        title: Heading.
        figure: File of the charts, beside the card.
        with_texts: Whether texts were written; otherwise the questions are from templates.

    Example:
        >>> dataset_card([], {"train": 0}, {}, "Mine", "a.png", with_texts=False).splitlines()[1]
        'license: other'
    """
    front = {
        "license": "other",
        "license_name": "of-each-source",
        "task_categories": ["image-segmentation", "visual-question-answering"],
        "tags": ["medical", "reasoning-segmentation"],
        "pretty_name": title,
    }
    counted = Counter((case.source, case.licence, case.modality) for case in cases)
    sources = [(*key, count) for key, count in sorted(counted.items())]
    texts = "" if with_texts else " Questions are from templates; there is no reasoning."
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {_plain(title)}\n",
        f"Hard cases of {len({case.source for case in cases})} data sets, chosen by the errors of a committee of "
        f"U-Nets, with questions about their lesions.{texts} Built with segrl, after the construction of ComLesion-14K "
        "(CORE-Seg). For research; not a medical device.\n",
        "## Licences\n\nEach row has the licence of its source, also in the column `licence`. Whoever publishes this "
        "data set has to keep to all of them.\n",
        _table(("source", "licence", "modality", "rows"), sources),
        "## Splits\n\nPatients, where they are known, and images that look nearly the same are in one split.\n",
        _table(("split", "rows"), list(splits.items())),
        "## Columns\n",
        _table(("columns", "content"), list(_COLUMNS.items())),
        f"## Statistics\n\n![counts]({figure})\n",
        *(_table((name, "rows"), list(counts.items())) for name, counts in statistics.items()),
    ]
    return "\n".join(parts)


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(_plain(str(cell)) for cell in line)} |\n" for line in lines)


def _plain(text: str) -> str:
    """A text of a data set in Markdown: on one line, and no cell, link or element of its own."""
    line = " ".join(text.split())
    for letter in "\\|<[`":
        line = line.replace(letter, f"\\{letter}")
    return line
