"""`check_reward`: test a reward against what every reward must do, and against its own claims."""

# D slices, H/W pixels

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from segrl.errors import RewardCheckError
from segrl.predictions.prediction import Prediction
from segrl.predictions.target import Target, VolumeTarget
from segrl.rewards.factory import make_reward
from segrl.rewards.reward import Reward
from segrl.testing import strategies  # first: its error names what to install if hypothesis is missing
from segrl.testing.claims import CLAIMS
from segrl.testing.conformance import CONFORMANCE, any_batch, check_hostile_text
from segrl.testing.corners import check_corners
from segrl.testing.subject import Property, Rows, Subject, Violation

from hypothesis import HealthCheck, Phase, Verbosity, given, settings  # isort: skip
from hypothesis import seed as with_seed  # isort: skip
from hypothesis.errors import Flaky  # isort: skip

__all__ = ["CheckReport", "check_reward"]

HOSTILE_TEXT = "hostile text"
ROUND = 6  # examples from one seed; later ones would mostly be small changes of the first ones
_SETTINGS = settings(
    database=None,
    deadline=None,
    derandomize=False,
    phases=(Phase.generate, Phase.shrink),
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
    verbosity=Verbosity.quiet,
)
DRAWN_EDGE = 40  # pixels; larger masks are printed as runs


@dataclass(frozen=True)
class CheckReport:
    """The outcomes of `check_reward` for a reward that passed.

    Attributes:
        reward: Name of the reward.
        outcomes: "passed", "not declared" or "not applicable: reason", by property.
        examples: Number of examples.
        seconds: Duration.
        numbers: How often the reward returned a number, over the examples.
        nones: How often it returned None.
        constant: The number, if it was always the same one.

    Example:
        >>> report = CheckReport("mine", {"scores": "passed", "range": "not declared"}, examples=50, seconds=1.0)
        >>> report.passed
        ('scores',)
    """

    reward: str
    outcomes: Mapping[str, str]
    examples: int
    seconds: float
    numbers: int = 0
    nones: int = 0
    constant: float | None = None

    @property
    def passed(self) -> tuple[str, ...]:
        """Names of the properties that were tested."""
        return tuple(name for name, outcome in self.outcomes.items() if outcome == "passed")

    def __str__(self) -> str:
        width = max(map(len, self.outcomes))
        lines = [f"  {name:{width}}  {outcome}" for name, outcome in self.outcomes.items()]
        scores = f"  returned {self.numbers} numbers and {self.nones} times None"
        if self.constant is not None:
            scores += f"; WARNING: always the number {self.constant:g}, so nothing was tested but that"
        return "\n".join([f"{self.reward}: {self.examples} examples, {self.seconds:.1f} s", scores, *lines])


def check_reward(
    reward: str | Callable[..., Any] | Reward,
    *,
    max_examples: int = 50,
    seed: int = 0,
    columns: Mapping[str, Any] | None = None,
    **settings: Any,
) -> CheckReport:
    """Test a reward with generated answers and ground truths; this one call can be the whole test of a plugin.

    Every reward must

    - return one finite number or None per row, whatever the text, in its declared range, and the same each time;
    - not depend on the other rows or their order (a group-relative one: on other groups), nor change its input or the
      global random state;
    - read masks, probabilities and the ground truth only if it declares that: examples are with and without each of
      them, whatever it declares;
    - return a number for some example. A reward that always returns the same one passes with a warning;
    - work when TRL calls it, with columns that it does not know; survive pickle and YAML;
    - score texts of 1 MB in time that grows linearly with their length;
    - if it reads the ground truth, not score an invalid text higher than a valid one with the same content, nor a
      hallucination higher than an empty answer where nothing is to be found.

    Its claims are tested too, see `segrl.rewards.register_reward`:

    - `empty`: exactly these scores.
    - `invariant`: "box_order" shuffles the boxes of both sides (with confidences, and with points if P = N); "flip"
      mirrors everything across, down or both; "rescale" enlarges everything two or three times. The text stays.
    - `monotone`: "boxes" gives each of one to three lesions a box that is too large, too small or moved, then less so,
      then right; "mask" corrects wrong pixels. The score must never fall.

    Ground truths are small images with up to several lesions, or volumes; masks have their shape. Answers are drawn
    from `segrl.testing.strategies.predictions`, in words and in JSON; for a volume in the reward's own format, which
    must be JSON to name a slice.

    Args:
        reward: Anything that `make_reward` takes.
        max_examples: Number of examples of each kind.
        seed: Seed of the examples.
        columns: Values of the data set columns that a TRL reward function reads, other than segrl's own, the same for
            all rows.
        **settings: As in `make_reward`.

    Returns:
        The properties that were tested; print it.

    Raises:
        RewardCheckError: An `AssertionError` with the property that fails, what was expected and found, and the
            smallest counterexample.
        RewardError: The reward cannot be made.

    Example:
        >>> def right_number(prediction, target):
        ...     return float(prediction.valid and len(prediction.boxes) == len(target.boxes))
        >>> "invalid text" in check_reward(right_number, max_examples=5).passed
        True
    """
    start = time.perf_counter()
    made = make_reward(reward, **settings)
    if made.volume and made.completion_format.answer_format == "text":
        made = make_reward(made, answer_format="json")
    subject = Subject(made, columns or {})
    properties = (*CONFORMANCE, *CLAIMS)
    outcomes = {item.name: item.skipped(subject) or "passed" for item in properties}
    batches: dict[Any, list[Property]] = {}
    for item in properties:
        if outcomes[item.name] == "passed":
            batches.setdefault((item.examples, item.max_examples), []).append(item)
    examples = 0
    for (kind, limit), items in batches.items():
        examples += _search(subject, kind(subject), items, min(max_examples, limit), seed)
        if kind is any_batch and limit > max_examples:
            examples += _check_corners(subject, items)
    try:
        check_hostile_text(subject)
    except Violation as violation:
        raise _error(subject, HOSTILE_TEXT, violation) from violation.__cause__
    outcomes[HOSTILE_TEXT] = "passed"
    report = CheckReport(made.name, outcomes, examples, time.perf_counter() - start, **_returned(subject))
    if report.constant is not None:
        warnings.warn(
            f"reward {made.name!r} returned {report.constant:g} for all {report.numbers} answers that it scored: a "
            "constant teaches nothing; does it read a column or a text that the examples do not have?",
            stacklevel=2,
        )
    return report


