"""Scoring stored completions: files of predictions and truths in, a table of scores with statistics out.

A file of predictions is JSON lines, as `SegGRPOTrainer` with `log_completions=True` writes them, a parquet file as TRL
does, or the folder of such files. Each row has a `completion` (text or messages) and any of these columns; all others
are ignored:

- the truth, see `segrl.predictions.records`, unless it comes from a file of its own, joined by `name`;
- `predicted_mask`, in the forms of a true mask or volume: None (null) where no mask was decoded; `probability`, a .npy
  path;
- `frame`: the frame of the boxes in the text and the slices of a volume that were shown, where they are known; instead
  of that of the reward's completion format;
- `group`: equal for the answers to one prompt; by default runs of rows with the same prompt, query, name and truth.
"""

# n rows

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from segrl.errors import DataError, RewardError, SegRLError
from segrl.predictions.prediction import Prediction
from segrl.predictions.records import (
    TRUTH_COLUMNS,
    read_answer,
    read_frame,
    read_mask,
    read_probability,
    read_target,
)
from segrl.predictions.target import METADATA_COLUMNS, VolumeTarget
from segrl.rewards.nodes import Leaf, Sum
from segrl.rewards.reward import Reward
from segrl.scoring.files import StoredRow, read_predictions, read_truths, truth_of

__all__ = ["Scores", "histogram", "score_file", "statistics"]

CHUNK, CHUNK_PIXELS = 256, 2**28  # rows, and pixels of their masks, in memory at once
SHOWN_CHARACTERS = 200  # of a completion, kept for display
FEW = 8  # different values that a histogram counts one by one
# What is read here, or is a keyword of TRL's call; every other column goes to TRL functions as it is.
OWN_COLUMNS = frozenset({*TRUTH_COLUMNS, *METADATA_COLUMNS, "completion", "predicted_mask", "probability", "frame",
                         "group", "prompts", "completions", "completion_ids", "prediction", "target",
                         "log_metric"})  # fmt: skip
OUTPUTS = (".jsonl", ".csv", ".parquet")
QUARTILES = {"q25": 0.25, "median": 0.5, "q75": 0.75}


@dataclass
class Scores:
    """The scores of a file of predictions.

    Attributes:
        reward: What scored them.
        rows: For each row where it stands, its `name`, the `status` of its text, and the start of the `text`.
        columns: The score of each row, None where the reward does not apply. Of a sum, those of its parts before their
            weights and then "total"; of another reward, one column under its name.
    """

    reward: Reward
    rows: list[dict[str, str]] = field(default_factory=list)
    columns: dict[str, list[float | None]] = field(default_factory=dict)

    @property
    def bounds(self) -> dict[str, tuple[float, float] | None]:
        """The declared range of each column."""
        if not isinstance(self.reward.source, Sum):
            return {self.reward.name: self.reward.range}
        return {**{part.name: part.range for part, _ in self.reward.source.parts}, "total": self.reward.range}

    @property
    def statuses(self) -> dict[str, int]:
        """How many texts have each status, the most frequent first."""
        return dict(Counter(row["status"] for row in self.rows).most_common())

    def records(self) -> list[dict[str, Any]]:
        """One mapping per row: `where`, `name`, `status` and the scores."""
        return [
            {**{key: row[key] for key in ("where", "name", "status")}, **dict(zip(self.columns, values, strict=True))}
            for row, values in zip(self.rows, zip(*self.columns.values(), strict=True), strict=True)
        ]

    def summary(self, rows: int = 0) -> dict[str, Any]:
        """Plain values: number of rows, statuses, statistics and histograms by column, and the first `rows` rows."""
        bounds = self.bounds
        columns = [(name, scores, bounds[name]) for name, scores in self.columns.items()]
        return {
            "reward": self.reward.name,
            "n": len(self.rows),
            "statuses": self.statuses,
            "columns": {
                name: {
                    "range": None if limits is None else [end if math.isfinite(end) else None for end in limits],
                    **statistics(scores),
                    "histogram": [{"label": label, "count": count} for label, count in histogram(scores, limits)],
                }
                for name, scores, limits in columns
            },
            "rows": self.records()[:rows],
        }

    def write(self, path: str | Path) -> None:
        """Write `records` as JSON lines, CSV or parquet, as the suffix says.

        Raises:
            DataError: For any other suffix.
        """
        path, records = Path(path), self.records()
        check_output(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
        elif path.suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
                writer = csv.DictWriter(file, fieldnames=list(records[0]))
                writer.writeheader()
                writer.writerows(records)
        else:
            lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records]
            path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def check_output(path: Path) -> None:
    """Refuse a file that `Scores.write` cannot write, before anything is scored.

    Raises:
        DataError: For another suffix than those in `OUTPUTS`.
    """
    if path.suffix not in OUTPUTS:
        raise DataError(f"{path}: cannot write {path.suffix or 'a file without suffix'}; expected {', '.join(OUTPUTS)}")


