"""The embedded runtime: everything `tapebus run` starts, in one object."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import zmq

from tapebus import books, failpoints, plugins, ports, trust, versions
from tapebus._ingest import Ingest
from tapebus._ring import Ring
from tapebus._topics import Topics
from tapebus.codec import Codec
from tapebus.config import Config
from tapebus.control import Control
from tapebus.curve import Door, peers_rights, server_keys
from tapebus.deadline import Overdue, within
from tapebus.dispatcher import Dispatcher
from tapebus.errors import CorruptError, StoreError, StoreFull, TapebusError
from tapebus.events import DeadLetter, Wire
from tapebus.failpoints import failpoint
from tapebus.feed import Feed, bind
from tapebus.fence import Fence
from tapebus.judge import NAME as JUDGE
from tapebus.judge import Judge
from tapebus.outlets import EarlyConsumer, ThreadConsumer
from tapebus.reaper import Reaper
from tapebus.security import Rights, peers_of
from tapebus.spool import default_directory
from tapebus.statistics import Statistics
from tapebus.store import Commit, Unit
from tapebus.supervisor import ProcessConsumer
from tapebus.tapewriter import TapeWriter
from tapebus.threads import show_name
from tapebus.watchdog import Watchdog, restore
from tapebus.wire import MAX_FRAME
from tapebus.wiring import Wiring, identity

log = logging.getLogger("tapebus")
#: Messages libzmq may hold per connection before the ring takes them: a high-water mark counts messages, not
#: bytes, and a message may have `MAX_FRAME` of them. Fire-and-forget frames are small and many: their mark is wide
#: until ingest meets a large one.
RECEIVE_HWM, WIDE_HWM = 64, 256
SEND_HWM = 1000
UNSEQUENCED = "ingest"
#: Seconds that closing sockets, plugins and store may take beyond the drain before the process ends anyway.
STOP_GRACE_S = 5.0
FAILED_DRAIN_S = 1.0
#: Seconds that a plugin may take for its end when the drain has used up its own.
STOP_CALL_S = 0.5


class Runtime:
    """A bus in this process. Start and stop it from one thread; `publish` and `stats` are for any thread.

    Must not be used in a forked child. `plugins` are ready-made plugin objects by name, used next to
    those the configuration enables.
    """

    def __init__(self, config: Config | None = None, plugins: Iterable[tuple[str, Any]] = ()) -> None:
        self.config = config if config is not None else Config.load()
        self._extra = list(plugins)
        self._stop_asked = False
        #: A pipe written to by whoever asks to stop, and by every signal whichever thread it reaches; only in `run`.
        self._bell: tuple[int, int] | None = None
        self._failure: BaseException | None = None
        self._started = False
        self._closing: list[Any] = []

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load the plugins, open the store, listen. Raises `TapebusError`; then nothing is left running."""
        try:
            self._start()
        except BaseException:
            self._close_all()
            raise
        self._started = True

    def _start(self) -> None:
        failpoints.check()
        config = self.config
        versions.require()
        trust.enforce(config.plugins.trusted)
        config.prepare()
        failpoint("start.prepared")
        self.manager = plugins.load(config.plugins.enabled, self._extra, config.bus.start_s)
        registry = within(
            config.bus.start_s,
            "a plugin: tapebus_register_event_types",
            partial(plugins.registry, self.manager, config.plugin),
        )
        self.store = self.manager.hook.tapebus_open_store(
            data_dir=config.data_dir, config=config.plugin("store"), readonly=False
        )
        if self.store is not None:
            self._closing.append(self.store.close)
        failpoint("start.store_open")
        topics = Topics()
        last_seq = 0
        if self.store is not None:
            topics.load(self.store.topics())
            last_seq = self.store.last_seq()
        self.first_seq = last_seq + 1
        self.codec = Codec(registry, topics, reject_unknown=config.bus.unknown_types == "reject")
        self.codec.register_topics()
        self.ring = Ring(topics, config.bus.ring_entries, config.bus.ring_bytes, last_seq + 1)
        self._carry_books_over()
        self._own = self.ring.producer(identity("bus"), 0, "tapebus", sequenced=False)
        self._legacy = self.ring.producer(identity(UNSEQUENCED), 0, "unsequenced", sequenced=False)
        self.rights = Rights(config.security)
        self.ingest = Ingest(
            self.ring,
            secrets.randbits(63),
            self.store is not None,
            MAX_FRAME,
            max_sessions=config.security.max_sessions,
        )
        self.ingest.restrict(self.rights)
        self.ingest.samples = self._sample
        self._wire_threads(last_seq)
        failpoint("start.wired")
        self._listen()
        failpoint("start.listening")
        for name in self._plugins_here():
            self._call("tapebus_start", name, config.bus.start_s)
        failpoint("start.plugins_started")
        self._run_threads()
        failpoint("start.running")

    def _plugins_here(self) -> list[str]:
        return [name for name in self.wiring.contexts if name not in self.wiring.apart]

    def _call(self, hook: str, name: str, seconds: float) -> None:
        """Call a hook of the plugin called `name`, for at most `seconds`."""
        call = partial(plugins.call_one, self.manager, hook, name, context=self.wiring.contexts[name])
        within(seconds, f"plugin {name!r}: {hook}", call)

    def _carry_books_over(self) -> None:
        """Open the accounts that are on the tape; those of producers long gone become one."""
        if self.store is None:
            return
        kept, gone = books.fold(self.store.producers(), self.store.first_seq(), self.store.older(books.GONE_S))
        if gone:
            try:
                finished = [each for each in kept if each.producer_id == books.FINISHED]
                self.store.commit(Commit(producers=finished, forgotten=gone))
            except StoreFull as error:
                log.warning("%s; the accounts of producers long gone stay for now", error)
                kept = self.store.producers()
        for book in kept:
            sequenced = book.epoch != 0
            self.ring.producer(book.producer_id, book.epoch, book.source, book, sequenced=sequenced)

    def _wire_threads(self, last_seq: int) -> None:
        config = self.config
        self.statistics = Statistics(self)
        self.tape = TapeWriter(
            self.ring,
            self.ingest,
            self.store,
            self._fail,
            self.statistics.durable_counters,
            self.alarm,
            config.bus.commit_interval_ms / 1e3,
        )
        self.wiring = Wiring(self.manager, config, self.ring, self.store, self.statistics.figures)
        restore(self.store, self.wiring.inline, self._tell_tape)
        judge = Judge(self.codec.topics, self._begin(last_seq), self._tell_tape)
        cursors = [judge.cursor, *(fence.cursor for fence in self.wiring.inline)]
        self.threads = [
            (EarlyConsumer if fence.consumer.deliver == "early" else ThreadConsumer)(
                fence, self.codec.copy(), self.store, last_seq, config.bus.max_batch, self._fail
            )
            for fence in self.wiring.threads
        ]
        self.tape.early = [each for each in self.threads if isinstance(each, EarlyConsumer)]
        self.dispatcher = Dispatcher(
            self.codec,
            self.wiring.inline,
            self.store,
            min(cursors),
            last_seq,
            max_batch=config.bus.max_batch,
            judge=judge,
            fail=self._fail,
            outlets=[each for each in self.threads if not isinstance(each, EarlyConsumer)],
        )
        self.tape.deliver = self.dispatcher.deliver
        self.tape.give_way = self.dispatcher.backlog.give_way
        self.statistics.watchdog = Watchdog(self, self._tell_tape, self._fail)

    def _begin(self, last_seq: int) -> int:
        """Write down where those begin who have no cursor yet; the cursor of the judge.

        Else a crash before their first unit of work would let them begin behind events they never saw.
        """
        if self.store is None:
            return last_seq
        judged: Unit | None = self.store.cursors().get(JUDGE)
        beginnings = list(self.wiring.beginnings)
        if judged is None:
            judged = Unit(JUDGE, last_seq)
            beginnings.append(judged)
        if beginnings:
            # on a full disk the bus starts all the same, and they are written with their first unit of work
            with contextlib.suppress(StoreFull):
                self.store.commit(Commit(units=beginnings))
        return judged.cursor

    def _tell_tape(self, unit: Unit) -> None:
        self.ring.inject(b"", self._own, unit)

    def _listen(self) -> None:
        config = self.config
        self._zmq: zmq.Context[Any] = zmq.Context()
        self._closing.append(self._zmq.term)
        bound = [config.listen.feed, config.listen.ingest, *config.acked_endpoints, *(s.bind for s in config.sources)]
        ports.wait_until_free(filter(None, bound), config.listen.wait_s, self._stopped_within)
        self.door: Door | None = None
        if config.security.key:
            self.door = Door(self._zmq, server_keys(config.security.key), self.rights)
            self._closing.append(self.door.close)
            self.door.open()
        umask = os.umask(0o077)
        try:
            if (endpoint := config.listen.ingest) != "":
                socket = self._socket(zmq.PULL, endpoint, "listen.ingest")
                self.ingest.add(socket, self._legacy, peers=peers_of(endpoint))
            for endpoint in config.acked_endpoints:
                socket = self._socket(zmq.ROUTER, endpoint, "listen.acked")
                self.ingest.add(socket, 0, True, peers=peers_of(endpoint))
            for source in config.sources:
                self._attach(source)
            self.feed = self._feed()
            self._closing.append(self.feed.discard)
            self.control = Control(
                self._zmq, config.control_endpoint, self.statistics.handlers(), self.statistics.on_timer
            )
            self._closing.append(self.control.discard)
        finally:
            os.umask(umask)
        self.feed.seen_seq = self.first_seq - 1
        self.dispatcher.feed = self.feed
        self.reaper: Reaper | None = None
        if config.bus.spool_reap_s:
            directory = Path(config.bus.spool_dir).expanduser() if config.bus.spool_dir else default_directory()
            self.reaper = Reaper(directory, config.acked_endpoints, config.own_endpoint, config.bus.spool_reap_s)
        self.processes = [
            ProcessConsumer(
                plugin,
                consumer,
                config,
                config.own_endpoint,
                start,
                self.tape.bury,
                self.tape.purge,
            )
            for plugin, consumer, start in self.wiring.processes
        ]

    def _stopped_within(self, seconds: float | None) -> bool:
        if self._bell is None:
            threading.Event().wait(seconds)
        elif not self._stop_asked and select.select(self._bell[:1], [], [], seconds)[0]:
            os.read(self._bell[0], 4096)
        return self._stop_asked

    def _socket(self, kind: int, endpoint: str, key: str) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._zmq.socket(kind)
        self._closing.append(lambda: socket.close(0))
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, RECEIVE_HWM if kind == zmq.ROUTER else WIDE_HWM)
        socket.setsockopt(zmq.SNDHWM, SEND_HWM)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME + 64)
        socket.setsockopt(zmq.HANDSHAKE_IVL, 3000)
        # everybody connects anew after a restart
        socket.setsockopt(zmq.BACKLOG, 1024)
        if kind == zmq.ROUTER:
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if key:
            self._bind(socket, endpoint, key)
        return socket

    def _bind(self, socket: zmq.Socket[bytes], endpoint: str, key: str) -> None:
        """Bind an ingest socket, guarded where others than this user may reach it."""
        if peers_of(endpoint) == "curve":
            assert self.door is not None, "the configuration was checked"
            self.door.guard(socket, "publish")
        bind(socket, endpoint, key)
        if endpoint.startswith("ipc://") and any(each.uid is not None for each in self.rights.identities):
            # rights decide who may do what; the directory still decides who gets here
            os.chmod(endpoint.removeprefix("ipc://"), 0o666)

    def _feed(self) -> Feed:
        config = self.config
        peers = peers_of(config.listen.feed)
        door = self.door if peers == "curve" else None
        restricted = peers == "curve" or (peers == "ipc" and self.rights.identities) or self.rights.loopback

        def patterns(frame: Any) -> Any:
            return self.rights.subscribe(peers_rights(frame, peers, self.rights))

        return Feed(
            self._zmq,
            config.listen.feed,
            config.feed.topic_prefix,
            config.feed.hwm,
            patterns if restricted else None,
            door,
        )

    def _attach(self, source: Any) -> None:
        socket = self._socket(zmq.SUB if source.type == "sub" else zmq.PULL, "", "")
        if source.type == "sub":
            for prefix in source.subscribe:
                socket.setsockopt(zmq.SUBSCRIBE, prefix.encode())
        if source.bind:
            self._bind(socket, source.bind, f"sources.{source.name}.bind")
        else:
            socket.connect(source.connect)
        name = source.source or source.name
        producer = self.ring.producer(identity(f"source:{source.name}"), 0, name, sequenced=False)
        peers = peers_of(source.bind) if source.bind else "trusted"
        self.ingest.add(socket, producer, False, source.topic, name, source.fields, peers=peers)

    def _run_threads(self) -> None:
        self.statistics.running = True
        self._ingest_thread = threading.Thread(target=self._run_ingest, name="tapebus-ingest", daemon=True)
        for thread in (self.feed, *self.threads, self.dispatcher, self.tape, self._ingest_thread, self.control):
            thread.start()
        for process in self.processes:
            process.start()
        for notice in self.store.notices if self.store is not None else ():
            self.alarm("store_damaged", "critical", notice, "raised")
        if self.reaper is not None:
            self.reaper.start()

    def _run_ingest(self) -> None:
        show_name()
        try:
            self.ingest.run()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """A thread the bus cannot live without has ended; from any thread."""
        if self._failure is None:
            self._failure = error
            if isinstance(error, CorruptError) and self.store is not None:
                self.store.suspect(str(error))
            if isinstance(error, TapebusError):
                log.critical("%s", error)
            else:
                log.critical("the bus must stop: %s", error, exc_info=error)
        self.ask_to_stop()

    @property
    def consumers(self) -> list[Fence | ProcessConsumer]:
        """Every consumer of every mode, for figures and steering."""
        return [*self.wiring.fences, *self.processes]

    def ask_to_stop(self) -> None:
        """Let `run` return soon; safe in a signal handler and from any thread."""
        self._stop_asked = True
        bell = self._bell
        if bell is not None:
            # a full pipe wakes as well
            with contextlib.suppress(OSError):
                os.write(bell[1], b"!")

    def stop(self) -> None:
        """Drain for at most ``bus.drain_s`` seconds, commit, acknowledge, say goodbye, close."""
        if not self._started:
            return
        self._started = False
        failpoint("stop.asked")
        drain_s = self.config.bus.drain_s
        # after a failure there is nothing to wait for but threads that may never end
        deadline = time.monotonic() + (drain_s if self._failure is None else min(drain_s, FAILED_DRAIN_S))
        for process in self.processes:
            process.stop()
        for process in self.processes:
            # while ingest still reads, so that what their last batches emit is taken
            process.join(max(0.1, deadline - time.monotonic()))
        if self.reaper is not None:
            self.reaper.stop()
        self.ingest.stop_reading_events()
        failpoint("stop.reading_ended")
        if self._failure is None:
            self._wait(self._quiet, deadline)
        failpoint("stop.drained")
        self.dispatcher.backlog.close()
        self.dispatcher.join(max(0.1, deadline - time.monotonic()))
        for consumer in self.threads:
            consumer.stop()
        for consumer in self.threads:
            consumer.join(max(0.1, deadline - time.monotonic()))
        failpoint("stop.consumers_ended")
        self._wait(self._written, deadline)
        failpoint("stop.written")
        self.ingest.stop()
        self._ingest_thread.join(2.0)
        failpoint("stop.ingest_ended")
        self.ring.stop()
        self.tape.join(max(1.0, deadline - time.monotonic()))
        failpoint("stop.tape_ended")
        for part in (self.feed, self.control):
            part.stop()
            part.join(2.0)
        for name in self._plugins_here():
            try:
                self._call("tapebus_stop", name, max(STOP_CALL_S, deadline - time.monotonic()))
            except Exception as error:
                log.error("%s", error, exc_info=None if isinstance(error, Overdue) else error)
        self._close_all()
        failpoint("stop.closed")

    def _wait(self, condition: Any, deadline: float) -> None:
        pause = threading.Event()
        while not condition() and time.monotonic() < deadline and self._failure is None:
            pause.wait(0.002)

    def _written(self) -> bool:
        return self.ingest.mail_waiting == 0 and self.ring.fill[0] == 0 and self.tape.done_seq == self.ring.last_seq

    def _quiet(self) -> bool:
        """Whether everything received, and everything derived from it, has gone all the way."""
        return (
            self._written()
            and self.dispatcher.backlog.drained
            and self.dispatcher.done_seq >= self.ring.last_seq
            and all(each.backlog.drained for each in self.threads)
            and self._written()
        )

    def _close_all(self) -> None:
        while self._closing:
            close = self._closing.pop()
            try:
                close()
            except Exception as error:
                log.warning("while closing: %s", error)

    def __enter__(self) -> Runtime:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- use -------------------------------------------------------------------------------------

    def publish(self, event_type: str, data: Any, *, timestamp: float | None = None, **envelope: Any) -> None:
        """Put one event on the bus from inside its process; it is sequenced, stored and fanned out."""
        wire = Wire(
            event_type=event_type,
            timestamp=time.time() if timestamp is None else timestamp,
            source=envelope.pop("source", "tapebus"),
            data=data,
            **envelope,
        )
        self.ring.inject(msgspec.msgpack.encode(wire), self._own)

    def alarm(self, name: str, severity: str, message: str, state: str) -> None:
        """Put an `alert` on the tape; from any thread. `state` is ``raised`` or ``cleared``."""
        fields = {"name": name, "severity": severity, "message": message[:2000], "state": state, "component": "store"}
        self.publish("alert", fields, priority="critical")

    def stats(self) -> dict[str, Any]:
        """What ``tapebus stats --json`` prints."""
        return self.statistics.stats()

    def _sample(self, frame: bytes, reason: str) -> None:
        code = reason.partition(":")[0]
        if code not in ("oversize", "topic_denied", "rate"):
            code = "malformed"
        self.tape.bury(DeadLetter("ingest", code, reason, at=time.time(), raw=frame))

    def _give_up(self) -> None:
        log.critical("stopping took too long and was cut short; nothing acknowledged is lost")
        logging.shutdown()
        os._exit(1)

    def run(self) -> int:
        """Start, serve until SIGINT, SIGTERM or SIGHUP, stop; the exit code.

        A second SIGINT or SIGTERM forces the end.
        """
        from tapebus.pm2 import Channel

        asked = False

        def on_signal(number: int, _: Any) -> None:
            nonlocal asked
            # a second signal may arrive while the first is still being handled; a terminal that goes away sends several
            if asked and number != signal.SIGHUP:
                os._exit(128 + number)
            asked = True
            self.ask_to_stop()

        self._bell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # the kernel may hand a signal to any thread, and only this one runs its handler: it must not sleep through it
        wakeup = signal.set_wakeup_fd(self._bell[1], warn_on_full_buffer=False)
        handled = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            handled.append(signal.SIGHUP)
        previous = {each: signal.signal(each, on_signal) for each in handled}
        try:
            self.start()
            channel = Channel.from_env()
            if channel is not None:
                channel.ready()
                self.statistics.channel = channel
            log.info("running on %s (pid %d); %s", self.config.data_dir, os.getpid(), versions.line())
            while not self._stopped_within(None):
                pass
            last_resort = threading.Timer(self.config.bus.drain_s + STOP_GRACE_S, self._give_up)
            last_resort.daemon = True
            last_resort.start()
            # should no Python run any more, or the log not take a line, the kernel ends the process
            signal.setitimer(signal.ITIMER_REAL, self.config.bus.drain_s + 2 * STOP_GRACE_S)
            self.stop()
            last_resort.cancel()
            log.info("%s", self.statistics.farewell())
            signal.setitimer(signal.ITIMER_REAL, 0)
        finally:
            for each, handler in previous.items():
                signal.signal(each, handler)
            signal.set_wakeup_fd(wakeup)
            bell, self._bell = self._bell, None
            for fd in bell:
                os.close(fd)
            if sys.stdout is not None:
                sys.stdout.flush()
        if self._failure is None:
            return 0
        return self._failure.exit_code if isinstance(self._failure, (StoreError, TapebusError)) else 1
