"""Which member of each group gets an event.

The rules are from docs/protocol.md, "Topics".
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from brokerd.core.session import Session
    from brokerd.core.topic_search import Matches

__all__ = ["choose_host", "choose_member", "choose_members"]

#: Group members examined per event before the best of them is taken, if it has room.
_LOOKED_AT: Final = 256


def choose_members(matches: Matches, size: int) -> list[Session] | None:
    """Return the members that get the next event of ``size`` bytes, one of each group.

    None: ``brokerd.core.events`` chooses, as a group has no member that can get it, or
    members at other hosts. The caller counts ``matches.turn`` once
    the event is delivered.
    """
    if matches.has_remote:
        return None
    chosen: list[Session] = []
    everyone = matches.everyone
    for group, members in matches.groups.items():
        # A member that gets the event anyway.
        if not members.keys().isdisjoint(everyone) or not members.keys().isdisjoint(chosen):
            continue
        member, _ = choose_member(matches, group, matches.turn + 1, size)
        if member is None or member.retired:
            return None
        chosen.append(member)
    return chosen


def choose_host(matches: Matches, group: str, turn: int) -> Session | None:
    """Return the session of a host with members of a group that gets the event, or None."""
    hosts = [
        member
        for member in matches.members_of(group)
        if member.host and member.open and not (matches.left and member in matches.left)
    ]
    return hosts[turn % len(hosts)] if hosts else None


def choose_member(
    matches: Matches, group: str, turn: int, size: int, about: str | None = None
) -> tuple[Session | None, int]:
    """Return (the member here of a group that gets the event, or None; members examined).

    about: A client name, or None; members that may not send to that client are skipped.
    """
    ordered = matches.members_of(group)
    start = turn % len(ordered)
    lightest: Session | None = None
    least_load = (True, True, 0)
    examined = 0
    for member in itertools.chain(
        itertools.islice(ordered, start, None), itertools.islice(ordered, start)
    ):
        examined += 1
        if not member.open or member.host:
            continue
        if matches.left is not None and member in matches.left:
            continue
        if about is not None and member.client.policy.sending(about) is None:
            continue
        outbox = member.outbox
        waiting = outbox.waiting
        load = (outbox.blocked and waiting + size > outbox.limit, outbox.blocked, waiting)
        if lightest is None or load < least_load:
            lightest, least_load = member, load
            if not waiting:
                break
        if examined >= _LOOKED_AT and not least_load[0]:
            # In a large group, a member that has room is good enough.
            break
    return lightest, examined
