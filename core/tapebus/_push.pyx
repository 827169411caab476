# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Fire and forget: frames that come without numbers and get no reply."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from tapebus._clock cimport now_us
from tapebus._libzmq cimport (
    DONTWAIT, RCVHWM, msg_close, msg_data, msg_init, msg_more, msg_recv, msg_size, msg_t, zmq_setsockopt,
)
from tapebus._ring cimport FRAME, REJECT, entry_t
from tapebus._rights cimport BY_NUMBER, EVERYTHING
from tapebus._scan cimport ERR_SYNTAX
from tapebus._wire cimport DENIED, RATE

import msgspec

cdef enum:
    BURST = 512           # frames taken from one socket before the others get their turn
    LARGE = 64 << 10      # 256 frames of this size have as many bytes as 64 of the largest
    NARROW = 64           # messages of a connection that libzmq holds for a socket which large frames come through


# A frame between the socket and the ring. `msg` is initialised and used again and again; `data` points into it, or
# into `owned` (malloc'ed) when the frame had to be made anew.
cdef struct frame_t:
    msg_t msg
    uint8_t *data
    void *owned
    uint32_t size
    int64_t received_us


cdef void read_frames(Intake intake, source_t *source) noexcept nogil:
    """Take what `source` has, at most a burst; small frames that come together share an entry of the ring."""
    cdef frame_t frame
    cdef int i
    cdef bint shedding = False
    frame.owned = NULL
    msg_init(&frame.msg)
    for i in range(BURST):
        if not intake.has_legacy_room():
            # wait for the tape, unless it stands still: a blocked PUSH.send would hang a trading process
            shedding = intake.stalled()
            if not shedding:
                break
        if intake.gathered == 0:
            frame.received_us = now_us()
        if not receive(source.socket, &frame.msg):
            break
        if shedding:
            count_shed(intake, source, &frame.msg)
        else:
            take(intake, source, &frame)
            free(frame.owned)
            frame.owned = NULL
    intake.publish_gathered(source.producer)
    msg_close(&frame.msg)


cdef inline bint receive(void *socket, msg_t *message) noexcept nogil:
    """Receive one frame, if there is one; what `message` held before is closed."""
    if msg_recv(message, socket, DONTWAIT) < 0:
        return False
    # a topic part comes before the payload: the last part is the frame
    while msg_more(message):
        if msg_recv(message, socket, 0) < 0 and errno != EINTR:
            return False
    return True


cdef inline void take(Intake intake, source_t *source, frame_t *frame) noexcept nogil:
    """Enter the events of one frame into the ring."""
    cdef uint8_t rights = source.rights
    cdef size_t size = msg_size(&frame.msg)
    cdef int n
    frame.data = <uint8_t *>msg_data(&frame.msg)
    if size > LARGE:
        narrow(source)
    if size > intake.max_frame:
        intake.oversize += 1
        intake.sample(frame.data, size, b"oversize")
        return
    frame.size = <uint32_t>size
    if source.peers != BY_NUMBER:
        rights = intake.rights.of_peer(source.peers, rights, &frame.msg)
    if source.fields != NULL:
        with gil:
            rename(source, frame)
    if source.wrap and not wrap(intake, source, frame, rights):
        n = ERR_SYNTAX
    else:
        n = intake.scan(frame.data, frame.size, rights)
    if n <= 0:
        intake.malformed += 1
        intake.sample_scan(frame.data, frame.size, n)
    elif rights != EVERYTHING or not intake.gather(source.producer, frame.data, frame.size, frame.received_us):
        enter(intake, source, frame, rights)


cdef void enter(Intake intake, source_t *source, frame_t *frame, uint8_t rights) noexcept nogil:
    """Give a frame that is large, or has to be judged, an entry of its own."""
    cdef entry_t *entry
    intake.publish_gathered(source.producer)
    entry = intake.ring.claim(0)
    if entry == NULL:
        intake.shed += intake.items.n
        return
    entry.producer = source.producer
    entry.received_us = frame.received_us
    entry.kind = FRAME
    entry.items = &entry.one
    if rights != EVERYTHING and not judge_frame(intake, source, frame, entry, rights):
        entry.kind = REJECT
        intake.ring.publish(entry)
        return
    if not intake.take_items(entry, 0):
        intake.shed += intake.items.n
        return
    if frame.owned != NULL:
        entry.owned = frame.owned
        entry.data = frame.data
        frame.owned = NULL
    else:
        entry.msg = frame.msg
        entry.has_msg = 1
        entry.data = <uint8_t *>msg_data(&entry.msg)
        msg_init(&frame.msg)
    entry.size = frame.size
    intake.ring.publish(entry)


