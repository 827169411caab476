"""Rights: who may publish and subscribe what, over which transport, and how each refusal is booked."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec
import pytest
import zmq

from bus_support import PATIENCE, Seen, feed_messages, plugin, pushing, quote, wait_until
from security_support import ID, Gate, frame, listening
from tapebus import Config, Consumer, Runtime, wire
from tapebus.blocks import crc32c
from tapebus.curve import generate, public_key
from tapebus.errors import ConfigError
from tapebus.feed import bind
from tapebus.security import EVERYTHING, NOBODY, Identity, Rights, Security, granted, is_loopback, matches, peers_of


@pytest.fixture
def gate(data_dir):
    made = []

    def make(transport, *identities, **options):
        directory = data_dir / str(len(made))
        directory.mkdir()
        made.append(Gate(transport, directory, *identities, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def may(*publish: str, **more) -> Identity:
    return Identity("me", publish=list(publish), **more)


# -- 20 cases over the two transports that know their peers -------------------------------------------------

#: What the identity may publish, what it publishes in one batch, and the numbers that are refused.
CASES = [
    (["a"], ["a"], []),
    (["a"], ["b"], [(1, 1)]),
    ([], ["a"], [(1, 1)]),
    (["*"], ["a", "b", "anything"], []),
    (["a", "b"], ["a", "b", "a"], []),
    (["a"], ["a", "b"], [(2, 2)]),
    (["a"], ["b", "a"], [(1, 1)]),
    (["a"], ["a", "b", "b", "b", "a"], [(2, 4)]),
    (["a"], ["b", "a", "b", "a", "b"], [(1, 1), (3, 3), (5, 5)]),
    (["a"], ["b", "b", "b"], [(1, 3)]),
    (["signal_*"], ["signal_generated", "signal_expired"], []),
    (["signal_*"], ["signal_generated", "trade_executed"], [(2, 2)]),
    (["signal_*"], ["signal_"], []),
    (["signal_*"], ["signal"], [(1, 1)]),
    (["signal_*"], ["Signal_generated"], [(1, 1)]),
    (["signal_*"], ["x_signal_generated"], [(1, 1)]),
    (["trade_executed"], ["trade_executed2"], [(1, 1)]),
    (["trade_executed2"], ["trade_executed"], [(1, 1)]),
    (["a*", "ab"], ["ab", "ac", "b"], [(3, 3)]),
    (["signal_*", "a"], ["a", "fire_command", "signal_x", "fire_command"], [(2, 2), (4, 4)]),
]


@pytest.mark.parametrize("transport", ["ipc", "curve"])
@pytest.mark.parametrize(("publish", "sent", "refused"), CASES)
def test_an_identity_publishes_what_it_may_and_the_rest_is_refused_and_booked(gate, transport, publish, sent, refused):
    # a key that may publish nothing is refused at the door; rights on another type let it in
    here = gate(transport, may(*(publish or (["other"] if transport == "curve" else []))))
    here.hello()
    here.batch(1, *sent)
    denied = {number for first, last in refused for number in range(first, last + 1)}
    assert here.commit() == [kind for number, kind in enumerate(sent, 1) if number not in denied]
    assert here.told(len(sent)) == [(first, last, 4) for first, last in refused]
    book = here.book
    assert (book.watermark, book.highest_seq) == (len(sent), len(sent))
    assert book.stored == len(sent) - len(denied)
    assert book.rejected == ({"ingest.topic_denied": len(denied)} if denied else {})
    assert len(here.samples) == bool(denied)
    assert all(raw == frame(*sent) and reason.startswith("topic_denied: me ") for raw, reason in here.samples)


@pytest.mark.parametrize("transport", ["ipc", "curve", "tcp"])
def test_fire_and_forget_frames_are_judged_event_by_event_too(gate, transport):
    here = gate(transport, may("a"))
    here.push.send(frame("a", "b", "a"))
    here.push.send(frame("b"))
    here.push.send(frame("a"))
    stored: list[str] = []
    while len(stored) < 3:
        stored += here.commit()
    book = here.ring.account(here.legacy)
    assert (stored, book.stored, book.rejected) == (["a", "a", "a"], 3, {"ingest.topic_denied": 2})
    assert book.watermark == 5


def test_a_verdict_is_the_same_the_thousandth_time(gate):
    here = gate("ipc", may("a"))
    here.hello()
    for base in range(1, 2001, 2):
        here.batch(base, "a", "b")
    stored = 0
    while here.book.watermark < 2000:
        stored += len(here.commit())
    assert (stored, here.book.stored, here.book.rejected) == (1000, 1000, {"ingest.topic_denied": 1000})


def test_a_batch_that_overlaps_what_is_known_is_judged_from_its_first_new_event(gate):
    here = gate("ipc", may("a"))
    here.hello()
    here.batch(1, "a", "b")
    here.commit()
    assert here.told(2) == [(2, 2, 4)]
    here.batch(1, "a", "b", "b", "a")
    assert here.commit() == ["a"]
    assert here.told(4) == [(3, 3, 4)]
    assert (here.book.stored, here.book.rejected) == (2, {"ingest.topic_denied": 2})


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_the_owner_and_local_programs_may_do_everything_unless_told_otherwise(gate, transport):
    here = gate(transport)
    here.hello()
    here.batch(1, "trade_executed", "whatever")
    assert here.commit() == ["trade_executed", "whatever"]


def test_a_user_nobody_named_may_publish_nothing_and_adds_no_name(gate):
    here = gate("ipc", known=False)
    here.hello()
    before = len(here.ring.topics)
    here.batch(1, *(f"made_up_{n}" for n in range(50)))
    assert here.commit() == []
    assert here.told(50) == [(1, 50, 4)]
    assert (here.book.stored, here.book.rejected) == (0, {"ingest.topic_denied": 50})
    assert len(here.ring.topics) == before
    here.push.send(frame("made_up"))
    wait_until(lambda: here.ring.fill[0], "the refusal")
    assert here.commit() == []
    assert here.ring.account(here.legacy).rejected == {"ingest.topic_denied": 1}


def test_an_identity_with_exact_rights_adds_no_name_and_one_with_a_wildcard_does(gate):
    exact, wild = gate("ipc", may("a")), gate("curve", may("a*"))
    for here, more in ((exact, 0), (wild, 1)):
        here.hello()
        before = len(here.ring.topics)
        here.batch(1, "a", "ab")
        here.commit()
        assert len(here.ring.topics) - before - (here is wild) == more


def test_strangers_cannot_use_up_the_accounts(gate):
    here = gate("ipc", known=False)
    sockets = []
    for n in range(300):
        sockets.append(here.connect(zmq.DEALER))
        here.send(wire.HELLO, wire.S_HELLO.pack(0), sockets[-1], n.to_bytes(16, "little"))
    kinds = [socket.recv()[0] for socket in sockets]
    assert kinds.count(wire.WELCOME) == 256 and kinds.count(wire.NACK) == 44


def test_a_malformed_batch_of_a_restricted_identity_is_malformed_and_nothing_else(gate):
    here = gate("ipc", may("a"))
    here.hello()
    body = b"\xdd\0\0\0\1\x01"
    here.send(wire.BATCH, wire.S_BATCH.pack(1, 1, crc32c(body), 1) + body)
    here.commit()
    assert here.told(1) == [(1, 1, 1)]
    assert here.book.rejected == {"ingest.malformed": 1}


def test_what_is_faster_than_its_rate_waits_when_numbered_and_is_refused_when_not(gate):
    here = gate("ipc", may("*", rate=10))
    here.hello()
    here.batch(1, *["a"] * 40)
    assert len(here.commit()) == 40, "one frame may leave a debt"
    here.batch(41, "a")
    assert wire.S_NACK.unpack(here.receive(wire.NACK)) == (41, wire.NACK_BUSY)
    assert here.book.rejected == {}
    here.push.send(frame("a", "a"))
    wait_until(lambda: here.ring.fill[0], "the refusal")
    assert here.commit() == []
    assert here.ring.account(here.legacy).rejected == {"ingest.rate": 2}


# -- sessions --------------------------------------------------------------------------------------------------


def test_thousands_of_sessions_come_and_go_and_each_is_answered_by_its_own_producer(gate):
    here = gate("tcp", max_sessions=64)
    sockets = [here.connect(zmq.DEALER) for _ in range(64)]
    names = [n.to_bytes(16, "big") for n in range(1, 65)]
    for turn in range(5):
        for socket, name in zip(sockets, names, strict=True):
            here.hello(socket, name)
        extra = here.connect(zmq.DEALER)
        here.send(wire.HELLO, wire.S_HELLO.pack(0), extra, b"extra".ljust(16))
        assert here.receive(wire.NACK, extra)[8] == wire.NACK_BUSY, "the table is full"
        extra.close()
        for socket, name in list(zip(sockets, names, strict=True))[turn::2]:
            here.send(wire.PING, wire.S_HELLO.pack(0), socket, name)
            here.receive(wire.PONG, socket)
            here.send(wire.BYE, b"", socket, name)
            here.send(wire.PING, wire.S_HELLO.pack(0), socket, name)
            assert here.receive(wire.NACK, socket)[8] == wire.NACK_UNKNOWN
        for socket, name in list(zip(sockets, names, strict=True))[turn + 1 :: 2]:
            here.send(wire.PING, wire.S_HELLO.pack(0), socket, name)
            here.receive(wire.PONG, socket)
    assert here.ingest.sessions_count == 64 - len(sockets[4::2])


def test_a_second_connection_of_a_producer_replaces_the_first_and_one_connection_carries_one_producer(gate):
    here = gate("tcp")
    first, second = here.connect(zmq.DEALER), here.connect(zmq.DEALER)
    here.hello(first)
    here.hello(second)
    assert here.ingest.sessions_count == 1
    here.send(wire.PING, wire.S_HELLO.pack(0), first)
    assert here.receive(wire.NACK, first)[8] == wire.NACK_UNKNOWN
    here.hello(second, b"another".ljust(16))
    assert here.ingest.sessions_count == 1
    here.send(wire.PING, wire.S_HELLO.pack(0), second, ID)
    assert here.receive(wire.NACK, second)[8] == wire.NACK_UNKNOWN
    here.send(wire.PING, wire.S_HELLO.pack(0), second, b"another".ljust(16))
    here.receive(wire.PONG, second)


# -- rights as such --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peers", "address", "user_id", "expected"),
    [
        ("trusted", "", "", EVERYTHING),
        ("loopback", "127.0.0.1", "", EVERYTHING),
        ("ipc", "localhost:1000:1:2", "", EVERYTHING),
        ("ipc", "localhost:1001:1:2", "", 1),
        ("ipc", "localhost:0:1:2", "", NOBODY),
        ("ipc", "localhost:x:1:2", "", NOBODY),
        ("ipc", "", "", NOBODY),
        ("curve", "10.0.0.1", "2", 2),
        ("curve", "10.0.0.1", "", NOBODY),
        ("curve", "10.0.0.1", "anonymous", NOBODY),
    ],
)
def test_a_peer_is_who_its_connection_proves(peers, address, user_id, expected):
    rights = Rights(Security(identities=[Identity("a", uid=1001), Identity("b", key="k" * 40)]), owner=1000)
    assert rights.of_peer(peers, address, user_id) == expected


def test_patterns_are_exact_or_prefixes():
    assert matches("a", ["a"]) and matches("ab", ["a*"]) and matches("", ["*"])
    assert not matches("ab", ["a"]) and not matches("a", []) and not matches("A", ["a*"])


@pytest.mark.parametrize(
    ("asked", "patterns", "expected"),
    [
        (b"", None, [b""]),
        (b"", ["signal_*"], [b"p.signal_"]),
        (b"p.signal_generated", ["signal_*"], [b"p.signal_generated"]),
        (b"p.trade", ["signal_*"], []),
        (b"p.s", ["signal_*", "system_health"], [b"p.signal_", b"p.system_health"]),
        (b"p.", ["*"], [b"p."]),
        (b"", [], []),
    ],
)
def test_a_subscription_is_granted_as_far_as_the_rights_reach(asked, patterns, expected):
    assert granted(asked, "p.", patterns) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name = 'a'", ["exactly one of uid, key or loopback"]),
        ("name = 'a'\nuid = 1\nloopback = true", ["exactly one of"]),
        ("name = 'a'\nkey = 'short'", ["40 characters", "got 5"]),
        ("name = 'a'\nuid = 1\npublish = ['a*b']", ["publish", "'a*b'"]),
        ("name = 'a'\nuid = 1\nsubscribe = ['']", ["subscribe", "''"]),
        ("name = 'a'\nuid = 1\npublishes = ['a']", ["publishes", "publish"]),
        ("name = 'a'\nuid = 1\n[[security.identities]]\nname = 'a'\nuid = 2", ["the same name"]),
        ("name = 'a'\nuid = 1\n[[security.identities]]\nname = 'b'\nuid = 1", ["the same uid"]),
        ("name = 'a'\nloopback = true\n[[security.identities]]\nname = 'b'\nloopback = true", ["the same loopback"]),
        ("name = ''\nuid = 1", ["name"]),
        ("name = 'a'\nuid = -1", ["uid"]),
    ],
)
def test_a_contradictory_identity_is_refused_with_its_key(tmp_path, text, expected):
    file = tmp_path / "c.toml"
    file.write_text(f"[[security.identities]]\n{text}")
    with pytest.raises(ConfigError) as caught:
        Config.load(file, environ={})
    assert [part for part in expected if part not in str(caught.value)] == [], str(caught.value)


# -- a whole bus -----------------------------------------------------------------------------------------------


def test_a_refused_event_is_counted_at_both_ends_and_kept_as_a_dead_letter(embed, data_dir):
    bus = embed(
        ["schema", "store"],
        extra="[[security.identities]]\nname = 'local programs'\nloopback = true\npublish = ['market_data']\n",
    )
    with bus.publisher("forger") as publisher:
        for n in range(10):
            assert publisher.publish("market_data", quote(n))
            assert publisher.publish("trade_executed", {"fire_id": "f", "ticket": 1})
        assert publisher.flush(PATIENCE)
        stats = publisher.stats()
    assert (stats["acked"], stats["rejected"]) == (10, {"ingest.topic_denied": 10})
    figures = bus.runtime.stats()
    [book] = [each for each in figures["producers"] if each["source"] == "forger"]
    assert (book["highest_seq"], book["stored"], book["rejected"], book["unexplained"]) == (20, 10, 10, 0)
    assert figures["bus"]["rejected"] == {"ingest.topic_denied": 10} and figures["bus"]["unexplained"] == 0
    with bus.tape() as tape:
        assert {event.event_type for event in tape.read()} == {"market_data"}
        wait_until(lambda: list(tape.dead_letters()), "the dead letter")
        letter = next(iter(tape.dead_letters()))
        assert (letter.place, letter.reason) == ("ingest", "topic_denied")
        assert b"trade_executed" in letter.raw


def test_the_books_of_refused_events_survive_a_restart(embed):
    extra = "[[security.identities]]\nname = 'local'\nloopback = true\npublish = ['market_data']\n"
    bus = embed(["schema", "store"], extra=extra)
    with bus.publisher("forger") as publisher:
        publisher.publish("fire_command", {})
        publisher.publish("market_data", quote(1))
        assert publisher.flush(PATIENCE)
    bus.stop()
    again = embed(["schema", "store"], extra=extra, again=bus)
    [book] = [each for each in again.runtime.stats()["producers"] if each["source"] == "forger"]
    assert (book["highest_seq"], book["stored"], book["rejected"], book["unexplained"]) == (2, 1, 1, 0)


CHILD = """
import os, sys
os.setgid({uid}); os.setuid({uid})
from tapebus import Publisher
with Publisher("forger", {endpoint!r}) as publisher:
    publisher.publish("trade_executed", {{"fire_id": "f1", "ticket": 7}})
    publisher.publish("market_data", {{"symbol": "EURUSD", "bid": 1.0, "ask": 1.1}})
    print(publisher.flush(30), publisher.stats()["rejected"], publisher.stats()["acked"], flush=True)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        # a rule for somebody else opens the socket to other users
        ("[[security.identities]]\nname='x'\nuid=4242\npublish=['*']\n", "True {'ingest.topic_denied': 2} 0"),
        (
            "[[security.identities]]\nname='x'\nuid=4343\npublish=['market_data']\n",
            "True {'ingest.topic_denied': 1} 1",
        ),
    ],
)
def test_a_trade_forged_by_another_user_is_refused_unless_that_user_is_named(
    data_dir, free_ports, rules, expected, monkeypatch
):
    ports = free_ports(2)
    data_dir.chmod(0o755)
    endpoint = f"ipc://{data_dir}/in.sock"
    file = data_dir / "c.toml"
    file.write_text(
        f"[bus]\ndata_dir='{data_dir}/d'\n[listen]\nfeed='tcp://127.0.0.1:{ports[0]}'\n"
        f"ingest='tcp://127.0.0.1:{ports[1]}'\nacked='{endpoint}'\n[plugins]\nenabled=['schema','store']\n{rules}"
    )
    with Runtime(Config.load(file, environ={})) as runtime:
        # the child may not read this checkout as another user: everything is imported before it changes
        code = "import tapebus.publisher, tapebus._sender\n" + CHILD.format(uid=4343, endpoint=endpoint)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout.strip() == expected, done.stderr
        [book] = [each for each in runtime.stats()["producers"] if each["source"] == "forger"]
        assert book["highest_seq"] == 2 and book["unexplained"] == 0
        assert book["rejected"] == runtime.stats()["bus"]["rejected"]["ingest.topic_denied"]


