# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""What both scanners do with the parts of one event; inlined into each."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from tapebus._scan cimport ALIASED, ERR_EVENT_TYPE, NOT_UTF8, UNTIMED, item_t
from tapebus._topics cimport MAX_TOPIC_SIZE, SENDERS_TOPICS, Topics, hash_bytes, key_shape

cdef struct scan_t:
    const uint8_t *end
    uint8_t flags
    int error
    const uint8_t *keys[64]   # the payload's own keys, as they are spelled
    uint32_t sizes[64]
    uint32_t n_keys

cdef enum:
    K_OTHER, K_TYPE, K_TIME, K_CORR, K_DATA, K_PRIORITY


cdef inline int envelope_key(const uint8_t *p, size_t n) noexcept nogil:
    if n == 10 and memcmp(p, b"event_type", 10) == 0:
        return K_TYPE
    if n == 9 and memcmp(p, b"timestamp", 9) == 0:
        return K_TIME
    if n == 14 and memcmp(p, b"correlation_id", 14) == 0:
        return K_CORR
    if n == 4 and memcmp(p, b"data", 4) == 0:
        return K_DATA
    if n == 8 and memcmp(p, b"priority", 8) == 0:
        return K_PRIORITY
    return K_OTHER


cdef inline uint8_t priority_of(const uint8_t *p, size_t n) noexcept nogil:
    if n == 8 and memcmp(p, b"critical", 8) == 0:
        return 3
    if n == 4 and memcmp(p, b"high", 4) == 0:
        return 2
    if n == 3 and memcmp(p, b"low", 3) == 0:
        return 0
    return 1


cdef inline void set_time(item_t *item, bint known, double time) noexcept nogil:
    if known:
        item.time = time
        item.flags &= <uint8_t>~UNTIMED
    else:
        item.time = 0
        item.flags |= UNTIMED


cdef inline void remember_key(scan_t *s, const uint8_t *p, size_t n) noexcept nogil:
    if s.n_keys < 64:
        s.keys[s.n_keys] = p
        s.sizes[s.n_keys] = <uint32_t>n
        s.n_keys += 1
    else:
        s.flags |= ALIASED


cdef inline bint is_ascii(const uint8_t *p, size_t n) noexcept nogil:
    cdef uint64_t eight, seen = 0
    cdef uint8_t last = 0
    while n >= 8:
        memcpy(&eight, p, 8)
        seen |= eight
        p += 8
        n -= 8
    while n:
        last |= p[0]
        p += 1
        n -= 1
    return not (seen & 0x8080808080808080u) and last < 0x80


cdef inline bint is_utf8(const uint8_t *p, size_t n) noexcept nogil:
    """Whether the bytes are UTF-8 in its shortest form without surrogates (RFC 3629)."""
    cdef size_t i = 0, more, k
    cdef uint32_t c
    while i < n:
        c = p[i]
        i += 1
        if c < 0x80:
            continue
        if 0xc2 <= c <= 0xdf:
            more = 1
            c &= 0x1f
        elif 0xe0 <= c <= 0xef:
            more = 2
            c &= 0x0f
        elif 0xf0 <= c <= 0xf4:
            more = 3
            c &= 0x07
        else:
            return False
        if i + more > n:
            return False
        for k in range(more):
            if (p[i] & 0xc0) != 0x80:
                return False
            c = (c << 6) | (p[i] & 0x3f)
            i += 1
        if (more == 2 and c < 0x800) or (more == 3 and (c < 0x10000 or c > 0x10ffff)) or 0xd800 <= c <= 0xdfff:
            return False
    return True


cdef inline bint is_name(const uint8_t *p, size_t n) noexcept nogil:
    cdef size_t i
    for i in range(n):
        if p[i] < 0x20 or p[i] == 0x7f:
            return False
    return is_utf8(p, n)


cdef inline int finish(Topics topics, scan_t *s, item_t *item, const uint8_t *name, size_t name_size) noexcept nogil:
    cdef uint32_t i
    if name == NULL or name_size < 1 or name_size > MAX_TOPIC_SIZE:
        return ERR_EVENT_TYPE
    # most events are of the type of the one before
    item.topic = topics.last
    if topics.sizes[item.topic] != name_size or memcmp(topics.names[item.topic], name, name_size) != 0:
        item.topic = topics.find(name, name_size, 0)
    if item.topic == 0:
        # a name is proved once, when it is new: what is stored must read back as it was written
        if not is_name(name, name_size):
            return ERR_EVENT_TYPE
        item.topic = topics.find(name, name_size, SENDERS_TOPICS)
    topics.last = item.topic
    if topics.alias_shapes[item.topic]:
        for i in range(s.n_keys):
            if topics.alias_shapes[item.topic] & key_shape(s.keys[i], s.sizes[i]) and (
                    topics.is_alias(item.topic, hash_bytes(s.keys[i], s.sizes[i]))):
                s.flags |= ALIASED
                break
    item.flags |= s.flags
    return 0


cdef inline void check_text(const uint8_t *p, size_t n, scan_t *s) noexcept nogil:
    if not is_ascii(p, n) and not is_utf8(p, n):
        s.flags |= NOT_UTF8
