# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The acknowledged protocol as the compiled modules see it; `wire.py` says the same in Python."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef enum:
    W_HELLO = 1
    W_BATCH = 2
    W_GAP = 3
    W_PING = 4
    W_BYE = 5
    W_WELCOME = 16
    W_ACK = 17
    W_NACK = 18
    W_PONG = 19
    W_VERSION = 1
    NACK_SEQUENCE = 1
    NACK_BUSY = 2
    NACK_UNKNOWN = 3
    NACK_CRC = 4
    HEAD = 28
    BATCH_HEAD = 52       # HEAD + S_BATCH
    MALFORMED = 1         # code of ingest.malformed
    DENIED = 4            # code of ingest.topic_denied
    RATE = 5              # code of ingest.rate
    N_PLACES = 4          # codes of PLACES run from 1 to this


cdef inline uint64_t get64(const uint8_t *p) noexcept nogil:
    cdef uint64_t v
    memcpy(&v, p, 8)
    return v


cdef inline uint32_t get32(const uint8_t *p) noexcept nogil:
    cdef uint32_t v
    memcpy(&v, p, 4)
    return v
