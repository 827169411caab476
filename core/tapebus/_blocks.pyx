# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Blocks: packed raw events, their checksum and their correlation index. Used by tape and readers alike.

A payload is ``head_t``, then the columns size u32, wait_us u32, topic u16, flags u8 and priority u8
of all its events, then the events' bytes end to end. Little-endian.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdlib cimport calloc, free, malloc, qsort
from libc.string cimport memcpy

from tapebus._topics cimport hash_bytes

from tapebus.errors import CorruptError

cdef extern from *:
    """
    #include <stdint.h>
    #include <stddef.h>
    #include <string.h>
    static uint32_t crc_table[8][256];
    static int crc_ready = 0;
    static void crc_init(void) {
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t c = i;
            for (int k = 0; k < 8; k++) c = c & 1 ? (c >> 1) ^ 0x82F63B78u : c >> 1;
            crc_table[0][i] = c;
        }
        for (uint32_t i = 0; i < 256; i++)
            for (int k = 1; k < 8; k++)
                crc_table[k][i] = (crc_table[k - 1][i] >> 8) ^ crc_table[0][crc_table[k - 1][i] & 255];
        crc_ready = 1;
    }
    static uint32_t crc_soft(uint32_t c, const uint8_t *p, size_t n) {
        while (n >= 8) {
            uint64_t v;
            memcpy(&v, p, 8);
            v ^= c;
            c = crc_table[7][v & 255] ^ crc_table[6][(v >> 8) & 255] ^ crc_table[5][(v >> 16) & 255]
              ^ crc_table[4][(v >> 24) & 255] ^ crc_table[3][(v >> 32) & 255] ^ crc_table[2][(v >> 40) & 255]
              ^ crc_table[1][(v >> 48) & 255] ^ crc_table[0][v >> 56];
            p += 8; n -= 8;
        }
        while (n--) c = (c >> 8) ^ crc_table[0][(c ^ *p++) & 255];
        return c;
    }
    #if defined(__x86_64__) && defined(__GNUC__)
    __attribute__((target("sse4.2")))
    static uint32_t crc_hard(uint32_t c, const uint8_t *p, size_t n) {
        uint64_t c64 = c;
        while (n >= 8) { uint64_t v; memcpy(&v, p, 8); c64 = __builtin_ia32_crc32di(c64, v); p += 8; n -= 8; }
        c = (uint32_t)c64;
        while (n--) c = __builtin_ia32_crc32qi(c, *p++);
        return c;
    }
    static int crc_has_hard(void) { return __builtin_cpu_supports("sse4.2"); }
    #else
    static uint32_t crc_hard(uint32_t c, const uint8_t *p, size_t n) { return crc_soft(c, p, n); }
    static int crc_has_hard(void) { return 0; }
    #endif
    """
    void crc_init()
    uint32_t crc_soft(uint32_t c, const uint8_t *p, size_t n) noexcept nogil
    uint32_t crc_hard(uint32_t c, const uint8_t *p, size_t n) noexcept nogil
    int crc_has_hard()

#: The longest wait between two events that one payload can tell, in seconds.
MAX_WAIT_S = MAX_WAIT_US / 1e6

crc_init()
cdef int _HARD = crc_has_hard()


cdef uint32_t crc32c_update(uint32_t crc, const uint8_t *p, size_t n) noexcept nogil:
    crc = ~crc
    return ~(crc_hard(crc, p, n) if _HARD else crc_soft(crc, p, n))


def crc32c(const uint8_t[::1] data not None, uint32_t crc=0):
    """CRC-32C (Castagnoli, RFC 3720) of `data`, continuing from `crc`. Holds the GIL only to enter."""
    cdef size_t n = data.shape[0]
    if n:
        with nogil:
            crc = crc32c_update(crc, &data[0], n)
    return crc


def _crc32c_soft(const uint8_t[::1] data not None, uint32_t crc=0):
    """The table-driven twin of `crc32c`, for the test that both agree."""
    cdef size_t n = data.shape[0]
    return <uint32_t>~crc_soft(~crc, &data[0], n) if n else crc


def corr_hash(str correlation_id not None):
    """The index hash of a correlation id; never 0."""
    cdef bytes raw = correlation_id.encode()
    return hash_bytes(raw, len(raw))


cdef void columns_at(uint8_t *payload, uint32_t count, columns_t *out) noexcept nogil:
    out.head = <head_t *>payload
    payload += HEAD_SIZE
    out.size = <uint32_t *>payload
    payload += <size_t>4 * count
    out.wait_us = <uint32_t *>payload
    payload += <size_t>4 * count
    out.topic = <uint16_t *>payload
    payload += <size_t>2 * count
    out.flags = payload
    payload += count
    out.priority = payload
    out.data = payload + count


