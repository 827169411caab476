# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Well-formedness scan of incoming frames: where each event lies and what it is, without the GIL.

The scan proves structure (balanced, bounded depth, an ``event_type``), so that a frame can go to the
tape before anything is decoded. Values are judged later, by the typed decode.
"""

from libc.math cimport isfinite
from libc.stdlib cimport calloc, free, malloc, realloc, strtod
from libc.string cimport memcmp, memcpy

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
    static inline unsigned int be32(const unsigned char *p) {
        unsigned int v; __builtin_memcpy(&v, p, 4); return __builtin_bswap32(v);
    }
    static inline unsigned long long be64(const unsigned char *p) {
        unsigned long long v; __builtin_memcpy(&v, p, 8); return __builtin_bswap64(v);
    }
    """
    double load_be_double(const uint8_t *p) noexcept nogil
    float load_be_float(const uint8_t *p) noexcept nogil
    uint32_t be32(const uint8_t *p) noexcept nogil
    uint64_t be64(const uint8_t *p) noexcept nogil

JSON_FLAG, ALIASED_FLAG, NONFINITE_FLAG, EXTENSION_FLAG, UNTIMED_FLAG = JSON, ALIASED, NONFINITE, EXTENSION, UNTIMED
WIDE_FLAG, NOT_UTF8_FLAG = WIDE, NOT_UTF8
#: A type that senders bring when so many have a number already gets none.
MOST_NUMBERED = SENDERS_TOPICS

REASONS = {
    ERR_EMPTY: "the frame is empty",
    ERR_SYNTAX: "neither JSON nor MessagePack",
    ERR_DEPTH: f"nested deeper than {MAX_DEPTH}",
    ERR_NOT_EVENT: "an event must be a map with string keys",
    ERR_EVENT_TYPE: f"event_type is missing or not a string of 1 to {MAX_TOPIC_SIZE} bytes of UTF-8 without control characters",
    ERR_TOO_MANY: "more events than one frame may hold",
    ERR_MEMORY: "out of memory",
}


cdef uint32_t hash_bytes(const uint8_t *p, size_t n) noexcept nogil:
    """FNV-1a, 32 bit; never 0, which means "none" in an index. Part of the tape's format."""
    cdef uint32_t h = 2166136261u
    cdef size_t i
    for i in range(n):
        h = (h ^ p[i]) * 16777619u
    return h if h else 1


cdef class Topics:
    """Event type names and their numbers, kept in step with the tape; see the .pxd for ownership."""

    def __cinit__(self):
        self.count = 0
        self.alias_mask = 1023
        self.aliases = <uint32_t *>calloc(self.alias_mask + 1, sizeof(uint32_t))
        if self.aliases == NULL:
            raise MemoryError

    def __dealloc__(self):
        cdef int i
        for i in range(1, self.count + 1):
            free(self.names[i])
        free(self.aliases)

    cdef uint16_t find(self, const uint8_t *name, size_t size, int limit) noexcept nogil:
        """The number of a name, given now if it is new and fewer than `limit` have one; else 0."""
        cdef uint32_t i = hash_bytes(name, size) & (MAX_TOPICS * 2 - 1)
        cdef uint16_t t = self.slots[i]
        while t:
            if self.sizes[t] == size and memcmp(self.names[t], name, size) == 0:
                return t
            i = (i + 1) & (MAX_TOPICS * 2 - 1)
            t = self.slots[i]
        if self.closed or self.count >= limit:
            return 0
        t = self.count + 1
        self.names[t] = <uint8_t *>malloc(size)
        if self.names[t] == NULL:
            return 0
        memcpy(self.names[t], name, size)
        self.sizes[t] = size
        self.slots[i] = t
        self.count = t
        return t

    cdef bint is_alias(self, uint16_t topic, uint32_t key) noexcept nogil:
        cdef uint32_t want = key ^ (topic * 2654435761u)
        cdef uint32_t i = want & self.alias_mask
        while self.aliases[i]:
            if self.aliases[i] == want:
                return True
            i = (i + 1) & self.alias_mask
        return False

    def load(self, dict known):
        """Take over the numbering found on the tape (id -> name); only on an empty table."""
        if self.count:
            raise ValueError("the topic table is not empty")
        for number in sorted(known):
            if self.add(known[number]) != number:
                raise ValueError(f"the tape's topic table has a hole before {number}")

    def add(self, str name):
        """The number of `name`, given now if it is new; 0 when the table is full."""
        cdef bytes raw = name.encode()
        if not 1 <= len(raw) <= MAX_TOPIC_SIZE:
            raise ValueError(f"an event type has 1 to {MAX_TOPIC_SIZE} bytes, got {len(raw)}")
        return self.find(raw, len(raw), MAX_TOPICS - 1)

    def register(self, str name, aliases=()):
        """Mark `name` as a typed event type whose payload may spell fields as in `aliases`."""
        cdef uint16_t topic = self.add(name)
        cdef uint32_t want, i
        cdef bytes raw
        if topic == 0:
            return 0  # decoded one by one, by name
        self.typed[topic] = 1
        for alias in aliases:
            raw = alias.encode()
            want = hash_bytes(raw, len(raw)) ^ (topic * 2654435761u)
            if self.n_aliases * 2 > self.alias_mask:
                # the search for an unknown key ends at a free place, so half of them stay free
                self._grow_aliases()
            i = want & self.alias_mask
            while self.aliases[i] and self.aliases[i] != want:
                i = (i + 1) & self.alias_mask
            self.n_aliases += self.aliases[i] == 0
            self.aliases[i] = want
            self.has_alias[topic] = 1
        return topic

    def _grow_aliases(self):
        cdef uint32_t mask = self.alias_mask * 2 + 1, i, k
        cdef uint32_t *larger = <uint32_t *>calloc(mask + 1, sizeof(uint32_t))
        if larger == NULL:
            raise MemoryError
        for k in range(self.alias_mask + 1):
            if self.aliases[k]:
                i = self.aliases[k] & mask
                while larger[i]:
                    i = (i + 1) & mask
                larger[i] = self.aliases[k]
        free(self.aliases)
        self.aliases = larger
        self.alias_mask = mask

    def name(self, int number):
        """The name of topic `number`; ``""`` for 0, the types beyond the table's size."""
        if not 1 <= number <= self.count:
            return ""
        return self.names[number][:self.sizes[number]].decode("utf-8", "replace")

    def after(self, int number):
        """Names numbered above `number`, by number."""
        return {i: self.name(i) for i in range(number + 1, self.count + 1)}

    def __len__(self):
        return self.count


