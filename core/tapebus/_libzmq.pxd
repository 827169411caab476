# cython: language_level=3
"""The functions of the libzmq that pyzmq itself loaded, so that there is no second copy and no build dependency."""

from libc.stdint cimport uint64_t

# A zmq_msg_t: 64 bytes, owned by whoever initialised it until zmq_msg_close.
cdef struct msg_t:
    uint64_t opaque[8]

ctypedef int (*init_fn)(msg_t *) noexcept nogil
ctypedef int (*close_fn)(msg_t *) noexcept nogil
ctypedef int (*init_size_fn)(msg_t *, size_t) noexcept nogil
ctypedef int (*recv_fn)(msg_t *, void *, int) noexcept nogil
ctypedef void *(*data_fn)(msg_t *) noexcept nogil
ctypedef size_t (*size_fn)(msg_t *) noexcept nogil
ctypedef int (*more_fn)(const msg_t *) noexcept nogil
ctypedef const char *(*gets_fn)(const msg_t *, const char *) noexcept nogil
ctypedef int (*send_fn)(void *, const void *, size_t, int) noexcept nogil
ctypedef int (*get_fn)(void *, int, void *, size_t *) noexcept nogil
ctypedef int (*set_fn)(void *, int, const void *, size_t) noexcept nogil

cdef struct pollitem_t:
    void *socket
    int fd
    short events
    short revents

ctypedef int (*poll_fn)(pollitem_t *, int, long) noexcept nogil

cdef enum:
    DONTWAIT = 1
    SNDMORE = 2
    POLL_IN = 1
    RCVHWM = 24

cdef init_fn msg_init
cdef init_size_fn msg_init_size
cdef recv_fn msg_recv
cdef recv_fn msg_send
cdef data_fn msg_data
cdef size_fn msg_size
cdef more_fn msg_more
cdef close_fn msg_close
cdef gets_fn msg_gets
cdef send_fn zmq_send
cdef get_fn zmq_getsockopt
cdef poll_fn zmq_poll
cdef set_fn zmq_setsockopt
