# cython: language_level=3
"""The scan of one MessagePack event."""

from libc.stdint cimport uint8_t, uint32_t

from tapebus._scan cimport item_t
from tapebus._topics cimport Topics

cdef extern from *:
    """
    static inline unsigned int be32(const unsigned char *p) {
        unsigned int v; __builtin_memcpy(&v, p, 4); return __builtin_bswap32(v);
    }
    """
    uint32_t be32(const uint8_t *p) noexcept nogil


cdef inline const uint8_t *mp_count(const uint8_t *p, const uint8_t *end, uint8_t fix, uint8_t b16, uint32_t *n) noexcept nogil:
    """The header of an array (0x90, 0xdc) or map (0x80, 0xde) at `p`, or NULL."""
    if p >= end:
        return NULL
    if (p[0] & 0xf0) == fix:
        n[0] = p[0] & 15
        return p + 1
    if p[0] == b16 and end - p >= 3:
        n[0] = (p[1] << 8) | p[2]
        return p + 3
    if p[0] == b16 + 1 and end - p >= 5:
        n[0] = be32(p + 1)
        return p + 5
    return NULL

# The end of the event at `p`, described in `item`; NULL with the reason in `error`.
cdef const uint8_t *mp_event(Topics topics, const uint8_t *p, const uint8_t *end, item_t *item, int *error) noexcept nogil