cdef class BlockView:
    """Random access to the events of one payload; the payload is checked to be consistent when opened."""

    def __cinit__(self, bytes payload not None, uint64_t first_seq):
        cdef uint8_t *p = <uint8_t *>PyBytes_AS_STRING(payload)
        cdef size_t size = PyBytes_GET_SIZE(payload)
        cdef uint64_t total = 0
        cdef uint32_t i, count
        if size < HEAD_SIZE:
            raise CorruptError(f"block {first_seq}: payload of {size} bytes has no head")
        count = (<head_t *>p).count
        if size < HEAD_SIZE + <size_t>COLUMNS_SIZE * count:
            raise CorruptError(f"block {first_seq}: payload of {size} bytes cannot hold {count} events")
        self.payload = payload
        self.first_seq = first_seq
        self.count = count
        columns_at(p, count, &self.columns)
        self.offsets = <uint32_t *>malloc(sizeof(uint32_t) * (<size_t>count + 1))
        if self.offsets == NULL:
            raise MemoryError
        for i in range(count):
            self.offsets[i] = <uint32_t>total
            total += self.columns.size[i]
        self.offsets[count] = <uint32_t>total
        if total > 0xffffffffu or HEAD_SIZE + <size_t>COLUMNS_SIZE * count + total != size:
            raise CorruptError(f"block {first_seq}: sizes of its {count} events do not add up")

    def __dealloc__(self):
        free(self.offsets)

    def _index(self, uint64_t bus_seq):
        if not self.first_seq <= bus_seq < self.first_seq + self.count:
            raise IndexError(f"bus_seq {bus_seq} is not in block {self.first_seq}")
        return bus_seq - self.first_seq

    def raw(self, uint64_t bus_seq):
        """The bytes of one event as published."""
        cdef uint32_t i = self._index(bus_seq)
        return PyBytes_FromStringAndSize(<char *>self.columns.data + self.offsets[i], self.columns.size[i])

    def topic(self, uint64_t bus_seq):
        return self.columns.topic[<uint32_t>self._index(bus_seq)]

    def flags(self, uint64_t bus_seq):
        return self.columns.flags[<uint32_t>self._index(bus_seq)]

    def priority(self, uint64_t bus_seq):
        return self.columns.priority[<uint32_t>self._index(bus_seq)]

    def received_at(self, uint64_t bus_seq):
        """Unix seconds of reception."""
        cdef uint32_t n = self._index(bus_seq), i
        cdef uint64_t us = self.columns.head.base_us
        for i in range(1, n + 1):
            us += self.columns.wait_us[i]
        return us / 1e6

    def places(self, uint32_t start, uint32_t stop, topics=None, among=None):
        """The indexes from `start` to before `stop` of the events whose topic id is in `topics`; ascending.

        `among` names, ascending, the only indexes to look at. None stands for all.
        """
        cdef uint8_t *chosen = NULL
        cdef uint32_t i
        found = []
        stop = min(stop, self.count)
        if topics is not None:
            chosen = <uint8_t *>calloc(65536, 1)
            if chosen == NULL:
                raise MemoryError
        try:
            if chosen != NULL:
                for number in topics:
                    chosen[<uint16_t>number] = 1
            if among is None:
                for i in range(start, stop):
                    if chosen == NULL or chosen[self.columns.topic[i]]:
                        found.append(i)
            else:
                for place in among:
                    i = place
                    if start <= i < stop and (chosen == NULL or chosen[self.columns.topic[i]]):
                        found.append(i)
        finally:
            free(chosen)
        return found

    def take(self, list places not None):
        """A view of copies of the events at the indexes `places`, numbered from ``first_seq`` on; for decoding them."""
        cdef uint32_t n = len(places), i, k = 0
        cdef size_t size = 0
        cdef columns_t to
        cdef uint8_t *out
        for place in places:
            i = place
            if i >= self.count:
                raise IndexError(f"block {self.first_seq} has no event {i}")
            size += self.columns.size[i]
        payload = PyBytes_FromStringAndSize(NULL, HEAD_SIZE + <size_t>COLUMNS_SIZE * n + size)
        columns_at(<uint8_t *>PyBytes_AS_STRING(payload), n, &to)
        to.head.count = n
        to.head.reserved = 0
        to.head.base_us = self.columns.head.base_us
        to.head.data_size = size
        out = to.data
        for place in places:
            i = place
            to.size[k] = self.columns.size[i]
            to.wait_us[k] = 0
            to.topic[k] = self.columns.topic[i]
            to.flags[k] = self.columns.flags[i]
            to.priority[k] = self.columns.priority[i]
            memcpy(out, self.columns.data + self.offsets[i], self.columns.size[i])
            out += self.columns.size[i]
            k += 1
        return BlockView(payload, self.first_seq)

    def urgent(self):
        """Sequence numbers of the HIGH and CRITICAL events."""
        cdef uint32_t i
        return [self.first_seq + i for i in range(self.count) if self.columns.priority[i] > 1]