def score_file(
    reward: Reward, path: str | Path, *, truth: str | Path | None = None, on: str = "name", progress: float = 1.0
) -> Scores:
    """Score a file of predictions.

    Args:
        reward: The reward; its `completion_format` says how completions are read.
        path: JSON lines, parquet, or a folder of `predictions_*.jsonl` or `completions_*.parquet`.
        truth: Where the truth is: JSON lines, CSV, parquet, or a folder with a `manifest.csv`; by default in the
            predictions' own columns.
        on: The column by which predictions and truths are joined.
        progress: Training progress in [0, 1], for schedules.

    Raises:
        DataError: If a file or a row cannot be read, or truth or masks that the reward needs are missing; names the
            file, the row, the column, the value and the fix.
        RewardError: If the reward fails; names the row.
    """
    truths = None if truth is None else read_truths(Path(truth), on)
    chunk = _Chunk(reward, progress, truths, on)
    scores = Scores(reward)
    for row in read_predictions(Path(path)):
        if (len(chunk.rows) >= CHUNK or chunk.pixels >= CHUNK_PIXELS) and not reward.compares_answers:
            chunk.move_to(scores)
        chunk.add(row)
    chunk.move_to(scores)
    if not scores.rows:
        raise DataError(f"{path}: no rows; expected at least one completion")
    return scores


def statistics(scores: Sequence[float | None]) -> dict[str, float | int | None]:
    """Summary of one column: n rows, to how many the reward applied, and of those mean, standard deviation (of the rows
    themselves, not an estimate), minimum, quartiles and maximum; None where it applied to none.

    Example:
        >>> statistics([1.0, None, 0.0])["applied"], statistics([1.0, None, 0.0])["mean"]
        (2, 0.5)
    """
    present = np.array([score for score in scores if score is not None], dtype=np.float64)
    numbers = {"mean": np.mean, "std": np.std, "min": np.min, "q25": None, "median": None, "q75": None, "max": np.max}
    found: dict[str, float | int | None] = {"n": len(scores), "applied": present.size}
    for name, function in numbers.items():
        value = None
        if present.size:
            value = float(np.quantile(present, QUARTILES[name]) if function is None else function(present))
        found[name] = value
    return found


def histogram(
    scores: Sequence[float | None], bounds: tuple[float, float] | None = None, bins: int = 10
) -> list[tuple[str, int]]:
    """Labels and counts: of each value if there are few, else of equally wide bins, of which the last is closed.

    Args:
        scores: n scores; None is left out.
        bounds: What the bins cover; by default from the lowest to the highest score.
        bins: Number of bins.

    Example:
        >>> histogram([0.0, 1.0, 1.0, None])
        [('0', 1), ('1', 2)]
    """
    present = np.array([score for score in scores if score is not None], dtype=np.float64)
    values, counts = np.unique(present, return_counts=True)
    if len(values) <= FEW:
        return [(f"{value:.4g}", count) for value, count in zip(values.tolist(), counts.tolist(), strict=True)]
    ends = (float(values[0]), float(values[-1]))
    if bounds is not None and all(math.isfinite(end) for end in bounds):
        ends = min(ends[0], bounds[0]), max(ends[1], bounds[1])
    counts, edges = np.histogram(present, bins=bins, range=ends)
    labels = [f"{low:.3g} to {high:.3g}" for low, high in pairwise(edges.tolist())]
    return list(zip(labels, counts.tolist(), strict=True))


# --- rows to scores


