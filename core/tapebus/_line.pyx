# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The hot half of the sender thread: batches out, acknowledgements in, and the sleep between them.

Nothing but the sleep releases the GIL, for the reason given in `_outbox`. libzmq's functions are taken from the
library that pyzmq itself loaded; the sockets are made and configured by pyzmq.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcmp, memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport read

from tapebus._blocks cimport crc32c_update
from tapebus._libzmq cimport (
    DONTWAIT, POLL_IN, msg_close, msg_data, msg_init, msg_init_size, msg_more, msg_recv, msg_send, msg_size, msg_t,
    zmq_getsockopt, zmq_send,
)
from tapebus._outbox cimport ARRAY_HEADER, Outbox, entry_t
from tapebus._wire cimport BATCH_HEAD, HEAD, W_ACK, W_BATCH, W_GAP, W_PONG

import zmq

from tapebus import wire
from tapebus.failpoints import failpoint

cdef extern from *:
    """
    #include <poll.h>
    #include <time.h>
    /* Linux waits to the microsecond; elsewhere a wait is rounded up to milliseconds. */
    static int wait_for(struct pollfd *fds, int n, double seconds) {
    #ifdef __linux__
        struct timespec left = { (time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9) };
        return ppoll(fds, n, &left, NULL);
    #else
        return poll(fds, n, (int)(seconds * 1000) + 1);
    #endif
    }
    """
    cdef struct pollfd:
        int fd
        short events
        short revents
    enum:
        POLLIN
    int wait_for(pollfd *fds, int n, double seconds) noexcept nogil

cdef enum:
    ZMQ_EVENTS = 15
    BELL = 0             # places in `polls`
    SOCKET = 1
    MONITOR = 2
    ACK_SIZE = 48        # without refused ranges

cdef double LEAST_WAIT_S = 0.001  # what the answer to something in flight is waited for in one go
cdef uint64_t NEVER = 0xFFFFFFFFFFFFFFFF
cdef uint64_t MAX_EVENTS = wire.MAX_BATCH_EVENTS
cdef uint64_t MAX_BODY = wire.MAX_FRAME - BATCH_HEAD


cdef inline double monotonic() noexcept:
    cdef timespec spec
    clock_gettime(CLOCK_MONOTONIC, &spec)
    return spec.tv_sec + spec.tv_nsec * 1e-9


