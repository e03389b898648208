"""brokerctl's options for TLS: how they combine, and that a mistake is reported before
a connection is opened.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme

from brokerd.ctl.status import Failure, Status
from brokerd.ctl.tls import context_of

TLS = "tls://localhost:6000"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ADDRESS", "CA", "CERT", "CERT_KEY"):
        monkeypatch.delenv(f"BROKERD_{name}", raising=False)


@pytest.mark.parametrize(
    ("address", "given", "complaint"),
    [
        ("localhost:6000", ("ca.pem", None, None), "give --address tls://HOST:PORT"),
        (None, (None, None, "key.pem"), "give --address tls://HOST:PORT"),
        (TLS, (None, None, "key.pem"), "give --cert too"),
        (TLS, ("no/such.pem", None, None), "--ca no/such.pem can't be used: no such file"),
        (
            TLS,
            (None, "no/such.pem", "no/key.pem"),
            "--cert no/such.pem with --cert-key no/key.pem can't be used",
        ),
    ],
)
def test_ctl_tls_options_invalid_are_usage_error(
    address: str | None, given: tuple[str | None, ...], complaint: str
) -> None:
    """Each is a mistake of the command line, and the message says what would be right."""
    with pytest.raises(Failure) as caught:
        context_of(address, *given)

    assert caught.value.exit_code == Status.USAGE
    assert complaint in caught.value.format_message()


def test_ctl_tls_invalid_certificate_file_is_named_and_not_shown(tmp_path: Path) -> None:
    """The message says which file, and what belongs there; nothing of its content."""
    (tmp_path / "cert").write_text("hunter2\n")

    with pytest.raises(Failure, match="give both in PEM") as caught:
        context_of(TLS, None, str(tmp_path / "cert"), None)

    assert str(tmp_path / "cert") in caught.value.format_message()
    assert "hunter2" not in caught.value.format_message()


@pytest.mark.parametrize("by_option", [set(), {"cert"}, {"key"}, {"cert", "key"}])
def test_ctl_tls_option_overrides_its_own_variable(
    by_option: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate and its key may be given in different ways. A value given by an
    option is not taken from a variable.
    """
    issued = trustme.CA().issue_cert("mine")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(str(cert))
    issued.private_key_pem.write_to_path(str(key))
    for name, file in (("cert", cert), ("key", key)):
        variable = "BROKERD_CERT" if name == "cert" else "BROKERD_CERT_KEY"
        monkeypatch.setenv(variable, "no/such.pem" if name in by_option else str(file))

    given = [
        str(file) if name in by_option else None for name, file in (("cert", cert), ("key", key))
    ]

    assert context_of(TLS, None, *given) is not None


def test_ctl_tls_variables_count_for_tls_address_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TLS they are ignored, and with it they mean the same as the options. With
    neither there is no context.
    """
    assert context_of(TLS, None, None, None) is None
    monkeypatch.setenv("BROKERD_CA", "no/such.pem")

    assert context_of("localhost:6000", None, None, None) is None
    for where in (TLS, None):
        monkeypatch.setenv("BROKERD_ADDRESS", TLS)
        with pytest.raises(Failure, match=r"no/such\.pem can't be used"):
            context_of(where, None, None, None)
