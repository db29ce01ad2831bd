"""The registry: rewards by name, what each declares about itself, and those that installed packages bring.

A reward has one of three forms:

- a function ``(prediction, target, **settings) -> float | None``,
- a class with ``score_batch(predictions, targets)``, or with ``score_group(predictions, targets)`` for the answers to
  one prompt; its settings are the arguments of its constructor,
- a TRL reward function ``(completions, ..., **columns) -> list``; recognised by its parameter `completions`.

Each may be `async`. In functions, a parameter named `log_metric` or `progress` is filled in and is not a setting.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, TypeVar

from segrl._version import __version__
from segrl.errors import RewardError, unknown_name

__all__ = ["ENTRY_POINT_GROUP", "RewardInfo", "list_rewards", "register_preset", "register_reward", "reward_info"]

ENTRY_POINT_GROUP = "segrl.rewards"
FILLED_IN = frozenset({"log_metric", "progress"})
FORMAT_SETTINGS = frozenset({"frame", "seg_token", "require_seg", "require_reasoning", "answer_format"})
CLAIMS = {"invariant": ("box_order", "flip", "rescale"), "monotone": ("boxes", "mask")}
EMPTY_SIDES = ("both", "prediction", "truth")

Form = Literal["function", "batch", "group", "trl", "preset", "composition"]
Range = tuple[float, float]
_Registered = TypeVar("_Registered", bound=Callable[..., Any])
_registered: dict[str, RewardInfo] = {}


@dataclass(frozen=True, eq=False)
class RewardInfo:
    """What a reward declares; `segrl.testing.check_reward` tests the claims and `segrl rewards describe` prints them.

    Attributes:
        name: Name in the registry.
        function: The function or class; None where a package's reward could not be imported.
        form: "function", "batch", "group" (classes), "trl", "preset" (a factory) or "composition".
        needs_mask: It reads `Prediction.mask`.
        needs_truth: It looks at the target.
        needs_probability: It reads `Prediction.probability` where there is one.
        volume: Its target is a `VolumeTarget`.
        range: (low, high) of the scores, or a function of all settings that returns it; None if not declared.
        empty: Score of a valid answer when "both" sides are empty, only the "prediction", or only the "truth"; or a
            function of all settings that returns it; None if not declared.
        invariant: What does not change the score: "box_order", "flip" (mirroring image, boxes, points and masks),
            "rescale" (enlarging all of them by a whole number).
        monotone: In what more overlap with the truth never lowers the score: "boxes", "mask"; or a function of all
            settings that returns it.
        completion_format: Settings of `CompletionFormat` that differ from its defaults.
        equation: The formula as text.
        source: Paper and symbol.
        origin: Package and version, or module, that it comes from.
        settings: Its settings with their defaults; `inspect.Parameter.empty` where one must be given.
        broken: Why it cannot be used, or None.
    """

    name: str
    function: Callable[..., Any] | None
    form: Form = "function"
    needs_mask: bool = False
    needs_truth: bool = True
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
    broken: str | None = None

    @property
    def summary(self) -> str:
        """First line of the docstring, or why the reward is broken."""
        if self.broken is not None:
            return f"broken: {self.broken}"
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def resolved(self, settings: Mapping[str, Any]) -> RewardInfo:
        """A copy in which `range`, `empty` and `monotone` are values: functions of the settings are called."""
        known = {**self.settings, **settings}
        scores = self.range(**known) if callable(self.range) else self.range
        empty = self.empty(**known) if callable(self.empty) else self.empty
        monotone = self.monotone(**known) if callable(self.monotone) else self.monotone
        return replace(self, range=scores, empty=empty, monotone=tuple(monotone))


def register_reward(
    name: str,
    *,
    needs_mask: bool = False,
    needs_truth: bool = True,
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
        needs_mask: Whether it reads `Prediction.mask`, so that a trainer without masks refuses it.
        needs_truth: False for rewards of the text alone, which then need no truth.
        needs_probability: Whether it reads `Prediction.probability`, so that trainers keep the probabilities.
        volume: Whether its target is a `VolumeTarget`.
        range: See `RewardInfo`, as the rest.
        empty: Declared scores of empty sides.
        invariant: Declared invariances.
        monotone: Declared monotonicity.
        completion_format: Default settings of `CompletionFormat`, such as ``{"answer_format": "json"}``.
        equation: The formula as text.
        source: Paper and symbol.

    Returns:
        A decorator that returns the function or class unchanged.

    Raises:
        RewardError: If the name is taken (other than by the same function of the same module, which is replaced: a
            notebook's cell may be run twice), the form is not one of the three, a claim does not exist, or a setting
            has the name of a `CompletionFormat` setting.

    Example:
        >>> from segrl.rewards import make_reward
        >>> @register_reward("brevity", needs_truth=False, range=(0, 1))
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
                needs_truth=needs_truth and form != "trl",
                needs_probability=needs_probability,
                volume=volume,
                range=range,
                empty=empty,
                invariant=tuple(invariant),
                monotone=monotone if callable(monotone) else tuple(monotone),
                completion_format=completion_format or {},
                equation=equation,
                source=source,
                origin=_origin(function),
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
        RewardError: If the name is taken, or a setting has the name of a `CompletionFormat` setting.
    """

    def register(factory: Callable[..., Any]) -> Callable[..., Any]:
        settings = settings_of(factory, "preset")
        _add(RewardInfo(name, factory, "preset", equation=equation, source=source, origin=_origin(factory),
                        settings=settings))  # fmt: skip
        return factory

    return register


