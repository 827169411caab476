# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The scan of one JSON event."""

from libc.math cimport isfinite
from libc.stdlib cimport strtod
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcmp, memcpy

from tapebus._scan cimport (
    ALIASED, ERR_DEPTH, ERR_EVENT_TYPE, ERR_NOT_EVENT, ERR_SYNTAX, JSON, MAX_DEPTH, NONFINITE, UNTIMED, WIDE, item_t,
)
from tapebus._scan_event cimport (
    K_CORR, K_DATA, K_OTHER, K_PRIORITY, K_TIME, K_TYPE, check_text, envelope_key, finish, priority_of, remember_key,
    scan_t, set_time,
)
from tapebus._topics cimport MAX_TOPIC_SIZE, Topics, hash_bytes

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    #define EACH(b) (0x0101010101010101ull * (b))

    /* The top bit of each of eight bytes that is a quote, a backslash or below 32. The lowest one set is exact; those above
       it may not be. */
    static inline uint64_t special_bytes(uint64_t v) {
        uint64_t quote, slash;
        #if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        v = __builtin_bswap64(v);
        #endif
        quote = v ^ EACH(0x22);
        slash = v ^ EACH(0x5c);
        return (((quote - EACH(1)) & ~quote) | ((slash - EACH(1)) & ~slash) | ((v - EACH(0x20)) & ~v)) & EACH(0x80);
    }

    /* Which of them, in the order of memory, has the lowest mark. */
    static inline int first_byte(uint64_t marks) {
        return __builtin_ctzll(marks) >> 3;
    }

    /* The number of plain digits with an optional fraction from p to end, correctly rounded; 0 when it is anything else or
       needs more care. */
    static inline int plain_decimal(const uint8_t *p, const uint8_t *end, double *out) {
        static const uint64_t tens[] = {1, 10, 100, 1000, 10000, 100000, 1000000, 10000000, 100000000, 1000000000};
        const uint8_t *point = NULL;
        uint64_t digits = 0, bits, mantissa;
        __int128 rest;
        int places, shift, i;
        double found;
        if (end - p < 1 || end - p > 19 || *p == '.' || end[-1] == '.') return 0;
        for (; p < end; p++) {
            if (*p == '.' && point == NULL) point = p;
            else if ((uint8_t)(*p - '0') <= 9) digits = digits * 10 + (*p - '0');
            else return 0;
        }
        places = point == NULL ? 0 : (int)(end - point - 1);
        if (places > 9 || digits >> 62) return 0;
        found = (double)digits / (double)tens[places];
        if (digits >> 53) {
            /* two roundings: found = mantissa / 2^shift is compared with the exact fraction, and moved to its neighbour */
            memcpy(&bits, &found, 8);
            shift = 1075 - (int)(bits >> 52);
            if (shift < 1 || shift > 60) return 0;
            mantissa = (bits & 0xfffffffffffffull) | 0x10000000000000ull;
            for (i = 0; i < 2; i++) {
                rest = ((__int128)digits << shift) - (__int128)mantissa * tens[places];
                if (rest * 2 < (__int128)tens[places] && rest * 2 > -(__int128)tens[places]) {
                    memcpy(out, &found, 8);
                    return 1;
                }
                mantissa += rest > 0 ? 1 : -1;
                bits += rest > 0 ? 1 : -1;
                memcpy(&found, &bits, 8);
            }
            return 0;
        }
        *out = found;
        return 1;
    }
    """
    uint64_t special_bytes(uint64_t eight) noexcept nogil
    int first_byte(uint64_t marks) noexcept nogil
    bint plain_decimal(const uint8_t *p, const uint8_t *end, double *out) noexcept nogil


cdef inline const uint8_t *js_string(const uint8_t *p, const uint8_t *end, bint *escaped) noexcept nogil:
    """The byte after the closing quote of the string whose opening quote is at `p`, or NULL."""
    cdef uint64_t v
    p += 1
    while p < end:
        if end - p >= 8:
            # eight bytes at a time to the next that is a quote, a backslash or a control character
            memcpy(&v, p, 8)
            v = special_bytes(v)
            if v == 0:
                p += 8
                continue
            p += first_byte(v)
        if p[0] == 34:
            return p + 1
        if p[0] == 92:
            escaped[0] = True
            p += 1
        elif p[0] < 32:
            return NULL
        p += 1
    return NULL


cdef inline bint js_word(const uint8_t *p, const uint8_t *end, const char *word, size_t n) noexcept nogil:
    return <size_t>(end - p) >= n and memcmp(p, word, n) == 0


cdef bint is_wide(const uint8_t *digits, size_t n, bint negative) noexcept nogil:
    """Whether an integer of these digits is beyond int64 and uint64."""
    if negative:
        return n > 19 or (n == 19 and memcmp(digits, b"9223372036854775808", 19) > 0)
    return n > 20 or (n == 20 and memcmp(digits, b"18446744073709551615", 20) > 0)


cdef const uint8_t *js_scalar(const uint8_t *p, scan_t *s) noexcept nogil:
    cdef uint8_t b = p[0]
    cdef const uint8_t *start = p
    cdef const uint8_t *digits
    if b == 116 and js_word(p, s.end, b"true", 4):
        return p + 4
    if b == 102 and js_word(p, s.end, b"false", 5):
        return p + 5
    if b == 110 and js_word(p, s.end, b"null", 4):
        return p + 4
    # json.dumps of many languages writes these; the bytes are kept, the event is a dead letter
    if b == 78 and js_word(p, s.end, b"NaN", 3):
        s.flags |= NONFINITE
        return p + 3
    if b == 73 and js_word(p, s.end, b"Infinity", 8):
        s.flags |= NONFINITE
        return p + 8
    if b == 45 and js_word(p, s.end, b"-Infinity", 9):
        s.flags |= NONFINITE
        return p + 9
    if b == 45:
        p += 1
    digits = p
    while p < s.end and 48 <= p[0] <= 57:
        p += 1
    if p - digits > 18 and (p == s.end or (p[0] != 46 and p[0] != 101 and p[0] != 69)):
        # decoders disagree about it: the bytes are kept, the event is a dead letter
        if is_wide(digits, p - digits, b == 45):
            s.flags |= WIDE
    while p < s.end and (48 <= p[0] <= 57 or p[0] == 45 or p[0] == 43 or p[0] == 46 or p[0] == 101 or p[0] == 69):
        p += 1
    return p if p > start else NULL


cdef const uint8_t *js_skip(const uint8_t *p, scan_t *s, int depth, bint keys) noexcept nogil:
    """The end of the value at `p` (no leading space); with `keys`, remember the keys of this object."""
    cdef uint8_t close
    cdef bint escaped = False
    cdef const uint8_t *q
    if depth > MAX_DEPTH:
        s.error = ERR_DEPTH
        return NULL
    s.error = ERR_SYNTAX
    if p >= s.end:
        return NULL
    if p[0] == 34:
        return js_string(p, s.end, &escaped)
    if p[0] != 123 and p[0] != 91:
        return js_scalar(p, s)
    close = p[0] + 2  # { } and [ ] are two apart in ASCII
    p = js_space(p + 1, s.end)
    if p < s.end and p[0] == close:
        return p + 1
    while p < s.end:
        if close == 125:
            if p[0] != 34:
                return NULL
            escaped = False
            q = js_string(p, s.end, &escaped)
            if q == NULL:
                return NULL
            if keys:
                if escaped:
                    s.flags |= ALIASED
                else:
                    remember_key(s, p + 1, q - p - 2)
            p = js_space(q, s.end)
            if p >= s.end or p[0] != 58:
                return NULL
            p = js_space(p + 1, s.end)
        p = js_skip(p, s, depth + 1, False)
        if p == NULL:
            return NULL
        s.error = ERR_SYNTAX
        p = js_space(p, s.end)
        if p >= s.end:
            return NULL
        if p[0] == close:
            return p + 1
        if p[0] != 44:
            return NULL
        p = js_space(p + 1, s.end)
    return NULL


cdef int hex4(const uint8_t *p, const uint8_t *end) noexcept nogil:
    cdef int v = 0, i, c
    if end - p < 4:
        return -1
    for i in range(4):
        c = p[i] | 32
        if 48 <= p[i] <= 57:
            v = v * 16 + p[i] - 48
        elif 97 <= c <= 102:
            v = v * 16 + c - 87
        else:
            return -1
    return v


cdef int js_unescape(const uint8_t *p, const uint8_t *end, uint8_t *out, int cap) noexcept nogil:
    """The text between the quotes as UTF-8 in `out`; its size, or -1 when broken or too long."""
    cdef int n = 0, c, low
    while p < end:
        if n + 4 > cap:
            return -1
        if p[0] != 92:
            out[n] = p[0]
            n += 1
            p += 1
            continue
        p += 1
        if p >= end:
            return -1
        if p[0] != 117:
            c = p[0]
            out[n] = 8 if c == 98 else 12 if c == 102 else 10 if c == 110 else 13 if c == 114 else 9 if c == 116 else c
            n += 1
            p += 1
            continue
        c = hex4(p + 1, end)
        p += 5
        if 0xd800 <= c < 0xdc00 and end - p >= 6 and p[0] == 92 and p[1] == 117:
            low = hex4(p + 2, end)
            if 0xdc00 <= low < 0xe000:
                c = 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00)
                p += 6
        if c < 0:
            return -1
        if c < 0x80:
            out[n] = c
            n += 1
        elif c < 0x800:
            out[n] = 0xc0 | (c >> 6)
            out[n + 1] = 0x80 | (c & 63)
            n += 2
        elif c < 0x10000:
            out[n] = 0xe0 | (c >> 12)
            out[n + 1] = 0x80 | ((c >> 6) & 63)
            out[n + 2] = 0x80 | (c & 63)
            n += 3
        else:
            out[n] = 0xf0 | (c >> 18)
            out[n + 1] = 0x80 | ((c >> 12) & 63)
            out[n + 2] = 0x80 | ((c >> 6) & 63)
            out[n + 3] = 0x80 | (c & 63)
            n += 4
    return n


cdef bint js_number(const uint8_t *p, const uint8_t *end, double *out) noexcept nogil:
    cdef char text[48]
    cdef char *stop
    cdef size_t n = end - p
    if plain_decimal(p, end, out):
        return True
    if n < 1 or n > 47 or not (48 <= p[0] <= 57 or p[0] == 45):
        return False
    memcpy(text, p, n)
    text[n] = 0
    out[0] = strtod(text, &stop)
    return stop == text + n and isfinite(out[0])


cdef const uint8_t *js_event(Topics topics, const uint8_t *p, const uint8_t *end, item_t *item, int *error) noexcept nogil:
    cdef scan_t s
    cdef uint8_t name[MAX_TOPIC_SIZE + 4]
    cdef uint8_t text[1024]
    cdef const uint8_t *start = p
    cdef const uint8_t *key
    cdef const uint8_t *value
    cdef bint escaped
    cdef double number = 0
    cdef bint known
    cdef int what, size, name_size = 0
    s.end = end
    s.flags = JSON
    s.n_keys = 0
    item.corr = 0
    item.flags = UNTIMED
    item.priority = 1
    item.time = 0
    error[0] = ERR_NOT_EVENT
    if p >= end or p[0] != 123:
        return NULL
    error[0] = ERR_SYNTAX
    p = js_space(p + 1, end)
    while True:
        if p < end and p[0] == 125 and name_size == 0:
            error[0] = ERR_EVENT_TYPE
            return NULL
        if p >= end or p[0] != 34:
            return NULL
        escaped = False
        key = p + 1
        p = js_string(p, end, &escaped)
        if p == NULL:
            return NULL
        if escaped:
            size = js_unescape(key, p - 1, text, 1024)
            what = envelope_key(text, size) if size > 0 else K_OTHER
        else:
            what = envelope_key(key, p - key - 1)
        p = js_space(p, end)
        if p >= end or p[0] != 58:
            return NULL
        p = js_space(p + 1, end)
        value = p
        p = js_skip(p, &s, 1, what == K_DATA)
        if p == NULL:
            error[0] = s.error
            return NULL
        # of a key that comes twice the last one counts, as in every decoder
        if what == K_TIME:
            known = js_number(value, p, &number)
            set_time(item, known, number)
        elif what == K_TYPE:
            name_size = js_unescape(value + 1, p - 1, name, MAX_TOPIC_SIZE + 4) if value[0] == 34 else 0
        elif what == K_CORR or what == K_PRIORITY:
            size = js_unescape(value + 1, p - 1, text, 1024) if value[0] == 34 else 0
            if what == K_PRIORITY:
                item.priority = priority_of(text, size if size > 0 else 0)
            else:
                item.corr = hash_bytes(text, size) if size > 0 else 0
        p = js_space(p, end)
        if p >= end:
            return NULL
        if p[0] == 125:
            break
        if p[0] != 44:
            return NULL
        p = js_space(p + 1, end)
    check_text(start, p - start, &s)
    error[0] = finish(topics, &s, item, name if name_size > 0 else NULL, name_size if name_size > 0 else 0)
    return p + 1 if error[0] == 0 else NULL
