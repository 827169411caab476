# cython: language_level=3
"""Well-formedness scan of incoming frames: where each event lies and what it is, without the GIL."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t

from tapebus._topics cimport Topics

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

cdef int scan_frame(Topics topics, const uint8_t *data, size_t size, items_t *out, uint32_t max_items) noexcept nogil
