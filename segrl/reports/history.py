"""The log of a trainer, as a table and as curves: `results.csv` and `curves.png` of a run."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segrl.files.whole import write_whole

__all__ = ["CURVES", "TABLE", "Curve", "curve_panels", "draw_curves", "rows_by_step", "write_curves", "write_table"]

TABLE, CURVES = "results.csv", "curves.png"
Curve = tuple[list[float], list[float]]  # steps and values

# panels in order: title, and what decides whether an entry of the log belongs to it
_ENDS_IN_MEAN = "/mean"
_PANELS: Mapping[str, Sequence[str]] = {
    "reward": ("reward", "eval_reward"),
    "components of the reward": ("rewards/", "eval_rewards/"),
    "Dice": ("eval_dice", "rollout/dice", "mask/dice"),
    "valid and failed answers": ("rollout/valid", "rollout/fail", "eval_valid", "eval_fail"),
    "loss": ("loss", "eval_loss", "policy_weighted", "text_weighted"),
    "dense terms": ("dense/",),
    "groups without spread": ("frac_reward_zero_std",),
    "KL and entropy": ("kl", "entropy"),
    "length of answers, tokens": ("completions/mean_length", "completions/max_length"),
    "answers cut off": ("completions/clipped_ratio",),
    "gradient norm": ("grad_norm",),
    "learning rate": ("learning_rate",),
}
_SINGLE = {"policy_weighted", "text_weighted"}  # of interest beside dense terms only


def _is_time(key: str) -> bool:
    return "time" in key or "per_second" in key


def rows_by_step(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row a step, with what was logged there in training and in validation; times are left out.

    Example:
        >>> rows_by_step([{"step": 5, "loss": 1.0}, {"step": 5, "eval_dice": 0.5, "eval_runtime": 3.0}])
        [{'step': 5, 'loss': 1.0, 'eval_dice': 0.5}]
    """
    rows: dict[int, dict[str, Any]] = {}
    for entry in history:
        if "step" not in entry or "train_runtime" in entry:  # the last entry of a training sums it up
            continue
        row = rows.setdefault(int(entry["step"]), {"step": int(entry["step"])})
        row |= {key: value for key, value in entry.items() if key != "step" and not _is_time(key)}
    return [rows[step] for step in sorted(rows)]


def write_table(history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Write what a trainer has logged as CSV, one row a step. The file is replaced at once.

    Args:
        history: `trainer.state.log_history`.
        path: Of the file.

    Returns:
        The path. Nothing in the file depends on the time that steps took.

    Example:
        >>> write_table([{"loss": 0.5, "epoch": 0.1, "step": 5}], "results.csv").read_text().split()
        ['step,epoch,loss', '5,0.1,0.5']
    """
    rows = rows_by_step(history)
    keys = sorted({key for row in rows for key in row})  # as a checkpoint keeps them, whatever was logged first
    columns = list(dict.fromkeys(["step", "epoch", *keys]))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return write_whole(path, buffer.getvalue())


def curve_panels(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Curve]]:
    """Return the curves of a training, by panel and name.

    Args:
        history: `trainer.state.log_history`.

    Returns:
        For each panel that has something to show, the steps and values of each curve; of the components of a reward
        their means.

    Example:
        >>> log = [{"step": 1, "rewards/box_f1/mean": 0.5, "rewards/box_f1/std": 0.1, "kl": None}]
        >>> curve_panels(log)
        {'components of the reward': {'box_f1': ([1], [0.5])}}
    """
    rows = rows_by_step(history)
    keys = sorted({key for row in rows for key in row})
    panels: dict[str, dict[str, Curve]] = {}
    dense = any(key.startswith("dense/") for key in keys)
    for title, wanted in _PANELS.items():
        for key in keys:
            if not any(key == name or (name.endswith("/") and key.startswith(name)) for name in wanted):
                continue
            if key.endswith("/std") or (key in _SINGLE and not dense):
                continue
            points = [(row["step"], float(row[key])) for row in rows if _finite(row.get(key))]
            if points:
                steps, values = (list(part) for part in zip(*points, strict=True))
                panels.setdefault(title, {})[_name(key)] = (steps, values)
    return panels


def draw_curves(
    panels: Mapping[str, Mapping[str, Curve]], path: str | os.PathLike[str], title: str = ""
) -> Path | None:
    """Draw the panels of a training into one picture. The file is replaced at once.

    Args:
        panels: From `curve_panels`.
        path: Of the PNG file.
        title: Above the panels.

    Returns:
        The path; None without panels, and then nothing is written.

    Example:
        >>> draw_curves({"loss": {"loss": ([1, 2], [1.0, 0.5])}}, "curves.png").name
        'curves.png'
    """
    from matplotlib.figure import Figure  # slow to import, and no window is opened without pyplot

    if not panels:
        return None
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(4.2 * across, 2.6 * down + 0.3), layout="constrained")
    for axes, (name, curves) in zip(figure.subplots(down, across, squeeze=False).flat, panels.items(), strict=False):
        for label, (steps, values) in curves.items():
            marker = "." if len(steps) < 30 else None
            axes.plot(steps, values, label=label, linewidth=1.2, marker=marker, markersize=3)
        axes.set_title(name, fontsize="medium")
        axes.tick_params(labelsize="small")
        axes.grid(alpha=0.3)
        if len(curves) > 1 or next(iter(curves)) != name:
            axes.legend(fontsize="x-small", frameon=False)
    for axes in list(figure.axes)[len(panels) :]:
        axes.set_axis_off()
    if title:
        figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return write_whole(path, buffer.getvalue())


def write_curves(history: Sequence[Mapping[str, Any]], folder: str | os.PathLike[str]) -> None:
    """Write `results.csv` and `curves.png` into the folder of a stage.

    Example:
        >>> write_curves([{"loss": 0.5, "step": 5}], "run")
        >>> sorted(path.name for path in Path("run").iterdir())
        ['curves.png', 'results.csv']
    """
    write_table(history, Path(folder) / TABLE)
    draw_curves(curve_panels(history), Path(folder) / CURVES)


def _name(key: str) -> str:
    for start, new in (("eval_rewards/", "validation "), ("rewards/", ""), ("dense/", ""), ("completions/", "")):
        if key.startswith(start):
            return (new + key.removeprefix(start)).removesuffix(_ENDS_IN_MEAN)
    return f"validation {key.removeprefix('eval_')}" if key.startswith("eval_") else key


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _cell(value: Any) -> Any:
    return "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else value
