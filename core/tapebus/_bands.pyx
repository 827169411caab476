# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Passing over events that change nothing; see `tapebus.bands`."""

from cpython.dict cimport PyDict_GetItem
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.object cimport PyObject, Py_TYPE

from libc.math cimport INFINITY

from tapebus._slots cimport tb_get, tb_slot


cdef class Band:
    cdef public double low_first, high_first, low_second, high_second, time
    cdef public long long seen
    cdef public object last

    def __cinit__(self):
        self.low_first = self.low_second = -INFINITY
        self.high_first = self.high_second = INFINITY
        self.time = 0.0
        self.seen = 0
        self.last = None

    def take(self, double first, double second, double time, last):
        if first < self.low_first:
            self.low_first = first
        if first > self.high_first:
            self.high_first = first
        if second < self.low_second:
            self.low_second = second
        if second > self.high_second:
            self.high_second = second
        self.seen += 1
        self.time = time
        self.last = last

    cdef inline bint holds(self, double first, double second) noexcept:
        # written so that NaN is never inside
        return self.low_first <= first <= self.high_first and self.low_second <= second <= self.high_second


cdef class Bands:
    cdef:
        readonly dict bands
        readonly object event           # the class of the events that are looked at, None before the first
        object payload                  # of its data; the four offsets are slots of these two classes
        str key_name, first_name, second_name
        Py_ssize_t timestamp, data, key, first, second
        public double until

    def __init__(self, dict bands not None, str key not None, str first not None, str second not None):
        self.bands = bands
        self.event = self.payload = None
        self.key_name, self.first_name, self.second_name = key, first, second
        self.until = INFINITY

    def learn(self, event):
        cdef object kind = type(event), payload = type(event.data)
        places = [(kind, "timestamp"), (kind, "data")]
        places += [(payload, name) for name in (self.key_name, self.first_name, self.second_name)]
        found = [tb_slot(getattr(owner, name, None)) for owner, name in places]
        if min(found) <= 0:
            return False
        self.timestamp, self.data, self.key, self.first, self.second = found
        self.event, self.payload = kind, payload
        return True

    def skip(self, events):
        for event in events:
            if not self._passes(event):
                return event
        return None

    cdef bint _passes(self, object event) except -1:
        """Take an event that changes nothing into its band; False for one that somebody has to look at."""
        cdef PyObject *time
        cdef PyObject *data
        cdef PyObject *key
        cdef PyObject *first
        cdef PyObject *second
        cdef PyObject *found
        cdef Band band
        cdef double a, b
        if <PyObject *>Py_TYPE(event) != <PyObject *>self.event:
            return False
        time, data = tb_get(event, self.timestamp), tb_get(event, self.data)
        if time == NULL or data == NULL or <PyObject *>Py_TYPE(<object>data) != <PyObject *>self.payload:
            return False
        key, first = tb_get(<object>data, self.key), tb_get(<object>data, self.first)
        second = tb_get(<object>data, self.second)
        if key == NULL or first == NULL or second == NULL or not PyFloat_CheckExact(<object>time):
            return False
        if not (PyFloat_AS_DOUBLE(<object>time) < self.until):
            return False
        found = PyDict_GetItem(self.bands, <object>key)
        if found == NULL:
            return True
        if not PyFloat_CheckExact(<object>first) or not PyFloat_CheckExact(<object>second):
            return False
        band = <Band?><object>found
        a, b = PyFloat_AS_DOUBLE(<object>first), PyFloat_AS_DOUBLE(<object>second)
        if a > b or not band.holds(a, b):
            return False
        band.seen += 1
        band.time = PyFloat_AS_DOUBLE(<object>time)
        band.last = <object>data
        return True
