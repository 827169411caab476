"""The floors of the benchmark: each does what it says to every event, or says that it did not."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest
import zstandard

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import floors  # noqa: E402
from bench.peers import Wrong  # noqa: E402
from bench.peers.processes import BATCH, frames_of  # noqa: E402

from tapebus.blocks import BlockView  # noqa: E402
from tapebus_store import layout  # noqa: E402


@pytest.mark.parametrize("name", floors.FLOORS)
def test_a_floor_gives_a_rate_of_the_events_it_was_asked_for(name):
    found = floors.FLOORS[name](1_050)
    assert all(value > 0 for value in found.values()) and found["events_per_s"] > 0


def test_the_blocks_hold_every_event_in_the_form_that_the_tape_stores(monkeypatch):
    monkeypatch.setattr("bench.load.time.time", lambda: 1_763_700_000.0)
    count, found = 9_000, []
    unpack = zstandard.ZstdDecompressor()
    for seq, value in floors._blocks(count):
        header = layout.decode_header(layout.seq_key(seq), value)
        block = layout.decode_block(header, layout.excerpt(header, value), unpack)
        view = BlockView(block.payload, block.first_seq)
        assert block.first_seq == len(found) + 1
        found += [view.raw(seq) for seq in range(block.first_seq, block.last_seq + 1)]
    assert found == floors._encoded(count, msgspec.msgpack.encode)


@pytest.mark.parametrize(("count", "frames"), [(200, 2), (201, 3), (2, 2), (1_050, 12)])
def test_two_producers_fill_their_own_frames(count, frames):
    assert frames_of(count, BATCH) == frames
    assert frames_of(count, 1) == count


def test_a_medium_that_keeps_something_else_is_found(monkeypatch):
    written = floors.os.write
    monkeypatch.setattr(floors.os, "write", lambda fd, data: written(fd, data[:-1] + b"?"))
    with pytest.raises(Wrong, match="what was written"):
        floors.FLOORS["publisher-sync"](1_000)


def test_a_decoder_that_skips_events_is_found(monkeypatch):
    kept = floors._array
    monkeypatch.setattr(floors, "_array", lambda events, as_json: kept(events[1:], as_json))
    with pytest.raises(Wrong, match="990 of 1000"):
        floors.FLOORS["publisher-decode"](1_000)
