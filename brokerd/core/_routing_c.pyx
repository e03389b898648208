# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The compiled twin of ``_routing_py``: the same behaviour, and more of it done here.

It passes on frames of every kind, with a receipt or an extension, that its twin leaves to
the slow path. What becomes of such a frame is what the slow path would have made of it.
A frame that is rare, refused or in doubt goes to the slow path before anything is changed.

Before each read, its offset is checked: ``start <= offset < end <= len(buffer)``.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE, PyByteArray_Resize
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_GetItem
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeLatin1
from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.math cimport INFINITY
from libc.string cimport memchr, memcmp, memcpy

from collections import deque

from brokerd.core.consumer cimport Consumer
from brokerd.core.flight cimport Flight, WaitingRequest
from brokerd.core.groups cimport choose_members
from brokerd.core.requests cimport DeliveredRequest, Requests
from brokerd.core.session cimport Session
from brokerd.core.sink cimport Portion, Sink
from brokerd.core.topic_search cimport Matches
from brokerd.core.write_buffer cimport RouteEntry, WriteBuffer

from brokerd.core.routing_result import RoutingResult
from brokerd.core.slow_path import handle_slow_path
from brokerd.core.undelivered import Queued

NAME = "compiled"

cdef extern from "Python.h":
    # From CPython's public headers: the allocated bytes, and the first byte in use.
    ctypedef struct PyByteArrayObject:
        Py_ssize_t ob_alloc
        char* ob_bytes
        char* ob_start
    void Py_SET_SIZE(object, Py_ssize_t)

cdef object _NEXT = RoutingResult.CONSUMED
cdef enum:
    # Of a stored message: most bytes of its key, the bytes that a key uses of a sink's size,
    # and its longest ttl, in seconds.
    LARGEST_KEY = 64
    KEY_SIZE = 128
    LONGEST_TTL = 315360000
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
    REQUEST = 2
    REPLY = 3
    ERROR = 4
    EVENT = 5
    RECEIPT = 6
    ACK = 7
    RECEIPT_FLAG = 1
    EXTENSION_FLAG = 2
    ACK_FLAG = 4
    EXTENSION_LENGTH_SIZE = 2
    SEQ_SIZE = 10

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
    "request": REQUEST,
    "reply": REPLY,
    "error": ERROR,
    "event": EVENT,
    "receipt": RECEIPT,
    "ack": ACK,
    "receipt_flag": RECEIPT_FLAG,
    "extension_flag": EXTENSION_FLAG,
    "ack_flag": ACK_FLAG,
    "extension_length_size": EXTENSION_LENGTH_SIZE,
    "seq_size": SEQ_SIZE,
    "largest_key": LARGEST_KEY,
    "key_size": KEY_SIZE,
    "longest_ttl": LONGEST_TTL,
}

cdef enum:
    # Bytes from which on a read has runs, and messages of the longest: ``_routing_py._Runs``.
    PLENTY = 65536
    LONGEST_RUN = 16
# For the test that compares these numbers with those of the twin.
RUNS = PLENTY, LONGEST_RUN
cdef enum:
    # An event to groups or to an outbox of frames is passed on if it concerns at most so
    # many subscriptions; events to more of them take turns.
    FEW = 64
    # What a frame takes of its sender's turn, against the other kinds: one of the slow
    # path; one put into an outbox as an object; one that is stored, most of whose cost
    # comes later; and an ACK that is collected.
    SLOW = 32
    OBJECT = 4
    STORED = 16
    ACKNOWLEDGED = 1

# The sender of the broker's own frames, and the bytes of a RECEIPT.
cdef bytes _BROKER = b"$broker"
cdef enum:
    RECEIPT_SIZE = HEAD_SIZE + 7
    # What ``deadline`` and ``ttl`` are without a ttl; a frame whose ttl is over is refused.
    NO_TTL = -1


cdef inline int64_t _signed_length(const uint8_t* at) noexcept:
    """Read a big-endian signed 32-bit number."""
    # Shifted as unsigned: a byte shifted into the sign bit of an int is undefined in C.
    return <int32_t>(
        (<uint32_t>at[0] << 24)
        | (<uint32_t>at[1] << 16)
        | (<uint32_t>at[2] << 8)
        | <uint32_t>at[3]
    )


cdef inline uint64_t _id_of(const uint8_t* at) noexcept:
    """Read the id of a frame."""
    cdef uint64_t message_id = 0
    cdef int index
    for index in range(ID_SIZE):
        message_id = (message_id << 8) | at[ID_OFFSET + index]
    return message_id


