"""Print the scores of stored completions: rows, statistics and histograms."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from segrl.reports.terminal import console, excerpt, limits, number, printable
from segrl.scoring.scores import Scores

__all__ = ["print_scores"]

BAR = 40  # characters of the longest bar
LONGEST = 8  # characters of a column's name on one line
NAME = 40  # characters shown of a name
FEWEST = 20  # characters of a completion that are worth showing
STATISTICS = ("n", "applied", "mean", "std", "min", "q25", "median", "q75", "max")


def print_scores(scores: Scores, rows: int = 10, out: Console | None = None) -> None:
    """Print the first rows, statistics per component, and a histogram per component.

    Args:
        scores: The result of `segrl.scoring.score_file`.
        rows: Number of rows; 0 prints no table of rows.
        out: The console; standard output by default.
    """
    out = out or console()
    summary = scores.summary(rows)
    statuses = ", ".join(f"{count} {status}" for status, count in summary["statuses"].items())
    out.print(Text(f"{printable(scores.reward.name)}: {summary['n']} completions ({statuses})"))
    out.print(Text(summary["invalid"]), soft_wrap=True)
    if rows:
        out.print(_rows(scores, summary["rows"], out.width))
    out.print(_statistics(summary))
    bar = "#" if out.options.ascii_only else "█"
    for name, column in summary["columns"].items():
        out.print(_histogram(name, column, bar))


def _rows(scores: Scores, records: list[dict], width: int) -> Table:
    one_file = len({row["where"].rpartition(", ")[0] for row in scores.rows}) == 1
    heads = ["where", "name", "status", *scores.columns]
    cells = []
    for record in records:
        where = record["where"].rpartition(", ")[2] if one_file else record["where"]
        texts = [excerpt(text, NAME) for text in (where, record["name"], record["status"])]
        cells.append([*texts, *(number(record[name]) for name in scores.columns)])
    table = Table(title=f"first {len(records)} of {len(scores.rows)} rows", title_justify="left")
    taken = 0
    for n, head in enumerate(heads):
        lines = _folded(printable(head))
        table.add_column(Text("\n".join(lines)), justify="left" if n < 3 else "right", no_wrap=True)
        taken += max(map(len, [*lines, *(row[n] for row in cells)])) + 3
    left = width - taken - 4
    if left >= FEWEST:
        table.add_column("completion", no_wrap=True)
    for row, stored in zip(cells, scores.rows, strict=False):
        shown = [*row, excerpt(stored["text"], left)] if left >= FEWEST else row
        table.add_row(*map(Text, shown))
    return table


def _folded(name: str) -> list[str]:
    """Split a long name into lines, so that a column is not much wider than its numbers."""
    return name.replace("_", "_\n").split("\n") if len(name) > LONGEST else [name]


def _statistics(summary: dict) -> Table:
    table = Table(title="statistics (std of the rows, not an estimate)", title_justify="left")
    table.add_column("component")
    for title in ("range", *STATISTICS):
        table.add_column(title, justify="right")
    for name, column in summary["columns"].items():
        table.add_row(Text(printable(name)), limits(column["range"]), *(number(column[key]) for key in STATISTICS))
    return table


def _histogram(name: str, column: dict, bar: str) -> Table:
    title = Text(f"{printable(name)}: scores of {column['applied']} rows")
    table = Table(title=title, title_justify="left", box=None, show_header=False)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    largest = max((item["count"] for item in column["histogram"]), default=0)
    for item in column["histogram"]:
        length = -(-BAR * item["count"] // largest)  # rounded up, so that a single row is visible
        table.add_row(item["label"], str(item["count"]), bar * length)
    return table
