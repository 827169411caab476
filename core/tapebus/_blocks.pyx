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

# A piece of a payload while it is joined; borrowed from the bytes object the caller holds.
cdef struct piece_t:
    uint32_t kind
    const uint8_t *at
    const uint8_t *end

#: The longest wait between two events that one payload can tell, in seconds.
MAX_WAIT_S = MAX_WAIT_US / 1e6

cdef enum:
    # a checksum of so many bytes is made sooner than the GIL is had back from a busy thread
    CRC_ALONE = 256 << 10

crc_init()
cdef int _HARD = crc_has_hard()


cdef uint32_t crc32c_update(uint32_t crc, const uint8_t *p, size_t n) noexcept nogil:
    crc = ~crc
    return ~(crc_hard(crc, p, n) if _HARD else crc_soft(crc, p, n))


def crc32c(const uint8_t[::1] data not None, uint32_t crc=0):
    """CRC-32C (Castagnoli, RFC 3720) of `data`, continuing from `crc`. Gives up the GIL for what takes long only."""
    cdef size_t n = data.shape[0]
    if n > CRC_ALONE:
        with nogil:
            crc = crc32c_update(crc, &data[0], n)
    elif n:
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
        free(self.where)
        free(self.received)

    def _index(self, uint64_t bus_seq):
        cdef uint32_t low = 0, high = self.count, middle
        if self.where != NULL:
            while low < high:
                middle = (low + high) // 2
                if self.first_seq + self.where[middle] < bus_seq:
                    low = middle + 1
                else:
                    high = middle
            if low == self.count or self.first_seq + self.where[low] != bus_seq:
                raise IndexError(f"bus_seq {bus_seq} is not in this part of block {self.first_seq}")
            return low
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
        if self.received != NULL:
            return self.received[n] / 1e6
        for i in range(1, n + 1):
            us += self.columns.wait_us[i]
        return us / 1e6

    def places(self, uint32_t start, uint32_t stop, topics=None, among=None):
        """The indexes from `start` to before `stop` of the events whose topic id is in `topics`; ascending.

        `among` names, ascending, the only indexes to look at. None stands for all.
        """
        cdef uint8_t *chosen = NULL
        cdef uint32_t i, limit = 0
        found = []
        stop = min(stop, self.count)
        if topics is not None:
            limit = max(topics, default=0) + 1
            chosen = <uint8_t *>calloc(limit, 1)
            if chosen == NULL:
                raise MemoryError
        try:
            if chosen != NULL:
                for number in topics:
                    chosen[<uint32_t>number] = 1
            if among is None:
                for i in range(start, stop):
                    if chosen == NULL or (self.columns.topic[i] < limit and chosen[self.columns.topic[i]]):
                        found.append(i)
            else:
                for place in among:
                    i = place
                    if start <= i < stop and (
                        chosen == NULL or (self.columns.topic[i] < limit and chosen[self.columns.topic[i]])
                    ):
                        found.append(i)
        finally:
            free(chosen)
        return found

    def take(self, list places not None):
        """A part with copies of the events at the indexes `places`, numbered without gaps from ``first_seq`` on."""
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

    def spread(self, BlockView block not None, list places not None):
        """Give the events of a part, as `take` has made it, the numbers and times of reception they have in `block`."""
        cdef uint32_t i = 0, k = 0, place
        cdef uint64_t us = block.columns.head.base_us
        if <uint32_t>len(places) != self.count or self.where != NULL:
            raise ValueError("not a part with as many events")
        self.received = <uint64_t *>malloc(sizeof(uint64_t) * (<size_t>self.count + 1))
        self.where = <uint32_t *>malloc(sizeof(uint32_t) * (<size_t>self.count + 1))
        if self.received == NULL or self.where == NULL:
            raise MemoryError
        for each in places:
            place = each
            if place >= block.count or (k and place <= self.where[k - 1]):
                raise IndexError(f"block {block.first_seq} has no such places")
            while i < place:
                i += 1
                us += block.columns.wait_us[i]
            self.where[k] = place
            self.received[k] = us
            k += 1

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


# -- payloads in parts -------------------------------------------------------------------------

def split_payload(bytes payload not None, uint64_t least, uint32_t others):
    """The columns of a payload with its head, and the bytes of its events by topic id, in bus order each.

    Topics with fewer than `least` bytes come together under `others`.
    """
    cdef BlockView view = BlockView(payload, 0)
    cdef uint64_t *sizes
    cdef uint8_t **to
    cdef uint32_t i, topic, shared = 0
    for i in range(view.count):
        shared = max(shared, view.columns.topic[i])
    # one line more than there are topics, for what the small ones share
    shared += 1
    sizes = <uint64_t *>calloc(shared + 1, sizeof(uint64_t))
    to = <uint8_t **>calloc(shared + 1, sizeof(uint8_t *))
    try:
        if sizes == NULL or to == NULL:
            raise MemoryError
        seen = {}
        for i in range(view.count):
            topic = view.columns.topic[i]
            if to[topic] == NULL:
                # any address: it is replaced before it is used
                to[topic] = <uint8_t *>to
                seen[topic] = None
            sizes[topic] += view.columns.size[i]
        found, small = {}, False
        for each in sorted(seen):
            topic = each
            if sizes[topic] < least:
                sizes[shared] += sizes[topic]
                to[topic] = NULL
                small = True
            else:
                piece = PyBytes_FromStringAndSize(NULL, sizes[topic])
                to[topic] = <uint8_t *>PyBytes_AS_STRING(piece)
                found[topic] = piece
        if small:
            piece = PyBytes_FromStringAndSize(NULL, sizes[shared])
            to[shared] = <uint8_t *>PyBytes_AS_STRING(piece)
            found[others] = piece
        with nogil:
            for i in range(view.count):
                topic = view.columns.topic[i]
                if to[topic] == NULL:
                    topic = shared
                memcpy(to[topic], view.columns.data + view.offsets[i], view.columns.size[i])
                to[topic] += view.columns.size[i]
    finally:
        free(sizes)
        free(to)
    return payload[:HEAD_SIZE + <size_t>COLUMNS_SIZE * view.count], found


