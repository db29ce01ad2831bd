"""A plan as lines of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

from segrl.curation.call_plans import PlanAssumptions, PlanStage
from segrl.curation.plan import Plan

__all__ = ["plan_table"]


def plan_table(plan: Plan, stages: Sequence[PlanStage] = ("difficulty", "write", "judge", "publish")) -> str:
    """Write a plan as lines of text.

    Args:
        plan: What `plan_build` or `plan_sources` returned.
        stages: Those to show.

    Example:
        >>> from pathlib import Path
        >>> from segrl.curation import CurationSettings, SourceSettings, SourceSize, plan_sources
        >>> source = SourceSettings(path=Path("mine"), licence="CC0-1.0")
        >>> sizes = [SourceSize("mine", {(512, 512): 1000}, 2e5)]
        >>> plan = plan_sources(sizes, CurationSettings(sources=(source,)))
        >>> print(plan_table(plan, ["difficulty"]))
        cases        1,000 of 1 source; 310 hard expected, 1,000 at most
        committee    9 trainings (0 on disk) of 120 steps at most, 8,640 images; 3,000 predictions
        disk         about 2.2 MB (2.5 MB at most): difficulty 1.3 MB, cases 924 kB (1.2 MB at most)
        assumed      hard=0.31 again=0.3 text_tokens=150 verdict_tokens=60
    """
    count, (expected, most) = sum(plan.cases.values()), plan.hard
    sources = f"{len(plan.cases)} source{'s' * (len(plan.cases) > 1)}"
    hard = f"{expected:,} hard" + (f" expected, {most:,} at most" if expected < most else "")
    lines = [("cases", f"{count:,} of {sources}; {hard}")]
    if "difficulty" in stages:
        hours = "" if plan.gpu_hours is None else f"; {plan.gpu_hours:,.1f} GPU hours at most"
        trainings = f"{plan.trainings:,} trainings ({plan.trained:,} on disk) of {plan.steps:,} steps at most"
        text = f"{trainings}, {_number(plan.images)} images; {plan.predictions:,} predictions{hours}"
        lines.append(("committee", text))
    shown = [calls for calls in plan.calls if calls.stage in stages]
    for calls in shown:
        hours = "" if calls.gpu_hours is None else f"; {calls.gpu_hours:,.0f} GPU hours"
        tokens = f"{_pair(calls.tokens_in)} tokens in, {_pair(calls.tokens_out)} out"
        cost = f"; cost {_pair(calls.cost)}" if any(calls.cost) else ""
        text = f"{calls.model}: {_pair(calls.calls)} calls, {tokens}{cost}{hours}"
        lines.append((f"{calls.stage}: {calls.role}", text))
    if {"write", "judge"} & set(stages) and not shown:
        lines.append(("calls", "none: templates write, rules judge"))
    for model in dict.fromkeys(calls.model for calls in shown if calls.model in plan.kept):
        number, cost = plan.kept[model]
        lines.append(("on disk", f"{number:,} answers of {model}, cost {cost:,.2f}: not asked for again"))
    parts = {"difficulty": ("sources", "difficulty", "cases"), "write": ("texts", "calls"), "judge": ("texts", "calls"),
             "publish": ("dataset",)}  # fmt: skip
    wanted = dict.fromkeys(part for stage in stages for part in parts[stage] if any(plan.disk[part]))
    sizes = [plan.disk[part] for part in wanted]
    total = sum(size[0] for size in sizes), sum(size[1] for size in sizes)
    if wanted:
        lines.append(("disk", f"about {_pair(total, _amount)}: "
                  + ", ".join(f"{part} {_pair(plan.disk[part], _amount)}" for part in wanted)))  # fmt: skip
    lines += [("limit", note) for note in plan.notes if shown]
    given = {item.name: getattr(plan.assumptions, item.name) for item in fields(PlanAssumptions)}
    lines.append(("assumed", " ".join(f"{name}={value:g}" for name, value in given.items() if value is not None)))
    return "\n".join(f"{name:<12} {text}" for name, text in lines)


def _pair(values: Sequence[float], write: Callable[[float], str] | None = None) -> str:
    expected, most = map(write or _number, values)
    return expected if expected == most else f"{expected} ({most} at most)"


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value / 1e6:,.1f} million" if value >= 10**6 else f"{value:,}"
    return f"{value:,.2f}"


def _amount(size: float) -> str:
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= 0.95 * one:
            return f"{size / one:,.1f} {unit}"
    return f"{size / 1e3:,.0f} kB"
