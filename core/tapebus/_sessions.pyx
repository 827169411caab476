# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Connected producers: which connection leads to whom, and what each of them is told."""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from tapebus._clock cimport monotonic_us
from tapebus._libzmq cimport DONTWAIT, SNDMORE, zmq_send
from tapebus._ring cimport tb_load
from tapebus._wire cimport HEAD, W_ACK, W_BYE, W_NACK, W_VERSION, W_WELCOME

from tapebus import wire

cdef enum:
    MAX_REPLY = 128       # an acknowledgement with three refused ranges has 99 bytes
    SWEEP_US = 10000000   # how often sessions are looked through for silent ones
    SILENT_US = 60000000  # a producer says something every 3 s
    LIVE_US = 15000000    # and counts as connected for this long
    CREDIT_BYTES = 4 << 20
    LEAST_CREDIT = 64 << 10


cdef class Sessions:
    """The table of sessions and the replies; belongs to the ingest thread. `n_sessions` and `connected` may be read by others."""

    def __cinit__(self, Ring ring not None, uint64_t instance, bint durable, int max_sessions):
        self.ring = ring
        self.instance = instance
        self.durable = durable
        self.silent_us = SILENT_US
        if not 1 <= max_sessions <= MAX_SESSIONS:
            raise ValueError(f"max_sessions must be 1 to {MAX_SESSIONS}")
        self.max_sessions = max_sessions
        self.sessions = <session_t *>calloc(max_sessions, sizeof(session_t))
        # at most half full, so that a search ends soon
        self.places_mask = 15
        while self.places_mask < 2 * <uint32_t>max_sessions:
            self.places_mask = self.places_mask * 2 + 1
        self.places = <uint32_t *>calloc(self.places_mask + 1, sizeof(uint32_t))
        self.session_of = <uint32_t *>calloc(ring.max_producers, sizeof(uint32_t))
        if self.sessions == NULL or self.places == NULL or self.session_of == NULL:
            raise MemoryError
        self.rejects = {}

    def __dealloc__(self):
        free(self.sessions)
        free(self.places)
        free(self.session_of)

    cdef uint32_t home(self, uint64_t route) noexcept nogil:
        return <uint32_t>((route * 0x9E3779B97F4A7C15u) >> 40) & self.places_mask

    cdef session_t *session_at(self, uint64_t route) noexcept nogil:
        cdef uint32_t place = self.home(route)
        while self.places[place]:
            if self.sessions[self.places[place] - 1].route == route:
                return &self.sessions[self.places[place] - 1]
            place = (place + 1) & self.places_mask
        return NULL

    cdef void lead_to(self, uint64_t route, uint32_t number) noexcept nogil:
        """Let `route` lead to session `number`."""
        cdef uint32_t place = self.home(route)
        while self.places[place] and self.sessions[self.places[place] - 1].route != route:
            place = (place + 1) & self.places_mask
        self.places[place] = number + 1

    cdef void lead_nowhere(self, uint64_t route) noexcept nogil:
        cdef uint32_t place = self.home(route), hole, wanted
        while self.places[place] and self.sessions[self.places[place] - 1].route != route:
            place = (place + 1) & self.places_mask
        if self.places[place] == 0:
            return
        # those behind the hole that would have stood in it or before it move up
        hole = place
        while True:
            place = (place + 1) & self.places_mask
            if self.places[place] == 0:
                break
            wanted = self.home(self.sessions[self.places[place] - 1].route)
            if ((place - wanted) & self.places_mask) >= ((place - hole) & self.places_mask):
                self.places[hole] = self.places[place]
                hole = place
        self.places[hole] = 0

    cdef session_t *_begin(self, uint64_t route, uint32_t producer, uint8_t rights) noexcept:
        """The session of `producer`, which from now on speaks through `route`; NULL when there are too many."""
        cdef session_t *session = self.session_at(route)
        if session != NULL and session.producer != producer:
            # one connection carries one producer
            self.end_session(session)
        if self.session_of[producer]:
            session = &self.sessions[self.session_of[producer] - 1]
            self.lead_nowhere(session.route)
        else:
            if self.n_sessions >= self.max_sessions:
                return NULL
            session = &self.sessions[self.n_sessions]
            self.n_sessions += 1
            session.sampled_us = 0
        session.route = route
        session.producer = producer
        session.rights = rights
        session.seen_us = monotonic_us()
        self.session_of[producer] = <uint32_t>(session - self.sessions) + 1
        self.lead_to(route, <uint32_t>(session - self.sessions))
        return session

    cdef void end_session(self, session_t *session) noexcept nogil:
        """Forget `session`; the last one takes its number."""
        cdef session_t *last = &self.sessions[self.n_sessions - 1]
        if self.n_rejects:
            with gil:
                self.n_rejects -= len(self.rejects.pop(session.producer, ()))
        self.lead_nowhere(session.route)
        self.session_of[session.producer] = 0
        if session != last:
            self.lead_to(last.route, <uint32_t>(session - self.sessions))
            self.session_of[last.producer] = <uint32_t>(session - self.sessions) + 1
            session[0] = last[0]
        self.n_sessions -= 1

    cdef void forget_silent(self) noexcept nogil:
        """Drop sessions nobody speaks in any more; a producer that does after all is told to say HELLO."""
        cdef int64_t now = monotonic_us()
        cdef int i = 0
        if now - self.swept_us < min(<int64_t>SWEEP_US, self.silent_us):
            return
        self.swept_us = now
        while i < self.n_sessions:
            if now - self.sessions[i].seen_us > self.silent_us:
                self.end_session(&self.sessions[i])
            else:
                i += 1

    def connected(self):
        """Indexes of the producers that have said something lately; for figures, a moment old."""
        cdef int64_t now = monotonic_us()
        cdef int i
        return {self.sessions[i].producer for i in range(self.n_sessions) if now - self.sessions[i].seen_us < LIVE_US}

    # -- replies --------------------------------------------------------------------------------

    cdef void credit_for(self, uint32_t *events, uint32_t *size) noexcept nogil:
        """What one producer may have in flight: nothing while the store is full, little while it is behind."""
        if tb_load(&self.store_full):
            events[0] = size[0] = 0
        elif self.ring.has_room(self.ring.max_bytes // 2):
            events[0] = 65536
            # what all of them may have on the way together is no more than the ring holds
            size[0] = <uint32_t>max(<int64_t>LEAST_CREDIT, min(<int64_t>CREDIT_BYTES, self.ring.max_bytes // max(1, self.n_sessions)))
        else:
            events[0] = 1024
            size[0] = <uint32_t>min(256 << 10, max(<int64_t>LEAST_CREDIT, self.ring.max_bytes // max(1, self.n_sessions)))

    cdef void reply(self, uint64_t route, const uint8_t *head, uint8_t kind, const uint8_t *body, size_t size) noexcept nogil:
        cdef uint8_t frame[MAX_REPLY]
        cdef uint8_t identity[5]
        cdef uint32_t key = <uint32_t>route
        cdef void *socket = self.sockets[route >> 32]
        identity[0] = 0
        memcpy(identity + 1, &key, 4)
        memcpy(frame, head, HEAD)
        frame[0] = kind
        frame[1] = 0
        frame[2] = W_VERSION
        frame[3] = 0
        if size:
            memcpy(frame + HEAD, body, size)
        # a peer that is gone or does not read gets nothing; it will introduce itself again
        if zmq_send(socket, identity, 5, SNDMORE | DONTWAIT) == 5:
            zmq_send(socket, frame, HEAD + size, DONTWAIT)

    cdef void welcome(self, session_t *session, const uint8_t *head) noexcept nogil:
        cdef uint8_t body[25]
        cdef uint64_t durable = <uint64_t>tb_load(&self.ring.producers[session.producer].durable)
        cdef uint32_t credit, credit_bytes
        session.told_durable = <int64_t>durable
        session.owes_ack = 0
        self.credit_for(&credit, &credit_bytes)
        session.told_credit = credit
        memcpy(body, &self.instance, 8)
        memcpy(body + 8, &durable, 8)
        memcpy(body + 16, &credit, 4)
        memcpy(body + 20, &credit_bytes, 4)
        body[24] = self.durable
        self.reply(session.route, head, W_WELCOME, body, 25)

    cdef void nack(self, uint64_t route, const uint8_t *head, uint64_t expected, uint8_t code) noexcept nogil:
        cdef uint8_t body[9]
        memcpy(body, &expected, 8)
        body[8] = code
        self.reply(route, head, W_NACK, body, 9)

    cdef void head_of(self, session_t *session, uint8_t *head) noexcept nogil:
        cdef producer_t *account = self.ring.producers[session.producer]
        memcpy(head + 4, account.id, 16)
        memcpy(head + 20, &account.epoch, 8)

    cdef void _refuse(self, uint32_t producer, uint64_t first, uint64_t last, int code) noexcept:
        self.rejects.setdefault(producer, []).append((first, last, code))
        self.n_rejects += 1

    cdef void send_acks(self) noexcept nogil:
        """Tell every producer what has become durable since it was last told."""
        cdef session_t *session
        cdef int64_t durable
        cdef uint32_t credit, credit_bytes, none = 0
        cdef uint8_t head[HEAD]
        cdef uint8_t body[20]
        cdef int i
        if self.n_sessions == 0:
            return
        self.credit_for(&credit, &credit_bytes)
        for i in range(self.n_sessions):
            session = &self.sessions[i]
            durable = tb_load(&self.ring.producers[session.producer].durable)
            if durable == session.told_durable and credit == session.told_credit and not session.owes_ack:
                continue
            session.told_durable = durable
            session.told_credit = credit
            session.owes_ack = 0
            self.head_of(session, head)
            if self.n_rejects:
                with gil:
                    self._ack_with_rejects(session, head, durable, credit, credit_bytes)
                continue
            memcpy(body, &durable, 8)
            memcpy(body + 8, &credit, 4)
            memcpy(body + 12, &credit_bytes, 4)
            memcpy(body + 16, &none, 4)
            self.reply(session.route, head, W_ACK, body, 20)

    cdef void _ack_with_rejects(self, session_t *session, uint8_t *head, int64_t durable, uint32_t credit, uint32_t credit_bytes) noexcept:
        cdef bytes body
        waiting = self.rejects.get(session.producer, [])
        # a refused range is told together with the first acknowledgement that covers it, three a frame
        covered = [each for each in waiting if each[1] <= durable]
        for first in range(0, len(covered) or 1, 3):
            told = covered[first:first + 3]
            # no negative index here: this module is compiled without wraparound
            upto = told[2][1] if first + 3 < len(covered) else durable
            body = wire.S_ACK.pack(upto, credit, credit_bytes, len(told))
            for each in told:
                body += wire.S_REJECT.pack(*each)
            self.reply(session.route, head, W_ACK, <uint8_t *>PyBytes_AS_STRING(body), len(body))
        self.n_rejects -= len(covered)
        if len(covered) < len(waiting):
            self.rejects[session.producer] = waiting[len(covered):]
        else:
            self.rejects.pop(session.producer, None)

    cdef void say_goodbye(self) noexcept nogil:
        cdef uint8_t head[HEAD]
        cdef int64_t durable
        cdef int i
        for i in range(self.n_sessions):
            self.head_of(&self.sessions[i], head)
            durable = tb_load(&self.ring.producers[self.sessions[i].producer].durable)
            self.reply(self.sessions[i].route, head, W_BYE, <uint8_t *>&durable, 8)
