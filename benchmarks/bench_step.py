"""Cost of masks: a step of TRL's `GRPOTrainer` with a box reward (A) beside one of `SegGRPOTrainer` with masks (B).

    python benchmarks/bench_step.py [--shape core_seg] [--generations 4 8 16] [--rounds 5] [--json result.json]

One process, A and B in turn (A B A B ...), each turn with a new trainer from the same weights, on the same rows, with
the same settings and tokens: generation runs at full cost with a fixed length, then both arms go on with the same
prepared answers (`Answers`). A has the reward `box_f1`. B has a mask head on SAM 2, the rewards `format`, `box_f1` and
`dual_granularity_mask`, and DiceCE.

Printed for each shape and group size: medians of the time of every phase, their ratio beside the floor that follows
from the arithmetic alone (`step_floor.py`), the peak of memory (on the CPU of a process of its own), and what ran how
often in a step. No image occurs in two steps. `--quick` runs tiny models in seconds, to see that everything works.
`--profile FILE` then repeats the last loss of each arm and writes down where its time goes (`step_profile.py`);
`--loss-only` leaves generation out where only the loss is asked for.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from step_arms import ARMS, Settings, Turn, take_turn
from step_floor import arithmetic
from step_probe import PHASES, total
from step_profile import Profile
from step_shapes import FULL_SIZE, QUICK, SAM_SIZES, SHAPES, Shape, image_tokens

from segrl.reports import versions, write_results

GOAL_GROUP = 4  # the group size that the goals are for


def measure(shape: Shape, group: int, settings: Settings, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Both arms in turn: medians, counts and memory."""
    turns: dict[str, list[Turn]] = {arm: [] for arm in options.arms}
    for number in range(options.rounds):
        for arm in options.arms:
            turn = take_turn(
                arm, shape, group, settings, warmup=options.warmup, steps=options.steps, seed=number, folder=folder,
                profiled=options.profile is not None and number == options.rounds - 1,
            )  # fmt: skip
            turns[arm].append(turn)
            seconds = ", ".join(f"{sum(step.values()):.2f}" for step in turn.steps)
            print(f"# {shape.name} G={group} round {number + 1}/{options.rounds} {arm}: {seconds} s", file=sys.stderr)
    arms = {arm: _summary(turns[arm]) for arm in options.arms}
    floor = arithmetic(shape, group, settings)
    for arm, found in arms.items():
        rate = floor["flops"][arm]["loss"] / found["seconds"]["loss"]
        found["loss_flop_per_s"] = rate
        found["mfu"] = rate / options.peak_flops if options.peak_flops else None
        profiled = turns[arm][-1].profile
        if profiled is not None:
            _write_profile(options, f"{shape.name}, G={group}, {arm}", profiled, floor["flops"][arm]["loss"])
            found["repeated_loss"] = {"seconds": profiled.seconds, "work_seconds": profiled.work}
        if settings.device == "cpu":
            found["memory"] = None if options.no_memory else _memory_of_process(arm, shape, group, options)
    ratios = _ratios(arms)
    return {
        "shape": {**asdict(shape), "image_tokens": image_tokens(shape)}, "generations": group, "arms": arms,
        "ratio": ratios,
        "floor": floor, "goals": _goals(shape, group, settings, ratios, arms["segrl"]) if "segrl" in arms else [],
    }  # fmt: skip


def _ratios(arms: Mapping[str, Any]) -> dict[str, float]:
    if set(arms) != set(ARMS):
        return {}
    theirs, ours = (arms[arm] for arm in ARMS)
    ratios = {name: ours["seconds"][name] / theirs["seconds"][name] for name in ("loss", "generate", "step")}
    if theirs["memory"] and ours["memory"]:
        ratios["memory"] = ours["memory"]["peak"] / theirs["memory"]["peak"]
    return ratios


def _write_profile(options: argparse.Namespace, title: str, profiled: Profile, flops: float) -> None:
    """Append an arm's profile to the file of `--profile`."""
    rate = flops / statistics.median(profiled.seconds)
    mfu = f", MFU {rate / options.peak_flops:.1%}" if options.peak_flops else ""
    with options.profile.open("a", encoding="utf-8") as file:
        file.write(f"== {title}: {rate / 1e12:.3f} TFLOP/s{mfu}\n{profiled.text}\n")


def _summary(turns: Sequence[Turn]) -> dict[str, Any]:
    steps = [_with_sums(step) for turn in turns for step in turn.steps]
    counts = [count for turn in turns for count in turn.counts]
    names = sorted({name for count in counts for name in count})
    return {
        "seconds": {name: statistics.median(step[name] for step in steps) for name in steps[0]},
        "steps": steps,
        "counts": {name: statistics.mean(count.get(name, 0) for count in counts) for name in names},
        "memory": {key: max(turn.memory[key] for turn in turns) for key in turns[0].memory},
        "parameters": turns[0].parameters,
        "rewards": {name: statistics.mean(turn.rewards[name] for turn in turns) for name in turns[0].rewards},
    }


