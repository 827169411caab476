# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The producer's side of acknowledged ingest: a bounded ring of encoded events, and the hot path into it.

The GIL is the only lock. No section of this file releases it and no method of `Outbox` runs Python code
between reading and writing the ring, so every method is one atomic step for all threads, signal handlers
and forks. Encoding, which may run user code, comes before the ring is touched.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_AsUTF8AndSize, PyUnicode_GET_LENGTH
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec
from posix.unistd cimport write

from tapebus._blocks cimport crc32c_update

import collections.abc
import datetime
import os

import msgspec

from tapebus import wire
from tapebus.events import PRIORITIES

cdef enum:
    ENCODE = 1       # codes of wire.PLACES
    RING_FULL = 2
    SPOOL_FULL = 3
    ABANDONED = 4
    N_PLACES = 8
    ARRAY_HEADER = 5
    MARK_AT = 2048   # of a spool file, see docs/decisions/0009
    RECORDS_AT = 4096
    SIZE_BITS = 24

cdef double START_AGAIN_S = 0.1
cdef uint64_t NEVER = 0xFFFFFFFFFFFFFFFF

#: The largest event that fits a frame alone, in bytes.
MAX_EVENT = wire.MAX_FRAME - wire.HEAD.size - wire.S_BATCH.size - ARRAY_HEADER
cdef Py_ssize_t max_event = MAX_EVENT


cdef extern from *:
    """
    /* What was written to a spool before stays before: a killed process leaves its stores in this order. */
    #define store(at, value) __atomic_store_n(at, value, __ATOMIC_RELEASE)
    """
    void store(uint64_t *at, uint64_t value) noexcept


cdef struct entry_t:
    uint64_t first   # sequence numbers; first == last for an event
    uint64_t last
    uint64_t start   # where the bytes lie in the byte ring
    uint32_t size
    uint8_t place    # 0: an event; else the place at which first..last were dropped


# The half of a spool's first page that changes. Numbers in a file are never shifted: a number on the wire
# is the one in the file less `shift`.
cdef struct mark_t:
    uint64_t read_at     # where the first record that is not acknowledged begins, or an older one
    uint64_t acked       # every number up to here needs no sending
    uint64_t next_seq    # the next number to be given; 0: a new file
    uint64_t current     # which of the two names below is valid: a change is one store
    uint64_t epoch[2]
    uint64_t shift[2]
    uint64_t lost_place  # place of the last drop when no event followed, else 0


cdef struct record_t:
    uint32_t crc         # of all that follows, the event included
    uint32_t size_place  # bytes of the event; above SIZE_BITS the place of a hole in the numbers before it
    uint64_t seq


