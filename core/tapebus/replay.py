"""Recorded files as events: LEAN ticks, MT5 tick exports, JSON lines; and publishing them without loss."""

from __future__ import annotations

import io
import math
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from tapebus.errors import BusNotRunning, UsageError

if TYPE_CHECKING:
    from tapebus.publisher import Publisher

_EXTRA = ("correlation_id", "causation_id", "user_id", "session_id", "event_id", "priority")
_LEAN_MEMBER = re.compile(r"(\d{8})_([a-z0-9.]+)_tick", re.IGNORECASE)
_NO_SYMBOL = {"tick", "ticks", "quote", "trade", "oanda", "fxcm", "forex", "cfd", "export"}
_decode = msgspec.json.Decoder().decode


class Recorded(NamedTuple):
    """One recorded event; ``timestamp`` is Unix seconds, ``extra`` the rest of its envelope."""

    event_type: str
    timestamp: float
    data: dict[str, Any]
    source: str
    extra: dict[str, Any]


class _Unreadable(ValueError):
    """One line that is no event; the message says why."""


class Recording:
    """A recorded file, read once from start to end by iterating over it.

    Lines that are no event are counted in ``skipped`` and the first one is described in ``problem``;
    ``fraction`` is how much has been read. `symbol` names the instrument where the file does not.
    `utc_offset_h` is subtracted from the broker's local time of an MT5 export, in hours.
    """

    def __init__(self, path: Path, *, symbol: str = "", utc_offset_h: float = 0.0) -> None:
        self.path = path
        self.symbol = symbol
        self.utc_offset_h = utc_offset_h
        self.skipped = 0
        self.problem = ""
        self._read_bytes = 0
        self._all_bytes = 1

    @property
    def fraction(self) -> float:
        return min(1.0, self._read_bytes / self._all_bytes)

    def __iter__(self) -> Iterator[Recorded]:
        try:
            if zipfile.is_zipfile(self.path):
                with zipfile.ZipFile(self.path) as archive:
                    members = [each for each in archive.infolist() if not each.is_dir()]
                    self._all_bytes = sum(each.file_size for each in members) or 1
                    for member in sorted(members, key=lambda each: each.filename):
                        with archive.open(member) as stream:
                            yield from self._lines(stream, member.filename)
            else:
                self._all_bytes = self.path.stat().st_size or 1
                with self.path.open("rb") as stream:
                    yield from self._lines(stream, self.path.name)
        except OSError as error:
            raise UsageError(f"{self.path}: cannot read it: {error.strerror}") from None
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            # The last two are what zipfile raises for an unknown compression and for an encrypted member.
            raise UsageError(f"{self.path}: damaged zip file: {error}") from None

    def _lines(self, stream: Any, name: str) -> Iterator[Recorded]:
        # utf-16 is what the MT5 terminal itself writes.
        head = stream.read(3)
        stream.seek(0)
        encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        text = io.TextIOWrapper(stream, encoding=encoding, errors="replace")
        parse: Callable[[str], Recorded | None] | None = None
        for number, line in enumerate(text, 1):
            self._read_bytes += len(line)
            if not line.strip() or line.startswith("#"):
                continue
            try:
                if parse is None:
                    parse = self._parser(line, name)
                    if line.startswith("<"):
                        continue
                recorded = parse(line)
            except _Unreadable as error:
                self.skipped += 1
                self.problem = self.problem or f"{name} line {number}: {error}"
                continue
            if recorded is not None:
                yield recorded

    def _parser(self, first: str, name: str) -> Callable[[str], Recorded | None]:
        if first.startswith("<"):
            return _mt5(first, self.symbol or _symbol_in(name) or _symbol_in(self.path.name), self.utc_offset_h)
        if first.lstrip().startswith("{"):
            return _json_line
        if first[:1].isdigit() and first.count(",") >= 2:
            day, symbol = self._lean_name(name)
            return _lean(day, symbol)
        raise UsageError(
            f"{self.path}: not a known recording; expected LEAN ticks (ms,bid,ask), an MT5 tick export or JSON lines"
        )

    def _lean_name(self, name: str) -> tuple[float, str]:
        """Midnight UTC of the day and the symbol, from the name of the member or of the file."""
        for candidate in (Path(name).name, self.path.name):
            day = re.search(r"(?<!\d)(\d{8})(?!\d)", candidate)
            found = _LEAN_MEMBER.search(candidate)
            symbol = self.symbol or (found[2] if found else _symbol_in(candidate))
            if day is not None and symbol:
                try:
                    midnight = datetime.strptime(day[1], "%Y%m%d").replace(tzinfo=UTC)
                except ValueError:
                    continue
                return midnight.timestamp(), symbol.upper()
        raise UsageError(
            f"{self.path}: its name must hold the date and the symbol, as in 20140508_eurusd_tick_quote.csv "
            "(--symbol gives the symbol)"
        )


