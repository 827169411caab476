# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Who may publish what, as the ingest thread asks it: by number of the identity, without the GIL."""

from libc.stdlib cimport calloc, free

from tapebus._clock cimport monotonic_us
from tapebus._libzmq cimport msg_gets
from tapebus._wire cimport DENIED


cdef class RightsTable:
    """The identities of a `security.Rights` and what each may publish; without `restrict`, everybody everything.

    Belongs to the ingest thread, once that runs.
    """

    def __cinit__(self, Topics topics not None):
        self.topics = topics
        self.refused = []

    def __dealloc__(self):
        free(self.rights)
        free(self.uids)
        free(self.uid_rights)

    def restrict(self, policy not None):
        """Let only the identities of `policy` (a `security.Rights`) publish, and only what they may."""
        cdef int i
        self.policy = policy
        self.n_rights = len(policy.identities)
        self.rights = <rights_t *>calloc(self.n_rights or 1, sizeof(rights_t))
        self.n_uids = len(policy.uids)
        self.uids = <uint32_t *>calloc(self.n_uids or 1, sizeof(uint32_t))
        self.uid_rights = <uint8_t *>calloc(self.n_uids or 1, 1)
        if self.rights == NULL or self.uids == NULL or self.uid_rights == NULL:
            raise MemoryError
        for i, (uid, number) in enumerate(policy.uids.items()):
            self.uids[i] = uid
            self.uid_rights[i] = number
        for i, identity in enumerate(policy.identities):
            self.rights[i].rate = self.rights[i].tokens = identity.rate
            self.rights[i].filled_us = monotonic_us()
            # what cannot be numbered any more cannot be judged
            self.rights[i].verdict[0] = REFUSED
            for pattern in identity.publish:
                if pattern.endswith("*"):
                    self.rights[i].wild = 1
                else:
                    self.topics.add(pattern)

    cdef uint8_t of_peer(self, uint8_t peers, uint8_t otherwise, msg_t *message) noexcept nogil:
        """The number of whoever sent `message`; what proves it comes with the connection, not with the frame.

        Where `peers` says that it does not depend on the peer, `otherwise`.
        """
        cdef const char *text
        cdef uint64_t number = 0
        cdef int i
        if peers == BY_NUMBER:
            return otherwise
        text = msg_gets(message, b"Peer-Address" if peers == BY_UID else b"User-Id")
        if text == NULL:
            return NOBODY
        if peers == BY_UID:
            # host:uid:gid:pid
            while text[0] and text[0] != 58:
                text += 1
            if text[0] == 0:
                return NOBODY
            text += 1
        if not 48 <= text[0] <= 57:
            return NOBODY
        while 48 <= text[0] <= 57 and number <= 0xffffffffu:
            number = number * 10 + (text[0] - 48)
            text += 1
        if peers == BY_USER_ID:
            return <uint8_t>number if text[0] == 0 and 0 < number <= <uint64_t>self.n_rights else NOBODY
        if text[0] != 58:
            return NOBODY
        for i in range(self.n_uids):
            if self.uids[i] == number:
                return self.uid_rights[i]
        return NOBODY

    cdef bint knows_new(self, uint8_t rights) noexcept nogil:
        """Whether an event type never seen before may be one that `rights` allow."""
        return rights != NOBODY and self.rights[rights - 1].wild

    cdef bint may(self, uint8_t rights, uint16_t topic) noexcept nogil:
        cdef uint8_t *verdict
        if rights == NOBODY:
            return False
        verdict = &self.rights[rights - 1].verdict[topic]
        if verdict[0] == 0:
            with gil:
                verdict[0] = self._judge(rights, topic)
        return verdict[0] == ALLOWED

    cdef uint8_t _judge(self, uint8_t rights, uint16_t topic) noexcept:
        try:
            return ALLOWED if self.policy.may_publish(rights, self.topics.name(topic)) else REFUSED
        except BaseException:
            return REFUSED

    cdef uint32_t sieve(self, uint8_t rights, items_t *items, uint32_t skip, uint64_t first) noexcept nogil:
        """Take the scanned events from number `skip` on that `rights` do not cover out of `items`.

        Returns how many; their ranges, numbered from `first`, are in `refused` afterwards.
        """
        cdef uint32_t i = skip, kept = skip, begun
        cdef bint fresh = False
        while i < items.n:
            begun = i
            while i < items.n and not self.may(rights, items.v[i].topic):
                i += 1
            if i > begun:
                with gil:
                    if not fresh:
                        fresh = True
                        self.refused = []
                    self.refused.append((first + begun - skip, first + i - 1 - skip, DENIED))
            if i < items.n:
                items.v[kept] = items.v[i]
                kept += 1
                i += 1
        i = items.n - kept
        items.n = kept
        return i

    cdef bint within_rate(self, uint8_t rights, uint32_t events) noexcept nogil:
        """Whether a frame of so many events may pass now; if so it is charged."""
        cdef rights_t *r
        cdef int64_t now
        if rights == NOBODY or self.rights[rights - 1].rate <= 0:
            return True
        r = &self.rights[rights - 1]
        now = monotonic_us()
        r.tokens = min(r.rate, r.tokens + r.rate * (now - r.filled_us) / 1e6)
        r.filled_us = now
        if r.tokens <= 0:
            return False
        r.tokens -= events
        return True