def list_rewards() -> list[str]:
    """Return the sorted names of all rewards: built-in, registered, and from installed packages (not yet imported)."""
    return sorted({*_registered, *_plugins()})


def reward_info(name: str) -> RewardInfo:
    """What a reward declares about itself; imports the package that brings it, if need be.

    Args:
        name: A name from `list_rewards`, or "module:attribute".

    Returns:
        The record. A package's reward that cannot be used has `broken` set to the reason.

    Raises:
        UnknownNameError: For a name that does not exist; it suggests the closest one.
    """
    if name not in _registered:
        if ":" in name:
            return _imported(name)
        plugins = _plugins()
        if name not in plugins:
            raise unknown_name("reward", name, list_rewards())
        _load(name, plugins[name])
    return _registered[name] if name in _registered else _broken[name]


def all_reward_infos() -> list[RewardInfo]:
    """Every reward by name; a package's reward whose name is taken is listed too, as broken."""
    infos = [reward_info(name) for name in list_rewards()]
    for name, plugins in _plugins().items():
        info = reward_info(name)
        for plugin in plugins:
            if info.broken is None and info.origin != _plugin_origin(plugin):
                taken = f"the name is taken by {info.origin}; use {plugin.value!r}"
                infos.append(RewardInfo(name, None, origin=_plugin_origin(plugin), broken=taken))
    return sorted(infos, key=lambda info: info.name)


def info_of(function: Callable[..., Any], name: str) -> RewardInfo:
    """The record of a function or class, registered under this name or not registered at all."""
    known = _registered.get(name)
    if known is not None and known.function is function:
        return known
    form = form_of(function, name)
    return RewardInfo(
        name, function, form, needs_truth=form != "trl", origin=_origin(function), settings=settings_of(function, form)
    )


def registered_name(function: Callable[..., Any]) -> str | None:
    """The name under which a function or class is registered."""
    return next((name for name, info in _registered.items() if info.function is function), None)


@cache
def form_of(function: Callable[..., Any], name: str) -> Form:
    """Which of the forms a function or class has.

    Raises:
        RewardError: If it has none of them.
    """
    if inspect.isclass(function):
        methods = [method for method in ("score_batch", "score_group") if callable(getattr(function, method, None))]
        if len(methods) == 1:
            return "batch" if methods == ["score_batch"] else "group"
        raise RewardError(
            f"reward {name!r}: class {function.__name__} has {' and '.join(methods) or 'neither'} of score_batch and "
            "score_group; expected exactly one"
        )
    if not callable(function):
        raise RewardError(f"reward {name!r} is a {type(function).__name__}; expected a function or a class")
    parameters = _parameters(function)
    if "completions" in parameters:
        return "trl"
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        raise RewardError(
            f"reward {name!r}: {_describe(function)}({', '.join(parameters)}) takes neither (prediction, target) nor "
            "completions; expected def reward(prediction, target, *, setting=...) or a TRL reward function"
        )
    return "function"


@cache
def settings_of(function: Callable[..., Any], form: Form) -> dict[str, Any]:
    """The settings of a function or class, with their defaults."""
    parameters = list(_parameters(function).values())
    if form == "function":
        parameters = parameters[2:]
    elif form == "trl":  # what has no default is a column
        parameters = [p for p in parameters if p.default is not p.empty]
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return {p.name: p.default for p in named if p.name not in FILLED_IN}


