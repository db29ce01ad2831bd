"""Rewards by name and what each declares about itself: built in, registered, or of installed packages.

`segrl.rewards.forms` has the forms that a reward function may have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from segrl.errors import RewardError, unknown_name
from segrl.registry.plugins import find_plugins, load_plugin, plugin_origin
from segrl.registry.resolve import origin_of, resolve_attribute, same_definition, summary_of
from segrl.rewards.forms import Form, form_of, full_name, settings_of

__all__ = [
    "ENTRY_POINT_GROUP",
    "FORMAT_SETTINGS",
    "Range",
    "RewardInfo",
    "adopt",
    "info_of",
    "list_rewards",
    "merged_needs",
    "register_preset",
    "register_reward",
    "registered_infos",
    "registered_name",
    "reward_info",
]

ENTRY_POINT_GROUP = "segrl.rewards"
FORMAT_SETTINGS = frozenset({"frame", "seg_token", "require_seg", "require_reasoning", "answer_format", "end_tokens"})
CLAIMS = {"invariant": ("box_order", "flip", "rescale"), "monotone": ("boxes", "mask")}
EMPTY_SIDES = ("both", "prediction", "target")

Range = tuple[float, float]
_Registered = TypeVar("_Registered", bound=Callable[..., Any])
_registered: dict[str, RewardInfo] = {}


@dataclass(frozen=True, eq=False)
class RewardInfo:
    """Declarations of a reward; `segrl.testing.check_reward` tests the claims, `segrl rewards describe` prints them.

    Attributes:
        name: Name in the registry.
        function: The function or class; None where a package's reward could not be imported.
        form: "function", "batch", "group" (classes), "trl", "preset" (a factory) or "composition".
        needs_mask: It reads `Prediction.mask`.
        needs_target: It reads the ground truth.
        needs_probability: It reads `Prediction.probability` where there is one.
        volume: Its target is a `VolumeTarget`.
        range: (low, high) of the scores, or a function of all settings that returns it; None if not declared.
        empty: Score of a valid answer when "both" sides are empty, only the "prediction", or only the "target"; or a
            function of all settings that returns it; None if not declared.
        invariant: Changes that leave the score as it is: "box_order", "flip" (mirroring image, boxes, points and
            masks), "rescale" (enlarging all of them by a whole number).
        monotone: Where more overlap with the ground truth never lowers the score: "boxes", "mask"; or a function of all
            settings that returns it.
        completion_format: Settings of `CompletionFormat` that differ from its defaults.
        equation: The formula as text.
        source: Paper and symbol.
        origin: Package and version, or module, that it comes from.
        settings: Its settings with their defaults; `inspect.Parameter.empty` for a required one.

    Example:
        >>> from segrl.rewards import reward_info
        >>> reward_info("box_f1").range, list(reward_info("box_f1").settings)
        ((0.0, 1.0), ['min_iou', 'require_valid'])
    """

    name: str
    function: Callable[..., Any] | None
    form: Form = "function"
    needs_mask: bool = False
    needs_target: bool = True
    needs_probability: bool = False
    volume: bool = False
    range: Range | Callable[..., Range] | None = None
    empty: Mapping[str, float | None] | Callable[..., Mapping[str, float | None]] | None = None
    invariant: tuple[str, ...] = ()
    monotone: tuple[str, ...] | Callable[..., Sequence[str]] = ()
    completion_format: Mapping[str, Any] = field(default_factory=dict)
    equation: str = ""
    source: str = ""
    origin: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """First paragraph of the docstring as one line."""
        return "" if self.function is None else summary_of(self.function)

    def resolved(self, settings: Mapping[str, Any]) -> RewardInfo:
        """Return a copy whose `range`, `empty` and `monotone` are values, computed for these settings."""
        known = {**self.settings, **settings}
        scores = self.range(**known) if callable(self.range) else self.range
        empty = self.empty(**known) if callable(self.empty) else self.empty
        monotone = self.monotone(**known) if callable(self.monotone) else self.monotone
        return replace(self, range=scores, empty=empty, monotone=tuple(monotone))


def register_reward(
    name: str,
    *,
    needs_mask: bool = False,
    needs_target: bool = True,
    needs_probability: bool = False,
    volume: bool = False,
    range: Range | Callable[..., Range] | None = None,
    empty: Mapping[str, float | None] | Callable[..., Mapping[str, float | None]] | None = None,
    invariant: Sequence[str] = (),
    monotone: Sequence[str] | Callable[..., Sequence[str]] = (),
    completion_format: Mapping[str, Any] | None = None,
    equation: str = "",
    source: str = "",
) -> Callable[[_Registered], _Registered]:
    """Register a reward function or class under a name.

    Args:
        name: Name for `make_reward`, for configuration files and for logs.
        needs_mask: Whether it reads `Prediction.mask`; a trainer without masks refuses it.
        needs_target: False for rewards of the text alone, which need no ground truth.
        needs_probability: Whether it reads `Prediction.probability`; trainers then keep the probabilities.
        volume: Whether its target is a `VolumeTarget`.
        range: Declared (low, high) of the scores; this and the following as in `RewardInfo`.
        empty: Declared scores of empty sides.
        invariant: Declared invariances.
        monotone: Declared monotonicity.
        completion_format: Default settings of `CompletionFormat`, such as ``{"answer_format": "json"}``.
        equation: The formula as text.
        source: Paper and symbol.

    Returns:
        A decorator that returns the function or class unchanged.

    Raises:
        RewardError: The name is taken by another function (the same function of the same module replaces itself, so
            that a notebook's cell may run twice), the form is unknown, or a setting has the name of a
            `CompletionFormat` setting.
        UnknownNameError: A claim or a completion format setting does not exist.

    Example:
        >>> from segrl.rewards import make_reward
        >>> @register_reward("brevity", needs_target=False, range=(0, 1))
        ... def brevity(prediction, target, *, limit=200):
        ...     return float(len(prediction.text) <= limit)
        >>> make_reward("brevity", limit=10).settings
        {'limit': 10}
    """
    _check_claims(name, range, empty, {"invariant": invariant, "monotone": () if callable(monotone) else monotone})
    for setting in completion_format or ():
        if setting not in FORMAT_SETTINGS:
            raise unknown_name(f"completion format setting of reward {name!r}", setting, FORMAT_SETTINGS)

    def register(function: _Registered) -> _Registered:
        form = form_of(function, name)
        _add(
            RewardInfo(
                name=name,
                function=function,
                form=form,
                needs_mask=needs_mask,
                needs_target=needs_target and form != "trl",
                needs_probability=needs_probability,
                volume=volume,
                range=range,
                empty=empty,
                invariant=tuple(invariant),
                monotone=monotone if callable(monotone) else tuple(monotone),
                completion_format=completion_format or {},
                equation=equation,
                source=source,
                origin=origin_of(function),
                settings=settings_of(function, form),
            )
        )
        return function

    return register


def register_preset(
    name: str, *, equation: str = "", source: str = ""
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a factory ``(**settings) -> Reward``, usually a `weighted_sum`, under a name.

    Args:
        name: Name for `make_reward`, which calls the factory.
        equation: The formula as text.
        source: Paper and symbol.

    Raises:
        RewardError: The name is taken, or a setting has the name of a `CompletionFormat` setting.

    Example:
        >>> from segrl.rewards import make_reward, weighted_sum
        >>> @register_preset("boxes_and_format")
        ... def boxes_and_format(*, boxes=2.0):
        ...     return weighted_sum({"format": 1.0, "box_f1": boxes})
        >>> make_reward("boxes_and_format", boxes=3.0).range
        (0.0, 4.0)
    """

    def register(factory: Callable[..., Any]) -> Callable[..., Any]:
        settings = settings_of(factory, "preset")
        _add(RewardInfo(name, factory, "preset", equation=equation, source=source, origin=origin_of(factory),
                        settings=settings))  # fmt: skip
        return factory

    return register


def list_rewards() -> list[str]:
    """Return the sorted names of all rewards: built in, registered, and of installed packages (not imported).

    Example:
        >>> [name for name in list_rewards() if name.startswith("slice_")]
        ['slice_boxes', 'slice_format', 'slice_visibility']
    """
    return sorted({*_registered, *find_plugins(ENTRY_POINT_GROUP)})


def reward_info(name: str) -> RewardInfo:
    """Return what a reward declares; of the installed packages, only the one that brings this name is imported.

    Args:
        name: A name from `list_rewards`, or "module:attribute".

    Raises:
        UnknownNameError: For a name that does not exist; it suggests the closest one.
        RewardError: It cannot be imported, or is neither a function nor a class of a known form.

    Example:
        >>> reward_info("box_iou").invariant
        ('box_order', 'flip', 'rescale')
    """
    if name not in _registered:
        if ":" in name:
            function = resolve_attribute(name, "reward", RewardError)
            return info_of(function, registered_name(function) or name.rpartition(":")[2].rpartition(".")[2])
        if name not in find_plugins(ENTRY_POINT_GROUP):
            raise unknown_name("reward", name, list_rewards())
        adopt(name, load_plugin(ENTRY_POINT_GROUP, name, "reward", RewardError))
    return _registered[name]


def adopt(name: str, function: Callable[..., Any]) -> RewardInfo:
    """Register what the entry point of an installed package has brought, and return its record."""
    if name not in _registered:  # the module may have registered it itself while it was imported
        register_reward(name)(function)
    _registered[name] = replace(_registered[name], origin=plugin_origin(find_plugins(ENTRY_POINT_GROUP)[name][0]))
    return _registered[name]


def registered_infos() -> list[RewardInfo]:
    """Return the records of the rewards that are registered in this process, sorted by name."""
    return [_registered[name] for name in sorted(_registered)]


def merged_needs(infos: Iterable[RewardInfo]) -> dict[str, Any]:
    """Return what a reward needs that evaluates all of these."""
    given = list(infos)
    needs = ("needs_mask", "needs_target", "needs_probability", "volume")
    return {need: any(getattr(info, need) for info in given) for need in needs}


def info_of(function: Callable[..., Any], name: str) -> RewardInfo:
    """Return the record of a function or class, registered under this name or not registered at all."""
    known = _registered.get(name)
    if known is not None and known.function is function:
        return known
    form = form_of(function, name)
    return RewardInfo(
        name,
        function,
        form,
        needs_target=form != "trl",
        origin=origin_of(function),
        settings=settings_of(function, form),
    )


def registered_name(function: Callable[..., Any]) -> str | None:
    """Return the name under which a function or class is registered, or None."""
    return next((name for name, info in _registered.items() if info.function is function), None)


def _add(info: RewardInfo) -> None:
    known = _registered.get(info.name)
    if known is not None and not same_definition(known.function, info.function):
        by = full_name(known.function)
        raise RewardError(f"reward {info.name!r} is registered already, by {by}; choose another name")
    if clash := FORMAT_SETTINGS & info.settings.keys():
        raise RewardError(
            f"reward {info.name!r} has a parameter {min(clash)!r}, which is a setting of every reward; rename it"
        )
    _registered[info.name] = info


def _check_claims(name: str, range: Any, empty: Any, claims: Mapping[str, Sequence[str]]) -> None:
    for kind, given in claims.items():
        for claim in given:
            if claim not in CLAIMS[kind]:
                raise unknown_name(f"{kind} claim of reward {name!r}", claim, CLAIMS[kind])
    if range is not None and not callable(range) and (len(range) != 2 or not range[0] <= range[1]):
        raise RewardError(f"reward {name!r}: range={range!r}; expected (low, high) with low <= high")
    for side in empty if isinstance(empty, Mapping) else ():
        if side not in EMPTY_SIDES:
            raise unknown_name(f"empty case of reward {name!r}", side, EMPTY_SIDES)
