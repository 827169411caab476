# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The compiled part of decoding and fan-out: gather, stamp, check and split runs of events."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.list cimport PyList_Append, PyList_GET_ITEM, PyList_GET_SIZE, PyList_New
from cpython.object cimport PyObject, Py_TYPE
from cpython.ref cimport Py_DECREF, Py_INCREF
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from tapebus._blocks cimport BlockView
from tapebus._scan cimport ALIASED, EXTENSION, JSON, NONFINITE, NOT_UTF8, UNTIMED, WIDE
from tapebus._slots cimport tb_get, tb_slot
from tapebus._topics cimport Topics

from tapebus.events import Event

cdef extern from *:
    """
    #include <Python.h>
    static inline void tb_set(PyObject *object, Py_ssize_t offset, PyObject *value) {
        PyObject **slot = (PyObject **)((char *)object + offset);
        PyObject *old = *slot;
        Py_INCREF(value);
        *slot = value;
        Py_XDECREF(old);
    }
    """
    Py_ssize_t PyObject_LengthHint(object o, Py_ssize_t default) except -1
    void tb_set(object o, Py_ssize_t offset, object value)

cdef Py_ssize_t SEQ_SLOT = tb_slot(Event.__dict__["bus_seq"])
cdef Py_ssize_t ORIGIN_SLOT = tb_slot(Event.__dict__["origin"])
if SEQ_SLOT <= 0 or ORIGIN_SLOT <= 0:
    raise ImportError("msgspec lays out structs in an unknown way: install the version tapebus was tested with")

cdef enum:
    TYPED_PACK = 0
    TYPED_JSON = 1
    SINGLE = 2

SINGLE_RUN = SINGLE


cdef inline int kind_of(Topics topics, uint16_t topic, uint8_t flags) noexcept nogil:
    if flags & (ALIASED | NONFINITE | EXTENSION | UNTIMED | WIDE | NOT_UTF8) or not topics.typed[topic]:
        return SINGLE
    return flags & JSON


def gather(Topics topics not None, BlockView view not None, uint32_t start, uint32_t stop):
    """Runs ``(kind, first, count, buffer)`` that together are the events `start` to `stop`.

    `buffer` is one MessagePack or JSON array of the run's events, or one bare event (kind ``SINGLE``).
    """
    cdef uint32_t i = start, first, n, k
    cdef int kind
    cdef size_t size
    cdef uint8_t *out
    cdef uint16_t *topic = view.columns.topic
    cdef uint8_t *flags = view.columns.flags
    runs = []
    stop = min(stop, view.count)
    while i < stop:
        first = i
        kind = kind_of(topics, topic[i], flags[i])
        i += 1
        if kind != SINGLE:
            while i < stop and kind_of(topics, topic[i], flags[i]) == kind:
                i += 1
        n = i - first
        size = view.offsets[i] - view.offsets[first]
        if kind == TYPED_PACK:
            buffer = PyBytes_FromStringAndSize(NULL, size + 5)
            out = <uint8_t *>PyBytes_AS_STRING(buffer)
            out[0] = 0xdd
            out[1] = n >> 24
            out[2] = (n >> 16) & 255
            out[3] = (n >> 8) & 255
            out[4] = n & 255
            memcpy(out + 5, view.columns.data + view.offsets[first], size)
        elif kind == TYPED_JSON:
            buffer = PyBytes_FromStringAndSize(NULL, size + n + 1)
            out = <uint8_t *>PyBytes_AS_STRING(buffer)
            for k in range(first, i):
                out[0] = 44 if k > first else 91
                memcpy(out + 1, view.columns.data + view.offsets[k], view.columns.size[k])
                out += 1 + view.columns.size[k]
            out[0] = 93
        else:
            buffer = PyBytes_FromStringAndSize(<char *>view.columns.data + view.offsets[first], size)
        runs.append((kind, first, n, buffer))
    return runs