def is_reward_form(value: Any) -> bool:
    """Whether a trainer should make a `Reward` of this: TRL could not call it, or it is registered."""
    if inspect.isclass(value):
        return hasattr(value, "score_batch") or hasattr(value, "score_group")
    if not inspect.isroutine(value):
        return False
    parameters = _parameters(value)
    keywords = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return registered_name(value) is not None or not (keywords or "completions" in parameters)


def takes_any_setting(function: Callable[..., Any], form: Form) -> bool:
    """Whether unknown settings reach the function in its `**settings`."""
    return form != "trl" and any(p.kind is p.VAR_KEYWORD for p in _parameters(function).values())


@cache
def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    if inspect.isclass(function) and function.__init__ is object.__init__:
        return {}
    return inspect.signature(function).parameters


def accepted(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keyword arguments that a function takes."""
    parameters = _parameters(function)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(values)
    return {key: value for key, value in values.items() if key in parameters}


def filled_in(function: Callable[..., Any]) -> frozenset[str]:
    """The names of `FILLED_IN` that a function takes as parameters of its own."""
    return FILLED_IN & _parameters(function).keys()


def _add(info: RewardInfo) -> None:
    known = _registered.get(info.name)
    if known is not None and known.function is not info.function and not _redefined(known.function, info.function):
        raise RewardError(
            f"reward {info.name!r} is registered already, by {_describe(known.function)}; choose another name"
        )
    if clash := FORMAT_SETTINGS & info.settings.keys():
        raise RewardError(
            f"reward {info.name!r} has a parameter {min(clash)!r}, which is a setting of every reward; rename it"
        )
    _registered[info.name] = info


def _redefined(old: Any, new: Any) -> bool:
    """Whether a function was defined again in its place, as when a notebook's cell is run twice."""
    place = (getattr(new, "__module__", None), getattr(new, "__qualname__", None))
    return (
        None not in place
        and "<" not in str(place[1])
        and place == (getattr(old, "__module__", None), getattr(old, "__qualname__", None))
    )


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


# --- rewards of installed packages

_broken: dict[str, RewardInfo] = {}


def _plugins() -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for plugin in entry_points(group=ENTRY_POINT_GROUP):
        known = found.setdefault(plugin.name, [])
        if plugin not in known:
            known.append(plugin)
    return found


def _load(name: str, plugins: list[EntryPoint]) -> None:
    """Import the package's reward into `_registered`, or the reason why not into `_broken`."""
    origins = [_plugin_origin(plugin) for plugin in plugins]
    _broken.pop(name, None)
    if len(plugins) > 1:
        reason = f"{' and '.join(origins)} both bring it; uninstall one, or name one as {plugins[0].value!r}"
        _broken[name] = RewardInfo(name, None, origin=", ".join(origins), broken=reason)
        return
    try:
        function = plugins[0].load()
        if name not in _registered:  # the module may have registered it itself while it was imported
            register_reward(name)(function)
    except (Exception, SystemExit) as error:  # whatever a package's import raises: the others must go on working
        reason = f"cannot be imported from {plugins[0].value!r}: {type(error).__name__}: {error}"
        _broken[name] = RewardInfo(name, None, origin=origins[0], broken=reason)
        return
    _registered[name] = replace(_registered[name], origin=origins[0])


def _plugin_origin(plugin: EntryPoint) -> str:
    return f"{plugin.dist.name} {plugin.dist.version}" if plugin.dist is not None else plugin.module


def _imported(path: str) -> RewardInfo:
    module, _, attribute = path.partition(":")
    try:
        function = importlib.import_module(module)
        for part in attribute.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise RewardError(f"reward {path!r} cannot be imported: {type(error).__name__}: {error}") from error
    known = registered_name(function)  # pyright: ignore[reportArgumentType]
    name = known or attribute.rpartition(".")[2]
    return info_of(function, name)  # pyright: ignore[reportArgumentType]


def _origin(function: Callable[..., Any]) -> str:
    module = getattr(function, "__module__", "") or ""
    if module.partition(".")[0] == "segrl":
        return f"segrl {__version__}"
    return f"module {module}"


def _describe(function: Callable[..., Any] | None) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}"