cdef class Outbox:
    """Events waiting for the bus, numbered 1, 2, 3 … without holes, in memory allocated once.

    With `memory`, the content of a spool file, they are kept there as records that a later process can take
    over: `recover` says how many of them were cut off. The record is complete before its number is.

    A dropped event takes a number too: it is kept as a range ``(first, last, place)`` that is sent to the
    bus in its turn. Neighbouring drops at one place share a range; when even the table of entries is full,
    a drop joins the last range whatever its place, and is counted there.
    """

    cdef:
        entry_t *entries
        uint8_t *ring
        readonly uint64_t capacity_events
        readonly uint64_t capacity_bytes
        uint64_t n_entries          # capacity of the table: one more than events, for the last range
        uint64_t tail, head         # entries ever freed, entries ever written
        uint64_t read_at, write_at  # bytes ever acknowledged, bytes ever written, padding at the end included
        uint64_t free_at            # bytes that may be written over: `read_at`, or what of it a disk has heard of
        uint64_t overhead           # bytes of a record before its event
        uint64_t claimed            # where the record begins that is being written, between claim and enter_event
        mark_t *mark                # NULL without a spool
        uint8_t[::1] memory
        readonly bint careful       # acknowledged room is reused only after `synced`
        readonly uint64_t next_seq
        readonly uint64_t published  # events ever given a number or turned away after close
        readonly uint64_t waiting    # events now in the ring
        readonly uint64_t renumbered # how far renumber() has moved the numbers in all
        uint64_t dropped[N_PLACES]
        public uint64_t wake_at      # publish() wakes the sender when it gives out this number or a later one

    def __cinit__(self, uint64_t capacity_events=65536, uint64_t capacity_bytes=16 << 20, uint64_t first_seq=1,
                  uint8_t[::1] memory=None, uint64_t epoch=0, bint careful=False):
        if capacity_events < 1 or capacity_bytes < 1 or first_seq < 1:
            raise ValueError("capacity_events, capacity_bytes and first_seq must be at least 1")
        self.capacity_events, self.capacity_bytes = capacity_events, capacity_bytes
        self.n_entries = capacity_events + 1
        self.entries = <entry_t *>malloc(self.n_entries * sizeof(entry_t))
        if memory is None:
            self.ring = <uint8_t *>malloc(capacity_bytes)
        elif <uint64_t>memory.shape[0] < RECORDS_AT + capacity_bytes:
            raise ValueError("the memory of a spool must hold its first page and capacity_bytes")
        else:
            self.memory = memory
            self.mark = <mark_t *>&memory[MARK_AT]
            self.ring = &memory[RECORDS_AT]
            self.overhead = sizeof(record_t)
            self.careful = careful
        if self.entries == NULL or self.ring == NULL:
            raise MemoryError(f"no memory for an outbox of {capacity_bytes} bytes: lower capacity_bytes")
        self.reset(first_seq)
        if self.mark != NULL and self.mark.next_seq == 0:
            self.mark.epoch[0] = epoch
            self.mark.next_seq = first_seq
            self.mark.acked = first_seq - 1

    def __dealloc__(self):
        free(self.entries)
        if self.mark == NULL:
            free(self.ring)

    cpdef void reset(self, uint64_t first_seq=1) except *:
        """Forget everything, the counters included, and begin again at `first_seq`."""
        cdef int i
        self.tail = self.head = self.read_at = self.write_at = self.free_at = 0
        self.published = self.waiting = self.renumbered = 0
        self.next_seq = self.wake_at = first_seq
        for i in range(N_PLACES):
            self.dropped[i] = 0

    cdef inline entry_t *at(self, uint64_t index) noexcept:
        return &self.entries[index % self.n_entries]

    cdef bint reserve(self, uint64_t size, uint64_t *start) noexcept:
        """Finds room for `size` bytes in one piece; the rest of the ring's end is skipped if it is too short."""
        cdef uint64_t offset
        cdef bint empty = self.free_at == self.write_at
        # The same few pages again and again, unless a disk may know an older beginning.
        if empty and not self.careful:
            self.read_at = self.write_at = self.free_at = 0
            if self.mark != NULL:
                self.mark.read_at = 0
        offset = self.write_at % self.capacity_bytes
        start[0] = self.write_at
        if offset + size > self.capacity_bytes:
            start[0] += self.capacity_bytes - offset
            if empty:
                self.read_at = self.write_at = self.free_at = start[0]
        return start[0] + size - self.free_at <= self.capacity_bytes

    cdef bint has_room(self, uint64_t size, uint64_t *start) noexcept:
        return self.head - self.tail < self.capacity_events and self.reserve(size + self.overhead, start)

    cdef uint8_t *claim(self, uint64_t size) noexcept:
        """Where the `size` bytes of the next event go before `enter_event`; NULL, and counted, without room."""
        cdef uint64_t start
        if not self.has_room(size, &start):
            self.lose(RING_FULL if self.mark == NULL else SPOOL_FULL)
            return NULL
        self.claimed = start
        return self.ring + start % self.capacity_bytes + self.overhead

    cdef uint64_t enter_event(self, uint64_t size) noexcept:
        """Give the event that now lies at what `claim` returned its number."""
        cdef uint64_t seq = self.next_seq
        cdef entry_t *entry
        if self.mark != NULL:
            self.write_record(self.ring + self.claimed % self.capacity_bytes, size)
        entry = self.at(self.head)
        entry.first = entry.last = seq
        entry.start, entry.size, entry.place = self.claimed + self.overhead, <uint32_t>size, 0
        self.write_at = entry.start + size
        self.head += 1
        self.next_seq += 1
        self.published += 1
        self.waiting += 1
        return seq

    cdef void write_record(self, uint8_t *at, uint64_t size) noexcept:
        """Write the head of the record at `at`, whose event is there already, and only then its number."""
        cdef record_t head
        head.size_place = <uint32_t>size
        if self.head > self.tail:
            head.size_place |= <uint32_t>self.at(self.head - 1).place << SIZE_BITS
        head.seq = self.next_seq + self.renumbered
        head.crc = crc32c_update(0, <uint8_t *>&head + 4, sizeof(record_t) - 4)
        head.crc = crc32c_update(head.crc, at + sizeof(record_t), size)
        memcpy(at, &head, sizeof(record_t))
        self.mark.lost_place = 0
        store(&self.mark.next_seq, head.seq + 1)

    cdef bint read_record(self, uint64_t at, uint64_t after, record_t *record) noexcept:
        """Whether an intact record with a number above `after` lies at `at`."""
        cdef uint64_t offset = at % self.capacity_bytes, size
        record.seq = 0
        if offset + sizeof(record_t) > self.capacity_bytes:
            return False
        memcpy(record, self.ring + offset, sizeof(record_t))
        size = record.size_place & ((1 << SIZE_BITS) - 1)
        if not size or offset + sizeof(record_t) + size > self.capacity_bytes or record.seq <= after:
            return False
        return crc32c_update(0, self.ring + offset + 4, sizeof(record_t) - 4 + size) == record.crc

    def recover(self):
        """Take over what is in the spool, once, before anything else; returns how many torn records were cut off.

        What its maker dropped, and numbers whose records never reached the disk, become dropped ranges.
        """
        cdef mark_t *mark = self.mark
        cdef uint64_t last = 0, at = mark.read_at, lap
        cdef record_t record, torn
        self.renumbered = mark.shift[mark.current & 1]
        self.next_seq = mark.acked - self.renumbered + 1
        self.read_at = self.free_at = self.write_at = at
        while True:
            if not self.read_record(at, last, &record):
                torn = record
                lap = at - at % self.capacity_bytes + self.capacity_bytes
                if not self.read_record(lap, last, &record):
                    break
                at = lap
            last = record.seq
            self.take_over(at, &record)
            at += sizeof(record_t) + (record.size_place & ((1 << SIZE_BITS) - 1))
        self.skip_to(mark.next_seq, mark.lost_place)
        self.published += self.waiting
        self.wake_at = self.next_seq
        return last < torn.seq <= mark.next_seq

    cdef entry_t *enter(self) except NULL:
        """Room for one more entry while nothing is freed: a spool may hold more than it was made for."""
        cdef entry_t *entries
        if self.head + 1 >= self.n_entries:
            entries = <entry_t *>realloc(self.entries, 2 * self.n_entries * sizeof(entry_t))
            if entries == NULL:
                raise MemoryError("no memory to take over a spool")
            self.entries = entries
            self.n_entries *= 2
        self.head += 1
        return &self.entries[self.head - 1]

    cdef int take_over(self, uint64_t at, record_t *record) except -1:
        cdef entry_t *entry
        cdef uint64_t size = record.size_place & ((1 << SIZE_BITS) - 1)
        if record.seq <= self.mark.acked:
            return 0
        self.skip_to(record.seq, record.size_place >> SIZE_BITS)
        entry = self.enter()
        entry.first = entry.last = self.next_seq
        entry.start, entry.size, entry.place = at + sizeof(record_t), <uint32_t>size, 0
        self.write_at = entry.start + size
        self.next_seq += 1
        self.waiting += 1
        return 0

    cdef int skip_to(self, uint64_t number, uint64_t place) except -1:
        """Enters the numbers of the file up to before `number` as dropped."""
        cdef entry_t *entry
        cdef uint64_t seq = number - self.renumbered
        if number <= self.renumbered or seq <= self.next_seq:
            return 0
        entry = self.enter()
        if not 0 < place < N_PLACES:
            place = ABANDONED
        entry.first, entry.last, entry.place = self.next_seq, seq - 1, <uint8_t>place
        entry.size, entry.start = 0, self.write_at
        self.dropped[place] += seq - self.next_seq
        self.published += seq - self.next_seq
        self.next_seq = seq
        return 0

    def detach(self):
        """Let go of the memory of a spool; nothing can be published any more, the books stay as they are."""
        if self.mark != NULL:
            self.mark, self.ring, self.memory = NULL, NULL, None
            self.tail = self.head = self.capacity_events = 0

    @property
    def epoch(self):
        """The epoch the spool is numbered under; 0 without one."""
        return self.mark.epoch[self.mark.current & 1] if self.mark != NULL else 0

    @property
    def point(self):
        """``(bytes ever written, bytes ever acknowledged)``: what a sync that begins now will make durable."""
        return self.write_at, self.read_at

    def synced(self, uint64_t read_at, bint careful=True):
        """The disk has the spool as it was at a `point` with this `read_at`; `careful` off: do not wait for more."""
        self.careful = careful
        self.free_at = max(self.free_at, read_at) if careful else self.read_at

    cdef void lose(self, uint8_t place) noexcept:
        cdef entry_t *entry = NULL
        cdef uint64_t used = self.head - self.tail
        if used:
            entry = self.at(self.head - 1)
            # An entry of the table is always left for a range: events use at most capacity_events of them.
            if not entry.place or (entry.place != place and used < self.capacity_events):
                entry = NULL
        if entry == NULL:
            entry = self.at(self.head)
            entry.first, entry.place, entry.size, entry.start = self.next_seq, place, 0, self.write_at
            self.head += 1
        entry.last = self.next_seq
        self.dropped[entry.place] += 1
        self.next_seq += 1
        self.published += 1
        if self.mark != NULL:
            self.mark.lost_place = entry.place
            store(&self.mark.next_seq, self.next_seq + self.renumbered)

    cpdef uint64_t append(self, bytes event) except? 0:
        """Keep one encoded event; returns its number, or 0 when there is no room (counted ``client.ring_full``)."""
        cdef uint64_t size = PyBytes_GET_SIZE(event)
        cdef uint8_t *out = self.claim(size)
        if out == NULL:
            return 0
        memcpy(out, PyBytes_AS_STRING(event), size)
        return self.enter_event(size)

    def offer(self, bytes event):
        """Like `append`, but without room nothing is counted and no number used up: 0, to be tried again later."""
        cdef uint64_t start
        return self.append(event) if self.has_room(PyBytes_GET_SIZE(event), &start) else 0

    cpdef void drop(self, uint8_t place) except *:
        """Count one event as dropped at `place`, a code of `wire.PLACES`; it uses up a number."""
        if not 0 < place < N_PLACES:
            raise ValueError(f"{place} is not a code of wire.PLACES")
        self.lose(place)

    cdef uint64_t find(self, uint64_t seq) noexcept:
        """The entry that holds `seq`, or the next one after it; ``head`` when there is none."""
        cdef uint64_t low = self.tail, high = self.head, middle
        while low < high:
            middle = low + (high - low) // 2
            if self.at(middle).last < seq:
                low = middle + 1
            else:
                high = middle
        return low

    def gap_at(self, uint64_t seq):
        """``(seq, last, place)`` when `seq` was dropped, else ``None``."""
        cdef uint64_t index = self.find(seq)
        cdef entry_t *entry = self.at(index)
        if index == self.head or not entry.place or entry.first > seq:
            return None
        return seq, entry.last, entry.place

    def build_batch(self, uint64_t from_seq, uint64_t max_events, uint64_t max_bytes):
        """``(body, n)``: the events from `from_seq` on as a MessagePack array, up to the next dropped range.

        `body` never exceeds `max_bytes`; ``(b"", 0)`` when not even one event fits, or `from_seq` is no event.
        """
        cdef uint64_t index = self.find(from_seq), end = index, total = ARRAY_HEADER
        cdef entry_t *entry
        cdef uint32_t n
        cdef uint8_t *out
        while end < self.head and end - index < max_events:
            entry = self.at(end)
            if entry.place or entry.first != from_seq + (end - index) or total + entry.size > max_bytes:
                break
            total += entry.size
            end += 1
        if end == index:
            return b"", 0
        n = <uint32_t>(end - index)
        body = PyBytes_FromStringAndSize(NULL, total)
        out = <uint8_t *>PyBytes_AS_STRING(body)
        out[0], out[1], out[2], out[3], out[4] = 0xDD, n >> 24, (n >> 16) & 255, (n >> 8) & 255, n & 255
        out += ARRAY_HEADER
        while index < end:
            entry = self.at(index)
            memcpy(out, self.ring + entry.start % self.capacity_bytes, entry.size)
            out += entry.size
            index += 1
        return body, n

    cpdef uint64_t ack(self, uint64_t seq) except? 0:
        """Free everything up to and including `seq`; returns how many events that were."""
        cdef uint64_t freed = 0
        cdef entry_t *entry
        while self.tail < self.head:
            entry = self.at(self.tail)
            if entry.last > seq:
                if entry.first <= seq:  # part of a dropped range
                    entry.first = seq + 1
                break
            if not entry.place:
                self.read_at = entry.start + entry.size
                freed += 1
            self.tail += 1
        self.waiting -= freed
        if not self.careful:
            self.free_at = self.read_at
        if self.mark != NULL:
            self.mark.acked = max(self.mark.acked, min(seq, self.next_seq - 1) + self.renumbered)
            store(&self.mark.read_at, self.read_at)
        return freed

    @property
    def first_pending(self):
        """The oldest number that is not acknowledged; `next_seq` when there is none."""
        return self.at(self.tail).first if self.tail < self.head else self.next_seq

    def renumber(self, uint64_t epoch=0):
        """Number what is waiting from 1 on under a new `epoch`, for a bus that does not know this producer's past."""
        cdef uint64_t index, shift = self.first_pending - 1, other
        for index in range(self.tail, self.head):
            self.at(index).first -= shift
            self.at(index).last -= shift
        self.next_seq -= shift
        self.renumbered += shift
        self.wake_at = self.next_seq
        if self.mark != NULL:
            other = 1 - (self.mark.current & 1)
            self.mark.epoch[other], self.mark.shift[other] = epoch, self.renumbered
            store(&self.mark.current, other)

    def abandon(self):
        """Drop all that waits, at ``client.exit_abandoned``; dropped ranges stay counted where they were."""
        self.dropped[ABANDONED] += self.waiting
        self.waiting = 0
        self.tail = self.head
        self.read_at = self.free_at = self.write_at

    def refuse(self):
        """Count an event published after the end; it gets no number, as nobody could be told."""
        self.published += 1
        self.dropped[ABANDONED] += 1

    def books(self):
        """``(published, waiting, {place: dropped})`` of one moment; places without a loss are left out."""
        drops = {name: self.dropped[code] for code, name in wire.PLACES.items() if self.dropped[code]}
        return self.published, self.waiting, drops


