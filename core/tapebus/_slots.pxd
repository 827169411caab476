# cython: language_level=3
"""Where msgspec structs keep their fields, and reading one there."""

from cpython.object cimport PyObject

cdef extern from *:
    """
    #include <Python.h>
    #include <structmember.h>
    /* Where a msgspec struct keeps a field, -1 for none; the field's slot holds a strong reference. */
    static inline Py_ssize_t tb_slot(PyObject *descriptor) {
        if (!PyObject_TypeCheck(descriptor, &PyMemberDescr_Type)) return -1;
        return ((PyMemberDescrObject *)descriptor)->d_member->offset;
    }
    """
    Py_ssize_t tb_slot(object descriptor)


# Borrowed, for as long as the object lives and is frozen; NULL where nothing was set.
cdef inline PyObject *tb_get(object o, Py_ssize_t offset) noexcept:
    return (<PyObject **>(<char *><PyObject *>o + offset))[0]
