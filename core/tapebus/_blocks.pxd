# cython: language_level=3
"""The layout of a block's payload: columns first, then the raw bytes of its events."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    # bytes of the payload's head, of one event in all columns, and of one entry of a correlation run
    HEAD_SIZE = 24
    COLUMNS_SIZE = 12
    CORR_SIZE = 8

cdef extern from *:
    """
    #define MAX_WAIT_US 0xffffffffu
    """
    uint64_t MAX_WAIT_US  # the longest wait between two events of one block: 71 minutes

cdef struct head_t:
    uint32_t count
    uint32_t reserved
    uint64_t base_us      # receive time of the first event, µs since 1970
    uint64_t data_size

# Pointers into a payload; valid as long as the bytes object they were taken from.
cdef struct columns_t:
    head_t *head
    uint32_t *size
    uint32_t *wait_us     # receive time after the previous event, µs
    uint16_t *topic
    uint8_t *flags
    uint8_t *priority
    uint8_t *data

# One entry of a correlation run; runs are sorted by hash, then offset.
cdef struct corr_t:
    uint32_t hash
    uint32_t offset

cdef int compare_corr(const void *a, const void *b) noexcept nogil
cdef void columns_at(uint8_t *payload, uint32_t count, columns_t *out) noexcept nogil
cdef uint32_t crc32c_update(uint32_t crc, const uint8_t *p, size_t n) noexcept nogil

cdef class BlockView:
    cdef:
        readonly object payload       # bytes; owns the memory `columns` points into
        readonly uint64_t first_seq
        readonly uint32_t count
        columns_t columns
        uint32_t *offsets             # count + 1 offsets into columns.data; malloc'ed, freed here
        # Of a part of a block after `spread`, else NULL; both malloc'ed, freed here.
        uint32_t *where               # where each event stands in the block, ascending
        uint64_t *received            # when each was received, µs
