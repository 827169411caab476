"""Finding and loading plugins, and the completeness of the hooks: each is documented and each is used."""

from __future__ import annotations

import inspect
import re
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy
import pytest

from tapebus import hookspecs, plugins
from tapebus.config import Plugins
from tapebus.errors import PluginError
from tapebus.events import EventType
from tapebus.hookspecs import hookimpl

ROOT = Path(__file__).resolve().parents[1]
BUILT_IN = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["tapebus.plugins"]
HOOKS = {
    name: function
    for name, function in vars(hookspecs).items()
    if name.startswith("tapebus_") and inspect.isfunction(function)
}


def signature(hook: str) -> str:
    return f"{hook}({', '.join(inspect.signature(HOOKS[hook]).parameters)})"


def module(name: str, **hooks: Any) -> ModuleType:
    made = ModuleType(name)
    for hook, function in hooks.items():
        setattr(made, hook, function)
    return made


def refusal(*arguments: Any) -> str:
    with pytest.raises(PluginError) as caught:
        plugins.load(*arguments)
    assert caught.value.exit_code == 78
    assert "\n" not in str(caught.value)
    return str(caught.value)


def entry_points_are(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
    found = [EntryPoint(name, value, plugins.GROUP) for name, value in points]
    monkeypatch.setattr(plugins, "entry_points", lambda group: found)


# -- loading ------------------------------------------------------------------------------------


def test_an_unknown_plugin_is_refused_with_the_nearest_name(monkeypatch):
    entry_points_are(monkeypatch, ("outcomes", "tapebus_outcomes"), ("store", "tapebus_store"))
    assert "did you mean 'outcomes'?" in refusal(["outcome"])


def test_an_unknown_plugin_like_no_other_is_refused_with_the_list_of_installed_ones(monkeypatch):
    entry_points_are(monkeypatch, ("store", "tapebus_store"), ("slots", "tapebus_slots"))
    assert "installed: slots, store" in refusal(["xyz"])
    entry_points_are(monkeypatch)
    assert "installed: none" in refusal(["xyz"])


def test_a_plugin_without_a_hook_is_refused():
    assert "'empty' implements no tapebus hook" in refusal([], [("empty", module("empty"))])


def test_a_function_without_the_marker_is_not_a_hook():
    plain = module("plain", tapebus_register_event_types=lambda: [])
    assert "@hookimpl" in refusal([], [("plain", plain)])


@pytest.mark.skipif(
    tuple(int(part) for part in pluggy.__version__.split(".")[:2]) < (1, 7),
    reason="pluggy below 1.7 accepts compiled functions",
)
def test_a_plugin_whose_hooks_are_compiled_is_refused_rather_than_ignored(monkeypatch):
    from tapebus._blocks import crc32c

    assert not inspect.isfunction(crc32c)
    compiled = module("compiled", tapebus_register_event_types=crc32c)
    options = hookimpl(lambda: []).tapebus_impl  # type: ignore[attr-defined]
    monkeypatch.setattr(crc32c, "tapebus_impl", options, raising=False)
    assert "mark plain Python functions with @hookimpl" in refusal([], [("compiled", compiled)])


def test_a_plugin_that_cannot_be_imported_is_named_with_the_reason(monkeypatch):
    entry_points_are(monkeypatch, ("ghost", "tapebus_ghost_that_is_not_there"))
    message = refusal(["ghost"])
    assert "'ghost'" in message
    assert "No module named 'tapebus_ghost_that_is_not_there'" in message


def test_two_distributions_may_not_claim_one_name(monkeypatch):
    entry_points_are(monkeypatch, ("store", "tapebus_store"), ("store", "other_store"))
    with pytest.raises(PluginError, match="claimed by both other_store and tapebus_store"):
        plugins.load(["store"])


def test_one_distribution_seen_twice_on_the_path_is_one_plugin(monkeypatch):
    entry_points_are(monkeypatch, ("store", "tapebus_store"), ("store", "tapebus_store"))
    assert list(plugins.installed()) == ["store"]


def test_only_enabled_plugins_are_imported(monkeypatch):
    entry_points_are(monkeypatch, ("schema", "tapebus_schema"), ("ghost", "tapebus_ghost_that_is_not_there"))
    assert plugins.load(["schema"]).has_plugin("schema")


def test_the_built_in_plugins_come_through_the_same_door_as_all_others():
    points = plugins.installed()
    assert {name: points[name][0].value for name in BUILT_IN} == BUILT_IN
    assert set(Plugins().enabled) <= set(BUILT_IN)


# -- after loading ------------------------------------------------------------------------------


def test_one_event_type_of_two_plugins_is_refused():
    def plugin(name: str) -> ModuleType:
        @hookimpl
        def tapebus_register_event_types():
            return [EventType(name="quote", payload=EventType)]

        return module(name, tapebus_register_event_types=tapebus_register_event_types)

    manager = plugins.load([], [("first", plugin("first")), ("second", plugin("second"))])
    with pytest.raises(PluginError, match="'quote' is registered twice"):
        plugins.registry(manager)


def test_a_hook_of_one_plugin_is_called_with_the_arguments_it_names():
    @hookimpl
    def tapebus_health(context):
        return {"status": "ok", "message": context}

    @hookimpl
    def tapebus_metrics():
        return {"calls": 1}

    hooks = {"tapebus_health": tapebus_health, "tapebus_metrics": tapebus_metrics}
    manager = plugins.load([], [("one", module("one", **hooks)), ("two", module("two", **hooks))])
    assert plugins.call_one(manager, "tapebus_health", "two", context="its own") == {
        "status": "ok",
        "message": "its own",
    }
    assert plugins.call_one(manager, "tapebus_metrics", "one", context=None) == {"calls": 1}
    assert plugins.call_one(manager, "tapebus_stop", "one", context=None) is None
    assert plugins.call_one(manager, "tapebus_health", "absent", context=None) is None


# -- completeness of the hooks ------------------------------------------------------------------


@pytest.mark.parametrize("hook", sorted(HOOKS))
def test_a_hook_is_documented_under_its_exact_signature(hook):
    headings = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "writing-plugins.md").read_text(), re.MULTILINE)
    assert headings.count(signature(hook)) == 1


def test_the_documentation_describes_no_hook_that_does_not_exist():
    headings = re.findall(r"^### `(tapebus_.+)`$", (ROOT / "docs" / "writing-plugins.md").read_text(), re.MULTILINE)
    assert set(headings) == {signature(hook) for hook in HOOKS}


@pytest.mark.parametrize("hook", sorted(HOOKS))
def test_a_hook_is_used_by_a_built_in_plugin(hook):
    sources = {name: (ROOT / "plugins" / name / "__init__.py").read_text() for name in BUILT_IN.values()}
    marked = re.compile(rf"^@hookimpl.*\ndef {hook}\(", re.MULTILINE)
    users = [name for name, source in sources.items() if marked.search(source)]
    assert users, f"{hook}: a hook ships with a plugin that uses it"


@pytest.mark.parametrize("hook", sorted(HOOKS))
def test_a_hook_says_what_it_is_for(hook):
    assert inspect.getdoc(HOOKS[hook])
