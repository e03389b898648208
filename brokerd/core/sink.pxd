cimport cython
from libc.stdint cimport int64_t


cdef class Portion:
    cdef public object session
    cdef public bint receipt
    cdef public bytearray ids


cdef class Sink:
    cdef public int64_t messages
    cdef public int64_t size
    cdef public int64_t uncommitted
    cdef public int64_t next_seq
    cdef public int64_t first_seq
    cdef public int64_t most_messages
    cdef public int64_t most_size
    cdef public int64_t keys
    cdef public int64_t largest
    cdef public bytearray content
    cdef public bytearray sizes
    cdef public list portions
    cdef public dict own_keys
    cdef public dict own_ttls
    cdef public dict collecting

    cpdef begin(self)
    cpdef bint has_place(self, int64_t size) except -1
    @cython.locals(last=Portion)
    cpdef Portion portion(self, object session, bint receipt)
    cpdef mark(self, object session, object key, object ttl)