def _symbol_in(name: str) -> str:
    words = re.split(r"[_\-\s]+", name.partition(".")[0])
    found = [word for word in words if word[:1].isalpha() and word.lower() not in _NO_SYMBOL]
    return found[0].upper() if found else ""


def _price(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise _Unreadable(f"{text.strip()!r} is not a number") from None
    if not (math.isfinite(value) and value > 0):
        raise _Unreadable(f"{text.strip()!r} is not a price")
    return value


def _lean(midnight: float, symbol: str) -> Callable[[str], Recorded]:
    def parse(line: str) -> Recorded:
        fields = line.split(",")
        try:
            ms = float(fields[0])
        except ValueError:
            raise _Unreadable(f"{fields[0].strip()!r} is not a time in ms") from None
        if len(fields) < 3 or not 0 <= ms < 86_400_000:
            raise _Unreadable("expected ms_since_midnight,bid,ask")
        data = {"symbol": symbol, "bid": _price(fields[1]), "ask": _price(fields[2])}
        return Recorded("market_data", midnight + ms / 1000, data, "lean", {})

    return parse


def _mt5(header: str, symbol: str, utc_offset_h: float) -> Callable[[str], Recorded | None]:
    columns = {name.strip().strip("<>").upper(): index for index, name in enumerate(header.split("\t"))}
    if not {"DATE", "TIME", "BID", "ASK"} <= set(columns):
        raise UsageError("an MT5 tick export needs the columns <DATE> <TIME> <BID> <ASK>, separated by tabs")
    if not symbol:
        raise UsageError("the name of an MT5 export must begin with the symbol; give it with --symbol")
    # A field is empty where that price did not change.
    last = {"bid": 0.0, "ask": 0.0}

    def parse(line: str) -> Recorded | None:
        fields = [each.strip() for each in line.split("\t")]
        try:
            moment = f"{fields[columns['DATE']].replace('.', '-')}T{fields[columns['TIME']]}"
            at = datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp() - utc_offset_h * 3600
            bid, ask = fields[columns["BID"]], fields[columns["ASK"]]
        except (IndexError, ValueError):
            raise _Unreadable("expected <DATE> <TIME> <BID> <ASK>, separated by tabs") from None
        now = {"bid": _price(bid) if bid else last["bid"], "ask": _price(ask) if ask else last["ask"]}
        last.update(now)
        if not (now["bid"] and now["ask"]):
            return None
        data: dict[str, Any] = {"symbol": symbol, **now}
        volume = columns.get("VOLUME", len(fields))
        if volume < len(fields) and fields[volume]:
            data["volume"] = _price(fields[volume])
        return Recorded("market_data", at, data, "mt5", {})

    return parse


def from_envelope(line: dict[str, Any]) -> Recorded:
    """An envelope as `Recorded`; raises `ValueError` where it is none."""
    event_type, data = line.get("event_type"), line.get("data")
    if not isinstance(event_type, str) or not event_type or not isinstance(data, dict):
        raise _Unreadable('no event: expected {"event_type": …, "timestamp": …, "data": {…}}')
    extra = {key: line[key] for key in _EXTRA if line.get(key) is not None}
    return Recorded(event_type, _seconds(line.get("timestamp")), data, str(line.get("source") or "replay"), extra)


def _json_line(line: str) -> Recorded:
    try:
        found = _decode(line)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _Unreadable(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise _Unreadable("not a JSON object")
    if str(found.get("type", "")).lower() == "tick":
        keys = ("symbol", "bid", "ask", "volume")
        tick = {key: found[key] for key in keys if found.get(key) is not None}
        if not {"symbol", "bid", "ask"} <= set(tick):
            raise _Unreadable("a tick needs symbol, bid and ask")
        return Recorded("market_data", _seconds(found.get("timestamp")), tick, "mt5_ea", {})
    return from_envelope(found)


def _seconds(value: Any) -> float:
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise _Unreadable(f"timestamp {value!r} is neither Unix seconds nor ISO 8601") from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _Unreadable(f"timestamp {value!r} is neither Unix seconds nor ISO 8601")
    return float(value)


# -- publishing ---------------------------------------------------------------------------------


class Summary(msgspec.Struct):
    """What became of a replay; ``acked`` events are on disk, ``rejected`` counts those the bus refused,
    ``unsendable`` those the publisher could not even encode."""

    events: int = 0
    seconds: float = 0.0
    acked: int = 0
    rejected: int = 0
    unsendable: int = 0

    @property
    def rate(self) -> float:
        """Events per second."""
        return self.events / self.seconds if self.seconds > 0 else 0.0


def publish(publisher: Publisher, record: Recorded) -> bool:
    """Publish one record under its own source; from one thread only."""
    return publisher.publish(
        record.event_type, record.data, timestamp=record.timestamp, source=record.source, **record.extra
    )


#: Below this many events in flight a publisher (65,536 events, 16 MiB) has room for any next one.
WINDOW = 8192
_CHECK_EVERY = 256


def replay(
    records: Iterable[Recorded],
    publisher: Publisher,
    *,
    speed: float | None = None,
    patience_s: float = 10.0,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[int], None] | None = None,
) -> Summary:
    """Publish each record once, at `speed` times the original pace or, with ``None``, flat out.

    Waits for room instead of dropping. Raises `BusNotRunning` when the bus accepts nothing for
    `patience_s` seconds. Returns when everything is acknowledged.
    """
    summary = Summary()
    began = clock()
    first: float | None = None
    before = publisher.stats()
    for record in records:
        if speed is not None:
            first = record.timestamp if first is None else first
            wait = began + (record.timestamp - first) / speed - clock()
            if wait > 0:
                sleep(wait)
        if not publish(publisher, record):
            _wait_for(publisher, 0, patience_s, clock)
            # With all the room there is, a second refusal is the event's own fault (too large).
            summary.unsendable += not publish(publisher, record)
        summary.events += 1
        if summary.events % _CHECK_EVERY == 0:
            _wait_for(publisher, WINDOW, patience_s, clock)
            if progress is not None:
                progress(summary.events)
    _wait_for(publisher, 0, patience_s, clock)
    after = publisher.stats()
    summary.seconds = clock() - began
    summary.acked = after["acked"] - before["acked"]
    summary.rejected = sum(after.get("rejected", {}).values()) - sum(before.get("rejected", {}).values())
    return summary


def _wait_for(publisher: Publisher, limit: int, patience_s: float, clock: Callable[[], float]) -> None:
    """Wait until at most `limit` events are in flight, as long as the number keeps falling."""
    lowest = publisher.stats()["in_flight"]
    deadline = clock() + patience_s
    while lowest > limit:
        publisher.flush(min(0.05, patience_s))
        now = publisher.stats()["in_flight"]
        if now < lowest:
            lowest, deadline = now, clock() + patience_s
        elif clock() > deadline:
            raise BusNotRunning(
                f"no bus takes the events ({now} wait): start one with `tapebus run`, or check --endpoint"
            )
