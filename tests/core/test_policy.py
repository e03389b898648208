"""What the rules of a client allow, and which rule allows it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.fake_network import client

from brokerd.config.values import Rule, Source
from brokerd.core.exchange import Exchange
from brokerd.core.policy import Policy


@pytest.mark.parametrize(
    ("send_to", "name", "rule"),
    [
        (["*"], "anybody", "*"),
        (["bob", "*"], "bob", "*"),
        (["bob"], "bob", "bob"),
        (["bob"], "bobby", None),
        (["bob"], "Bob", None),
        (["report.*"], "report.daily", "report.*"),
        (["report.*"], "reportXdaily", None),
        (["a?", "a*"], "abc", "a*"),
        (["[ab]x"], "bx", "[ab]x"),
        ([], "bob", None),
    ],
)
def test_policy_send_to_matches_shell_patterns(
    send_to: list[str], name: str, rule: str | None
) -> None:
    """The rule that allows sending is returned, or None."""
    allowing_rule = Policy(client("ann", send_to=send_to)).sending(name)
    assert (None if allowing_rule is None else allowing_rule.pattern) == rule


@pytest.mark.parametrize(
    ("open_from", "caller", "rule"),
    [(["*"], "bob", "*"), (["*", "bob"], "bob", "*"), (["bob", "*"], "bob", "bob")],
)
def test_policy_open_from_gives_first_rule_that_matches(
    open_from: list[str], caller: str, rule: str
) -> None:
    """The first rule that allows opening is returned."""
    allowing_rule = Policy(client("ann", open_from=open_from)).opening(caller)
    assert allowing_rule is not None
    assert allowing_rule.pattern == rule


def test_policy_publish_matches_topics_except_those_of_broker() -> None:
    """``>`` allows every topic but those that begin with ``$``, and no rule can allow
    those.
    """
    policy = Policy(client("ann", publish=["jobs.*", "$broker.>"]))
    assert policy.publishing("jobs.new") == Rule("jobs.*")
    assert policy.publishing("jobs.new.urgent") is None
    assert policy.publishing("$broker.draining") is None
    assert Policy(client("ann")).publishing("$x") is None


def test_policy_subscribe_needs_one_rule_for_whole_pattern() -> None:
    """Two rules that only together cover a pattern do not allow it."""
    policy = Policy(client("ann", subscribe=["a.*", "a.*.>"]))
    assert policy.subscribing("a.b") == Rule("a.*")
    assert policy.subscribing("a.b.>") == Rule("a.*.>")
    assert policy.subscribing("a.>") is None


def test_policy_rule_has_its_place_in_configuration() -> None:
    """The returned rule is the one of the configuration, with its place in the file."""
    rule = Rule("bob", Source("brokerd.yaml", 7))
    allowing_rule = Policy(client("ann", send_to=[rule])).sending("bob")
    assert allowing_rule is not None
    assert str(allowing_rule.source) == "brokerd.yaml:7"


def test_policy_admin_is_taken_from_entry() -> None:
    """Only a client configured with admin: true is an administrator."""
    assert Policy(client("ops", admin=True)).admin
    assert not Policy(client("ann")).admin


def test_policy_is_shared_by_clients_with_same_rules() -> None:
    """Of most configurations, all clients have the same few rules."""
    config = client("ann", send_to=["bob"])
    entries = [
        config,
        replace(config, name="bob"),
        replace(config, name="ops", admin=True),
        replace(config, name="dave", publish=()),
    ]
    exchange = Exchange(entries)
    ann, bob, ops, dave = (exchange.clients[entry.name].policy for entry in entries)
    assert ann is bob
    assert ops.admin
    assert not bob.admin
    assert dave.publishing("x") is None
    assert bob.publishing("x") is not None
