"""Rewards of segrl for other training frameworks, which need not be installed to import this module.

Each function returns the object that the framework loads from a file of the user::

    from segrl.rewards import verl_compute_score
    compute_score = verl_compute_score("vision_reasoner")

The ground truth of a row is a mapping with the columns of `segrl.predictions.records` (`mask`, or `boxes` with `size`;
`query` and other texts), the same as JSON text, or a mask alone. None of these frameworks decodes masks, so rewards
that read a predicted mask are refused.

The signatures follow public copies of the frameworks, read in November 2026:

- verl 0.9 (verl-project/verl): `get_custom_reward_fn` at 302f740; reward managers at 247f1ac (naive), a9ba065 (batch)
- EasyR1 (hiyouga/EasyR1): `verl/workers/reward/function.py` at 46c6c21
- ms-swift 4 (modelscope/ms-swift): `swift/rewards/orm.py` at 0431a5d, `resolve_reward_funcs` at 006938b
"""

# n rows

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segrl.errors import RewardError, SegRLError
from segrl.predictions.prediction import Prediction
from segrl.predictions.records import TARGET_COLUMNS, read_answer, read_target
from segrl.predictions.target import METADATA_COLUMNS
from segrl.rewards.base import progress_of
from segrl.rewards.factory import make_reward
from segrl.rewards.nodes import Sum
from segrl.rewards.reward import AnyReward, Reward

__all__ = ["SwiftORM", "easyr1_compute_score", "swift_orm", "verl_compute_score"]


def verl_compute_score(reward: AnyReward, *, batch: bool = False, none: float = 0.0) -> Callable[..., Any]:
    """Return a reward as verl's custom reward function.

    verl finds the file by `reward.custom_reward_function.path` (older versions: `custom_reward_function.path`) and the
    variable by `.name`. It decodes completions without special tokens: if the segmentation token is one, make the
    reward with `require_seg=False`.

    Args:
        reward: Anything that `make_reward` takes.
        batch: For the reward manager "batch", which calls it for many rows; needed by rewards that compare the answers
            to one prompt. Rows belong to one prompt if `extra_info["index"]` and the ground truth are equal.
        none: The score of a row to which the reward, or a part of it, does not apply; verl knows no such rows.

    Returns:
        A picklable ``compute_score(data_source, solution_str, ground_truth, extra_info=None)``; with `batch` the
        arguments are lists, named in the plural. A score is a float; that of a sum a dict of its "score" and its parts
        before their weights, all of which verl logs.

    Raises:
        RewardError: If the reward reads predicted masks, or compares answers and `batch` is not set; when it is called,
            if a row cannot be scored.

    Example:
        >>> compute_score = verl_compute_score("format")
        >>> compute_score("lesions", "no answer", '{"size": [64, 64]}')
        0.0
    """
    made = _made(reward, "verl", "score")
    if made.compares_answers and not batch:
        raise RewardError(
            f"reward {made.name!r} compares the answers to one prompt; use batch=True and verl's reward manager 'batch'"
        )
    return VerlBatchScore(made, none) if batch else VerlScore(made, none)


@dataclass(frozen=True)
class VerlScore:
    """The function of `verl_compute_score` for single rows. Its last two arguments, for reward models, are not used.

    Example:
        >>> from segrl.rewards import make_reward
        >>> VerlScore(make_reward("format"))("lesions", "no answer", '{"size": [64, 64]}')
        0.0
    """

    reward: Reward
    none: float = 0.0

    def __call__(
        self,
        data_source: Any,
        solution_str: str,
        ground_truth: Any,
        extra_info: Any = None,
        reward_router_address: Any = None,
        reward_model_tokenizer: Any = None,
    ) -> float | dict[str, float]:
        """Return the score of one row."""
        return _scores(self.reward, "score", [solution_str], [ground_truth], [None], self.none)[0]


@dataclass(frozen=True)
class VerlBatchScore:
    """The function of `verl_compute_score` for batches.

    Example:
        >>> from segrl.rewards import make_reward
        >>> ranked = make_reward("format").group_relative("best")
        >>> texts = ["no answer", "<think>a</think><answer>No lesion is visible.<seg></answer>"]
        >>> VerlBatchScore(ranked)(["lesions"] * 2, texts, ['{"size": [64, 64]}'] * 2)
        [0.0, 1.0]
    """

    reward: Reward
    none: float = 0.0

    def __call__(
        self,
        data_sources: Sequence[Any],
        solution_strs: Sequence[str],
        ground_truths: Sequence[Any],
        extra_infos: Sequence[Any] | None = None,
        reward_router_address: Any = None,
        reward_model_tokenizer: Any = None,
    ) -> list[float | dict[str, float]]:
        """Return one score per row."""
        infos = [None] * len(solution_strs) if extra_infos is None else extra_infos
        ids = [info.get("index") if isinstance(info, Mapping) else None for info in infos]
        return _scores(self.reward, "score", solution_strs, ground_truths, ids, self.none)


