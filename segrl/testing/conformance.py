"""Properties of every reward: on any batch, called by TRL, as a file, on hostile text."""

from __future__ import annotations

import gc
import math
import pickle
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import yaml
from hypothesis import strategies as st

from segrl.errors import RewardError
from segrl.predictions.completion_format import CompletionFormat
from segrl.predictions.frames import Frame
from segrl.predictions.prediction import Prediction
from segrl.predictions.target import Target, VolumeTarget
from segrl.rewards.reward import Reward
from segrl.rewards.serialization import dump_reward, from_dict, to_dict
from segrl.testing import strategies
from segrl.testing.answers import HOSTILE
from segrl.testing.subject import TOLERANCE, Property, Rows, Subject, Violation, array_fields, leaves, same

__all__ = ["CONFORMANCE", "any_batch", "check_hostile_text"]

SIZES = tuple(2**power for power in (12, 14, 16, 18, 20))  # characters of hostile texts, up to 1 MB
SLOWDOWN = 10.0  # limit for a text four times as long: 4 is linear, 16 quadratic
NOTICEABLE = 0.05  # seconds; shorter times are not compared
REPEATS = 3  # measurements of a text that seems too slow
ENDLESS = 5.0  # seconds; a longer measurement is not repeated
UNUSUAL = 730_451_129  # a seed that no reward uses
EDGE = 32  # pixels of the image that hostile texts are about


def any_batch(subject: Subject) -> st.SearchStrategy[Rows]:
    """Return the strategy for batches that the reward must be able to score."""
    batch = strategies.batches(
        volume=subject.info.volume,
        mask=None,  # whatever the reward declares: it may read what it does not declare
        probability=True,
        group_size=subject.group_size,
        formats=subject.formats,
    )
    return st.builds(_rows, batch, st.sampled_from([1.0, 0.0, 0.5]), st.integers(0, 5))


def _rows(batch: Any, progress: float, choice: int) -> Rows:
    predictions, targets, groups = batch
    return Rows(predictions, targets, groups, progress, choice)


def _scores(subject: Subject, rows: Rows) -> None:
    found = subject.scores_of(rows)
    if len(found) != len(rows.predictions):
        raise Violation(f"{len(rows.predictions)} scores, one per row", f"{len(found)} scores", rows)


def _leaves_input_alone(subject: Subject, rows: Rows) -> None:
    subject.scores_of(rows)
    for record, before in zip((*rows.predictions, *rows.targets), rows.before, strict=True):
        for name, array in array_fields(record).items():
            if not np.array_equal(array, before[name]):
                array_name = f"{type(record).__name__}.{name}"
                raise Violation(
                    f"{array_name} left as it was", f"it was changed in place, from {before[name].tolist()}", rows
                )


def _in_range(subject: Subject, rows: Rows) -> None:
    low, high = subject.reward.range or (-math.inf, math.inf)
    for score in subject.scores_of(rows):
        if score is not None and not low - TOLERANCE <= score <= high + TOLERANCE:
            raise Violation(f"scores in [{low:g}, {high:g}], as declared", f"{score:g}", rows)


def _deterministic(subject: Subject, rows: Rows) -> None:
    first, second = subject.scores_of(rows), subject.score(rows)
    if first != second:
        raise Violation("the same scores for the same rows", f"{first}, then {second}", rows)


def _reads_what_it_declares(subject: Subject, rows: Rows) -> None:
    """Leave out what the reward does not declare; scores must not change, and nothing may fail."""
    info = subject.info
    changes: dict[str, Callable[[Prediction, Any], tuple[Prediction, Any]]] = {}
    if not info.needs_mask:
        changes["needs_mask"] = lambda said, target: (replace(said, mask=None, probability=None), target)
    elif not info.needs_probability:
        changes["needs_probability"] = lambda said, target: (replace(said, probability=None), target)
    if not info.needs_target and not subject.has_trl_function:
        changes["needs_target"] = lambda said, target: (said, None)
    for need, change in changes.items():
        part = {"needs_target": "the ground truth"}.get(need, "a predicted " + need.removeprefix("needs_"))
        first, second = subject.scores_of(rows), subject.score(rows.changed(change))
        if not same(first, second):
            expected = f"the same scores with and without {part}, as it does not declare {need}=True"
            raise Violation(expected, f"{first} with, {second} without", rows)


