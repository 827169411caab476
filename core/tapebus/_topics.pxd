# cython: language_level=3
"""Event type names and the numbers they go by inside the bus and on the tape."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    MAX_TOPICS = 4096
    SENDERS_TOPICS = 3584   # what senders may fill of it: the rest is for types that are registered
    MAX_TOPIC_SIZE = 100


cdef inline uint32_t hash_bytes(const uint8_t *p, size_t n) noexcept nogil:
    """FNV-1a, 32 bit; never 0, which means "none" in an index. Part of the tape's format."""
    cdef uint32_t h = 2166136261u
    cdef size_t i
    for i in range(n):
        h = (h ^ p[i]) * 16777619u
    return h if h else 1


cdef inline uint64_t key_shape(const uint8_t *p, size_t n) noexcept nogil:
    """One of 64 bits by size and first byte: most keys differ from all aliases in it, and need not be hashed."""
    return <uint64_t>1 << ((n * 7 + (p[0] if n else 0)) & 63)


cdef class Topics:
    cdef:
        # Names are malloc'ed once and freed with the table; ids start at 1. Only the ingest thread adds
        # after start-up; readers see `count` grow after the name is in place.
        uint8_t *names[MAX_TOPICS]
        uint8_t sizes[MAX_TOPICS]
        uint8_t typed[MAX_TOPICS]       # 1: a registered event type
        uint64_t alias_shapes[MAX_TOPICS]   # the shapes of a type's aliases; 0: has none
        uint16_t slots[MAX_TOPICS * 2]  # open addressing by hash of the name; 0 = free
        uint32_t *aliases               # open addressing set of (key hash ^ topic), 0 = free
        uint32_t alias_mask
        uint32_t n_aliases
        int count
        uint16_t last                   # the type found last, by the ingest thread
        uint8_t closed                  # set by the ingest thread while it scans for one who may add no name
    cdef uint16_t find(self, const uint8_t *name, size_t size, int limit) noexcept nogil
    cdef bint is_alias(self, uint16_t topic, uint32_t key) noexcept nogil
