cimport cython

from brokerd.core.deadlines cimport Deadlines
from brokerd.core.flight cimport Flight, WaitingRequest
from brokerd.core.session cimport Session


cdef class DeliveredRequest:
    cdef public Session requester
    cdef public Session responder
    cdef public object id
    cdef public tuple key
    cdef public object deadline
    cdef public object kept
    cdef public bint pinned

    cpdef queued(self)


cdef class Requests:
    cdef public Deadlines deadlines
    cdef public dict freed
    cdef public long repeats

    @cython.locals(request=DeliveredRequest, newest=DeliveredRequest)
    cpdef find_unsent(self, Session requester, message_id, Session responder, deadline)
    @cython.locals(flight=Flight, request=DeliveredRequest)
    cpdef expect(self, Session requester, Session responder, message_id, deadline, frame=*, bint pinned=*)
    @cython.locals(requester=Session, incoming=dict, earlier=DeliveredRequest, alone=tuple, same_id=tuple)
    cpdef add(self, DeliveredRequest request)
    cpdef use_again(self, DeliveredRequest request)
    @cython.locals(flight=Flight, responder=Session)
    cpdef end(self, DeliveredRequest request)
    cpdef end_all(self, Session requester)
    cpdef wait(self, WaitingRequest request)
    cpdef end_wait(self, WaitingRequest request)
    cpdef note_room(self, client)
    @cython.locals(requester=Session, responder=Session, same_id=tuple, incoming=dict)
    cdef _forget(self, DeliveredRequest request)
    @cython.locals(request=DeliveredRequest)
    cdef _promote(self, DeliveredRequest ended, dict incoming)
    @cython.locals(flight=Flight)
    cdef _release(self, DeliveredRequest request)
