"""Plugin trust: what is not enabled, not listed or not what it was is never imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tapebus import plugins, trust
from tapebus.config import Config
from tapebus.errors import ConfigError, PluginError
from tapebus.trust import Trusted

SOURCE = """
from pathlib import Path
Path({marker!r}).write_text("imported")
from tapebus import hookimpl
@hookimpl
def tapebus_register_event_types(config):
    return []
"""


class Site:
    """A directory of installed distributions, first on the path."""

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir()

    def install(self, dist: str, plugin: str, version: str = "1.0") -> Path:
        """Install `dist` with one plugin; its import leaves the returned marker behind."""
        module = dist.replace("-", "_")
        marker = self.directory / f"{dist}.imported"
        (self.directory / f"{module}.py").write_text(SOURCE.format(marker=str(marker)))
        info = self.directory / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[tapebus.plugins]\n{plugin} = {module}\n")
        files = [f"{module}.py", f"{info.name}/METADATA", f"{info.name}/entry_points.txt", f"{info.name}/RECORD"]
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        return marker

    def run(self, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TAPEBUS_")}
        path = os.pathsep.join(filter(None, [str(self.directory), kept.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, "-m", "tapebus", *args],
            env={**kept, "PYTHONPATH": path, **environ},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def site(tmp_path, monkeypatch):
    made = Site(tmp_path / "site")
    monkeypatch.syspath_prepend(str(made.directory))
    yield made
    trust.enforce(None)
    for name in list(sys.modules):
        if name.startswith("evil"):
            del sys.modules[name]


COMMANDS = [
    ["plugins"],
    ["plugins", "--json"],
    ["plugins", "--hashes"],
    ["check", "--json"],
    ["--help"],
    ["query"],
    ["stats"],
    ["dlq", "list"],
    ["pm2"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: " ".join(each))
@pytest.mark.parametrize("name", ["evil", "demo", "legacy"])
def test_no_command_imports_a_package_that_is_installed_but_not_enabled(site, tmp_path, command, name):
    marker = site.install("evil-package", name)
    site.run("--data-dir", str(tmp_path / "d"), *command)
    assert not marker.exists()


def test_an_enabled_plugin_is_imported_so_the_marker_works(site):
    marker = site.install("evil-package", "evil")
    manager = plugins.load(["evil"])
    assert marker.exists() and manager.get_plugin("evil") is not None


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (None, "not in [plugins.trusted]"),
        (Trusted("other-package"), "trusted is other-package"),
        (Trusted("evil-package", "2.0"), "has version 1.0, trusted is 2.0"),
        (Trusted("evil-package", "1.0", "0" * 64), "not the trusted ones"),
    ],
)
def test_with_a_list_what_does_not_match_its_line_is_named_and_not_imported(site, line, why):
    marker = site.install("evil-package", "evil")
    trust.enforce({"evil": line} if line else {})
    with pytest.raises(PluginError, match="not imported") as caught:
        plugins.load(["evil"])
    assert why in str(caught.value) and caught.value.exit_code == 78
    assert not marker.exists()


def test_the_line_that_is_printed_lets_the_plugin_in_until_one_of_its_files_changes(site, tmp_path):
    marker = site.install("evil-package", "evil")
    table = site.run("plugins", "--hashes").stdout
    assert not marker.exists()
    file = tmp_path / "c.toml"
    file.write_text(f"[bus]\ndata_dir='{tmp_path}/d'\n[plugins]\nenabled=['schema','evil']\n{table}")
    done = site.run("plugins", "--config", str(file), "--json")
    assert {row["name"]: row["error"] for row in json.loads(done.stdout)}["evil"] == ""
    assert marker.exists()
    marker.unlink()
    module = site.directory / "evil_package.py"
    module.write_text(module.read_text() + "# changed\n")
    done = site.run("run", "--config", str(file))
    assert done.returncode == 78 and "not the trusted ones" in done.stderr
    assert not marker.exists()


def test_two_packages_that_claim_one_enabled_name_are_refused_and_a_list_decides(site):
    first, second = site.install("evil-one", "evil"), site.install("evil-two", "evil")
    with pytest.raises(PluginError, match="claimed by both evil_one and evil_two"):
        plugins.load(["evil"])
    assert not first.exists() and not second.exists()
    trust.enforce({"evil": Trusted("evil.two")})
    plugins.load(["evil"])
    assert second.exists() and not first.exists()


def test_a_package_that_claims_a_built_in_name_never_takes_its_place(site):
    marker = site.install("evil-schema", "schema")
    with pytest.raises(PluginError, match="claimed by both"):
        plugins.load(["schema"])
    plugins.load(["store"])  # others are not held up by it
    trust.enforce({})
    plugins.load(["schema"])
    assert not marker.exists()


def test_the_switch_keeps_all_third_party_plugins_out_and_the_bus_goes_on(site, monkeypatch, caplog):
    marker = site.install("evil-package", "evil")
    monkeypatch.setenv(trust.SWITCH, "1")
    manager = plugins.load(["schema", "evil"])
    assert [name for name, _ in manager.list_name_plugin()] == ["schema"]
    assert not marker.exists() and "left out" in caplog.text


def test_a_line_with_an_unknown_key_is_a_configuration_error(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[plugins.trusted]\nx = { dist = 'x', hash = 'y' }\n")
    with pytest.raises(ConfigError, match="hash"):
        Config.load(file, environ={})
    file.write_text("[plugins.trusted]\nx = { dist = 'x' }\n[plugins.slots]\nauto_fire = true\n")
    config = Config.load(file, environ={})
    assert config.plugins.trusted == {"x": Trusted("x")} and config.plugin("slots") == {"auto_fire": True}