def _with_sums(step: Mapping[str, float]) -> dict[str, float]:
    return {**step, "loss": step["forward"] + step["backward"], "step": sum(step[phase] for phase in PHASES)}


def _memory_of_process(arm: str, shape: Shape, group: int, options: argparse.Namespace) -> dict[str, int]:
    """Peak memory of a process that runs one step of one arm."""
    given = [*options.given, "--peak-of", arm, "--shape", shape.name, "--generations", str(group)]
    command = [sys.executable, str(Path(__file__).resolve()), *given]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# ---- goals -----------------------------------------------------------------------------------------------------------


def _goals(
    shape: Shape, group: int, settings: Settings, ratios: Mapping[str, float], ours: dict[str, Any]
) -> list[dict[str, Any]]:
    """What is promised, what was found, and whether it was met."""
    goals: list[tuple[str, float, float]] = []
    if group == GOAL_GROUP and settings.generates:
        goals += [(f"{name}, B / A", ratios[name], goal) for name, goal in shape.goals.items() if name in ratios]
    counts, prompts = ours["counts"], shape.prompts * settings.rollouts
    if settings.frozen_vision:  # a tower that is trained also runs in the loss
        encodes = total(counts, "vision_images") / (prompts * shape.images)
        goals.append(("vision-tower encodes per unique image", encodes, 1.0))
    goals.append(("SAM encodes per unique image", counts.get("sam_encodes", 0) / prompts, 1.0))
    if settings.generates:  # otherwise the states for masks come from a forward of their own
        goals += [
            ("language-model forwards for masks", counts.get("lm_forwards/masks", 0), 0.0),
            ("share of rewards in a step", ours["seconds"]["reward"] / ours["seconds"]["step"], 0.02),
        ]
    return [{"name": name, "value": value, "goal": goal, "met": value <= goal + 1e-9} for name, value, goal in goals]


# ---- printing --------------------------------------------------------------------------------------------------------


def print_result(result: Mapping[str, Any]) -> None:
    """The table of one shape and group size."""
    shape, arms = result["shape"], result["arms"]
    first = next(iter(arms.values()))
    print(
        f"\n{shape['name']}: {shape['prompts']} x {result['generations']} completions, about {shape['prompt_tokens']} "
        f"+ {shape['completion_tokens']} tokens, {shape['images']} image(s) of {shape['image_px']} px a prompt"
    )
    sizes = ", ".join(f"{name} {number / 1e6:.1f} M" for name, number in list(arms.values())[-1]["parameters"].items())
    print(f"parameters: {sizes}; {len(first['steps'])} measured steps each")
    titles = {"trl": "A  TRL", "segrl": "B  segrl"}
    both = len(arms) == len(titles)
    print(f"{'median s a step':24}" + "".join(f"{titles[arm]:>12}" for arm in arms) + (f"{'B / A':>9}" * both), end="")
    print(f"{'floor':>9}" * both)

    def line(name: str, values: list[float], form: str = "12.3f", least: float = 1e-4, end: str = "") -> None:
        ratio = f"{values[-1] / values[0]:9.2f}" if both and values[0] > least else " " * 9 * both
        print(f"{name:24}" + "".join(f"{value:{form}}" for value in values) + ratio + end)

    floor = result["floor"]["ratio"] if both else {}
    for name in (*PHASES, "loss", "step"):
        values = [arm["seconds"][name] for arm in arms.values()]
        if any(values):
            line(name, values, end=f"{floor[name]:9.2f}" if name in floor else "")
    if all(arm["memory"] for arm in arms.values()):
        for name in ("peak", "start"):
            line(f"memory, GiB: {name}", [arm["memory"][name] / 2**30 for arm in arms.values()])
    line("loss, TFLOP/s", [arm["loss_flop_per_s"] / 1e12 for arm in arms.values()], least=0)
    if all(arm["mfu"] for arm in arms.values()):
        print(f"{'loss, MFU':24}" + "".join(f"{arm['mfu']:12.1%}" for arm in arms.values()))
    print("counts a step")
    for name in sorted({name for arm in arms.values() for name in arm["counts"]}):
        line(f"  {name}", [arm["counts"].get(name, 0) for arm in arms.values()], "12.0f")
    if result["goals"]:
        print("goals")
    for goal in result["goals"]:
        verdict = "PASS" if goal["met"] else "above the goal"
        print(f"  {goal['name']:40}{goal['value']:8.3f}  <= {goal['goal']:.2f}  {verdict}")


