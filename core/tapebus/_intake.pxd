# cython: language_level=3
"""What all ways into the ring share."""

from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from tapebus._ring cimport Ring, entry_t
from tapebus._rights cimport RightsTable
from tapebus._scan cimport item_t, items_t

# A socket the thread reads. `peers` says how a peer's rights are found; `rights` are everybody's where they
# do not depend on the peer. `prefix` (malloc'ed) turns a bare payload into an event: for JSON the text
# before and after the timestamp, for MessagePack the bytes before it.
cdef struct source_t:
    void *socket
    uint32_t producer
    uint8_t router
    uint8_t wrap
    uint8_t narrow        # libzmq holds only few of its messages
    uint8_t peers
    uint8_t rights
    int64_t sampled_us
    PyObject *fields      # found key -> stored key, or NULL; borrowed from Ingest
    char json[512]
    char pack[512]
    int pack_size

cdef class Intake:
    cdef:
        Ring ring
        RightsTable rights
        items_t items                  # what `scan` found last
        uint32_t gathered              # events of small frames that wait to be published together, all of one producer
        uint32_t gathered_size
        int64_t gathered_us            # when the first of them was received
        item_t *gathered_items         # malloc'ed once, as are their bytes
        uint8_t *gathered_data
        uint32_t max_frame
        uint32_t max_events
        int64_t tail_seen
        int64_t tail_seen_us
        readonly uint64_t malformed
        readonly uint64_t oversize
        readonly uint64_t shed
        public object samples          # callable(frame: bytes, reason: str), called with the GIL
    cdef bint has_legacy_room(self) noexcept nogil
    cdef bint stalled(self) noexcept nogil
    cdef int scan(self, const uint8_t *data, size_t size, uint8_t rights) noexcept nogil
    cdef bint gather(self, uint32_t producer, const uint8_t *data, uint32_t size, int64_t received_us) noexcept nogil
    cdef void publish_gathered(self, uint32_t producer) noexcept nogil
    cdef bint take_items(self, entry_t *entry, uint32_t skip) noexcept nogil
    cdef void sample_scan(self, const uint8_t *data, size_t size, int error) noexcept nogil
    cdef void sample(self, const uint8_t *data, size_t size, const char *reason) noexcept nogil
    cdef void sample_refused(self, int64_t *at, const uint8_t *data, size_t size, uint8_t rights, uint8_t code) noexcept nogil
    cdef void _sample(self, const uint8_t *data, size_t size, reason) noexcept
