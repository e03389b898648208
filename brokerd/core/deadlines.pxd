cimport cython
from libc.stdint cimport int64_t

cdef object ceil
cdef object heapify
cdef object heappop
cdef object heappush

cdef int64_t _SLOTS
cdef int64_t _STALE


cdef class Deadlines:
    cdef readonly dict _slots
    cdef readonly list _heap

    @cython.locals(slot=dict)
    cpdef add(self, double deadline, key)

    @cython.locals(slot=dict)
    cpdef discard(self, double deadline, key)
