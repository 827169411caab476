"""The Telegram plugin as configured: texts that parse, dry runs, the token and its file, wrong configurations."""

from __future__ import annotations

import asyncio
import logging
import socket
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import botapi_server as api
import tapebus_telegram
from tapebus.errors import ConfigError
from tapebus.testing import ListBatch, RecordingContext
from tapebus_telegram.markup import MAX_UNITS, compose, units
from tapebus_telegram.outbox import rendered
from tapebus_telegram.render import Renderer
from tapebus_telegram.secret import Secret, guard_logs, read_token, release_logs
from tapebus_telegram.settings import load
from tapebus_trading.symbols import Registry
from telegram_support import TOKEN, World, event, signals, simulate


@given(st.text(max_size=6000), st.text(max_size=300))
def test_any_text_becomes_html_that_parses_back_to_the_plain_text(message: str, name: str) -> None:
    found = Renderer(Registry(), mask_numbers=False).message(event(1, "alert", message=message, name=name))
    assert found is not None
    assert api.visible(found.html) == found.plain
    assert 0 < units(found.plain) <= MAX_UNITS - 32
    assert found.html.count("<") == 2 * (found.html.count("<b>") + found.html.count("<code>"))


def test_a_long_text_is_cut_in_utf16_units_without_splitting_a_character() -> None:
    html, plain = compose([[("🔥" * 5000, "b")]])
    assert units(plain) <= MAX_UNITS - 32 and plain.rstrip("…") == "🔥" * (len(plain) - 1)
    assert api.visible(html) == plain


def test_a_dry_run_shows_its_messages_and_opens_no_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    context = RecordingContext("telegram", {}, tmp_path)
    (consumer,) = tapebus_telegram.tapebus_register_consumers(context)
    consumer.handler(
        ListBatch([event(1, entry=1.08512), event(2, "alert", severity="warning", message="acct 12345678")])
    )
    assert consumer.save is not None and consumer.on_tick is not None
    consumer.on_tick(0.0)
    consumer.save()
    first, second = rendered(context.state)
    assert (first["status"], first["text"].split("\n")[1]) == ("dry_run", "entry 1.08512")
    assert "12345678" not in second["text"] and "•••678" in second["text"]
    assert tapebus_telegram.tapebus_health(context)["status"] == "ok"
    assert tapebus_telegram.tapebus_metrics(context)["dry_run"] == 2
    assert not list(tmp_path.iterdir())
    tapebus_telegram.tapebus_stop(context)


def test_a_token_readable_by_others_or_written_in_the_configuration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_token({"file": str(path)})
    path.chmod(0o600)
    assert read_token({"file": str(path)}).reveal() == TOKEN
    with pytest.raises(ConfigError) as refused:
        read_token(TOKEN)
    assert TOKEN not in str(refused.value)


@pytest.mark.parametrize(
    "config",
    [
        {"token": {"env": "T"}},
        {"chat": []},
        {"dry_run": False},
        {"topics": ["x"]},
        {"base_url": "http://example.org"},
        {"chats": [{"id": 1}, {"id": 1}]},
    ],
)
def test_a_configuration_that_cannot_work_is_refused_with_its_key(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"plugins\.telegram"):
        load(config)


def test_the_token_appears_nowhere_after_hundreds_of_failures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("telegram", reason="sending is an extra")
    caplog.set_level(logging.DEBUG)
    secret = Secret(TOKEN)
    log = logging.getLogger("tapebus.telegram")
    redactor = guard_logs(secret, log)
    seen: list[str] = []

    async def scenario() -> None:
        async with World(tmp_path, queue=400) as world:
            echo = api.failure(500, f"failed at /bot{TOKEN}/sendMessage")
            page = f"<html>/bot{TOKEN}/sendMessage</html>".encode()
            faults = [echo, api.DROP, api.RESET, page, api.TOO_MANY, api.failure(400, TOKEN), api.BAD_ENTITIES]
            world.server.faults.extend(faults[number % len(faults)] for number in range(210))
            await world.handle(signals(210))
            while world.server.calls < 210:
                await asyncio.sleep(20.0)
                world.commit()
                seen.append(f"{world.relay.health()}{world.relay.metrics()}{world.sender.last_error}")
            seen.extend([repr(world.sender.transport), repr(vars(world.relay)), repr(vars(world.sender))])
            seen.extend(blob.decode("latin-1") for blob in world.committed.values())
            world.server.token = TOKEN + "x"
            seen.append(repr(await world.sender.transport.call("getMe", {})))

    try:
        simulate(scenario)
        log.error("address %s", f"http://127.0.0.1/bot{TOKEN}/getMe")
        try:
            raise RuntimeError(f"at /bot{TOKEN}/x")
        except RuntimeError:
            log.exception("caught")
        for name in ("telegram.Bot", "telegram.request.HTTPXRequest", "httpx", "asyncio"):
            logging.getLogger(name).critical("bot%s", TOKEN)
    finally:
        release_logs(redactor, log)
    captured = capfd.readouterr()
    formatted = [
        f"{r.getMessage()}{r.exc_text}{traceback.format_exception(*r.exc_info) if r.exc_info else ''}"
        for r in caplog.records
    ]
    files = [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    assert len(formatted) > 100 and "InvalidToken" not in str(seen[-1]) and "401" in seen[-1]
    for text in [*seen, *formatted, *files, repr(secret), captured.out, captured.err, caplog.text]:
        assert TOKEN not in text and TOKEN.partition(":")[2] not in text
