# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The functions of the libzmq that pyzmq itself loaded, so that there is no second copy and no build dependency."""

import ctypes

from libc.stdint cimport uintptr_t

from zmq.backend.cython import _zmq

_library = ctypes.CDLL(_zmq.__file__)


cdef uintptr_t _address(str name) except 0:
    return ctypes.cast(getattr(_library, name), ctypes.c_void_p).value

msg_init = <init_fn>_address("zmq_msg_init")
msg_init_size = <init_size_fn>_address("zmq_msg_init_size")
msg_send = <recv_fn>_address("zmq_msg_send")
msg_recv = <recv_fn>_address("zmq_msg_recv")
msg_data = <data_fn>_address("zmq_msg_data")
msg_size = <size_fn>_address("zmq_msg_size")
msg_more = <more_fn>_address("zmq_msg_more")
msg_close = <close_fn>_address("zmq_msg_close")
msg_gets = <gets_fn>_address("zmq_msg_gets")
zmq_send = <send_fn>_address("zmq_send")
zmq_getsockopt = <get_fn>_address("zmq_getsockopt")
zmq_poll = <poll_fn>_address("zmq_poll")
zmq_setsockopt = <set_fn>_address("zmq_setsockopt")