def easyr1_compute_score(reward: AnyReward, *, none: float = 0.0) -> Callable[..., Any]:
    """Return a reward as EasyR1's batch reward function.

    EasyR1 finds both by `worker.reward.reward_function=path/to/file.py:compute_score`. Newer versions read
    `REWARD_NAME` and `REWARD_TYPE = "batch"` in the same file; older ones need `worker.reward.reward_type=batch`. As
    with verl, special tokens are not decoded unless `worker.reward.skip_special_tokens=false`.

    Args:
        reward: Anything that `make_reward` takes.
        none: The score of a row to which the reward, or a part of it, does not apply; EasyR1 knows no such rows.

    Returns:
        A picklable ``compute_score(reward_inputs)``. It reads "response" and "ground_truth" of each input, and returns
        for each a dict with "overall" and, of a sum, the parts before their weights. Rows with equal ground truths
        belong to one prompt.

    Raises:
        RewardError: If the reward reads predicted masks; when it is called, if a row cannot be scored.

    Example:
        >>> compute_score = easyr1_compute_score("format")
        >>> compute_score([{"response": "no answer", "response_length": 2, "ground_truth": ""}])
        [{'overall': 0.0}]
    """
    return EasyR1Score(_made(reward, "EasyR1", "overall"), none)


@dataclass(frozen=True)
class EasyR1Score:
    """The function of `easyr1_compute_score`."""

    reward: Reward
    none: float = 0.0

    def __call__(self, reward_inputs: list[dict[str, Any]]) -> list[dict[str, float]]:
        """Return one dict of scores per input."""
        if isinstance(reward_inputs, Mapping):
            raise RewardError(
                f"reward {self.reward.name!r}: EasyR1 passed a single row; set REWARD_TYPE = 'batch' beside "
                "compute_score, or worker.reward.reward_type=batch"
            )
        for number, row in enumerate(reward_inputs):
            for key in ("response", "ground_truth"):
                if key not in row:
                    raise RewardError(f"reward {self.reward.name!r}, row {number}: no {key!r}; found {_listed(row)}")
        texts, ground_truths = ([row[key] for row in reward_inputs] for key in ("response", "ground_truth"))
        scores = _scores(self.reward, "overall", texts, ground_truths, [None] * len(texts), self.none)
        return [score if isinstance(score, dict) else {"overall": score} for score in scores]


def swift_orm(reward: AnyReward, *, ground_truth: str | None = None, none: float | None = None) -> type[SwiftORM]:
    """Return a reward as a class of ms-swift's outcome rewards, for its dictionary `orms` in a plugin file.

    Args:
        reward: Anything that `make_reward` takes.
        ground_truth: The column of the data set that holds the ground truth, such as "solution"; by default the columns
            of `segrl.predictions.records` are read.
        none: The score of a row to which the reward does not apply. ms-swift leaves rows of None out, as TRL does.

    Returns:
        A class with the name of the reward, which ms-swift logs. ms-swift makes an instance ``cls(args=...)`` and calls
        it with the completions and the columns of the data set. Rows with equal ground truths belong to one prompt.

    Raises:
        RewardError: If the reward reads predicted masks; when it is called, if a row cannot be scored.

    Example:
        >>> swift_orm("format")()(["no answer"])
        [0.0]
    """
    made = _made(reward, "ms-swift", "")
    settings = {"reward": made, "ground_truth": ground_truth, "none": none}
    return type(made.name, (SwiftORM,), {**settings, "__doc__": made.info.summary})


