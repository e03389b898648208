"""The layout of a broker frame: the sizes and offsets of its header, and its numbers.

Source: docs/protocol.md, "The header". All readers and writers of frames take the
layout from here. Only the compiled routing loop of the daemon repeats it, and a test
compares the two.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final

__all__ = [
    "ACK_FLAG",
    "ACK_KIND",
    "ERROR_KIND",
    "EVENT_KIND",
    "EXTENSION_FLAG",
    "EXTENSION_LENGTH",
    "FRAME_HEAD",
    "FRAME_START",
    "HEADER",
    "ID",
    "JSON_CODEC",
    "MAX_EXTENSION",
    "MAX_HEAD_SIZE",
    "MAX_ID",
    "MAX_NAME_SIZE",
    "MAX_TOPIC",
    "MESSAGE_KIND",
    "NAME_SIZE_OFFSET",
    "RAW_CODEC",
    "RECEIPT_FLAG",
    "RECEIPT_KIND",
    "REPLY_KIND",
    "REQUEST_KIND",
    "SEQ",
    "CodecId",
    "Flag",
    "Kind",
]

#: The header: kind, flags, codec, size of the name, id; network byte order.
HEADER: Final = struct.Struct("!BBBBQ")
#: The same behind the short length of the frame, and the same up to the id.
FRAME_HEAD: Final = struct.Struct("!iBBBBQ")
FRAME_START: Final = struct.Struct("!iBBBB")
ID: Final = struct.Struct("!Q")
#: Where the size of the name stands in the header, in bytes.
NAME_SIZE_OFFSET: Final = 3
#: Of a delivery from a mailbox: its seq and attempt, behind the name or the topic.
SEQ: Final = struct.Struct("!QH")
#: The length of an extension, before the extension.
EXTENSION_LENGTH: Final = struct.Struct("!H")

MAX_ID: Final = 2**64 - 1
#: Longest name, in bytes: its size has one byte in the header.
MAX_NAME_SIZE: Final = 255
#: Longest topic, in bytes of UTF-8: its size is one byte.
MAX_TOPIC: Final = 255
#: Longest extension, in bytes of JSON.
MAX_EXTENSION: Final = 0xFFFF
#: Most bytes of a frame's body before its payload: header, name, topic, seq, extension.
MAX_HEAD_SIZE: Final = (
    HEADER.size + MAX_NAME_SIZE + 1 + MAX_TOPIC + SEQ.size + EXTENSION_LENGTH.size + MAX_EXTENSION
)


class Kind(IntEnum):
    """The kind of a frame."""

    MESSAGE = 1
    """One way, to a named client."""
    REQUEST = 2
    """Expects one REPLY or ERROR with the same id."""
    REPLY = 3
    """Answers a REQUEST; its id is the request's."""
    ERROR = 4
    """Answers a frame that failed; its payload is a JSON object with code, message and
    name.
    """
    EVENT = 5
    """A publication on a topic."""
    RECEIPT = 6
    """The broker has taken responsibility for the message with this id."""
    ACK = 7
    """What a client has done with a delivery from its mailbox; the id is its seq."""
    OPEN = 8
    """A client asks for a channel to another client; the first frame of a connection."""
    JOIN = 9
    """The other client accepts it; the first frame of a connection."""


class Flag(IntFlag):
    """The bits of the second header byte; a frame with any other bit is malformed."""

    RECEIPT = 1
    """The sender asks for a RECEIPT."""
    EXTENSION = 2
    """An extension stands before the payload."""
    ACK = 4
    """From the broker, on MESSAGE and EVENT: a delivery from a mailbox; on ERROR and
    RECEIPT: about a request or a delivery that the client received. On an ACK: of all
    deliveries up to this one.
    """


class CodecId(IntEnum):
    """The encoding of a payload: 4 to 127 are reserved, 128 to 255 are for users."""

    RAW = 0
    PICKLE = 1
    JSON = 2
    MSGPACK = 3


#: The same numbers for hot paths, as plain integers: a lookup in an enum, and a
#: comparison with its members, take several times as long.
MESSAGE_KIND: Final = int(Kind.MESSAGE)
REQUEST_KIND: Final = int(Kind.REQUEST)
REPLY_KIND: Final = int(Kind.REPLY)
ERROR_KIND: Final = int(Kind.ERROR)
EVENT_KIND: Final = int(Kind.EVENT)
RECEIPT_KIND: Final = int(Kind.RECEIPT)
ACK_KIND: Final = int(Kind.ACK)
RECEIPT_FLAG: Final = int(Flag.RECEIPT)
EXTENSION_FLAG: Final = int(Flag.EXTENSION)
ACK_FLAG: Final = int(Flag.ACK)
RAW_CODEC: Final = int(CodecId.RAW)
JSON_CODEC: Final = int(CodecId.JSON)
