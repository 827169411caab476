"""The steps of an import: read the files, look at the tape, publish what is new, and prove that it arrived.

Nothing is imported twice. What is on the tape already is not published again, and what a killed import had published
is sent to the end first: its spool is kept in the data directory, and the bus knows each event by its number in there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tapebus import Publisher
from tapebus.cli.common import need_bus, open_tape, publisher
from tapebus.config import Config
from tapebus.errors import BusNotRunning, StoreError, TapebusError, UsageError
from tapebus.plugins import load, registry
from tapebus.replay import Recorded, replay
from tapebus_legacy import facts, signals
from tapebus_legacy.account import REFUSED, REMARKED, Account
from tapebus_legacy.facts import Fact, Refused
from tapebus_legacy.records import Log
from tapebus_legacy.signals import FOLLOWED, ON_TAPE_OPEN, OPEN, OUTCOME, Made
from tapebus_trading.symbols import Registry

#: Every event of an import says in its source that it is one, and which system's log it comes from.
SOURCE = "import"
#: Seconds without any progress after which the bus counts as gone; a restart takes less.
PATIENCE_S = 30.0
#: Events that are followed to their end by this bus, or have been.
_SIGNALS = ("signal_generated", OPEN, OUTCOME)

Progress = Callable[[str, float], None]


class Import:
    """One run of ``tapebus import``; `progress` is told what is being done and how far it is, 0 to 1."""

    def __init__(self, config: Config, paths: Sequence[str], progress: Progress) -> None:
        self.config, self.paths, self.progress = config, paths, progress
        self.accounts: list[Account] = []
        self.systems: list[str] = []
        self.facts: list[Fact] = []
        self.made: list[Made] = []
        self.stored = 0

    def read(self) -> None:
        """Read all files. Raises `UsageError` where one cannot be read."""
        for path in self.paths:
            log = Log(path)
            account = Account(path)
            self.accounts.append(account)
            self.systems.append(f"{SOURCE}:{log.system}"[:100])
            mine: list[Fact] = []
            for line in log:
                if line.number % 512 == 0:
                    self.progress(log.name, log.fraction)
                shape = facts.UNKNOWN_SHAPE if line.record is None else facts.recognise(line.record)
                if line.record is None:
                    account.note(shape, REFUSED, line.number, line.problem, f"line {line.number}: {line.problem}")
                elif shape == facts.REMARK:
                    account.note(shape, REMARKED, line.number, *_remark(line.record))
                elif shape == facts.UNKNOWN_SHAPE:
                    account.note(shape, REFUSED, line.number, "unknown shape", f"fields {', '.join(line.record)}"[:200])
                else:
                    account.passed_over(line.record, facts.READ)
                    try:
                        mine.append(facts.fact(line.record, shape, len(self.accounts) - 1, line.number))
                    except Refused as refused:
                        account.note(shape, REFUSED, line.number, refused.reason, str(refused))
            account.lines, account.blank = log.lines, log.blank
            signals.settle(mine)
            self.facts += mine

    def plan(self) -> None:
        """Decide what is new; where there is no tape yet, everything is."""
        ids = {each.signal_id for each in self.facts}
        symbols = Registry(self.config.shared)
        with contextlib.suppress(StoreError):
            for specification in self._on_tape(("symbol_specification",)):
                symbols.specify(specification.data)
        self.made = signals.plan(self.facts, self.known(ids), symbols, self._checker(), self.accounts, self._origin)

    def known(self, ids: Iterable[str]) -> dict[str, str]:
        """What the tape has of the signals `ids`."""
        ids = frozenset(ids)
        found: dict[str, str] = {}
        with contextlib.suppress(StoreError):
            for event in self._on_tape(_SIGNALS):
                signal_id = _field(event.data, "signal_id")
                if signal_id not in ids:
                    continue
                if event.event_type == OUTCOME:
                    found[signal_id] = str(_field(event.data, "outcome"))
                else:
                    found.setdefault(signal_id, ON_TAPE_OPEN if event.event_type == OPEN else FOLLOWED)
        return found

    def _on_tape(self, topics: Sequence[str]) -> Iterator[Any]:
        with open_tape(self.config) as tape:
            last = max(1, tape.last_seq)
            for event in tape.read(topics=topics):
                if event.bus_seq % 512 == 0:
                    self.progress("comparing with the tape", event.bus_seq / last)
                yield event

    def _checker(self) -> Callable[[Made], str | None]:
        """Says what the bus would find wrong with an event, by the types of the enabled plugins."""
        names = [name for name in self.config.plugins.enabled if name != "store"]
        types = registry(load(names), self.config.plugin)

        def check(made: Made) -> str | None:
            if made.event_type not in types.classes:
                return None
            wire = {"event_type": made.event_type, "timestamp": made.timestamp, "source": SOURCE, "data": made.data}
            try:
                event = msgspec.convert(wire, types.classes[made.event_type])
            except msgspec.ValidationError as error:
                return str(error)
            rule = types.types[made.event_type].check
            return rule(event) if rule is not None else None

        return check

    def _origin(self, found: Fact) -> str:
        return f"{os.path.basename(self.paths[found.file])}:{found.line}"

    def run(self, endpoint: str | None) -> None:
        """Publish what is new, wait until it is on disk, and look for it on the tape."""
        place = self.config.data_dir / SOURCE
        with _alone(place), self._connected(place, endpoint) as pub:
            self.plan()
            if not self.made:
                return
            total = len(self.made)
            summary = replay(
                (self._recorded(each) for each in self.made),
                pub,
                patience_s=PATIENCE_S,
                progress=lambda count: self.progress("publishing", count / total),
            )
        if summary.acked < total:
            raise TapebusError(f"{total - summary.acked} of {total} events were refused by the bus; import again")
        self._prove(endpoint)

    @contextlib.contextmanager
    def _connected(self, place: Path, endpoint: str | None) -> Iterator[Publisher]:
        """A publisher behind which nothing of an import that was killed is still on its way."""
        if not endpoint:
            need_bus(self.config)
        with publisher(self.config, SOURCE, endpoint, spool="crash", spool_dir=place) as pub:
            self.progress("finishing an interrupted import" if pub.stats()["adopted"] else "connecting", 0.0)
            if not pub.flush(PATIENCE_S):
                raise BusNotRunning(f"no bus answers at {pub.endpoint}: start one with `tapebus run`")
            if len(list(place.glob("*.spool"))) > (pub.stats()["spool"] != "memory"):
                raise UsageError(
                    f"{place}: an import through another endpoint was interrupted; repeat it with its --endpoint first"
                )
            yield pub

    def _recorded(self, made: Made) -> Recorded:
        signal_id = made.fact.signal_id
        extra = {"correlation_id": signal_id, "event_id": f"{SOURCE}:{made.event_type}:{signal_id}"}
        return Recorded(made.event_type, made.timestamp, made.data, self.systems[made.fact.file], extra)

    def _prove(self, endpoint: str | None) -> None:
        known = self.known(each.fact.signal_id for each in self.made)
        self.stored = sum(
            known.get(each.fact.signal_id) == each.data.get("outcome", ON_TAPE_OPEN) for each in self.made
        )
        if self.stored < len(self.made):
            where = f"the bus at {endpoint}" if endpoint else "the bus"
            missing = len(self.made) - self.stored
            raise TapebusError(
                f"{missing} of {len(self.made)} events are not on the tape in {self.config.data_dir}, although {where} "
                "has acknowledged them: is it the bus of this data directory, and is its store enabled?"
            )


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """One import at a time: two would not see of each other what is on its way."""
    if not place.parent.is_dir():
        raise BusNotRunning(f"{place.parent}: no tape here yet: start the bus with `tapebus run`")
    place.mkdir(mode=0o700, exist_ok=True)
    fd = os.open(place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TapebusError("another import into this tape is running: wait for its end") from None
        yield
    finally:
        os.close(fd)


def _remark(record: dict[str, Any]) -> tuple[str, str]:
    if "fresh_start" in record:
        return "heading", str(record["fresh_start"])[:200]
    return f"action {record['action']}"[:100], str(record.get("note", ""))[:200]


def _field(data: Any, name: str) -> Any:
    return data.get(name) if isinstance(data, dict) else getattr(data, name, None)