def test_a_source_hears_only_what_its_peers_may_say(embed, free_ports, data_dir):
    path = f"ipc://{data_dir}/source.sock"
    bus = embed(
        ["schema", "store"],
        extra=f"[[sources]]\nname='mt5'\ntype='pull'\nbind='{path}'\n"
        f"[[security.identities]]\nname='me'\nuid={os.getuid()}\npublish=['market_data']\n",
    )
    with pushing(path) as send:
        for kind in ("trade_executed", "market_data"):
            send(msgspec.json.encode({"event_type": kind, "timestamp": 1.5, "source": "x", "data": quote(1)}))
        wait_until(lambda: bus.runtime.stats()["bus"]["rejected"].get("ingest.topic_denied") == 1, "the refusal")
        wait_until(lambda: bus.runtime.stats()["bus"]["stored"] == 1, "the quote")


def test_the_feed_gives_each_local_subscriber_what_it_may_read(embed):
    bus = embed(
        ["schema", "store"],
        extra="[[security.identities]]\nname='dash'\nloopback=true\npublish=['*']\nsubscribe=['market_*']\n",
    )
    with zmq.Context() as context, context.socket(zmq.SUB) as nosy, context.socket(zmq.SUB) as barred:
        for socket, prefix in ((nosy, b""), (barred, b"bitten.user_")):
            socket.linger, socket.rcvtimeo = 0, 30_000
            socket.subscribe(prefix)
            socket.connect(bus.feed)
        wait_until(lambda: {b"", b"bitten.user_"} <= set(bus.runtime.feed._subscriptions), "both subscriptions")
        with bus.publisher() as publisher:
            publisher.publish("user_action", {"user_id": "u", "action": "a"})
            publisher.publish("market_data", quote(1))
            assert publisher.flush(PATIENCE)
        [(topic, event)] = feed_messages(nosy, 1)
        assert (topic, event["event_type"]) == ("bitten.market_data", "market_data")
        assert barred.poll(0) == 0
        nosy.rcvtimeo = 0
        with pytest.raises(zmq.Again):
            nosy.recv()