def _leaves_random_state_alone(subject: Subject, rows: Rows) -> None:
    kept = random.getstate(), np.random.get_state()
    try:
        random.seed(UNUSUAL)
        np.random.seed(UNUSUAL)
        before = random.random(), np.random.random()
        random.seed(UNUSUAL)
        np.random.seed(UNUSUAL)
        subject.score(rows)
        after = random.random(), np.random.random()
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
    if after != before:
        raise Violation(
            "the global state of random and numpy.random left alone, since training draws from it",
            "it was seeded or drawn from; make a numpy.random.default_rng of your own",
            rows,
        )


def _batch_equals_single(subject: Subject, rows: Rows) -> None:
    whole = subject.scores_of(rows)
    compares = subject.reward.compares_answers
    keys = rows.groups if compares else range(len(whole))
    for key in dict.fromkeys(keys):
        members = [row for row, other in enumerate(keys) if other == key]
        apart, together = subject.score(rows.some(members)), [whole[row] for row in members]
        if not same(apart, together):
            unit = "the answers to each prompt" if compares else "each row"
            found = f"from row {members[0]} on {together} in the batch, {apart} alone"
            raise Violation(f"the same scores for {unit} alone as in the batch", found, rows)


def _any_order(subject: Subject, rows: Rows) -> None:
    backwards = range(len(rows.predictions))[::-1]
    forwards, turned = subject.scores_of(rows), subject.score(rows.some(backwards))[::-1]
    if not same(turned, forwards):
        raise Violation("the same scores in any order of the rows", f"{forwards}, in reversed order {turned}", rows)


def _called_by_trl(subject: Subject, rows: Rows) -> None:
    columns: dict[str, Any] = {}
    expected: Any = "scores"
    try:
        if subject.info.needs_mask:  # as SegGRPOTrainer calls it
            columns = {"prediction": list(rows.predictions), "target": list(rows.targets)}
        else:  # as TRL's own trainer does: predictions are parsed from the text
            column = "volume" if subject.info.volume else "mask"
            columns = {column: [target.mask for target in rows.targets]}
            if subject.info.volume:
                columns["spacing_mm"] = [target.spacing_mm and list(target.spacing_mm) for target in rows.targets]
            rows = rows.changed(partial(_parsed_again, subject.reward.completion_format))
        expected = subject.score(rows)
        found = subject.called(rows, **columns)
    except Violation:
        raise
    except Exception as error:  # as in `Subject.score`
        found = f"{type(error).__name__}: {error}"
    if not isinstance(found, list) or {*map(type, found)} - {float, type(None)} or not same(found, expected):
        raise Violation(f"{expected} from TRL's call with unknown columns, as from score_batch", str(found), rows)


def _parsed_again(completion_format: CompletionFormat, prediction: Prediction, target: Any) -> tuple[Prediction, Any]:
    size = (target.width, target.height)
    frame = completion_format.frame_of(size, size)
    return completion_format.parse(prediction.text, frame), target


def _pickles(subject: Subject, rows: Rows) -> None:
    try:
        copy = pickle.loads(pickle.dumps(subject.reward))
    except Exception as error:  # pickle raises many types
        found = f"{type(error).__name__}: {error}"
        raise Violation("a reward that pickles, as worker processes need it", found) from error
    _equal_reward(subject, copy, rows, "unpickled")


def _not_picklable(subject: Subject) -> str | None:
    for leaf in leaves(subject.reward):
        function = leaf.function
        found: Any = sys.modules.get(function.__module__)
        for part in getattr(function, "__qualname__", "").split("."):
            found = getattr(found, part, None)
        if found is not function and hasattr(function, "__qualname__"):
            return f"not applicable: {function.__qualname__} is not at the top of a module"
    return None


def _survives_yaml(subject: Subject, rows: Rows) -> None:
    try:
        copy = from_dict(yaml.safe_load(dump_reward(subject.reward)))
    except (ValueError, TypeError, yaml.YAMLError) as error:
        found = f"{type(error).__name__}: {error}"
        raise Violation("a reward that can be written as YAML and read from it", found) from error
    _equal_reward(subject, copy, rows, "read from its YAML")


