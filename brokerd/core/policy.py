"""Policies: the rules of one client, compiled.

`send_to` and `open_from` hold shell-style patterns of names; `publish` and `subscribe` hold topic
patterns (docs/configuration.md, "clients"). Every method returns the rule that allows
the action, or None.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import translate
from operator import is_

from brokerd.config.values import ClientConfig, Rule
from brokerd.core.topics import covers
from brokerd_client.topics import matches

__all__ = ["Policy"]


class Policy:
    """The compiled rules of one client."""

    __slots__ = (
        "_every_topic",
        "_everyone",
        "_from_everyone",
        "_open_from",
        "_publish",
        "_rules",
        "_send_to",
        "_subscribe",
        "admin",
    )

    def __init__(self, config: ClientConfig) -> None:
        self.admin = config.admin
        self._rules = _rules(config)
        self._everyone = _for_all(config.send_to)
        self._send_to = _compiled(config.send_to) if self._everyone is None else ()
        self._from_everyone = _for_all(config.open_from[:1])
        self._open_from = _compiled(config.open_from) if self._from_everyone is None else ()
        self._publish = config.publish
        self._subscribe = config.subscribe
        self._every_topic = next(
            (rule for rule in config.subscribe[:1] if rule.pattern == ">"), None
        )

    def is_of(self, config: ClientConfig) -> bool:
        """Return whether a client has the same objects as rules, so that it can share
        this policy.
        """
        return self.admin == config.admin and all(map(is_, self._rules, _rules(config)))

    def sending(self, name: str) -> Rule | None:
        """Return the rule that allows sending to the client ``name``, or None."""
        if self._everyone is not None:
            return self._everyone
        return next((rule for rule, match in self._send_to if match(name)), None)

    def opening(self, caller: str) -> Rule | None:
        """Return the rule that lets the client ``caller`` open a channel, or None."""
        if self._from_everyone is not None:
            return self._from_everyone
        return next((rule for rule, match in self._open_from if match(caller)), None)

    def publishing(self, topic: str) -> Rule | None:
        """Return the rule that allows publishing on ``topic``, or None.

        No rule allows topics that begin with ``$``.
        """
        return (
            None
            if topic.startswith("$")
            else _first(self._publish, lambda rule: matches(rule, topic))
        )

    def subscribing(self, pattern: str) -> Rule | None:
        """Return the rule that allows the whole of ``pattern``, or None."""
        if self._every_topic is not None and not pattern.startswith("$"):
            return self._every_topic
        return _first(self._subscribe, lambda rule: covers(rule, pattern))


def _rules(config: ClientConfig) -> tuple[tuple[Rule, ...], ...]:
    return config.send_to, config.open_from, config.publish, config.subscribe


def _for_all(rules: Iterable[Rule]) -> Rule | None:
    """Return the rule that allows every client, or None."""
    return next((rule for rule in rules if rule.pattern == "*"), None)


def _compiled(rules: Iterable[Rule]) -> tuple[tuple[Rule, Callable[[str], object]], ...]:
    """Return each rule with the function that matches its pattern."""
    return tuple((rule, re.compile(translate(rule.pattern)).match) for rule in rules)


def _first(rules: Iterable[Rule], allows: Callable[[str], bool]) -> Rule | None:
    return next((rule for rule in rules if allows(rule.pattern)), None)