def stamp(list events not None, BlockView origin not None, uint32_t first):
    """Write ``bus_seq`` and ``origin`` into freshly decoded events nobody else has seen yet.

    The structs are frozen for everybody else; the slots are written directly (see tb_set).
    """
    cdef Py_ssize_t i, n = PyList_GET_SIZE(events)
    cdef uint64_t seq = origin.first_seq + first
    for i in range(n):
        event = <object>PyList_GET_ITEM(events, i)
        if not isinstance(event, Event):
            raise TypeError("only events can be stamped")
        tb_set(event, SEQ_SLOT, seq + i)
        tb_set(event, ORIGIN_SLOT, origin)


def stamp_at(list events not None, BlockView origin not None, list places not None):
    """As `stamp`, for events that stand at the indexes `places` of `origin`, one each."""
    cdef Py_ssize_t i, n = PyList_GET_SIZE(events)
    cdef uint64_t seq
    if n != PyList_GET_SIZE(places):
        raise ValueError("as many places as events are needed")
    for i in range(n):
        event = <object>PyList_GET_ITEM(events, i)
        if not isinstance(event, Event):
            raise TypeError("only events can be stamped")
        seq = origin.first_seq + <uint64_t>places[i]
        tb_set(event, SEQ_SLOT, seq)
        tb_set(event, ORIGIN_SLOT, origin)


cdef class InOrder:
    """A rule that need not be asked about an event whose `low` is not above its `high`, two numbers of its payload.

    Called, it is the rule itself.
    """

    cdef:
        readonly object rule
        object event, payload       # the classes whose slots the offsets are of
        Py_ssize_t data, low, high

    def __init__(self, rule, event not None, payload not None, str low not None, str high not None):
        self.rule = rule
        self.event, self.payload = event, payload
        self.data = tb_slot(getattr(event, "data"))
        self.low, self.high = tb_slot(getattr(payload, low)), tb_slot(getattr(payload, high))
        if min(self.data, self.low, self.high) <= 0:
            raise TypeError(f"{payload.__name__} has no fields {low!r} and {high!r} to compare")

    def __call__(self, event):
        return self.rule(event)

    cdef bint holds(self, object event):
        """Whether the two are numbers in order; False where the rule has to be asked."""
        cdef PyObject *low
        cdef PyObject *high
        cdef PyObject *data
        if <PyObject *>Py_TYPE(event) != <PyObject *>self.event:
            return False
        data = tb_get(event, self.data)
        if data == NULL or <PyObject *>Py_TYPE(<object>data) != <PyObject *>self.payload:
            return False
        low, high = tb_get(<object>data, self.low), tb_get(<object>data, self.high)
        return (
            low != NULL and high != NULL and PyFloat_CheckExact(<object>low) and PyFloat_CheckExact(<object>high)
            and PyFloat_AS_DOUBLE(<object>low) <= PyFloat_AS_DOUBLE(<object>high)
        )


def run_checks(list events not None, BlockView view not None, uint32_t first, list checks not None):
    """Apply ``checks[topic]`` to each event; the list of ``(index, reason)`` of those that break a rule."""
    cdef Py_ssize_t i, n = PyList_GET_SIZE(events), limit = PyList_GET_SIZE(checks)
    cdef uint16_t topic
    broken = None
    for i in range(n):
        topic = view.columns.topic[first + i]
        if topic >= limit:
            continue
        check = <object>PyList_GET_ITEM(checks, topic)
        if check is None:
            continue
        if type(check) is InOrder and (<InOrder>check).holds(<object>PyList_GET_ITEM(events, i)):
            continue
        try:
            reason = check(<object>PyList_GET_ITEM(events, i))
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            if broken is None:
                broken = []
            broken.append((i, reason))
    return broken


