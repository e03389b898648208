cimport cython
from libc.stdint cimport int64_t

from brokerd.core.stored_message cimport Message


cdef class Consumer:
    cdef public object session
    cdef public object mailbox
    cdef public int64_t window
    cdef public int64_t window_bytes
    cdef public dict held
    cdef public int64_t held_bytes
    cdef public bint alone
    cdef public list acknowledged
    cdef public dict collecting

    cpdef bint fits(self, int64_t size) except -1
    cpdef hold(self, Message message, object now)
    @cython.locals(messages=list, size=int64_t, left=int64_t, message=Message)
    cpdef tuple first_of(
        self, object ready, int64_t most, object stop, int64_t most_bytes, object now_wall
    )
    @cython.locals(held=dict, all_held=dict, message=Message)
    cpdef hold_all(self, list messages, int64_t size, object now)
    cpdef bint acknowledge(self, object seq) except -1
    @cython.locals(messages=list, seqs=list, size=int64_t, all_held=dict, message=Message)
    cpdef tuple take_acknowledged(self)
    @cython.locals(message=Message)
    cpdef Message drop(self, object seq)
