"""Configuration: precedence, kind refusals, private directories and secrets."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tapebus.config import Config, is_loopback, read_secret
from tapebus.errors import ConfigError


def load(tmp_path: Path, text: str = "", **environ: str) -> Config:
    path = tmp_path / "tapebus.toml"
    path.write_text(text)
    return Config.load(path, environ=environ)


def refusal(tmp_path: Path, text: str = "", **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, **environ)
    assert caught.value.exit_code == 78
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_a_file_everything_has_a_loopback_default(tmp_path):
    config = Config.defaults(data_dir=tmp_path)
    assert config.listen.feed == "tcp://127.0.0.1:5570"
    assert config.acked_endpoints[0] == "tcp://127.0.0.1:5572"
    assert all(is_loopback(each) for each in [config.control_endpoint, *config.acked_endpoints])
    assert config.plugins.enabled == ["schema", "store", "outcomes", "slots", "analytics", "alerts", "telegram"]


def test_environment_wins_over_the_file_and_the_argument_over_both(tmp_path):
    text = '[bus]\ndata_dir = "fromfile"\nmax_batch = 7'
    assert load(tmp_path, text).data_dir == tmp_path / "fromfile"
    assert load(tmp_path, text, TAPEBUS_DATA_DIR="/env").data_dir == Path("/env")
    config = load(tmp_path, text, TAPEBUS_BUS_MAX_BATCH="9", TAPEBUS_BUS_PUBLISH_HEARTBEAT="false")
    assert (config.bus.max_batch, config.bus.publish_heartbeat) == (9, False)
    explicit = Config.load(tmp_path / "tapebus.toml", data_dir="/arg", environ={"TAPEBUS_DATA_DIR": "/env"})
    assert explicit.data_dir == Path("/arg")


def test_lists_and_plugin_options_come_from_the_environment_too(tmp_path):
    config = load(
        tmp_path,
        "[plugins.slots]\nauto_fire = true",
        TAPEBUS_LISTEN_ACKED="tcp://127.0.0.1:6001, tcp://[::1]:6002",
        TAPEBUS_PLUGINS_ENABLED="schema,slots",
        TAPEBUS_PLUGINS_SLOTS_AUTO_FIRE="false",
        TAPEBUS_PLUGINS_TELEGRAM_CHAT="@room",
    )
    assert config.acked_endpoints == ["tcp://127.0.0.1:6001", "tcp://[::1]:6002"]
    assert config.plugins.enabled == ["schema", "slots"]
    assert config.plugin("slots") == {"auto_fire": False}
    assert config.plugin("telegram") == {"chat": "@room"}
    assert config.plugin("nothing") == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[bus]\nring_entires = 4096", ["bus.ring_entires = 4096", "bus.ring_entries"]),
        ("[bsu]", ["bsu", "did you mean bus?"]),
        ("[bus]\nfeed = 'x'", ["bus.feed", "listen.feed"]),
        ("[bus]\nmax_batch = 'many'", ["bus.max_batch = 'many'", "int"]),
        ("[bus]\nmax_batch = 0", ["bus.max_batch = 0", "nearest valid: 1"]),
        ("[bus]\nunknown_types = 'kep'", ["bus.unknown_types = 'kep'", "did you mean 'keep'"]),
        ("bus = 3", ["bus = 3"]),
        ("[plugins]\nenabeld = ['schema']", ["plugins.enabeld", "plugins.enabled"]),
        ("[plugins]\nenabled = [3]", ["plugins.enabled[0] = 3"]),
        ("[[sources]]\nname = 'a'\ntype = 'sib'\nconnect='tcp://127.0.0.1:1'", ["sources[0].type = 'sib'", "'sub'"]),
        ("[[sources]]\nname = 'a'\nconect='tcp://127.0.0.1:1'", ["sources[0].conect", "sources[0].connect"]),
        ("[[sources]]\nname = 'a'", ["sources[0]", "connect or bind"]),
        ("[[sources]]\nconnect='tcp://127.0.0.1:1'", ["sources[0]", "name"]),
        ("[listen]\nfeed = '127.0.0.1:5570'", ["listen.feed", "tcp://127.0.0.1:PORT"]),
        ("[listen]\nfeed = 'tcp://127.0.0.1:x'", ["listen.feed", "port"]),
        ("[listen]\ningest = 'tcp://127.0.0.1:5570'", ["listen.ingest", "listen.feed"]),
        ("[bus", ["tapebus.toml", "TOML"]),
    ],
)
def test_a_mistake_is_named_with_its_key_and_the_nearest_valid_one(tmp_path, text, expected):
    message = refusal(tmp_path, text)
    assert [part for part in expected if part not in message] == [], message


def test_mistakes_in_variables_name_the_variable(tmp_path):
    assert "TAPEBUS_BUS_RING_ENTRIES" in refusal(tmp_path, TAPEBUS_BUS_RING_ENTRYS="1")
    assert "TAPEBUS_BUS_MAX_BATCH = 'x'" in refusal(tmp_path, TAPEBUS_BUS_MAX_BATCH="x")


def test_a_missing_file_is_one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        Config.load(tmp_path / "none.toml", environ={})


@pytest.mark.parametrize("host", ["*", "0.0.0.0", "192.168.1.5", "[::]", "eth0", "bus.example.com", "127.0.0.1.a.com"])
@pytest.mark.parametrize("key", ["feed", "ingest", "acked"])
def test_a_bind_beyond_this_machine_is_refused(tmp_path, host, key):
    message = refusal(tmp_path, f"[listen]\n{key} = 'tcp://{host}:5599'")
    assert f"listen.{key}" in message and "tcp://127.0.0.1:5599" in message


def test_a_source_may_connect_anywhere_but_bind_only_here(tmp_path):
    config = load(tmp_path, "[[sources]]\nname='mt5'\nconnect='tcp://10.0.0.2:5557'")
    assert config.sources[0].subscribe == [""]
    assert "sources[0].bind" in refusal(tmp_path, "[[sources]]\nname='mt5'\ntype='pull'\nbind='tcp://*:5558'")


def test_control_is_never_on_tcp(tmp_path):
    assert "listen.control" in refusal(tmp_path, "[listen]\ncontrol = 'tcp://127.0.0.1:5573'")


def test_relative_paths_count_from_the_directory_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    file = tmp_path / "tapebus.toml"
    file.write_text(
        "[bus]\ndata_dir='tape'\nspool_dir='spool'\n[security]\nkey={file='bus.key_secret'}\n"
        "[plugins.telegram]\ntoken={file='token'}\nfile='other'\n"
    )
    config = Config.load(file, environ={})
    telegram = config.plugin("telegram")
    found = [config.data_dir, config.bus.spool_dir, config.security.key["file"], telegram["token"]["file"]]
    assert [str(each) for each in found] == [
        str(tmp_path / name) for name in ("tape", "spool", "bus.key_secret", "token")
    ]
    assert telegram["file"] == "other"


def test_directories_are_created_private_and_repaired(tmp_path):
    config = Config.defaults(data_dir=tmp_path / "a" / "tape")
    assert not config.data_dir.exists()
    config.prepare()
    config.data_dir.chmod(0o755)
    config.prepare()
    for directory in (config.data_dir, config.runtime_dir):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


@pytest.mark.parametrize(("mode", "other", "why"), [(0o1777, "", "may write"), (0o755, "other", "holds other things")])
def test_a_directory_for_others_is_refused_and_not_taken_away_from_them(tmp_path, mode, other, why):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    if other:
        (shared / other).write_text("")
    with pytest.raises(ConfigError, match=why):
        Config.defaults(data_dir=shared).prepare()
    assert stat.S_IMODE(shared.stat().st_mode) == mode
    shared.chmod(0o700)
    Config.defaults(data_dir=shared).prepare()


def test_a_data_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"bus\.data_dir"):
        Config.defaults(data_dir=tmp_path / "file").prepare()


def test_long_data_dirs_get_short_socket_paths_of_their_own(tmp_path):
    short, long, other = (Config.defaults(data_dir=Path("/x") / name) for name in ("a", "b" * 120, "c" * 120))
    assert short.runtime_dir == Path("/x/a/run")
    assert long.runtime_dir != other.runtime_dir
    assert len(long.control_endpoint) < 108


def test_secrets_come_from_private_files_or_variables(tmp_path, monkeypatch):
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    token.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_secret({"file": str(token)}, "plugins.telegram.token")
    token.chmod(0o600)
    assert read_secret({"file": str(token)}) == "s3cret"
    monkeypatch.setenv("BOT", "abc")
    assert read_secret({"env": "BOT"}) == "abc"
    for wrong in ("plain", {"env": "NOT_SET_ANYWHERE"}, {"file": str(tmp_path / "none")}, {}, {"file": "a", "x": "b"}):
        with pytest.raises(ConfigError, match=r"plugins\.telegram\.token") as caught:
            read_secret(wrong, "plugins.telegram.token")
        assert "plain" not in str(caught.value)


def test_a_data_dir_that_is_a_link_is_refused_with_its_target(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="symbolic link") as caught:
        Config.defaults(data_dir=tmp_path / "link").prepare()
    assert str(tmp_path / "real") in str(caught.value) and caught.value.exit_code == 78


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_a_data_dir_of_another_user_is_refused(tmp_path):
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 4242, 4242)
    with pytest.raises(ConfigError, match="another user"):
        Config.defaults(data_dir=tmp_path / "theirs").prepare()


@pytest.mark.parametrize("control", ["tcp://127.0.0.1:5573", "ipc://@abstract", "ipc://relative.sock", "ipc://*"])
def test_control_is_an_absolute_path_and_nothing_else(tmp_path, control):
    assert "listen.control" in refusal(tmp_path, f"[listen]\ncontrol = '{control}'")


def test_a_memory_limit_below_what_the_bus_needs_is_refused(tmp_path):
    assert "bus.memory_limit_mb = 100" in refusal(tmp_path, "[bus]\nmemory_limit_mb = 100")
    assert load(tmp_path, "[bus]\nmemory_limit_mb = 512").bus.memory_limit_mb == 512
