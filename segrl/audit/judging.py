"""Find reward hacking: degenerate policies compete with honest ones, and tricks with the answers they start from.

A policy's score is its mean over scenes. A reward can be hacked if

1. a degenerate policy scores more than the honest `poor` one, over all scenes or over those with lesions,
2. a policy scores more than an empty answer, over the scenes where there is nothing to find,
3. a trick scores more than the honest answer it is played on, over any of these,
4. a worse honest policy scores more than a better one, over the scenes with lesions,
5. `perfect` scores no more than `poor` over the scenes with lesions, and a degenerate policy scores as much, if only
   over scenes of one kind, such as those with one lesion,
6. an answer with a box in a notation that is not read scores as much as an empty answer, over the scenes where there is
   nothing to find, and the reward reads the ground truth.

"More" means by 3 % of the difference between the highest and the lowest policy score of that reward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from segrl.audit.policies import POLICIES, UNREAD_BOX, answer
from segrl.audit.scenes import Scene, make_scenes
from segrl.errors import RewardError
from segrl.predictions.completion_format import CompletionFormat
from segrl.predictions.target import Target, VolumeTarget
from segrl.reports.terminal import number, printable
from segrl.rewards.factory import make_reward
from segrl.rewards.nodes import Sum
from segrl.rewards.reward import Reward
from segrl.rewards.transforms import Gate, GroupRelative

__all__ = ["AuditReport", "AuditRow", "Verdict", "audit"]

SCENES = 24  # four of each kind
TOLERANCE = 0.03  # of the difference between the highest and the lowest policy score
COLUMNS = {"all": "all scenes", "lesions": "scenes with lesions", "empty": "scenes with nothing to find"}
HONEST = ("poor", "fair", "good", "perfect")
FORM = (
    "it does not read the ground truth, so alone it scores form only; add it to a reward that does, or make it a gate, "
    "and audit that"
)
COARSE = "it does not distinguish a perfect answer from a poor one; add it to a reward that does"
NOWHERE = "it applies to none of the scenes; give ground truths of your own"


@dataclass(frozen=True)
class AuditRow:
    """The scores of one policy: means over the scenes where the reward applies, None if it never does.

    Attributes:
        policy: Name of the policy.
        kind: "honest", "degenerate" or "trick".
        all: Mean over all scenes.
        lesions: Mean over the scenes with lesions.
        empty: Mean over the scenes where there is nothing to find.
        kinds: Mean over the scenes of each kind.
        parts: Mean over all scenes of every part of a sum, before its weight.
        wins: Whether this policy hacks the reward.

    Example:
        >>> row = audit("box_count", scenes=6).rows[0]
        >>> row.policy, row.kind, row.lesions, row.wins
        ('perfect', 'honest', 1.0, False)
    """

    policy: str
    kind: str
    all: float | None
    lesions: float | None
    empty: float | None
    kinds: Mapping[str, float | None] = field(default_factory=dict)
    parts: Mapping[str, float | None] = field(default_factory=dict)
    wins: bool = False


@dataclass(frozen=True)
class Verdict:
    """The verdict on one reward.

    Attributes:
        reward: Name of the reward.
        hackable: Whether a policy hacks the reward.
        reasons: Which policies score too much, one sentence each.
        advice: The fix, or what the verdict does not cover; often "".
        rows: The scores of each policy.
        answer_format: Grammar in which the policies answered, "text" or "json".

    Example:
        >>> print(Verdict("mine", True, ("noise: 1 over all scenes, the honest 'poor' 0.5",), "", (), "text"))
        mine: HACKABLE
          - noise: 1 over all scenes, the honest 'poor' 0.5
    """

    reward: str
    hackable: bool
    reasons: tuple[str, ...]
    advice: str
    rows: tuple[AuditRow, ...]
    answer_format: str

    def __str__(self) -> str:
        lines = [f"{self.reward}: {'HACKABLE' if self.hackable else 'clean'}", *self.reasons, self.advice]
        return "\n  - ".join(line for line in lines if line)


@dataclass(frozen=True)
class AuditReport:
    """The outcome of an audit; a rich console prints it as a table and a verdict for each reward.

    Attributes:
        verdicts: One per reward.
        scenes: Number of scenes on which each reward was evaluated.

    Example:
        >>> clean, hacked = (Verdict("mine", hackable, (), "", (), "text") for hackable in (False, True))
        >>> AuditReport((clean, clean), 12).hackable, AuditReport((clean, hacked), 12).hackable
        (False, True)
    """

    verdicts: tuple[Verdict, ...]
    scenes: int

    @property
    def rows(self) -> tuple[AuditRow, ...]:
        """The rows of all verdicts."""
        return tuple(row for verdict in self.verdicts for row in verdict.rows)

    @property
    def hackable(self) -> bool:
        """Whether any of the rewards can be hacked."""
        return any(verdict.hackable for verdict in self.verdicts)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: `hackable`, `scenes` and `verdicts`, each with its `rows`."""
        verdicts = [{**asdict(verdict), "reasons": list(verdict.reasons)} for verdict in self.verdicts]
        for verdict in verdicts:
            verdict["rows"] = list(verdict["rows"])
        return {"hackable": self.hackable, "scenes": self.scenes, "verdicts": verdicts}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        for verdict in self.verdicts:
            yield _table(verdict)
            for line in str(verdict).split("\n"):
                yield Text(printable(line), style="red" if verdict.hackable else "green")
            yield Text("")


