"""The command line: what it prints, what it refuses, and its exit codes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from tapebus.cli import _COMMANDS, main
from tapebus.cli.common import WIDTH, When, cut, table
from test_units import install

HI = """
@hookimpl
def tapebus_register_commands(cli):
    @cli.command()
    def hi():
        "Say hi."
        click.echo("hi there")
"""


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch, tmp_path):
    for name in ("TAPEBUS_CONFIG", "TAPEBUS_ENDPOINT", "TAPEBUS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path / "none"))


def failure(capsys, *args: str) -> tuple[int, str]:
    code = main(args)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return code, err


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["stats"], 1, ["no bus runs on", "tapebus run"]),
        (["stats", "--json"], 1, ["no bus runs on"]),
        (["stat"], 2, ["did you mean 'stats'"]),
        (["query", "--topic"], 2, ["--topic"]),
        (["query", "--since", "yesterday"], 2, ["yesterday", "6h"]),
        (["query"], 74, ["no tape"]),
        (["stats", "--config", "/none.toml"], 78, ["/none.toml", "no such configuration file"]),
        (["--config", "/none.toml", "stats"], 78, ["/none.toml"]),
        (["run", "--data-dir", "/proc/none/x"], 78, ["bus.data_dir", "--data-dir"]),
        (["publish", "note", "word"], 2, ["KEY=VALUE"]),
        (["publish", "note", "{broken"], 2, ["not valid JSON"]),
        (["replay", "/none.zip"], 2, ["/none.zip"]),
        (["replay", __file__, "--speed", "0"], 2, ["speed"]),
        (["replay", __file__], 2, ["not a known recording"]),
        (["dlq", "purge"], 2, ["--all"]),
        (["query", "--topic", "*x*"], 2, ["'*x*'", "prefix.*"]),
        (["tail", "--topic", "a*"], 2, ["'a*'"]),
        (["publish", "note", "--endpoint", "foo"], 2, ["--endpoint 'foo'", "tcp://HOST:PORT"]),
        (["publish", "note", "--endpoint", "tcp://127.0.0.1:99999"], 2, ["not an endpoint"]),
        (["publish", "-", "a=1"], 2, ["TYPE comes first"]),
        (["pm2", "--memory", "lots"], 2, ["'lots'", "500M"]),
        (["check", "--deep"], 2, ["--books"]),
    ],
)
def test_a_mistake_is_one_line_with_a_documented_exit_code(capsys, args, code, words):
    found, err = failure(capsys, *args)
    assert found == code
    assert err.startswith("tapebus: ")
    assert err.count("\n") == 1, err
    assert [word for word in words if word not in err] == []


def test_a_malformed_endpoint_of_the_environment_exits_78(capsys, monkeypatch):
    monkeypatch.setenv("TAPEBUS_ENDPOINT", "foo")
    code, err = failure(capsys, "publish", "note")
    assert code == 78 and "TAPEBUS_ENDPOINT 'foo'" in err


def test_no_summary_of_a_command_is_cut_off(capsys):
    main(["--help"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line for line in lines if "..." in line] == []


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ('[plugins.slots]\nmax_slots = "ten"', ["plugins.slots", "max_slots"]),
        ("[plugins.store]\nmax_events = -1", ["plugins.store", "max_events"]),
        ("[plugins.outcomes]\nmax_gap = 1", ["plugins.outcomes.max_gap", "max_gap_s"]),
        ("[plugins.telegram]\nchats = 1", ["plugins.telegram"]),
    ],
)
def test_check_says_of_a_plugins_table_what_the_start_would_say(capsys, make_bus, table, words):
    bus = make_bus(extra=table)
    assert main(["check", "--json", "--config", str(bus.config_file)]) == 78
    found = [each["message"] for each in json.loads(capsys.readouterr().out) if each["status"] == "error"]
    assert len(found) == 1 and all(word in found[0] for word in words), found
    code, err = failure(capsys, "run", "--config", str(bus.config_file))
    assert (code, err) == (78, f"tapebus: {found[0]}\n")


@pytest.mark.parametrize("place", ["/proc/x", "/sys/tapebus/deeper"])
def test_check_sees_where_no_directory_can_be_made(capsys, place):
    assert main(["check", "--data-dir", place]) == 78
    assert f"{place} cannot be created" in capsys.readouterr().out


def test_commands_of_a_plugin_that_a_configuration_enables_are_there(tmp_path):
    install(tmp_path, "hi", "import click\nfrom tapebus import hookimpl\n" + HI)
    config = tmp_path / "bus.toml"
    config.write_text('[plugins]\nenabled = ["schema", "store", "hi"]\n')
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])

    def said(*args, **variables):
        command = [sys.executable, "-m", "tapebus", *args]
        variables = {**os.environ, "PYTHONPATH": path, **variables}
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False).stdout

    where = {"TAPEBUS_CONFIG": str(config)}
    assert said("hi", **where) == said("--config", str(config), "hi") == "hi there\n"
    assert "Say hi." in said("--help", **where) and "Say hi." in said("--config", str(config), "--help")
    assert "Say hi." not in said("--help")


def test_check_names_a_directory_that_others_use(capsys, tmp_path):
    tmp_path.chmod(0o1777)
    assert main(["check", "--data-dir", str(tmp_path)]) == 78
    assert f"{tmp_path}: other users may write there" in capsys.readouterr().out
    assert tmp_path.stat().st_mode & 0o7777 == 0o1777


def test_check_leaves_nothing_behind(capsys, tmp_path):
    main(["check", "--data-dir", str(tmp_path / "a" / "b")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["500M", "1G", "2048", "64K"])
def test_pm2_takes_the_sizes_pm2_knows(capsys, size):
    assert main(["pm2", "--memory", size]) == 0
    assert f'"max_memory_restart": "{size}"' in capsys.readouterr().out


def test_a_bind_beyond_this_machine_exits_78(capsys, monkeypatch):
    monkeypatch.setenv("TAPEBUS_LISTEN_FEED", "tcp://0.0.0.0:5570")
    assert failure(capsys, "run")[0] == 78


@pytest.mark.parametrize("command", ["query", "tail"])
def test_the_examples_in_a_help_are_understood(capsys, command):
    assert main([command, "--help"]) == 0
    examples = re.findall(rf"^  tapebus ({command} .*)$", capsys.readouterr().out, re.M)
    assert len(examples) >= 2
    for example in examples:
        assert main([*shlex.split(example), "--help"]) == 0, example  # --help is looked at after all options are


def test_help_names_every_command_of_the_core_and_of_plugins(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert [name for name in [*_COMMANDS, "demo", "explain", "import"] if f"\n  {name} " not in listed] == []


@pytest.mark.parametrize("name", _COMMANDS)
def test_every_command_explains_itself_and_takes_config_and_data_dir(capsys, name):
    commands = {"dlq": ["dlq", "list"]}
    assert main([*commands.get(name, [name]), "--help"]) == 0
    text = capsys.readouterr().out
    assert "--config" in text and "--data-dir" in text


def test_stats_loads_neither_the_runtime_nor_a_plugin_nor_rich():
    code = (
        "import sys; from tapebus.cli import main; main(['stats'])\n"
        "heavy = {'rich', 'lmdb', 'tapebus.runtime', 'tapebus_schema', 'httpx', 'asyncio'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_times_are_seconds_dates_or_ages():
    def parse(text: str) -> float:
        return When().convert(text, None, None)

    assert parse("1754613325.5") == 1754613325.5
    assert parse("2025-08-21T17:58:37") == parse("2025-08-21T19:58:37+02:00") == 1755799117.0
    assert abs(time.time() - 6 * 3600 - parse("6h")) < 60
    assert abs(time.time() - 30 * 86400 - parse("30d")) < 60
    for wrong in ("", "nan", "6x", "inf"):
        with pytest.raises(click.BadParameter):
            parse(wrong)


def test_tables_fit_and_cannot_steer_the_terminal(capsys):
    table(["id", "text", "n"], [[1, "a\x1b[2J" + "x" * 300, 12345], [2, "y" * 90, 1]])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "\x1b" not in "".join(lines)
    assert lines[1].endswith("12,345")
    assert cut("abcdef", 4) == "abc…"


def test_publish_query_tail_and_stats_agree_about_a_running_bus(capsys, make_bus):
    bus = make_bus(plugins=["schema", "store"], extra="[feed]\ntopic_prefix = 'x'").start()
    where = ["--config", str(bus.config_file)]
    quote = ["publish", "market_data", "symbol=EURUSD", "bid=1.1", "ask=1.2"]
    assert main([*quote, "--correlation-id", "S1", *where]) == 0
    assert "1 event published (on disk)" in capsys.readouterr().out
    assert main(["query", "--json", "--topic", "market_data", *where]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["data"] == {"symbol": "EURUSD", "bid": 1.1, "ask": 1.2}
    assert (found["correlation_id"], found["source"], found["event_type"]) == ("S1", "cli", "market_data")
    assert main(["query", "--json", "--correlation-id", "S1", "--since", "1h", *where]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert main(["query", "--after", str(found["bus_seq"]), "--topic", "market_data", *where]) == 0
    assert capsys.readouterr().out == ""
    assert main(["stats", "--json", *where]) == 0
    stats = json.loads(capsys.readouterr().out)
    book = next(each for each in stats["producers"] if each["source"] == "cli")
    assert (book["highest_seq"], book["stored"], book["in_flight"]) == (1, 1, 0)
    assert main(["stats", *where]) == main(["plugins", *where]) == main(["query", *where]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= WIDTH
    assert main(["check", "--json", *where]) == 0
    assert {each["status"] for each in json.loads(capsys.readouterr().out)} <= {"ok", "warn"}


def test_a_refused_event_becomes_a_dead_letter_that_can_be_listed_shown_and_purged(capsys, make_bus):
    bus = make_bus(plugins=["schema", "store"]).start()
    where = ["--config", str(bus.config_file)]
    main(["publish", "market_data", "symbol=EURUSD", "bid=x", "ask=1.2", *where])
    capsys.readouterr()
    assert main(["dlq", "list", "--json", "--topic", "market_data", *where]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    letter = json.loads(line)
    assert letter["place"] == "schema"
    assert main(["dlq", "show", str(letter["id"]), *where]) == 0
    assert "EURUSD" in capsys.readouterr().out
    assert main(["dlq", "purge", "--id", str(letter["id"]), "--yes", *where]) == 0
    assert "1 purged" in capsys.readouterr().out
    bus.wait_for(lambda _: main(["dlq", "list", *where]) == 0 and "no dead" in capsys.readouterr().out, "to purge")


def test_publish_says_when_an_event_was_found_wrong_and_which(capsys, make_bus):
    bus = make_bus(plugins=["schema", "store"]).start()
    where = ["--config", str(bus.config_file)]
    assert main(["publish", "market_data", "symbol=EURUSD", "bid=1.1", "ask=1.2", *where]) == 0
    assert capsys.readouterr().err == ""
    assert main(["publish", "market_data", "symbol=EURUSD", "bid=x", "ask=1.2", *where]) == 1
    out, err = capsys.readouterr()
    assert out == "1 event published (on disk)\n"
    assert err.startswith("tapebus: 1 of 1 became dead letters, the first (number 1): ") and "bid" in err
    good = '{"symbol": "EURUSD", "bid": 1.1, "ask": 1.2}\n'
    lines = good * 3 + '{"symbol": "EURUSD"}\n' + good
    done = subprocess.run(
        [sys.executable, "-m", "tapebus", "publish", "market_data", "-", *where],
        input=lines,
        capture_output=True,
        text=True,
        env=bus.environ(),
    )
    assert done.returncode == 1 and "1 of 5 became dead letters" in done.stderr, done.stderr


def test_publish_without_anything_on_standard_input_says_so(make_bus):
    bus = make_bus(plugins=["schema", "store"])
    command = [sys.executable, "-m", "tapebus", "publish", "--config", str(bus.config_file)]
    done = subprocess.run(command, input="", capture_output=True, text=True, env=bus.environ())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "0 events published: there was nothing on standard input\n"


def test_publish_announces_that_it_reads_what_is_typed(make_bus):
    import os
    import pty

    bus = make_bus(plugins=["schema", "store"])
    keyboard, terminal = pty.openpty()
    command = [sys.executable, "-m", "tapebus", "publish", "--config", str(bus.config_file)]
    process = subprocess.Popen(
        command, stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=bus.environ()
    )
    os.close(terminal)
    try:
        assert process.stderr is not None and b"reading standard input" in process.stderr.readline()
        os.write(keyboard, b"\x04")
        out, _ = process.communicate(timeout=30)
        assert out.startswith(b"0 events published")
    finally:
        os.close(keyboard)
        process.kill()
        process.wait()


def test_run_says_in_one_line_that_it_has_stopped_and_that_the_books_close(make_bus):
    bus = make_bus(plugins=["schema", "store"]).start()
    assert bus.stop() == 0
    last = bus.output().splitlines()[-1]
    assert "stopped after" in last and "unexplained 0" in last


def test_without_standard_streams_nothing_is_written_into_the_files_of_the_bus(make_bus):
    bus = make_bus(plugins=["schema", "store"])
    command = bus.command
    bus.command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    bus.start()
    assert bus.process is not None
    open_files = Path(f"/proc/{bus.process.pid}/fd")
    if open_files.is_dir():
        assert [os.readlink(open_files / str(fd)) for fd in range(3)] == [os.devnull] * 3
    assert (
        main(["publish", "market_data", "symbol=EURUSD", "bid=1.1", "ask=1.2", "--config", str(bus.config_file)]) == 0
    )
    pid = bus.process.pid
    assert bus.stop() == 0
    assert (bus.data_dir / "bus.lock").read_text().strip() == str(pid)


def test_json_lines_from_standard_input_are_published_in_order(make_bus):
    bus = make_bus(plugins=["schema", "store"]).start()
    command = [sys.executable, "-m", "tapebus"]
    lines = "".join(json.dumps({"n": n}) + "\n" for n in range(50))
    done = subprocess.run(
        [*command, "publish", "note", "-", "--config", str(bus.config_file)],
        input=lines,
        capture_output=True,
        text=True,
        env=bus.environ(),
    )
    assert done.returncode == 0, done.stderr
    # A reader that goes away early is no failure.
    shell = subprocess.Popen(
        [*command, "query", "--json", "--topic", "note", "--config", str(bus.config_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=bus.environ(),
    )
    assert shell.stdout is not None and shell.stderr is not None
    assert json.loads(shell.stdout.readline())["data"] == {"n": 0}
    shell.stdout.close()
    assert shell.stderr.read() == b""
    shell.stderr.close()
    assert shell.wait(30) == 0


def test_check_names_a_port_that_another_program_holds(capsys, make_bus):
    import socket

    bus = make_bus(plugins=["schema", "store"])
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(bus.feed.rpartition(":")[2])))
        other.listen()
        assert main(["check", "--config", str(bus.config_file)]) == 1
    assert f"{bus.feed} is in use by another program" in capsys.readouterr().out


def test_pm2_prints_a_file_that_names_the_configuration(capsys, make_bus):
    bus = make_bus()
    assert main(["pm2", "--config", str(bus.config_file)]) == 0
    text = capsys.readouterr().out
    assert str(Path(bus.config_file)) in text and "module.exports" in text


def test_a_dead_letter_published_again_leaves_the_list_and_returns_when_it_is_still_wrong(capsys, make_bus):
    bus = make_bus(plugins=["schema", "store"]).start()
    where = ["--config", str(bus.config_file)]

    def buried() -> list[int]:
        assert main(["dlq", "list", "--json", *where]) == 0
        return [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()]

    main(["publish", "market_data", "symbol=EURUSD", "bid=x", "ask=1.2", *where])
    capsys.readouterr()
    bus.wait_for(lambda _: buried() == [1], "to bury the event")
    assert main(["dlq", "replay", "--all", *where]) == 0
    assert "1 published again and purged" in capsys.readouterr().out
    bus.wait_for(lambda _: buried() == [2], "to bury it again")
