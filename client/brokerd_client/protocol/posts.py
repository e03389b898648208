"""Posts: messages to mailboxes that are sent until they are stored or refused. No I/O.

A post keeps its id over all connections, and posts are sent in the order of their ids. A
post that is under way is one of the dialog's pending calls. It waits here while it has
no connection, and when the broker could not store it. Its key lets the broker store it
once, as long as the broker remembers keys (``store.dedup``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from brokerd_client.errors import (
    BrokerdError,
    Full,
    Offline,
    ShuttingDown,
    StoreFailed,
    StoreInDoubt,
)
from brokerd_client.protocol.pending import Pending, Purpose

__all__ = ["Post", "Posts"]

#: Refusals that are not definite: the post is sent again.
_REPEATED: Final = (StoreInDoubt, StoreFailed, ShuttingDown)
#: Refusals of a broker that does not reach the host of the mailbox. They say nothing
#: about an earlier sending of the post that is in doubt.
_UNREACHED: Final = (Offline, Full)
#: Seconds until posts are sent again on the same connection: the first time, doubled
#: after each failure, and the maximum.
_FIRST_WAIT_S: Final = 0.1
_LONGEST_WAIT_S: Final = 10.0


class Post(Pending):
    """A message that is sent until it is stored or refused.

    Attributes:
        codec, body, extension: The message; the extension has its key.
        sent_at: When it was last sent.
        doubtful_since: When it was first sent without a known outcome, or None.
    """

    __slots__ = ("body", "codec", "doubtful_since", "extension", "sent_at")

    def __init__(
        self,
        message_id: int,
        to: str,
        codec: int,
        body: bytes,
        extension: Mapping[str, Any],
        waiter: Any,
    ) -> None:
        super().__init__(message_id, Purpose.RECEIPT, to, 0, waiter, None)
        self.codec = codec
        self.body = body
        self.extension = extension
        self.sent_at = 0.0
        self.doubtful_since: float | None = None

    def note_doubt(self) -> None:
        """Record that it is not known whether the last sending was stored."""
        if self.doubtful_since is None:
            self.doubtful_since = self.sent_at


class Posts:
    """The posts that are not under way."""

    __slots__ = ("_wait_s", "_waiting", "retry_at")

    def __init__(self) -> None:
        self._waiting: dict[int, Post] = {}
        #: When to send them again, if the connection lasts; None while they wait for a
        #: connection.
        self.retry_at: float | None = None
        self._wait_s = _FIRST_WAIT_S

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, post: Post) -> None:
        """Keep a post until the next connection, or the next try."""
        self._waiting[post.id] = post

    def on_refusal(self, post: Post, error: BrokerdError, now: float) -> bool:
        """Keep a post that was refused; return False if the refusal is definite."""
        in_doubt = post.doubtful_since is not None
        if not isinstance(error, _REPEATED) and not (in_doubt and isinstance(error, _UNREACHED)):
            return False
        if isinstance(error, StoreInDoubt):
            post.note_doubt()
        self.add(post)
        if self.retry_at is None:
            self.retry_at = now + self._wait_s
            self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)
        return True

    def connected(self) -> None:
        """Begin with the shortest wait again, on a new connection."""
        self._wait_s = _FIRST_WAIT_S

    def take_all(self) -> list[Post]:
        """Remove and return all posts, in the order of their calls."""
        posts = sorted(self._waiting.values(), key=_id_of)
        self._waiting.clear()
        self.retry_at = None
        return posts

    def take_doubtful(self, since: float) -> list[Post]:
        """Remove and return the posts that have been in doubt since then or longer."""
        posts = [
            post
            for post in self._waiting.values()
            if post.doubtful_since is not None and post.doubtful_since <= since
        ]
        for post in posts:
            del self._waiting[post.id]
        return posts

    def pop(self, message_id: int) -> Post | None:
        """Forget and return a post whose outcome is not awaited any more."""
        return self._waiting.pop(message_id, None)

    def of(self, waiter: object) -> list[Post]:
        """Return the posts of the waiter."""
        return [post for post in self._waiting.values() if post.waiter is waiter]


def _id_of(post: Post) -> int:
    return post.id
