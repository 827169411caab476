"""The source tree keeps its own promises: what is compiled, what may import what, what gets installed."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "core" / "tapebus"
PACKAGES = sorted(path.parent for path in (ROOT / "plugins").glob("*/__init__.py"))
#: Shared by plugins, and none itself.
LIBRARY = "tapebus_trading"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
#: What a plugin may import from the core, besides names of `tapebus` itself.
PUBLIC = {
    "tapebus.bands",
    "tapebus",
    "tapebus.blocks",
    "tapebus.bridge",
    "tapebus.cli.common",
    "tapebus.config",
    "tapebus.consumer",
    "tapebus.errors",
    "tapebus.events",
    "tapebus.failpoints",
    "tapebus.hookspecs",
    "tapebus.plugins",
    "tapebus.redaction",
    "tapebus.replay",
    "tapebus.store",
    "tapebus.testing",
}


def compiled_modules() -> set[str]:
    """``MODULES`` of setup.py."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODULES":
            return {each.value for each in ast.walk(node.value) if isinstance(each, ast.Constant)}
    raise AssertionError("setup.py has no MODULES")


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            # `from tapebus import x` may mean the module tapebus.x
            submodules = [alias.name for alias in node.names if (CORE / f"{alias.name}.py").exists()]
            yield from (f"tapebus.{name}" for name in submodules if node.module == "tapebus")
            yield node.module


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_every_pyx_is_listed_in_setup_py_and_nothing_else_is():
    assert compiled_modules() == {path.stem for path in CORE.glob("*.pyx")}


@pytest.mark.parametrize("name", sorted(compiled_modules()))
def test_a_compiled_module_is_private_and_has_a_stub_that_parses(name):
    assert name.startswith("_")
    ast.parse((CORE / f"{name}.pyi").read_text())


def test_a_pxd_stands_beside_a_pyx_or_holds_nothing_but_inlined_code():
    alone = [path for path in CORE.glob("*.pxd") if path.stem not in compiled_modules() | {"__init__"}]
    assert all("cdef inline" in path.read_text() and "cdef class" not in path.read_text() for path in alone)


def test_source_roots_are_not_packages():
    assert not (ROOT / "core" / "__init__.py").exists()
    assert not (ROOT / "plugins" / "__init__.py").exists()


@pytest.mark.parametrize("package", [CORE, *PACKAGES], ids=lambda path: path.name)
def test_every_package_is_marked_as_typed(package):
    assert (package / "py.typed").exists()


def test_every_plugin_folder_has_its_entry_point():
    points = PYPROJECT["project"]["entry-points"]["tapebus.plugins"]
    assert sorted(points.values()) == [path.name for path in PACKAGES if path.name != LIBRARY]
    assert all(module == f"tapebus_{name}" for name, module in points.items())


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_plugin_imports_public_names_of_the_core_and_no_other_plugin(package):
    found = {
        (path.relative_to(ROOT).as_posix(), module)
        for path in package.rglob("*.py")
        for module in imported_modules(path)
        if module.split(".")[0].startswith("tapebus")
    }
    refused = {(path, module) for path, module in found if module.split(".")[0] not in (package.name, LIBRARY)} - {
        (path, module) for path, module in found if module in PUBLIC
    }
    assert not refused


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_hooks_are_plain_functions_in_the_init_of_a_plugin(package):
    for path in package.rglob("*.py"):
        marked = [
            node.name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef)
            and any(ast.unparse(each).startswith("hookimpl") for each in node.decorator_list)
        ]
        assert not marked or path == package / "__init__.py", f"{path}: {marked}"


def test_the_core_does_not_import_a_plugin():
    names = {path.name for path in PACKAGES}
    refused = {
        (path.relative_to(ROOT).as_posix(), module)
        for path in CORE.rglob("*.py")
        for module in imported_modules(path)
        if module.split(".")[0] in names
    }
    assert not refused


def test_every_module_imports_in_a_fresh_interpreter_without_a_warning():
    modules = sorted(
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for root in (ROOT / "core", ROOT / "plugins")
        for path in root.rglob("*.py")
        if path.name != "__main__.py"
    )
    run = python(
        "import importlib, json, sys, warnings\n"
        "warnings.simplefilter('error')\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
    )
    assert run.returncode == 0, run.stderr


def test_importing_tapebus_loads_nothing_heavy():
    run = python("import tapebus, sys, json; print(json.dumps(sorted(sys.modules)))")
    loaded = set(json.loads(run.stdout))
    assert not loaded & {"zmq", "lmdb", "click", "rich", "pluggy", "httpx", "asyncio"}


def test_every_public_name_of_tapebus_resolves():
    run = python("import tapebus\nfor name in tapebus.__all__: getattr(tapebus, name)")
    assert run.returncode == 0, run.stderr