# -- what listens ----------------------------------------------------------------------------------------------

GUARD = (
    "[security]\nkey = { file = '%s' }\n[[security.identities]]\nname='far'\nkey='%s'\npublish=['*']\nsubscribe=['*']\n"
)

#: What stands under [listen], what else, and the addresses that may then be listened on; None: exit code 78.
LISTENS = [
    ({}, "", {"127.0.0.1"}),
    ({"acked": "ipc"}, "", {"127.0.0.1"}),
    ({"feed": "127.0.0.2"}, "", {"127.0.0.1", "127.0.0.2"}),
    ({"feed": "[::1]"}, "", {"127.0.0.1", "::1"}),
    ({"feed": "localhost"}, "", {"127.0.0.1"}),
    ({"feed": "0.0.0.0"}, "", None),
    ({"ingest": "*"}, "", None),
    ({"acked": "0.0.0.0"}, "", None),
    ({}, "[[sources]]\nname='a'\ntype='pull'\nbind='tcp://0.0.0.0:{port}'", None),
    ({"feed": "0.0.0.0"}, "key only", None),
    ({"feed": "0.0.0.0"}, "identity only", None),
    ({"feed": "0.0.0.0"}, "uid identity", None),
    ({"feed": "0.0.0.0"}, "guarded", {"127.0.0.1", "0.0.0.0"}),
    ({"ingest": "0.0.0.0", "acked": "0.0.0.0"}, "guarded", {"127.0.0.1", "0.0.0.0"}),
]


