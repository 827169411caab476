"""The checker sees what it is for: each kind of wrong tape is found, and counted under its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ledger import Checker, Ledger, Writer, event_of


@pytest.fixture
def judged(embed, tmp_path):
    """``judged(numbers, published, acked, dropped)``: the verdict on a tape with these numbers in this order."""

    def judge(
        numbers: list[int], published: int, acked: int, dropped: tuple[tuple[int, int], ...] = (), data: Any = None
    ) -> dict[str, int]:
        bus = embed(["schema", "store"])
        with bus.publisher("webapp") as publisher:
            for n in numbers:
                event_type, made, at, correlation = event_of("webapp", n)
                publisher.publish(event_type, data or made, timestamp=at, correlation_id=correlation)
            assert publisher.flush(30.0)
        file: Path = tmp_path / "webapp.ledger"
        writer = Writer(str(file))
        writer.line("publish", published)
        writer.line("acked", acked, 1.0)
        for each in dropped:
            writer.line("dropped", *each)
        checker = Checker(bus.data_dir, [Ledger(file, "webapp")])
        checker.read_on()
        return checker.verdict().wrong

    return judge


@pytest.mark.parametrize(
    ("numbers", "published", "acked", "dropped", "wrong"),
    [
        ([1, 2, 3], 3, 3, (), {}),
        ([1, 2, 3], 4, 2, (), {}),
        ([1, 2, 3], 4, 4, (), {"lost": 1}),
        ([1, 3], 3, 2, (), {"lost": 1, "holes": 1}),
        ([1, 3], 3, 2, ((2, 2),), {}),
        ([1, 2, 3], 3, 2, ((2, 2),), {"phantom": 1}),
        ([1, 2, 2, 3], 3, 3, (), {"duplicate": 1}),
        ([2, 1, 3], 3, 3, (), {"reordered": 1}),
        ([1, 2, 3], 2, 2, (), {"phantom": 1}),
    ],
)
def test_every_kind_of_wrong_tape_is_counted_under_its_name(judged, numbers, published, acked, dropped, wrong):
    assert judged(numbers, published, acked, dropped) == wrong


def test_an_event_that_is_not_as_it_was_published_is_a_phantom(judged):
    other = event_of("webapp", 2)[1]
    assert judged([1], 1, 1, data=other) == {"lost": 1, "phantom": 1}


def test_a_half_written_line_waits_for_its_other_half(tmp_path):
    file = tmp_path / "webapp.ledger"
    file.write_text("publish 100\nacked 10")
    ledger = Ledger(file, "webapp").read_on()
    assert (ledger.intended, ledger.acked) == (100, 0)
    with file.open("a") as more:
        more.write("0 2.5\n")
    assert ledger.read_on().acked == 100


def test_books_that_do_not_close_are_unexplained(judged, tmp_path):
    file = tmp_path / "webapp.ledger"
    Writer(str(file)).line("publish", 0)
    checker = Checker(tmp_path, [Ledger(file, "webapp")])
    book = {"source": "webapp", "highest_seq": 5, "stored": 3, "rejected": 0, "dropped": 1, "in_flight": 0}
    verdict = checker.verdict({"bus": {"unexplained": 0}, "producers": [book]})
    assert verdict.wrong == {"unexplained": 4}
