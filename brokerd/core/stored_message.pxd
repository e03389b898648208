cimport cython
from libc.stdint cimport int64_t


cdef class Message:
    cdef public object seq
    cdef public bytes frame
    cdef public int64_t size
    cdef public object stored_at
    cdef public object expires_at
    cdef public object due_at
    cdef public int64_t attempts
    cdef public bint is_timed
    cdef public object held_since
    cdef public object avoid


cdef class DeadLetter(Message):
    pass


@cython.locals(messages=list, at=int64_t, message=Message)
cpdef list ready_messages(list seqs, list frames, list stored_at, list expires_at)

@cython.locals(
    frames=list, data=cython.p_const_char, total=int64_t, at=int64_t, size=int64_t, end=int64_t
)
cpdef list split_frames(bytes joined, int64_t start, object sizes)

@cython.locals(frames=list, message=Message)
cpdef bytes joined_frames(list messages)

@cython.locals(size=int64_t, attempts=int64_t, message=Message)
cpdef tuple totals_of(list messages)
