"""The live feed: only what was asked for, as it was published, and never at anybody's cost."""

from __future__ import annotations

import json

import msgspec
import zmq

from bus_support import feed_messages, listening, pushing, quote, wait_until


def test_a_subscriber_gets_only_the_topics_it_asked_for(embed):
    bus = embed(["schema", "store"])
    with listening(bus.runtime, bus.feed, b"bitten.user_action") as socket, bus.publisher() as publisher:
        for n in range(100):
            publisher.publish("market_data", quote(n))
        publisher.publish("user_action", {"user_id": "7", "action": "last"})
        assert publisher.flush(30.0)
        [(topic, event)] = feed_messages(socket, 1)
    assert topic == "bitten.user_action"
    assert event["bus_seq"] == 101
    # the message is out before it is counted
    wait_until(lambda: bus.runtime.feed.sent, "the count")
    assert bus.runtime.feed.sent == 1


def test_every_way_to_publish_is_repeated_as_json_with_the_place_on_the_tape(embed):
    bus = embed(["schema", "store"])
    sent = {"event_type": "market_data", "timestamp": 1.5, "source": "eä", "data": {**quote(1), "extra": [1, "ß"]}}
    frames = [
        json.dumps(sent).encode(),
        json.dumps(sent, indent=2, ensure_ascii=False).encode() + b" \n",
        msgspec.msgpack.encode(sent),
        msgspec.msgpack.encode([sent, sent]),
        json.dumps([sent, sent]).encode(),
    ]
    with listening(bus.runtime, bus.feed, b"") as socket, pushing(bus.ingest) as send:
        for frame in frames:
            send(frame)
        received = feed_messages(socket, 7)
    assert [event for _, event in received] == [{**sent, "bus_seq": n} for n in range(1, 8)]


def test_the_prefix_is_configurable(embed):
    bus = embed(["schema", "store"], extra='[feed]\ntopic_prefix = "mine"')
    with listening(bus.runtime, bus.feed, b"mine.") as socket:
        bus.publish(1)
        [(topic, _)] = feed_messages(socket, 1)
    assert topic == "mine.market_data"


def test_an_unsubscribed_topic_is_no_longer_sent(embed):
    bus = embed(["schema", "store"])
    with listening(bus.runtime, bus.feed, b"bitten.") as socket:
        bus.publish(10)
        feed_messages(socket, 10)
        socket.unsubscribe(b"bitten.")
        wait_until(lambda: not bus.runtime.feed._subscriptions, "the end of the subscription")
        bus.publish(10)
        assert bus.runtime.feed.sent == 10


def test_a_subscriber_that_does_not_read_loses_events_and_slows_nobody(embed):
    bus = embed(["schema", "store"], extra="[feed]\nhwm = 100")
    with (
        listening(bus.runtime, bus.feed, b"bitten.") as reader,
        zmq.Context() as context,
        context.socket(zmq.SUB) as stuck,
    ):
        stuck.setsockopt(zmq.LINGER, 0)
        stuck.setsockopt(zmq.RCVHWM, 1)
        stuck.setsockopt(zmq.RCVBUF, 4096)
        stuck.subscribe(b"bitten.")
        stuck.connect(bus.feed)
        wait_until(lambda: bus.runtime.feed._subscriptions.get(b"bitten.") == 2, "both subscribers")
        for part in range(20):
            bus.publish(500, first=part * 500)
        wait_until(lambda: bus.runtime.feed.sent == 10_000, "the feed to have sent all")
        seqs = []
        while reader.poll(200):
            seqs.append(msgspec.json.decode(reader.recv_multipart()[1])["bus_seq"])
    # loss shows as a gap, never as disorder
    assert seqs == sorted(set(seqs))
    assert set(seqs) <= set(range(1, 10_001))
    with bus.tape() as tape:
        assert tape.last_seq == 10_000


def test_a_quarantined_event_is_on_the_feed_but_reaches_no_consumer(embed):
    bus = embed(["schema", "store", "outcomes"])
    crossed = {**quote(1), "bid": 2.0, "ask": 1.0}
    with listening(bus.runtime, bus.feed, b"bitten.market_data") as socket, bus.publisher() as publisher:
        for data in (quote(1), crossed, quote(2)):
            publisher.publish("market_data", data)
        assert publisher.flush(30.0)
        received = feed_messages(socket, 3)
    assert [event["data"] for _, event in received] == [quote(1), crossed, quote(2)]
    wait_until(lambda: bus.runtime.stats()["consumers"][0]["handled"] == 2, "the two good quotes")


def test_an_event_that_json_cannot_repeat_leaves_a_gap_and_the_feed_alive(embed):
    bus = embed(["schema", "store"])
    good = {"event_type": "user_action", "timestamp": 1.0, "source": "t", "data": {"user_id": "1", "action": "a"}}
    frame = msgspec.msgpack.encode({**good, "x": "AB?DE"}).replace(b"AB?DE", b"AB\xb9DE")
    with listening(bus.runtime, bus.feed, b"bitten.user_action") as socket, pushing(bus.ingest) as send:
        for each in (frame, msgspec.msgpack.encode({**good, "x": {None: 2}}), msgspec.msgpack.encode(good)):
            send(each)
        [(_, event)] = feed_messages(socket, 1)
    assert event["bus_seq"] == 3
