# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""The compiled twin of ``_routing_py``, with the same behaviour and the same names.

Before each read, its offset is checked: ``start <= offset < end <= len(buffer)``. A run
of messages to one recipient is written into its write buffer without going back to
Python in between. While a run is open, the size of ``content`` is not the number of
bytes written. ``_Run.close`` corrects it before any other code reads the buffer.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE, PyByteArray_Resize
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_GetItem
from cpython.object cimport PyObject
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from brokerd.core.slow_path import handle_slow_path
from brokerd.core.routing_result import RoutingResult

NAME = "compiled"

cdef extern from "Python.h":
    # From CPython's public headers: the allocated bytes, and the first byte in use.
    ctypedef struct PyByteArrayObject:
        Py_ssize_t ob_alloc
        char* ob_bytes
        char* ob_start
    void Py_SET_SIZE(object, Py_ssize_t)

cdef object _NEXT = RoutingResult.CONSUMED
# The layout of wire.layout, counted from the first byte of a frame's length.
cdef enum:
    LENGTH_SIZE = 4
    KIND_OFFSET = 4
    FLAGS_OFFSET = 5
    CODEC_OFFSET = 6
    NAME_SIZE_OFFSET = 7
    ID_OFFSET = 8
    ID_SIZE = 8
    HEAD_SIZE = 16
    MESSAGE = 1
    EVENT = 5

# For the test that compares these numbers with wire.layout.
LAYOUT = {
    "length_size": LENGTH_SIZE,
    "kind_offset": KIND_OFFSET,
    "flags_offset": FLAGS_OFFSET,
    "codec_offset": CODEC_OFFSET,
    "name_size_offset": NAME_SIZE_OFFSET,
    "id_offset": ID_OFFSET,
    "id_size": ID_SIZE,
    "head_size": HEAD_SIZE,
    "message": MESSAGE,
    "event": EVENT,
}


cdef class WriteBuffer:
    """The end of an outbox, where the loop writes; see ``_routing_py.WriteBuffer``."""

    cdef public bytearray content
    cdef public int64_t room
    cdef public int64_t frames
    cdef public int64_t size
    cdef public bint touched
    cdef public object owner

    def __init__(self):
        self.content = bytearray()
        self.room = 0
        self.frames = 0
        self.size = 0
        self.touched = False
        self.owner = None

    def reserve(self, size, beyond=0):
        """Return whether ``size`` more bytes may be appended to ``content`` now."""
        raise NotImplementedError


cdef class RouteEntry:
    """A recipient in the route caches; see ``_routing_py.RouteEntry``."""

    cdef public WriteBuffer direct

    def __init__(self):
        self.direct = None


cdef class _Run:
    """Consecutive messages to one recipient.

    written: bytes of ``content`` that are in use; the bytearray is longer while the run
        is open.
    """

    cdef WriteBuffer target
    cdef bytearray content
    cdef char* bytes
    cdef int64_t written
    cdef int64_t allocated
    cdef int64_t frames
    cdef int64_t size
    cdef list touched

    cdef int open(self, WriteBuffer target) except -1:
        self.target = target
        self.content = target.content
        self.written = PyByteArray_GET_SIZE(self.content)
        self._look()
        self.frames = self.size = 0
        return 0

    cdef void _look(self) noexcept:
        cdef PyByteArrayObject* inside = <PyByteArrayObject*>self.content
        self.bytes = PyByteArray_AS_STRING(self.content)
        # The last byte is for the NUL that CPython keeps behind a bytearray.
        self.allocated = inside.ob_alloc - (inside.ob_start - inside.ob_bytes) - 1

    cdef int close(self) except -1:
        cdef WriteBuffer target = self.target
        if target is None:
            return 0
        self.target = None
        # Within what is allocated: CPython need not move or cut anything.
        Py_SET_SIZE(self.content, self.written)
        if self.frames:
            self.bytes[self.written] = 0
            target.frames += self.frames
            target.size += self.size
            if not target.touched:
                target.touched = True
                self.touched.append(target.owner)
        self.content = None
        return 0

    cdef int grow(self, int64_t size) except -1:
        """Allocate memory for ``size`` more bytes, for which the quota has room."""
        cdef int64_t needed = self.written + size
        Py_SET_SIZE(self.content, self.written)
        PyByteArray_Resize(self.content, max(needed, min(2 * needed, self.target.room)))
        self._look()
        return 0


