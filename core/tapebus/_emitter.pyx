# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The hot path of a producer: from a call of `publish` to bytes in the outbox.

As in `_outbox` the GIL is the only lock: what may run user code comes first, and from the claim of room to the number
of the event there is none.
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_AsUTF8AndSize, PyUnicode_GET_LENGTH
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec
from posix.unistd cimport write

from tapebus._outbox cimport ENCODE, Outbox

import collections.abc
import datetime
import os

import msgspec

from tapebus._outbox import MAX_EVENT
from tapebus.events import PRIORITIES

cdef double START_AGAIN_S = 0.1
cdef uint64_t NEVER = 0xFFFFFFFFFFFFFFFF
cdef Py_ssize_t max_event = MAX_EVENT


def enc_hook(value):
    """Plain values for what MessagePack does not know: numpy scalars and arrays, paths, subclasses, mappings."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, datetime.datetime):
        return datetime.datetime.combine(datetime.datetime.date(value), datetime.datetime.timetz(value))
    if isinstance(value, collections.abc.Mapping):
        return dict(value)
    if hasattr(value, "tolist"):
        plain = value.tolist()
    elif hasattr(value, "item"):
        plain = value.item()
    elif isinstance(value, (collections.abc.Sequence, collections.abc.Set, collections.abc.ValuesView)):
        plain = list(value)
    else:
        raise TypeError(f"cannot encode {type(value).__name__}")
    # Anything else could come back here for ever.
    if type(plain) not in (bool, int, float, str, bytes, list, datetime.datetime):
        raise TypeError(f"cannot encode {type(value).__name__}")
    return plain


cdef object encode = msgspec.msgpack.Encoder(enc_hook=enc_hook, decimal_format="number").encode
cdef object to_builtins = msgspec.to_builtins
cdef frozenset priorities = frozenset(PRIORITIES)


# The envelope is written here, key by key in the order of `events.Wire`; `data` and only `data` is for msgspec.
cdef enum:
    OPTIONAL = 6
    FIXED_SIZE = 43   # bytes of the map's header, the keys that always come, and the timestamp

cdef const char **OPTIONAL_KEYS = [
    b"\xaecorrelation_id", b"\xa7user_id", b"\xaasession_id", b"\xa8event_id", b"\xaccausation_id", b"\xa8priority",
]

# The UTF-8 of a string; lives as long as the string.
cdef struct text_t:
    const char *at
    Py_ssize_t size

# All of an event but its data; the strings are the caller's, who keeps them.
cdef struct envelope_t:
    double timestamp
    text_t event_type
    text_t source
    text_t optional[OPTIONAL]   # `at` is NULL where there is none
    uint8_t n_keys
    Py_ssize_t size


cdef inline int spell(object text, text_t *out) except -1:
    out.at = PyUnicode_AsUTF8AndSize(text, &out.size)
    return 0


cdef inline uint8_t *put_bytes(uint8_t *out, const void *data, size_t size) noexcept:
    memcpy(out, data, size)
    return out + size


cdef inline uint8_t *put_text(uint8_t *out, text_t *text) noexcept:
    cdef size_t size = text.size
    cdef int i, n
    if size < 32:
        out[0] = 0xA0 | <uint8_t>size
        out += 1
    else:
        n = 1 if size < 256 else 2 if size < 65536 else 4
        out[0] = 0xD9 if n == 1 else 0xDA if n == 2 else 0xDB
        for i in range(n):
            out[1 + i] = (size >> (8 * (n - 1 - i))) & 255
        out += 1 + n
    return put_bytes(out, text.at, size)


cdef inline size_t size_of(text_t *text) noexcept:
    return text.size + (1 if text.size < 32 else 2 if text.size < 256 else 3 if text.size < 65536 else 5)


cdef inline uint8_t *put_double(uint8_t *out, double value) noexcept:
    cdef uint64_t bits
    cdef int i
    memcpy(&bits, &value, 8)
    for i in range(8):
        out[i] = (bits >> (56 - 8 * i)) & 255
    return out + 8


cdef inline int spell_optional(object text, int which, envelope_t *envelope) except -1:
    cdef text_t *out = &envelope.optional[which]
    if text is None:
        out.at = NULL
        return 0
    spell(text, out)
    envelope.n_keys += 1
    envelope.size += 1 + (OPTIONAL_KEYS[which][0] & 0x1F) + size_of(out)
    return 0


cdef int spell_all(envelope_t *envelope, event_type, source, correlation_id, user_id, session_id, event_id,
                   causation_id, priority) except -1:
    spell(event_type, &envelope.event_type)
    spell(source, &envelope.source)
    envelope.n_keys = 4
    envelope.size = FIXED_SIZE + size_of(&envelope.event_type) + size_of(&envelope.source)
    spell_optional(correlation_id, 0, envelope)
    spell_optional(user_id, 1, envelope)
    spell_optional(session_id, 2, envelope)
    spell_optional(event_id, 3, envelope)
    spell_optional(causation_id, 4, envelope)
    spell_optional(priority, 5, envelope)
    return 0


cdef inline uint8_t *put_opening(uint8_t *out, envelope_t *envelope) noexcept:
    """Everything before the data."""
    out[0] = 0x80 | envelope.n_keys
    out = put_text(put_bytes(out + 1, b"\xaaevent_type", 11), &envelope.event_type)
    out = put_double(put_bytes(out, b"\xa9timestamp\xcb", 11), envelope.timestamp)
    out = put_text(put_bytes(out, b"\xa6source", 7), &envelope.source)
    return put_bytes(out, b"\xa4data", 5)


cdef inline void put_optional(uint8_t *out, envelope_t *envelope) noexcept:
    """Everything after the data."""
    cdef int i
    for i in range(OPTIONAL):
        if envelope.optional[i].at != NULL:
            out = put_bytes(out, OPTIONAL_KEYS[i], 1 + (OPTIONAL_KEYS[i][0] & 0x1F))
            out = put_text(out, &envelope.optional[i])


cdef inline object text_or_none(value):
    return value if value is None or type(value) is str else str(value)


cdef double seconds(value) except? -1:
    if value is None:
        return now()
    if type(value) is float:
        return value
    if isinstance(value, datetime.datetime):
        return value.timestamp()
    return float(value)


cdef inline double monotonic() noexcept:
    cdef timespec spec
    clock_gettime(CLOCK_MONOTONIC, &spec)
    return spec.tv_sec + spec.tv_nsec * 1e-9


cdef inline double now() noexcept:
    cdef timespec spec
    clock_gettime(CLOCK_REALTIME, &spec)
    return spec.tv_sec + spec.tv_nsec * 1e-9


cdef class Emitter:
    """The hot half of a Publisher: encodes an event into the outbox and wakes the sender when it must."""

    cdef:
        readonly Outbox outbox
        readonly str source
        public int wake_fd      # -1: no sender yet, `_start` is called instead
        double start_at         # not before this time on the monotonic clock
        public bint closed
        public bint unopened    # `_open` is called before the next event: a forked child needs an outbox of its own

    def __cinit__(self, *args, **kwargs):
        self.wake_fd = -1

    def _setup(self, str source not None, Outbox outbox not None):
        self.source, self.outbox = source, outbox

    def _open(self):
        """Gives a forked child its outbox."""

    def _start(self):
        """Called at the first event; makes whatever drains the outbox."""

    def _confirm(self, number, timeout):
        """Whether the `number`-th event ever is on disk within `timeout` seconds."""

    cdef bytes encoded(self, data):
        """The data as a MessagePack map, or ``None`` when it is none."""
        if type(data) is not dict:
            data = to_builtins(data, enc_hook=enc_hook)
        return encode(data) if type(data) is dict else None

    cdef uint64_t keep(self, Outbox box, envelope_t *envelope, bytes data) noexcept:
        cdef uint64_t size = envelope.size + PyBytes_GET_SIZE(data)
        cdef uint8_t *out
        if size > <uint64_t>max_event:
            box.lose(ENCODE)
            return 0
        out = box.claim(size)
        if out == NULL:
            return 0
        out = put_opening(out, envelope)
        put_optional(put_bytes(out, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data)), envelope)
        return box.enter_event(size)

    def publish(self, event_type, data, correlation_id=None, priority=None, timestamp=None, causation_id=None,
                user_id=None, session_id=None, event_id=None, *, source=None, durable=False, timeout=5.0):
        """Hand one event over: ``True`` when it is kept for the bus, ``False`` when it is counted as dropped.

        Never blocks, and raises nothing but `KeyboardInterrupt` and `SystemExit`; safe from any thread.
        `data` is a map (or a struct, dataclass or mapping, which becomes one) and is not kept. `timestamp`
        is Unix seconds or a `datetime`, now by default; an unknown `priority` counts as none; `source` names
        another component than this publisher's. With `durable` it does block, for at most `timeout` seconds,
        and ``True`` means that the bus has the event on disk; after ``False`` it may still get there.
        """
        cdef envelope_t envelope
        cdef bytes body = None
        cdef Outbox box
        cdef uint64_t seq = 0, number
        try:
            if isinstance(event_type, str) and 0 < PyUnicode_GET_LENGTH(event_type) <= 100:
                source = self.source if source is None else str(source)[:100]
                correlation_id = text_or_none(correlation_id)
                user_id, session_id = text_or_none(user_id), text_or_none(session_id)
                event_id, causation_id = text_or_none(event_id), text_or_none(causation_id)
                if priority is not None:
                    priority = str(getattr(priority, "value", priority)).lower()
                    priority = priority if priority in priorities else None
                envelope.timestamp = seconds(timestamp)
                body = self.encoded(data)
                spell_all(&envelope, event_type, source, correlation_id, user_id, session_id, event_id, causation_id,
                          priority)
            if self.unopened:
                self._open()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            body = None
        box = self.outbox
        if self.closed:
            box.refuse()
            return False
        if body is None:
            box.lose(ENCODE)
        else:
            seq = self.keep(box, &envelope, body)
        number = seq + box.renumbered if durable else 0
        if box.next_seq > box.wake_at:
            self.wake()
        if seq == 0:
            return False
        return self._confirm(number, timeout) if durable else True

    cdef wake(self):
        cdef Outbox box = self.outbox
        cdef uint64_t one = 1
        if self.wake_fd >= 0:
            # One wake-up is enough: the sender sets the next mark before it sleeps again.
            box.wake_at = NEVER
            write(self.wake_fd, &one, sizeof(one))
            return
        if monotonic() < self.start_at:
            return
        try:
            self._start()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            pass
        if self.wake_fd < 0:
            # No thread to be had now, or another one is at it: the events are kept, an event a little later tries again.
            self.start_at = monotonic() + START_AGAIN_S
