"""Charts of findings, drawn by matplotlib into a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from segrl.errors import DataError

__all__ = ["bar_chart", "calibration_chart"]


def bar_chart(
    systems: Mapping[str, Mapping[str, Mapping[str, Any]]],
    path: str | os.PathLike[str],
    *,
    ylabel: str = "",
    title: str = "",
    factor: float = 100.0,
) -> Path:
    """Draw the scores of several systems by group, side by side, with their intervals.

    Args:
        systems: For each system and group "mean" and "ci95"; a group that a system lacks has no bar.
        path: Of the picture; its suffix sets the format, missing folders are created.
        ylabel: What is measured.
        title: Above the chart.
        factor: Of the scores, such as 100 for percent.

    Returns:
        The path.

    Raises:
        DataError: No system has a group.

    Example:
        >>> bar_chart({"full": {"CT": {"mean": 0.5, "ci95": [0.4, 0.6]}}}, "bars.png").name
        'bars.png'
    """
    from matplotlib.figure import Figure  # slow to import, and no window is opened without pyplot

    groups = list(dict.fromkeys(group for scores in systems.values() for group in scores))
    if not groups:
        raise DataError("systems: expected at least one with at least one group")
    figure = Figure(figsize=(max(6.0, 1.2 + 0.9 * len(groups) + 0.12 * len(groups) * len(systems)), 4.2))
    axes = figure.subplots()
    width = 0.8 / len(systems)
    for number, (name, scores) in enumerate(systems.items()):
        places = [n for n, group in enumerate(groups) if group in scores]
        means = np.array([scores[groups[n]]["mean"] for n in places])
        ends = np.array([scores[groups[n]]["ci95"] for n in places]).reshape(-1, 2)
        errors = np.abs(ends.T - means) * factor
        across = np.array(places) + (number - (len(systems) - 1) / 2) * width
        axes.bar(
            across, means * factor, width, yerr=errors.tolist(), label=name, capsize=2, error_kw={"linewidth": 0.8}
        )
    axes.set_xticks(range(len(groups)), groups, rotation=20, ha="right")
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    found = Path(path)
    found.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(found, dpi=120, bbox_inches="tight")
    return found


def calibration_chart(found: Mapping[str, Any], path: str | os.PathLike[str], *, score: str = "score") -> Path:
    """Draw a reliability diagram and a risk-coverage curve side by side.

    Args:
        found: From `segrl.metrics.calibration`.
        path: Of the picture; its suffix sets the format, missing folders are created.
        score: What is measured.

    Returns:
        The path.

    Example:
        >>> from segrl.metrics import calibration
        >>> calibration_chart(calibration([0.9, 0.4, 0.2], [1.0, 0.5, 0.0]), "calibration.png", score="Dice").name
        'calibration.png'
    """
    from matplotlib.figure import Figure  # slow to import, and no window is opened without pyplot

    figure = Figure(figsize=(9.0, 3.8))
    left, right = figure.subplots(1, 2)
    sure = [item["confidence"] for item in found["bins"]]
    left.plot([0, 1], [0, 1], linestyle=":", color="0.6", label="as sure as good")
    left.plot(sure, [item["score"] for item in found["bins"]], marker="o", label=f"answers, ECE {found['ece']:.3f}")
    for item in found["bins"]:
        left.annotate(str(item["n"]), (item["confidence"], item["score"]), fontsize="x-small", xytext=(4, -9),
                      textcoords="offset points")  # fmt: skip
    left.set(xlabel="confidence", ylabel=f"mean {score}", xlim=(0, 1), ylim=(0, 1), title="reliability")
    right.plot(found["coverage"], found["risk"], label=f"surest first, mean {found['aurc']:.3f}")
    right.axhline(found["risk"][-1], linestyle=":", color="0.6", label="all answers")
    right.set(xlabel="share of answers kept", ylabel=f"1 - mean {score}", xlim=(0, 1), ylim=(0, None))
    right.set_title("risk and coverage")
    for axes in (left, right):
        axes.legend(fontsize="small", frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    found_path = Path(path)
    found_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(found_path, dpi=110, bbox_inches="tight")
    return found_path
