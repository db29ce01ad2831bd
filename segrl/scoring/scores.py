"""Score stored completions: from files of predictions and ground truths to a table of scores with statistics.

A file of predictions is JSON lines, as `SegGRPOTrainer` with `log_completions=True` writes them, a parquet file as TRL
writes it, or a folder of such files. Each row has a `completion` (text or messages) and any of these columns; all
others are ignored:

- the ground truth, see `segrl.predictions.records`, unless it comes from a file of its own, joined by `name`;
- `predicted_mask`, in the forms of a true mask or volume, None (null) if no mask was decoded; `probability`, a .npy
  path;
- `frame`: the frame of the boxes in the text and the slices of a volume that were shown, if known; replaces that of the
  reward's completion format;
- `group`: equal for the answers to one prompt; by default runs of rows with the same prompt, query, name and ground
  truth.
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
from segrl.predictions.prediction import Prediction, invalid_text
from segrl.predictions.records import (
    TARGET_COLUMNS,
    read_answer,
    read_frame,
    read_mask,
    read_probability,
    read_target,
)
from segrl.predictions.target import METADATA_COLUMNS, VolumeTarget
from segrl.rewards.nodes import Leaf, Sum
from segrl.rewards.reward import Reward
from segrl.scoring.files import StoredRow, read_predictions, read_targets, target_of

__all__ = ["Scores", "histogram", "score_file", "statistics"]

CHUNK, CHUNK_PIXELS = 256, 2**28  # rows, and pixels of their masks, in memory at once
SHOWN_CHARACTERS = 200  # of a completion, kept for display
FEW = 8  # distinct values that a histogram counts each
# Columns read here, and keywords of TRL's call; every other column is passed to TRL functions.
OWN_COLUMNS = frozenset({*TARGET_COLUMNS, *METADATA_COLUMNS, "completion", "predicted_mask", "probability", "frame",
                         "group", "prompts", "completions", "completion_ids", "prediction", "target",
                         "log_metric"})  # fmt: skip
OUTPUTS = (".jsonl", ".csv", ".parquet")
QUARTILES = {"q25": 0.25, "median": 0.5, "q75": 0.75}


@dataclass
class Scores:
    """The scores of a file of predictions.

    Attributes:
        reward: The reward.
        rows: For each row `where` it is in a file, its `name`, the `status` of its text, and the start of the `text`.
        columns: The score of each row, None if the reward does not apply. For a sum, those of its parts before their
            weights and then "total"; for another reward, one column under its name.

    Example:
        >>> from segrl.rewards import make_reward
        >>> scores = Scores(make_reward("format"), [{"where": "a.jsonl, line 1", "name": "a", "status": "valid"}])
        >>> scores.columns["format"] = [1.0]
        >>> scores.records()
        [{'where': 'a.jsonl, line 1', 'name': 'a', 'status': 'valid', 'format': 1.0}]
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
        """Number of texts with each status, the most frequent first."""
        return dict(Counter(row["status"] for row in self.rows).most_common())

    def records(self) -> list[dict[str, Any]]:
        """Return one mapping per row: `where`, `name`, `status` and the scores."""
        return [
            {**{key: row[key] for key in ("where", "name", "status")}, **dict(zip(self.columns, values, strict=True))}
            for row, values in zip(self.rows, zip(*self.columns.values(), strict=True), strict=True)
        ]

    def summary(self, rows: int = 0) -> dict[str, Any]:
        """Return plain values, for JSON.

        These are the number of rows, the statuses, the share of invalid answers with the reasons in words, statistics
        and histograms by column, and the first `rows` rows.
        """
        bounds = self.bounds
        columns = [(name, scores, bounds[name]) for name, scores in self.columns.items()]
        return {
            "reward": self.reward.name,
            "n": len(self.rows),
            "statuses": self.statuses,
            "invalid": invalid_text(self.statuses),
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
        """Write `records` to a .jsonl, .csv or .parquet file.

        Raises:
            DataError: The file has another suffix.
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
    """Raise `DataError` for a file that `Scores.write` cannot write, before anything is scored."""
    if path.suffix not in OUTPUTS:
        raise DataError(f"{path}: cannot write {path.suffix or 'a file without suffix'}; expected {', '.join(OUTPUTS)}")


def score_file(
    reward: Reward, path: str | Path, *, ground_truth: str | Path | None = None, on: str = "name", progress: float = 1.0
) -> Scores:
    """Score a file of predictions.

    Args:
        reward: The reward; completions are parsed by its `completion_format`.
        path: JSON lines, parquet, or a folder of `predictions_*.jsonl` or `completions_*.parquet`.
        ground_truth: Where the ground truth is: JSON lines, CSV, parquet, or a folder with a `manifest.csv`; by default
            in the predictions' own columns.
        on: The column that joins predictions and ground truths.
        progress: Training progress in [0, 1], for schedules.

    Raises:
        DataError: A file or a row cannot be read, or a ground truth or mask that the reward needs is missing; the
            message names the file, the row, the column, the value and the fix.
        RewardError: The reward fails; the message names the row.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from segrl.rewards import make_reward
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "answers.jsonl")
        ...     _ = file.write_text('{"completion": "no tags"}')
        ...     score_file(make_reward("format"), file).columns
        {'format': [0.0]}
    """
    ground_truths = None if ground_truth is None else read_targets(Path(ground_truth), on)
    chunk = _Chunk(reward, progress, ground_truths, on)
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
    """Summarise one column.

    Returns:
        `n` rows, the number `applied` to which the reward applied, and over those mean, standard deviation (of the rows
        themselves, not an estimate), minimum, quartiles and maximum, None if there are none.

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
    """Return labels and counts: of each value if there are few, else of equally wide bins, the last one closed.

    Args:
        scores: n scores; None is left out.
        bounds: (low, high) covered by the bins; by default the lowest and the highest score.
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


# --- from rows to scores


class _Chunk:
    """Rows that are read, and scored together."""

    def __init__(self, reward: Reward, progress: float, ground_truths: dict[str, StoredRow] | None, on: str) -> None:
        self.reward, self.progress, self.ground_truths, self.on = reward, progress, ground_truths, on
        info = reward.info
        self.reads_columns = columns = _reads_columns(reward)
        self.needs_target, self.reads_target = info.needs_target, info.needs_target or columns
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
        source = (
            target_of(row, self.ground_truths, self.on) if self.ground_truths is not None and self.reads_target else row
        )
        try:
            target = self._target(row, source) if self.reads_target else None
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
        """Score the rows, add the scores, and drop the rows."""
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
        """Return the columns of the data set that TRL functions may read."""
        names = dict.fromkeys(name for values in self.others for name in values)
        columns = {name: [values.get(name) for values in self.others] for name in names if name not in OWN_COLUMNS}
        return {"prompts" if name == "prompt" else name: values for name, values in columns.items()}

    def _target(self, row: StoredRow, source: StoredRow) -> Any:
        texts = {key: row.values[key] for key in METADATA_COLUMNS if row.values.get(key) is not None}
        values = {**texts, **{key: source.values.get(key) for key in (*TARGET_COLUMNS, *METADATA_COLUMNS)
                              if source.values.get(key) is not None}}  # fmt: skip
        key = repr((source.folder, sorted(values.items(), key=lambda item: item[0])))
        if key not in self.known:  # the answers to one prompt share a target
            self.known[key] = read_target(values, source.folder)
        if self.known[key] is None and self.needs_target:
            wanted = "'volume'" if self.reward.info.volume else "'mask', 'target_mask', or 'boxes' with 'size'"
            raise DataError(
                f"no ground truth, which reward {self.reward.name!r} needs: expected a column {wanted} "
                f"(here: {', '.join(sorted(source.values))}), or a file of ground truths"
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
        columns = ("prompt", "query", "name", *TARGET_COLUMNS)
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
    """Return the error of a batch with the row's location in the file instead of its index in the batch."""
    message = str(error)
    number = re.search(r", row ([0-9]+)", message)
    if number is not None:
        message = message[: number.start()] + message[number.end() :]
        return RewardError(f"{rows[int(number[1])].where}: {message}")
    if len(rows) == 1:
        return RewardError(f"{rows[0].where}: {message}")
    return RewardError(f"{rows[0].where} and on: {message}")


def _reads_columns(reward: Reward) -> bool:
    """Return whether some part is a TRL function, which may read any column."""
    if isinstance(reward.source, Leaf):
        return reward.source.info.form == "trl"
    return any(_reads_columns(part) for part, _ in reward.source.parts)
