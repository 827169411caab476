"""What leaves for Telegram, when, and what each answer means: relay and strict server on one virtual clock."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("telegram", reason="sending is an extra")

import botapi_server as api
from tapebus.testing import ListBatch
from tapebus_telegram.limits import Limits, Window
from tapebus_telegram.sender import CHAT_FAILURES, GIVE_UP_S
from tapebus_telegram.transport import Answer
from telegram_support import TOKEN, Script, World, alerts, event, ids, signals, simulate

PASSING = {
    "429": api.TOO_MANY,
    "429 of the server's own overload": api.too_many(60),
    "500 restart": api.RESTART,
    "502 that is no Bot API answer": api.BAD_GATEWAY,
    "409": api.CONFLICT,
    "a closed connection": api.DROP,
    "a reset connection": api.RESET,
    "half an answer": api.HALF,
    "no answer": api.HANG,
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_what_passes_is_waited_for_and_the_message_comes_once(tmp_path: Path, fault: Any) -> None:
    async def scenario() -> None:
        async with World(tmp_path, chats=[{"id": 7}, {"id": -8}]) as world:
            world.server.faults.extend([fault] * 3)
            await world.handle(signals(3))
            await world.drain()
            for chat in (7, -8):
                assert ids(world.server.accepted, chat) == ["S-1", "S-2", "S-3"]
            assert world.server.broken == []
            assert world.relay.health()["status"] == "ok" and not world.emitted

    simulate(scenario)


def test_retry_after_3_twice_gives_one_message_not_before_6_s_and_a_restart_sends_nothing_again(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with World(tmp_path, chats=[{"id": 7}, {"id": 8}]) as world:
            begin = world.now
            world.server.faults.extend([api.TOO_MANY, api.TOO_MANY])
            await world.handle(signals(1))
            await asyncio.sleep(1.0)
            assert world.relay.metrics()["halted_s"] > 2.0
            await world.drain()
            assert [call["chat_id"] for call in world.server.accepted] == [7, 8]
            assert all(call["at"] >= begin + 6.0 for call in world.server.accepted)
            assert [code for _, code, _ in world.server.refused] == [429, 429]
            await world.restart()
            await world.handle(signals(1))
            await asyncio.sleep(100.0)
            assert len(world.server.accepted) == 2

    simulate(scenario)


def test_a_restart_does_not_shorten_the_wait_that_telegram_asked_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with World(tmp_path) as world:
            begin = world.now
            world.server.faults.append(api.too_many(60))
            await world.handle(signals(1))
            world.commit()
            await asyncio.sleep(1.0)
            await world.restart()
            await world.drain()
            assert world.server.accepted[0]["at"] > begin + 60.09

    simulate(scenario)


def test_a_restart_takes_over_what_is_used_up_of_the_limits(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with World(tmp_path, chats=[{"id": -5}]) as world:
            await world.handle(signals(45))
            world.commit()
            for _ in range(60):
                await asyncio.sleep(1.7)
                await world.restart()
            await world.drain()
            assert ids(world.server.accepted) == [f"S-{n}" for n in range(1, 46)]
            assert world.server.broken == []

    simulate(scenario)


def test_no_limit_is_ever_broken_however_long_the_way_to_the_server_takes(tmp_path: Path) -> None:
    chance = random.Random(3)

    async def scenario() -> None:
        people = [{"id": number, "topics": ["signal_generated"]} for number in range(1, 27)]
        async with World(tmp_path, chats=[*people, {"id": -5}, {"id": -6}]) as world:
            world.server.lag = lambda: chance.choice((0.0, 0.0, 0.0, 0.001, 0.3))
            await world.handle(signals(4))
            for seq in range(10, 35):
                await world.handle(alerts(seq, name=f"alert {seq}"))
            await world.drain()
            assert len(world.server.accepted) == 4 * 28 + 25 * 2 and world.server.broken == []
            for chat in [*range(1, 27), -5, -6]:
                assert [each for each in ids(world.server.accepted, chat) if "S-" in each] == [
                    f"S-{n}" for n in range(1, 5)
                ]

    simulate(scenario)


def test_the_limits_are_used_up_and_not_merely_kept(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with World(tmp_path, chats=[{"id": 7}, {"id": -8}]) as world:
            await world.handle(signals(41))
            await world.drain()
            times = {chat: [c["at"] for c in world.server.accepted if c["chat_id"] == chat] for chat in (7, -8)}
            assert times[7][-1] - times[7][0] == pytest.approx(40.0, abs=0.2)
            assert times[-8][-1] - times[-8][0] == pytest.approx(120.0, abs=0.5)

    simulate(scenario)


@pytest.mark.parametrize("answer", [api.BLOCKED, api.NO_CHAT], ids=["403", "chat not found"])
def test_a_chat_that_refuses_is_disabled_with_an_alert_and_the_others_go_on(tmp_path: Path, answer: Any) -> None:
    async def scenario() -> None:
        async with World(tmp_path, chats=[{"id": 1}, {"id": 2}]) as world:
            if answer == api.BLOCKED:
                world.server.blocked = {1}
            else:
                world.server.chats = {2: set()}
            await world.handle(signals(5))
            await world.drain()
            assert [chat for _, _, chat in world.server.refused] == [1] * CHAT_FAILURES
            assert ids(world.server.accepted) == [f"S-{n}" for n in range(1, 6)]
            assert world.relay.health()["status"] == "degraded"
            assert world.relay.metrics()["dropped.chat_disabled"] == 5
            (alert,) = [wire.data for wire in world.emitted]
            assert (alert["severity"], alert["state"]) == ("error", "raised") and "chat 1 is disabled" in alert[
                "message"
            ]
            # a restart tries again, and says so when it works
            world.server.blocked, world.server.chats = set(), None
            await world.restart()
            await world.handle(signals(1, 6))
            await world.drain()
            world.commit()
            assert ids(world.server.accepted, 1) == ["S-6"]
            cleared = world.emitted[-1].data
            assert cleared["state"] == "cleared" and cleared["name"] == alert["name"]

    simulate(scenario)


def test_a_topic_that_is_gone_is_disabled_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        chats = [{"id": -1, "thread_id": 4, "threads": {"alert": 9}}]
        async with World(tmp_path, chats=chats) as world:
            world.server.chats = {-1: {4}}
            await world.handle(signals(5))
            await world.handle(alerts(10))
            await world.drain()
            assert [call["message_thread_id"] for call in world.server.accepted] == [4] * 5
            assert list(world.sender.disabled) == ["-1/9"] and "thread not found" in world.sender.disabled["-1/9"]

    simulate(scenario)


@pytest.mark.parametrize(("token", "code"), [(TOKEN + "x", 401), ("1:malformed", 404)])
def test_a_wrong_token_stops_the_relay_with_an_alert_and_keeps_what_waits(
    tmp_path: Path, token: str, code: int
) -> None:
    async def scenario() -> None:
        async with World(tmp_path) as world:
            world.server.token, right = token[:-1] + "y" if code == 401 else "2:other", world.server.token
            if code == 404:
                # the server knows malformed tokens by their shape
                world.server.faults.clear()
                world.sender.transport = Script(Answer(404, "Not Found"))
            await world.handle(signals(3))
            await asyncio.sleep(1000.0)
            world.commit()
            health = world.relay.health()
            assert health["status"] == "error" and str(code) in health["message"] and world.relay.outbox.waiting == 3
            assert [wire.data["severity"] for wire in world.emitted] == ["critical"]
            assert world.server.calls == (1 if code == 401 else 0)
            world.server.token = right
            await world.restart()
            await world.drain()
            assert ids(world.server.accepted) == ["S-1", "S-2", "S-3"]
            assert [wire.data["state"] for wire in world.emitted] == ["raised", "cleared"]
            assert len({wire.data["name"] for wire in world.emitted}) == 1

    simulate(scenario)


def test_a_migrated_group_gets_its_messages_under_the_new_id_also_after_a_restart(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with World(tmp_path, chats=[{"id": -5}]) as world:
            world.server.migrated = {-5: -1009}
            await world.handle(signals(2))
            await world.drain()
            world.commit()
            await world.restart()
            await world.handle(signals(1, 3))
            await world.drain()
            assert [call["chat_id"] for call in world.server.accepted] == [-1009] * 3
            assert [chat for _, _, chat in world.server.refused] == [-5] and world.server.broken == []

    simulate(scenario)


def test_entities_that_do_not_parse_are_sent_once_more_as_plain_text(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with World(tmp_path) as world:
            world.server.faults.append(api.BAD_ENTITIES)
            await world.handle(signals(1))
            await world.drain()
            (call,) = world.server.accepted
            assert "parse_mode" not in call and call["visible"].endswith("S-1") and world.server.calls == 2

    simulate(scenario)


def test_a_message_that_is_refused_as_plain_text_as_well_is_dropped_and_counted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with World(tmp_path) as world:
            world.server.faults.extend([api.BAD_ENTITIES, api.BAD_ENTITIES])
            await world.handle(signals(2))
            await world.drain()
            assert ids(world.server.accepted) == ["S-2"] and world.relay.metrics()["dropped.refused"] == 1

    simulate(scenario)


def test_a_text_that_the_server_calls_too_long_comes_shortened(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with World(tmp_path) as world:
            world.server.faults.extend([api.TOO_LONG, api.TOO_LONG])
            await world.handle(alerts(1, title="x" * 4000))
            await world.drain()
            (call,) = world.server.accepted
            assert 500 < len(call["visible"]) < 1100

    simulate(scenario)


def test_an_unchanged_edit_counts_as_sent(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with World(tmp_path) as world:
            await world.handle(alerts(1))
            await world.drain()
            world.server.faults.append(api.LOSE)  # the edit is taken, its answer lost: it is tried again
            await world.handle(alerts(2))
            await world.drain()
            assert [code for _, code, _ in world.server.refused] == [400]
            assert [call["method"] for call in world.server.accepted] == ["sendMessage", "editMessageText"]
            assert world.relay.metrics()["sent"] == 2 and not world.relay.metrics()["dropped"]

    simulate(scenario)


def test_an_edit_of_a_message_that_is_gone_becomes_a_new_message(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with World(tmp_path) as world:
            await world.handle(alerts(1))
            await world.drain()
            world.server.texts.clear()
            await world.handle(alerts(2))
            await world.drain()
            assert [call["method"] for call in world.server.accepted] == ["sendMessage", "sendMessage"]
            assert world.server.accepted[-1]["visible"].endswith("(×2)")

    simulate(scenario)


def test_37_repeats_are_one_message_with_a_count_and_further_ones_edits_of_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with World(tmp_path) as world:
            await world.handle(alerts(*range(1, 37)))
            await world.drain()
            await world.handle(alerts(40))
            await world.drain()
            first, second = world.server.accepted
            assert first["visible"].endswith("(×36)") and second["visible"].endswith("(×37)")
            assert (second["method"], second["message_id"]) == ("editMessageText", first["number"])

    simulate(scenario)


@pytest.mark.parametrize("waits", [False, True])
def test_an_alert_raised_again_after_it_was_cleared_is_a_message_of_its_own_and_the_last_word(
    tmp_path: Path, waits: bool
) -> None:
    """Also where the three wait together: the alarm is the more urgent one and must not overtake its own end."""

    async def scenario() -> None:
        async with World(tmp_path) as world:
            raised = {"severity": "critical", "state": "raised"}
            for seq, state in ((1, raised), (2, {"severity": "info", "state": "cleared"}), (3, raised), (4, raised)):
                await world.handle(alerts(seq, **state))
                if not waits:
                    await world.drain()
                if seq == 2:
                    world.commit()
                    await world.restart()
            await world.drain()
            sent = [call for call in world.server.accepted if call["method"] == "sendMessage"]
            assert ["CLEARED" in call["visible"] for call in sent] == [False, True, False]
            last = world.server.accepted[-1]
            assert "CRITICAL" in last["visible"] and last["visible"].endswith("(×2)")

    simulate(scenario)


def test_repeats_that_were_sent_in_one_message_make_no_second_one_after_a_kill(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with World(tmp_path) as world:
            batch = alerts(*range(1, 6))
            await world.handle(batch)
            while not world.server.accepted:  # sent, and nothing of it is in the state yet
                await asyncio.sleep(0.1)
            await world.restart()
            await world.handle(batch)
            await world.drain()
            assert [call["visible"].split("\n")[-1] for call in world.server.accepted] == ["(×5)"]

    simulate(scenario)


def test_what_repeats_while_the_message_is_on_its_way_is_added_by_an_edit(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with World(tmp_path) as world:
            world.server.lag = lambda: 2.0
            await world.handle(alerts(1))
            await asyncio.sleep(1.0)
            await world.handle(alerts(2, 3))
            await world.drain()
            assert [call["visible"].count("(×3)") for call in world.server.accepted] == [0, 1]
            assert world.server.accepted[-1]["method"] == "editMessageText"

    simulate(scenario)


def test_what_was_merged_into_a_message_before_a_crash_comes_as_an_edit_after_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with World(tmp_path) as world:
            world.server.lag = lambda: 2.0
            await world.handle(alerts(1))
            await asyncio.sleep(1.0)
            await world.handle(alerts(2, 3))
            world.commit()
            await asyncio.sleep(3.3)
            await world.kill()
            assert [call["visible"].count("×") for call in world.server.accepted] == [0]
            world.begin()
            await world.drain()
            assert [call["visible"].count("(×3)") for call in world.server.accepted] == [0, 1]

    simulate(scenario)


def test_urgent_messages_come_first_and_equal_ones_in_their_order(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with World(tmp_path) as world:
            world.server.faults.append(api.TOO_MANY)
            await world.handle(signals(4))
            await world.handle(alerts(10, severity="critical"))
            await world.handle(signals(2, 11))
            await world.drain()
            lines = ["lag" if "lag" in call["visible"] else ids([call])[0] for call in world.server.accepted]
            assert lines == ["lag", "S-1", "S-2", "S-3", "S-4", "S-11", "S-12"]

    simulate(scenario)


def test_an_hour_of_5xx_for_one_message_gives_it_up_only_where_the_server_works_otherwise(tmp_path: Path) -> None:
    async def scenario() -> None:
        failing, fine = Answer(500, "Internal Server Error"), Answer(200, result={"message_id": 1})
        working = False

        async def answer() -> Answer:
            text = script.calls[-1][2].get("text", "")
            script.answers.append(answer)
            return fine if (working and "S-1" not in text) else failing

        script = Script()
        script.answers.append(answer)
        async with World(tmp_path, transport=script) as world:
            await world.handle(signals(2))
            await asyncio.sleep(3 * GIVE_UP_S)
            assert world.relay.outbox.waiting == 2, "an outage of the server loses nothing"
            working = True
            await world.drain()
            assert world.relay.metrics()["dropped.server_errors"] == 1 and world.relay.metrics()["sent"] == 1

    simulate(scenario)


def test_a_message_whose_answer_is_lost_comes_twice_and_only_that_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with World(tmp_path) as world:
            world.server.faults.extend([None, api.LOSE, None])
            await world.handle(signals(3))
            await world.drain()
            assert ids(world.server.accepted) == ["S-1", "S-2", "S-2", "S-3"] and world.server.lost == 1

    simulate(scenario)


@pytest.mark.parametrize("seed", range(4))
def test_a_kill_at_any_moment_loses_nothing_and_repeats_at_most_the_message_in_flight(
    tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)

    async def scenario() -> None:
        async with World(tmp_path, chats=[{"id": 1}, {"id": -2}]) as world:
            world.server.lag = lambda: chance.choice((0.0, 0.05, 0.2))
            cursor = kills = 0
            while cursor < 40 or world.relay.outbox.waiting:
                for _ in range(chance.randrange(4)):
                    if cursor < 40:
                        cursor += 1
                        await world.handle(signals(1, cursor))
                await asyncio.sleep(chance.random() * 2)
                if chance.random() < 0.4:
                    world.commit()
                    saved = cursor
                if chance.random() < 0.2 and kills < 12:
                    kills += 1
                    await world.restart()
                    cursor = saved if kills and world.committed else 0
            assert kills > 3 and world.server.broken == []
            for chat in (1, -2):
                assert list(dict.fromkeys(ids(world.server.accepted, chat))) == [f"S-{n}" for n in range(1, 41)]
            assert len(world.server.accepted) - 80 <= kills

    simulate(scenario)


def test_a_full_disk_holds_messages_back_instead_of_sending_what_it_cannot_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with World(tmp_path) as world:

            def refuse(*_: Any) -> None:
                raise OSError(28, "No space left on device")

            with monkeypatch.context() as patch:
                patch.setattr(world.sender.journal, "_write", refuse)
                await world.handle(signals(2))
                await asyncio.sleep(100.0)
                assert not world.server.calls
                assert "No space left" in world.relay.health()["message"]
            await world.drain()
            assert ids(world.server.accepted) == ["S-1", "S-2"]

    simulate(scenario)


def test_a_window_allows_its_number_in_any_interval_of_its_length() -> None:
    window = Window(3, 10.0)
    for at in (0.0, 4.0, 9.0):
        assert window.ready_at() <= at
        window.take(at)
    assert window.ready_at() == 10.0
    window.take(10.0)
    assert window.ready_at() == 14.0


def test_a_channel_by_name_is_limited_like_a_group() -> None:
    limits = Limits()
    for second in range(20):
        limits.take("@channel", float(second))
    assert limits.ready_at("@channel") == 60.0
    assert limits.ready_at(5) <= 20.0


def test_nothing_is_sent_to_a_chat_that_wants_none_of_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        chats = [{"id": 1, "topics": ["alert"]}, {"id": 2, "messages": {"signal_generated": "silent"}}]
        async with World(tmp_path, chats=chats) as world:
            await world.handle(ListBatch([event(1)]))
            await world.drain()
            (call,) = world.server.accepted
            assert call["chat_id"] == 2 and call["disable_notification"] == "true"

    simulate(scenario)
