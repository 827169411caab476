# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Well-formedness scan of incoming frames: where each event lies and what it is, without the GIL.

The scan proves structure (balanced, bounded depth, an ``event_type``), so that a frame can go to the
tape before anything is decoded. Values are judged later, by the typed decode.
"""

from libc.stdlib cimport free, realloc

from tapebus._scan_json cimport js_event, js_space
from tapebus._scan_msgpack cimport mp_count, mp_event
from tapebus._topics cimport MAX_TOPIC_SIZE

JSON_FLAG, ALIASED_FLAG, NONFINITE_FLAG, EXTENSION_FLAG, UNTIMED_FLAG = JSON, ALIASED, NONFINITE, EXTENSION, UNTIMED
WIDE_FLAG, NOT_UTF8_FLAG = WIDE, NOT_UTF8

REASONS = {
    ERR_EMPTY: "the frame is empty",
    ERR_SYNTAX: "neither JSON nor MessagePack",
    ERR_DEPTH: f"nested deeper than {MAX_DEPTH}",
    ERR_NOT_EVENT: "an event must be a map with string keys",
    ERR_EVENT_TYPE: f"event_type is missing or not a string of 1 to {MAX_TOPIC_SIZE} bytes of UTF-8 without control characters",
    ERR_TOO_MANY: "more events than one frame may hold",
    ERR_MEMORY: "out of memory",
}


cdef item_t *grow(items_t *out, uint32_t max_items) noexcept nogil:
    cdef item_t *v
    cdef uint32_t cap
    if out.n >= out.cap:
        cap = out.cap * 2 if out.cap else 64
        v = <item_t *>realloc(out.v, cap * sizeof(item_t))
        if v == NULL:
            return NULL
        out.v = v
        out.cap = cap
    return &out.v[out.n]


cdef int scan_frame(Topics topics, const uint8_t *data, size_t size, items_t *out, uint32_t max_items) noexcept nogil:
    """Fill `out` with the events of one frame; their number, or a negative reason (``ERR_*``).

    `out` keeps its memory between calls; the caller owns and frees ``out.v``.
    """
    cdef const uint8_t *end = data + size
    cdef const uint8_t *p = data
    cdef const uint8_t *q
    cdef uint32_t n = 1, i
    cdef bint json, array = False
    cdef int error = 0
    cdef item_t *item
    out.n = 0
    if size == 0:
        return ERR_EMPTY
    json = not (p[0] >= 0x80)
    if json:
        p = js_space(p, end)
        if p >= end:
            return ERR_EMPTY
        if p[0] == 91:
            array = True
            n = 0xffffffffu
            p = js_space(p + 1, end)
            if p < end and p[0] == 93:
                return ERR_EMPTY
        elif p[0] != 123:
            return ERR_SYNTAX
    elif (p[0] & 0xf0) == 0x90 or p[0] == 0xdc or p[0] == 0xdd:
        array = True
        p = mp_count(p, end, 0x90, 0xdc, &n)
        if p == NULL:
            return ERR_SYNTAX
        if n == 0:
            return ERR_EMPTY
    i = 0
    while i < n:
        if out.n >= max_items:
            return ERR_TOO_MANY
        item = grow(out, max_items)
        if item == NULL:
            return ERR_MEMORY
        q = js_event(topics, p, end, item, &error) if json else mp_event(topics, p, end, item, &error)
        if q == NULL:
            return error
        item.offset = <uint32_t>(p - data)
        item.size = <uint32_t>(q - p)
        out.n += 1
        i += 1
        p = q
        if json:
            p = js_space(p, end)
            if not array:
                break
            if p >= end:
                return ERR_SYNTAX
            if p[0] == 93:
                p = js_space(p + 1, end)
                break
            if p[0] != 44:
                return ERR_SYNTAX
            p = js_space(p + 1, end)
    return <int>out.n if p == end else ERR_SYNTAX


def scan(Topics topics, const uint8_t[::1] frame, int max_items=4096):
    """Scan one frame from Python: a list of dicts, one an event, or the reason as a string."""
    cdef items_t items
    cdef int result
    cdef uint32_t i
    items.v = NULL
    items.n = items.cap = 0
    try:
        result = scan_frame(topics, &frame[0] if frame.shape[0] else NULL, frame.shape[0], &items, max_items)
        if result < 0:
            return REASONS[result]
        return [
            {
                "offset": items.v[i].offset, "size": items.v[i].size, "topic": topics.name(items.v[i].topic),
                "flags": items.v[i].flags, "priority": items.v[i].priority, "time": items.v[i].time,
                "corr": items.v[i].corr,
            }
            for i in range(items.n)
        ]
    finally:
        free(items.v)
