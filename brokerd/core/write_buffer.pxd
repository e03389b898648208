from libc.stdint cimport int64_t

from brokerd.core.rate cimport Meter
from brokerd.core.sink cimport Sink


cdef class WriteBuffer:
    cdef public bytearray content
    cdef public int64_t room
    cdef public int64_t frames
    cdef public int64_t size
    cdef public bint touched
    cdef public object owner
    cdef bint _blocked
    cdef public bint is_remote
    cdef public bint is_stream
    cdef public int64_t base
    cdef public object marks

    cpdef bint reserve(self, int64_t size, int64_t beyond=*) except -1
    cpdef list pieces(self)
    cpdef put(self, queued)
    cpdef append(self, frame)
    cpdef extend(self, bytearray frames, int64_t size)
    cpdef bint sent(self, int64_t size) except -1


cdef class RouteEntry:
    cdef public WriteBuffer direct
    cdef public list ring
    cdef public int64_t turn
    cdef public object flight
    cdef public Meter meter
    cdef public int64_t request_limit
    cdef public str publish_rules
    cdef public Sink sink
    cdef public bint is_pool
    cdef public bint is_pinned