class SwiftORM:
    """Base of the classes that `swift_orm` makes, in the form of `swift.rewards.ORM`, which need not be subclassed.

    Example:
        >>> from segrl.rewards import swift_orm
        >>> orm = swift_orm("format", none=-1.0)(args=None)
        >>> isinstance(orm, SwiftORM), orm.none, orm(["no answer", "nor here"])
        (True, -1.0, [0.0, 0.0])
    """

    reward: Reward
    ground_truth: str | None
    none: float | None

    def __init__(self, args: Any = None, **kwargs: Any) -> None:
        self.args = args

    def __call__(self, completions: list[str], **kwargs: Any) -> list[float | None]:
        """Return one score per completion."""
        if self.ground_truth is not None:
            if self.ground_truth not in kwargs and self.reward.needs_target:
                raise RewardError(
                    f"reward {self.reward.name!r}: no column {self.ground_truth!r}; found {_listed(kwargs)}"
                )
            given = kwargs.get(self.ground_truth)
            ground_truths = [None] * len(completions) if given is None else given
        else:
            columns = [column for column in (*TARGET_COLUMNS, *METADATA_COLUMNS) if kwargs.get(column) is not None]
            for column in columns:
                if len(kwargs[column]) != len(completions):
                    raise RewardError(
                        f"reward {self.reward.name!r}: column {column!r} has {len(kwargs[column])} rows for "
                        f"{len(completions)} completions"
                    )
            ground_truths = [{column: kwargs[column][row] for column in columns} for row in range(len(completions))]
        predictions, targets, groups = _read(self.reward, completions, ground_truths, [None] * len(completions))
        progress = progress_of(kwargs.get("trainer_state"))
        scores = self.reward.score_batch(predictions, targets, groups=groups, progress=progress)
        return [self.none if score is None else score for score in scores]

    def __reduce__(self) -> tuple[Any, ...]:  # the class is made at run time, so pickle cannot find it by name
        return _swift_instance, (self.reward, self.ground_truth, self.none, self.args)


def _swift_instance(reward: Reward, ground_truth: str | None, none: float | None, args: Any) -> SwiftORM:
    return swift_orm(reward, ground_truth=ground_truth, none=none)(args=args)


def _made(reward: AnyReward, framework: str, total: str) -> Reward:
    made = make_reward(reward)
    if made.needs_mask:
        raise RewardError(
            f"reward {made.name!r} reads predicted masks, and {framework} decodes none; leave those parts out"
        )
    if isinstance(made.source, Sum) and any(part.name == total for part, _ in made.source.parts):
        raise RewardError(
            f"reward {made.name!r}: a part is named {total!r}, as the whole is there; rename it with .named()"
        )
    return made


def _read(
    reward: Reward, texts: Sequence[Any], ground_truths: Sequence[Any], ids: Sequence[Hashable]
) -> tuple[list[Prediction], list[Any], list[Hashable]]:
    """Return predictions, targets and group ids; rows with equal ground truths share a target."""
    if not len(texts) == len(ground_truths) == len(ids):
        raise RewardError(
            f"reward {reward.name!r}: {len(texts)} completions, {len(ground_truths)} ground truths, {len(ids)} ids"
        )
    known: dict[str, Any] = {}
    predictions, targets, groups = [], [], []
    for row, (text, ground_truth) in enumerate(zip(texts, ground_truths, strict=True)):
        key = _key(ground_truth)
        try:
            if key not in known:
                known[key] = read_target(ground_truth) if reward.needs_target else None
            if known[key] is None and reward.needs_target:
                raise RewardError(
                    f"the ground truth is {ground_truth!r:.100}; expected 'mask', 'boxes' with 'size', or 'volume'"
                )
            predictions.append(read_answer(text, reward.completion_format, known[key]))
        except SegRLError as error:
            raise RewardError(f"reward {reward.name!r}, row {row}: {error}") from error
        targets.append(known[key])
        groups.append((ids[row], key))
    return predictions, targets, groups


def _scores(
    reward: Reward, total: str, texts: Sequence[Any], ground_truths: Sequence[Any], ids: Sequence[Hashable], none: float
) -> list[Any]:
    """Return one float per row, or for a sum one dict with `total` and the parts."""
    predictions, targets, groups = _read(reward, texts, ground_truths, ids)
    if not predictions:
        return []
    columns = reward.components(predictions, targets, groups=groups)
    totals = columns.pop("total")
    if not isinstance(reward.source, Sum):
        return [none if score is None else score for score in totals]
    rows = zip(totals, *columns.values(), strict=True)
    return [
        dict(zip((total, *columns), (none if score is None else score for score in row), strict=True)) for row in rows
    ]


def _key(ground_truth: Any) -> str:
    """Return a text that is equal for equal ground truths."""
    if isinstance(ground_truth, Mapping):
        return repr(sorted((str(key), _key(value)) for key, value in ground_truth.items()))
    if getattr(getattr(ground_truth, "dtype", None), "hasobject", False):  # whose bytes are addresses
        ground_truth = ground_truth.tolist()
    if hasattr(ground_truth, "tobytes"):  # an image or an array, which repr shortens
        return repr((getattr(ground_truth, "shape", None) or ground_truth.size, ground_truth.tobytes()))
    return repr(ground_truth)


def _listed(columns: Mapping[str, Any]) -> str:
    return ", ".join(sorted(columns)) or "none"
