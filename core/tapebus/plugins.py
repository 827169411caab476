"""Finding and loading plugins: entry points of the group ``tapebus.plugins``, imported only when enabled."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from tapebus import hookspecs, trust
from tapebus.deadline import Overdue, within
from tapebus.errors import PluginError
from tapebus.events import Registry

log = logging.getLogger("tapebus")
GROUP = "tapebus.plugins"
#: Seconds one import may take.
DEADLINE_S = 20.0


def installed() -> dict[str, list[EntryPoint]]:
    """Every installed plugin by name, not imported; `trust.choose` decides between several of one name."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    return found


def load(
    names: Iterable[str], extra: Iterable[tuple[str, Any]] = (), deadline_s: float = DEADLINE_S
) -> pluggy.PluginManager:
    """Import and register the plugins called `names`, then the ready-made objects in `extra`.

    Raises `PluginError` for an unknown name, an import that fails, and a plugin without a single hook
    (pluggy would accept, and silently ignore, a compiled hookimpl); `Overdue` for an import that blocks.
    """
    manager = pluggy.PluginManager("tapebus")
    manager.add_hookspecs(hookspecs)
    points = installed()
    for name in names:
        if name not in points:
            near = difflib.get_close_matches(name, points, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"installed: {', '.join(sorted(points)) or 'none'}"
            raise PluginError(f"plugins.enabled: no plugin called {name!r} is installed; {hint}")
        point = trust.choose(name, points[name])
        if trust.switched_off(point):
            log.warning("plugin %r is left out: %s is set", name, trust.SWITCH)
            continue
        try:
            module = within(deadline_s, f"plugin {name!r}: its import", point.load)
        except Overdue:
            raise
        except Exception as error:
            raise PluginError(
                f"plugin {name!r} ({point.value}) cannot be imported: {type(error).__name__}: {error}"
            ) from error
        _register(manager, module, name)
    for name, plugin in extra:
        _register(manager, plugin, name)
    manager.check_pending()
    return manager


def _register(manager: pluggy.PluginManager, plugin: Any, name: str) -> None:
    manager.register(plugin, name=name)
    if not manager.get_hookcallers(plugin):
        raise PluginError(f"plugin {name!r} implements no tapebus hook: mark plain Python functions with @hookimpl")


def implements(manager: pluggy.PluginManager, hook: str, name: str) -> bool:
    """Whether the plugin called `name` implements `hook`."""
    return any(each.plugin_name == name for each in getattr(manager.hook, hook).get_hookimpls())


def call_one(manager: pluggy.PluginManager, hook: str, name: str, **arguments: Any) -> Any:
    """Call `hook` of the one plugin called `name`; None where it does not implement it."""
    caller = getattr(manager.hook, hook)
    for implementation in caller.get_hookimpls():
        if implementation.plugin_name == name:
            return implementation.function(*(arguments[key] for key in implementation.argnames))
    return None


def registry(manager: pluggy.PluginManager, config: Callable[[str], dict[str, Any]] = lambda name: {}) -> Registry:
    """The event types of all registered plugins; ``config(name)`` is the table of the plugin called `name`."""
    found = Registry()
    for implementation in reversed(manager.hook.tapebus_register_event_types.get_hookimpls()):
        table = {"config": config(implementation.plugin_name)}
        types: Any = implementation.function(*(table[name] for name in implementation.argnames))
        for event_type in types:
            found.add(event_type)
    return found
