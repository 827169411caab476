# cython: language_level=3
"""Well-formedness scan of incoming frames: where each event lies and what it is, without the GIL."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    # flags of an event; the low bit is its encoding
    JSON = 1          # JSON, else MessagePack
    ALIASED = 2       # the payload spells a field in a registered other way
    NONFINITE = 4     # holds NaN or an infinity
    EXTENSION = 8     # holds a MessagePack extension other than a timestamp
    UNTIMED = 16      # the timestamp is not a plain number
    WIDE = 32         # holds an integer that 64 bits cannot
    NOT_UTF8 = 64     # holds text that is not UTF-8, perhaps where a typed decoder does not look

    MAX_DEPTH = 32
    MAX_TOPICS = 4096
    SENDERS_TOPICS = 3584   # what senders may fill of it: the rest is for types that are registered
    MAX_TOPIC_SIZE = 100

cdef enum:
    # why a frame is refused
    ERR_EMPTY = -1
    ERR_SYNTAX = -2
    ERR_DEPTH = -3
    ERR_NOT_EVENT = -4
    ERR_EVENT_TYPE = -5
    ERR_TOO_MANY = -6
    ERR_MEMORY = -7

cdef struct item_t:
    uint32_t offset   # from the start of the frame
    uint32_t size
    uint32_t corr     # hash of the correlation id, 0 = none
    uint16_t topic
    uint8_t flags
    uint8_t priority  # 0 low, 1 normal, 2 high, 3 critical
    double time       # event time in Unix seconds, 0 if UNTIMED

cdef struct items_t:
    item_t *v
    uint32_t n
    uint32_t cap

cdef uint32_t hash_bytes(const uint8_t *p, size_t n) noexcept nogil

cdef class Topics:
    cdef:
        # Names are malloc'ed once and freed with the table; ids start at 1. Only the ingest thread adds
        # after start-up; readers see `count` grow after the name is in place.
        uint8_t *names[MAX_TOPICS]
        uint8_t sizes[MAX_TOPICS]
        uint8_t typed[MAX_TOPICS]       # 1: a registered event type
        uint8_t has_alias[MAX_TOPICS]
        uint16_t slots[MAX_TOPICS * 2]  # open addressing by hash of the name; 0 = free
        uint32_t *aliases               # open addressing set of (key hash ^ topic), 0 = free
        uint32_t alias_mask
        uint32_t n_aliases
        int count
        uint8_t closed                  # set by the ingest thread while it scans for one who may add no name
    cdef uint16_t find(self, const uint8_t *name, size_t size, int limit) noexcept nogil
    cdef bint is_alias(self, uint16_t topic, uint32_t key) noexcept nogil

cdef int scan_frame(Topics topics, const uint8_t *data, size_t size, items_t *out, uint32_t max_items) noexcept nogil
