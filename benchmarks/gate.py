"""Gate: what a step runs, compared with numbers of record; more or less than 5 % off ends with exit status 1.

    python benchmarks/gate.py                      compare all scenarios with benchmarks/baselines
    python benchmarks/gate.py short filled         some of them
    python benchmarks/gate.py --update             measure, and write the numbers of record
    python benchmarks/gate.py --only-print full    a scenario without numbers of record

Compared are counts, which no load of the machine changes: operations of PyTorch (views left out; on a GPU most of them
are a kernel) and the most bytes that their tensors hold at once, both of the loss (forward and backward) and of the
rollout (generation, masks, rewards, scoring); forwards and tokens of the language model by phase, images of the vision
tower, encodes of the segmenter; and the ratios segrl / TRL of all of them. Ratios of time are printed beside them and
never compared. What moved is listed, also what got better: then `--update` records it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench_step import _quiet
from step_arms import ARMS, Settings
from step_counts import count_layer, count_step
from step_shapes import QUICK, SHAPES, Shape

BASELINES = Path(__file__).parent / "baselines"
TOLERANCE = 0.05


@dataclass(frozen=True)
class Scenario:
    """One workload of the gate.

    Attributes:
        shape: Sizes.
        arms: Which trainers run.
        group: Completions of a prompt.
        settings: Of both.
    """

    shape: Shape
    arms: tuple[str, ...] = ARMS
    group: int = 4
    settings: Settings = Settings()  # noqa: RUF009  # frozen


def _at_width(shape: Shape, layers: int) -> Shape:
    """The lengths of a shape with the tiny model's width and this number of layers."""
    return replace(shape, model=replace(QUICK[shape.name].model, layers=layers), sam=QUICK[shape.name].sam)


_CORE = _at_width(SHAPES["core_seg"], 36)
SCENARIOS = {
    "short": Scenario(QUICK["short"]),
    "core_seg": Scenario(QUICK["core_seg"], settings=Settings(rollouts=2)),
    "medvol": Scenario(QUICK["medvol"]),
    "lora": Scenario(QUICK["short"], settings=Settings(lora=4, checkpointing=True, generates=False)),
    "accumulated": Scenario(QUICK["short"], ("segrl",), settings=Settings(accumulated=4, generates=False)),
    "filled": Scenario(QUICK["short"], ("segrl",), settings=Settings(accumulated=4, generates=False, budget=16_384)),
}
UNRECORDED = {
    "full_accumulated": Scenario(_CORE, settings=Settings(accumulated=4, generates=False)),
    "full_filled": Scenario(_CORE, ("segrl",), settings=Settings(accumulated=4, generates=False, budget=16_384)),
}


def measure(scenario: Scenario) -> dict[str, dict[str, float]]:
    """Return `{"compared": {metric: value}, "printed": {metric: value}}` of a scenario."""
    found: dict[str, dict[str, float]] = {}
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        for arm in scenario.arms:
            found[arm] = count_step(arm, scenario.shape, scenario.group, scenario.settings, folder)
    compared = {f"{arm}/{key}": value for arm, counts in found.items() for key, value in counts.items()}
    if set(found) == set(ARMS):
        theirs, ours = (found[arm] for arm in ARMS)
        compared |= {f"ratio/{key}": ours[key] / theirs[key] for key in theirs if key in ours and theirs[key]}
    printed = {key: compared.pop(key) for key in list(compared) if "seconds" in key}
    return {"compared": compared, "printed": printed}


def moved(record: Mapping[str, float], found: Mapping[str, float], tolerance: float = TOLERANCE) -> list[list[str]]:
    """Rows (metric, record, found, change) of what differs by more than the tolerance, or is there on one side only."""
    rows = []
    for key in sorted({*record, *found}):
        old, new = record.get(key), found.get(key)
        if old is None or new is None:
            rows.append([key, _text(old), _text(new), "new" if old is None else "missing"])
        elif abs(new - old) > tolerance * abs(old):
            rows.append([key, _text(old), _text(new), f"{new / old - 1:+.1%}" if old else "from 0"])
    return rows


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if value % 1 else f"{value:.0f}"


def check(name: str, options: argparse.Namespace) -> list[list[str]]:
    """Measure one scenario; print it, or write it down, or return what moved."""
    path = options.baselines / f"{name}.json"
    compared = not (options.only_print or options.update)
    if compared and not path.is_file():
        raise SystemExit(f"{path}: no numbers of record for {name!r}; write them with --update")
    result = measure({**SCENARIOS, **UNRECORDED}[name])
    for key, value in sorted({**result["printed"], **(result["compared"] if options.only_print else {})}.items()):
        print(f"{name:18}{key:32}{_text(value):>12}", file=sys.stderr if not options.only_print else sys.stdout)
    if options.only_print:
        return []
    if options.update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result["compared"], indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return []
    record: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return [[name, *row] for row in moved(record, result["compared"], options.tolerance)]


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("scenarios", nargs="*", help=f"of {', '.join([*SCENARIOS, *UNRECORDED])}; all with a record")
    made.add_argument("--update", action="store_true", help="write the numbers of record")
    made.add_argument("--only-print", action="store_true", help="print all numbers and compare none")
    made.add_argument(
        "--layer", action="store_true", help="print the operations of a decoder layer, eager and compiled"
    )
    made.add_argument("--tolerance", type=float, default=TOLERANCE)
    made.add_argument("--baselines", type=Path, default=BASELINES, help="folder of the numbers of record")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    command = parser()
    options = command.parse_args(argv)
    unknown = set(options.scenarios) - {*SCENARIOS, *UNRECORDED}
    if unknown:
        command.error(f"unknown scenarios {sorted(unknown)}; there are {', '.join([*SCENARIOS, *UNRECORDED])}")
    if options.layer:
        for key, value in count_layer().items():
            print(f"{'layer':18}{key:32}{value:12}")
        if not options.scenarios:
            return 0
    rows: list[Any] = []
    for name in options.scenarios or SCENARIOS:
        rows += check(name, options)
    if not rows:
        return 0
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    print(f"moved by more than {options.tolerance:.0%} from the numbers of record:")
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    return 1


if __name__ == "__main__":
    sys.exit(main())