# ---- command line ----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shape", nargs="+", choices=[*SHAPES, "all"], default=["core_seg"])
    made.add_argument("--generations", type=int, nargs="+", default=[GOAL_GROUP], help="completions of a prompt")
    made.add_argument("--rounds", type=int, default=5, help="times A and B take turns")
    made.add_argument("--steps", type=int, default=1, help="measured steps of a turn")
    made.add_argument("--warmup", type=int, default=1, help="steps of a turn that are not measured")
    made.add_argument("--prompts", type=int, help="prompts of a micro-batch, in place of the shape's")
    made.add_argument(
        "--size", choices=["cpu", "3b"], default="cpu", help="model sizes: made for a CPU, or Qwen2.5-VL-3B's"
    )
    made.add_argument("--quick", action="store_true", help="tiny models and short texts")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda computes in bfloat16")
    made.add_argument("--beta", type=float, default=0.0, help="above 0 the reference model's pass runs")
    made.add_argument(
        "--rollouts",
        type=int,
        default=1,
        metavar="N",
        help="micro-batches of a rollout (steps_per_generation); above 1 the old-log-prob pass runs",
    )
    made.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=False, help="of gradients")
    made.add_argument("--lora", type=int, default=0, metavar="R", help="LoRA of this rank; 0 trains the whole model")
    made.add_argument("--vision", choices=["frozen", "trained"], default="frozen", help="the vision tower")
    made.add_argument("--sam", choices=list(SAM_SIZES), help="SAM 2 of B, in place of the shape's")
    made.add_argument("--no-share", action="store_true", help="B with share_prompt=False")
    made.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="run only these")
    made.add_argument("--brief-warmup", action="store_true", help="steps of the warm-up generate a few tokens only")
    made.add_argument("--loss-only", action="store_true", help="no generation: the answers come at once")
    made.add_argument(
        "--profile", type=Path, metavar="FILE", help="repeat the last loss of each arm, and write where its time goes"
    )
    made.add_argument("--no-memory", action="store_true", help="do not measure memory in processes of its own (CPU)")
    made.add_argument(
        "--peak-flops", type=float, metavar="N", help="of the machine a second; prints the MFU of the loss"
    )
    made.add_argument("--json", type=Path, help="also write the result here")
    made.add_argument(
        "--peak-of", choices=list(ARMS), help="only print the peak memory of one step of this arm, as JSON"
    )
    return made


def main(argv: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if argv is None else argv)
    command = parser()
    options = command.parse_args(given)
    options.given = given
    for name in ("rounds", "steps", "rollouts", "prompts"):
        value = getattr(options, name)
        if value is not None and value < 1:
            command.error(f"--{name} {value}: expected 1 or more")
    if min(options.generations) < 2 or options.warmup < 0:
        command.error("--generations must be at least 2 and --warmup at least 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        command.error("--device cuda: torch sees no GPU; use --device cpu")
    settings = Settings(
        device=options.device,
        beta=options.beta,
        rollouts=options.rollouts,
        checkpointing=options.checkpointing,
        lora=options.lora,
        vision=options.vision,
        share=not options.no_share,
        sam=options.sam,
        generates=not options.loss_only,
        brief=options.brief_warmup,
    )
    options.arms = [arm for arm in ARMS if arm in options.arms]
    if options.profile:
        options.profile.write_text("", encoding="utf-8")
    shapes = chosen_shapes(options)
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        if options.peak_of:
            turn = take_turn(
                options.peak_of, shapes[0], options.generations[0], settings, warmup=0, steps=1, seed=0, folder=folder
            )
            print(json.dumps(turn.memory))
            return
        report: dict[str, Any] = {
            "command": " ".join(["benchmarks/bench_step.py", *_without_paths(given)]),
            "date": datetime.date.today().isoformat(),
            "machine": machine(settings.device),
            "threads": torch.get_num_threads(),
            "settings": asdict(settings),
            "rounds": options.rounds,
            "versions": versions(),
            "results": [],
        }
        for shape in shapes:
            for group in options.generations:
                report["results"].append(measure(shape, group, settings, options, folder))
                print_result(report["results"][-1])
                if options.json:
                    write_results(options.json, report)


def chosen_shapes(options: argparse.Namespace) -> list[Shape]:
    """The shapes that the options name, in their sizes."""
    known = QUICK if options.quick else FULL_SIZE if options.size == "3b" else SHAPES
    names = known if "all" in options.shape else dict.fromkeys(options.shape)
    shapes = [known[name] for name in names]
    return [replace(shape, prompts=options.prompts) for shape in shapes] if options.prompts else shapes


def machine(device: str) -> str:
    """Kind of processor, and of GPU where that was used."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found = f"{names[0] if names else platform.processor()}, {platform.machine()}, {os.cpu_count()} cores"
    return f"{torch.cuda.get_device_name()}; {found}" if device == "cuda" else found


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, log messages and progress bars of the trainers between the numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
            datasets.enable_progress_bars()


def _without_paths(given: Sequence[str]) -> list[str]:
    """The arguments without `--json FILE` and `--profile FILE`, whose paths say nothing about the result."""
    kept, skip = [], False
    for item in given:
        name = item.partition("=")[0]
        if not skip and name not in ("--json", "--profile"):
            kept.append(item)
        skip = not skip and item in ("--json", "--profile")
    return kept


if __name__ == "__main__":
    main()