def enc_hook(value):
    """Plain values for what MessagePack does not know: numpy scalars and arrays, paths, subclasses, mappings."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, datetime.datetime):
        return datetime.datetime.combine(datetime.datetime.date(value), datetime.datetime.timetz(value))
    if isinstance(value, collections.abc.Mapping):
        return dict(value)
    if hasattr(value, "tolist"):
        plain = value.tolist()
    elif hasattr(value, "item"):
        plain = value.item()
    elif isinstance(value, (collections.abc.Sequence, collections.abc.Set, collections.abc.ValuesView)):
        plain = list(value)
    else:
        raise TypeError(f"cannot encode {type(value).__name__}")
    # Anything else could come back here for ever.
    if type(plain) not in (bool, int, float, str, bytes, list, datetime.datetime):
        raise TypeError(f"cannot encode {type(value).__name__}")
    return plain


cdef object encode = msgspec.msgpack.Encoder(enc_hook=enc_hook, decimal_format="number").encode
cdef object to_builtins = msgspec.to_builtins
cdef frozenset priorities = frozenset(PRIORITIES)


# The envelope is written here, key by key in the order of `events.Wire`; `data` and only `data` is for msgspec.
cdef enum:
    OPTIONAL = 6
    FIXED_SIZE = 43   # bytes of the map's header, the keys that always come, and the timestamp

cdef const char **OPTIONAL_KEYS = [
    b"\xaecorrelation_id", b"\xa7user_id", b"\xaasession_id", b"\xa8event_id", b"\xaccausation_id", b"\xa8priority",
]

# The UTF-8 of a string; lives as long as the string.
cdef struct text_t:
    const char *at
    Py_ssize_t size

# All of an event but its data; the strings are the caller's, who keeps them.
cdef struct envelope_t:
    double timestamp
    text_t event_type
    text_t source
    text_t optional[OPTIONAL]   # `at` is NULL where there is none
    uint8_t n_keys
    Py_ssize_t size


cdef inline int spell(object text, text_t *out) except -1:
    out.at = PyUnicode_AsUTF8AndSize(text, &out.size)
    return 0


cdef inline uint8_t *put_bytes(uint8_t *out, const void *data, size_t size) noexcept:
    memcpy(out, data, size)
    return out + size


cdef inline uint8_t *put_text(uint8_t *out, text_t *text) noexcept:
    cdef size_t size = text.size
    cdef int i, n
    if size < 32:
        out[0] = 0xA0 | <uint8_t>size
        out += 1
    else:
        n = 1 if size < 256 else 2 if size < 65536 else 4
        out[0] = 0xD9 if n == 1 else 0xDA if n == 2 else 0xDB
        for i in range(n):
            out[1 + i] = (size >> (8 * (n - 1 - i))) & 255
        out += 1 + n
    return put_bytes(out, text.at, size)


cdef inline size_t size_of(text_t *text) noexcept:
    return text.size + (1 if text.size < 32 else 2 if text.size < 256 else 3 if text.size < 65536 else 5)


cdef inline uint8_t *put_double(uint8_t *out, double value) noexcept:
    cdef uint64_t bits
    cdef int i
    memcpy(&bits, &value, 8)
    for i in range(8):
        out[i] = (bits >> (56 - 8 * i)) & 255
    return out + 8


cdef inline int spell_optional(object text, int which, envelope_t *envelope) except -1:
    cdef text_t *out = &envelope.optional[which]
    if text is None:
        out.at = NULL
        return 0
    spell(text, out)
    envelope.n_keys += 1
    envelope.size += 1 + (OPTIONAL_KEYS[which][0] & 0x1F) + size_of(out)
    return 0


cdef int spell_all(envelope_t *envelope, event_type, source, correlation_id, user_id, session_id, event_id,
                   causation_id, priority) except -1:
    spell(event_type, &envelope.event_type)
    spell(source, &envelope.source)
    envelope.n_keys = 4
    envelope.size = FIXED_SIZE + size_of(&envelope.event_type) + size_of(&envelope.source)
    spell_optional(correlation_id, 0, envelope)
    spell_optional(user_id, 1, envelope)
    spell_optional(session_id, 2, envelope)
    spell_optional(event_id, 3, envelope)
    spell_optional(causation_id, 4, envelope)
    spell_optional(priority, 5, envelope)
    return 0


cdef inline uint8_t *put_opening(uint8_t *out, envelope_t *envelope) noexcept:
    """Everything before the data."""
    out[0] = 0x80 | envelope.n_keys
    out = put_text(put_bytes(out + 1, b"\xaaevent_type", 11), &envelope.event_type)
    out = put_double(put_bytes(out, b"\xa9timestamp\xcb", 11), envelope.timestamp)
    out = put_text(put_bytes(out, b"\xa6source", 7), &envelope.source)
    return put_bytes(out, b"\xa4data", 5)


cdef inline void put_optional(uint8_t *out, envelope_t *envelope) noexcept:
    """Everything after the data."""
    cdef int i
    for i in range(OPTIONAL):
        if envelope.optional[i].at != NULL:
            out = put_bytes(out, OPTIONAL_KEYS[i], 1 + (OPTIONAL_KEYS[i][0] & 0x1F))
            out = put_text(out, &envelope.optional[i])


cdef inline object text_or_none(value):
    return value if value is None or type(value) is str else str(value)


cdef double seconds(value) except? -1:
    if value is None:
        return now()
    if type(value) is float:
        return value
    if isinstance(value, datetime.datetime):
        return value.timestamp()
    return float(value)


cdef inline double monotonic() noexcept:
    cdef timespec spec
    clock_gettime(CLOCK_MONOTONIC, &spec)
    return spec.tv_sec + spec.tv_nsec * 1e-9


cdef inline double now() noexcept:
    cdef timespec spec
    clock_gettime(CLOCK_REALTIME, &spec)
    return spec.tv_sec + spec.tv_nsec * 1e-9


cdef class Emitter:
    """The hot half of a Publisher: encodes an event into the outbox and wakes the sender when it must."""

    cdef:
        readonly Outbox outbox
        readonly str source
        public int wake_fd      # -1: no sender yet, `_start` is called instead
        double start_at         # not before this time on the monotonic clock
        public bint closed
        public bint unopened    # `_open` is called before the next event: a forked child needs an outbox of its own

    def __cinit__(self, *args, **kwargs):
        self.wake_fd = -1

    def _setup(self, str source not None, Outbox outbox not None):
        self.source, self.outbox = source, outbox

    def _open(self):
        """Gives a forked child its outbox."""

    def _start(self):
        """Called at the first event; makes whatever drains the outbox."""

    def _confirm(self, number, timeout):
        """Whether the `number`-th event ever is on disk within `timeout` seconds."""

    cdef bytes encoded(self, data):
        """The data as a MessagePack map, or ``None`` when it is none."""
        if type(data) is not dict:
            data = to_builtins(data, enc_hook=enc_hook)
        return encode(data) if type(data) is dict else None

    cdef uint64_t keep(self, Outbox box, envelope_t *envelope, bytes data) noexcept:
        cdef uint64_t size = envelope.size + PyBytes_GET_SIZE(data)
        cdef uint8_t *out
        if size > <uint64_t>max_event:
            box.lose(ENCODE)
            return 0
        out = box.claim(size)
        if out == NULL:
            return 0
        out = put_opening(out, envelope)
        put_optional(put_bytes(out, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data)), envelope)
        return box.enter_event(size)

    def publish(self, event_type, data, correlation_id=None, priority=None, timestamp=None, causation_id=None,
                user_id=None, session_id=None, event_id=None, *, source=None, durable=False, timeout=5.0):
        """Hand one event over: ``True`` when it is kept for the bus, ``False`` when it is counted as dropped.

        Never blocks, and raises nothing but `KeyboardInterrupt` and `SystemExit`; safe from any thread.
        `data` is a map (or a struct, dataclass or mapping, which becomes one) and is not kept. `timestamp`
        is Unix seconds or a `datetime`, now by default; an unknown `priority` counts as none; `source` names
        another component than this publisher's. With `durable` it does block, for at most `timeout` seconds,
        and ``True`` means that the bus has the event on disk; after ``False`` it may still get there.
        """
        cdef envelope_t envelope
        cdef bytes body = None
        cdef Outbox box
        cdef uint64_t seq = 0, number
        try:
            if isinstance(event_type, str) and 0 < PyUnicode_GET_LENGTH(event_type) <= 100:
                source = self.source if source is None else str(source)[:100]
                correlation_id = text_or_none(correlation_id)
                user_id, session_id = text_or_none(user_id), text_or_none(session_id)
                event_id, causation_id = text_or_none(event_id), text_or_none(causation_id)
                if priority is not None:
                    priority = str(getattr(priority, "value", priority)).lower()
                    priority = priority if priority in priorities else None
                envelope.timestamp = seconds(timestamp)
                body = self.encoded(data)
                spell_all(&envelope, event_type, source, correlation_id, user_id, session_id, event_id, causation_id,
                          priority)
            if self.unopened:
                self._open()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            body = None
        box = self.outbox
        if self.closed:
            box.refuse()
            return False
        if body is None:
            box.lose(ENCODE)
        else:
            seq = self.keep(box, &envelope, body)
        number = seq + box.renumbered if durable else 0
        if box.next_seq > box.wake_at:
            self.wake()
        if seq == 0:
            return False
        return self._confirm(number, timeout) if durable else True

    cdef wake(self):
        cdef Outbox box = self.outbox
        cdef uint64_t one = 1
        if self.wake_fd >= 0:
            # One wake-up is enough: the sender sets the next mark before it sleeps again.
            box.wake_at = NEVER
            write(self.wake_fd, &one, sizeof(one))
            return
        if monotonic() < self.start_at:
            return
        try:
            self._start()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            pass
        if self.wake_fd < 0:
            # No thread to be had now, or another one is at it: the events are kept, an event a little later tries again.
            self.start_at = monotonic() + START_AGAIN_S