def _check_corners(subject: Subject, items: list[Property]) -> int:
    tried, failed = check_corners(subject, items)
    if failed is not None:
        name, violation = failed
        raise _error(subject, name, violation) from violation.__cause__
    return tried


def _returned(subject: Subject) -> dict[str, Any]:
    """Return how often the reward returned what; raise if it never returned a number."""
    counts = dict(subject.returned)
    nones = counts.pop(None, 0)
    if not counts:
        found = f"None for all {nones} answers"
        raise _error(subject, "numbers", Violation("a number for at least one example", found))
    return {
        "numbers": sum(counts.values()),
        "nones": nones,
        "constant": next(iter(counts)) if len(counts) == 1 else None,
    }


def _search(subject: Subject, examples: Any, items: Sequence[Property], count: int, seed: int) -> int:
    """Test the properties on examples; return their number, or raise for the smallest counterexample."""
    tried, failed = 0, (items[0].name, Violation("the same scores for the same rows", "other scores when repeated"))

    def try_one(example: Any) -> None:
        nonlocal tried, failed
        tried += 1
        for item in items:
            try:
                item.holds(subject, example)
            except Violation as violation:
                failed = item.name, violation
                raise

    rounds = -(-count // ROUND)
    for n in range(rounds):
        run = settings(_SETTINGS, max_examples=min(ROUND, count - n * ROUND))
        try:
            with_seed(seed * 1000 + n)(run(given(examples)(try_one)))()
        except Violation:
            name, violation = failed
            raise _error(subject, name, violation) from violation.__cause__
        except Flaky:  # the example did not fail again
            name, violation = failed
            found = f"{violation.found}; not when repeated"
            flaky = Violation("the same scores for the same rows", found, violation.rows)
            raise _error(subject, "deterministic", flaky) from None
    return tried


def _error(subject: Subject, name: str, violation: Violation) -> RewardCheckError:
    return RewardCheckError(subject.reward.name, name, violation.expected, violation.found, _readable(violation.rows))


def _readable(rows: Rows | None) -> str:
    """Return an example as text."""
    if rows is None:
        return ""
    lines = []
    shown: Any = None
    for n, (prediction, target) in enumerate(zip(rows.predictions, rows.targets, strict=True)):
        lines += [f"row {n}", *_prediction_lines(prediction)]
        lines += ["  ground truth: as above"] if target is shown else _target_lines(target)
        shown = target
    if rows.progress != 1.0:
        lines.append(f"progress: {rows.progress}")
    return "\n".join(lines)


def _prediction_lines(prediction: Prediction) -> list[str]:
    text = prediction.text if len(prediction.text) <= 400 else f"{prediction.text[:400]}..."
    lines = [f"  text: {text!r} ({prediction.status.value})", f"  boxes: {prediction.boxes.tolist()}"]
    if len(prediction.points):
        lines.append(f"  points: {prediction.points.tolist()}")
    if prediction.scores is not None:
        lines.append(f"  scores: {prediction.scores.tolist()}")
    if prediction.slice_index is not None:
        lines.append(f"  slice_index: {prediction.slice_index}")
    if prediction.mask is not None:
        lines += _drawn("mask", prediction.mask)
    if prediction.probability is not None:
        inside = np.unique(prediction.probability).tolist()
        lines.append(f"  probability: {inside}")
    return lines


def _target_lines(target: Any) -> list[str]:
    if target is None:
        return ["  no ground truth"]
    given = {column: text for column, text in target.to_dict().items() if text}
    texts = [] if given == {"query": strategies.QUERY} else [f"  texts: {given}"]
    if isinstance(target, Target):
        return [f"  true boxes: {target.boxes.tolist()}", *_drawn("true mask", target.mask), *texts]
    assert isinstance(target, VolumeTarget)
    return [*_drawn("true mask", target.mask), *texts]


def _drawn(name: str, mask: np.ndarray) -> list[str]:
    """Return the lines of a mask, or of each slice of a volume, under its name."""
    if mask.ndim == 2:
        return [f"  {name}:", *_mask_lines(mask)]
    return [line for k, part in enumerate(mask) for line in (f"  {name}, slice {k}:", *_mask_lines(part))]


def _mask_lines(mask: np.ndarray) -> list[str]:
    """Return a small mask as rows of `#` and `.`, a large one as the runs of foreground in each row."""
    if max(mask.shape) <= DRAWN_EDGE:
        return ["    " + "".join(".#"[int(pixel)] for pixel in row) for row in mask]
    lines = []
    for y, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row, [0]])))
        if len(edges):
            lines.append(f"    row {y}: " + ", ".join(f"{a} to {b - 1}" for a, b in edges.reshape(-1, 2).tolist()))
    return lines or [f"    empty, {mask.shape}"]
