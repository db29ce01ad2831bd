"""`Registry`: parts of one kind by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import reduce
from importlib.metadata import EntryPoint
from typing import Any, TypeVar

from segrl.errors import SegRLError, unknown_name
from segrl.registry.plugins import PluginReport, find_plugins, inspect_plugins, load_plugin, plugin_origin
from segrl.registry.resolve import origin_of, path_of, resolve_attribute, same_definition, summary_of

__all__ = ["Registry"]

Item = TypeVar("Item")


class Registry:
    """Classes or functions of one kind, by name.

    A name is found among those that were registered in this process, then among the entry points of installed
    packages, of which only the one that is named is imported. "module:attribute" works without registration.

    Args:
        kind: What it holds, for errors, such as "adapter".
        group: Entry-point group of packages that bring more, such as "segrl.adapters".
        classes: Whether only classes may be registered.
        preload: Modules that a plugin of this kind imports anyway; see `inspect_plugins`.

    Example:
        >>> shapes = Registry("shape", "segrl.shapes")
        >>> @shapes.register("square")
        ... def square(side):
        ...     return side * side
        >>> shapes.get("square")(3), shapes.get("math:hypot")(3, 4)
        (9, 5.0)
        >>> shapes.get("squares")
        Traceback (most recent call last):
        segrl.errors.UnknownNameError: unknown shape 'squares'; did you mean 'square'? Known: square
    """

    def __init__(self, kind: str, group: str, *, classes: bool = False, preload: tuple[str, ...] = ()) -> None:
        self.kind, self.group, self.classes, self.preload = kind, group, classes, preload
        self._items: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[Item], Item]:
        """Return a decorator that registers a class or function under a name and returns it unchanged.

        Raises:
            SegRLError: The name is taken (other than by the same definition, run again), is not text or has a colon,
                or the object is not of this kind.
        """
        if not isinstance(name, str) or not name or ":" in name:
            raise SegRLError(f"{self.kind} {name!r}: expected a name without ':', as in @register_{self._word}('mine')")

        def register(item: Item) -> Item:
            self._check(name, item)
            known = self._items.get(name)
            if known is not None and not same_definition(known, item):
                by = path_of(known) or repr(known)
                raise SegRLError(f"{self.kind} {name!r} is registered already, by {by}; choose another name")
            self._items[name] = item
            return item

        return register

    def get(self, reference: str) -> Any:
        """Return what a name or "module:attribute" stands for.

        Raises:
            UnknownNameError: No such name; it suggests the closest one.
            SegRLError: It cannot be imported, or is not of this kind.
        """
        if reference not in self._items:
            if ":" in reference:
                item = resolve_attribute(reference, self.kind)
                self._check(reference, item)
                return item
            if reference not in find_plugins(self.group):
                raise unknown_name(self.kind, reference, self.names())
            item = load_plugin(self.group, reference, self.kind)
            if reference not in self._items:  # its module may have registered it while it was imported
                self.register(reference)(item)
        return self._items[reference]

    def names(self) -> list[str]:
        """Return the sorted names: registered, and of installed packages (not imported)."""
        return sorted({*self._items, *find_plugins(self.group)})

    def reference(self, item: Any) -> str:
        """Return the text by which `get` finds an item again, if possible in a fresh process too.

        That is its name if segrl or an installed package brings it; else its "module:attribute"; else, for a local
        class or function, the name under which it was registered.

        Raises:
            SegRLError: None of them: the item is local and not registered.
        """
        name = next((name for name, known in self._items.items() if known is item), None)
        if name is not None and (origin_of(item).startswith("segrl ") or self._plugin(name) is not None):
            return name
        reference = path_of(item) or name
        if reference is None:
            raise SegRLError(
                f"{self.kind} {getattr(item, '__qualname__', item)!r} is defined inside a function and cannot be found "
                f"again; define it at the top of a module, or register it with @register_{self._word}('name')"
            )
        return reference

    def reports(self, timeout: float = 10.0) -> list[PluginReport]:
        """Return every name with origin and summary, or why it is broken, sorted by name.

        Installed packages are imported in child processes; one whose name is taken is listed too, as broken.

        Args:
            timeout: Seconds that one package's import may take.
        """
        plugins = find_plugins(self.group)
        reports = [made for name, made in self._inspected(plugins, timeout).items() if name not in self._items]
        for name, item in self._items.items():
            own = self._plugin(name)
            origin = origin_of(item) if own is None else plugin_origin(own)
            reports.append(PluginReport(name, origin, summary_of(item)))
            for plugin in plugins.get(name, ()):
                if own is None or plugin != own:
                    taken = f"the name is taken by {origin}; use {plugin.value!r}"
                    reports.append(PluginReport(name, plugin_origin(plugin), broken=taken))
        return sorted(reports, key=lambda report: report.name)

    def _inspected(self, plugins: dict[str, list[EntryPoint]], timeout: float) -> dict[str, PluginReport]:
        if not plugins.keys() - self._items.keys():
            return {}
        return inspect_plugins(self.group, timeout, preload=self.preload)

    def _plugin(self, name: str) -> EntryPoint | None:
        """The entry point that brought a registered item: its module is imported and holds just this item."""
        for plugin in find_plugins(self.group).get(name, ()):
            module = sys.modules.get(plugin.module)
            if module is not None and reduce(_attribute, plugin.attr.split("."), module) is self._items[name]:
                return plugin
        return None

    def _check(self, name: str, item: Any) -> None:
        if self.classes and not isinstance(item, type):
            raise SegRLError(f"{self.kind} {name!r} is a {type(item).__name__}; expected a class")
        if not callable(item):
            raise SegRLError(f"{self.kind} {name!r} is a {type(item).__name__}; expected a class or a function")

    @property
    def _word(self) -> str:
        return self.kind.replace(" ", "_")


def _attribute(item: Any, name: str) -> Any:
    return getattr(item, name, None)
