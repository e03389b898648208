"""Keys never appear in an error, a warning, a name, a representation or a traceback."""

from __future__ import annotations

import pickle
import traceback
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from brokerd.config import model, yaml_reader
from brokerd.config.lint import lint_warnings
from brokerd.config.load import ConfigError, load, load_text

CANARY = "Kanarienvogel"

#: A key in its place, in the wrong place, of the wrong form, and broken by what YAML
#: makes of it.
LEAKS = [
    "clients: {a: {key: %s}, b: {key: %s}}",
    "clients: {a: {key: [%s]}}",
    "clients: {a: {key: {%s: 1}}}",
    "clients: {a: {key: {x: %s}}}",
    "clients: {a: %s}",
    "clients: {a: [%s]}",
    "clients: {a: {kye: %s}}",
    "clients: {a: {keys: %s}}",
    "clients: {a: {keys: [%s]}}",
    "clients: {a: {keys: [[%s]]}}",
    "clients: {a: {keys: {key: %s}}}",
    "clients: {a: {keys: [{kee: %s}]}}",
    "clients: {a: {keys: [{key: [%s]}]}}",
    "clients: {a: {keys: [{key: %s, file: x}]}}",
    "clients: {a: {keys: [{key: x, not_after: %s}]}}",
    "clients: {a: {key: *%s}}",
    "clients: {a: {key: &%s }}",
    "clients: {a: {key: !%s x}}",
    "clients: {a: {key: !%s!y x}}",
    "clients: {a: {key: '%s}}",
    'clients: {a: {key: "\\q%s"}}',
    "clients: {a: {key: [%s}}",
    "clients: {a: {key: %s: %s}}",
    "clients:\n  a:\n    key: |x %s\n",
    "clients:\n  a:\n    key: >9%s\n",
    "clients:\n  a:\n    key: @%s\n",
    "clients:\n  a:\n    key: '%s' '%s'\n",
    "clients:\n  a:\n    key: %s\n   b\n",
    "clients:\n  a:\n    key: %s\n    key: %s\n",
    "clients:\n  a:\n    key: %s\x07\n",
    "%%%s\n---\n",
    "%%TAG %s\n---\n",
    "%s",
    "- %s",
    "clients: {a: {key: %s, connections: %s, rate: [%s], when_full: x, admin: %s}}",
    "limits: %s",
    "listen: {x: %s}",
]


