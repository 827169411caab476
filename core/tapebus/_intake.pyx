# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""What all ways into the ring share: its room, the scan of a frame, and samples of what is refused."""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from tapebus._clock cimport monotonic_us
from tapebus._ring cimport FRAME, entry_t, tb_load
from tapebus._rights cimport EVERYTHING
from tapebus._scan cimport item_t, scan_frame
from tapebus._wire cimport RATE

from tapebus import wire
from tapebus._scan import REASONS as SCAN_REASONS

cdef enum:
    SAMPLE_US = 100000    # at most one refused frame of a peer is kept as a dead letter in this time
    STALL_US = 1000000    # a tape that stands still this long makes fire-and-forget frames be shed
    # Frames are gathered until there are so many events or bytes; a larger frame is not copied, but kept as it came.
    GATHER_EVENTS = 128
    GATHER_BYTES = 16 << 10
    GATHER_FRAME = 2 << 10
    GATHER_FRAME_EVENTS = 128


cdef class Intake:
    """Belongs to the ingest thread; the counters may be read by others."""

    def __cinit__(self, Ring ring not None, uint32_t max_frame, uint32_t max_events):
        self.ring = ring
        self.rights = RightsTable(ring.topics)
        self.max_frame = max_frame
        self.max_events = max_events
        self.gathered_items = <item_t *>malloc((GATHER_EVENTS + GATHER_FRAME_EVENTS) * sizeof(item_t))
        self.gathered_data = <uint8_t *>malloc(GATHER_BYTES + GATHER_FRAME)
        if self.gathered_items == NULL or self.gathered_data == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.items.v)
        free(self.gathered_items)
        free(self.gathered_data)

    cdef bint has_legacy_room(self) noexcept nogil:
        """Whether a fire-and-forget frame may enter: the last quarter is for producers that number their events."""
        cdef int64_t most = <int64_t>self.ring.mask - <int64_t>self.ring.mask // 4
        cdef int64_t size = max(<int64_t>0, min(self.ring.max_bytes // 4, self.ring.max_bytes - 2 * <int64_t>self.max_frame))
        return self.ring.has_room(self.max_frame + size) and (
            self.ring.head - tb_load(&self.ring.tail) <= most) and (
            tb_load(&self.ring.unnumbered_in) + self.gathered <= most)

    cdef bint stalled(self) noexcept nogil:
        """Whether there is no room for fire-and-forget frames and the tape has not moved for a second."""
        cdef int64_t tail = tb_load(&self.ring.tail)
        cdef int64_t now = monotonic_us()
        if self.has_legacy_room() or tail != self.tail_seen or self.tail_seen_us == 0:
            self.tail_seen = tail
            self.tail_seen_us = now
            return False
        return now - self.tail_seen_us > STALL_US

    cdef int scan(self, const uint8_t *data, size_t size, uint8_t rights) noexcept nogil:
        """Scan one frame of a peer into `items`; their number, or why it is refused (``ERR_*``)."""
        cdef int n
        if rights != EVERYTHING:
            self.ring.topics.closed = not self.rights.knows_new(rights)
        n = scan_frame(self.ring.topics, data, size, &self.items, self.max_events)
        self.ring.topics.closed = 0
        return n

    cdef bint gather(self, uint32_t producer, const uint8_t *data, uint32_t size, int64_t received_us) noexcept nogil:
        """Copy the scanned events of a small frame behind those that came before; False when it is not small.

        An entry for a hundred frames instead of one for each spares the tape thread a hundred cold messages.
        """
        cdef item_t *item
        cdef uint32_t i
        if size > GATHER_FRAME or self.items.n > GATHER_FRAME_EVENTS:
            return False
        if self.gathered == 0:
            self.gathered_us = received_us
        memcpy(self.gathered_data + self.gathered_size, data, size)
        item = self.gathered_items + self.gathered
        for i in range(self.items.n):
            item[i] = self.items.v[i]
            item[i].offset += self.gathered_size
        self.gathered += self.items.n
        self.gathered_size += size
        if self.gathered >= GATHER_EVENTS or self.gathered_size >= GATHER_BYTES:
            self.publish_gathered(producer)
        return True

    cdef void publish_gathered(self, uint32_t producer) noexcept nogil:
        """Enter what was gathered from `producer` into the ring."""
        cdef size_t items = self.gathered * sizeof(item_t)
        cdef entry_t *entry
        cdef uint8_t *copy
        if self.gathered == 0:
            return
        entry = self.ring.claim(0)
        copy = <uint8_t *>malloc(items + self.gathered_size) if entry != NULL else NULL
        if copy == NULL:
            self.shed += self.gathered
        else:
            memcpy(copy, self.gathered_items, items)
            memcpy(copy + items, self.gathered_data, self.gathered_size)
            entry.kind = FRAME
            entry.producer = producer
            entry.received_us = self.gathered_us
            entry.items = <item_t *>copy
            entry.n = self.gathered
            entry.data = copy + items
            entry.size = <uint32_t>items + self.gathered_size
            self.ring.publish(entry)
        self.gathered = self.gathered_size = 0

    cdef bint take_items(self, entry_t *entry, uint32_t skip) noexcept nogil:
        """Give `entry` the scanned items from number `skip` on."""
        cdef uint32_t n = self.items.n - skip
        if n == 1:
            entry.one = self.items.v[skip]
            entry.items = &entry.one
        else:
            entry.items = <item_t *>malloc(n * sizeof(item_t))
            if entry.items == NULL:
                entry.items = &entry.one
                return False
            memcpy(entry.items, self.items.v + skip, n * sizeof(item_t))
        entry.n = n
        return True

    cdef void sample_scan(self, const uint8_t *data, size_t size, int error) noexcept nogil:
        with gil:
            self._sample(data, size, SCAN_REASONS.get(error, "not an event"))

    cdef void sample(self, const uint8_t *data, size_t size, const char *reason) noexcept nogil:
        with gil:
            self._sample(data, size, reason.decode())

    cdef void _sample(self, const uint8_t *data, size_t size, reason) noexcept:
        try:
            if self.samples is not None:
                self.samples(PyBytes_FromStringAndSize(<char *>data, min(size, <size_t>65536)), reason)
        except BaseException:
            self.samples = None

    cdef void sample_refused(self, int64_t *at, const uint8_t *data, size_t size, uint8_t rights, uint8_t code) noexcept nogil:
        cdef int64_t now = monotonic_us()
        if at[0] and now - at[0] < SAMPLE_US:
            return
        at[0] = now
        with gil:
            who = self.rights.policy.name(rights)
            why = "publishes faster than its rate" if code == RATE else "may not publish one of these event types"
            self._sample(data, size, f"{wire.REASONS[code].removeprefix('ingest.')}: {who} {why}")
