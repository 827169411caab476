# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Event type names and the numbers they go by inside the bus and on the tape."""

from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy

#: A type that senders bring when so many have a number already gets none.
MOST_NUMBERED = SENDERS_TOPICS


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
            self.alias_shapes[topic] |= key_shape(raw, len(raw))
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
