"""Figures of a running bus: the statistics answer, the heartbeat, the periodic log line, PM2 metrics."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from tapebus import books, plugins
from tapebus.deadline import Overdue, within
from tapebus.wiring import figures

if TYPE_CHECKING:
    from tapebus.events import DeadLetter
    from tapebus.fence import Fence
    from tapebus.pm2 import Channel
    from tapebus.runtime import Runtime
    from tapebus.supervisor import ProcessConsumer
    from tapebus.watchdog import Watchdog

log = logging.getLogger("tapebus")
PM2_INTERVAL = 2.0
#: How often it is noted, at most, how far the tape has come, and how often that is remembered: an hour.
REACHED_S, REACHED = 1.0, 3600
#: Seconds a plugin may take to tell its health or its figures.
HOOK_S = 1.0


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class Statistics:
    """Reads figures from all parts; runs on the control thread and, for `stats`, on the caller's."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._started = time.monotonic()
        self.channel: Channel | None = None
        self.watchdog: Watchdog | None = None
        self._ask = Ask()
        bus = runtime.config.bus
        self._heartbeat_at = self._started
        self._line_at = self._started + bus.stats_s if bus.stats_s else float("inf")
        self._pm2_at = self._started
        self._last = (self._started, 0)
        self._pm2_last = (self._started, 0)
        self._base = runtime.store.counters() if runtime.store is not None else {}
        #: What the durable counters were made from, and they; replaced together.
        self._counted: tuple[tuple[int, ...], dict[str, int]] = ((0, 0, 0, 0), self._base)
        #: Whether there are threads to tell figures of.
        self.running = False
        #: Damage is repaired before a start, so this does not change any more.
        self._lost = runtime.store.lost_events() if runtime.store is not None else 0
        #: When the tape was seen to have come how far: (monotonic, last_seq).
        self._reached: deque[tuple[float, int]] = deque(maxlen=REACHED)

    # -- figures ---------------------------------------------------------------------------------

    def durable_counters(self) -> dict[str, int]:
        """Counts without a producer's account, kept on the tape across restarts; any thread.

        Asked for by every commit: the same dictionary as before while nothing has changed. Not to be changed.
        """
        ingest, faults = self._runtime.ingest, self._runtime.dispatcher.judge.faults
        figures = (ingest.malformed, ingest.oversize, ingest.shed, sum(faults.values()))
        before, counted = self._counted
        if figures == before:
            return counted
        now = {
            books.REJECTED + "ingest.malformed": figures[0],
            books.REJECTED + "ingest.oversize": figures[1],
            books.DROPPED + "legacy.shed": figures[2],
            # a copy in one step: the dispatcher may add a reason meanwhile
            **{books.DEAD + reason: count for reason, count in faults.copy().items()},
        }
        counted = dict(self._base)
        for key, count in now.items():
            if count:
                counted[key] = self._base.get(key, 0) + count
        self._counted = figures, counted
        return counted

    def accounts(self) -> list[books.Account]:
        """The books of this moment: one line a producer, and one for what unnumbered senders had refused."""
        ring = self._runtime.ring
        connected = self._runtime.ingest.connected()
        found = [books.account(ring.account(i), i in connected) for i in range(ring.n_producers)]
        used = [each for each in found if each.sequenced or each.highest_seq]
        return [*used, books.unsequenced(self.durable_counters())]

    def stats(self) -> dict[str, Any]:
        runtime = self._runtime
        accounts = self.accounts()
        # what is on the tape is read a moment apart from the accounts, so `stray` is for the tape alone to tell
        total = books.summary(accounts, sum(each.stored for each in accounts))
        more = {
            "rss_bytes": resident_bytes(),
            "acks_mean": "on disk" if runtime.store is not None else "dispatched",
        }
        return {
            "bus": self._bus(accounts) | more,
            "producers": [_row(each) for each in accounts if each.producer_id != books.UNSEQUENCED],
            "books": {**msgspec.structs.asdict(total), "line": total.line()},
            "consumers": self._consumers(),
            "plugins": self._plugins(),
            "feed": self._feed(),
            "store": runtime.store.stats() if runtime.store is not None else {},
        }

    def figures(self) -> dict[str, Any]:
        """What plugins may know: from memory, without asking any of them; from any thread."""
        if not self.running:
            return {}
        ring = self._runtime.ring
        accounts = [books.account(ring.account(index)) for index in ring.uneven()]
        rows = [
            {
                "producer_id": each.producer_id,
                "source": each.source,
                "rejected": each.rejected,
                "dropped": each.dropped,
                "unexplained": each.unexplained,
            }
            for each in accounts
        ]
        accounts.append(books.unsequenced(self.durable_counters()))
        return {
            "bus": self._bus(accounts),
            "producers": rows,
            "consumers": self._consumers(),
            "feed": self._feed(),
        }

    def _bus(self, accounts: list[books.Account]) -> dict[str, Any]:
        """Figures of the whole bus; `accounts` are at least those that hold more than stored events."""
        runtime = self._runtime
        rejected: dict[str, int] = {}
        dropped: dict[str, int] = {}
        for each in accounts:
            _add(rejected, each.rejected)
            _add(dropped, each.dropped)
        last_seq = runtime.tape.done_seq
        return {
            "uptime_s": round(time.monotonic() - self._started, 3),
            "last_seq": last_seq,
            "judged_seq": runtime.dispatcher.judge.cursor,
            "received": runtime.ring.received_count + runtime.first_seq - 1,
            "stored": last_seq,
            "rejected": rejected,
            "dropped": dropped,
            "dead_letters": books.part(self.durable_counters(), books.DEAD),
            "dead_letters_lost": runtime.tape.dead_lost,
            "unexplained": sum(each.unexplained for each in accounts),
            "state": "store full" if runtime.tape.full else "running",
            "lost": self._lost,
        }

    def _feed(self) -> dict[str, int]:
        feed = self._runtime.feed
        return {"sent": feed.sent, "lost": feed.backlog.lost + feed.unsent}

    def _consumers(self) -> list[dict[str, Any]]:
        runtime = self._runtime
        last = runtime.tape.done_seq
        reached = self._look()
        return [figures(fence, last, self._lag_ms(fence.cursor, last, reached)) for fence in runtime.consumers]

    def _look(self) -> list[tuple[float, int]]:
        """Note how far the tape has come by now; what was noted so far, oldest first."""
        now = time.monotonic()
        reached = list(self._reached)
        if not reached or now - reached[-1][0] >= REACHED_S:
            self._reached.append((now, self._runtime.tape.done_seq))
        return reached

    def _lag_ms(self, cursor: int, last_seq: int, reached: list[tuple[float, int]]) -> float:
        """For how long at least the tape has held an event above `cursor`."""
        if cursor >= last_seq:
            return 0.0
        lag = time.time() - self._runtime.tape.done_at
        for at, seq in reversed(reached):
            if seq <= cursor:
                break
            lag = max(lag, time.monotonic() - at)
        return lag * 1e3

    def _plugins(self) -> dict[str, dict[str, Any]]:
        runtime = self._runtime
        out: dict[str, dict[str, Any]] = {}
        for name, context in runtime.wiring.contexts.items():
            health, metrics = self._of_plugin(name, context)
            for fence in runtime.consumers:
                if fence.plugin == name and fence.state not in ("running", "paused", "starting"):
                    why = fence.hanging or fence.breaker.reason or fence.last_error
                    health = {"status": "error", "message": f"{fence.consumer.name} {fence.state}: {why}"}
            out[name] = {"health": health, "metrics": metrics}
        return out

    def _of_plugin(self, name: str, context: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Health and metrics as the plugin tells them, here or in its own process."""
        runtime = self._runtime
        if name in runtime.wiring.apart:
            told = [each.told for each in runtime.processes if each.plugin == name]
            health, metrics = told[0] if told else ({}, {})
        else:
            health = self._ask("tapebus_health", runtime.manager, name, context) or {}
            metrics = self._ask("tapebus_metrics", runtime.manager, name, context) or {}
        return health or {"status": "ok", "message": ""}, metrics

    # -- requests --------------------------------------------------------------------------------

    def handlers(self) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
        """What the control socket answers, by command."""
        return {
            "stats": lambda _: self.stats(),
            "plugins": lambda _: {"plugins": self._plugins(), "consumers": self._consumers()},
            "pause": lambda message: self._steer(message, "pause"),
            "resume": lambda message: self._steer(message, "resume"),
            "reset": lambda message: self._steer(message, "resume"),
            "dlq_purge": self._purge,
            "dlq_replay": self._replay,
        }

    def _steer(self, message: dict[str, Any], verb: str) -> dict[str, Any]:
        fences = self._runtime.consumers
        for fence in fences:
            if fence.consumer.name == message.get("consumer"):
                getattr(fence, verb)()
                self._runtime.dispatcher.backlog.wake()
                return {"consumer": fence.consumer.name, "state": fence.state}
        names = ", ".join(fence.consumer.name for fence in fences)
        return {"error": f"no consumer called {message.get('consumer')!r}; there are: {names}"}

    def _purge(self, message: dict[str, Any]) -> dict[str, Any]:
        ids = [int(each) for each in message.get("ids", [])]
        self._runtime.tape.purge(ids)
        return {"purged": len(ids)}

    def _replay(self, message: dict[str, Any]) -> dict[str, Any]:
        """Hand dead letters to the consumers that failed on them; ``refused`` are those without one."""
        runtime = self._runtime
        refused: list[int] = []
        chosen: dict[str, list[DeadLetter]] = {}
        for number in (int(each) for each in message.get("ids", [])):
            letter = next(iter(runtime.store.dead(number - 1, 1)), None) if runtime.store is not None else None
            owners = [] if letter is None or letter.id != number else self._owners(letter)
            if letter is None or len(owners) != 1:
                refused.append(number)
            else:
                chosen.setdefault(owners[0].consumer.name, []).append(letter)
        for fence in runtime.consumers:
            if fence.consumer.name in chosen:
                fence.redeliver(chosen[fence.consumer.name])
        return {"queued": sum(map(len, chosen.values())), "refused": refused}

    def _owners(self, letter: DeadLetter) -> list[Fence | ProcessConsumer]:
        """The consumers that may have failed on `letter`: one, unless its plugin has several and it names none."""
        return [
            each
            for each in self._runtime.consumers
            if letter.bus_seq
            and letter.place == f"plugin.{each.plugin}"
            and letter.consumer in ("", each.consumer.name)
        ]

    # -- timers ----------------------------------------------------------------------------------

    def on_timer(self) -> float:
        """Do what is due; seconds until the next thing is."""
        now = time.monotonic()
        runtime = self._runtime
        bus = runtime.config.bus
        if runtime.door is not None:
            runtime.door.mend()
        if now >= self._heartbeat_at:
            self._heartbeat_at = now + bus.heartbeat_s
            if bus.publish_heartbeat:
                runtime.publish("system_health", self._heartbeat())
        if now >= self._line_at:
            self._line_at = now + bus.stats_s
            self._log_line(now)
        wake = min(self._heartbeat_at, self._line_at)
        if self.watchdog is not None:
            wake = min(wake, now + self.watchdog.look())
        if self.channel is not None:
            if now >= self._pm2_at:
                self._pm2_at = now + PM2_INTERVAL
                self.channel.metrics(self._pm2_metrics(now))
            wake = min(wake, self._pm2_at)
        return wake - time.monotonic()

    def _heartbeat(self) -> dict[str, Any]:
        runtime = self._runtime
        return {
            "component": "tapebus",
            "status": "error" if runtime.tape.full else "running",
            "uptime": time.monotonic() - self._started,
            "memory_usage": resident_bytes() / 1e6,
            "message": f"last_seq {runtime.tape.done_seq}",
        }

    def farewell(self) -> str:
        """One line about the whole run, for the log; after the last commit."""
        runtime = self._runtime
        events = runtime.tape.done_seq - runtime.first_seq + 1
        uptime = time.monotonic() - self._started
        accounts = self.accounts()
        total = books.summary(accounts, sum(each.stored for each in accounts))
        return f"stopped after {uptime:,.0f} s and {events:,} events; {total.line()}"

    def _rate(self, now: float, before: tuple[float, int]) -> float:
        return (self._runtime.tape.done_seq - before[1]) / max(now - before[0], 1e-9)

    def _log_line(self, now: float) -> None:
        runtime = self._runtime
        rate, self._last = self._rate(now, self._last), (now, runtime.tape.done_seq)
        worst = max((f for f in runtime.wiring.fences), key=lambda f: -f.cursor, default=None)
        lag = max(0, runtime.tape.done_seq - worst.cursor) if worst is not None else 0
        log.info(
            "%.0f events/s, %d on tape, lag %d events, %d errors, %.0f MB",
            rate,
            runtime.tape.done_seq,
            lag,
            sum(f.errors for f in runtime.wiring.fences),
            resident_bytes() / 1e6,
        )

    def _pm2_metrics(self, now: float) -> dict[str, Any]:
        rate, self._pm2_last = self._rate(now, self._pm2_last), (now, self._runtime.tape.done_seq)
        last = self._runtime.tape.done_seq
        out: dict[str, Any] = {
            "events/s": round(rate, 1),
            "lag": max((last - f.cursor for f in self._runtime.wiring.fences), default=0),
        }
        for name, context in self._runtime.wiring.contexts.items():
            _, found = self._of_plugin(name, context)
            if "slots" in found:
                out["slots"] = found["slots"]
        return out


class Ask:
    """Calls a hook that must answer at once; one that did not is not called again by this bus."""

    def __init__(self) -> None:
        self._overdue: dict[tuple[str, str], str] = {}

    def __call__(self, hook: str, manager: Any, name: str, context: Any) -> dict[str, Any] | None:
        if not plugins.implements(manager, hook, name):
            return None
        if (hook, name) in self._overdue:
            return {"status": "error", "message": self._overdue[hook, name]}
        try:
            call = partial(plugins.call_one, manager, hook, name, context=context)
            found: dict[str, Any] | None = within(HOOK_S, f"plugin {name!r}: {hook}", call)
            return found
        except Overdue as error:
            log.error("%s; it is not asked again", error)
            self._overdue[hook, name] = str(error)
            return {"status": "error", "message": str(error)}
        except Exception as error:
            return {"status": "error", "message": f"{hook} failed: {type(error).__name__}: {error}"}


def _row(account: books.Account) -> dict[str, Any]:
    return {
        **msgspec.structs.asdict(account),
        "rejected": sum(account.rejected.values()),
        "dropped": sum(account.dropped.values()),
        "gaps": len(account.gaps),
    }


def _add(total: dict[str, int], more: dict[str, int]) -> None:
    for key, count in more.items():
        total[key] = total.get(key, 0) + count
