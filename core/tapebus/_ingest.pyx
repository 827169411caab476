# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The ingest thread: receives frames without the GIL, answers producers, never stops polling.

The sockets are made and configured by pyzmq and used here only, through libzmq's own functions.
"""

import time

from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy
from posix.unistd cimport read

from tapebus._blocks cimport crc32c_update
from tapebus._clock cimport monotonic_us, now_us
from tapebus._intake cimport Intake, source_t
from tapebus._libzmq cimport (
    DONTWAIT, POLL_IN, msg_close, msg_data, msg_init, msg_more, msg_recv, msg_size, msg_t, pollitem_t, zmq_poll,
)
from tapebus._push cimport read_frames
from tapebus._rights cimport BY_NUMBER, BY_UID, BY_USER_ID, EVERYTHING, NOBODY
from tapebus._ring cimport FRAME, GAP, REJECT, Ring, entry_t, mail_t, producer_t, tb_add, tb_load, tb_store
from tapebus._scan cimport scan_frame
from tapebus._sessions cimport MAX_SOCKETS, Sessions, session_t
from tapebus._wire cimport (
    BATCH_HEAD, DENIED, HEAD, MALFORMED, NACK_BUSY, NACK_CRC, NACK_SEQUENCE, NACK_UNKNOWN, N_PLACES, W_BATCH, W_BYE,
    W_GAP, W_HELLO, W_PING, W_PONG, W_VERSION, get32, get64,
)

import msgspec

cdef enum:
    BURST = 512           # messages taken from one socket before the others get their turn
    MAX_STRANGERS = 256   # accounts opened by peers that may publish nothing, so that they cannot fill the table


cdef class Ingest:
    """Owns its sockets from `run` until `run` returns. Everything else is called before, or with the GIL."""

    cdef:
        Ring ring
        Intake intake
        Sessions sessions
        source_t *sources
        int n_sources
        int strangers
        int64_t stopping
        int64_t stop_reading
        readonly uint64_t batches
        dict renames                   # socket index -> {found key: stored key}
        readonly list keep             # pyzmq sockets, kept alive

    def __cinit__(self, Ring ring not None, uint64_t instance, bint durable=True,
                  uint32_t max_frame=256 << 10, uint32_t max_events=4096, int max_sessions=4096):
        self.ring = ring
        self.intake = Intake(ring, max_frame, max_events)
        self.sessions = Sessions(ring, instance, durable, max_sessions)
        self.sources = <source_t *>calloc(MAX_SOCKETS, sizeof(source_t))
        if self.sources == NULL:
            raise MemoryError
        self.renames = {}
        self.keep = []

    def __dealloc__(self):
        free(self.sources)

    def restrict(self, policy not None):
        """Let only the identities of `policy` (a `security.Rights`) publish, and only what they may; before `add`."""
        self.intake.rights.restrict(policy)

    def add(self, socket, uint32_t producer=0, bint router=False, str event_type="", str source="", dict fields=None,
            str peers="trusted"):
        """Read `socket` (a bound or connected pyzmq socket); with `event_type`, wrap its bare payloads.

        `fields` renames keys of the payload; only then does the frame pass through Python. `peers` says
        how those who send are known (`security.Peers`); without `restrict` everybody may do everything.
        """
        cdef source_t *s
        cdef bytes text
        if self.n_sources >= MAX_SOCKETS:
            raise ValueError(f"at most {MAX_SOCKETS} sockets can be read")
        s = &self.sources[self.n_sources]
        s.socket = self.sessions.sockets[self.n_sources] = <void *><uintptr_t>socket.underlying
        s.producer = producer
        s.router = router
        if self.intake.rights.policy is not None:
            s.peers = {"ipc": BY_UID, "curve": BY_USER_ID}.get(peers, BY_NUMBER)
            s.rights = self.intake.rights.policy.loopback if peers == "loopback" else EVERYTHING
        if event_type:
            text = b'{"event_type":%b,"source":%b,"timestamp":%%.6f,"data":' % (
                msgspec.json.encode(event_type).replace(b"%", b"%%"),
                msgspec.json.encode(source).replace(b"%", b"%%"),
            )
            if len(text) >= 480:
                raise ValueError("source and topic are too long")
            memcpy(s.json, PyBytes_AS_STRING(text), len(text) + 1)
            text = msgspec.msgpack.encode({"event_type": event_type, "source": source, "timestamp": 0.5})
            text = b"\x84" + text[1:len(text) - 8]
            memcpy(s.pack, PyBytes_AS_STRING(text), len(text))
            s.pack_size = len(text)
            s.wrap = 1
        if fields:
            self.renames[self.n_sources] = fields
            s.fields = <PyObject *>fields
        self.keep.append(socket)
        self.n_sources += 1

    def set_store_full(self, bint full):
        """Close or open the credit of every producer; called by the tape thread."""
        tb_store(&self.sessions.store_full, full)
        self.ring.acknowledge([])

    def stop_reading_events(self):
        """Read no further events, but go on acknowledging what was read: the first half of a stop."""
        tb_store(&self.stop_reading, 1)
        self.ring.acknowledge([])

    def stop(self):
        """Say goodbye to all producers and let `run` return."""
        tb_store(&self.stopping, 1)
        self.ring.acknowledge([])

    @property
    def mail_waiting(self):
        return tb_load(&self.ring.mail_count)

    @property
    def malformed(self):
        return self.intake.malformed

    @property
    def oversize(self):
        return self.intake.oversize

    @property
    def shed(self):
        return self.intake.shed

    @property
    def samples(self):
        """What is called with each sample of a refused frame and the reason, on the ingest thread; or None."""
        return self.intake.samples

    @samples.setter
    def samples(self, taker):
        self.intake.samples = taker

    @property
    def silent_us(self):
        """A producer that says nothing for so long must introduce itself again."""
        return self.sessions.silent_us

    @silent_us.setter
    def silent_us(self, int64_t value):
        self.sessions.silent_us = value

    @property
    def sessions_count(self):
        """How many producers are connected, or were and have not been replaced."""
        return self.sessions.n_sessions

    def connected(self):
        """Indexes of the producers that have said something lately; for figures, a moment old."""
        return self.sessions.connected()

    # -- the loop -------------------------------------------------------------------------------

    def run(self):
        """Receive until `stop`. Returns only then; no exception leaves the loop for a producer's mistake."""
        cdef pollitem_t polls[MAX_SOCKETS + 1]
        cdef int polled[MAX_SOCKETS + 1]
        cdef int i, n
        cdef long timeout
        cdef uint64_t count
        cdef bint held = False, legacy_held = False
        with nogil:
            while not tb_load(&self.stopping):
                polls[0].socket = NULL
                polls[0].fd = self.ring.ingest_bell.fd
                polls[0].events = POLL_IN
                polls[0].revents = 0
                n = 1
                held = not self.ring.has_room(self.intake.max_frame) and not self.intake.stalled()
                legacy_held = not self.intake.has_legacy_room() and not self.intake.stalled()
                if not tb_load(&self.stop_reading):
                    for i in range(self.n_sources):
                        if held if self.sources[i].router else legacy_held:
                            continue
                        polls[n].socket = self.sources[i].socket
                        polls[n].fd = 0
                        polls[n].events = POLL_IN
                        polls[n].revents = 0
                        polled[n] = i
                        n += 1
                # a full ring empties within a commit; a tape that stands still is noticed by the timeout
                timeout = 2 if legacy_held else -1
                if zmq_poll(polls, n, timeout) < 0 and errno != EINTR:
                    break
                if polls[0].revents:
                    read(self.ring.ingest_bell.fd, &count, 8)
                self.empty_mailbox()
                for i in range(1, n):
                    if polls[i].revents & POLL_IN:
                        if self.sources[polled[i]].router:
                            self.read_router(polled[i])
                        else:
                            read_frames(self.intake, &self.sources[polled[i]])
                self.sessions.send_acks()
                self.sessions.forget_silent()
            self.empty_mailbox()
            self.sessions.send_acks()
            self.sessions.say_goodbye()

    cdef void empty_mailbox(self) noexcept nogil:
        cdef mail_t *mail
        cdef mail_t *following
        cdef entry_t *entry
        cdef entry_t spare
        cdef int n
        if tb_load(&self.ring.mail_count) == 0:
            return
        mail = self.ring.take_mail()
        while mail != NULL:
            following = mail.next
            entry = self.ring.claim(0)
            while entry == NULL:
                # derived events may not be shed: wait for the tape, which owns the next move
                zmq_poll(NULL, 0, 1)
                entry = self.ring.claim(0)
            entry.owned = mail.data
            entry.data = <uint8_t *>mail.data
            entry.unit = mail.unit
            entry.producer = mail.producer
            entry.received_us = now_us()
            entry.kind = FRAME
            entry.items = &entry.one
            if mail.size:
                n = scan_frame(self.ring.topics, entry.data, mail.size, &self.intake.items, 0x7fffffff)
                if n > 0 and self.intake.take_items(entry, 0):
                    entry.size = <uint32_t>mail.size
                else:
                    self.intake.malformed += 1
            self.ring.publish(entry)
            tb_add(&self.ring.mail_count, -1)
            free(mail)
            mail = following

    # -- acknowledged ---------------------------------------------------------------------------

    cdef void read_router(self, int index) noexcept nogil:
        cdef source_t *source = &self.sources[index]
        cdef msg_t identity, message
        cdef int i
        cdef bint more
        cdef uint64_t route
        cdef const char *odd
        for i in range(BURST):
            msg_init(&identity)
            if msg_recv(&identity, source.socket, DONTWAIT) < 0:
                msg_close(&identity)
                return
            route = 0
            odd = b"the connection has a routing id of its own"
            if msg_size(&identity) == 5 and (<uint8_t *>msg_data(&identity))[0] == 0:
                route = (<uint64_t>index << 32) | get32(<uint8_t *>msg_data(&identity) + 1)
            more = msg_more(&identity)
            msg_close(&identity)
            msg_init(&message)
            if more:
                msg_recv(&message, source.socket, 0)
                if msg_more(&message):
                    # one frame per message, so that MAXMSGSIZE bounds it: the rest is somebody else's protocol
                    while msg_more(&message) and msg_recv(&message, source.socket, 0) >= 0:
                        pass
                    route = 0
                    odd = b"a message of several parts"
            if route == 0:
                self.intake.malformed += 1
                self.intake.sample(<uint8_t *>msg_data(&message), msg_size(&message), odd)
            elif self.handle(route, &message):
                continue      # the ring owns the message now
            msg_close(&message)

    cdef bint handle(self, uint64_t route, msg_t *message) noexcept nogil:
        """Act on one protocol frame; True when the ring took the message over."""
        cdef uint8_t *p = <uint8_t *>msg_data(message)
        cdef size_t size = msg_size(message)
        cdef session_t *session
        cdef producer_t *account
        cdef source_t *source
        cdef uint8_t kind
        if size < HEAD:
            self.intake.malformed += 1
            self.intake.sample(p, size, b"shorter than a protocol header")
            return False
        kind = p[0]
        if kind == W_HELLO:
            with gil:
                source = &self.sources[route >> 32]
                self._hello(route, p, size, self.intake.rights.of_peer(source.peers, source.rights, message))
            return False
        session = self.sessions.session_at(route)
        if session == NULL:
            self.sessions.nack(route, p, 0, NACK_UNKNOWN)
            return False
        session.seen_us = monotonic_us()
        account = self.ring.producers[session.producer]
        if memcmp(p + 4, account.id, 16) != 0 or get64(p + 20) != account.epoch:
            self.sessions.nack(route, p, 0, NACK_UNKNOWN)
            return False
        if kind == W_BATCH and size >= BATCH_HEAD:
            return self.batch(session, account, message, p, size)
        if kind == W_GAP and size >= HEAD + 25:
            self.gap(session, account, p)
        elif kind == W_PING and size >= HEAD + 8:
            self.raise_highest(account, get64(p + HEAD))
            self.sessions.reply(route, p, W_PONG, NULL, 0)
        elif kind == W_BYE:
            self.sessions.end_session(session)
        else:
            self.sessions.nack(route, p, account.accepted + 1, NACK_UNKNOWN)
        return False

    cdef void raise_highest(self, producer_t *account, uint64_t highest) noexcept nogil:
        if <int64_t>highest > tb_load(&account.highest):
            tb_store(&account.highest, <int64_t>highest)

    cdef bint batch(self, session_t *session, producer_t *account, msg_t *message, uint8_t *p, size_t size) noexcept nogil:
        cdef uint64_t base = get64(p + HEAD)
        cdef uint32_t count = get32(p + HEAD + 8)
        cdef uint32_t skip, denied = 0
        cdef entry_t *entry
        cdef int n
        if tb_load(&self.stop_reading):
            return False
        if count > self.intake.max_events:
            self.intake.malformed += 1
            self.intake.sample(p, size, b"more events than one frame may hold")
            self.sessions.nack(session.route, p, account.accepted + 1, NACK_UNKNOWN)
            return False
        self.batches += 1
        self.raise_highest(account, get64(p + HEAD + 16))
        if base > account.accepted + 1 or count == 0 or base == 0:
            self.sessions.nack(session.route, p, account.accepted + 1, NACK_SEQUENCE)
            return False
        if base + count - 1 <= account.accepted:
            session.owes_ack = 1
            return False
        if crc32c_update(0, p + BATCH_HEAD, size - BATCH_HEAD) != get32(p + HEAD + 12):
            self.sessions.nack(session.route, p, account.accepted + 1, NACK_CRC)
            return False
        skip = <uint32_t>(account.accepted + 1 - base)
        entry = self.ring.claim(size)
        if entry == NULL or (session.rights and not self.intake.rights.within_rate(session.rights, count - skip)):
            # what is too fast is told to wait, not refused: nothing is lost
            self.sessions.nack(session.route, p, account.accepted + 1, NACK_BUSY)
            return False
        n = self.intake.scan(p + BATCH_HEAD, size - BATCH_HEAD, session.rights)
        if session.rights != EVERYTHING and n > 0 and <uint32_t>n == count:
            denied = self.intake.rights.sieve(session.rights, &self.intake.items, skip, account.accepted + 1)
            if denied:
                return self.store_allowed(session, account, message, entry, base + count - 1, denied)
        entry.producer = session.producer
        entry.producer_seq = base + count - 1
        entry.received_us = now_us()
        entry.items = &entry.one
        if n <= 0 or <uint32_t>n != count or not self.intake.take_items(entry, skip):
            entry.kind = REJECT
            entry.code = MALFORMED
            entry.count = count - skip
            self.intake.sample_scan(p + BATCH_HEAD, size - BATCH_HEAD, n)
            with gil:
                self.sessions._refuse(session.producer, account.accepted + 1, base + count - 1, MALFORMED)
            account.accepted = entry.producer_seq
            self.ring.publish(entry)
            return False
        entry.kind = FRAME
        entry.msg = message[0]
        entry.has_msg = 1
        entry.data = <uint8_t *>msg_data(&entry.msg) + BATCH_HEAD
        entry.size = <uint32_t>size
        account.accepted = entry.producer_seq
        self.ring.publish(entry)
        return True

    cdef bint store_allowed(self, session_t *session, producer_t *account, msg_t *message, entry_t *entry, uint64_t last,
                            uint32_t denied) noexcept nogil:
        """Enter a batch some of whose events the sieve has taken out; the rest is stored as usual."""
        cdef uint8_t *p = <uint8_t *>msg_data(message)
        cdef uint32_t kept = <uint32_t>(last - account.accepted) - denied
        entry.producer = session.producer
        entry.producer_seq = last
        entry.received_us = now_us()
        entry.items = &entry.one
        entry.count = denied
        entry.code = DENIED
        entry.kind = FRAME
        self.intake.sample_refused(&session.sampled_us, p + BATCH_HEAD, msg_size(message) - BATCH_HEAD, session.rights, DENIED)
        if kept == 0 or not self.intake.take_items(entry, self.intake.items.n - kept):
            entry.kind = REJECT
            entry.count = <uint32_t>(last - account.accepted)
        with gil:
            self._refuse_ranges(session.producer, entry)
        account.accepted = last
        if entry.kind == FRAME:
            entry.msg = message[0]
            entry.has_msg = 1
            entry.data = <uint8_t *>msg_data(&entry.msg) + BATCH_HEAD
            entry.size = <uint32_t>msg_size(&entry.msg)
        self.ring.publish(entry)
        return entry.kind == FRAME

    cdef void _refuse_ranges(self, uint32_t producer, entry_t *entry) noexcept:
        for first, last, code in self.intake.rights.refused:
            self.sessions._refuse(producer, first, last, code)
        if entry.kind == FRAME:
            Py_INCREF(self.intake.rights.refused)
            entry.refused = <PyObject *>self.intake.rights.refused
        self.intake.rights.refused = []

    cdef void gap(self, session_t *session, producer_t *account, uint8_t *p) noexcept nogil:
        cdef uint64_t first = get64(p + HEAD), last = get64(p + HEAD + 8)
        cdef entry_t *entry
        self.raise_highest(account, get64(p + HEAD + 16))
        if not 1 <= p[HEAD + 24] <= N_PLACES:
            self.sessions.nack(session.route, p, account.accepted + 1, NACK_UNKNOWN)
            return
        if last <= account.accepted:
            session.owes_ack = 1
            return
        if first > account.accepted + 1 or last < first or last - account.accepted > 0xffffffffu:
            self.sessions.nack(session.route, p, account.accepted + 1, NACK_SEQUENCE)
            return
        entry = self.ring.claim(0)
        if entry == NULL:
            self.sessions.nack(session.route, p, account.accepted + 1, NACK_BUSY)
            return
        entry.kind = GAP
        entry.code = p[HEAD + 24]
        entry.count = <uint32_t>(last - account.accepted)
        entry.producer = session.producer
        entry.producer_seq = last
        entry.received_us = now_us()
        entry.items = &entry.one
        account.accepted = last
        self.ring.publish(entry)

    cdef void _hello(self, uint64_t route, uint8_t *p, size_t size, uint8_t rights) noexcept:
        cdef session_t *session
        cdef uint32_t index
        cdef uint16_t version
        try:
            memcpy(&version, p + 2, 2)
            # epoch 0 marks the accounts of the bus itself
            if version != W_VERSION or size < HEAD + 8 or get64(p + 20) == 0:
                self.sessions.nack(route, p, 0, NACK_UNKNOWN)
                return
            source = ""
            if size > HEAD + 8:
                about = msgspec.msgpack.decode(PyBytes_FromStringAndSize(<char *>p + HEAD + 8, size - HEAD - 8))
                source = str(about.get("source", ""))[:100]
            known = (PyBytes_FromStringAndSize(<char *>p + 4, 16), get64(p + 20)) in self.ring.identities
            if not known and rights == NOBODY:
                self.strangers += 1
            if self.strangers > MAX_STRANGERS and not known and rights == NOBODY:
                self.sessions.nack(route, p, 0, NACK_BUSY)
                return
            found = self.ring.producer(PyBytes_FromStringAndSize(<char *>p + 4, 16), get64(p + 20), source)
            if found < 0:
                self.sessions.nack(route, p, 0, NACK_BUSY)
                return
            index = found
            self.raise_highest(self.ring.producers[index], get64(p + HEAD))
            self.ring.books[found].seen_at = time.time()
            session = self.sessions._begin(route, index, rights)
            if session == NULL:
                self.sessions.nack(route, p, 0, NACK_BUSY)
                return
            self.sessions.welcome(session, p)
        except BaseException:
            self.intake.malformed += 1
            self.intake._sample(p, size, "HELLO without a readable introduction")
