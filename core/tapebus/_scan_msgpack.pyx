# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The scan of one MessagePack event."""

from libc.math cimport isfinite
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from tapebus._scan cimport (
    ERR_DEPTH, ERR_NOT_EVENT, ERR_SYNTAX, EXTENSION, MAX_DEPTH, NONFINITE, UNTIMED, item_t,
)
from tapebus._scan_event cimport (
    K_CORR, K_DATA, K_OTHER, K_PRIORITY, K_TIME, K_TYPE, check_text, envelope_key, finish, priority_of, remember_key,
    scan_t, set_time,
)
from tapebus._topics cimport Topics, hash_bytes

cdef extern from *:
    """
    static inline double load_be_double(const unsigned char *p) {
        unsigned long long v; double d;
        __builtin_memcpy(&v, p, 8); v = __builtin_bswap64(v); __builtin_memcpy(&d, &v, 8); return d;
    }
    static inline float load_be_float(const unsigned char *p) {
        unsigned int v; float f;
        __builtin_memcpy(&v, p, 4); v = __builtin_bswap32(v); __builtin_memcpy(&f, &v, 4); return f;
    }
    static inline unsigned long long be64(const unsigned char *p) {
        unsigned long long v; __builtin_memcpy(&v, p, 8); return __builtin_bswap64(v);
    }
    """
    double load_be_double(const uint8_t *p) noexcept nogil
    float load_be_float(const uint8_t *p) noexcept nogil
    uint64_t be64(const uint8_t *p) noexcept nogil


cdef inline const uint8_t *mp_str(const uint8_t *p, const uint8_t *end, const uint8_t **start, size_t *size) noexcept nogil:
    """The string at `p`, or NULL when there is none."""
    cdef uint8_t b
    if p >= end:
        return NULL
    b = p[0]
    if 0xa0 <= b <= 0xbf:
        size[0] = b & 31
        p += 1
    elif b == 0xd9 and end - p >= 2:
        size[0] = p[1]
        p += 2
    elif b == 0xda and end - p >= 3:
        size[0] = (p[1] << 8) | p[2]
        p += 3
    elif b == 0xdb and end - p >= 5:
        size[0] = be32(p + 1)
        p += 5
    else:
        return NULL
    if <size_t>(end - p) < size[0]:
        return NULL
    start[0] = p
    return p + size[0]


cdef const uint8_t *mp_skip(const uint8_t *p, scan_t *s, int depth) noexcept nogil:
    """The end of the value at `p`; NULL with ``s.error`` set when it is broken."""
    cdef uint8_t b
    cdef uint32_t n, i
    cdef size_t left, size
    if depth > MAX_DEPTH:
        s.error = ERR_DEPTH
        return NULL
    s.error = ERR_SYNTAX
    if p >= s.end:
        return NULL
    b = p[0]
    left = s.end - p
    if b <= 0x7f or b >= 0xe0 or b == 0xc0 or b == 0xc2 or b == 0xc3:
        return p + 1
    if b == 0xcb:
        if left < 9:
            return NULL
        if not isfinite(load_be_double(p + 1)):
            s.flags |= NONFINITE
        return p + 9
    if 0xa0 <= b <= 0xbf:
        size = 1 + (b & 31)
    elif b == 0xca:
        if left >= 5 and not isfinite(load_be_float(p + 1)):
            s.flags |= NONFINITE
        size = 5
    elif b == 0xcc or b == 0xd0:
        size = 2
    elif b == 0xcd or b == 0xd1:
        size = 3
    elif b == 0xce or b == 0xd2:
        size = 5
    elif b == 0xcf or b == 0xd3:
        size = 9
    elif b == 0xd9 or b == 0xc4:
        size = 2 + <size_t>p[1] if left >= 2 else 2
    elif b == 0xda or b == 0xc5:
        size = 3 + ((<size_t>p[1] << 8) | p[2]) if left >= 3 else 3
    elif b == 0xdb or b == 0xc6:
        size = 5 + <size_t>be32(p + 1) if left >= 5 else 5
    elif 0xd4 <= b <= 0xd8:
        size = 2 + (<size_t>1 << (b - 0xd4))
        if left >= 2 and p[1] != 0xff:
            s.flags |= EXTENSION
    elif b == 0xc7:
        size = 3 + <size_t>p[1] if left >= 3 else 3
        if left >= 3 and p[2] != 0xff:
            s.flags |= EXTENSION
    elif b == 0xc8 or b == 0xc9:
        s.flags |= EXTENSION
        if b == 0xc8:
            size = 4 + ((<size_t>p[1] << 8) | p[2]) if left >= 4 else 4
        else:
            size = 6 + <size_t>be32(p + 1) if left >= 6 else 6
    elif (b & 0xf0) == 0x90 or b == 0xdc or b == 0xdd:
        p = mp_count(p, s.end, 0x90, 0xdc, &n)
        if p == NULL:
            return NULL
        for i in range(n):
            p = mp_skip(p, s, depth + 1)
            if p == NULL:
                return NULL
        return p
    elif (b & 0xf0) == 0x80 or b == 0xde or b == 0xdf:
        p = mp_count(p, s.end, 0x80, 0xde, &n)
        if p == NULL:
            return NULL
        for i in range(n):
            p = mp_skip(p, s, depth + 1)
            if p == NULL:
                return NULL
            p = mp_skip(p, s, depth + 1)
            if p == NULL:
                return NULL
        return p
    else:
        return NULL
    if left < size:
        return NULL
    if 0xa0 <= b <= 0xbf:
        check_text(p + 1, size - 1, s)
    elif 0xd9 <= b <= 0xdb:
        check_text(p + 1 + (1 << (b - 0xd9)), size - 1 - (1 << (b - 0xd9)), s)
    return p + size


