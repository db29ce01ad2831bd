"""Parts of a registry to JSON and back: {"type": name or "module:Class", ...settings}."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from segrl.errors import CheckpointError, SegRLError
from segrl.registry.registry import Registry

__all__ = ["build_part", "check_part", "check_settings", "part_config"]


def part_config(registry: Registry, part: Any) -> dict[str, Any]:
    """Return the JSON-ready description of a part; what has no `to_config` has no settings.

    Raises:
        SegRLError: Its class is local and not registered.
    """
    reference = registry.reference(part if inspect.isfunction(part) else type(part))
    return {**(part.to_config() if hasattr(part, "to_config") else {}), "type": reference}


def build_part(registry: Registry, config: Mapping[str, Any], context: Mapping[str, Any]) -> Any:
    """Build the part that `part_config` describes.

    Args:
        registry: The parts of its kind.
        config: Its type and settings.
        context: What no file can hold, such as `tokenizer`; passed to `from_config` only.

    Raises:
        SegRLError: Its type cannot be found, or what its class raises for these settings.
    """
    settings = dict(config)
    made = registry.get(settings.pop("type"))
    if inspect.isfunction(made):  # a probe may be a function, which is the part itself
        return made
    return made.from_config(settings, **context) if hasattr(made, "from_config") else made(**settings)


def check_part(registry: Registry, part: Any, context: Mapping[str, Any]) -> None:
    """Build a part anew from its description, and compare descriptions and the shapes of all weights.

    Raises:
        CheckpointError: They differ, or it cannot be built; the message names the part and the fix.
    """
    name = f"{registry.kind} {getattr(part, '__name__', type(part).__name__)} cannot be saved"
    fix = "return every argument of __init__ from to_config(), or define from_config(config, **context)"
    try:
        config = part_config(registry, part)
    except SegRLError as error:
        raise CheckpointError(f"{name}: {error}") from error
    if "type" in (part.to_config() if hasattr(part, "to_config") else {}):
        raise CheckpointError(f"{name}: to_config() has the reserved key 'type'; rename it")
    try:
        stored = json.loads(json.dumps(config))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: to_config() is not JSON-ready: {error}") from error
    try:
        with torch.random.fork_rng(devices=[]):  # saving must not change what a run draws next
            again = build_part(registry, stored, context)
    except Exception as error:  # whatever its class raises
        raise CheckpointError(
            f"{name}: to_config() does not rebuild it: {type(error).__name__}: {error}; {fix}"
        ) from error
    other = json.loads(json.dumps(part_config(registry, again)))
    if other != stored:
        changed = sorted(key for key in {*stored, *other} if stored.get(key) != other.get(key))
        raise CheckpointError(f"{name}: built from to_config(), it has other settings {changed}; {fix}")
    if different := _different_weights(part, again):
        raise CheckpointError(f"{name}: built from to_config(), it has other weights {different}; {fix}")


def check_settings(part: Any, config: Mapping[str, Any]) -> None:
    """Refuse a description of a part of segrl that lacks a setting: its default need not be what the run had.

    Raises:
        CheckpointError: The settings that are missing.
    """
    if type(part).__module__.partition(".")[0] != "segrl" or not hasattr(part, "to_config"):
        return
    if missing := sorted(part.to_config().keys() - config.keys()):
        raise CheckpointError(f"no {', '.join(missing)}, expected every setting; restore the file from the run")


def _different_weights(part: Any, again: Any) -> list[str]:
    """The first few names of weights that are missing on either side or have another shape."""
    if not isinstance(part, nn.Module):
        return []
    own, new = part.state_dict(), again.state_dict()
    # An empty tensor may be a shard that is on another rank: only its name counts.
    differ = [key for key in own.keys() & new.keys() if own[key].numel() and own[key].shape != new[key].shape]
    return sorted([*(own.keys() ^ new.keys()), *differ])[:5]
