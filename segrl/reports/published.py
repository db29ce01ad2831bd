"""Scores that a paper reports, as data: `examples/*/published.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from segrl.errors import DataError, unknown_name

__all__ = ["PublishedRow", "load_published"]


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """One row of a published table.

    Attributes:
        table: Of the paper, such as "2a".
        data: Name of the data set.
        method: A system, or an ablation of the paper's own.
        scores: Fractions in [0, 1] under the names of `results.json`; empty for one that did not converge.
        groups: As in `results.json`, score "mdice" only: by the name of the grouping, then by group.
        command: Script and flags that give this row here, in order; empty for systems of others.
        stage1: Script and flags of the stage 1 that the command goes on with, where rows share one; empty if it trains
            its own, or has none.
        note: What the paper leaves open.

    Example:
        >>> PublishedRow(table="2a", data="AbdomenCT-1K", method="SFT only", scores={"mdice": 0.8552}).command
        ()
    """

    table: str
    data: str
    method: str
    scores: Mapping[str, float] = field(default_factory=dict)
    groups: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    stage1: tuple[str, ...] = ()
    note: str = ""


def load_published(path: str | Path) -> list[PublishedRow]:
    """Read a file of published scores.

    Args:
        path: A YAML file with `unit: percent` and `rows`, see `examples/core_seg/published.yaml`.

    Returns:
        The rows in the order of the file, scores as fractions.

    Raises:
        DataError: The file cannot be read or is not of this layout, or a score is not in [0, 100]; names the row.

    Example:
        >>> text = "unit: percent\\nrows:\\n- {table: '1', data: KiTS23, method: SAT, scores: {mdice: 28.7}}"
        >>> _ = Path("published.yaml").write_text(text)
        >>> load_published("published.yaml")[0].scores
        {'mdice': 0.287}
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a YAML file of published scores") from error
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or content.get("unit") != "percent":
        raise DataError(f"{path}: expected 'unit: percent' and a list 'rows'")
    return [_row(row, f"{path}: row {number}") for number, row in enumerate(rows, 1)]


def _row(row: Any, where: str) -> PublishedRow:
    if not isinstance(row, dict):
        raise DataError(f"{where}: {row!r:.80}, expected a mapping")
    known = [item.name for item in fields(PublishedRow)]
    for key in row:
        if key not in known:
            raise DataError(f"{where}: {unknown_name('key', str(key), known)}")
    for key in ("table", "data", "method"):
        if not isinstance(row.get(key), str) or not row[key]:
            raise DataError(f"{where}: {key}={row.get(key)!r}, expected a text")
    values = {
        **row,
        "scores": _fractions(row.get("scores", {}), where),
        "groups": {name: _fractions(groups, f"{where}, {name}") for name, groups in row.get("groups", {}).items()},
        **{name: tuple(str(row.get(name, "")).split()) for name in ("command", "stage1")},
    }
    return PublishedRow(**values)


def _fractions(scores: Any, where: str) -> dict[str, float]:
    if not isinstance(scores, dict):
        raise DataError(f"{where}: {scores!r:.80}, expected scores by name")
    for name, value in scores.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
            raise DataError(f"{where}: {name}={value!r}, expected a number from 0 to 100")
    return {name: round(value / 100, 6) for name, value in scores.items()}
