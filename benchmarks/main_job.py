"""The main job many times: under several seeds, on every fold of a data set, or with one source after another left out.

    python benchmarks/main_job.py --seeds 5 --jobs 2 --output_dir runs/seeds [flags of train_grpo.py, such as --control]
    python benchmarks/main_job.py --folds 5 --data lesions --output_dir runs/folds [--patients REGEX ...]
    python benchmarks/main_job.py --sources clinic_a clinic_b --data lesions --output_dir runs/sources

Printed are mean and range over runs, and paired 95 % bootstrap intervals over all images of all runs: of what stage 2
adds to stage 1 and to as much more of stage 1, and of each stage minus the constant mask, by modality. `summary.json`
holds them. A run that is finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from segrl.evaluation import read_records
from segrl.metrics import paired_difference
from segrl.reports import say

SCRIPT = Path(__file__).parent.parent / "examples" / "core_seg" / "train_grpo.py"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
TIME = "cpu_minutes.json"


def run(folder: Path, flags: list[str]) -> None:
    """Run one job in a process of its own and note its CPU time."""
    if (folder / TIME).is_file():
        return
    go_on = ["--resume_from_checkpoint", "last"] if (folder / "segrl_run.json").is_file() else []
    command = [sys.executable, str(SCRIPT), "--output_dir", str(folder), "--use_cpu"]
    command += ["--disable_tqdm", "true", *go_on, *flags]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".log"), "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **ONE_THREAD})
        _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{folder.name} failed: see {folder.with_suffix('.log')}")
    (folder / TIME).write_text(json.dumps((usage.ru_utime + usage.ru_stime) / 60))


def scores(folders: list[Path], stage: str, name: str) -> np.ndarray:
    """One score, or text, of every row of all runs."""
    part = None if stage == "stage2" else stage
    return np.array([record[name] for folder in folders for record in read_records(folder, part)])


def paired(new: np.ndarray, old: np.ndarray) -> list[float]:
    """Mean difference and its interval, in points."""
    return [100 * value for value in paired_difference(new, old)]


def spread(values: list[float], factor: float = 100) -> list[float]:
    """Mean, least and greatest; of shares in percent."""
    return [factor * float(value) for value in (np.mean(values), np.min(values), np.max(values))]


def summarise_runs(folders: list[Path]) -> dict[str, Any]:
    """Return mean and range of every score of every stage, and the gains."""
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    stages = [stage for stage in ("baseline", "stage1", "stage2", "control") if stage in results[0]]
    found: dict[str, Any] = {"runs": [folder.name for folder in folders]}
    for stage in stages:
        found[stage] = {
            name: spread([result[stage][name] for result in results])
            for name in ("mdice", "box_f1", "fail")
            if name in results[0][stage]
        }
        if stage != "baseline":
            shares = [1 - result[stage]["statuses"].get("valid", 0) / result[stage]["n"] for result in results]
            found[stage]["unreadable"] = spread(shares)
    found["zero_spread"] = spread([result["zero_spread"] for result in results])
    found["cpu_minutes"] = spread([json.loads((folder / TIME).read_text()) for folder in folders], 1)
    for other, key in (("stage1", "gain"), ("control", "gain_over_control")):
        for name in ("dice", "box_f1") if other in stages else ():
            pooled = paired(scores(folders, "stage2", name), scores(folders, other, name))
            each = [[100 * value for value in result[key][name]] for result in results]
            found.setdefault(key, {})[name] = {"pooled": pooled, "each": each}
    if "baseline" in stages:
        kinds, constant = (scores(folders, "baseline", name) for name in ("modality", "dice"))
        groups = {"all": kinds == kinds, **{str(kind): kinds == kind for kind in np.unique(kinds)}}
        for stage in stages[1:]:
            dice = scores(folders, stage, "dice")
            found[f"{stage}_over_constant"] = {
                kind: {
                    "rows": int(chosen.sum()),
                    "constant": 100 * float(constant[chosen].mean()),
                    "mdice": 100 * float(dice[chosen].mean()),
                    "difference": paired(dice[chosen], constant[chosen]),
                }
                for kind, chosen in groups.items()
            }
    return found


def print_summary(found: dict[str, Any]) -> None:
    """Print what `summarise_runs` found, one line each."""
    for stage in ("baseline", "stage1", "stage2", "control"):
        if stage in found:
            parts = (f"{name} " + "{:.1f} ({:.1f} to {:.1f})".format(*value) for name, value in found[stage].items())
            say(f"{stage}: {', '.join(parts)}")
    for name in ("zero_spread", "cpu_minutes"):
        say(f"{name}: " + "{:.1f} ({:.1f} to {:.1f})".format(*found[name]))
    for key, other in (("gain", "stage 1"), ("gain_over_control", "stage 1 continued")):
        for name, gain in found.get(key, {}).items():
            below = sum(high < 0 for *_, high in gain["each"])
            say(
                f"stage 2 - {other}, {name}: "
                + "{:+.1f} [{:+.1f}, {:+.1f}] points; ".format(*gain["pooled"])
                + f"{below} of {len(gain['each'])} runs clear below 0"
            )
    for stage in ("stage1", "stage2", "control"):
        for kind, row in found.get(f"{stage}_over_constant", {}).items():
            difference = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*row["difference"])
            say(
                f"{stage} - constant mask, {kind} ({row['rows']}): {row['mdice']:.1f} - {row['constant']:.1f} = "
                f"{difference} points"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    many = parser.add_mutually_exclusive_group()
    many.add_argument("--seeds", type=int, default=5, help="run the seeds 1 to so many")
    many.add_argument("--folds", type=int, help="run every one of so many folds of --data")
    many.add_argument("--sources", nargs="+", help="leave out each of these sources of --data")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/main_job"))
    arguments, flags = parser.parse_known_args()
    if arguments.folds:
        runs = {f"fold{n}": ["--folds", str(arguments.folds), "--fold", str(n)] for n in range(1, arguments.folds + 1)}
    elif arguments.sources:
        runs = {f"without_{source}": ["--hold_out_source", source] for source in arguments.sources}
    else:
        runs = {f"seed{seed}": ["--seed", str(seed)] for seed in range(1, arguments.seeds + 1)}
    folders = [arguments.output_dir / name for name in runs]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(run, folders, [[*own, *flags] for own in runs.values()]))
    found = summarise_runs(folders)
    (arguments.output_dir / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
    print_summary(found)


if __name__ == "__main__":
    main()
