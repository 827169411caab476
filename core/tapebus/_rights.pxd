# cython: language_level=3
"""Who may publish what, as the ingest thread asks it."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from tapebus._libzmq cimport msg_t
from tapebus._scan cimport items_t
from tapebus._topics cimport MAX_TOPICS, Topics

cdef enum:
    # see security.py
    EVERYTHING = 0
    NOBODY = 255
    ALLOWED = 1
    REFUSED = 2
    BY_NUMBER = 0
    BY_UID = 1
    BY_USER_ID = 2

# What one identity may publish. `verdict` is by topic number: 0 not judged yet, ALLOWED or REFUSED.
# `tokens` are events it may send now; a frame is let through while there is one, and may leave a debt.
cdef struct rights_t:
    uint8_t verdict[MAX_TOPICS]
    uint8_t wild          # has a pattern with a wildcard, so that new event types may be its
    double rate
    double tokens
    int64_t filled_us

cdef class RightsTable:
    cdef:
        readonly object policy         # security.Rights, or None: everybody may do everything
        Topics topics
        rights_t *rights               # by number - 1
        int n_rights
        uint32_t *uids
        uint8_t *uid_rights
        int n_uids
        list refused                   # ranges the last sieve took out
    cdef uint8_t of_peer(self, uint8_t peers, uint8_t otherwise, msg_t *message) noexcept nogil
    cdef bint knows_new(self, uint8_t rights) noexcept nogil
    cdef bint may(self, uint8_t rights, uint16_t topic) noexcept nogil
    cdef uint8_t _judge(self, uint8_t rights, uint16_t topic) noexcept
    cdef uint32_t sieve(self, uint8_t rights, items_t *items, uint32_t skip, uint64_t first) noexcept nogil
    cdef bint within_rate(self, uint8_t rights, uint32_t events) noexcept nogil