cdef inline void _write_head(
    char* at,
    int64_t size_out,
    uint8_t kind,
    uint8_t flags,
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
    at[FLAGS_OFFSET] = <char>flags
    at[CODEC_OFFSET] = <char>codec
    at[NAME_SIZE_OFFSET] = <char>sender_header_size
    memcpy(at + ID_OFFSET, message_id, ID_SIZE)
    memcpy(at + HEAD_SIZE, sender_header, sender_header_size)


cdef inline char* _grow(bytearray content, int64_t size, int64_t most) except NULL:
    """Make a bytearray longer by ``size`` bytes; return where they begin.

    most: bytes that it will not exceed, as far as is known.
    """
    cdef PyByteArrayObject* inside = <PyByteArrayObject*>content
    cdef int64_t written = PyByteArray_GET_SIZE(content)
    cdef int64_t needed = written + size
    # The last byte is for the NUL that CPython keeps behind a bytearray.
    if needed > inside.ob_alloc - (inside.ob_start - inside.ob_bytes) - 1:
        PyByteArray_Resize(content, max(needed, min(2 * needed, most)))
    # Within what is allocated: CPython need not move or cut anything.
    Py_SET_SIZE(content, needed)
    PyByteArray_AS_STRING(content)[needed] = 0
    return PyByteArray_AS_STRING(content) + written


cdef inline char* _extend(WriteBuffer target, int64_t size) except NULL:
    """Make ``content`` longer by ``size`` bytes, for which there is room; return where
    they begin.
    """
    target.frames += 1
    target.size += size
    return _grow(target.content, size, target.room)


cdef inline bint _has_room(WriteBuffer target, int64_t size) except -1:
    """Return whether a stream has room for ``size`` more bytes, made where possible."""
    if PyByteArray_GET_SIZE(target.content) + size <= target.room:
        return True
    return target.reserve(size)


cdef inline int _touch(WriteBuffer target, list touched) except -1:
    if not target.touched:
        target.touched = True
        touched.append(target.owner)
    return 0


cdef inline int _mark(WriteBuffer target, int64_t size, deadline, bint is_pinned) except -1:
    """Note the ttl of the last frame, which has ``size`` bytes, and whether it is pinned."""
    cdef int64_t end = target.base + PyByteArray_GET_SIZE(target.content)
    if not target.marks:
        target.marks = deque()
    target.marks.append((end - size, end, INFINITY if deadline is None else deadline, is_pinned))
    return 0


cdef int64_t _pass_on(
    WriteBuffer target,
    const uint8_t* data,
    int64_t position,
    int64_t end,
    const uint8_t* last,
    int64_t limit,
    const char* sender_header,
    Py_ssize_t sender_header_size,
    int64_t* messages,
    int64_t* size_in,
    int64_t most,
) except -1:
    """Pass on the plain messages at ``position`` that have the recipient of the one before.

    Return the position of the first frame that is another, or that has no room, or that
    comes behind ``most`` of them. It costs half of what the general way does.

    last: the message before, whose recipient has the outbox ``target``, a stream.
    """
    cdef bytearray content = target.content
    cdef PyByteArrayObject* inside = <PyByteArrayObject*>content
    cdef int64_t begin = PyByteArray_GET_SIZE(content)
    cdef int64_t written = begin
    cdef int64_t room = target.room
    cdef int64_t first = position
    cdef int64_t count = 0
    # Bytes that the messages will probably take.
    cdef int64_t ahead = end - position
    cdef int64_t allocated = inside.ob_alloc - (inside.ob_start - inside.ob_bytes) - 1
    cdef char* base = PyByteArray_AS_STRING(content)
    cdef char* out
    cdef const uint8_t* name = last + HEAD_SIZE
    cdef uint8_t name_size = last[NAME_SIZE_OFFSET]
    cdef int64_t head_in = HEAD_SIZE + name_size
    cdef int64_t size, payload, needed
    cdef const uint8_t* at
    if most < ahead // HEAD_SIZE:
        ahead = min(ahead, most * (LENGTH_SIZE + _signed_length(last)))
    while count < most and end - position >= HEAD_SIZE:
        at = data + position
        size = _signed_length(at)
        payload = size + LENGTH_SIZE - head_in
        if (
            at[KIND_OFFSET] != MESSAGE
            or at[FLAGS_OFFSET] != 0
            or at[NAME_SIZE_OFFSET] != name_size
            or not 0 <= payload <= limit
            or size > end - position - LENGTH_SIZE
            or memcmp(at + HEAD_SIZE, name, name_size) != 0
        ):
            break
        needed = written + HEAD_SIZE + sender_header_size + payload
        if needed > room:
            break
        if needed > allocated:
            Py_SET_SIZE(content, written)
            PyByteArray_Resize(
                content, max(needed, min(max(2 * needed, begin + ahead), room))
            )
            allocated = inside.ob_alloc - (inside.ob_start - inside.ob_bytes) - 1
            base = PyByteArray_AS_STRING(content)
        out = base + written
        _write_head(
            out,
            needed - written,
            MESSAGE,
            0,
            at[CODEC_OFFSET],
            sender_header,
            sender_header_size,
            at + ID_OFFSET,
        )
        memcpy(out + HEAD_SIZE + sender_header_size, at + head_in, payload)
        written = needed
        position += LENGTH_SIZE + size
        count += 1
    if count:
        Py_SET_SIZE(content, written)
        base[written] = 0
        target.frames += count
        target.size += written - begin
        messages[0] += count
        size_in[0] += position - first - LENGTH_SIZE * count
    return position


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
                _touch(target, self.touched)
        self.encoded = None
        return 0

    cdef bint has_room(self, int64_t size) except -1:
        """Return whether one more event of ``size`` bytes fits into every write buffer.

        The run may be ended, and begun again, to find that out.
        """
        cdef Py_ssize_t index
        cdef tuple targets = self.targets
        if size <= self.left:
            return True
        self.close()
        for index in range(PyTuple_GET_SIZE(targets)):
            if not _has_room(<WriteBuffer>PyTuple_GET_ITEM(targets, index), size):
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


cdef class _Spend:
    """What the frames that become objects take of the sender's turn."""

    cdef object turn
    cdef int64_t counted

    cdef bint is_left(self) except -1:
        """Return whether the turn goes on."""
        return self.turn.budget != 0

    cdef int count(self, int64_t taken) except -1:
        self.counted += taken
        if self.counted >= SLOW:
            self.turn.charge(self.counted // SLOW)
            self.counted %= SLOW
        return 0


cdef class _Extensions:
    """Reads extensions that need no JSON decoder.

    Such an extension is one object of ASCII text; its members are strings without a
    backslash, short numbers without an exponent, true, false and null. All others are
    left to the slow path, and so is a ``delay``.
    """

    # The last extension that was valid, in the buffer, and its ttl.
    cdef const uint8_t* last
    cdef int64_t last_size
    cdef double last_ttl
    # Where the key of that extension begins, and its bytes; 0 without a key.
    cdef int64_t key_at
    cdef int64_t key_size

    cdef bint read(self, const uint8_t* at, int64_t size, double* ttl) noexcept:
        """Return whether the extension is valid JSON for certain, with its ttl or NO_TTL."""
        if (
            self.last is not NULL
            and size == self.last_size
            and memcmp(at, self.last, size) == 0
        ):
            ttl[0] = self.last_ttl
            return True
        if not _read_object(at, size, ttl, &self.key_at, &self.key_size):
            # A part of them may have been read.
            self.last = NULL
            return False
        self.last, self.last_size, self.last_ttl = at, size, ttl[0]
        return True


cdef inline int64_t _skip_space(const uint8_t* at, int64_t position, int64_t size) noexcept:
    while position < size and (
        at[position] == b" " or at[position] == b"\t" or at[position] == b"\n"
        or at[position] == b"\r"
    ):
        position += 1
    return position


cdef inline int64_t _skip_string(const uint8_t* at, int64_t position, int64_t size) noexcept:
    """Return the position behind a string, or -1."""
    if position >= size or at[position] != b'"':
        return -1
    position += 1
    while position < size and at[position] != b'"':
        if at[position] < 0x20 or at[position] >= 0x7F or at[position] == b"\\":
            return -1
        position += 1
    return position + 1 if position < size else -1


cdef inline bint _is_digit(const uint8_t* at, int64_t position, int64_t size) noexcept:
    return position < size and b"0" <= at[position] and at[position] <= b"9"


cdef int64_t _skip_number(
    const uint8_t* at, int64_t position, int64_t size, double* number
) noexcept:
    """Return the position behind a number of at most 15 digits, or -1.

    So few digits make an exact number, and so does their power of ten. Dividing one by
    the other rounds once, as Python's float does.
    """
    cdef int64_t digits = 0
    cdef double mantissa = 0
    cdef double scale = 1
    cdef bint negative = position < size and at[position] == b"-"
    cdef int64_t first = position + negative
    position = first
    while _is_digit(at, position, size):
        mantissa = mantissa * 10 + (at[position] - 48)
        digits += 1
        position += 1
    if digits == 0 or digits > 15 or (digits > 1 and at[first] == b"0"):
        return -1
    if position < size and at[position] == b".":
        position += 1
        if not _is_digit(at, position, size):
            return -1
        while _is_digit(at, position, size):
            mantissa = mantissa * 10 + (at[position] - 48)
            scale *= 10
            digits += 1
            position += 1
        if digits > 15:
            return -1
    if position < size and (at[position] == b"e" or at[position] == b"E"):
        return -1
    number[0] = -mantissa / scale if negative else mantissa / scale
    return position


cdef inline int64_t _skip_word(
    const uint8_t* at, int64_t position, int64_t size, const char* word, int64_t word_size
) noexcept:
    if size - position < word_size or memcmp(at + position, word, word_size) != 0:
        return -1
    return position + word_size


cdef bint _read_object(
    const uint8_t* at, int64_t size, double* ttl, int64_t* key_at, int64_t* key_size
) noexcept:
    cdef int64_t position, key, value
    cdef double number
    cdef bint is_ttl, is_key
    ttl[0], key_at[0], key_size[0] = NO_TTL, 0, 0
    position = _skip_space(at, 0, size)
    if position >= size or at[position] != b"{":
        return False
    position = _skip_space(at, position + 1, size)
    if position < size and at[position] == b"}":
        return _skip_space(at, position + 1, size) == size
    while True:
        key = position
        position = _skip_string(at, position, size)
        if position < 0:
            return False
        is_ttl = position - key == 5 and memcmp(at + key, b'"ttl"', 5) == 0
        is_key = position - key == 5 and memcmp(at + key, b'"key"', 5) == 0
        if position - key == 7 and memcmp(at + key, b'"delay"', 7) == 0:
            return False
        position = _skip_space(at, position, size)
        if position >= size or at[position] != b":":
            return False
        position = _skip_space(at, position + 1, size)
        if position >= size:
            return False
        if not is_key and (at[position] == b"-" or _is_digit(at, position, size)):
            position = _skip_number(at, position, size, &number)
            if position >= 0 and is_ttl:
                # A second ttl, or one that is over, is the slow path's.
                if ttl[0] != NO_TTL or number <= 0 or number > 2147483647:
                    return False
                ttl[0] = number
        elif is_ttl:
            return False
        elif at[position] == b'"':
            value = position
            position = _skip_string(at, position, size)
            if position >= 0 and is_key:
                # A second key, or one of another size, is the slow path's.
                if key_size[0] or not 0 < position - value - 2 <= LARGEST_KEY:
                    return False
                key_at[0], key_size[0] = value + 1, position - value - 2
        elif is_key:
            return False
        elif at[position] == b"t":
            position = _skip_word(at, position, size, b"true", 4)
        elif at[position] == b"f":
            position = _skip_word(at, position, size, b"false", 5)
        elif at[position] == b"n":
            position = _skip_word(at, position, size, b"null", 4)
        else:
            return False
        if position < 0:
            return False
        position = _skip_space(at, position, size)
        if position >= size:
            return False
        if at[position] == b"}":
            return _skip_space(at, position + 1, size) == size
        if at[position] != b",":
            return False
        position = _skip_space(at, position + 1, size)


cdef inline bint _says_back(const uint8_t* at, int64_t size) noexcept:
    """Return whether an ERROR's payload may have the code ``back``."""
    cdef int64_t position
    for position in range(size - 3):
        if at[position] == b"b" and memcmp(at + position, b"back", 4) == 0:
            return True
        if at[position] == b"\\":
            return True
    return False


def read_extension(bytes extension):
    """Return (whether it is valid for certain, its ttl or None, its key), for a test."""
    cdef double ttl = NO_TTL
    cdef int64_t key_at, key_size
    cdef bint valid = _read_object(
        <const uint8_t*>PyBytes_AS_STRING(extension),
        PyBytes_GET_SIZE(extension),
        &ttl,
        &key_at,
        &key_size,
    )
    key = extension[key_at : key_at + key_size]
    return valid, ttl if valid and ttl != NO_TTL else None, key if valid else b""


def feed(broker, Session source, buffer, int64_t start, int64_t end, double now):
    """Route the whole frames in ``buffer[start:end]``; see ``_routing_py.feed``."""
    cdef Py_buffer view
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    cdef _Fanout fanout = _Fanout.__new__(_Fanout)
    fanout.touched = broker.touched
    try:
        if not 0 <= start <= end <= view.len:
            raise ValueError("start and end lie outside the buffer")
        return _feed(broker, source, buffer, <const uint8_t*>view.buf, start, end, now, fanout)
    finally:
        fanout.close()
        PyBuffer_Release(&view)


def sort_frames(frames, int64_t start, bytes recipient, dict buffers):
    """Sort another host's frames by their senders; see ``_routing_py.sort_frames``."""
    cdef Py_buffer view
    PyObject_GetBuffer(frames, &view, PyBUF_SIMPLE)
    try:
        if not 0 <= start <= view.len:
            raise ValueError("start lies outside the frames")
        return _sort_frames(<const uint8_t*>view.buf, start, view.len, recipient, buffers)
    finally:
        PyBuffer_Release(&view)


cdef int64_t _sort_frames(
    const uint8_t* data, int64_t position, int64_t end, bytes recipient, dict buffers
) except -1:
    cdef Py_ssize_t recipient_size = PyBytes_GET_SIZE(recipient)
    cdef const uint8_t* at
    cdef const uint8_t* last_name = NULL
    cdef uint8_t last_size = 0
    cdef uint8_t name_size
    cdef int64_t size, payload, size_out
    cdef bytearray buffer = None
    cdef bytes sender
    cdef PyObject* found
    cdef char* out
    while position < end:
        if end - position < HEAD_SIZE:
            raise ValueError("a frame is not whole")
        at = data + position
        size = _signed_length(at)
        name_size = at[NAME_SIZE_OFFSET]
        payload = size + LENGTH_SIZE - HEAD_SIZE - name_size
        if payload < 0 or size > end - position - LENGTH_SIZE:
            raise ValueError("a frame is not whole")
        if at[FLAGS_OFFSET] & ACK_FLAG:
            break
        if (
            last_name is NULL
            or name_size != last_size
            or memcmp(at + HEAD_SIZE, last_name, name_size) != 0
        ):
            sender = PyBytes_FromStringAndSize(<const char*>at + HEAD_SIZE, name_size)
            found = PyDict_GetItem(buffers, sender)
            if found is NULL:
                buffer = bytearray()
                buffers[sender] = buffer
            else:
                buffer = <bytearray>found
            last_name, last_size = at + HEAD_SIZE, name_size
        size_out = HEAD_SIZE + recipient_size + payload
        out = _grow(buffer, size_out, INT64_MAX)
        _write_head(
            out,
            size_out,
            at[KIND_OFFSET],
            at[FLAGS_OFFSET],
            at[CODEC_OFFSET],
            PyBytes_AS_STRING(recipient),
            recipient_size,
            at + ID_OFFSET,
        )
        memcpy(out + HEAD_SIZE + recipient_size, at + HEAD_SIZE + name_size, payload)
        position += LENGTH_SIZE + size
    return position


cdef object _feed(
    broker,
    Session source,
    buffer,
    const uint8_t* data,
    int64_t start,
    int64_t end,
    double now,
    _Fanout fanout,
):
    cdef int64_t position = start
    # Up to 2**64 - 1, the longest length that a frame may give.
    cdef uint64_t bytes_to_skip = source.bytes_to_skip
    cdef int64_t before, size, payload, head_in, size_out, own_size
    cdef int64_t messages = 0
    cdef int64_t size_in = 0
    cdef int64_t limit = broker.status.limits.max_message
    cdef bytes sender_header = source.sender_header
    cdef const char* sender_header_bytes = PyBytes_AS_STRING(sender_header)
    cdef Py_ssize_t sender_header_size = PyBytes_GET_SIZE(sender_header)
    cdef Requests requests = broker.requests
    cdef dict freed = requests.freed
    cdef list touched = broker.touched
    cdef const uint8_t* at
    cdef const uint8_t* last_name = NULL
    cdef const uint8_t* last_topic = NULL
    cdef RouteEntry last_entry = None
    cdef uint8_t last_size = 0
    cdef uint8_t last_topic_size = 0
    cdef const uint8_t* requester_at = NULL
    cdef uint8_t requester_size = 0
    cdef str requester = ""
    cdef uint8_t kind, flags, name_size, topic_size
    cdef dict routes
    cdef object topics
    cdef bytes topic
    cdef PyObject* found
    cdef char* out
    cdef bint more = True
    cdef bint judged
    cdef bint is_pinned
    cdef bint waits
    cdef Py_ssize_t ring_size
    # See ``_routing_py._Runs``.
    cdef RouteEntry run_entry = None
    cdef int64_t run = 1
    cdef int64_t run_end = -1
    cdef int64_t round_left = 0
    cdef int64_t begin, more_of_run, passed_on
    cdef bint runs_over = False
    cdef Flight flight
    cdef Session member
    cdef double ttl
    cdef object deadline
    cdef WriteBuffer target
    cdef WriteBuffer own
    cdef DeliveredRequest request
    cdef _Extensions extensions = _Extensions.__new__(_Extensions)
    cdef _Spend spend = _Spend.__new__(_Spend)
    cdef Py_ssize_t index
    cdef tuple targets
    cdef Matches matches
    cdef bytes frame
    cdef bytes name_out
    spend.turn = broker.turn
    result = _NEXT
    if bytes_to_skip:
        position += <int64_t>min(bytes_to_skip, <uint64_t>(end - start))
        source.bytes_to_skip = bytes_to_skip - <uint64_t>(position - start)
    routes, topics = source.known_routes(broker.status.generation), broker.topics.cache.topics
    judged = source.charged or source.parting or source.mute
    while end - position >= HEAD_SIZE:
        at = data + position
        size = _signed_length(at)
        kind, flags, name_size = at[KIND_OFFSET], at[FLAGS_OFFSET], at[NAME_SIZE_OFFSET]
        head_in = HEAD_SIZE + name_size
        payload = size + LENGTH_SIZE - head_in
        if (
            0 <= payload <= limit
            and size <= end - position - LENGTH_SIZE
            and not flags & ~(RECEIPT_FLAG | EXTENSION_FLAG)
            and not judged
        ):
            # The size out; of an event, the topic is a part of the payload here.
            size_out = HEAD_SIZE + sender_header_size + payload
            if kind == EVENT and name_size == 0 and payload > 0 and 1 + at[HEAD_SIZE] <= payload:
                topic_size = at[HEAD_SIZE]
                if (
                    last_topic is NULL
                    or topic_size != last_topic_size
                    or memcmp(at + HEAD_SIZE + 1, last_topic, topic_size) != 0
                ):
                    fanout.close()
                    last_topic = NULL
                    topic = PyBytes_FromStringAndSize(
                        <const char*>at + HEAD_SIZE + 1, topic_size
                    )
                    matches = _known_matches(source, topics, topic)
                    targets = None
                    if matches is None:
                        targets = broker.events.fanout(source, topic)
                        topics = broker.topics.cache.topics
                    elif matches.is_plain:
                        targets = matches.fanout
                    elif matches.size <= FEW and spend.is_left():
                        targets = _with_members(matches, size_out)
                        if targets is not None and _publish(
                            source, targets, at, size_out, payload, now, extensions, touched, spend
                        ):
                            if matches.groups:
                                matches.turn += 1
                            messages += 1
                            size_in += size
                            position += LENGTH_SIZE + size
                            continue
                        targets = None
                    if targets is not None:
                        fanout.open(targets)
                        last_topic, last_topic_size = at + HEAD_SIZE + 1, topic_size
                if last_topic is not NULL and flags:
                    targets = fanout.targets
                    fanout.close()
                    last_topic = NULL
                    if _publish(
                        source, targets, at, size_out, payload, now, extensions, touched, spend
                    ):
                        messages += 1
                        size_in += size
                        position += LENGTH_SIZE + size
                        continue
                elif last_topic is not NULL and fanout.has_room(size_out):
                    if source.client.meter is None or source.client.meter.allows(size, now):
                        out = fanout.add(size_out)
                        _write_head(
                            out,
                            size_out,
                            EVENT,
                            0,
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
            elif kind == ACK:
                if flags == 0 and size == HEAD_SIZE - LENGTH_SIZE and (
                    source.consumer is not None
                ):
                    if spend.is_left() and _acknowledge(
                        <Consumer>source.consumer, _id_of(at), spend
                    ):
                        spend.count(ACKNOWLEDGED)
                        messages += 1
                        size_in += size
                        position += LENGTH_SIZE + size
                        continue
            elif kind == MESSAGE or kind == REQUEST or kind == REPLY or kind == ERROR:
                if last_topic is not NULL:
                    fanout.close()
                    last_topic = NULL
                target, request, member = None, None, None
                ring_size = 0
                waits = False
                if kind == MESSAGE or kind == REQUEST:
                    if (
                        last_name is NULL
                        or name_size != last_size
                        or memcmp(at + HEAD_SIZE, last_name, name_size) != 0
                    ):
                        last_name = NULL
                        found = PyDict_GetItem(
                            routes,
                            PyBytes_FromStringAndSize(<const char*>at + HEAD_SIZE, name_size),
                        )
                        if found is not NULL:
                            last_entry = <RouteEntry>found
                            last_name, last_size = at + HEAD_SIZE, name_size
                    if last_name is not NULL and kind == REQUEST and (
                        last_entry.is_pinned
                        or source.outgoing_count + source.waiting_count
                        >= source.client.request_limit
                    ):
                        pass
                    elif last_name is not NULL and kind == REQUEST and (
                        last_entry.flight is not None
                    ):
                        flight = last_entry.flight
                        if not flight.waits_for_any:
                            member = flight.best()
                        if member is not None:
                            target = member.outbox
                        else:
                            # Without a member that reads, there may be none at all. A
                            # request of another host waits for members here alone.
                            waits = (
                                PyList_GET_SIZE(last_entry.ring) > 0
                                and (
                                    source.answers is None
                                    or not (
                                        <WriteBuffer>PyList_GET_ITEM(last_entry.ring, 0)
                                    ).is_remote
                                )
                                # Else a host has members that are not among them yet.
                                and len((<object>last_entry).remotes)
                                == len((<object>last_entry).hosts)
                            )
                    elif last_name is not NULL and kind == MESSAGE and (
                        last_entry.sink is not None
                    ):
                        if spend.is_left() and _collect(
                            last_entry.sink,
                            source,
                            at,
                            size_out + SEQ_SIZE,
                            payload,
                            now,
                            extensions,
                            spend,
                        ):
                            spend.count(STORED)
                            messages += 1
                            size_in += size
                            position += LENGTH_SIZE + size
                            continue
                    elif last_name is not NULL:
                        target = last_entry.direct
                        if target is None:
                            ring_size = PyList_GET_SIZE(last_entry.ring)
                            if ring_size:
                                target = <WriteBuffer>PyList_GET_ITEM(
                                    last_entry.ring, last_entry.turn % ring_size
                                )
                elif kind == REPLY or not _says_back(at + head_in, payload):
                    if (
                        requester_at is NULL
                        or name_size != requester_size
                        or memcmp(at + HEAD_SIZE, requester_at, name_size) != 0
                    ):
                        requester_at, requester_size = at + HEAD_SIZE, name_size
                        requester = PyUnicode_DecodeLatin1(
                            <const char*>requester_at, name_size, NULL
                        )
                    found = PyDict_GetItem(source.incoming_requests, (requester, _id_of(at)))
                    if found is not NULL:
                        request = <DeliveredRequest>found
                        target = request.requester.outbox
                if waits and spend.is_left() and _wait(
                    requests, source, last_entry, at, size_out, payload, now, extensions
                ):
                    if flags & RECEIPT_FLAG:
                        _touch(
                            source.outbox if source.answers is None else source.answers, touched
                        )
                    spend.count(OBJECT)
                    messages += 1
                    size_in += size
                    position += LENGTH_SIZE + size
                    continue
                if target is not None and not target.is_stream and not spend.is_left():
                    target = None
                name_out = sender_header
                if target is not None and target.is_remote:
                    # Only a frame that this broker has received from its sender leaves it.
                    if source.answers is not None:
                        target = None
                    name_out = source.identity
                    size_out += PyBytes_GET_SIZE(name_out) - sender_header_size
                    if size_out > broker.delivery.remote.largest_frame:
                        target = None
                ttl = NO_TTL
                if target is not None and flags & EXTENSION_FLAG:
                    if not _take_extension(extensions, at + head_in, payload, &ttl):
                        target = None
                own_size = 0
                if target is not None and flags & RECEIPT_FLAG and not target.is_remote:
                    own = source.outbox if source.answers is None else source.answers
                    own_size = RECEIPT_SIZE
                    if not _has_room_for_receipt(own, size_out if own is target else 0):
                        target = None
                if (
                    target is not None
                    and _has_room(target, size_out)
                    and (source.client.meter is None or source.client.meter.allows(size, now))
                ):
                    frame = None
                    if target.is_stream:
                        out = _extend(target, size_out)
                    else:
                        frame = PyBytes_FromStringAndSize(NULL, size_out)
                        out = PyBytes_AS_STRING(frame)
                    _write_head(
                        out,
                        size_out,
                        kind,
                        # The other host sends the RECEIPT.
                        flags if target.is_remote else flags & EXTENSION_FLAG,
                        at[CODEC_OFFSET],
                        PyBytes_AS_STRING(name_out),
                        PyBytes_GET_SIZE(name_out),
                        at + ID_OFFSET,
                    )
                    memcpy(
                        out + HEAD_SIZE + PyBytes_GET_SIZE(name_out), at + head_in, payload
                    )
                    _touch(target, touched)
                    if ring_size:
                        last_entry.turn += 1
                    deadline = None
                    if ttl != NO_TTL:
                        deadline = now + ttl
                    is_pinned = kind == MESSAGE and last_entry.is_pinned
                    if frame is not None:
                        if request is not None:
                            is_pinned = memchr(at + HEAD_SIZE, b"/", name_size) is not NULL
                        target.put(
                            Queued(
                                frame,
                                flags & RECEIPT_FLAG != 0,
                                is_pinned,
                                source,
                                False,
                                request is not None,
                                deadline,
                            )
                        )
                        spend.count(OBJECT)
                    elif deadline is not None or is_pinned:
                        _mark(target, size_out, deadline, is_pinned)
                    if (
                        member is not None
                        and last_entry.is_pool
                        and frame is None
                    ):
                        frame = PyBytes_FromStringAndSize(out, size_out)
                    # Before the request that an answer makes room for.
                    if own_size:
                        _write_receipt(own, at + ID_OFFSET)
                        _touch(own, touched)
                    if member is not None:
                        flight.choose(member)
                        requests.expect(
                            source,
                            member,
                            _id_of(at),
                            deadline,
                            frame if last_entry.is_pool else None,
                        )
                    elif kind == REQUEST:
                        requests.expect(source, <Session>target.owner, _id_of(at), deadline)
                    elif request is not None:
                        source.recipients.add(request.requester.client)
                        requests.end(request)
                        if freed and source.client in freed:
                            broker.turn.charge(1)
                            broker.in_flight.dispatch(source.client)
                    messages += 1
                    size_in += size
                    begin = position
                    position += LENGTH_SIZE + size
                    if (
                        kind == MESSAGE
                        and (ring_size == 0 or flags == 0)
                        and frame is None
                        and not last_entry.is_pinned
                        and not target.is_remote
                        and source.client.meter is None
                    ):
                        more_of_run = INT64_MAX
                        if ring_size:
                            if round_left == 0 or begin != run_end or last_entry is not run_entry:
                                run = 1
                                if end - begin >= PLENTY and not runs_over:
                                    run = (end - begin) // (ring_size * (LENGTH_SIZE + size))
                                    run = max(1, min(run, LONGEST_RUN))
                                run_entry, round_left = last_entry, ring_size
                            round_left -= 1
                            run_end = position
                            more_of_run = run - 1
                            if more_of_run == 0:
                                continue
                        passed_on = messages
                        position = _pass_on(
                            target,
                            data,
                            position,
                            end,
                            at,
                            limit,
                            sender_header_bytes,
                            sender_header_size,
                            &messages,
                            &size_in,
                            more_of_run,
                        )
                        if ring_size:
                            run_end = position
                            if messages - passed_on < more_of_run:
                                runs_over, run = True, 1
                    continue
        fanout.close()
        last_name = last_topic = NULL
        before = position
        position, result = handle_slow_path(broker, source, buffer, position, end, now)
        if result is not _NEXT or position == before:
            more = False
            break
        routes, topics = source.known_routes(broker.status.generation), broker.topics.cache.topics
        judged = source.charged or source.parting or source.mute
    fanout.close()
    if more and position < end:
        position, result = handle_slow_path(broker, source, buffer, position, end, now)
    source.messages_in += messages
    source.bytes_in += size_in
    return position, result


cdef inline Matches _known_matches(Session source, topics, bytes topic):
    """Return the matches of a topic if ``Events.fanout`` has allowed it already."""
    cdef PyObject* found = PyDict_GetItem(topics, topic)
    cdef Matches matches
    if found is NULL:
        return None
    matches = <Matches>found
    if (
        matches.fanout is None
        or PyTuple_GET_SIZE(matches.fanout) > source.widest
        or not matches.permits(source.client.publish_rules)
    ):
        return None
    matches.used = True
    return matches


cdef tuple _with_members(Matches matches, int64_t size_out):
    """Return the outboxes of everyone and of one member of each group, or None."""
    cdef list members
    cdef Session member
    if not matches.groups:
        return matches.fanout
    members = choose_members(matches, size_out)
    if members is None:
        return None
    return matches.fanout + tuple([(<Session>member).outbox for member in members])


cdef bint _publish(
    Session source,
    tuple targets,
    const uint8_t* at,
    int64_t size_out,
    int64_t payload,
    double now,
    _Extensions extensions,
    list touched,
    _Spend spend,
) except -1:
    """Pass on an event with a receipt or an extension, to groups, or to an outbox of
    frames; return whether that was possible.

    payload: its bytes from the topic's length on.
    """
    cdef uint8_t flags = at[FLAGS_OFFSET]
    cdef int64_t topic_end = 1 + at[HEAD_SIZE]
    cdef double ttl = NO_TTL
    cdef object deadline = None
    cdef bytes sender_header = source.sender_header
    cdef Py_ssize_t sender_header_size = PyBytes_GET_SIZE(sender_header)
    cdef WriteBuffer own = source.outbox
    cdef WriteBuffer target
    cdef bytes frame = None
    cdef char* out
    cdef Py_ssize_t index
    if flags & EXTENSION_FLAG and not _take_extension(
        extensions, at + HEAD_SIZE + topic_end, payload - topic_end, &ttl
    ):
        return False
    # The sender may be among the subscribers.
    if flags & RECEIPT_FLAG and not _has_room_for_receipt(own, size_out):
        return False
    for index in range(PyTuple_GET_SIZE(targets)):
        if not _has_room(<WriteBuffer>PyTuple_GET_ITEM(targets, index), size_out):
            return False
    if source.client.meter is not None and not source.client.meter.allows(
        HEAD_SIZE - LENGTH_SIZE + payload, now
    ):
        return False
    if ttl != NO_TTL:
        deadline = now + ttl
    for index in range(PyTuple_GET_SIZE(targets)):
        target = <WriteBuffer>PyTuple_GET_ITEM(targets, index)
        _touch(target, touched)
        if target.is_stream:
            out = _extend(target, size_out)
        elif frame is None:
            frame = PyBytes_FromStringAndSize(NULL, size_out)
            out = PyBytes_AS_STRING(frame)
        else:
            out = NULL
        if out is not NULL:
            _write_head(
                out,
                size_out,
                EVENT,
                flags & EXTENSION_FLAG,
                at[CODEC_OFFSET],
                PyBytes_AS_STRING(sender_header),
                sender_header_size,
                at + ID_OFFSET,
            )
            memcpy(out + HEAD_SIZE + sender_header_size, at + HEAD_SIZE, payload)
        if not target.is_stream:
            target.put(Queued(frame, deadline=deadline))
            spend.count(OBJECT)
        elif deadline is not None:
            _mark(target, size_out, deadline, False)
    if flags & RECEIPT_FLAG:
        _write_receipt(own, at + ID_OFFSET)
        _touch(own, touched)
    return True


cdef bint _wait(
    Requests requests,
    Session source,
    RouteEntry client,
    const uint8_t* at,
    int64_t size_out,
    int64_t payload,
    double now,
    _Extensions extensions,
) except -1:
    """Keep a request until a connection has room in flight; return False if it may not wait.

    payload: its bytes behind the recipient's name.
    """
    cdef uint8_t flags = at[FLAGS_OFFSET]
    cdef uint8_t name_size = at[NAME_SIZE_OFFSET]
    cdef int64_t head_in = HEAD_SIZE + name_size
    cdef double ttl = NO_TTL
    cdef bytes sender_header = source.sender_header
    cdef Py_ssize_t sender_header_size = PyBytes_GET_SIZE(sender_header)
    cdef Flight flight = client.flight
    cdef WaitingRequest request
    cdef WriteBuffer own
    cdef bytes frame
    cdef char* out
    if flags & EXTENSION_FLAG and not _take_extension(extensions, at + head_in, payload, &ttl):
        return False
    if flight.size and flight.size + size_out > client.config.queue:
        return False
    own = source.outbox if source.answers is None else source.answers
    if flags & RECEIPT_FLAG and not _has_room_for_receipt(own, 0):
        return False
    if source.client.meter is not None and not source.client.meter.allows(
        head_in - LENGTH_SIZE + payload, now
    ):
        return False
    frame = PyBytes_FromStringAndSize(NULL, size_out)
    out = PyBytes_AS_STRING(frame)
    _write_head(
        out,
        size_out,
        REQUEST,
        flags & EXTENSION_FLAG,
        at[CODEC_OFFSET],
        PyBytes_AS_STRING(sender_header),
        sender_header_size,
        at + ID_OFFSET,
    )
    memcpy(out + HEAD_SIZE + sender_header_size, at + head_in, payload)
    queued = Queued(
        frame,
        flags & RECEIPT_FLAG != 0,
        False,
        source,
        False,
        False,
        now + ttl if ttl != NO_TTL else None,
    )
    request = WaitingRequest(source, _id_of(at), client.name, queued)
    flight.add(request)
    requests.wait(request)
    if flags & RECEIPT_FLAG:
        _write_receipt(own, at + ID_OFFSET)
    return True


cdef bint _acknowledge(Consumer consumer, uint64_t seq, _Spend spend) except -1:
    """Collect a plain ACK, as ``Consumer.acknowledge`` does."""
    cdef PyObject* found
    if consumer.collecting is None:
        return False
    key = seq
    found = PyDict_GetItem(consumer.held, key)
    if found is NULL:
        return False
    if not consumer.acknowledged:
        consumer.collecting[consumer] = None
        # What was collected is carried out after this turn, as after a slow-path frame.
        spend.turn.charge(1)
    consumer.acknowledged.append(<object>found)
    del consumer.held[key]
    return True


cdef bint _collect(
    Sink sink,
    Session source,
    const uint8_t* at,
    int64_t size_out,
    int64_t payload,
    double now,
    _Extensions extensions,
    _Spend spend,
) except -1:
    """Append a message without a delay to a sink; return False if it may not be."""
    cdef uint8_t flags = at[FLAGS_OFFSET]
    cdef int64_t head_in = HEAD_SIZE + at[NAME_SIZE_OFFSET]
    cdef bytes sender_header = source.sender_header
    cdef Py_ssize_t sender_header_size = PyBytes_GET_SIZE(sender_header)
    cdef uint64_t seq
    cdef char* out
    cdef int index
    cdef double ttl = NO_TTL
    cdef int64_t key_size = 0
    if flags & EXTENSION_FLAG:
        if not _read_extension(extensions, at + head_in, payload, &ttl) or ttl > LONGEST_TTL:
            return False
        key_size = extensions.key_size
    if (
        payload > sink.largest
        or sink.messages >= sink.most_messages
        or sink.size + size_out + (KEY_SIZE if key_size else 0) > sink.most_size
        or not sink.has_place(size_out)
        # What its RECEIPTs need is limited where it reads.
        or source.outbox._blocked
    ):
        return False
    if source.client.meter is not None and not source.client.meter.allows(
        head_in - LENGTH_SIZE + payload, now
    ):
        return False
    if PyByteArray_GET_SIZE(sink.sizes) == 0:
        sink.begin()
        # What was collected is given away after this turn, as after a slow-path frame.
        spend.turn.charge(1)
    out = _grow(sink.content, size_out, INT64_MAX)
    _write_head(
        out,
        size_out,
        MESSAGE,
        ACK_FLAG | (flags & EXTENSION_FLAG),
        at[CODEC_OFFSET],
        PyBytes_AS_STRING(sender_header),
        sender_header_size,
        at + ID_OFFSET,
    )
    out += HEAD_SIZE + sender_header_size
    seq = sink.next_seq
    for index in range(ID_SIZE):
        out[index] = <char>((seq >> (56 - 8 * index)) & 0xFF)
    # The first attempt.
    out[ID_SIZE], out[ID_SIZE + 1] = 0, 1
    memcpy(out + SEQ_SIZE, at + head_in, payload)
    memcpy(
        _grow(sink.portion(source, flags & RECEIPT_FLAG != 0).ids, ID_SIZE, INT64_MAX),
        at + ID_OFFSET,
        ID_SIZE,
    )
    out = _grow(sink.sizes, 4, INT64_MAX)
    for index in range(4):
        out[index] = <char>((size_out >> (8 * index)) & 0xFF)
    sink.next_seq += 1
    sink.messages += 1
    sink.uncommitted += 1
    sink.size += size_out
    source.uncommitted += 1
    if key_size or ttl != NO_TTL:
        sink.mark(
            source,
            PyUnicode_DecodeLatin1(
                <const char*>at + head_in + EXTENSION_LENGTH_SIZE + extensions.key_at,
                key_size,
                NULL,
            )
            if key_size
            else None,
            ttl if ttl != NO_TTL else None,
        )
    return True


cdef inline bint _take_extension(
    _Extensions extensions, const uint8_t* at, int64_t size, double* ttl
) noexcept:
    """Return whether a live frame may have the extension, and its ttl."""
    # Only a mailbox takes a key.
    return _read_extension(extensions, at, size, ttl) and extensions.key_size == 0


cdef inline bint _read_extension(
    _Extensions extensions, const uint8_t* at, int64_t size, double* ttl
) noexcept:
    """Return whether the extension at the start of ``size`` bytes is valid, and its ttl."""
    cdef int64_t extension_size
    if size < EXTENSION_LENGTH_SIZE:
        return False
    extension_size = (<int64_t>at[0] << 8) | at[1]
    if extension_size > size - EXTENSION_LENGTH_SIZE:
        return False
    return extensions.read(at + EXTENSION_LENGTH_SIZE, extension_size, ttl)


cdef inline bint _has_room_for_receipt(WriteBuffer own, int64_t before) except -1:
    """Return whether the sender's outbox has room for a RECEIPT behind so many bytes."""
    if own.is_stream:
        return PyByteArray_GET_SIZE(own.content) + before + RECEIPT_SIZE <= own.room
    return own.reserve(before + RECEIPT_SIZE)


cdef inline int _write_receipt(WriteBuffer own, const uint8_t* message_id) except -1:
    """Write the RECEIPT for a message into its sender's outbox, which has room."""
    cdef bytes frame = None
    cdef char* out
    if own.is_stream:
        out = _extend(own, RECEIPT_SIZE)
    else:
        frame = PyBytes_FromStringAndSize(NULL, RECEIPT_SIZE)
        out = PyBytes_AS_STRING(frame)
    _write_head(
        out,
        RECEIPT_SIZE,
        RECEIPT,
        0,
        0,
        PyBytes_AS_STRING(_BROKER),
        PyBytes_GET_SIZE(_BROKER),
        message_id,
    )
    if frame is not None:
        own.append(frame)
    return 0
