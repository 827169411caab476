# cython: language_level=3
"""Fire and forget: frames that come without numbers and get no reply."""

from tapebus._intake cimport Intake, source_t

cdef void read_frames(Intake intake, source_t *source) noexcept nogil
