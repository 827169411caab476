"""Recorded files become events, each published once, none dropped."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapebus.errors import BusNotRunning, UsageError
from tapebus.replay import WINDOW, Recorded, Recording, replay

MIDNIGHT = 1399507200.0  # 2014-05-08T00:00:00Z


class Room:
    """A publisher with little room whose bus acknowledges what waits at each flush."""

    def __init__(self, room: int, source: str = "replay", dead: bool = False) -> None:
        self.room, self.source, self.outbox, self.dead = room, source, None, dead
        self.waiting: list[tuple[str, float, str]] = []
        self.acked: list[tuple[str, float, str]] = []
        self.most = 0

    def publish(self, event_type: str, data: dict[str, Any], timestamp: float, source: str, **envelope: Any) -> bool:
        if data.get("too_large") or len(self.waiting) >= self.room:
            return False
        self.waiting.append((event_type, timestamp, source))
        self.most = max(self.most, len(self.waiting))
        return True

    def flush(self, timeout: float = 5.0) -> bool:
        if not self.dead:
            self.acked += self.waiting
            self.waiting = []
        return not self.dead

    def stats(self) -> dict[str, Any]:
        return {"acked": len(self.acked), "in_flight": len(self.waiting), "rejected": {}}


def lean(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_lean_rows_count_from_midnight_utc_of_the_day_in_the_name(tmp_path):
    path = lean(tmp_path, "20140508_eurusd_tick_quote.csv", "8715,1.39101,1.39114\n15681.5,1.39102,1.39116\n")
    first, second = Recording(path)
    assert first == ("market_data", MIDNIGHT + 8.715, {"symbol": "EURUSD", "bid": 1.39101, "ask": 1.39114}, "lean", {})
    assert second.timestamp == MIDNIGHT + 15.6815


@pytest.mark.parametrize("name", ["oanda_eurusd_20140508.csv", "EURUSD-20140508.csv", "20140508_EURUSD_tick_quote.csv"])
def test_date_and_symbol_are_found_in_usual_names(tmp_path, name):
    (only,) = Recording(lean(tmp_path, name, "0,1.1,1.2\n"))
    assert (only.timestamp, only.data["symbol"]) == (MIDNIGHT, "EURUSD")


def test_a_name_without_a_date_is_refused_and_a_missing_symbol_can_be_given(tmp_path):
    with pytest.raises(UsageError, match="date and the symbol"):
        list(Recording(lean(tmp_path, "ticks.csv", "0,1.1,1.2\n")))
    dated = lean(tmp_path, "20140508_quote.csv", "0,1.1,1.2\n")
    assert next(iter(Recording(dated, symbol="XAUUSD"))).data["symbol"] == "XAUUSD"


def test_a_zip_is_read_member_by_member_in_order(tmp_path):
    path = tmp_path / "oanda_eurusd.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("20140509_eurusd_tick_quote.csv", "0,1.3,1.4\n")
        archive.writestr("20140508_eurusd_tick_quote.csv", "0,1.1,1.2\n")
    recording = Recording(path)
    assert [each.timestamp for each in recording] == [MIDNIGHT, MIDNIGHT + 86400]
    assert recording.fraction == 1.0


def test_a_day_of_recorded_quotes_matches_its_own_rows(shared_data):
    path = shared_data / "ticks" / "oanda_eurusd_20140508.zip"
    with zipfile.ZipFile(path) as archive:
        rows = archive.read(archive.namelist()[0]).decode().splitlines()
    recording = Recording(path)
    found = list(recording)
    assert (len(found), recording.skipped) == (87_833, 0) == (len(rows), 0)
    for at in (0, 40_000, -1):
        ms, bid, ask = map(float, rows[at].split(","))
        assert found[at].timestamp == pytest.approx(MIDNIGHT + ms / 1000, abs=1e-6)
        assert (found[at].data["bid"], found[at].data["ask"]) == (bid, ask)


MT5 = (
    "<DATE>\t<TIME>\t<BID>\t<ASK>\t<LAST>\t<VOLUME>\t<FLAGS>\n"
    "2024.09.02\t00:00:01.250\t1.10500\t\t\t\t2\n"
    "2024.09.02\t00:00:02.500\t\t1.10512\t\t\t4\n"
    "2024.09.02\t00:00:03.000\t1.10502\t1.10513\t\t\t6\n"
)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_an_mt5_export_carries_the_price_that_did_not_change(tmp_path, encoding):
    path = tmp_path / "EURUSD_202409020000_202409022359.csv"
    path.write_bytes(MT5.encode(encoding))
    found = list(Recording(path, utc_offset_h=3))
    assert [(each.timestamp, each.data["bid"], each.data["ask"]) for each in found] == [
        (1725235202.5 - 10800, 1.105, 1.10512),
        (1725235203.0 - 10800, 1.10502, 1.10513),
    ]
    assert {each.data["symbol"] for each in found} == {"EURUSD"}


def test_json_lines_keep_the_whole_envelope_and_know_terminal_ticks(tmp_path):
    path = tmp_path / "events.jsonl"
    lines = [
        '{"event_type":"fire_command","timestamp":"2025-08-21T17:58:37+00:00","source":"webapp","data":{"fire_id":"F"},'
        '"correlation_id":"S1","user_id":"7","bus_seq":9}',
        '{"type":"tick","symbol":"EURUSD","bid":1.1663,"ask":1.16632,"spread":2,"volume":250,"timestamp":1754613325}',
        '{"type":"handshake"}',
        "not json",
        "",
        "# a comment",
    ]
    path.write_text("\n".join(lines))
    recording = Recording(path)
    fire, tick = recording
    assert fire.timestamp == 1755799117.0
    assert (fire.source, fire.extra) == ("webapp", {"correlation_id": "S1", "user_id": "7"})
    assert (tick.event_type, tick.timestamp) == ("market_data", 1754613325.0)
    assert tick.data == {"symbol": "EURUSD", "bid": 1.1663, "ask": 1.16632, "volume": 250}
    assert recording.skipped == 2
    assert "events.jsonl line 3" in recording.problem


@given(st.binary(max_size=300))
def test_no_file_whatever_its_bytes_raises_anything_but_a_usage_error(tmp_path_factory, noise):
    path = tmp_path_factory.mktemp("noise") / "20140508_eurusd_tick_quote.csv"
    path.write_bytes(noise)
    try:
        for each in Recording(path):
            assert isinstance(each, Recorded)
    except UsageError:
        pass


def test_a_damaged_zip_is_a_usage_error(tmp_path):
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("20140508_eurusd_tick_quote.csv", "".join(f"{i},1.1,1.2\n" for i in range(5000)))
    broken = bytearray(whole.getvalue())
    broken[200:260] = bytes(60)
    path = tmp_path / "oanda_eurusd_20140508.zip"
    path.write_bytes(broken)
    with pytest.raises(UsageError, match=r"damaged|known recording"):
        list(Recording(path))


def records(count: int, **data: Any) -> list[Recorded]:
    return [Recorded("market_data", MIDNIGHT + i, {"n": i, **data}, f"s{i % 3}", {}) for i in range(count)]


@given(st.integers(0, 3000), st.integers(1, 2000))
def test_each_record_is_published_once_in_order_whatever_the_room(count, room):
    publisher = Room(room)
    summary = replay(records(count), publisher)  # type: ignore[arg-type]
    assert publisher.acked == [("market_data", MIDNIGHT + i, f"s{i % 3}") for i in range(count)]
    assert (summary.events, summary.acked, summary.unsendable) == (count, count, 0)


def test_what_is_in_flight_stays_within_the_window():
    publisher = Room(10**9)
    replay(records(3 * WINDOW), publisher)  # type: ignore[arg-type]
    assert publisher.most <= WINDOW + 256


def test_an_event_that_cannot_be_sent_is_counted_and_does_not_hold_up_the_rest():
    found = records(10)
    found[4].data["too_large"] = True
    summary = replay(found, Room(100))  # type: ignore[arg-type]
    assert (summary.events, summary.acked, summary.unsendable) == (10, 9, 1)


def test_without_a_bus_it_gives_up_with_one_clear_line():
    ticks = iter(range(10**6))
    with pytest.raises(BusNotRunning, match="tapebus run"):
        replay(records(3), Room(100, dead=True), clock=lambda: next(ticks))  # type: ignore[arg-type]


def test_the_pace_is_that_of_the_recording_divided_by_the_speed():
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    replay(records(21), Room(100), speed=10.0, sleep=sleep, clock=lambda: now[0])  # type: ignore[arg-type]
    assert now[0] == pytest.approx(2.0)


def test_a_replay_reaches_a_real_tape_once_under_its_own_sources(make_bus, tmp_path):
    from tapebus import Publisher, Tape

    bus = make_bus(plugins=["schema", "store"]).start()
    path = tmp_path / "events.jsonl"
    lines = [
        {"event_type": "note", "timestamp": 1.0 * i, "source": f"s{i % 2}", "data": {"n": i}, "correlation_id": f"c{i}"}
        for i in range(500)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    with Publisher("replay", endpoint=bus.acked) as publisher:
        summary = replay(Recording(path), publisher)
        assert (summary.acked, publisher.stats()["dropped"]) == (500, {})
    with Tape.open(bus.data_dir) as tape:
        found = list(tape.read(topics=["note"]))
    assert [(e.source, e.timestamp, e.data["n"], e.correlation_id) for e in found] == [
        (f"s{i % 2}", float(i), i, f"c{i}") for i in range(500)
    ]