def _not_writable(subject: Subject) -> str | None:
    try:
        to_dict(subject.reward)
    except RewardError as error:
        return f"not applicable: {error}"
    return None


def _equal_reward(subject: Subject, copy: Reward, rows: Rows, how: str) -> None:
    if copy != subject.reward:
        raise Violation(f"a reward that is equal when {how}", f"{subject.reward!r}, then {copy!r}")
    first, second = subject.scores_of(rows), Subject(copy, subject.columns).score(rows)
    if not same(first, second):
        raise Violation(f"the same scores when {how}", f"{first}, then {second}", rows)


def _undeclared_range(subject: Subject) -> str | None:
    return None if subject.reward.range else "not declared"


CONFORMANCE = (
    Property("scores", any_batch, _scores),
    Property("input unchanged", any_batch, _leaves_input_alone),
    Property("range", any_batch, _in_range, _undeclared_range),
    Property("deterministic", any_batch, _deterministic),
    Property("reads what it declares", any_batch, _reads_what_it_declares),
    Property("random state", any_batch, _leaves_random_state_alone),
    Property("batch equals single", any_batch, _batch_equals_single),
    Property("any order of rows", any_batch, _any_order),
    Property("called by TRL", any_batch, _called_by_trl),
    Property("pickles", any_batch, _pickles, _not_picklable, max_examples=5),
    Property("YAML", any_batch, _survives_yaml, _not_writable, max_examples=5),
)


# --- hostile text


def check_hostile_text(subject: Subject) -> None:
    """Score texts of up to 1 MB: no exception, scores in the range, and time that grows with their length only.

    Raises:
        Violation: Naming the kind of text.
    """
    low, high = subject.reward.range or (-math.inf, math.inf)
    for kind in HOSTILE:
        before = math.inf
        for size in SIZES:
            where = f"{size} characters of {kind}"
            try:
                seconds, scores = _timed(subject, kind, size)
                for _ in range(REPEATS):  # the machine may have been busy
                    if seconds <= SLOWDOWN * max(before, NOTICEABLE) or seconds > ENDLESS:
                        break
                    before = max(before, _timed(subject, kind, size // 4)[0])
                    seconds = min(seconds, _timed(subject, kind, size)[0])
            except Violation as violation:
                raise Violation(violation.expected, f"{violation.found}, for {where}") from violation.__cause__
            for score in scores:
                if score is not None and not low - TOLERANCE <= score <= high + TOLERANCE:
                    raise Violation(f"scores in [{low:g}, {high:g}], as declared", f"{score:g} for {where}")
            if seconds > SLOWDOWN * max(before, NOTICEABLE):
                found = f"{before:.2g} s of computing for {size // 4} characters of {kind}, {seconds:.2g} s for {size}"
                raise Violation("time that grows with the length of the text", found)
            before = seconds


def _timed(subject: Subject, kind: str, size: int) -> tuple[float, list[float | None]]:
    rows = _hostile_rows(subject, kind, size, subject.reward.completion_format)
    collects = gc.isenabled()
    gc.disable()  # as `timeit` does: a collection takes time that depends on everything else in memory
    try:
        start = time.process_time()
        scores = subject.score(rows)
        return time.process_time() - start, scores
    finally:
        if collects:
            gc.enable()


def _hostile_rows(subject: Subject, kind: str, size: int, completion_format: CompletionFormat) -> Rows:
    prediction = _hostile(kind, size, completion_format)
    mask = np.zeros((EDGE, EDGE), dtype=bool)
    mask[4:12, 6:20] = True
    volume = subject.info.volume
    if subject.info.needs_mask and (volume or prediction.has_seg):
        prediction = prediction.with_mask(np.roll(mask[None] if volume else mask, 3, axis=-1))
    target = VolumeTarget.from_mask(mask[None]) if volume else Target.from_mask(mask)
    n = subject.group_size or 1
    return Rows([prediction] * n, [target] * n, [0] * n)


@lru_cache(maxsize=len(HOSTILE) * len(SIZES))
def _hostile(kind: str, size: int, completion_format: CompletionFormat) -> Prediction:
    return completion_format.parse(HOSTILE[kind](size, completion_format), Frame("original_px", (EDGE, EDGE)))
