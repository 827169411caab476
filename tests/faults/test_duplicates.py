"""Every event sent one to ten times, over many sessions and killed buses: on the tape it is once, and in order."""

from __future__ import annotations

import random
from typing import Any

import zmq
from peer import Peer, encoded

from tapebus import Tape

PRODUCERS = ("elite_guard", "webapp", "router", "confirmations")
MOST = 10


class Repeater:
    """A peer that sends its events again and again, never one of them more than ten times."""

    def __init__(self, peer: Peer, chance: random.Random) -> None:
        self.peer = peer
        self.chance = chance
        self.sent = bytearray(len(peer.events) + 1)

    def _send(self, first: int, last: int) -> None:
        if max(self.sent[first : last + 1]) < MOST - 1:
            self.peer.batch(first, last)
            for n in range(first, last + 1):
                self.sent[n] += 1

    def session(self, goal: int, size: int) -> None:
        """Send pieces of what is known and of what is new, overlapping, repeated and shuffled, up to `goal`."""
        chance = self.chance
        have = self.peer.connect()
        first = max(1, have + 1 - chance.randrange(3 * size))
        pieces = []
        while first <= goal:
            last = min(goal, first + chance.randrange(size))
            pieces += [(first, last)] * chance.choice((1, 1, 2, 3))
            first = max(1, last + 1 - chance.choice((0, 0, 0, size // 2)))
        for place in range(0, len(pieces), 8):
            part = pieces[place : place + 8]
            if chance.random() < 0.3:
                chance.shuffle(part)
            for piece in part:
                self._send(*piece)
            self.peer.listen()


def test_each_event_is_stored_once_however_often_it_is_sent(make_bus, size, chance, figures):
    total = size(20_000, 1_000_000, 1_000_000)
    restarts = size(3, 20, 20)
    each = total // len(PRODUCERS)
    piece = max(20, each // (restarts + 1) // 20)
    bus = make_bus(["schema", "store"]).start()
    refused = kills = 0
    with zmq.Context() as context:
        peers = [Repeater(Peer(context, bus.acked, name, encoded(name, 1, each)), chance) for name in PRODUCERS]
        for life in range(restarts + 1):
            goal = each * (life + 1) // (restarts + 1)
            for _ in range(3):
                chance.shuffle(peers)
                for one in peers:
                    one.session(chance.randrange(goal) + 1 if chance.random() < 0.5 else goal, min(piece, 2000))
            if life < restarts:
                # some of what was just sent is on its way still
                kill = life % 3 != 2
                kills += kill
                promised = {one.peer.name: one.peer.durable for one in peers}
                if kill:
                    bus.kill()
                else:
                    assert bus.stop() == 0
                bus.start()
                for one in peers:
                    assert one.peer.connect() >= promised[one.peer.name]
        for one in peers:
            one.peer.listen()
            refused += len(one.peer.nacks)
            one.peer.connect()
            one.peer.finish(each)
            for n in range(1, each + 1):
                one.sent[n] = max(1, one.sent[n])
            one.peer.drop()
    books = {book["source"]: book for book in bus.stats()["producers"]}
    assert bus.stop() == 0
    found: dict[str, list[Any]] = {name: [] for name in PRODUCERS}
    with Tape.open(bus.data_dir) as tape:
        for event in tape.read(topics=["market_data"]):
            found[event.source].append(event.data.volume)
    for name in PRODUCERS:
        assert found[name] == list(range(1, each + 1)), name
        assert (books[name]["stored"], books[name]["highest_seq"], books[name]["unexplained"]) == (each, each, 0)
    copies = [one.sent[n] for one in peers for n in range(1, each + 1)]
    assert max(copies) > 2
    figures.update(
        events=each * len(PRODUCERS),
        stored=sum(map(len, found.values())),
        sent=sum(copies),
        most_often=max(copies),
        restarts=restarts,
        of_these_killed=kills,
        nacks=refused,
    )
