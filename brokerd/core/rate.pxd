from libc.stdint cimport int64_t


cdef class Bucket:
    cdef double _at
    cdef double _per_second
    cdef double _tokens

    cpdef refill(self, double now)
    cpdef bint has(self, double amount)
    cpdef double level(self, double now)
    cpdef fill_to(self, double level, double now)
    cpdef take(self, double amount)
    cpdef double debt_s(self)


cdef class Meter:
    cdef Bucket _messages
    cdef Bucket _bytes
    cdef readonly int64_t changes

    cpdef bint allows(self, int64_t size, double now)
    cpdef double charge(self, int64_t size, double now)