def topics_at(bytes columns not None, uint32_t count, offsets):
    """The topic ids of the events at `offsets`, as a set. Raises `ValueError` for other columns than of `count`."""
    cdef columns_t at
    if <size_t>len(columns) != HEAD_SIZE + <size_t>COLUMNS_SIZE * count:
        raise ValueError("the columns do not have the length of their events")
    columns_at(<uint8_t *>PyBytes_AS_STRING(columns), count, &at)
    return {at.topic[<uint32_t>offset] for offset in offsets if offset < count}


def join_payload(bytes columns not None, uint32_t count, dict pieces not None, uint32_t others):
    """The payload that `split_payload` has split. Events of pieces that are None have no bytes.

    Raises `ValueError` where sizes and pieces do not agree.
    """
    cdef columns_t at, to
    cdef uint32_t i, n = 0, topic, known = 0xffffffffu
    cdef uint64_t total = 0
    cdef int place = -1, other = -1
    cdef piece_t *found
    if <size_t>len(columns) != HEAD_SIZE + <size_t>COLUMNS_SIZE * count:
        raise ValueError("the columns do not have the length of their events")
    columns_at(<uint8_t *>PyBytes_AS_STRING(columns), count, &at)
    found = <piece_t *>malloc(sizeof(piece_t) * (len(pieces) + 1))
    if found == NULL:
        raise MemoryError
    try:
        for kind, piece in pieces.items():
            found[n].kind = kind
            found[n].at = found[n].end = NULL
            if piece is not None:
                found[n].at = <const uint8_t *>PyBytes_AS_STRING(piece)
                found[n].end = found[n].at + PyBytes_GET_SIZE(piece)
                total += PyBytes_GET_SIZE(piece)
            if found[n].kind == others:
                other = n
            n += 1
        payload = PyBytes_FromStringAndSize(NULL, HEAD_SIZE + <size_t>COLUMNS_SIZE * count + total)
        memcpy(PyBytes_AS_STRING(payload), PyBytes_AS_STRING(columns), HEAD_SIZE + <size_t>COLUMNS_SIZE * count)
        columns_at(<uint8_t *>PyBytes_AS_STRING(payload), count, &to)
        to.head.data_size = total
        for i in range(count):
            topic = at.topic[i]
            if topic != known:
                known = topic
                place = other
                for k in range(<int>n):
                    if found[k].kind == topic:
                        place = k
                        break
            if place < 0:
                raise ValueError(f"there is no piece for the events of topic {topic}")
            if found[place].at == NULL:
                to.size[i] = 0
                continue
            if <uint64_t>(found[place].end - found[place].at) < at.size[i]:
                raise ValueError(f"the events of topic {topic} are longer than their piece")
            memcpy(to.data, found[place].at, at.size[i])
            to.data += at.size[i]
            found[place].at += at.size[i]
        for k in range(<int>n):
            if found[k].at != found[k].end:
                raise ValueError(f"a piece is longer than the events of topic {found[k].kind}")
    finally:
        free(found)
    return payload


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


def segment_table(const uint8_t[::1] run not None, uint32_t segment):
    """The first hash and the CRC-32C of every `segment` entries of a run, 4 bytes each."""
    cdef size_t n = run.shape[0] // CORR_SIZE, at, here
    cdef const corr_t *entries
    cdef uint32_t *to
    out = PyBytes_FromStringAndSize(NULL, (n + segment - 1) // segment * 8)
    if n == 0:
        return out
    entries = <const corr_t *>&run[0]
    to = <uint32_t *>PyBytes_AS_STRING(out)
    for at in range(0, n, segment):
        here = min(<size_t>segment, n - at)
        to[0] = entries[at].hash
        to[1] = crc32c_update(0, <const uint8_t *>(entries + at), here * CORR_SIZE)
        to += 2
    return out


def find_segmented(const uint8_t[::1] run not None, const uint8_t[::1] table not None, uint32_t segment,
                   uint32_t wanted):
    """As `find_corr` with the `segment_table` of the run: what is read of the run is compared with it first.

    None where it does not match. The table must have been verified, and must be that of a run of this length.
    """
    cdef size_t n = run.shape[0] // CORR_SIZE, segments = table.shape[0] // 8
    cdef size_t low = 0, high = segments, middle, at, here
    cdef const uint32_t *entry
    cdef const corr_t *entries
    if segments != (n + segment - 1) // segment:
        return None
    if n == 0:
        return []
    entry = <const uint32_t *>&table[0]
    while low < high:
        middle = (low + high) // 2
        if entry[2 * middle] < wanted:
            low = middle + 1
        else:
            high = middle
    # the first entries with this hash may end the segment before
    low = low - 1 if low else 0
    entries = <const corr_t *>&run[0]
    found = []
    while low < segments and entry[2 * low] <= wanted:
        at = low * segment
        here = min(<size_t>segment, n - at)
        if crc32c_update(0, <const uint8_t *>(entries + at), here * CORR_SIZE) != entry[2 * low + 1]:
            return None
        for at in range(at, at + here):
            if entries[at].hash == wanted:
                found.append(entries[at].offset)
        low += 1
    return found
