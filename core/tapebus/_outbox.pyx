# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The producer's side of acknowledged ingest: a bounded ring of encoded events.

The GIL is the only lock. No section of this file releases it and no method of `Outbox` runs Python code
between reading and writing the ring, so every method is one atomic step for all threads, signal handlers
and forks.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE

from tapebus._blocks cimport crc32c_update

from tapebus import wire

cdef enum:
    MARK_AT = 2048   # of a spool file, see docs/decisions/0009
    RECORDS_AT = 4096
    SIZE_BITS = 24

#: The largest event that fits a frame alone, in bytes.
MAX_EVENT = wire.MAX_FRAME - wire.HEAD.size - wire.S_BATCH.size - ARRAY_HEADER


cdef extern from *:
    """
    /* What was written to a spool before stays before: a killed process leaves its stores in this order. */
    #define store(at, value) __atomic_store_n(at, value, __ATOMIC_RELEASE)
    """
    void store(uint64_t *at, uint64_t value) noexcept


cdef class Outbox:
    """Events waiting for the bus, numbered 1, 2, 3 … without holes, in memory allocated once.

    With `memory`, the content of a spool file, they are kept there as records that a later process can take
    over: `recover` says how many of them were cut off. The record is complete before its number is.

    A dropped event takes a number too: it is kept as a range ``(first, last, place)`` that is sent to the
    bus in its turn. Neighbouring drops at one place share a range; when even the table of entries is full,
    a drop joins the last range whatever its place, and is counted there.
    """

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
        self.published = self.waiting = self.acked = self.renumbered = 0
        self.next_seq = self.wake_at = first_seq
        for i in range(N_PLACES):
            self.dropped[i] = 0
        self.rewind(first_seq - 1)

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
        cdef uint64_t index = self.find(from_seq), size
        cdef uint32_t n
        if index < self.head and self.at(index).first != from_seq:
            return b"", 0
        n = self.measure(index, max_events, max_bytes, &size)
        if n == 0:
            return b"", 0
        body = PyBytes_FromStringAndSize(NULL, size)
        self.copy(index, n, <uint8_t *>PyBytes_AS_STRING(body))
        return body, n

    cdef uint32_t measure(self, uint64_t index, uint64_t max_events, uint64_t max_bytes, uint64_t *size) noexcept:
        """How many events from entry `index` on fit one array of at most `max_bytes`, and what size it has."""
        cdef uint64_t end = index
        cdef entry_t *entry
        size[0] = ARRAY_HEADER
        while end < self.head and end - index < max_events:
            entry = self.at(end)
            if entry.place or size[0] + entry.size > max_bytes:
                break
            size[0] += entry.size
            end += 1
        return <uint32_t>(end - index)

    cdef void copy(self, uint64_t index, uint32_t n, uint8_t *out) noexcept:
        """Write the array that was measured."""
        cdef entry_t *entry
        cdef uint64_t end = index + n
        out[0], out[1], out[2], out[3], out[4] = 0xDD, n >> 24, (n >> 16) & 255, (n >> 8) & 255, n & 255
        out += ARRAY_HEADER
        while index < end:
            entry = self.at(index)
            memcpy(out, self.ring + entry.start % self.capacity_bytes, entry.size)
            out += entry.size
            index += 1

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
                if self.rewound_to < entry.first <= self.sent:
                    self.flying -= 1
                    self.flying_bytes -= entry.size
            self.tail += 1
        self.waiting -= freed
        self.acked += freed
        self.sent = max(self.sent, min(seq, self.next_seq - 1))
        if not self.careful:
            self.free_at = self.read_at
        if self.mark != NULL:
            self.mark.acked = max(self.mark.acked, min(seq, self.next_seq - 1) + self.renumbered)
            store(&self.mark.read_at, self.read_at)
        return freed

    def note_refused(self, uint64_t events):
        """So many of the events that `ack` has freed were not stored but refused."""
        self.acked -= events

    cpdef void rewind(self, uint64_t seq) except *:
        """Nothing after `seq` is on its way any more."""
        self.sent = self.rewound_to = seq
        self.flying = self.flying_bytes = 0

    cdef void note_sent(self, uint64_t last, uint64_t events, uint64_t size) noexcept:
        self.sent = last
        self.flying += events
        self.flying_bytes += size

    cdef uint64_t first(self) noexcept:
        return self.at(self.tail).first if self.tail < self.head else self.next_seq

    @property
    def first_pending(self):
        """The oldest number that is not acknowledged; `next_seq` when there is none."""
        return self.first()

    def renumber(self, uint64_t epoch=0):
        """Number what is waiting from 1 on under a new `epoch`, for a bus that does not know this producer's past."""
        cdef uint64_t index, shift = self.first() - 1, other
        for index in range(self.tail, self.head):
            self.at(index).first -= shift
            self.at(index).last -= shift
        self.next_seq -= shift
        self.renumbered += shift
        self.wake_at = self.next_seq
        self.rewind(0)
        if self.mark != NULL:
            other = 1 - (self.mark.current & 1)
            self.mark.epoch[other], self.mark.shift[other] = epoch, self.renumbered
            store(&self.mark.current, other)

    def abandon(self):
        """Drop all that waits, at ``client.exit_abandoned``; dropped ranges stay counted where they were."""
        self.dropped[ABANDONED] += self.waiting
        self.waiting = self.flying = self.flying_bytes = 0
        self.tail = self.head
        self.read_at = self.free_at = self.write_at

    def refuse(self):
        """Count an event published after the end; it gets no number, as nobody could be told."""
        self.published += 1
        self.dropped[ABANDONED] += 1

    def books(self):
        """``(published, waiting, acked, {place: dropped})`` of one moment; places without a loss are left out."""
        drops = {name: self.dropped[code] for code, name in wire.PLACES.items() if self.dropped[code]}
        return self.published, self.waiting, self.acked, drops