cdef class Line:
    """One connection at a time between `outbox` and the bus; for the sender thread but where noted.

    Sends when the bus is `open`: at once when nothing is on its way, else after `batch_size` events, `batch_s`
    seconds, or the answer to what is; and less than a batch only `linger_s` after the last frame, so that publish()
    need not ring meanwhile. Times are seconds of `time.monotonic`.
    """

    cdef:
        Outbox outbox
        object kept              # the sockets of pyzmq behind the pointers
        void *socket
        void *monitor
        pollfd polls[3]
        uint8_t head[HEAD]       # what every frame of this producer begins with, but for its type
        uint64_t batch_size
        double batch_s
        double linger_s
        uint64_t credit_events
        uint64_t credit_bytes
        bint is_full             # the last frame could not be sent: the socket says when it can
        readonly bint open
        public bint progressed   # something was acknowledged since this was last set to False
        public bint called       # set by any thread before it rings: `carry` is to return
        public int flushing      # set by any thread: how many wait for acknowledgements
        public double not_before # nothing is sent earlier
        public double sent_at
        public double heard_at
        public double progress_at

    def __cinit__(self, Outbox outbox not None, int bell, uint64_t batch_size, double batch_s, double linger_s=0.0):
        self.outbox, self.batch_size, self.batch_s, self.linger_s = outbox, batch_size, batch_s, linger_s
        self.polls[BELL].fd = bell
        self.polls[BELL].events = self.polls[SOCKET].events = self.polls[MONITOR].events = POLLIN

    def attach(self, sock, monitor, bytes producer_id not None, uint64_t epoch):
        """Begin with a fresh socket, closed for events until `set_credit`."""
        self.kept = sock, monitor
        self.socket, self.monitor = <void *><uintptr_t>sock.underlying, <void *><uintptr_t>monitor.underlying
        self.polls[MONITOR].revents = POLLIN
        self.polls[SOCKET].fd, self.polls[MONITOR].fd = sock.getsockopt(zmq.FD), monitor.getsockopt(zmq.FD)
        head = wire.HEAD.pack(0, 0, wire.VERSION, producer_id, epoch)
        memcpy(self.head, PyBytes_AS_STRING(head), HEAD)
        self.sent_at = self.heard_at = self.progress_at = monotonic()

    def detach(self):
        """Let go of the sockets."""
        self.kept, self.socket, self.monitor = None, NULL, NULL
        self.open = self.is_full = False

    def set_credit(self, uint64_t events, uint64_t size):
        """Send no more than so many events and bytes ahead of what is acknowledged."""
        self.credit_events, self.credit_bytes, self.open = events, size, True

    @property
    def credit(self):
        """``(events, bytes)`` that may be on their way at once."""
        return self.credit_events, self.credit_bytes

    @property
    def in_flight(self):
        """Whether something is sent and not acknowledged."""
        return self.outbox.first() <= self.outbox.sent

    def say(self, uint8_t kind, bytes rest not None=b""):
        """Send one frame that is no batch; ``False`` when there is no room for it."""
        return self.speak(kind, <uint8_t *>PyBytes_AS_STRING(rest), PyBytes_GET_SIZE(rest))

    cdef bint speak(self, uint8_t kind, const uint8_t *rest, size_t size) except -1:
        cdef bytes frame = PyBytes_FromStringAndSize(<char *>self.head, HEAD) + PyBytes_FromStringAndSize(<char *>rest, size)
        PyBytes_AS_STRING(frame)[0] = kind
        if zmq_send(self.socket, PyBytes_AS_STRING(frame), HEAD + size, DONTWAIT) < 0:
            return False
        self.sent_at = monotonic()
        return True

    def carry(self, double seconds, bint once=False):
        """Send and receive for at most `seconds`, or until `called`.

        Returns a frame that is more than a plain acknowledgement, ``False`` when the connection is lost, else
        ``None``: also when something was acknowledged while others wait for that, and, with `once`, after
        any sleep.
        """
        cdef double until = monotonic() + seconds, wait
        cdef bytes frame
        cdef bint look = True
        cdef pollfd *polls = self.polls
        cdef char rings[64]
        while True:
            # libzmq tells of a frame once, and sending may use that up: so look again after each.
            while True:
                frame = self.receive() if look else None
                if frame is not None:
                    return frame
                look = self.pump()
                if not look:
                    break
            if polls[MONITOR].revents and self.is_lost():
                return False
            if self.called or (self.flushing and self.progressed):
                self.called = False
                return None
            wait = self.arm(until)
            if wait <= 0:
                return None
            polls[BELL].revents = polls[SOCKET].revents = polls[MONITOR].revents = 0
            with nogil:
                wait_for(polls, 3, wait)
            self.outbox.wake_at = NEVER
            look = polls[SOCKET].revents != 0
            if polls[BELL].revents:
                read(polls[BELL].fd, rings, sizeof(rings))
            if once:
                return None

    cdef bint is_lost(self) noexcept:
        cdef int events = 0
        cdef size_t size = sizeof(events)
        return zmq_getsockopt(self.monitor, ZMQ_EVENTS, &events, &size) == 0 and events & POLL_IN

    cdef double arm(self, double until) noexcept:
        """Tells publish() from which number on to ring the bell, and returns how long to wait for it."""
        cdef Outbox box = self.outbox
        cdef double now = monotonic(), wait = until - now, left
        if not self.open or self.is_full:
            return wait
        if now < self.not_before:
            return min(wait, self.not_before - now)
        if box.first() <= box.sent or now < self.sent_at + self.linger_s:
            if box.flying < self.credit_events and box.flying_bytes < self.credit_bytes:
                box.wake_at = min(box.wake_at, box.sent + self.batch_size)
                left = self.held_until() - now
                wait = min(wait, max(left if left > 0 else self.batch_s, LEAST_WAIT_S))
        elif self.credit_events:
            box.wake_at = min(box.wake_at, box.sent + 1)
        return wait

    # -- out

    cdef inline double held_until(self) noexcept:
        """When less than a batch may leave."""
        cdef bint waits = self.outbox.first() <= self.outbox.sent
        return self.sent_at + (max(self.batch_s, self.linger_s) if waits else self.linger_s)

    cdef bint pump(self) except -1:
        """Sends what batching and credit allow; whether anything was sent."""
        cdef Outbox box = self.outbox
        cdef double now = monotonic()
        cdef uint64_t first = box.sent, index
        self.is_full = False
        if not self.open or now < self.not_before:
            return False
        while box.sent + 1 < box.next_seq:
            if box.next_seq - 1 - box.sent < self.batch_size and not self.flushing and now < self.held_until():
                break
            index = box.find(box.sent + 1)
            if index == box.head or not (self.tell_gap(index) if box.at(index).place else self.send_batch(index)):
                break
        return box.sent != first

    cdef bint tell_gap(self, uint64_t index) except -1:
        cdef Outbox box = self.outbox
        cdef entry_t *entry = box.at(index)
        cdef uint64_t numbers[4]
        cdef uint64_t last = entry.last
        numbers[0], numbers[1], numbers[2], numbers[3] = box.sent + 1, last, box.next_seq - 1, entry.place
        self.is_full = not self.speak(W_GAP, <uint8_t *>numbers, 25)
        if not self.is_full:
            self.note_sent(last, 0, 0)
        return not self.is_full

    cdef bint send_batch(self, uint64_t index) except -1:
        cdef Outbox box = self.outbox
        cdef uint64_t base = box.sent + 1, room = 0, size
        cdef uint32_t n, crc
        cdef uint8_t *out
        cdef msg_t message
        if box.flying >= self.credit_events or box.flying_bytes >= self.credit_bytes:
            return False
        room = self.credit_bytes - box.flying_bytes
        if box.first() > box.sent:
            # An event larger than the credit must still be able to leave, alone.
            room = max(room, <uint64_t>ARRAY_HEADER + box.at(index).size)
        n = box.measure(index, min(MAX_EVENTS, self.credit_events - box.flying), min(MAX_BODY, room), &size)
        if n == 0 or msg_init_size(&message, BATCH_HEAD + size) != 0:
            return False
        out = <uint8_t *>msg_data(&message)
        box.copy(index, n, out + BATCH_HEAD)
        crc = crc32c_update(0, out + BATCH_HEAD, size)
        memcpy(out, self.head, HEAD)
        out[0] = W_BATCH
        memcpy(out + HEAD, &base, 8)
        memcpy(out + HEAD + 8, &n, 4)
        memcpy(out + HEAD + 12, &crc, 4)
        base = box.next_seq - 1
        memcpy(out + HEAD + 16, &base, 8)
        base = box.sent + n
        failpoint("sender.before_send")
        if msg_send(&message, self.socket, DONTWAIT) < 0:
            self.is_full = True
            msg_close(&message)
            return False
        failpoint("sender.after_send")
        self.sent_at = monotonic()
        self.note_sent(base, n, size - ARRAY_HEADER)
        return True

    cdef void note_sent(self, uint64_t last, uint64_t events, uint64_t size) noexcept:
        if self.outbox.first() > self.outbox.sent:
            self.progress_at = self.sent_at
        self.outbox.note_sent(last, events, size)

    # -- in

    cdef bytes receive(self):
        """Handles what has come, up to the first frame that is not for here."""
        cdef msg_t message
        cdef bytes frame = None
        cdef uint8_t *p
        cdef size_t size
        while frame is None:
            msg_init(&message)
            if msg_recv(&message, self.socket, DONTWAIT) < 0:
                msg_close(&message)
                return None
            p, size = <uint8_t *>msg_data(&message), msg_size(&message)
            if not msg_more(&message) and size >= HEAD and memcmp(p + 2, self.head + 2, HEAD - 2) == 0:
                self.heard_at = monotonic()
                if not (p[0] == W_PONG or (p[0] == W_ACK and self.acknowledged(p, size))):
                    frame = PyBytes_FromStringAndSize(<char *>p, size)
            msg_close(&message)
        return frame

    cdef bint acknowledged(self, uint8_t *p, size_t size) except -1:
        """Takes note of an acknowledgement; ``False`` when it is not plain."""
        cdef Outbox box = self.outbox
        cdef uint64_t durable
        cdef uint32_t events, room, refused
        if size < ACK_SIZE:
            return False
        memcpy(&durable, p + HEAD, 8)
        memcpy(&events, p + HEAD + 8, 4)
        memcpy(&room, p + HEAD + 12, 4)
        memcpy(&refused, p + HEAD + 16, 4)
        failpoint("sender.on_ack")
        if refused:
            return False
        self.set_credit(events, room)
        if box.first() <= durable and box.first() < box.next_seq:
            box.ack(durable)
            self.progress_at = self.heard_at
            self.progressed = True
        failpoint("sender.after_ack")
        return True