cdef const uint8_t *mp_data(const uint8_t *p, scan_t *s) noexcept nogil:
    """Skip the payload map at `p`, remembering its keys."""
    cdef uint32_t n, i
    cdef const uint8_t *key
    cdef size_t size
    cdef const uint8_t *q = mp_count(p, s.end, 0x80, 0xde, &n)
    if q == NULL:
        return mp_skip(p, s, 1)
    for i in range(n):
        p = mp_str(q, s.end, &key, &size)
        if p == NULL:
            s.error = ERR_NOT_EVENT
            return NULL
        remember_key(s, key, size)
        check_text(key, size, s)
        q = mp_skip(p, s, 2)
        if q == NULL:
            return NULL
    return q


cdef bint mp_number(const uint8_t *p, double *out) noexcept nogil:
    """The number at `p` as a double; the value is known to be complete."""
    cdef uint8_t b = p[0]
    if b == 0xcb:
        out[0] = load_be_double(p + 1)
    elif b <= 0x7f:
        out[0] = b
    elif b == 0xca:
        out[0] = load_be_float(p + 1)
    elif b >= 0xe0:
        out[0] = <signed char>b
    elif b == 0xcc:
        out[0] = p[1]
    elif b == 0xcd:
        out[0] = (p[1] << 8) | p[2]
    elif b == 0xd0:
        out[0] = <signed char>p[1]
    elif b == 0xd1:
        out[0] = <short>((p[1] << 8) | p[2])
    elif b == 0xce:
        out[0] = be32(p + 1)
    elif b == 0xcf:
        out[0] = <double>be64(p + 1)
    elif b == 0xd2:
        out[0] = <int>be32(p + 1)
    elif b == 0xd3:
        out[0] = <double><long long>be64(p + 1)
    else:
        return False
    return isfinite(out[0])


cdef const uint8_t *mp_event(Topics topics, const uint8_t *p, const uint8_t *end, item_t *item, int *error) noexcept nogil:
    cdef scan_t s
    cdef uint32_t n, i
    cdef const uint8_t *key
    cdef const uint8_t *text
    cdef const uint8_t *name = NULL
    cdef size_t size, text_size = 0, name_size = 0
    cdef double number = 0
    cdef bint known
    cdef int what
    s.end = end
    s.flags = 0
    s.n_keys = 0
    item.corr = 0
    item.flags = UNTIMED
    item.priority = 1
    item.time = 0
    p = mp_count(p, end, 0x80, 0xde, &n)
    if p == NULL:
        error[0] = ERR_NOT_EVENT
        return NULL
    for i in range(n):
        p = mp_str(p, end, &key, &size)
        if p == NULL or p >= end:
            error[0] = ERR_SYNTAX if p != NULL else ERR_NOT_EVENT
            return NULL
        what = envelope_key(key, size)
        if what == K_OTHER:
            check_text(key, size, &s)
        if what == K_DATA:
            p = mp_data(p, &s)
        else:
            key = p
            p = mp_skip(p, &s, 1)
            if p != NULL and what != K_OTHER:
                # of a key that comes twice the last one counts, as in every decoder
                text = NULL
                if what == K_TIME:
                    known = mp_number(key, &number)
                    set_time(item, known, number)
                elif mp_str(key, end, &text, &text_size) == NULL:
                    text_size = 0
                if what == K_TYPE:
                    name = text
                    name_size = text_size
                elif what == K_CORR:
                    item.corr = hash_bytes(text, text_size) if text_size else 0
                elif what == K_PRIORITY:
                    item.priority = priority_of(text, text_size)
        if p == NULL:
            error[0] = s.error
            return NULL
    error[0] = finish(topics, &s, item, name, name_size)
    return p if error[0] == 0 else NULL
