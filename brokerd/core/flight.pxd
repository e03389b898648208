from libc.stdint cimport int64_t

cimport cython

from brokerd.core.session cimport Session


cdef class WaitingRequest:
    cdef public Session requester
    cdef public object id
    cdef public str to
    cdef public object queued
    cdef public Session returned_by
    cdef public object flight
    cdef public object row


cdef class Flight:
    cdef readonly dict _members
    cdef readonly dict _remote
    cdef readonly dict _counts
    cdef object _returned
    cdef object _shared
    cdef dict _pinned
    cdef public int64_t size
    cdef public bint stalled
    cdef public bint holds_senders
    cdef public int64_t retained
    cdef public int64_t returnable
    cdef public object on_free_or_busy

    @cython.locals(count=int64_t, rows=dict)
    cpdef update(self, Session member)
    @cython.locals(member=Session, passed_over=Session)
    cpdef Session best(self, Session without=*)
    cpdef choose(self, Session member)
    @cython.locals(member=Session)
    cpdef Session pick(self, Session without=*)
    cpdef add(self, WaitingRequest request, Session member=*, bint first=*)
    cpdef discard(self, WaitingRequest request)
    @cython.locals(request=WaitingRequest)
    cpdef WaitingRequest first_for(self, Session member)
    cpdef bint has_room(self, Session member)
