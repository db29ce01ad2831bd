"""Content of a built data set: counts and figures, as in CORE-Seg's Fig. 2."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from segrl.curation.case import Case
from segrl.geometry.mask_images import read_mask_file
from segrl.geometry.masks import boxes_from_mask

__all__ = ["case_statistics", "statistics_figure"]

SIZES = ((0.01, "under 1 %"), (0.05, "1 to 5 %"), (0.2, "5 to 20 %"), (2.0, "20 % and more"))
COUNTS = ((2, "1"), (4, "2 to 3"), (11, "4 to 10"), (float("inf"), "more than 10"))
_SHOWN = 20  # bars of one chart


def case_statistics(cases: Sequence[Case]) -> dict[str, dict[str, int]]:
    """Count cases by what they are.

    Returns:
        For modality, anatomy, disease (the lesion's name), source, lesion size (the mask's share of the image) and
        lesion count (8-connected components) the number of cases; the most frequent first, sizes and counts in
        their order.

    Example:
        >>> case_statistics([])["modality"]
        {}
    """
    found: dict[str, dict[str, int]] = {
        title: dict(Counter(getattr(case, name) or "not known" for case in cases).most_common())
        for title, name in (
            ("modality", "modality"),
            ("anatomy", "anatomy"),
            ("disease", "lesion"),
            ("source", "source"),
        )
    }
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for case in cases:
        mask = read_mask_file(case.mask, str(case.mask))
        sizes[_bin(float(mask.mean()), SIZES)] += 1
        counts[_bin(len(boxes_from_mask(mask)), COUNTS)] += 1
    found["lesion size"] = {name: sizes[name] for _, name in SIZES if sizes[name]}
    found["lesion count"] = {name: counts[name] for _, name in COUNTS if counts[name]}
    return found


def statistics_figure(statistics: Mapping[str, Mapping[str, int]]) -> Any:
    """Draw counts as bars, a chart for each, into a matplotlib figure.

    Example:
        >>> len(statistics_figure({"modality": {"CT": 3, "MRI": 1}}).axes)
        1
    """
    from matplotlib.figure import Figure  # slow to import, and no window is opened without pyplot

    shown = [(title, dict(list(counts.items())[:_SHOWN])) for title, counts in statistics.items() if counts]
    rows = [shown[n : n + 2] for n in range(0, len(shown), 2)]
    heights = [0.9 + 0.26 * max(len(counts) for _, counts in row) for row in rows]
    figure = Figure(figsize=(11, max(2.0, sum(heights))), layout="constrained")
    grid = figure.add_gridspec(len(rows) or 1, 2, height_ratios=heights or [1])
    for down, row in enumerate(rows):
        for across, (title, counts) in enumerate(row):
            axes = figure.add_subplot(grid[down, across])
            bars = axes.barh(range(len(counts)), list(counts.values()), height=0.7)
            axes.bar_label(bars, padding=2, fontsize="small")
            axes.set_yticks(range(len(counts)), list(counts), fontsize="small", parse_math=False)
            axes.invert_yaxis()
            axes.set_title(title, fontsize="medium")
            axes.spines[["top", "right"]].set_visible(False)
    return figure


def _bin(value: float, bins: Sequence[tuple[float, str]]) -> str:
    return next(name for end, name in bins if value < end)