@pytest.mark.skipif(not os.path.exists("/proc/self/net/tcp"), reason="the kernel's table of sockets is read in /proc")
@pytest.mark.parametrize(("listen", "more", "expected"), LISTENS)
def test_only_what_is_guarded_listens_beyond_this_machine(data_dir, free_ports, listen, more, expected):
    ports = dict(zip(("feed", "ingest", "acked", "source"), free_ports(4), strict=True))
    _, secret = generate(data_dir, "bus")
    guard = GUARD % (secret, public_key(str(generate(data_dir, "far")[0])))
    extra = {
        "guarded": guard,
        "key only": guard[: guard.index("[[")],
        "identity only": guard[guard.index("[[") :],
        "uid identity": guard[: guard.index("[[")] + "[[security.identities]]\nname='a'\nuid=1\n",
    }.get(more, more.format(port=ports["source"]))
    lines = [
        f"{name} = 'ipc://{data_dir}/{name}.sock'"
        if listen.get(name) == "ipc"
        else f"{name} = 'tcp://{listen.get(name, '127.0.0.1')}:{ports[name]}'"
        for name in ("feed", "ingest", "acked")
    ]
    file = data_dir / "c.toml"
    file.write_text(
        f"[bus]\ndata_dir='{data_dir}/d'\n[listen]\n" + "\n".join(lines) + f"\n[plugins]\nenabled=['store']\n{extra}"
    )
    before = listening()
    if expected is None:
        with pytest.raises(ConfigError) as caught:
            Config.load(file, environ={})
        assert caught.value.exit_code == 78
        assert "[security] key" in str(caught.value) or "[[security.identities]]" in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    with Runtime(Config.load(file, environ={})):
        assert listening() - before | {"127.0.0.1"} == expected | {"127.0.0.1"}


