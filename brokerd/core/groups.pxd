cimport cython
from libc.stdint cimport int64_t

from brokerd.core.session cimport Session
from brokerd.core.topic_search cimport Matches
from brokerd.core.write_buffer cimport WriteBuffer


@cython.locals(member=Session, members=dict, chosen=list)
cpdef list choose_members(Matches matches, int64_t size)

@cython.locals(
    ordered=list, start=Py_ssize_t, member=Session, lightest=Session, outbox=WriteBuffer,
    examined=Py_ssize_t, waiting=int64_t
)
cpdef tuple choose_member(Matches matches, str group, int64_t turn, int64_t size, about=*)