def audit(
    rewards: str | Callable[..., Any] | Reward | Sequence[str | Callable[..., Any] | Reward],
    *,
    scenes: int | Sequence[Target | VolumeTarget] = SCENES,
    seed: int = 0,
    progress: float = 1.0,
) -> AuditReport:
    """Judge whether degenerate policies and tricks score more than honest answers.

    Each policy answers every scene in the grammar of the reward: in its `answer_format`, or in JSON if a perfect answer
    scores more there (an answer in words holds neither points nor confidences nor a slice). Rewards that read masks get
    the mask that belongs to the answer. All answers to a scene form one group, for rewards that compare answers. The
    module docstring of `segrl.audit.judging` has the rule of the verdict.

    Args:
        rewards: One or several rewards, each anything that `make_reward` takes; each is judged on its own.
        scenes: Number of synthetic scenes, or your own ground truths: `Target`s, and `VolumeTarget`s for rewards of
            volumes.
        seed: Seed of the scenes and of the noise.
        progress: Training progress in [0, 1], for schedules.

    Returns:
        The report; print it with rich, or read `hackable`, `verdicts` and `rows`.

    Raises:
        RewardError: A reward cannot be made or fails, or there is no scene for it.

    Example:
        >>> report = audit(["format", "box_f1"], scenes=12)
        >>> {verdict.reward: verdict.hackable for verdict in report.verdicts}
        {'format': True, 'box_f1': False}
    """
    given = [rewards] if isinstance(rewards, str | Reward) or callable(rewards) else list(rewards)
    verdicts, count = [], 0
    for made in map(_with_whole_groups, map(make_reward, given)):
        shown = _scenes(made, scenes, seed)
        count = max(count, len(shown))
        completion_format = _grammar(made, shown, progress)
        rows = _evaluate(made, shown, completion_format, [policy.name for policy in POLICIES], progress)
        verdicts.append(_judge(made, rows, completion_format.answer_format))
    return AuditReport(tuple(verdicts), count)


def _with_whole_groups(reward: Reward) -> Reward:
    """Return the reward with all answers to a scene as one group, whatever its group size."""
    source = reward.source
    if isinstance(source, Sum):
        source = Sum(tuple((_with_whole_groups(part), weight) for part, weight in source.parts))
    steps = []
    for step in reward.steps:
        if isinstance(step, GroupRelative):
            step = replace(step, group_size=None)
        elif isinstance(step, Gate) and isinstance(step.reward, Reward):
            step = replace(step, reward=_with_whole_groups(step.reward))
        steps.append(step)
    return replace(reward, source=source, steps=tuple(steps))


def _scenes(reward: Reward, scenes: int | Sequence[Target | VolumeTarget], seed: int) -> list[Scene]:
    if isinstance(scenes, int):
        found = make_scenes(scenes, volume=reward.volume, seed=seed)
    else:
        wanted = VolumeTarget if reward.volume else Target
        targets = [target for target in scenes if isinstance(target, wanted)]
        found = [Scene(target, n, "none" if target.empty else "given", seed) for n, target in enumerate(targets)]
    if not found:
        kind = "VolumeTarget" if reward.volume else "Target"
        raise RewardError(f"reward {reward.name!r}: no scenes; expected a positive number, or {kind}s")
    return found


def _grammar(reward: Reward, scenes: Sequence[Scene], progress: float) -> CompletionFormat:
    """Return the completion format of the policies: the reward's, or JSON if a perfect answer scores more there."""
    in_json = replace(reward.completion_format, answer_format="json")
    if reward.volume or reward.completion_format == in_json:
        return in_json
    perfect = []
    for completion_format in (reward.completion_format, in_json):
        (row,) = _evaluate(reward, scenes, completion_format, ["perfect"], progress)
        perfect.append(-np.inf if row.all is None else row.all)
    return in_json if perfect[1] > perfect[0] else reward.completion_format