cdef void narrow(source_t *source) noexcept nogil:
    """Let libzmq hold few messages of each connection of `source`, because they may be large.

    Its mark counts messages, not bytes, and a wide one spares the two threads a wake-up every 32 frames. It is never
    widened again: libzmq does not wake a writer that waits at the old mark, which would then wait for ever.
    """
    cdef int few = NARROW
    if not source.narrow:
        source.narrow = 1
        zmq_setsockopt(source.socket, RCVHWM, &few, sizeof(few))


cdef void count_shed(Intake intake, source_t *source, msg_t *message) noexcept nogil:
    """Count the events of a frame there is no room for, as they would have been counted with room."""
    cdef size_t size = msg_size(message)
    cdef uint8_t *data = <uint8_t *>msg_data(message)
    cdef int n
    if size > intake.max_frame:
        intake.oversize += 1
        return
    n = intake.scan(data, size, intake.rights.of_peer(source.peers, source.rights, message))
    if n > 0:
        intake.shed += n
    elif source.wrap:
        intake.shed += 1
    else:
        intake.malformed += 1


cdef bint wrap(Intake intake, source_t *source, frame_t *frame, uint8_t rights) noexcept nogil:
    """Make an event of a bare payload; a payload that is an event already is left alone."""
    cdef uint8_t *p = frame.data
    cdef uint8_t *end = p + frame.size
    cdef uint8_t *made
    cdef double now = frame.received_us / 1e6
    cdef uint64_t bits
    cdef int size, i
    if intake.scan(p, frame.size, rights) > 0:
        return True
    if frame.size and (p[0] & 0xf0) == 0x80 or p < end and (p[0] == 0xde or p[0] == 0xdf):
        size = source.pack_size + 8 + 5 + frame.size
        made = <uint8_t *>malloc(size)
        if made == NULL:
            return False
        memcpy(made, source.pack, source.pack_size)
        memcpy(&bits, &now, 8)
        for i in range(8):
            made[source.pack_size + i] = <uint8_t>(bits >> (56 - 8 * i))
        i = source.pack_size + 8
        memcpy(made + i, b"\xa4data", 5)
        memcpy(made + i + 5, p, frame.size)
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
    free(frame.owned)
    frame.owned = made
    frame.data = made
    frame.size = size
    return True


cdef void rename(source_t *source, frame_t *frame) noexcept:
    """Replace the payload by one with its keys renamed; a payload that is no map is left alone."""
    cdef bytes made
    cdef void *copy
    try:
        raw = PyBytes_FromStringAndSize(<char *>frame.data, frame.size)
        codec = msgspec.msgpack if raw[0] >= 0x80 else msgspec.json
        if codec is msgspec.json:
            raw = raw[raw.index(b"{"):]
        fields = <dict>source.fields
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
        free(frame.owned)
        frame.owned = copy
        frame.data = <uint8_t *>copy
        frame.size = <uint32_t>len(made)
    except BaseException:
        return


cdef bint judge_frame(Intake intake, source_t *source, frame_t *frame, entry_t *entry, uint8_t rights) noexcept nogil:
    """Apply `rights` to the scanned events of an unnumbered frame and book what they refuse; False when that is all."""
    cdef uint32_t n = intake.items.n, denied
    cdef uint8_t code = DENIED
    if intake.rights.within_rate(rights, n):
        denied = intake.rights.sieve(rights, &intake.items, 0, 1)
    else:
        denied = n
        code = RATE
    if denied:
        entry.count = denied
        entry.code = code
        intake.sample_refused(&source.sampled_us, frame.data, frame.size, rights, code)
    return denied < n
