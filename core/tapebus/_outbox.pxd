# cython: language_level=3
"""The layout of an outbox, for the one who puts events in (`_emitter`) and the one who takes them out (`_line`)."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    ENCODE = 1       # codes of wire.PLACES
    RING_FULL = 2
    SPOOL_FULL = 3
    ABANDONED = 4
    N_PLACES = 8
    ARRAY_HEADER = 5

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
        readonly uint64_t acked      # events the bus has stored, less those it refused
        # What of it is on its way over the present connection. An acknowledgement may come for more than that.
        readonly uint64_t sent       # the last number on the wire
        uint64_t rewound_to          # `sent` when this connection began, or was told to begin again
        uint64_t flying, flying_bytes
        public uint64_t wake_at      # publish() wakes the sender when it gives out this number or a later one

    cdef entry_t *at(self, uint64_t index) noexcept
    cdef bint reserve(self, uint64_t size, uint64_t *start) noexcept
    cdef bint has_room(self, uint64_t size, uint64_t *start) noexcept
    cdef uint8_t *claim(self, uint64_t size) noexcept
    cdef uint64_t enter_event(self, uint64_t size) noexcept
    cdef void write_record(self, uint8_t *at, uint64_t size) noexcept
    cdef bint read_record(self, uint64_t at, uint64_t after, record_t *record) noexcept
    cdef entry_t *enter(self) except NULL
    cdef int take_over(self, uint64_t at, record_t *record) except -1
    cdef int skip_to(self, uint64_t number, uint64_t place) except -1
    cdef void lose(self, uint8_t place) noexcept
    cdef uint64_t find(self, uint64_t seq) noexcept
    cdef uint64_t first(self) noexcept
    cdef uint32_t measure(self, uint64_t index, uint64_t max_events, uint64_t max_bytes, uint64_t *size) noexcept
    cdef void copy(self, uint64_t index, uint32_t n, uint8_t *out) noexcept
    cdef void note_sent(self, uint64_t last, uint64_t events, uint64_t size) noexcept
    cpdef void reset(self, uint64_t first_seq=*) except *
    cpdef uint64_t append(self, bytes event) except? 0
    cpdef void drop(self, uint8_t place) except *
    cpdef void rewind(self, uint64_t seq) except *
    cpdef uint64_t ack(self, uint64_t seq) except? 0
