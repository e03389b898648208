from libc.stdint cimport int64_t

from brokerd.core.write_buffer cimport RouteEntry, WriteBuffer


cdef class Session:
    cdef public str address
    cdef public object allowance
    cdef public WriteBuffer answers
    cdef public double arrived
    cdef public int64_t bytes_in
    cdef public object bytes_to_skip
    cdef public bint cancels
    cdef public bint charged
    cdef public RouteEntry client
    cdef public int64_t closed_number
    cdef public str closing
    cdef public object closing_code
    cdef public object connection
    cdef public object consumer
    cdef public bint cut
    cdef public int64_t errors_in
    cdef public bint finished
    cdef public object finishing
    cdef public int64_t generation
    cdef public bint goaway
    cdef public bint goaway_sent
    cdef public object held_by
    cdef public object hold_deadline
    cdef public str host
    cdef public bytes identity
    cdef public object in_flight
    cdef public dict incoming_requests
    cdef public str instance
    cdef public bint listens
    cdef public int64_t marked_at
    cdef public object marks
    cdef public int64_t messages_in
    cdef public bint mute
    cdef public int64_t number
    cdef public bint open
    cdef public WriteBuffer outbox
    cdef public int64_t outgoing_count
    cdef public dict outgoing_requests
    cdef public bint parting
    cdef public str peer
    cdef public object rank
    cdef public object reached_by_event
    cdef public set recipients
    cdef public bint retired
    cdef public set revoked
    cdef public RouteEntry route
    cdef public dict routes
    cdef public bytes sender_header
    cdef public double since
    cdef public bint slow
    cdef public object spread
    cdef public set subscriptions
    cdef public int64_t uncommitted
    cdef public dict waiters
    cdef public int64_t waiting_count
    cdef public dict waiting_requests
    cdef public int64_t widest

    cpdef dict known_routes(self, int64_t generation)
