"""What allowed people command, run on the consumer's thread.

A command that changes something runs once, however the bus is stopped: the event that others act on, its answer and
its number are committed together, and only when that event comes back from the tape is Telegram told to forget the
command. One that is too old when it is heard is answered and not run.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, MutableMapping
from queue import Empty, SimpleQueue
from typing import Any

import msgspec

from tapebus.consumer import Context
from tapebus_telegram.board import Board, ago, field
from tapebus_telegram.listening import FORGET_S, Listener, Said
from tapebus_telegram.markup import Line, cut, one_line, pages
from tapebus_telegram.render import ANSWER, ASKED
from tapebus_telegram.settings import Chat, Commands

_STATE = "commands/done"
_WANTED = {
    "on": "may fire again",
    "off": "is followed, but not fired",
    "auto": "fires as its figures decide",
}
HELP: list[Line] = [
    [("tapebus", "b")],
    [("/status", "code"), (" what runs, slots, switch, patterns, alerts, last outcomes", "")],
    [("/slots", "code"), (" each slot that is held", "")],
    [("/pause", "code"), (" no more automatic orders", "")],
    [("/resume", "code"), (" automatic orders again", "")],
    [("/pattern", "code"), (" the patterns and where they stand", "")],
    [("/pattern NAME on|off|auto", "code"), (" let a pattern fire, only follow it, or let its figures decide", "")],
    [("/help", "code"), (" this list", "")],
]


class Done(msgspec.Struct):
    """The last update that was dealt with, and when (Unix seconds)."""

    update_id: int = 0
    at: float = 0.0


class Reply(msgspec.Struct):
    """What a command answers, and the action it is on the tape with."""

    lines: list[Line]
    action: str = "telegram_command"
    result: str = "answered"
    details: dict[str, Any] = {}


class Commander:
    """Runs what is in `inbox`; `post` queues an answer. All on the consumer's thread; ``counts`` may be read by all."""

    def __init__(
        self,
        context: Context,
        commands: Commands,
        board: Board,
        post: Callable[..., None],
        status: Callable[[], list[Line]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._context = context
        self._commands = commands
        self._board = board
        self._post = post
        self._status = status
        self._clock = clock
        self._state: MutableMapping[str, bytes] = context.state
        self.counts: Counter[str] = Counter()
        blob = context.state.get(_STATE)
        self.done = msgspec.msgpack.decode(blob, type=Done) if blob is not None else Done()
        self.table: dict[str, Callable[[list[str]], Reply]] = {
            "/status": self._show_status,
            "/slots": lambda words: Reply(self._board.slot_list(self._clock())),
            "/pause": lambda words: self._switch(True),
            "/resume": lambda words: self._switch(False),
            "/pattern": self._pattern,
            "/help": lambda words: Reply(HELP),
            "/start": lambda words: Reply(HELP),
        }

    def drain(self, inbox: SimpleQueue[Said]) -> None:
        """Run all that was said since the last call."""
        while True:
            try:
                said = inbox.get_nowait()
            except Empty:
                return
            self._run(said)

    def settled(self, event: Any) -> int:
        """The update whose command `event` is, once it is on the tape; 0 for the actions of others."""
        if event.event_type != "user_action" or event.source != self._context.name:
            return 0
        details = field(event.data, "details")
        number = details.get("update_id") if isinstance(details, dict) else None
        return number if isinstance(number, int) and number <= self.done.update_id else 0

    def _run(self, said: Said) -> None:
        now = self._clock()
        if said.update_id <= self.done.update_id and now - self.done.at < FORGET_S:
            self.counts["repeated"] += 1
            return
        self.done = Done(said.update_id, now)
        self._state[_STATE] = msgspec.msgpack.encode(self.done)
        words = said.text.split()
        name = words[0].partition("@")[0].lower()
        reply = self._reply(said, name, words[1:], now)
        self.counts[reply.result.replace(" ", "_")] += 1
        self._audit(said, name, reply)
        self._board.acted(reply.action, now)
        for number, (html, plain) in enumerate(pages(reply.lines)):
            key = f"{ANSWER}/{said.update_id}/{number}"
            self._post(said.chat, key, ANSWER, html, plain, ASKED, said.thread_id)

    def _reply(self, said: Said, name: str, words: list[str], now: float) -> Reply:
        command = self.table.get(name)
        if command is None:
            return Reply([[(f"{cut(name, 50)} is no command of mine; ", ""), ("/help", "code")]], result="unknown")
        if now - said.at > self._commands.max_age_s:
            text = f"too old: {name} was sent {ago(now, said.at)} and is not run; send it again if you still want it"
            return Reply([[(text, "")]], result="too old")
        changes = name in ("/pause", "/resume") or (name == "/pattern" and words)
        if changes and said.user not in self._commands.users:
            return Reply([[("You may look, but not change anything.", "")]], result="not allowed")
        try:
            return command(words)
        except Exception as error:
            self._context.log.error("command %s failed", name, exc_info=error)
            return Reply([[(f"{name} failed: {type(error).__name__}; nothing was changed", "")]], result="failed")

    def _audit(self, said: Said, name: str, reply: Reply) -> None:
        details = {
            **reply.details,
            "via": "telegram",
            "command": one_line(said.text, 200),
            "result": reply.result,
            "chat_id": said.chat,
            "update_id": said.update_id,
            "sent_at": said.at,
        }
        data = {"user_id": str(said.user), "action": reply.action, "details": details}
        self._context.emit("user_action", data, user_id=str(said.user), priority="high")

    # -- the commands ---------------------------------------------------------------------------

    def _show_status(self, words: list[str]) -> Reply:
        return Reply([*self._status(), *self._board.status(self._clock())])

    def _switch(self, on: bool) -> Reply:
        text = (
            "Paused: the gate fires nothing from now on, also after a restart. /resume ends that."
            if on
            else "Resumed: the gate decides again."
        )
        return Reply([[(text, "")]], "kill_switch_on" if on else "kill_switch_off", "run")

    def _pattern(self, words: list[str]) -> Reply:
        if not words:
            return Reply(self._board.pattern_list())
        wanted = words[-1].lower()
        if wanted not in _WANTED or len(words) < 2:
            return Reply([[("Write ", ""), ("/pattern NAME on|off|auto", "code")]], result="wrong")
        asked = cut(" ".join(words[:-1]), 100)
        known = self._board.known(asked)
        name = known or asked
        text = f"{name} {_WANTED[wanted]}."
        lines: list[Line] = [[(text, "")]]
        if known is None:
            lines.append(
                [("No signal of that pattern has been seen here: is it spelled so? See ", ""), ("/pattern", "code")]
            )
        return Reply(lines, f"pattern_{wanted}", "run", {"pattern_type": name})


class Operators:
    """Everything between the people who command and the bus: what they say, what they may know, what they get told.

    `post` queues a message, `figures` are more lines for ``/status``. Used on the consumer's thread; the listener's
    coroutine runs elsewhere.
    """

    def __init__(
        self,
        context: Context,
        commands: Commands,
        receivers: Iterable[Chat],
        post: Callable[..., None],
        figures: Callable[[], list[Line]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.board = Board(context.state)
        self.commander = Commander(context, commands, self.board, post, figures, clock)
        done = self.commander.done
        ids = [chat.id for chat in receivers]
        self.listener = Listener(commands, self.commander.table, ids, done.update_id, done.at, context.log, clock)

    def see(self, event: Any) -> None:
        """Learn from `event`; where it is a command of ours, Telegram may forget it now."""
        self.board.see(event)
        if number := self.commander.settled(event):
            self.listener.settle(number)

    def tick(self) -> None:
        self.commander.drain(self.listener.inbox)

    def save(self) -> None:
        self.board.save()

    def health(self, relay: dict[str, Any]) -> dict[str, Any]:
        """What the `relay` says of itself, with what keeps commands from being heard."""
        trouble = self.listener.trouble
        if not trouble or relay["status"] == "error":
            return relay
        return {"status": "degraded", "message": f"commands are not heard: {trouble}; {relay['message']}"}

    def metrics(self) -> dict[str, int | float | str]:
        counts = {f"commands.{name}": count for name, count in list(self.commander.counts.items())}
        return {**counts, **{f"ignored.{name}": count for name, count in list(self.listener.ignored.items())}}
