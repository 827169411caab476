# cython: language_level=3
"""Connected producers: which connection leads to whom, and what each of them is told."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from tapebus._ring cimport Ring, producer_t

cdef enum:
    MAX_SOCKETS = 64
    MAX_SESSIONS = 65536

# A connected producer: which socket and routing id lead to it, and what it was last told.
cdef struct session_t:
    uint64_t route        # socket index << 32 | routing id
    uint32_t producer
    uint32_t told_credit
    int64_t told_durable
    int64_t seen_us
    int64_t sampled_us
    uint8_t owes_ack
    uint8_t rights

cdef class Sessions:
    cdef:
        Ring ring
        void *sockets[MAX_SOCKETS]     # by number, see `session_t.route`; owned by Ingest
        session_t *sessions
        int n_sessions
        int max_sessions
        uint32_t *places               # open addressing by route: session number + 1, 0 = free
        uint32_t places_mask
        uint32_t *session_of           # by producer: session number + 1
        uint64_t instance
        uint8_t durable
        int64_t store_full
        int64_t swept_us
        int64_t silent_us
        dict rejects                   # session producer -> ranges not yet told
        int n_rejects
    cdef uint32_t home(self, uint64_t route) noexcept nogil
    cdef session_t *session_at(self, uint64_t route) noexcept nogil
    cdef void lead_to(self, uint64_t route, uint32_t number) noexcept nogil
    cdef void lead_nowhere(self, uint64_t route) noexcept nogil
    cdef session_t *_begin(self, uint64_t route, uint32_t producer, uint8_t rights) noexcept
    cdef void end_session(self, session_t *session) noexcept nogil
    cdef void forget_silent(self) noexcept nogil
    cdef void credit_for(self, uint32_t *events, uint32_t *size) noexcept nogil
    cdef void reply(self, uint64_t route, const uint8_t *head, uint8_t kind, const uint8_t *body, size_t size) noexcept nogil
    cdef void welcome(self, session_t *session, const uint8_t *head) noexcept nogil
    cdef void nack(self, uint64_t route, const uint8_t *head, uint64_t expected, uint8_t code) noexcept nogil
    cdef void head_of(self, session_t *session, uint8_t *head) noexcept nogil
    cdef void _refuse(self, uint32_t producer, uint64_t first, uint64_t last, int code) noexcept
    cdef void send_acks(self) noexcept nogil
    cdef void _ack_with_rejects(self, session_t *session, uint8_t *head, int64_t durable, uint32_t credit, uint32_t credit_bytes) noexcept
    cdef void say_goodbye(self) noexcept nogil
