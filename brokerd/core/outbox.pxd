from libc.stdint cimport int64_t

from brokerd.core.write_buffer cimport WriteBuffer


cdef class StreamOutbox(WriteBuffer):
    cdef public int64_t limit
    cdef public bint stalled
    cdef object _older
    cdef object _ends
    cdef int64_t _older_bytes
    cdef double _as_of
    cdef int64_t _head
    cdef readonly dict _left

    cpdef bint reserve(self, int64_t size, int64_t beyond=*) except -1
    cpdef list pieces(self)
    cpdef bint sent(self, int64_t size) except -1
    cpdef append(self, frame)
    cpdef extend(self, bytearray frames, int64_t size)
    cpdef put(self, queued)
    cdef _make_room(self, int64_t size)
    cdef _close_buffer(self)
    cdef _set_room(self)
    cdef bint _remove(self, int64_t size) except -1


cdef class FrameOutbox(WriteBuffer):
    cdef public int64_t limit
    cdef public bint stalled
    cdef object _begun
    cdef int64_t _head
    cdef object _plain
    cdef int64_t _plain_bytes
    cdef int64_t _plain_gone
    cdef object _kept
    cdef int64_t _waiting
    cdef public int64_t timed
    cdef double _as_of

    cpdef bint reserve(self, int64_t size, int64_t beyond=*) except -1
    cpdef list pieces(self)
    cpdef bint sent(self, int64_t size) except -1
    cpdef append(self, frame)
    cpdef extend(self, bytearray frames, int64_t size)
    cpdef put(self, queued)
    cdef _insert(self, queued)
