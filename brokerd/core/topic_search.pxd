cimport cython
from libc.stdint cimport int64_t


cdef class Node:
    cdef str _token
    cdef Node _child
    cdef dict _more
    cdef public dict members
    cdef readonly str pattern

    cpdef Node follow(self, str token)
    cpdef Node grow(self, str token)
    @cython.locals(node=Node)
    cpdef Node grow_to(self, str pattern)
    @cython.locals(
        emptied=list, path=list, tokens=list, token=str, end=Node, child=Node, node=Node,
        members=dict, joined=set
    )
    cpdef tuple remove(self, str pattern, member, group)
    cpdef cut(self, str token)


cdef class Matches:
    cdef readonly tuple everyone
    cdef readonly dict groups
    cdef readonly set left
    cdef public int64_t size
    cdef public int64_t turn
    cdef public tuple fanout
    cdef readonly bint has_remote
    cdef public bint is_plain
    cdef public bint used
    cdef readonly str publisher
    cdef readonly set publishers
    cdef dict _ordered

    cpdef permit(self, str rules)
    cpdef bint permits(self, str rules)
    cpdef list members_of(self, str group)


cdef class MatchCounts:
    cdef readonly dict everyone
    cdef readonly dict groups
    cdef readonly set left
    cdef int64_t _count

    cpdef add(self, member, group)
    cpdef drop(self, member, group)
    cpdef leave(self, member)
    cpdef Matches finish(self)


cdef class TopicSearch:
    cdef public int64_t asked_at
    cdef int64_t depth
    cdef readonly dict groups
    cdef list level
    cdef Py_ssize_t level_done
    cdef readonly MatchCounts matches
    cdef readonly object member
    cdef readonly dict members
    cdef list next_level
    cdef readonly Node node
    cdef readonly dict nodes
    cdef readonly set seen
    cdef list tokens
    cdef readonly str topic

    cpdef bint has_passed(self, node, member, group)
    cpdef leave(self, member)
    @cython.locals(visited=int64_t, node=Node, remainder=Node, exact=Node, star=Node, level=list)
    cpdef int64_t walk(self, int64_t count) except -1
    @cython.locals(visited=int64_t, members=dict, joined=set)
    cpdef int64_t look_up(self, int64_t count, departed, restricted) except -1
