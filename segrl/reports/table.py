"""The results table of a run.

Scores are fractions in [0, 1] everywhere in the data; only the printed table multiplies by 100. Distances are in
millimetres.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from segrl.errors import DataError
from segrl.metrics.summary import GROUPINGS
from segrl.reports.terminal import printable

__all__ = ["Column", "results_table"]

# "oracle": the segmenter prompted with the ground truth; "model": one that is only evaluated
STAGES = ("baseline", "oracle", "stage1", "stage2", "control", "model")
VOLUME_STAGES = STAGES[1:]
PLAIN_WIDTH = 100  # smallest width in columns if the output is not a terminal
WIDEST = 1000  # columns, wide enough for every table
_PLAIN = (1, sys.float_info.max, "a finite number of at least 0")


@dataclass(frozen=True)
class Column:
    """A column of the results table.

    Attributes:
        title: Heading of the column, with the unit.
        percent: Whether the scores are fractions in [0, 1], printed times 100; otherwise they are printed unchanged and
            are at least 0, such as a distance in millimetres.
        optional: Whether a stage may lack the score, as a baseline without boxes does; a dash is printed.

    Example:
        >>> Column("mDice %")
        Column(title='mDice %', percent=True, optional=False)
    """

    title: str
    percent: bool = True
    optional: bool = False


COLUMNS = {"mdice": Column("mDice %"), "miou": Column("mIoU %"), "fail": Column("Failure Rate %")}
IMAGE_COLUMNS = {**COLUMNS, "box_f1": Column("box F1 %", optional=True)}
VOLUME_COLUMNS = {
    "mdice": Column("Dice %"),
    "miou": Column("IoU %"),
    "hd95_mm": Column("HD95 mm", percent=False),
    "nsd": Column("NSD %"),
    "slice_visibility": Column("visibility %", optional=True),
    "slice_boxes": Column("boxes %", optional=True),
    "fail": Column("Failure Rate %"),
}


def results_table(
    results: Mapping[str, Any],
    console: Console | None = None,
    *,
    columns: Mapping[str, Column] = COLUMNS,
    stages: Sequence[str] = STAGES,
    groupings: Sequence[str] = GROUPINGS,
) -> None:
    """Print the stages of a run with 95 % intervals, over all samples and then by groups, such as modality and anatomy.

    Of one sample there is no interval.

    If a mean does not apply to every sample (see `optional` of `segrl.metrics.summarise`), the number of its samples is
    printed beside it, and a dash if there are none.

    Args:
        results: Summaries of `segrl.metrics.summarise` under the names in `stages`. Any stage may be absent, and so may
            "ci95" and "groups"; other keys are ignored.
        console: Console to print on; standard output by default.
        columns: Column of each printed key of a summary. For volumes pass `VOLUME_COLUMNS`, or some of it.
        stages: Keys of `results`, in the order in which they are printed; for volumes `VOLUME_STAGES`.
        groupings: Keys of the summaries' "groups", in the order in which they are printed; for volumes
            `segrl.evaluation.VOLUME_GROUPINGS`.

    Raises:
        DataError: No stage at all, or a score that is missing, not a fraction or, in a column that is not in percent,
            below 0; the stage and score are named.

    Example:
        >>> results = {"stage1": {"mdice": 0.5, "ci95": {"mdice": [0.25, 0.75]}, "n": 4}}
        >>> results_table(results, Console(width=60), columns={"mdice": Column("mDice %")})
        Mean and 95 % interval
        ┏━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━┳━━━┓
        ┃        ┃            mDice % ┃ n ┃
        ┡━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━╇━━━┩
        │ stage1 │ 50.00 [25.0, 75.0] │ 4 │
        └────────┴────────────────────┴───┘
    """
    present = [stage for stage in stages if stage in results]
    if not present:
        raise DataError(f"results: expected at least one of {', '.join(stages)}, got the keys {sorted(results)}")
    table = Table(title="Mean and 95 % interval", title_justify="left")
    table.add_column("")
    for title in (*(column.title for column in columns.values()), "n"):
        table.add_column(title, justify="right")
    for stage in present:
        table.add_row(Text(printable(stage)), *_cells(results[stage], stage, columns))
    for grouping in groupings:
        groups = {stage: results[stage].get("groups", {}).get(grouping, {}) for stage in present}
        for name in sorted({name for members in groups.values() for name in members}):
            table.add_section()
            table.add_row(Text(f"{grouping}: {printable(name)}", style="bold"))
            for stage in present:
                if name in groups[stage]:
                    cells = _cells(groups[stage][name], f"{stage}, {grouping} {name!r}", columns)
                    table.add_row(Text(f"  {printable(stage)}"), *cells)
    if console is None:
        console = Console()
        if not console.is_terminal:  # no cell of the table is broken
            wide = Console(width=WIDEST)
            console = Console(width=max(PLAIN_WIDTH, Measurement.get(wide, wide.options, table).maximum))
    console.print(table)


def _cells(summary: Mapping[str, Any], where: str, columns: Mapping[str, Column]) -> list[Text]:
    """Format the scores and the sample count of one row."""
    n, scored = summary.get("n", ""), summary.get("n_scored", {})
    cells = []
    for key, column in columns.items():
        if scored.get(key) == 0 or (column.optional and key not in summary):
            cells.append("-")
            continue
        factor, largest, expected = (100, 1.0, "a fraction in [0, 1], not a percentage") if column.percent else _PLAIN
        shown = [summary.get(key), *(summary.get("ci95", {}).get(key) or ())]
        for value in shown:
            if not isinstance(value, int | float | np.floating) or not 0.0 <= value <= largest:
                raise DataError(f"{where}: {key} is {value}; expected {expected}")
        mean, *interval = (factor * float(value) for value in shown)
        count = scored.get(key, n)
        # of one sample nobody knows how much others would differ
        text = f"{mean:.2f}" + (" [{:.1f}, {:.1f}]".format(*interval) if interval and count != 1 else "")
        cells.append(text if count == n else f"{text} (n {count})")
    return [Text(cell) for cell in (*cells, str(n))]
