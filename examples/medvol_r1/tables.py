"""The published rows of MedVol-R1 beside those of your runs, each named by its ablation.

python examples/medvol_r1/tables.py runs/medvol_r1 runs/without_visibility runs/delta_10
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from segrl.errors import DataError
from segrl.reports import VOLUME_COLUMNS, VOLUME_STAGES, load_published, results_table
from segrl.scripts import Parser, run_script

PUBLISHED = Path(__file__).parent / "published.yaml"
PUBLISHED_DELTA = 5
REWARDS = {"slice_format": "R_f", "slice_visibility": "R_a", "slice_boxes": "R_s", "propagated_dice": "R_c"}
ALL_REWARDS = "medvol_r1"  # the preset that is their sum


def check(argv: Sequence[str]) -> Callable[[], None]:
    """Read every run; return the printing."""
    parser = Parser(description="Print the published rows of MedVol-R1 beside those of runs.")
    parser.usage = "%(prog)s RUN [RUN ...]"
    parser.add_argument("runs", nargs="+", metavar="RUN", help="The output_dir of a run, or its results.json.")
    rows = published_rows()
    for run in parser.parse_args(list(argv)).runs:
        rows |= run_rows(run)
    return lambda: results_table(rows, columns=VOLUME_COLUMNS, stages=list(rows), groupings=())


def published_rows() -> dict[str, dict[str, Any]]:
    """Return the paper's Dice and IoU as summaries by the label of the row; it has no other scores."""
    rows = {}
    for row in load_published(PUBLISHED):
        absent = {name: 0 for name in VOLUME_COLUMNS if name not in row.scores}
        rows[f"published, {row.data}: {row.method}"] = {**row.scores, "n_scored": absent}
    return rows


def run_rows(run: str) -> dict[str, dict[str, Any]]:
    """Return the summaries in a run's `results.json`, by the label of the row.

    Raises:
        DataError: The file is missing or is not the result of a run of this example; what is wrong is named.
    """
    file = Path(run) / "results.json" if Path(run).is_dir() else Path(run)
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); pass the output_dir of a finished run") from error
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); expected the results.json of a run") from error
    config = results.get("config") if isinstance(results, dict) else None
    if not isinstance(config, dict):
        raise DataError(f"{file}: no mapping 'config'; expected the results.json of a run of this example")
    names = {"oracle": "oracle boxes", "stage1": "SFT only", "stage2": ablation(config, file), "model": "evaluated"}
    present = [stage for stage in VOLUME_STAGES if stage in results]
    if not present:
        raise DataError(f"{file}: none of {', '.join(VOLUME_STAGES)}; expected what a run has scored, got {[*results]}")
    for stage in present:
        scores = results[stage] if isinstance(results[stage], dict) else {}
        if missing := [name for name in VOLUME_COLUMNS if name not in scores]:
            raise DataError(f"{file}: {stage} lacks {', '.join(missing)}; expected scores of volumes")
    data = Path(str(config.get("data") or "synthetic")).name
    return {f"{run}, {data}: {names[stage]}": results[stage] for stage in present}


def ablation(config: Mapping[str, Any], file: Path) -> str:
    """Name a run of stage 2 by how its arguments differ from the paper's main run."""
    rewards, delta = config.get("rewards"), config.get("reach")
    if rewards is None:  # stage 1 alone
        rewards = [ALL_REWARDS]
    if not isinstance(rewards, list) or not all(isinstance(name, str) for name in rewards):
        raise DataError(f"{file}: config['rewards'] is {rewards!r:.100}; expected a list of names")
    used = {*rewards, *(REWARDS if ALL_REWARDS in rewards else ())}
    parts = ["RL only" if config.get("skip_stage1") else "SFT + RL"]
    parts += [f"w/o {short}" for name, short in REWARDS.items() if name not in used]
    parts += [f"with {name}" for name in rewards if name not in (*REWARDS, ALL_REWARDS)]
    if delta is not None and delta != PUBLISHED_DELTA and "propagated_dice" in used:
        parts.append(f"delta {delta}")
    return ", ".join(parts)


if __name__ == "__main__":
    run_script(check)