def test_the_command_refuses_an_open_port_with_78_and_says_what_to_add(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(f"[bus]\ndata_dir='{tmp_path}/d'\n[listen]\nfeed='tcp://0.0.0.0:5570'\n")
    done = subprocess.run(
        [sys.executable, "-m", "tapebus", "run", "--config", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 78
    [line] = done.stderr.strip().splitlines()
    assert "listen.feed" in line and "tapebus keygen" in line and "[[security.identities]]" in line
    assert not (tmp_path / "d").exists()


def test_an_unguarded_name_that_resolves_beyond_this_machine_does_not_stay_bound(free_ports):
    [port] = free_ports(1)
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        with pytest.raises(ConfigError, match="beyond this machine"):
            bind(socket, f"tcp://0.0.0.0:{port}", "listen.ingest")
        wait_until(lambda: "0.0.0.0" not in listening(), "the socket to close")


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("tcp://127.0.0.1:1", "loopback"),
        ("tcp://127.8.9.1:1", "loopback"),
        ("tcp://[::1]:1", "loopback"),
        ("tcp://LOCALHOST:1", "loopback"),
        ("ipc:///x", "ipc" if sys.platform == "linux" else "trusted"),
        ("tcp://*:1", "curve"),
        ("tcp://0.0.0.0:1", "curve"),
        ("tcp://[::]:1", "curve"),
        ("tcp://[::ffff:10.0.0.1]:1", "curve"),
        ("tcp://localhost.example.com:1", "curve"),
        ("tcp://eth0:1", "curve"),
        ("tcp://2130706433:1", "curve"),
    ],
)
def test_how_peers_are_known_follows_from_where_a_socket_listens(endpoint, expected):
    assert peers_of(endpoint) == expected
    assert is_loopback(endpoint) == (expected != "curve")


def test_a_local_way_in_remains_when_all_given_ones_are_guarded(tmp_path):
    keys = GUARD % (tmp_path / "k", "k" * 40)
    file = tmp_path / "c.toml"
    file.write_text(f"[bus]\ndata_dir='/x/d'\n[listen]\nacked='tcp://0.0.0.0:5572'\n{keys}")
    config = Config.load(file, environ={})
    assert config.acked_endpoints == ["tcp://0.0.0.0:5572", "ipc:///x/d/run/ingest.sock"]
    assert config.own_endpoint == "ipc:///x/d/run/ingest.sock"


@pytest.mark.parametrize("kind", ["market_data", "nobody_registered_this"])
def test_a_messagepack_extension_is_never_delivered(embed, kind):
    seen = Seen()
    bus = embed(["schema", "store"], ("seen", plugin(Consumer(name="seen", topics=["*"], handler=seen))))
    with pushing(bus.ingest) as send:
        for value in (msgspec.msgpack.Ext(5, b"code"), "plain"):
            data = {**quote(1), "x": value}
            send(msgspec.msgpack.encode({"event_type": kind, "timestamp": 1.5, "source": "t", "data": data}))
        wait_until(lambda: seen.events, "the plain one")
    assert len(seen.events) == 1
    with bus.tape() as tape:
        wait_until(lambda: list(tape.dead_letters()), "the dead letter")