cdef inline void _write_head(
    char* at,
    int64_t size_out,
    uint8_t kind,
    uint8_t codec,
    const char* sender_header,
    Py_ssize_t sender_header_size,
    const uint8_t* message_id,
) noexcept:
    """Write length, header and the sender's address: 16 + sender_header_size bytes."""
    cdef uint32_t length = <uint32_t>(size_out - LENGTH_SIZE)
    at[0] = <char>(length >> 24)
    at[1] = <char>((length >> 16) & 0xFF)
    at[2] = <char>((length >> 8) & 0xFF)
    at[3] = <char>(length & 0xFF)
    at[KIND_OFFSET] = <char>kind
    at[FLAGS_OFFSET] = 0
    at[CODEC_OFFSET] = <char>codec
    at[NAME_SIZE_OFFSET] = <char>sender_header_size
    memcpy(at + ID_OFFSET, message_id, ID_SIZE)
    memcpy(at + HEAD_SIZE, sender_header, sender_header_size)


cdef inline int64_t _signed_length(const uint8_t* at) noexcept:
    """Read a big-endian signed 32-bit number."""
    # Shifted as unsigned: a byte shifted into the sign bit of an int is undefined in C.
    return <int32_t>(
        (<uint32_t>at[0] << 24)
        | (<uint32_t>at[1] << 16)
        | (<uint32_t>at[2] << 8)
        | <uint32_t>at[3]
    )


cdef class _Fanout:
    """Consecutive events to the same recipients.

    They are encoded once, and copied into each write buffer when the run ends.

    left: bytes for which every write buffer still has room.
    """

    cdef tuple targets
    cdef bytearray encoded
    cdef char* bytes
    cdef int64_t written
    cdef int64_t allocated
    cdef int64_t left
    cdef int64_t frames
    cdef list touched

    cdef int open(self, tuple targets) except -1:
        cdef Py_ssize_t index
        cdef int64_t left
        cdef WriteBuffer target
        self.targets = targets
        self.encoded = bytearray()
        self.written = self.allocated = self.frames = 0
        self.left = INT64_MAX
        for index in range(PyTuple_GET_SIZE(targets)):
            target = <WriteBuffer>PyTuple_GET_ITEM(targets, index)
            left = target.room - PyByteArray_GET_SIZE(target.content)
            if left < self.left:
                self.left = left
        return 0

    cdef int close(self) except -1:
        cdef Py_ssize_t index, at
        cdef WriteBuffer target
        cdef tuple targets = self.targets
        if targets is None:
            return 0
        self.targets = None
        if self.frames:
            for index in range(PyTuple_GET_SIZE(targets)):
                target = <WriteBuffer>PyTuple_GET_ITEM(targets, index)
                at = PyByteArray_GET_SIZE(target.content)
                PyByteArray_Resize(target.content, at + self.written)
                memcpy(PyByteArray_AS_STRING(target.content) + at, self.bytes, self.written)
                target.frames += self.frames
                target.size += self.written
                if not target.touched:
                    target.touched = True
                    self.touched.append(target.owner)
        self.encoded = None
        return 0

    cdef bint has_room(self, int64_t size) except -1:
        """Return whether one more event of ``size`` bytes fits into every write buffer.

        The run may be ended, and begun again, to find that out.
        """
        cdef Py_ssize_t index, at
        cdef WriteBuffer target
        cdef tuple targets = self.targets
        if size <= self.left:
            return True
        self.close()
        for index in range(PyTuple_GET_SIZE(targets)):
            target = <WriteBuffer>PyTuple_GET_ITEM(targets, index)
            at = PyByteArray_GET_SIZE(target.content)
            if at + size > target.room and not target.reserve(size):
                return False
        self.open(targets)
        return True

    cdef char* add(self, int64_t size) except NULL:
        """Return where to write the next event of ``size`` bytes, which has room."""
        if self.written + size > self.allocated:
            self.allocated = max(self.written + size, 2 * self.allocated, 4096)
            PyByteArray_Resize(self.encoded, self.allocated)
            self.bytes = PyByteArray_AS_STRING(self.encoded)
        self.written += size
        self.left -= size
        self.frames += 1
        return self.bytes + self.written - size


def feed(broker, source, buffer, int64_t start, int64_t end, double now):
    """Route the whole frames in ``buffer[start:end]``; see ``_routing_py.feed``."""
    cdef Py_buffer view
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    cdef _Run run = _Run.__new__(_Run)
    cdef _Fanout fanout = _Fanout.__new__(_Fanout)
    run.touched = fanout.touched = broker.touched
    try:
        if not 0 <= start <= end <= view.len:
            raise ValueError("start and end lie outside the buffer")
        return _feed(broker, source, buffer, <const uint8_t*>view.buf, start, end, now, run, fanout)
    finally:
        run.close()
        fanout.close()
        PyBuffer_Release(&view)


