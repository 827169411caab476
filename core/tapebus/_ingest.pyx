# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The ingest thread: receives frames without the GIL, answers producers, never stops polling.

libzmq's functions are taken from the library that pyzmq itself loaded, so there is no second copy and
no build dependency; the sockets are made and configured by pyzmq and used here only.
"""

import ctypes
import time

from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec
from posix.unistd cimport read

from tapebus._blocks cimport crc32c_update
from tapebus._ring cimport (
    FRAME, GAP, REJECT, Ring, bell_ring, close_fn, entry_t, mail_t, msg_t, producer_t, tb_add, tb_load, tb_store,
)
from tapebus._scan cimport item_t, items_t, scan_frame
from tapebus._topics cimport MAX_TOPICS

import msgspec
import zmq
from zmq.backend.cython import _zmq

from tapebus import wire
from tapebus._scan import REASONS as SCAN_REASONS

ctypedef int (*init_fn)(msg_t *) noexcept nogil
ctypedef int (*recv_fn)(msg_t *, void *, int) noexcept nogil
ctypedef void *(*data_fn)(msg_t *) noexcept nogil
ctypedef size_t (*size_fn)(msg_t *) noexcept nogil
ctypedef int (*more_fn)(const msg_t *) noexcept nogil
ctypedef const char *(*gets_fn)(const msg_t *, const char *) noexcept nogil
ctypedef int (*send_fn)(void *, const void *, size_t, int) noexcept nogil

cdef struct pollitem_t:
    void *socket
    int fd
    short events
    short revents

ctypedef int (*poll_fn)(pollitem_t *, int, long) noexcept nogil

cdef enum:
    DONTWAIT = 1
    SNDMORE = 2
    POLL_IN = 1
    BURST = 512           # frames taken from one socket before the others get their turn
    MAX_SOCKETS = 64
    MAX_SESSIONS = 65536
    MAX_STRANGERS = 256   # accounts opened by peers that may publish nothing, so that they cannot fill the table
    SAMPLE_US = 100000    # at most one refused frame of a peer is kept as a dead letter in this time

    # the wire, see wire.py
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
    MAX_REPLY = 128       # an acknowledgement with three refused ranges has 99 bytes

    # rights, see security.py
    EVERYTHING = 0
    NOBODY = 255
    ALLOWED = 1
    REFUSED = 2
    BY_NUMBER = 0
    BY_UID = 1
    BY_USER_ID = 2

    STALL_US = 1000000    # a tape that stands still this long makes fire-and-forget frames be shed
    SWEEP_US = 10000000   # how often sessions are looked through for silent ones
    SILENT_US = 60000000  # a producer says something every 3 s
    LIVE_US = 15000000    # and counts as connected for this long
    CREDIT_BYTES = 4 << 20
    LEAST_CREDIT = 64 << 10

_library = ctypes.CDLL(_zmq.__file__)


cdef uintptr_t _address(str name) except 0:
    return ctypes.cast(getattr(_library, name), ctypes.c_void_p).value

cdef init_fn msg_init = <init_fn>_address("zmq_msg_init")
cdef recv_fn msg_recv = <recv_fn>_address("zmq_msg_recv")
cdef data_fn msg_data = <data_fn>_address("zmq_msg_data")
cdef size_fn msg_size = <size_fn>_address("zmq_msg_size")
cdef more_fn msg_more = <more_fn>_address("zmq_msg_more")
cdef close_fn msg_close = <close_fn>_address("zmq_msg_close")
cdef gets_fn msg_gets = <gets_fn>_address("zmq_msg_gets")
cdef send_fn zmq_send = <send_fn>_address("zmq_send")
cdef poll_fn zmq_poll = <poll_fn>_address("zmq_poll")


cdef int64_t now_us() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_REALTIME, &t)
    return <int64_t>t.tv_sec * 1000000 + t.tv_nsec // 1000


cdef int64_t monotonic_us() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <int64_t>t.tv_sec * 1000000 + t.tv_nsec // 1000


cdef inline uint64_t get64(const uint8_t *p) noexcept nogil:
    cdef uint64_t v
    memcpy(&v, p, 8)
    return v


cdef inline uint32_t get32(const uint8_t *p) noexcept nogil:
    cdef uint32_t v
    memcpy(&v, p, 4)
    return v

# What one identity may publish. `verdict` is by topic number: 0 not judged yet, ALLOWED or REFUSED.
# `tokens` are events it may send now; a frame is let through while there is one, and may leave a debt.
cdef struct rights_t:
    uint8_t verdict[MAX_TOPICS]
    uint8_t wild          # has a pattern with a wildcard, so that new event types may be its
    double rate
    double tokens
    int64_t filled_us

# A socket the thread reads. `peers` says how a peer's rights are found; `rights` are everybody's where they
# do not depend on the peer. `prefix` (malloc'ed) turns a bare payload into an event: for JSON the text
# before and after the timestamp, for MessagePack the bytes before it.
cdef struct source_t:
    void *socket
    uint32_t producer
    uint8_t router
    uint8_t wrap
    uint8_t rename
    uint8_t peers
    uint8_t rights
    int64_t sampled_us
    char json[512]
    char pack[512]
    int pack_size

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


cdef class Ingest:
    """Owns its sockets from `run` until `run` returns. Everything else is called before, or with the GIL."""

    cdef:
        Ring ring
        source_t *sources
        session_t *sessions
        int n_sources
        int n_sessions
        int max_sessions
        uint32_t *places               # open addressing by route: session number + 1, 0 = free
        uint32_t places_mask
        uint32_t *session_of           # by producer: session number + 1
        rights_t *rights               # by number - 1
        int n_rights
        uint32_t *uids
        uint8_t *uid_rights
        int n_uids
        int strangers
        object policy                  # security.Rights
        list refused                   # ranges the last sieve took out
        items_t items
        int64_t stopping
        int64_t stop_reading
        int64_t store_full
        int64_t tail_seen
        int64_t tail_seen_us
        int64_t swept_us
        public int64_t silent_us       # a producer that says nothing for so long must introduce itself again
        uint32_t max_frame
        uint32_t max_events
        uint64_t instance
        uint8_t durable
        readonly uint64_t malformed
        readonly uint64_t oversize
        readonly uint64_t shed
        readonly uint64_t batches
        public object samples          # callable(frame: bytes, reason: str), called with the GIL
        dict rejects                   # session producer -> ranges not yet told
        int n_rejects
        dict renames                   # socket index -> {found key: stored key}
        readonly list keep             # pyzmq sockets, kept alive

    def __cinit__(self, Ring ring not None, uint64_t instance, bint durable=True,
                  uint32_t max_frame=256 << 10, uint32_t max_events=4096, int max_sessions=4096):
        self.ring = ring
        ring.msg_close = msg_close
        self.instance = instance
        self.durable = durable
        self.max_frame = max_frame
        self.max_events = max_events
        self.silent_us = SILENT_US
        self.sources = <source_t *>calloc(MAX_SOCKETS, sizeof(source_t))
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
        if self.sources == NULL or self.sessions == NULL or self.places == NULL or self.session_of == NULL:
            raise MemoryError
        self.refused = []
        self.rejects = {}
        self.renames = {}
        self.keep = []

    def __dealloc__(self):
        free(self.sources)
        free(self.sessions)
        free(self.places)
        free(self.session_of)
        free(self.rights)
        free(self.uids)
        free(self.uid_rights)
        free(self.items.v)

    def restrict(self, policy not None):
        """Let only the identities of `policy` (a `security.Rights`) publish, and only what they may; before `add`."""
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
                    self.ring.topics.add(pattern)

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
        s.socket = <void *><uintptr_t>socket.underlying
        s.producer = producer
        s.router = router
        if self.policy is not None:
            s.peers = {"ipc": BY_UID, "curve": BY_USER_ID}.get(peers, BY_NUMBER)
            s.rights = self.policy.loopback if peers == "loopback" else EVERYTHING
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
            s.rename = 1
        self.keep.append(socket)
        self.n_sources += 1

    def set_store_full(self, bint full):
        """Close or open the credit of every producer; called by the tape thread."""
        cdef uint64_t one = 1
        tb_store(&self.store_full, full)
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
                held = not self.ring.has_room(self.max_frame) and not self.stalled()
                legacy_held = not self.has_legacy_room() and not self.stalled()
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
                            self.read_frames(&self.sources[polled[i]])
                self.send_acks()
                self.forget_silent_sessions()
            self.empty_mailbox()
            self.send_acks()
            self.say_goodbye()

    cdef bint has_legacy_room(self) noexcept nogil:
        """Whether a fire-and-forget frame may enter: the last quarter is for producers that number their events."""
        cdef int64_t entries = <int64_t>self.ring.mask // 4
        cdef int64_t size = max(<int64_t>0, min(self.ring.max_bytes // 4, self.ring.max_bytes - 2 * <int64_t>self.max_frame))
        return self.ring.has_room(self.max_frame + size) and (
            self.ring.head - tb_load(&self.ring.tail) <= <int64_t>self.ring.mask - entries)

    cdef bint stalled(self) noexcept nogil:
        """Whether there is no room for fire-and-forget frames and the tape has not moved for a second."""
        cdef int64_t tail = tb_load(&self.ring.tail)
        cdef int64_t now = monotonic_us()
        if self.has_legacy_room() or tail != self.tail_seen or self.tail_seen_us == 0:
            self.tail_seen = tail
            self.tail_seen_us = now
            return False
        return now - self.tail_seen_us > STALL_US

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
                n = scan_frame(self.ring.topics, entry.data, mail.size, &self.items, 0x7fffffff)
                if n > 0 and self.take_items(entry, 0):
                    entry.size = <uint32_t>mail.size
                else:
                    self.malformed += 1
            self.ring.publish(entry)
            tb_add(&self.ring.mail_count, -1)
            free(mail)
            mail = following

    cdef bint take_items(self, entry_t *entry, uint32_t skip) noexcept nogil:
        """Give `entry` the scanned items from number `skip` on."""
        cdef uint32_t n = self.items.n - skip
        if n == 1:
            entry.one = self.items.v[skip]
            entry.items = &entry.one
        else:
            entry.items = <item_t *>malloc(n * sizeof(item_t))
            if entry.items == NULL:
                entry.items = &entry.one
                return False
            memcpy(entry.items, self.items.v + skip, n * sizeof(item_t))
        entry.n = n
        return True

    # -- fire and forget ------------------------------------------------------------------------

    cdef void read_frames(self, source_t *source) noexcept nogil:
        cdef entry_t *entry
        cdef msg_t message
        cdef int i, n
        cdef uint8_t rights
        cdef bint shedding = False
        for i in range(BURST):
            if not self.has_legacy_room():
                # wait for the tape, unless it stands still: a blocked PUSH.send would hang a trading process
                shedding = self.stalled()
                if not shedding:
                    return
            msg_init(&message)
            if msg_recv(&message, source.socket, DONTWAIT) < 0:
                msg_close(&message)
                return
            # a topic part comes before the payload: the last part is the frame
            while msg_more(&message):
                if msg_recv(&message, source.socket, 0) < 0 and errno != EINTR:
                    msg_close(&message)
                    return
            entry = NULL if shedding else self.ring.claim(0)
            if entry == NULL:
                self.count_shed(source, &message)
                msg_close(&message)
                continue
            rights = self.rights_of(source, &message)
            entry.producer = source.producer
            entry.received_us = now_us()
            entry.kind = FRAME
            entry.msg = message
            entry.has_msg = 1
            entry.data = <uint8_t *>msg_data(&entry.msg)
            entry.size = <uint32_t>min(msg_size(&entry.msg), <size_t>0xffffffffu)
            if entry.size > self.max_frame:
                self.oversize += 1
                self.sample(entry.data, entry.size, b"oversize")
                self.ring.release(entry)
                continue
            if source.rename:
                with gil:
                    self._rename(source, entry)
            if rights != EVERYTHING:
                self.ring.topics.closed = not self.knows_new(rights)
            if source.wrap and not self.wrap(source, entry):
                n = -2
            else:
                n = scan_frame(self.ring.topics, entry.data, entry.size, &self.items, self.max_events)
            self.ring.topics.closed = 0
            if n > 0 and rights != EVERYTHING and not self.judge_frame(source, entry, rights):
                continue
            if n > 0 and self.take_items(entry, 0):
                self.ring.publish(entry)
            else:
                self.malformed += 1
                self.sample_scan(entry.data, entry.size, n)
                self.ring.release(entry)

    cdef void count_shed(self, source_t *source, msg_t *message) noexcept nogil:
        """Count the events of a frame there is no room for, as they would have been counted with room."""
        cdef size_t size = msg_size(message)
        cdef uint8_t *data = <uint8_t *>msg_data(message)
        cdef int n
        if size > self.max_frame:
            self.oversize += 1
            return
        n = scan_frame(self.ring.topics, data, size, &self.items, self.max_events)
        if n > 0:
            self.shed += n
        elif source.wrap:
            self.shed += 1
        else:
            self.malformed += 1

    cdef bint wrap(self, source_t *source, entry_t *entry) noexcept nogil:
        """Make an event of a bare payload; a payload that is an event already is left alone."""
        cdef uint8_t *p = entry.data
        cdef uint8_t *end = p + entry.size
        cdef uint8_t *made
        cdef double now = entry.received_us / 1e6
        cdef uint64_t bits
        cdef int size, i
        if scan_frame(self.ring.topics, p, entry.size, &self.items, self.max_events) > 0:
            return True
        if entry.size and (p[0] & 0xf0) == 0x80 or p < end and (p[0] == 0xde or p[0] == 0xdf):
            size = source.pack_size + 8 + 5 + entry.size
            made = <uint8_t *>malloc(size)
            if made == NULL:
                return False
            memcpy(made, source.pack, source.pack_size)
            memcpy(&bits, &now, 8)
            for i in range(8):
                made[source.pack_size + i] = <uint8_t>(bits >> (56 - 8 * i))
            i = source.pack_size + 8
            memcpy(made + i, b"\xa4data", 5)
            memcpy(made + i + 5, p, entry.size)
        else:
            # some publishers put "TOPIC {json}" into one part
            while p < end and p[0] != 123:
                p += 1
            if p == end:
                return False
            made = <uint8_t *>malloc(600 + (end - p))
            if made == NULL:
                return False
            size = snprintf(<char *>made, 590, source.json, now)
            memcpy(made + size, p, end - p)
            size += end - p
            made[size] = 125
            size += 1
        if entry.has_msg:
            msg_close(&entry.msg)
            entry.has_msg = 0
        free(entry.owned)
        entry.owned = made
        entry.data = made
        entry.size = size
        return True

    cdef void _rename(self, source_t *source, entry_t *entry) noexcept:
        """Replace the payload by one with its keys renamed; a payload that is no map is left alone."""
        cdef bytes made
        cdef void *copy
        try:
            raw = PyBytes_FromStringAndSize(<char *>entry.data, entry.size)
            codec = msgspec.msgpack if raw[0] >= 0x80 else msgspec.json
            if codec is msgspec.json:
                raw = raw[raw.index(b"{"):]
            fields = self.renames[source - self.sources]
            found = codec.decode(raw)
            inner = found["data"] if isinstance(found.get("data"), dict) else found
            renamed = {fields.get(key, key): value for key, value in inner.items()}
            if inner is not found:
                renamed = {**found, "data": renamed}
            made = codec.encode(renamed)
            copy = malloc(len(made) + 1)
            if copy == NULL:
                return
            memcpy(copy, PyBytes_AS_STRING(made), len(made))
            if entry.has_msg:
                msg_close(&entry.msg)
                entry.has_msg = 0
            free(entry.owned)
            entry.owned = copy
            entry.data = <uint8_t *>copy
            entry.size = <uint32_t>len(made)
        except BaseException:
            return

    cdef void sample_scan(self, const uint8_t *data, size_t size, int error) noexcept nogil:
        with gil:
            self._sample(data, size, SCAN_REASONS.get(error, "not an event"))

    cdef void sample(self, const uint8_t *data, size_t size, const char *reason) noexcept nogil:
        with gil:
            self._sample(data, size, reason.decode())

    cdef void _sample(self, const uint8_t *data, size_t size, reason) noexcept:
        try:
            if self.samples is not None:
                self.samples(PyBytes_FromStringAndSize(<char *>data, min(size, <size_t>65536)), reason)
        except BaseException:
            self.samples = None

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
                self.malformed += 1
                self.sample(<uint8_t *>msg_data(&message), msg_size(&message), odd)
            elif self.handle(route, &message):
                continue      # the ring owns the message now
            msg_close(&message)

    cdef inline uint32_t home(self, uint64_t route) noexcept nogil:
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

    # -- rights ---------------------------------------------------------------------------------

    cdef uint8_t rights_of(self, source_t *source, msg_t *message) noexcept nogil:
        """The number of whoever sent `message`; what proves it comes with the connection, not with the frame."""
        cdef const char *text
        cdef uint64_t number = 0
        cdef int i
        if source.peers == BY_NUMBER:
            return source.rights
        text = msg_gets(message, b"Peer-Address" if source.peers == BY_UID else b"User-Id")
        if text == NULL:
            return NOBODY
        if source.peers == BY_UID:
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
        if source.peers == BY_USER_ID:
            return <uint8_t>number if text[0] == 0 and 0 < number <= <uint64_t>self.n_rights else NOBODY
        if text[0] != 58:
            return NOBODY
        for i in range(self.n_uids):
            if self.uids[i] == number:
                return self.uid_rights[i]
        return NOBODY

    cdef inline bint knows_new(self, uint8_t rights) noexcept nogil:
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
            return ALLOWED if self.policy.may_publish(rights, self.ring.topics.name(topic)) else REFUSED
        except BaseException:
            return REFUSED

    cdef uint32_t sieve(self, uint8_t rights, uint32_t skip, uint64_t first) noexcept nogil:
        """Take the scanned events from number `skip` on that `rights` do not cover out of the items.

        Returns how many; their ranges, numbered from `first`, are in `refused` afterwards.
        """
        cdef uint32_t i = skip, kept = skip, begun
        cdef bint fresh = False
        while i < self.items.n:
            begun = i
            while i < self.items.n and not self.may(rights, self.items.v[i].topic):
                i += 1
            if i > begun:
                with gil:
                    if not fresh:
                        fresh = True
                        self.refused = []
                    self.refused.append((first + begun - skip, first + i - 1 - skip, DENIED))
            if i < self.items.n:
                self.items.v[kept] = self.items.v[i]
                kept += 1
                i += 1
        i = self.items.n - kept
        self.items.n = kept
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

    cdef bint judge_frame(self, source_t *source, entry_t *entry, uint8_t rights) noexcept nogil:
        """Apply `rights` to the scanned events of an unnumbered frame; False when the entry is dealt with."""
        cdef uint32_t n = self.items.n, denied
        cdef uint8_t code = DENIED
        if self.within_rate(rights, n):
            denied = self.sieve(rights, 0, 1)
        else:
            denied = n
            code = RATE
        if denied == 0:
            return True
        entry.count = denied
        entry.code = code
        self.sample_refused(&source.sampled_us, entry.data, entry.size, rights, code)
        if denied < n:
            return True
        self.ring.release(entry)
        entry.kind = REJECT
        entry.size = 0
        entry.items = &entry.one
        self.ring.publish(entry)
        return False

    cdef void sample_refused(self, int64_t *at, const uint8_t *data, size_t size, uint8_t rights, uint8_t code) noexcept nogil:
        cdef int64_t now = monotonic_us()
        if at[0] and now - at[0] < SAMPLE_US:
            return
        at[0] = now
        with gil:
            who = self.policy.name(rights)
            why = "publishes faster than its rate" if code == RATE else "may not publish one of these event types"
            self._sample(data, size, f"{wire.REASONS[code].removeprefix('ingest.')}: {who} {why}")

    cdef bint handle(self, uint64_t route, msg_t *message) noexcept nogil:
        """Act on one protocol frame; True when the ring took the message over."""
        cdef uint8_t *p = <uint8_t *>msg_data(message)
        cdef size_t size = msg_size(message)
        cdef session_t *session
        cdef producer_t *account
        cdef uint8_t kind
        if size < HEAD:
            self.malformed += 1
            self.sample(p, size, b"shorter than a protocol header")
            return False
        kind = p[0]
        if kind == W_HELLO:
            with gil:
                self._hello(route, p, size, self.rights_of(&self.sources[route >> 32], message))
            return False
        session = self.session_at(route)
        if session == NULL:
            self.nack(route, p, 0, NACK_UNKNOWN)
            return False
        session.seen_us = monotonic_us()
        account = self.ring.producers[session.producer]
        if memcmp(p + 4, account.id, 16) != 0 or get64(p + 20) != account.epoch:
            self.nack(route, p, 0, NACK_UNKNOWN)
            return False
        if kind == W_BATCH and size >= BATCH_HEAD:
            return self.batch(session, account, message, p, size)
        if kind == W_GAP and size >= HEAD + 25:
            self.gap(session, account, p)
        elif kind == W_PING and size >= HEAD + 8:
            self.raise_highest(account, get64(p + HEAD))
            self.reply(route, p, W_PONG, NULL, 0)
        elif kind == W_BYE:
            self.end_session(session)
        else:
            self.nack(route, p, account.accepted + 1, NACK_UNKNOWN)
        return False

    cdef void forget_silent_sessions(self) noexcept nogil:
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
        if count > self.max_events:
            self.malformed += 1
            self.sample(p, size, b"more events than one frame may hold")
            self.nack(session.route, p, account.accepted + 1, NACK_UNKNOWN)
            return False
        self.batches += 1
        self.raise_highest(account, get64(p + HEAD + 16))
        if base > account.accepted + 1 or count == 0 or base == 0:
            self.nack(session.route, p, account.accepted + 1, NACK_SEQUENCE)
            return False
        if base + count - 1 <= account.accepted:
            session.owes_ack = 1
            return False
        if crc32c_update(0, p + BATCH_HEAD, size - BATCH_HEAD) != get32(p + HEAD + 12):
            self.nack(session.route, p, account.accepted + 1, NACK_CRC)
            return False
        skip = <uint32_t>(account.accepted + 1 - base)
        entry = self.ring.claim(size)
        if entry == NULL or (session.rights and not self.within_rate(session.rights, count - skip)):
            # what is too fast is told to wait, not refused: nothing is lost
            self.nack(session.route, p, account.accepted + 1, NACK_BUSY)
            return False
        if session.rights != EVERYTHING:
            self.ring.topics.closed = not self.knows_new(session.rights)
        n = scan_frame(self.ring.topics, p + BATCH_HEAD, size - BATCH_HEAD, &self.items, self.max_events)
        self.ring.topics.closed = 0
        if session.rights != EVERYTHING and n > 0 and <uint32_t>n == count:
            denied = self.sieve(session.rights, skip, account.accepted + 1)
            if denied:
                return self.store_allowed(session, account, message, entry, base + count - 1, denied)
        entry.producer = session.producer
        entry.producer_seq = base + count - 1
        entry.received_us = now_us()
        entry.items = &entry.one
        if n <= 0 or <uint32_t>n != count or not self.take_items(entry, skip):
            entry.kind = REJECT
            entry.code = MALFORMED
            entry.count = count - skip
            self.sample_scan(p + BATCH_HEAD, size - BATCH_HEAD, n)
            with gil:
                self._refuse(session.producer, account.accepted + 1, base + count - 1, MALFORMED)
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
        self.sample_refused(&session.sampled_us, p + BATCH_HEAD, msg_size(message) - BATCH_HEAD, session.rights, DENIED)
        if kept == 0 or not self.take_items(entry, self.items.n - kept):
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
        for first, last, code in self.refused:
            self._refuse(producer, first, last, code)
        if entry.kind == FRAME:
            Py_INCREF(self.refused)
            entry.refused = <PyObject *>self.refused
        self.refused = []

    cdef void gap(self, session_t *session, producer_t *account, uint8_t *p) noexcept nogil:
        cdef uint64_t first = get64(p + HEAD), last = get64(p + HEAD + 8)
        cdef entry_t *entry
        self.raise_highest(account, get64(p + HEAD + 16))
        if not 1 <= p[HEAD + 24] <= N_PLACES:
            self.nack(session.route, p, account.accepted + 1, NACK_UNKNOWN)
            return
        if last <= account.accepted:
            session.owes_ack = 1
            return
        if first > account.accepted + 1 or last < first or last - account.accepted > 0xffffffffu:
            self.nack(session.route, p, account.accepted + 1, NACK_SEQUENCE)
            return
        entry = self.ring.claim(0)
        if entry == NULL:
            self.nack(session.route, p, account.accepted + 1, NACK_BUSY)
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

    cdef void _refuse(self, uint32_t producer, uint64_t first, uint64_t last, int code) noexcept:
        self.rejects.setdefault(producer, []).append((first, last, code))
        self.n_rejects += 1

    cdef void _hello(self, uint64_t route, uint8_t *p, size_t size, uint8_t rights) noexcept:
        cdef session_t *session = NULL
        cdef uint8_t reply[25]
        cdef uint64_t durable
        cdef uint32_t credit, credit_bytes, index
        cdef uint16_t version
        try:
            memcpy(&version, p + 2, 2)
            # epoch 0 marks the accounts of the bus itself
            if version != W_VERSION or size < HEAD + 8 or get64(p + 20) == 0:
                self.nack(route, p, 0, NACK_UNKNOWN)
                return
            source = ""
            if size > HEAD + 8:
                about = msgspec.msgpack.decode(PyBytes_FromStringAndSize(<char *>p + HEAD + 8, size - HEAD - 8))
                source = str(about.get("source", ""))[:100]
            known = (PyBytes_FromStringAndSize(<char *>p + 4, 16), get64(p + 20)) in self.ring.identities
            if not known and rights == NOBODY:
                self.strangers += 1
            if self.strangers > MAX_STRANGERS and not known and rights == NOBODY:
                self.nack(route, p, 0, NACK_BUSY)
                return
            found = self.ring.producer(PyBytes_FromStringAndSize(<char *>p + 4, 16), get64(p + 20), source)
            if found < 0:
                self.nack(route, p, 0, NACK_BUSY)
                return
            index = found
            self.raise_highest(self.ring.producers[index], get64(p + HEAD))
            self.ring.books[found].seen_at = time.time()
            session = self.session_at(route)
            if session != NULL and session.producer != index:
                # one connection carries one producer
                self.end_session(session)
            if self.session_of[index]:
                session = &self.sessions[self.session_of[index] - 1]
                self.lead_nowhere(session.route)
            else:
                if self.n_sessions >= self.max_sessions:
                    self.nack(route, p, 0, NACK_BUSY)
                    return
                session = &self.sessions[self.n_sessions]
                self.n_sessions += 1
                session.sampled_us = 0
            session.route = route
            session.producer = index
            session.rights = rights
            session.seen_us = monotonic_us()
            self.session_of[index] = <uint32_t>(session - self.sessions) + 1
            self.lead_to(route, <uint32_t>(session - self.sessions))
            durable = <uint64_t>tb_load(&self.ring.producers[index].durable)
            session.told_durable = <int64_t>durable
            session.owes_ack = 0
            self.credit_for(&credit, &credit_bytes)
            session.told_credit = credit
            memcpy(reply, &self.instance, 8)
            memcpy(reply + 8, &durable, 8)
            memcpy(reply + 16, &credit, 4)
            memcpy(reply + 20, &credit_bytes, 4)
            reply[24] = self.durable
            self.reply(route, p, W_WELCOME, reply, 25)
        except BaseException:
            self.malformed += 1
            self._sample(p, size, "HELLO without a readable introduction")

    cdef void credit_for(self, uint32_t *events, uint32_t *size) noexcept nogil:
        """What one producer may have in flight: nothing while the store is full, little while it is behind."""
        if tb_load(&self.store_full):
            events[0] = size[0] = 0
        elif self.ring.has_room(self.ring.max_bytes // 2):
            events[0] = 16384
            # what all of them may have on the way together is no more than the ring holds
            size[0] = <uint32_t>max(<int64_t>LEAST_CREDIT, min(<int64_t>CREDIT_BYTES, self.ring.max_bytes // max(1, self.n_sessions)))
        else:
            events[0] = 1024
            size[0] = <uint32_t>min(256 << 10, max(<int64_t>LEAST_CREDIT, self.ring.max_bytes // max(1, self.n_sessions)))

    cdef void reply(self, uint64_t route, const uint8_t *head, uint8_t kind, const uint8_t *body, size_t size) noexcept nogil:
        cdef uint8_t frame[MAX_REPLY]
        cdef uint8_t identity[5]
        cdef uint32_t key = <uint32_t>route
        cdef void *socket = self.sources[route >> 32].socket
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

    cdef void nack(self, uint64_t route, const uint8_t *head, uint64_t expected, uint8_t code) noexcept nogil:
        cdef uint8_t body[9]
        memcpy(body, &expected, 8)
        body[8] = code
        self.reply(route, head, W_NACK, body, 9)

    cdef void head_of(self, session_t *session, uint8_t *head) noexcept nogil:
        cdef producer_t *account = self.ring.producers[session.producer]
        memcpy(head + 4, account.id, 16)
        memcpy(head + 20, &account.epoch, 8)

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

    def connected(self):
        """Indexes of the producers that have said something lately; for figures, a moment old."""
        cdef int64_t now = monotonic_us()
        cdef int i
        return {self.sessions[i].producer for i in range(self.n_sessions) if now - self.sessions[i].seen_us < LIVE_US}

    @property
    def sessions_count(self):
        """How many producers are connected, or were and have not been replaced."""
        return self.n_sessions
