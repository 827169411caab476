# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The ring of received frames: filled by the ingest thread, packed into blocks by the tape thread.

One producer and one consumer, each with its own cursor; a third party (a plugin that emits, an
embedded caller) hands frames in through a mailbox that the ingest thread empties.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.ref cimport Py_INCREF, Py_XDECREF
from libc.math cimport INFINITY
from libc.stdint cimport int32_t
from libc.stdlib cimport calloc, free, malloc, qsort
from libc.string cimport memcpy, memset
from posix.unistd cimport close, read, write

from tapebus._blocks cimport (
    COLUMNS_SIZE, CORR_SIZE, HEAD_SIZE, MAX_WAIT_US, columns_at, columns_t, compare_corr, corr_t,
)
from tapebus._libzmq cimport msg_close
from tapebus._scan cimport UNTIMED

from tapebus.store import Block, Gap, ProducerBook
from tapebus.wire import PLACES, REASONS

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    int EFD_CLOEXEC

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout)
    short POLLIN

cdef void bell_ring(bell_t *bell) noexcept nogil:
    cdef uint64_t one = 1
    if tb_load(&bell.asleep):
        tb_store(&bell.asleep, 0)
        write(bell.fd, &one, 8)


cdef class Ring:
    """Frames between reception and tape. `entries` is a power of two; see the .pxd for who owns what.

    Not for several ingest threads or several tape threads. Must not be used in a forked child.
    """

    def __cinit__(self, Topics topics not None, int entries=65536, int64_t max_bytes=64 << 20,
                  uint64_t next_seq=1, uint32_t max_producers=262144):
        cdef int i
        if entries < 2 or entries & (entries - 1):
            raise ValueError(f"bus.ring_entries must be a power of two, got {entries}")
        self.topics = topics
        self.mask = entries - 1
        self.max_bytes = max_bytes
        self.next_seq = next_seq
        self.max_producers = max_producers
        self.tape_bell.fd = self.ingest_bell.fd = -1
        self.entries = <entry_t *>malloc(<size_t>entries * sizeof(entry_t))
        self.producers = <producer_t **>calloc(max_producers, sizeof(producer_t *))
        if self.entries == NULL or self.producers == NULL:
            raise MemoryError
        # Else their pages would be taken one by one during the first lap, which may last for hours and look like a leak.
        # `claim` clears each entry; zeros here would be optimised into a calloc, which takes no pages.
        memset(self.entries, 0xff, <size_t>entries * sizeof(entry_t))
        self.tape_bell.fd = eventfd(0, EFD_CLOEXEC)
        self.ingest_bell.fd = eventfd(0, EFD_CLOEXEC)
        if self.tape_bell.fd < 0 or self.ingest_bell.fd < 0:
            raise OSError("no file descriptor left for the ring's doorbells: raise the limit (ulimit -n)")
        # the ingest thread waits in poll together with its sockets: its bell always rings
        self.ingest_bell.asleep = 1
        pthread_mutex_init(&self.mail_lock, NULL)
        self.identities = {}
        self.books = []

    def __dealloc__(self):
        cdef mail_t *mail
        cdef uint32_t i
        if self.entries != NULL:
            while self.tail < self.head:
                Py_XDECREF(self.entries[self.tail & self.mask].unit)
                Py_XDECREF(self.entries[self.tail & self.mask].refused)
                self.release(&self.entries[self.tail & self.mask])
                self.tail += 1
        while self.mail_first != NULL:
            mail = self.mail_first
            self.mail_first = mail.next
            Py_XDECREF(mail.unit)
            free(mail.data)
            free(mail)
        if self.producers != NULL:
            for i in range(self.n_producers):
                free(self.producers[i])
        free(self.producers)
        free(self.entries)
        if self.tape_bell.fd >= 0:
            close(self.tape_bell.fd)
        if self.ingest_bell.fd >= 0:
            close(self.ingest_bell.fd)

    # -- ingest thread --------------------------------------------------------------------------

    cdef bint has_room(self, size_t size) noexcept nogil:
        return self.head - tb_load(&self.tail) <= <int64_t>self.mask and (
            tb_load(&self.bytes_in) + <int64_t>size <= self.max_bytes)

    cdef entry_t *claim(self, size_t size) noexcept nogil:
        """The next free entry, cleared, or NULL when the ring is full."""
        cdef entry_t *entry
        if not self.has_room(size):
            return NULL
        entry = &self.entries[self.head & self.mask]
        memset(entry, 0, sizeof(entry_t))
        return entry

    cdef void publish(self, entry_t *entry) noexcept nogil:
        tb_add(&self.bytes_in, <int64_t>entry.size)
        if not self.producers[entry.producer].sequenced:
            tb_add(&self.unnumbered_in, entry.n)
        self.received += entry.n
        tb_store(&self.head, self.head + 1)
        bell_ring(&self.tape_bell)

    cdef mail_t *take_mail(self) noexcept nogil:
        """Everything in the mailbox, oldest first; the caller owns the list."""
        cdef mail_t *mail
        pthread_mutex_lock(&self.mail_lock)
        mail = self.mail_first
        self.mail_first = self.mail_last = NULL
        pthread_mutex_unlock(&self.mail_lock)
        return mail

    # -- any thread -----------------------------------------------------------------------------

    def inject(self, bytes frame not None, uint32_t producer, unit=None):
        """Hand one frame of events in from Python; it is sequenced after what was received before.

        `unit` travels with the frame and is committed with it. An empty frame carries only its unit.
        """
        cdef mail_t *mail = <mail_t *>calloc(1, sizeof(mail_t))
        cdef size_t size = len(frame)
        cdef uint64_t one = 1
        if mail == NULL:
            raise MemoryError
        # not a byte more than the frame, so that a sanitizer sees one that is read beyond its end
        mail.data = malloc(size if size else 1)
        if mail.data == NULL:
            free(mail)
            raise MemoryError
        memcpy(mail.data, PyBytes_AS_STRING(frame), size)
        mail.size = size
        mail.producer = producer
        if unit is not None:
            Py_INCREF(unit)
            mail.unit = <PyObject *>unit
        pthread_mutex_lock(&self.mail_lock)
        if self.mail_last == NULL:
            self.mail_first = mail
        else:
            self.mail_last.next = mail
        self.mail_last = mail
        pthread_mutex_unlock(&self.mail_lock)
        tb_add(&self.mail_count, 1)
        write(self.ingest_bell.fd, &one, 8)

    def producer(self, bytes producer_id not None, uint64_t epoch, str source="", book=None, bint sequenced=True):
        """The index of a producer's account, opened now if it is new; ``-1`` when the table is full.

        `book` (a `ProducerBook`) carries the account over from the tape.
        """
        cdef producer_t *account
        key = (producer_id, epoch)
        index = self.identities.get(key)
        if index is not None:
            return index
        if self.n_producers >= self.max_producers:
            return -1
        account = <producer_t *>calloc(1, sizeof(producer_t))
        if account == NULL:
            raise MemoryError
        if len(producer_id) != 16:
            free(account)
            raise ValueError("a producer id has 16 bytes")
        memcpy(account.id, PyBytes_AS_STRING(producer_id), 16)
        account.epoch = epoch
        account.sequenced = sequenced
        if book is None:
            book = ProducerBook(producer_id, epoch, source)
        account.accepted = account.watermark = book.watermark
        account.durable = <int64_t>book.watermark
        account.highest = <int64_t>max(book.highest_seq, book.watermark)
        account.stored = book.stored
        for code, name in REASONS.items():
            account.rejected[code] = book.rejected.get(name, 0)
        for code, name in PLACES.items():
            account.dropped[code] = book.dropped.get(name, 0)
        index = self.n_producers
        self.producers[index] = account
        self.books.append(book)
        self.identities[key] = index
        self.n_producers = index + 1
        return index

    def account(self, uint32_t index):
        """A snapshot of one account as a `ProducerBook`."""
        cdef producer_t *p = self.producers[index]
        cdef uint64_t watermark, stored
        book = self.books[index]
        # the tape thread may be in the middle of it: what does not add up is looked at again
        for _ in range(1000):
            watermark, stored = p.watermark, p.stored
            rejected = {name: p.rejected[code] for code, name in REASONS.items() if p.rejected[code]}
            dropped = {name: p.dropped[code] for code, name in PLACES.items() if p.dropped[code]}
            if stored + sum(rejected.values()) + sum(dropped.values()) == watermark == p.watermark:
                break
        return ProducerBook(
            book.producer_id, book.epoch, book.source, watermark, stored,
            max(<uint64_t>tb_load(&p.highest), watermark),
            rejected, dropped, book.seen_at, list(book.gaps), book.last_bus_seq,
        )

    def uneven(self):
        """Indexes of the accounts that hold more than stored events: something refused, dropped or unexplained.

        A commit under way may add one for a moment; cheap with any number of accounts.
        """
        cdef uint32_t i
        return [i for i in range(self.n_producers) if self.producers[i].watermark != self.producers[i].stored]

    def is_sequenced(self, uint32_t index):
        """Whether the producer numbers its events itself."""
        return bool(self.producers[index].sequenced)

    @property
    def fill(self):
        """(entries, bytes) now in the ring."""
        return tb_load(&self.head) - tb_load(&self.tail), tb_load(&self.bytes_in)

    @property
    def received_count(self):
        return self.received

    @property
    def last_seq(self):
        """The last ``bus_seq`` given."""
        return self.next_seq - 1

    def stop(self):
        """Let the tape thread finish: `pack` returns what is left, then None."""
        cdef uint64_t one = 1
        tb_store(&self.stopping, 1)
        tb_store(&self.tape_bell.asleep, 0)
        write(self.tape_bell.fd, &one, 8)

    def wake_tape(self):
        """Let `wait` return early, for work that is not in the ring."""
        cdef uint64_t one = 1
        tb_store(&self.tape_bell.asleep, 0)
        write(self.tape_bell.fd, &one, 8)

    # -- tape thread ----------------------------------------------------------------------------

    def wait(self, int timeout_ms=-1):
        """Sleep until there is something to pack, the ring stops or the time is over."""
        cdef pollfd p
        cdef uint64_t count
        with nogil:
            tb_store(&self.tape_bell.asleep, 1)
            if tb_load(&self.head) == self.tail and not tb_load(&self.stopping):
                p.fd = self.tape_bell.fd
                p.events = POLLIN
                p.revents = 0
                if poll(&p, 1, timeout_ms) > 0:
                    read(self.tape_bell.fd, &count, 8)
            tb_store(&self.tape_bell.asleep, 0)
        return tb_load(&self.head) != self.tail

    @property
    def stopped(self):
        return tb_load(&self.stopping) != 0 and tb_load(&self.head) == self.tail

    cdef void release(self, entry_t *entry) noexcept nogil:
        if entry.has_msg:
            msg_close(&entry.msg)
            entry.has_msg = 0
        free(entry.owned)
        entry.owned = NULL
        if entry.items != &entry.one:
            free(entry.items)
        entry.items = NULL

    def pack(self, size_t max_bytes=512 << 10, uint32_t max_events=16384):
        """Take what has arrived, at most about `max_bytes`, as ``(block | None, units, producer indexes)``.

        None when the ring is empty. The frames are released; their bytes live on in the block.
        """
        cdef int64_t first = self.tail, last = first, head
        cdef size_t size = 0
        cdef uint32_t count = 0, n_corr = 0, i
        cdef int64_t before = 0
        cdef entry_t *entry
        cdef bint has_units = False
        head = tb_load(&self.head)
        if head == first:
            return None
        # with the GIL: to get it back from a busy dispatcher would take longer than this
        while last < head and (last == first or (size < max_bytes and count < max_events)):
            entry = &self.entries[last & self.mask]
            if entry.n:
                # what the wait column cannot tell begins a block of its own
                if before and not 0 <= entry.received_us - before <= <int64_t>MAX_WAIT_US:
                    break
                before = entry.received_us
            count += entry.n
            for i in range(entry.n):
                size += entry.items[i].size
                n_corr += entry.items[i].corr != 0
            if entry.unit != NULL:
                has_units = True
            last += 1
        block = self._fill(first, last, count, size, n_corr) if count else None
        units = []
        if has_units:
            for j in range(first, last):
                entry = &self.entries[j & self.mask]
                if entry.unit != NULL:
                    units.append(<object>entry.unit)
                    Py_XDECREF(entry.unit)
                    entry.unit = NULL
        changed = self._settle(first, last)
        return block, units, changed

    def _fill(self, int64_t first, int64_t last, uint32_t count, size_t size, uint32_t n_corr):
        cdef columns_t to
        cdef entry_t *entry
        cdef item_t *item
        cdef uint32_t i, k = 0, c = 0, begun, ended
        cdef uint8_t *out
        cdef corr_t *run
        cdef int64_t j, before
        cdef uint64_t topics = 0
        cdef double low = 0, high = 0, received = 0
        cdef bint timed = False, untimed = False
        cdef int urgent = 0
        payload = PyBytes_FromStringAndSize(NULL, HEAD_SIZE + <size_t>COLUMNS_SIZE * count + size)
        corr = PyBytes_FromStringAndSize(NULL, <size_t>CORR_SIZE * n_corr)
        columns_at(<uint8_t *>PyBytes_AS_STRING(payload), count, &to)
        run = <corr_t *>PyBytes_AS_STRING(corr)
        with nogil:
            to.head.count = count
            to.head.reserved = 0
            to.head.data_size = size
            before = 0
            out = to.data
            for j in range(first, last):
                entry = &self.entries[j & self.mask]
                if entry.n == 0:
                    continue
                if before == 0:
                    to.head.base_us = entry.received_us
                    before = entry.received_us
                begun = ended = entry.items[0].offset
                for i in range(entry.n):
                    item = &entry.items[i]
                    if item.offset != ended:
                        memcpy(out, entry.data + begun, ended - begun)
                        out += ended - begun
                        begun = item.offset
                    ended = item.offset + item.size
                    to.size[k] = item.size
                    to.wait_us[k] = <uint32_t>(entry.received_us - before)
                    before = entry.received_us
                    to.topic[k] = item.topic
                    to.flags[k] = item.flags
                    to.priority[k] = item.priority
                    urgent += item.priority > 1
                    topics |= <uint64_t>1 << (item.topic & 63)
                    if not item.flags & UNTIMED:
                        if not timed or item.time < low:
                            low = item.time
                        if not timed or item.time > high:
                            high = item.time
                        timed = True
                    else:
                        untimed = True
                    if item.corr:
                        run[c].hash = item.corr
                        run[c].offset = k
                        c += 1
                    k += 1
                memcpy(out, entry.data + begun, ended - begun)
                out += ended - begun
            qsort(run, n_corr, CORR_SIZE, compare_corr)
            received = to.head.base_us / 1e6
        first_seq = self.next_seq
        self.next_seq += count
        if untimed:
            # a time in words is read by the typed decode only: until then it may be any
            low, high = -INFINITY, INFINITY
        return Block(first_seq, count, low, high, received, before / 1e6, topics, payload, corr, urgent)

    def _settle(self, int64_t first, int64_t last):
        """Update the accounts and release the entries; the indexes of the producers that changed."""
        cdef entry_t *entry
        cdef int64_t j
        cdef double received = self.entries[(last - 1) & self.mask].received_us / 1e6
        changed = []
        for j in range(first, last):
            entry = &self.entries[j & self.mask]
            if entry.refused != NULL:
                self._note_refused(entry)
            if entry.kind != FRAME and self.producers[entry.producer].sequenced:
                self._note_gap(entry)
            if not self.producers[entry.producer].dirty:
                self.producers[entry.producer].dirty = 1
                changed.append(<int>entry.producer)
        if last - first > MANY_ENTRIES:
            with nogil:
                self._release(first, last)
        else:
            # to get the GIL back from a busy dispatcher would take longer than this
            self._release(first, last)
        for index in changed:
            self.producers[<uint32_t>index].dirty = 0
            self.books[index].last_bus_seq = self.next_seq - 1
            self.books[index].seen_at = received
        return changed

    cdef void _release(self, int64_t first, int64_t last) noexcept nogil:
        cdef entry_t *entry
        cdef producer_t *account
        cdef int64_t j, size = 0, unnumbered = 0
        for j in range(first, last):
            entry = &self.entries[j & self.mask]
            account = self.producers[entry.producer]
            if entry.kind == FRAME:
                account.stored += entry.n
                # of the same frame, but its producer may not publish them
                account.rejected[entry.code] += entry.count
            elif entry.kind == GAP:
                account.dropped[entry.code] += entry.count
            else:
                account.rejected[entry.code] += entry.count
            if account.sequenced:
                account.watermark = entry.producer_seq
            else:
                account.watermark += entry.n + entry.count
                unnumbered += entry.n
            size += entry.size
            self.release(entry)
        tb_add(&self.bytes_in, -size)
        tb_add(&self.unnumbered_in, -unnumbered)
        tb_store(&self.tail, last)

    cdef _note_refused(self, entry_t *entry):
        ranges = <list>entry.refused
        Py_XDECREF(entry.refused)
        entry.refused = NULL
        for first, last, code in ranges:
            self.books[entry.producer].note_gap(Gap(first, last, REASONS[code], entry.received_us / 1e6))

    cdef _note_gap(self, entry_t *entry):
        names = PLACES if entry.kind == GAP else REASONS
        last = entry.producer_seq
        gap = Gap(last - entry.count + 1, last, names[entry.code], entry.received_us / 1e6)
        self.books[entry.producer].note_gap(gap)

    def acknowledge(self, list producers):
        """Declare everything packed so far of `producers` durable; the ingest thread then acknowledges."""
        cdef producer_t *account
        cdef uint64_t one = 1
        for index in producers:
            account = self.producers[<uint32_t>index]
            tb_store(&account.durable, <int64_t>account.watermark)
        write(self.ingest_bell.fd, &one, 8)