def _evaluate(
    reward: Reward, scenes: Sequence[Scene], completion_format: CompletionFormat, names: Sequence[str], progress: float
) -> list[AuditRow]:
    """Return one row per policy that can answer in this grammar."""
    policies = [policy for policy in POLICIES if policy.name in names]
    predictions, chosen, who = [], [], []
    for scene in scenes:
        answers = [
            (n, answer(policy, scene, completion_format, reward.needs_mask)) for n, policy in enumerate(policies)
        ]
        for n, prediction in answers:
            if prediction is not None:
                predictions.append(prediction)
                chosen.append(scene)
                who.append(n)
    targets, groups = [scene.target for scene in chosen], [scene.number for scene in chosen]
    scores = reward.components(predictions, targets, groups=groups, progress=progress)
    parts = {name: np.array([np.nan if score is None else score for score in scores[name]]) for name in scores}
    total, is_empty = parts.pop("total"), np.array([target.empty for target in targets])
    kinds = np.array([scene.kind for scene in chosen])
    rows = []
    for n, policy in enumerate(policies):
        mine = np.array(who) == n
        if mine.any():
            rows.append(
                AuditRow(
                    policy.name,
                    policy.kind,
                    _mean(total[mine]),
                    _mean(total[mine & ~is_empty]),
                    _mean(total[mine & is_empty]),
                    {kind: _mean(total[mine & (kinds == kind)]) for kind in dict.fromkeys(kinds.tolist())},
                    {name: _mean(part[mine]) for name, part in parts.items()},
                )
            )
    return rows


def _mean(scores: np.ndarray) -> float | None:
    present = scores[~np.isnan(scores)]
    return float(present.mean()) if len(present) else None


def _judge(reward: Reward, rows: Sequence[AuditRow], answer_format: str) -> Verdict:
    """Apply the rule of the module docstring."""
    by_name = {row.policy: row for row in rows}
    means = [row.all for row in rows if row.all is not None]
    if not means:
        return Verdict(reward.name, False, (), NOWHERE, tuple(rows), answer_format)
    margin = TOLERANCE * (max(means) - min(means))
    reasons, winners = [], set()

    def compare(row: AuditRow, with_row: AuditRow, columns: Sequence[str], other: str) -> None:
        for column in columns:
            mine, limit = getattr(row, column), getattr(with_row, column)
            if mine is not None and limit is not None and mine > limit + margin:
                reasons.append(f"{row.policy}: {number(mine)} over {COLUMNS[column]}, {other} {number(limit)}")
                winners.add(row.policy)
                return

    for worse, better in pairwise(HONEST):
        compare(by_name[worse], by_name[better], ("lesions",), f"the honest {better!r}")
    best, poor = by_name["perfect"], by_name["poor"]
    coarse = best.lesions is not None and poor.lesions is not None and best.lesions <= poor.lesions + margin
    instead = {policy.name: policy.instead_of for policy in POLICIES if policy.instead_of}
    for row in rows:
        if row.kind == "trick":
            said = instead[row.policy]
            compare(row, by_name[said], tuple(COLUMNS), f"{said!r} without the trick")
        elif row.kind == "degenerate":
            compare(row, poor, ("all", "lesions"), "the honest 'poor'")
            compare(row, best, ("empty",), "an empty answer")
            if row.policy == UNREAD_BOX and reward.needs_target:
                _as_empty(row, best, margin, reasons, winners)
            if coarse and row.policy not in winners:
                _as_perfect(row, best, margin, reasons, winners)
    judged = tuple(replace(row, wins=row.policy in winners) for row in rows)
    advice = "" if not coarse else COARSE if reward.needs_target else FORM
    return Verdict(reward.name, bool(reasons), tuple(reasons), advice, judged, answer_format)


def _as_perfect(row: AuditRow, best: AuditRow, margin: float, reasons: list[str], winners: set[str]) -> None:
    """Rule 5."""
    for kind, limit in best.kinds.items():
        mine = row.kinds.get(kind)
        if kind != "none" and mine is not None and limit is not None and mine >= limit - margin:
            reasons.append(f"{row.policy}: {number(mine)} over scenes of kind {kind!r}, as all honest policies")
            winners.add(row.policy)
            return


def _as_empty(row: AuditRow, best: AuditRow, margin: float, reasons: list[str], winners: set[str]) -> None:
    """Rule 6."""
    if row.empty is not None and best.empty is not None and row.empty >= best.empty - margin:
        reasons.append(f"{row.policy}: {number(row.empty)} over {COLUMNS['empty']}, as an empty answer")
        winners.add(row.policy)


def _table(verdict: Verdict) -> Table:
    parts = list(verdict.rows[0].parts)
    table = Table(title=printable(f"{verdict.reward} ({verdict.answer_format})"), title_justify="left")
    table.add_column("policy")
    for title in ("all", "lesions", "empty", *map(printable, parts)):
        table.add_column(Text(title), justify="right")
    kind = verdict.rows[0].kind
    for row in verdict.rows:
        if row.kind != kind:
            table.add_section()
            kind = row.kind
        cells = [row.all, row.lesions, row.empty, *(row.parts[part] for part in parts)]
        shown = ["-" if cell is None else f"{cell:.3f}" for cell in cells]
        table.add_row(*(Text(cell, style="red" if row.wins else "") for cell in (row.policy, *shown)))
    return table