def outputs(error: BaseException) -> str:
    """Return all text of an error that a person or a log may see."""
    return "\n".join(
        [str(error), repr(error), repr(error.args), *traceback.format_exception(error)]
    )


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("template", LEAKS)
def test_config_error_with_misplaced_key_hides_key(
    template: str, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a key is misplaced or mistyped, the error and its traceback do not
    contain it.
    """
    if plain:
        import yaml

        monkeypatch.setattr(yaml_reader, "_LOADER", yaml.SafeLoader)
    count = template.replace("%%", "").count("%s")
    text = "listen: [/run/b.sock]\n" * (not template.startswith("%%")) + template % (
        (CANARY,) * count
    )

    with pytest.raises(ConfigError) as refused:
        load_text(text, "f")

    assert CANARY not in outputs(refused.value)
    assert refused.value.__cause__ is None


#: Keys of every form that people make: base64 in both alphabets, hexadecimal, base32, a
#: word, a passphrase, PEM.
KEYS = [
    "pV8k3Jz-0aQ_9dFhXw2mTtE7yLrUuNcB4sGiK1oZvIA",
    "pV8k3Jz/0aQ+9dFhXw2mTtE7yLrUuNcB4sGiK1oZvIA=",
    "pV8k3Jz/0aQ9dFhXw2mTtE7yLrUuNcB4sGiK1oZvIA",
    "/V8k3Jz0aQ9dFhXw2mTtE7yLrUuNcB4sGiK1oZvIA",
    "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "9F86D081884C7D659A2FEAA0C55AD015A3BF4F1B2B0B822CD15D6C15B0F00A08",
    "JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP",
    CANARY,
    "hunter2-hunter2",
    "correct horse/battery staple",
    "-----BEGIN PRIVATE KEY----- MC4CAQAwBQYDK2VwBCIEIJ/abc -----END PRIVATE KEY-----",
]
PASTED = [
    'clients: {a: {key_file: "%s"}}',
    'clients: {a: {key_env: "%s"}}',
    'clients: {a: {key_credential: "%s"}}',
    'clients: {a: {keys: [{file: "%s"}]}}',
    'clients: {a: {keys: [{env: "%s"}]}}',
    'clients: {a: {keys: [{credential: "%s"}]}}',
    "clients: {a: {'key_file:%s': 1}}",
    "clients: {a: {'key_file:%s'}}",
    "clients: {a: {'%s': 1}}",
    "clients: {a: {keys: [{'file:%s': 1}]}}",
    'clients: {a: {key_file: ["%s"]}}',
    "clients: {a: {key_file: {'%s': 1}}}",
    'clients: {a: {key_file: "%s", key_env: "%s"}}',
    'clients: {a: {key_file: {"%s"}}}',
    "clients:\n  a:\n    key_file:%s\n",
]


@pytest.mark.parametrize(
    "environ", [{}, {"CREDENTIALS_DIRECTORY": "/nonexistent"}, {"CREDENTIALS_DIRECTORY": "/"}]
)
@pytest.mark.parametrize("template", PASTED)
@pytest.mark.parametrize("key", KEYS)
def test_config_error_with_key_pasted_as_name_hides_key(
    key: str, template: str, environ: dict[str, str]
) -> None:
    """A key pasted behind key_file, key_env or key_credential is not a path or a name.
    The error gives only its place.
    """
    if template == PASTED[8] and key in (CANARY, "hunter2-hunter2"):
        pytest.skip("a word alone may be a name with a slip")
    text = "listen: [/run/b.sock]\n" + template % ((key,) * template.count("%s"))

    with pytest.raises(ConfigError) as refused:
        load_text(text, "f", environ)

    assert key not in outputs(refused.value)
    assert refused.value.problems[0].place.line >= 2


@pytest.mark.parametrize("field", ["key", "certificate", "client_ca"])
@pytest.mark.parametrize("pem", [KEYS[-1], KEYS[-1] * 100])
def test_config_error_with_private_key_pasted_as_file_hides_it(field: str, pem: str) -> None:
    """The same holds for TLS, also where a certificate is expected and its key is
    pasted with it.
    """
    given = {"certificate": "c", "key": "k", field: f'"{pem}"'}
    tls = ", ".join(f"{name}: {value}" for name, value in given.items())
    text = f'listen: [{{address: "h:1", tls: {{{tls}}}}}]\nclients: {{a: {{key: k}}}}\n'

    with pytest.raises(ConfigError) as refused:
        load_text(text, "f")

    assert pem not in outputs(refused.value)
    assert "file of that name" in str(refused.value)


@pytest.mark.parametrize(
    "path", ["keys/alice", "./alice", "/etc/brokerd/keys/alice", "alice.key", "keys/bob.2"]
)
def test_config_error_with_plain_key_file_path_shows_path(path: str) -> None:
    """The error of a missing key file names the path, and the command that makes the
    key.
    """
    with pytest.raises(
        ConfigError, match=rf"there is no file {path} \(make one: umask 077; brokerd key > {path}\)"
    ):
        load_text(f"listen: [/run/b.sock]\nclients: {{a: {{key_file: {path}}}}}\n", "f")


_PIECES = st.sampled_from(
    [
        "\n",
        "  ",
        ": ",
        "- ",
        *[
            "key",
            "keys",
            "key_file",
            "clients",
            "a",
            ":",
            "{",
            "}",
            "[",
            "]",
            ",",
            "'",
            '"',
            "|",
            ">",
            "&",
            "*",
            "!",
            "#",
            "%",
            "@",
            "?",
        ],
    ]
)


@given(st.lists(_PIECES, max_size=12), st.lists(_PIECES, max_size=4))
@example([], ["*"])
@example(["{"], [":"])
def test_config_error_with_broken_key_hides_key(before: list[str], after: list[str]) -> None:
    """With any punctuation around the value of ``key:``, no error contains the key."""
    text = f"listen: [./b]\nclients:\n  a:\n    key: {''.join(after)}{CANARY}{''.join(before)}\n"

    try:
        shown = repr(load_text(text, "f"))
    except ConfigError as error:
        shown = outputs(error)

    # Behind a line break, comma or colon the word may be a name instead of a key.
    named = {":", ": ", "\n", "?", ","} & {*before, *after}
    assert named or CANARY not in shown


def test_config_str_and_repr_hide_keys(tmp_path: Path) -> None:
    """Neither str nor repr of a configuration, or of anything in it, contains a key.
    Nor do the warnings.
    """
    (tmp_path / "key").write_text(CANARY + "1")
    (tmp_path / "key").chmod(0o600)
    file = tmp_path / "b.yaml"
    file.write_text(
        "listen: [b.sock]\nclients:\n"
        f"  a: {{key_file: key}}\n  b: {{key: {CANARY}2}}\n  c: {{key_env: E}}\n"
        f"  d: {{keys: [{{key: {CANARY}4, not_after: 2001-01-01}}]}}\n"
    )
    file.chmod(0o600)

    config = load(file, {"E": CANARY + "3"})

    assert config.clients["a"].keys[0].value == CANARY.encode() + b"1"
    shown = [
        config,
        config.clients,
        *config.clients.values(),
        *(c.keys for c in config.clients.values()),
    ]
    shown += [key for client in config.clients.values() for key in client.keys]
    for value in shown:
        assert CANARY not in f"{value} {value!r}"
    assert CANARY not in "".join(lint_warnings(config, datetime.now(UTC)))
    assert all(
        CANARY not in key.source + key.key_id
        for client in config.clients.values()
        for key in client.keys
    )


def test_config_models_hide_keys_in_repr_and_errors() -> None:
    """The models that validate a file hide keys in their representation and in
    pydantic's own errors.
    """
    entry = model.ClientEntry.model_validate({"key": CANARY})
    item = model.KeyEntry.model_validate({"key": CANARY})
    assert CANARY not in f"{entry} {entry!r} {item} {item!r}"

    with pytest.raises(ValueError, match="key") as refused:
        model.ClientEntry.model_validate({"key": [CANARY], "kye": CANARY})
    assert CANARY not in str(refused.value) + repr(refused.value)


def test_config_pickled_is_refused() -> None:
    """Keys can't leave the process by an accidental pickle of the configuration."""
    config = load_text(f"listen: [./b]\nclients: {{a: {{key: {CANARY}}}}}\n")

    with pytest.raises(TypeError):
        pickle.dumps(config)