def split(list events not None, BlockView view not None, uint32_t first, list routes not None, int groups, route_of):
    """Sort the events (None is skipped) into one list for each of the groups that ``routes[topic]`` numbers.

    ``route_of(event_type)`` is asked for types without a number.
    """
    cdef Py_ssize_t i, k, n = PyList_GET_SIZE(events)
    cdef uint16_t topic
    cdef tuple route
    out = [[] for _ in range(groups)]
    for i in range(n):
        event = <object>PyList_GET_ITEM(events, i)
        if event is None:
            continue
        topic = view.columns.topic[first + i]
        route = routes[topic] if topic else route_of(event.event_type)
        for k in range(PyTuple_GET_SIZE(route)):
            PyList_Append(<list>PyList_GET_ITEM(out, <Py_ssize_t><object>PyTuple_GET_ITEM(route, k)), event)
    return out


cdef class Batch:
    """New events for one consumer, in bus order, which remembers how far the handler came.

    The first iteration goes through a plain list iterator, which is asked how far it came. Whatever looks at events
    while that one still runs says so itself, and counts until the plain one has moved on.
    """

    cdef:
        readonly list events
        object iterator         # the plain one that runs or has ended, None before the first
        Py_ssize_t place        # one beyond the event looked at last by other means
        Py_ssize_t mark         # where `iterator` stood then; -1 when nothing else looked
        bint ended              # that was the end of another iteration
        bint sliced             # a part was taken; what becomes of it cannot be seen from here

    def __cinit__(self, list events not None):
        self.events = events
        self.iterator = None
        self.place = 0
        self.mark = -1
        self.ended = self.sliced = False

    cdef inline Py_ssize_t stands(self) except -1:
        """One beyond the event the plain iterator gave last."""
        iterator = self.iterator
        return 0 if iterator is None else PyList_GET_SIZE(self.events) - PyObject_LengthHint(iterator, 0)

    cdef inline int look(self, Py_ssize_t place, bint ended) except -1:
        self.mark, self.place, self.ended = self.stands(), place, ended
        return 0

    @property
    def position(self):
        """One beyond the event looked at last, 0 before the first; from any thread."""
        cdef Py_ssize_t stands = self.stands()
        return self.place if stands == self.mark else stands

    @property
    def exhausted(self):
        """Whether an iteration has come to its end, or nobody can tell; from any thread."""
        return self.sliced or (self.ended if self.stands() == self.mark else self.done())

    cdef bint done(self):
        """Whether the plain iterator has ended: then it no longer knows its list, nor its place in it."""
        iterator = self.iterator
        return iterator is not None and len(iterator.__reduce__()) < 3

    @property
    def first_seq(self):
        return self.events[0].bus_seq if self.events else 0

    @property
    def last_seq(self):
        return self.events[len(self.events) - 1].bus_seq if self.events else 0

    def __len__(self):
        return PyList_GET_SIZE(self.events)

    def __getitem__(self, index):
        found = self.events[index]
        if isinstance(index, slice):
            self.look(PyList_GET_SIZE(self.events), True)
            self.sliced = True
        else:
            index = index.__index__()
            self.look((index if index >= 0 else index + PyList_GET_SIZE(self.events)) + 1, False)
        return found

    def __iter__(self):
        if self.iterator is not None and not self.done():
            return Iteration(self)
        self.mark = -1
        self.sliced = False
        self.iterator = iter(self.events)
        return self.iterator


cdef class Iteration:
    """One beside the plain iteration of a batch."""

    cdef:
        Batch batch
        Py_ssize_t next_index

    def __cinit__(self, Batch batch not None):
        self.batch = batch
        self.next_index = 0

    def __iter__(self):
        return self

    def __next__(self):
        cdef Py_ssize_t i = self.next_index
        if i >= PyList_GET_SIZE(self.batch.events):
            self.batch.look(i, True)
            raise StopIteration
        self.next_index = i + 1
        self.batch.look(i + 1, False)
        return <object>PyList_GET_ITEM(self.batch.events, i)
