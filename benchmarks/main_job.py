"""The main job under several seeds: what stage 2 adds to stage 1, and to as much more of stage 1.

    python benchmarks/main_job.py --seeds 5 --jobs 2 --output_dir runs/seeds [flags of train_grpo.py, such as --control]

Every seed has data, weights and batches of its own. Printed are mean and range over seeds, and paired 95 % bootstrap
intervals over all images of all seeds; `summary.json` holds them. A seed that is finished is not run again.
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

from segrl.metrics import paired_bootstrap_ci
from segrl.reports import say

SCRIPT = Path(__file__).parent.parent / "examples" / "core_seg" / "train_grpo.py"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
TIME = "cpu_minutes.json"


def run(seed: int, folder: Path, flags: list[str]) -> None:
    """Run one seed in a process of its own and note its CPU time."""
    if (folder / TIME).is_file():
        return
    go_on = ["--resume_from_checkpoint", "last"] if (folder / "segrl_run.json").is_file() else []
    command = [sys.executable, str(SCRIPT), "--output_dir", str(folder), "--seed", str(seed), "--use_cpu"]
    command += ["--disable_tqdm", "true", *go_on, *flags]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".log"), "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **ONE_THREAD})
        _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"seed {seed} failed: see {folder.with_suffix('.log')}")
    (folder / TIME).write_text(json.dumps((usage.ru_utime + usage.ru_stime) / 60))


def scores(folder: Path, stage: str, name: str) -> np.ndarray:
    path = folder / ("predictions.json" if stage == "stage2" else f"predictions_{stage}.json")
    return np.array([record[name] for record in json.loads(path.read_text())], dtype=float)


def summarise_seeds(folders: list[Path]) -> dict[str, Any]:
    """Return mean and range of every score of every stage, and what stage 2 gains."""
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    stages = [stage for stage in ("baseline", "stage1", "stage2", "control") if stage in results[0]]
    found: dict[str, Any] = {stage: {} for stage in stages}
    for stage in stages:
        for name in ("mdice", "box_f1", "fail"):
            values = [result[stage][name] for result in results if name in result[stage]]
            if values:
                found[stage][name] = spread(values)
        if stage != "baseline":
            shares = [1 - result[stage]["statuses"].get("valid", 0) / result[stage]["n"] for result in results]
            found[stage]["unreadable"] = spread(shares)
    found["zero_spread"] = spread([result["zero_spread"] for result in results])
    found["cpu_minutes"] = spread([json.loads((folder / TIME).read_text()) for folder in folders], 1)
    for other in ("stage1", "control"):
        for name in ("dice", "box_f1") if other in stages else ():
            new, old = [np.concatenate([scores(f, stage, name) for f in folders]) for stage in ("stage2", other)]
            key = "gain" if other == "stage1" else "gain_over_control"
            each = [result[key][name] for result in results]
            found.setdefault(key, {})[name] = [float((new - old).mean()), *paired_bootstrap_ci(new, old), each]
    return found


def spread(values: list[float], factor: float = 100) -> list[float]:
    """Mean, least and greatest; of shares in percent."""
    return [factor * float(value) for value in (np.mean(values), np.min(values), np.max(values))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, default=5, help="run the seeds 1 to so many")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, one thread each")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/seeds"))
    arguments, flags = parser.parse_known_args()
    folders = [arguments.output_dir / f"seed{seed}" for seed in range(1, arguments.seeds + 1)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(run, range(1, arguments.seeds + 1), folders, [flags] * len(folders)))
    found = summarise_seeds(folders)
    (arguments.output_dir / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
    for stage, values in found.items():
        if isinstance(values, list):
            say(f"{stage}: " + "{:.1f} ({:.1f} to {:.1f})".format(*values))
        elif not stage.startswith("gain"):
            say(f"{stage}: " + ", ".join(f"{n} " + "{:.1f} ({:.1f} to {:.1f})".format(*v) for n, v in values.items()))
    for key, other in (("gain", "stage 1"), ("gain_over_control", "stage 1 continued")):
        for name, (mean, low, high, each) in found.get(key, {}).items():
            below = sum(interval[2] < 0 for interval in each)
            say(
                f"stage 2 - {other}, {name}: {100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] points; "
                f"{below} of {len(each)} seeds clear below 0"
            )


if __name__ == "__main__":
    main()
