cimport cython
from libc.stdint cimport int64_t

from brokerd.core.topic_search cimport Matches


cdef class Branch:
    cdef bytes key
    cdef dict more


cdef class TopicCache:
    cdef readonly object topics
    cdef int64_t _size
    cdef Branch _root
    cdef list _old

    @cython.locals(branch=Branch, child=Branch, key=bytes)
    cpdef put(self, str topic, Matches matches)
    cpdef permit(self, Matches matches, str rules)
    @cython.locals(left=int64_t, keys=list, key=bytes)
    cpdef drop(self, patterns)
    cpdef clear(self)
    @cython.locals(branch=Branch)
    cpdef free(self, int64_t count)
    @cython.locals(matches=Matches)
    cdef _make_room(self, int64_t size)
    @cython.locals(matches=Matches, branch=Branch, path=list, tokens=list)
    cdef _remove(self, bytes key)
    @cython.locals(
        depth=Py_ssize_t, steps=int64_t, level=list, next_level=list, branch=Branch, child=Branch,
        tokens=list, more=dict
    )
    cdef int64_t _find(self, str pattern, int64_t limit, list keys) except -1