cdef object _feed(
    broker,
    source,
    buffer,
    const uint8_t* data,
    int64_t start,
    int64_t end,
    double now,
    _Run run,
    _Fanout fanout,
):
    cdef int64_t position = start
    # Up to 2**64 - 1, the longest length that a frame may give.
    cdef uint64_t bytes_to_skip = source.bytes_to_skip
    cdef int64_t before, size, payload, size_out
    cdef int64_t messages = 0
    cdef int64_t size_in = 0
    cdef int64_t limit = broker.status.limits.max_message
    cdef bytes sender_header = source.sender_header
    cdef const char* sender_header_bytes = PyBytes_AS_STRING(sender_header)
    cdef Py_ssize_t sender_header_size = PyBytes_GET_SIZE(sender_header)
    cdef const uint8_t* at
    cdef const uint8_t* last_name = NULL
    cdef const uint8_t* last_topic = NULL
    cdef uint8_t last_size = 0
    cdef uint8_t last_topic_size = 0
    cdef uint8_t kind, name_size, topic_size
    cdef dict routes, fanouts
    cdef RouteEntry entry
    cdef PyObject* found
    cdef char* out
    cdef bint more = True
    result = _NEXT
    if bytes_to_skip:
        position += <int64_t>min(bytes_to_skip, <uint64_t>(end - start))
        source.bytes_to_skip = bytes_to_skip - <uint64_t>(position - start)
    routes, fanouts = source.caches(broker.status.generation, broker.topics.version)
    while end - position >= HEAD_SIZE:
        at = data + position
        size = _signed_length(at)
        kind, name_size = at[KIND_OFFSET], at[NAME_SIZE_OFFSET]
        payload = size - (HEAD_SIZE - LENGTH_SIZE) - name_size
        if at[FLAGS_OFFSET] == 0 and payload >= 0 and size <= end - position - LENGTH_SIZE:
            if kind == MESSAGE and payload <= limit:
                if (
                    last_name is NULL
                    or name_size != last_size
                    or memcmp(at + HEAD_SIZE, last_name, name_size) != 0
                ):
                    run.close()
                    fanout.close()
                    last_name = last_topic = NULL
                    found = PyDict_GetItem(
                        routes, PyBytes_FromStringAndSize(<const char*>at + HEAD_SIZE, name_size)
                    )
                    if found is not NULL:
                        entry = <RouteEntry>found
                        if entry.direct is not None:
                            run.open(entry.direct)
                            last_name, last_size = at + HEAD_SIZE, name_size
                if run.target is not None:
                    size_out = HEAD_SIZE + sender_header_size + payload
                    if run.written + size_out > run.target.room:
                        target = run.target
                        run.close()
                        if target.reserve(size_out):
                            run.open(target)
                        else:
                            last_name = NULL
                if run.target is not None:
                    if run.written + size_out > run.allocated:
                        run.grow(size_out)
                    out = run.bytes + run.written
                    _write_head(
                        out,
                        size_out,
                        MESSAGE,
                        at[CODEC_OFFSET],
                        sender_header_bytes,
                        sender_header_size,
                        at + ID_OFFSET,
                    )
                    memcpy(
                        out + HEAD_SIZE + sender_header_size,
                        at + HEAD_SIZE + name_size,
                        payload,
                    )
                    run.written += size_out
                    run.frames += 1
                    run.size += size_out
                    messages += 1
                    size_in += size
                    position += LENGTH_SIZE + size
                    continue
            elif (
                kind == EVENT
                and name_size == 0
                and 0 < payload <= limit
                and 1 + at[HEAD_SIZE] <= payload
            ):
                topic_size = at[HEAD_SIZE]
                if (
                    last_topic is NULL
                    or topic_size != last_topic_size
                    or memcmp(at + HEAD_SIZE + 1, last_topic, topic_size) != 0
                ):
                    run.close()
                    fanout.close()
                    last_name = last_topic = NULL
                    found = PyDict_GetItem(
                        fanouts,
                        PyBytes_FromStringAndSize(<const char*>at + HEAD_SIZE + 1, topic_size),
                    )
                    if found is not NULL:
                        fanout.open(<tuple>found)
                        last_topic, last_topic_size = at + HEAD_SIZE + 1, topic_size
                if last_topic is not NULL:
                    size_out = HEAD_SIZE + sender_header_size + payload
                    if fanout.has_room(size_out):
                        out = fanout.add(size_out)
                        _write_head(
                            out,
                            size_out,
                            EVENT,
                            at[CODEC_OFFSET],
                            sender_header_bytes,
                            sender_header_size,
                            at + ID_OFFSET,
                        )
                        memcpy(out + HEAD_SIZE + sender_header_size, at + HEAD_SIZE, payload)
                        messages += 1
                        size_in += size
                        position += LENGTH_SIZE + size
                        continue
        run.close()
        fanout.close()
        last_name = last_topic = NULL
        before = position
        position, result = handle_slow_path(broker, source, buffer, position, end, now)
        if result is not _NEXT or position == before:
            more = False
            break
        routes, fanouts = source.caches(broker.status.generation, broker.topics.version)
    run.close()
    fanout.close()
    if more and position < end:
        position, result = handle_slow_path(broker, source, buffer, position, end, now)
    source.messages_in += messages
    source.bytes_in += size_in
    return position, result
