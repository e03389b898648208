"""Who may do what, and by which rule."""

from __future__ import annotations

import pytest
from support.fake_network import client

from brokerd.config.values import Rule, Source
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
def test_send_to_holds_shell_patterns(send_to: list[str], name: str, rule: str | None) -> None:
    """The rule that allows sending is named, or there is none."""
    found = Policy(client("ann", send_to=send_to)).sending(name)
    assert (None if found is None else found.pattern) == rule


def test_publishing_follows_topic_patterns_and_never_reaches_the_brokers_own() -> None:
    """``>`` allows every topic but those that begin with ``$``, and no rule can allow
    those.
    """
    policy = Policy(client("ann", publish=["jobs.*", "$broker.>"]))
    assert policy.publishing("jobs.new") == Rule("jobs.*")
    assert policy.publishing("jobs.new.urgent") is None
    assert policy.publishing("$broker.draining") is None
    assert Policy(client("ann")).publishing("$x") is None


def test_subscribing_needs_one_rule_for_the_whole_pattern() -> None:
    """Two rules that only together cover a pattern do not allow it."""
    policy = Policy(client("ann", subscribe=["a.*", "a.*.>"]))
    assert policy.subscribing("a.b") == Rule("a.*")
    assert policy.subscribing("a.b.>") == Rule("a.*.>")
    assert policy.subscribing("a.>") is None


def test_an_answer_says_where_its_rule_stands() -> None:
    """The rule found is the one of the configuration, with its place in the file."""
    rule = Rule("bob", Source("brokerd.yaml", 7))
    found = Policy(client("ann", send_to=[rule])).sending("bob")
    assert found is not None
    assert str(found.source) == "brokerd.yaml:7"


def test_admin_is_taken_from_the_entry() -> None:
    """Only who is configured so is an administrator."""
    assert Policy(client("ops", admin=True)).admin
    assert not Policy(client("ann")).admin
