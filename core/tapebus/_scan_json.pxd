# cython: language_level=3
"""The scan of one JSON event."""

from libc.stdint cimport uint8_t

from tapebus._scan cimport item_t
from tapebus._topics cimport Topics

cdef inline const uint8_t *js_space(const uint8_t *p, const uint8_t *end) noexcept nogil:
    while p < end and (p[0] == 32 or p[0] == 10 or p[0] == 13 or p[0] == 9):
        p += 1
    return p

# The end of the event at `p`, described in `item`; NULL with the reason in `error`.
cdef const uint8_t *js_event(Topics topics, const uint8_t *p, const uint8_t *end, item_t *item, int *error) noexcept nogil
