from libc.stdint cimport int64_t

cimport cython

from brokerd.core.flight cimport Flight, WaitingRequest
from brokerd.core.requests cimport DeliveredRequest, Requests
from brokerd.core.session cimport Session


cdef class InFlight:
    cdef readonly Requests _requests
    cdef readonly object _replies
    cdef readonly object _held
    cdef readonly object _undeliverable
    cdef readonly object _orphaned

    cpdef fail(self, WaitingRequest request, code, reason)
    cpdef wait(self, client, WaitingRequest request, Session member=*, bint first=*)
    @cython.locals(
        flight=Flight, delivered=int64_t, member=Session, picked=Session, request=WaitingRequest
    )
    cpdef dispatch(self, client)
    @cython.locals(requester=Session)
    cdef bint _deliver(self, Session member, WaitingRequest request) except -1