# -- what one event is made of ------------------------------------------------------------------

cdef struct scan_t:
    const uint8_t *end
    uint8_t flags
    int error
    uint32_t keys[64]     # hashes of the payload's own keys
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
        s.keys[s.n_keys] = hash_bytes(p, n)
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


cdef bint is_utf8(const uint8_t *p, size_t n) noexcept nogil:
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


cdef bint is_name(const uint8_t *p, size_t n) noexcept nogil:
    cdef size_t i
    for i in range(n):
        if p[i] < 0x20 or p[i] == 0x7f:
            return False
    return is_utf8(p, n)


cdef int finish(Topics topics, scan_t *s, item_t *item, const uint8_t *name, size_t name_size) noexcept nogil:
    cdef uint32_t i
    if name == NULL or name_size < 1 or name_size > MAX_TOPIC_SIZE:
        return ERR_EVENT_TYPE
    item.topic = topics.find(name, name_size, 0)
    if item.topic == 0:
        # a name is proved once, when it is new: what is stored must read back as it was written
        if not is_name(name, name_size):
            return ERR_EVENT_TYPE
        item.topic = topics.find(name, name_size, SENDERS_TOPICS)
    if topics.has_alias[item.topic]:
        for i in range(s.n_keys):
            if topics.is_alias(item.topic, s.keys[i]):
                s.flags |= ALIASED
                break
    item.flags |= s.flags
    return 0


# -- MessagePack --------------------------------------------------------------------------------

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


cdef inline const uint8_t *mp_count(const uint8_t *p, const uint8_t *end, uint8_t fix, uint8_t b16, uint32_t *n) noexcept nogil:
    """The header of an array (0x90, 0xdc) or map (0x80, 0xde) at `p`, or NULL."""
    if p >= end:
        return NULL
    if (p[0] & 0xf0) == fix:
        n[0] = p[0] & 15
        return p + 1
    if p[0] == b16 and end - p >= 3:
        n[0] = (p[1] << 8) | p[2]
        return p + 3
    if p[0] == b16 + 1 and end - p >= 5:
        n[0] = be32(p + 1)
        return p + 5
    return NULL


cdef inline void check_text(const uint8_t *p, size_t n, scan_t *s) noexcept nogil:
    if not is_ascii(p, n) and not is_utf8(p, n):
        s.flags |= NOT_UTF8


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


# -- JSON ---------------------------------------------------------------------------------------

cdef inline const uint8_t *js_space(const uint8_t *p, const uint8_t *end) noexcept nogil:
    while p < end and (p[0] == 32 or p[0] == 10 or p[0] == 13 or p[0] == 9):
        p += 1
    return p


cdef inline const uint8_t *js_string(const uint8_t *p, const uint8_t *end, bint *escaped) noexcept nogil:
    """The byte after the closing quote of the string whose opening quote is at `p`, or NULL."""
    p += 1
    while p < end:
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


# -- frames -------------------------------------------------------------------------------------

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
