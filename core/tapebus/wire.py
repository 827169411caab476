"""The acknowledged-ingest protocol: one frame per message, little-endian, described in docs/wire-format.md.

Every frame starts with ``HEAD``: type (u8), flags (u8, zero), version (u16), producer_id (16 bytes),
epoch (u64). What follows depends on the type.
"""

from __future__ import annotations

import struct

from tapebus import places

VERSION = 1
HEAD = struct.Struct("<BBH16sQ")  # 28 bytes

#: client to bus. HELLO: highest_seq u64, then a MessagePack map {source, pid, host, version}
HELLO = 1
#: client to bus. BATCH: base_seq u64, n u32, crc32c of the body u32, highest_seq u64, then the body:
#: a MessagePack array with an array32 header (0xdd) holding n events
BATCH = 2
#: client to bus. GAP: first u64, last u64, highest_seq u64, place u8: events the client had to drop
GAP = 3
#: client to bus. PING: highest_seq u64
PING = 4
#: client to bus: going away. Bus to client: durable_seq u64, the bus is stopping, pause.
BYE = 5

#: bus to client. WELCOME: bus_instance u64, durable_seq u64, credit_events u32, credit_bytes u32, durable u8
#: (1: acknowledged means on disk, 0: there is no store, it means dispatched)
WELCOME = 16
#: bus to client. ACK: durable_seq u64, credit_events u32, credit_bytes u32, n_rejects u32, then n times
#: (first u64, last u64, reason u8): ranges the bus refused for good, never to be sent again
ACK = 17
#: bus to client. NACK: expected_seq u64, code u8: send again from expected_seq
NACK = 18
#: bus to client, answers PING
PONG = 19

S_HELLO = struct.Struct("<Q")
S_BATCH = struct.Struct("<QIIQ")
S_GAP = struct.Struct("<QQQB")
S_WELCOME = struct.Struct("<QQIIB")
S_ACK = struct.Struct("<QIII")
S_REJECT = struct.Struct("<QQB")
S_NACK = struct.Struct("<QB")

#: NACK codes
NACK_SEQUENCE, NACK_BUSY, NACK_UNKNOWN, NACK_CRC = 1, 2, 3, 4

#: Where a client may have lost an event, by wire code; `tapebus.places` says what the names mean.
PLACES = {each.code: each.name for each in places.CLIENT}
ABANDONED = 4
#: Why the bus refused an event, by wire code.
REASONS = {each.code: each.name for each in places.INGEST}

MAX_FRAME = 256 * 1024
MAX_BATCH_EVENTS = 4096
DEFAULT_ENDPOINT = "tcp://127.0.0.1:5572"
