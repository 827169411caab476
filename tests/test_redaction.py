"""Secrets stay out of everything a process writes: logs, tracebacks, errors, answers, files and its command line."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from bus_support import wait_until
from tapebus import redaction
from tapebus.config import read_secret
from tapebus.redaction import MASK, RedactingFormatter, redact

CANARY = "987654321:CanaryCanary-Canary_Canary0123456789"
SHORT = "sw0rd\"fish'\\%/"  # looks like nothing, so only its registration can hide it


@pytest.fixture(autouse=True)
def forget():
    before = redaction._known
    yield
    redaction._known = before


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (f"POST https://api.telegram.org/bot{CANARY}/sendMessage", CANARY),
        (f"bot{CANARY.replace(':', '%3A')}/x", "CanaryCanary"),
        ("Authorization: Bearer abc.def-ghi", "abc.def"),
        ("{'authorization': 'Basic dXNlcjpwYXNz'}", "dXNlcjpwYXNz"),
        ("GET /x?token=hunter2&a=1", "hunter2"),
        ("connect(password=hunter2, host=x)", "hunter2"),
        ('{"password": "hunter two"}', "hunter"),
        ("https://me:hunter2@example.com/x", "hunter2"),
        ('secret-key = "' + "a#B" * 13 + '1"', "a#Ba#B"),
    ],
)
def test_what_looks_secret_is_masked(text, hidden):
    assert hidden not in redact(text) and MASK in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "plugins.telegram.token: environment variable BOT is not set; export it",
        'token = { file = "/home/x/token" }',
        "tcp://127.0.0.1:5570 is in use",
        "last bus_seq 123456789: stored 12 events at 17:20:53",
        "ipc:///home/a/run/control.sock",
        "no such key; did you mean password_file?",
    ],
)
def test_what_people_need_to_read_is_left_alone(text):
    assert redact(text) == text


def test_a_registered_secret_is_masked_however_it_is_spelled(monkeypatch):
    monkeypatch.setenv("A_SECRET", SHORT)
    assert read_secret({"env": "A_SECRET"}) == SHORT
    for text in (SHORT, repr({"x": SHORT}), json.dumps([SHORT]), "x%2Fsw0rd%22fish%27%5C%25%2F"):
        assert "sw0rd" not in redact(f"before {text} after"), text


def test_messages_arguments_tracebacks_and_broken_calls_are_masked():
    lines: list[str] = []

    class Sink(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    log = logging.Logger("test")
    sink = Sink()
    sink.setFormatter(RedactingFormatter(logging.Formatter("%(levelname)s %(message)s")))
    log.addHandler(sink)
    log.info("sending to bot%s", CANARY)
    log.info("too few %s %s", CANARY)
    log.info({"token": CANARY}, stack_info=True)
    try:
        raise ValueError(f"https://x/bot{CANARY}/y")
    except ValueError:
        log.exception("failed")
    assert len(lines) == 4 and CANARY not in "\n".join(lines)
    assert "INFO sending to bot" in lines[0] and "Traceback" in lines[3]


CHILD = """
import asyncio, faulthandler, logging, os, sys, threading
from tapebus.redaction import protect, redact
from tapebus.config import read_secret
logging.basicConfig(level="DEBUG", stream=sys.stderr)
protect()
secret = read_secret({"file": sys.argv[1]})
from tapebus.errors import ConfigError
from tapebus_telegram.secret import Secret
from tapebus_telegram.transport import BotTransport
log = logging.getLogger("anybody")
transports = [BotTransport(url, Secret(secret)) for url in ("http://127.0.0.1:9", "https://does-not-exist.invalid")]
runner = asyncio.Runner()
done = 0

def send(transport):
    return runner.run(transport.call("sendMessage", {"chat_id": 1, "text": "x"}))

class Bad:
    def __del__(self):
        raise RuntimeError(f"unraisable {secret}")

def fail(n):
    kind = n % 10
    if kind == 0:
        log.error("refused: %s", send(transports[0]))
    elif kind == 1:
        log.error("https://api.telegram.org/bot%s/getMe failed", secret)
    elif kind == 2:
        log.error("bad arguments %d", secret)
    elif kind == 3:
        try:
            raise OSError(f"cannot reach https://api.telegram.org/bot{secret}/x")
        except OSError as error:
            try:
                raise RuntimeError(repr(error)) from error
            except RuntimeError:
                log.exception("chained")
    elif kind == 4:
        thread = threading.Thread(target=lambda: {}[secret])
        thread.start(); thread.join()
    elif kind == 5:
        Bad()
    elif kind == 6:
        sys.excepthook(*_caught(ConfigError(f"plugins.x.token: {secret}")))
    elif kind == 7:
        log.warning({"token": secret}, stack_info=True)
    elif kind == 8:
        faulthandler.dump_traceback()
    else:
        logging.getLogger("httpx").info("HTTP Request: POST https://x/bot%s/send", secret)

def _caught(error):
    try:
        raise error
    except Exception:
        return sys.exc_info()

for n in range(500):
    fail(n)
    done += 1
log.error("no answer: %s", send(transports[1]))
print(done, flush=True)
raise SystemError(f"the end, uncaught, with {secret}")
"""


def test_500_forced_failures_of_ten_kinds_write_the_token_nowhere(tmp_path):
    pytest.importorskip("telegram", reason="sending is an extra of the Telegram plugin")
    token = tmp_path / "token"
    token.write_text(CANARY)
    token.chmod(0o600)
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(token)], capture_output=True, text=True, timeout=110, check=False
    )
    assert run.stdout == "500\n", run.stderr[-2000:]
    assert run.returncode == 1 and "SystemError" in run.stderr
    for kind in ("chained", "unraisable", "Exception in thread", "ConfigError", "HTTP Request", "Current thread"):
        assert kind in run.stderr, kind
    assert CANARY not in run.stderr and CANARY.partition(":")[2] not in run.stderr


def test_a_bus_that_cannot_deliver_writes_its_token_nowhere(make_bus, tmp_path):
    pytest.importorskip("telegram", reason="sending is an extra of the Telegram plugin")
    token = tmp_path / "token"
    token.write_text(CANARY)
    token.chmod(0o600)
    bus = make_bus(
        ["schema", "store", "telegram"],
        extra=f"[plugins.telegram]\ntoken = {{ file = '{token}' }}\nchats = [{{ id = 1 }}]\n"
        "base_url = 'http://127.0.0.1:9'\n",
    ).start()

    def tapebus(*arguments: str) -> str:
        run = subprocess.run(
            [sys.executable, "-m", "tapebus", *arguments, "--config", str(bus.config_file)],
            capture_output=True,
            env=bus.environ(),
            timeout=60,
            check=False,
        )
        return (run.stdout + run.stderr).decode()

    said = [
        tapebus(
            "publish",
            "signal_generated",
            "signal_id=s1",
            "symbol=EURUSD",
            "direction=BUY",
            "confidence=80",
            "pattern_type=X",
        )
    ]
    said.append(tapebus("publish", "signal_generated", "signal_id=s2", "symbol=3"))
    wait_until(lambda: bus.consumer("telegram")["handled"] >= 1, "the relay to have tried")
    said += [json.dumps(bus.stats()), tapebus("check"), tapebus("stats", "--json"), tapebus("plugins"), tapebus("pm2")]
    said += [tapebus("dlq", "list", "--json"), Path(f"/proc/{bus.process.pid}/cmdline").read_text()]
    assert bus.stop() == 0
    said.append(bus.log.read_text())
    found = [path for path in bus.data_dir.parent.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert found == [] and [text for text in said if CANARY in text] == []
