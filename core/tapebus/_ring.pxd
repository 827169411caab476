# cython: language_level=3
"""The ring of received frames and the accounts of producers. One ingest thread, one tape thread."""

from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from tapebus._libzmq cimport msg_t
from tapebus._scan cimport item_t
from tapebus._topics cimport Topics

cdef extern from *:
    """
    #define tb_load(p) __atomic_load_n(p, __ATOMIC_SEQ_CST)
    #define tb_store(p, v) __atomic_store_n(p, v, __ATOMIC_SEQ_CST)
    #define tb_add(p, v) __atomic_add_fetch(p, v, __ATOMIC_SEQ_CST)
    """
    int64_t tb_load(int64_t *p) noexcept nogil
    void tb_store(int64_t *p, int64_t v) noexcept nogil
    int64_t tb_add(int64_t *p, int64_t v) noexcept nogil

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *lock, const void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *lock)
    int pthread_mutex_unlock(pthread_mutex_t *lock)

cdef enum:
    FRAME = 0         # events; `count` more of the frame were refused for reason `code`
    GAP = 1           # the producer dropped `count` events at place `code`
    REJECT = 2        # the bus refused `count` events for reason `code`
    N_CODES = 8
    MANY_ENTRIES = 1024  # more than these are released without the GIL

# A doorbell: an eventfd that is written only while its owner sleeps, so that nobody spins and
# nobody pays a system call under load.
cdef struct bell_t:
    int fd
    int64_t asleep

cdef void bell_ring(bell_t *bell) noexcept nogil

# One frame in the ring. `msg` (live while has_msg) or `owned` (malloc'ed) holds the bytes `data` points
# into; `items` points at `one` or at malloc'ed memory. Everything is released by the tape thread once
# the frame has been packed; `unit` is a strong reference taken by the injector, handed to the tape thread.
cdef struct entry_t:
    msg_t msg
    uint8_t *data
    void *owned
    item_t *items
    item_t one
    uint32_t n
    uint32_t size
    int64_t received_us
    PyObject *unit
    PyObject *refused     # list of the ranges (first, last, code) that `count` sums up, or NULL; a strong reference
    uint64_t producer_seq
    uint32_t producer
    uint32_t count
    uint8_t kind
    uint8_t code
    uint8_t has_msg

# The account of a producer. `accepted`, `highest` and `refused` are written by the ingest thread;
# `watermark`, `stored`, `rejected`, `dropped` by the tape thread while packing; `durable` by the tape
# thread after the commit. Lives as long as the ring.
cdef struct producer_t:
    uint8_t id[16]
    uint64_t epoch
    uint64_t accepted
    int64_t highest
    int64_t durable
    uint64_t watermark
    uint64_t stored
    uint64_t rejected[N_CODES]
    uint64_t dropped[N_CODES]
    uint8_t dirty
    uint8_t sequenced

# A frame handed in from Python, waiting for the ingest thread.
cdef struct mail_t:
    void *data
    size_t size
    PyObject *unit
    uint32_t producer
    mail_t *next

cdef class Ring:
    cdef:
        readonly Topics topics
        entry_t *entries
        uint64_t mask
        int64_t head                # next entry to fill; written by ingest
        int64_t tail                # next entry to pack; written by the tape thread
        int64_t bytes_in            # bytes held by entries between tail and head
        int64_t unnumbered_in       # events in them whose producers do not number them
        readonly int64_t max_bytes
        int64_t stopping
        bell_t tape_bell
        bell_t ingest_bell
        producer_t **producers
        readonly uint32_t n_producers
        uint32_t max_producers
        uint64_t next_seq           # bus_seq of the next event; owned by the tape thread
        mail_t *mail_first
        mail_t *mail_last
        int64_t mail_count
        pthread_mutex_t mail_lock   # held for a few pointer moves only
        public dict identities      # (producer_id, epoch) -> index; touched with the GIL only
        public list books           # ProducerBook by index, the names behind the accounts
        int64_t received            # events accepted by ingest
    cdef entry_t *claim(self, size_t size) noexcept nogil
    cdef void publish(self, entry_t *entry) noexcept nogil
    cdef bint has_room(self, size_t size) noexcept nogil
    cdef mail_t *take_mail(self) noexcept nogil
    cdef void release(self, entry_t *entry) noexcept nogil
    cdef void _release(self, int64_t first, int64_t last) noexcept nogil
    cdef _note_gap(self, entry_t *entry)
    cdef _note_refused(self, entry_t *entry)