class _Chunk:
    """Rows that are read, and scored together."""

    def __init__(self, reward: Reward, progress: float, truths: dict[str, StoredRow] | None, on: str) -> None:
        self.reward, self.progress, self.truths, self.on = reward, progress, truths, on
        info = reward.info
        self.reads_columns = columns = _reads_columns(reward)
        self.needs_truth, self.reads_truth = info.needs_truth, info.needs_truth or columns
        self.needs_mask, self.reads_mask = info.needs_mask, info.needs_mask or columns
        self.run = 0
        self.last_key: Hashable = None
        self._clear()

    def _clear(self) -> None:
        self.rows: list[StoredRow] = []
        self.predictions: list[Prediction] = []
        self.targets: list[Any] = []
        self.groups: list[Hashable] = []
        self.others: list[dict[str, Any]] = []
        self.known: dict[str, Any] = {}
        self.pixels = 0

    def add(self, row: StoredRow) -> None:
        """Read a row."""
        source = truth_of(row, self.truths, self.on) if self.truths is not None and self.reads_truth else row
        try:
            target = self._target(row, source) if self.reads_truth else None
            prediction = self._prediction(row, target)
            group = self._group(row, source)
        except SegRLError as error:
            raise DataError(f"{row.where}, {error}") from error
        self.rows.append(row)
        self.pixels += 0 if prediction.mask is None else prediction.mask.size
        self.predictions.append(prediction)
        self.targets.append(target)
        self.groups.append(group)
        self.others.append({**source.values, **row.values} if self.reads_columns else {})

    def move_to(self, scores: Scores) -> None:
        """Score the rows and forget them."""
        if not self.rows:
            return
        try:
            found = self.reward.components(
                self.predictions, self.targets, groups=self.groups, progress=self.progress, columns=self._columns()
            )
        except RewardError as error:
            raise _at_row(error, self.rows) from error
        total = found.pop("total")
        found["total" if isinstance(self.reward.source, Sum) else self.reward.name] = total
        for name, values in found.items():
            scores.columns.setdefault(name, []).extend(values)
        for row, prediction in zip(self.rows, self.predictions, strict=True):
            name, status = str(row.values.get("name") or ""), prediction.status.value
            text = prediction.text[:SHOWN_CHARACTERS]
            scores.rows.append({"where": row.where, "name": name, "status": status, "text": text})
        self._clear()

    def _columns(self) -> dict[str, list[Any]]:
        """The columns of the data set that TRL functions may read."""
        names = dict.fromkeys(name for values in self.others for name in values)
        columns = {name: [values.get(name) for values in self.others] for name in names if name not in OWN_COLUMNS}
        return {"prompts" if name == "prompt" else name: values for name, values in columns.items()}

    def _target(self, row: StoredRow, source: StoredRow) -> Any:
        texts = {key: row.values[key] for key in METADATA_COLUMNS if row.values.get(key) is not None}
        values = {**texts, **{key: source.values.get(key) for key in (*TRUTH_COLUMNS, *METADATA_COLUMNS)
                              if source.values.get(key) is not None}}  # fmt: skip
        key = repr((source.folder, sorted(values.items(), key=lambda item: item[0])))
        if key not in self.known:  # the answers to one prompt share a target
            self.known[key] = read_target(values, source.folder)
        if self.known[key] is None and self.needs_truth:
            truth = "'volume'" if self.reward.info.volume else "'mask', 'target_mask', or 'boxes' with 'size'"
            raise DataError(
                f"no truth, which reward {self.reward.name!r} needs: expected a column {truth} "
                f"(here: {', '.join(sorted(source.values))}), or a file of truths"
            )
        return self.known[key]

    def _prediction(self, row: StoredRow, target: Any) -> Prediction:
        values = row.values
        if "completion" not in values:
            raise DataError(f"no column 'completion' (here: {', '.join(sorted(values))})")
        if self.needs_mask and "predicted_mask" not in values:
            raise DataError(
                f"no column 'predicted_mask', which reward {self.reward.name!r} reads "
                f"(here: {', '.join(sorted(values))}); write null where no mask was decoded"
            )
        mask = probability = None
        if self.reads_mask and values.get("predicted_mask"):
            volume = self.reward.info.volume or isinstance(target, VolumeTarget)
            mask = read_mask(values["predicted_mask"], "column 'predicted_mask'", row.folder, volume=volume)
            if values.get("probability"):
                probability = read_probability(values["probability"], row.folder)
        frame = read_frame(values["frame"]) if values.get("frame") else None
        completion_format = self.reward.completion_format
        return read_answer(
            values["completion"], completion_format, target, frame=frame, mask=mask, probability=probability
        )

    def _group(self, row: StoredRow, source: StoredRow) -> Hashable:
        if row.values.get("group") is not None:
            return "group", str(row.values["group"])
        columns = ("prompt", "query", "name", *TRUTH_COLUMNS)
        key = repr([{**source.values, **row.values}.get(column) for column in columns])
        if self.reward.compares_answers and key == repr([None] * len(columns)):
            raise DataError(
                f"no prompt, which reward {self.reward.name!r} needs to compare the answers to each: expected a column "
                "'group', 'prompt', 'query' or 'name'"
            )
        self.run += key != self.last_key
        self.last_key = key
        return self.run


def _at_row(error: RewardError, rows: Sequence[StoredRow]) -> RewardError:
    """The error of a batch, with the row's place in the file instead of its number in the batch."""
    message = str(error)
    number = re.search(r", row ([0-9]+)", message)
    if number is not None:
        message = message[: number.start()] + message[number.end() :]
        return RewardError(f"{rows[int(number[1])].where}: {message}")
    if len(rows) == 1:
        return RewardError(f"{rows[0].where}: {message}")
    return RewardError(f"{rows[0].where} and on: {message}")


def _reads_columns(reward: Reward) -> bool:
    """Whether some part is a TRL function, of which nobody knows what it reads."""
    if isinstance(reward.source, Leaf):
        return reward.source.info.form == "trl"
    return any(_reads_columns(part) for part, _ in reward.source.parts)
