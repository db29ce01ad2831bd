"""Registries: parts by name, as "module:attribute", and from installed packages."""

from segrl.registry.plugins import PluginReport, find_plugins, inspect_plugins, load_plugin, plugin_origin
from segrl.registry.registry import Registry
from segrl.registry.resolve import argument_docs, origin_of, path_of, resolve_attribute, same_definition, summary_of

__all__ = [
    "PluginReport",
    "Registry",
    "argument_docs",
    "find_plugins",
    "inspect_plugins",
    "load_plugin",
    "origin_of",
    "path_of",
    "plugin_origin",
    "resolve_attribute",
    "same_definition",
    "summary_of",
]