def topic_counts(bytes payload not None):
    """How many events of each topic id a payload holds."""
    cdef BlockView view = BlockView(payload, 0)
    cdef uint32_t i
    found = {}
    for i in range(view.count):
        found[view.columns.topic[i]] = found.get(view.columns.topic[i], 0) + 1
    return found


def merge_payloads(list payloads not None):
    """One payload with the events of `payloads`, which are consecutive, in order.

    None may begin before the one in front of it ends by the clock, nor more than `MAX_WAIT_S` later: such a wait
    is told as 0, or as the longest there is, and the times of reception after it are off by that.
    """
    cdef uint64_t count = 0, size = 0, last_us = 0, gap
    cdef uint32_t done = 0, i
    cdef size_t filled = 0
    cdef BlockView view
    cdef columns_t to
    views = [BlockView(payload, 0) for payload in payloads]
    for view in views:
        count += view.count
        size += view.offsets[view.count]
    if not views:
        raise ValueError("nothing to merge")
    out = PyBytes_FromStringAndSize(NULL, HEAD_SIZE + COLUMNS_SIZE * count + size)
    columns_at(<uint8_t *>PyBytes_AS_STRING(out), <uint32_t>count, &to)
    to.head.count = <uint32_t>count
    to.head.reserved = 0
    to.head.data_size = size
    for view in views:
        if done == 0:
            to.head.base_us = last_us = view.columns.head.base_us
        for i in range(view.count):
            if i == 0:
                gap = view.columns.head.base_us - last_us if view.columns.head.base_us > last_us else 0
                to.wait_us[done] = <uint32_t>min(gap, MAX_WAIT_US)
            else:
                to.wait_us[done + i] = view.columns.wait_us[i]
            last_us += to.wait_us[done + i]
        memcpy(to.size + done, view.columns.size, <size_t>4 * view.count)
        memcpy(to.topic + done, view.columns.topic, <size_t>2 * view.count)
        memcpy(to.flags + done, view.columns.flags, view.count)
        memcpy(to.priority + done, view.columns.priority, view.count)
        memcpy(to.data + filled, view.columns.data, view.offsets[view.count])
        done += view.count
        filled += view.offsets[view.count]
    return out


# -- correlation runs: sorted (hash u32, offset u32) --------------------------------------------

cdef int compare_corr(const void *a, const void *b) noexcept nogil:
    cdef const corr_t *x = <const corr_t *>a
    cdef const corr_t *y = <const corr_t *>b
    if x.hash != y.hash:
        return 1 if x.hash > y.hash else -1
    return (x.offset > y.offset) - (x.offset < y.offset)


def sort_run(bytes run not None):
    """A run from entries in any order."""
    out = PyBytes_FromStringAndSize(PyBytes_AS_STRING(run), PyBytes_GET_SIZE(run))
    cdef char *entries = PyBytes_AS_STRING(out)
    cdef size_t n = PyBytes_GET_SIZE(out) // CORR_SIZE
    with nogil:
        qsort(entries, n, CORR_SIZE, compare_corr)
    return out


def merge_runs(list runs not None):
    """One run from ``(run, delta)`` pairs; `delta` is added to the offsets of its run."""
    cdef size_t total = 0, done = 0, n, i
    cdef corr_t *to
    cdef const corr_t *source
    cdef uint32_t delta
    for run, _ in runs:
        total += len(run)
    out = PyBytes_FromStringAndSize(NULL, total)
    to = <corr_t *>PyBytes_AS_STRING(out)
    for run, shift in runs:
        delta = shift
        source = <const corr_t *>PyBytes_AS_STRING(run)
        n = PyBytes_GET_SIZE(run) // CORR_SIZE
        for i in range(n):
            to[done].hash = source[i].hash
            to[done].offset = source[i].offset + delta
            done += 1
    with nogil:
        qsort(to, done, CORR_SIZE, compare_corr)
    return out


def find_corr(const uint8_t[::1] run not None, uint32_t wanted):
    """Offsets of the entries of a run with hash `wanted`, ascending."""
    cdef size_t low = 0, high = run.shape[0] // CORR_SIZE, middle, n = high
    cdef const corr_t *entries
    if n == 0:
        return []
    entries = <const corr_t *>&run[0]
    while low < high:
        middle = (low + high) // 2
        if entries[middle].hash < wanted:
            low = middle + 1
        else:
            high = middle
    found = []
    while low < n and entries[low].hash == wanted:
        found.append(entries[low].offset)
        low += 1
    return found
