"""The deliberate breakages of `sabotage`: what is replaced by what, and the tests that have to notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sabotage:
    """One piece of `file`, found there exactly once, is replaced; one of `tests` must then fail."""

    name: str
    why: str
    file: str
    old: str
    new: str
    tests: list[str]


SABOTAGES = [
    Sabotage(
        "ack-before-commit",
        "an acknowledgement leaves before its events are on disk",
        "core/tapebus/tapewriter.py",
        "            self._commit(block, units, changed)\n",
        "            self.ring.acknowledge(changed)\n            self._commit(block, units, changed)\n",
        ["tests/faults/test_syscalls.py"],
    ),
    Sabotage(
        "nosync",
        "a commit returns before its pages have reached the disk",
        "plugins/tapebus_store/environment.py",
        "                readahead=False,\n",
        "                readahead=False,\n                sync=False,\n",
        ["tests/faults/test_simdisk.py"],
    ),
    Sabotage(
        "nometasync",
        "a commit returns before its meta page has reached the disk",
        "plugins/tapebus_store/environment.py",
        "                readahead=False,\n",
        "                readahead=False,\n                metasync=False,\n",
        ["tests/faults/test_simdisk.py"],
    ),
    Sabotage(
        "no-dedup",
        "what was sent again is stored again",
        "core/tapebus/_ingest.pyx",
        "        if base + count - 1 <= account.accepted:\n",
        "        if base <= account.accepted:\n            account.accepted = base - 1\n        if False:\n",
        ["tests/test_ingest.py"],
    ),
    Sabotage(
        "holes-accepted",
        "a batch is taken although an earlier one is missing",
        "core/tapebus/_ingest.pyx",
        "        if base > account.accepted + 1 or count == 0 or base == 0:\n",
        "        if base > account.accepted + 1:\n            account.accepted = base - 1\n"
        "        if count == 0 or base == 0:\n",
        ["tests/test_ingest.py"],
    ),
    Sabotage(
        "batch-crc-ignored",
        "a batch damaged on its way is stored",
        "core/tapebus/_ingest.pyx",
        "        if crc32c_update(0, p + BATCH_HEAD, size - BATCH_HEAD) != get32(p + HEAD + 12):\n",
        "        if False:\n",
        ["tests/test_ingest.py"],
    ),
    Sabotage(
        "watermark-apart",
        "the watermarks are not part of the transaction that holds the events",
        "plugins/tapebus_store/writer.py",
        "        for book in commit.producers:\n",
        "        for book in commit.producers if not commit.blocks else []:\n",
        ["tests/faults/test_kill9.py"],
    ),
    Sabotage(
        "cursor-apart",
        "a cursor becomes durable without the state that belongs to it",
        "plugins/tapebus_store/writer.py",
        "        for name, value in unit.state.items():\n",
        "        for name, value in {}.items():\n",
        ["tests/test_units.py"],
    ),
    Sabotage(
        "block-crc-ignored",
        "a damaged block is returned as if it were sound",
        "plugins/tapebus_store/layout.py",
        "    if crc32c(stored) != header.payload_crc:\n",
        "    if False:\n",
        ["tests/test_store.py"],
    ),
    Sabotage(
        "io-error-forgotten",
        "after a failed commit the next one is tried as if nothing had happened",
        "plugins/tapebus_store/writer.py",
        "                self._failed = str(error)\n",
        "                pass\n",
        ["tests/test_store_faults.py"],
    ),
    Sabotage(
        "multicall-delivery",
        "one raising consumer costs the others their events",
        "core/tapebus/fence.py",
        "            self._fatal(error)\n            return error\n",
        "            self._fatal(error)\n            raise\n",
        ["tests/test_dispatcher.py"],
    ),
    Sabotage(
        "blocking-publish",
        "publish waits until the bus has the event",
        "core/tapebus/_emitter.pyx",
        "        return self._confirm(number, timeout) if durable else True\n",
        "        return self._confirm(seq + box.renumbered, timeout) or True\n",
        ["tests/test_publisher.py::test_an_absent_bus_does_not_keep_a_process_from_exiting"],
    ),
    Sabotage(
        "silent-drop",
        "what a client had to drop is not told to the bus",
        "core/tapebus/_ingest.pyx",
        "        entry.code = p[HEAD + 24]\n        entry.count = <uint32_t>(last - account.accepted)\n",
        "        entry.code = p[HEAD + 24]\n        entry.count = 0\n",
        ["tests/test_ingest.py", "tests/test_runtime.py"],
    ),
    Sabotage(
        "forked-identity",
        "a forked child goes on with the numbers of its parent",
        "core/tapebus/publisher.py",
        "        self._identity, self._kept = (uuid.uuid4().bytes, spools.new_epoch()), False\n        self._orphans",
        "        self._orphans",
        ["tests/test_publisher.py"],
    ),
    Sabotage(
        "open-port",
        "a bind that strangers can reach is accepted",
        "core/tapebus/security.py",
        "        return ip_address(host).is_loopback\n",
        "        return True\n",
        ["tests/test_security.py::test_only_what_is_guarded_listens_beyond_this_machine"],
    ),
    Sabotage(
        "rights-unchecked",
        "an identity publishes what it was not given the right to",
        "core/tapebus/_rights.pyx",
        "        return verdict[0] == ALLOWED\n",
        "        return True\n",
        ["tests/test_security.py"],
    ),
    Sabotage(
        "secrets-in-logs",
        "a token is written as it is",
        "core/tapebus/redaction.py",
        "    for pattern, replacement in _LOOKS_SECRET:\n"
        "        text = pattern.sub(replacement, text)\n"
        "    return text\n",
        "    return text\n",
        ["tests/test_redaction.py"],
    ),
    Sabotage(
        "torn-spool",
        "a record that was cut while it was written is taken for an event",
        "core/tapebus/_outbox.pyx",
        "        return crc32c_update(0, self.ring + offset + 4, sizeof(record_t) - 4 + size) == record.crc\n",
        "        return True\n",
        ["tests/test_spool.py"],
    ),
    Sabotage(
        "breaker-stuck",
        "a consumer that only fails is called for ever",
        "core/tapebus/breaker.py",
        '        self.become("open", why)\n',
        '        self.become("running", why)\n',
        ["tests/test_breaker.py"],
    ),
    Sabotage(
        "sell-closed-on-the-bid",
        "signals of both directions are closed on the same side of a quote",
        "plugins/tapebus_outcomes/tracker.py",
        "            price = bid if signal.buy else ask\n",
        "            price = bid\n",
        ["tests/test_outcomes.py"],
    ),
    Sabotage(
        "outcome-twice",
        "a signal that has ended is open again after a restart",
        "plugins/tapebus_outcomes/tracker.py",
        '                state.pop(f"o:{order}", None)\n',
        "                pass\n",
        ["tests/test_outcomes.py"],
    ),
    Sabotage(
        "bar-in-favour",
        "of two levels inside a bar the target wins",
        "plugins/tapebus_outcomes/bars.py",
        "    if sl is not None and stop:\n",
        "    if sl is not None and stop and not target:\n",
        ["tests/test_outcomes_bars.py"],
    ),
    Sabotage(
        "telegram-counts-departures",
        "the relay counts a call against the limits when it leaves, not when it is over",
        "plugins/tapebus_telegram/sender.py",
        "            try:\n                answer = await self.transport.call(method, payload)\n            finally:\n"
        "                self._limits.take(chat, self._clock())\n",
        "            self._limits.take(chat, self._clock())\n"
        "            answer = await self.transport.call(method, payload)\n",
        ["tests/test_telegram_sender.py"],
    ),
    Sabotage(
        "telegram-forgets-its-calls",
        "a relay that starts again begins with limits of which nothing is used up",
        "plugins/tapebus_telegram/sender.py",
        "            self._limits.take(call.chat, now - max(-LATE_S, wall - call.at))\n",
        "            pass\n",
        ["tests/test_telegram_sender.py"],
    ),
    Sabotage(
        "telegram-forgets-what-it-sent",
        "a message that left before its state was saved is sent again",
        "plugins/tapebus_telegram/sender.py",
        "                self.journal.over(chat, self._wall(), sent)\n",
        "                self.journal.over(chat, self._wall())\n",
        ["tests/test_telegram_sender.py"],
    ),
]
