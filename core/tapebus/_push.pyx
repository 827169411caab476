# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Fire and forget: frames that come without numbers and get no reply."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from tapebus._clock cimport now_us
from tapebus._libzmq cimport (
    DONTWAIT, RCVHWM, msg_close, msg_data, msg_init, msg_more, msg_recv, msg_size, msg_t, zmq_setsockopt,
)
from tapebus._ring cimport FRAME, REJECT, entry_t
from tapebus._rights cimport EVERYTHING
from tapebus._wire cimport DENIED, RATE

import msgspec

cdef enum:
    BURST = 512           # frames taken from one socket before the others get their turn
    LARGE = 64 << 10      # 256 frames of this size have as many bytes as 64 of the largest
    NARROW = 64           # messages of a connection that libzmq holds for a socket which large frames come through


cdef void read_frames(Intake intake, source_t *source) noexcept nogil:
    cdef entry_t *entry
    cdef msg_t message
    cdef int i, n
    cdef uint8_t rights
    cdef bint shedding = False
    for i in range(BURST):
        if not intake.has_legacy_room():
            # wait for the tape, unless it stands still: a blocked PUSH.send would hang a trading process
            shedding = intake.stalled()
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
        entry = NULL if shedding else intake.ring.claim(0)
        if entry == NULL:
            count_shed(intake, source, &message)
            msg_close(&message)
            continue
        rights = intake.rights.of_peer(source.peers, source.rights, &message)
        entry.producer = source.producer
        entry.received_us = now_us()
        entry.kind = FRAME
        entry.msg = message
        entry.has_msg = 1
        entry.data = <uint8_t *>msg_data(&entry.msg)
        entry.size = <uint32_t>min(msg_size(&entry.msg), <size_t>0xffffffffu)
        if entry.size > LARGE:
            narrow(source)
        if entry.size > intake.max_frame:
            intake.oversize += 1
            intake.sample(entry.data, entry.size, b"oversize")
            intake.ring.release(entry)
            continue
        if source.fields != NULL:
            with gil:
                rename(source, entry)
        if source.wrap and not wrap(intake, source, entry, rights):
            n = -2
        else:
            n = intake.scan(entry.data, entry.size, rights)
        if n > 0 and rights != EVERYTHING and not judge_frame(intake, source, entry, rights):
            continue
        if n > 0 and intake.take_items(entry, 0):
            intake.ring.publish(entry)
        else:
            intake.malformed += 1
            intake.sample_scan(entry.data, entry.size, n)
            intake.ring.release(entry)


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


cdef bint wrap(Intake intake, source_t *source, entry_t *entry, uint8_t rights) noexcept nogil:
    """Make an event of a bare payload; a payload that is an event already is left alone."""
    cdef uint8_t *p = entry.data
    cdef uint8_t *end = p + entry.size
    cdef uint8_t *made
    cdef double now = entry.received_us / 1e6
    cdef uint64_t bits
    cdef int size, i
    if intake.scan(p, entry.size, rights) > 0:
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


cdef void rename(source_t *source, entry_t *entry) noexcept:
    """Replace the payload by one with its keys renamed; a payload that is no map is left alone."""
    cdef bytes made
    cdef void *copy
    try:
        raw = PyBytes_FromStringAndSize(<char *>entry.data, entry.size)
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
        if entry.has_msg:
            msg_close(&entry.msg)
            entry.has_msg = 0
        free(entry.owned)
        entry.owned = copy
        entry.data = <uint8_t *>copy
        entry.size = <uint32_t>len(made)
    except BaseException:
        return


cdef bint judge_frame(Intake intake, source_t *source, entry_t *entry, uint8_t rights) noexcept nogil:
    """Apply `rights` to the scanned events of an unnumbered frame; False when the entry is dealt with."""
    cdef uint32_t n = intake.items.n, denied
    cdef uint8_t code = DENIED
    if intake.rights.within_rate(rights, n):
        denied = intake.rights.sieve(rights, &intake.items, 0, 1)
    else:
        denied = n
        code = RATE
    if denied == 0:
        return True
    entry.count = denied
    entry.code = code
    intake.sample_refused(&source.sampled_us, entry.data, entry.size, rights, code)
    if denied < n:
        return True
    intake.ring.release(entry)
    entry.kind = REJECT
    entry.size = 0
    entry.items = &entry.one
    intake.ring.publish(entry)
    return False
