"""The JSON Schema, the shipped configuration and its page agree with the models."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import trustme
import yaml
from pydantic import BaseModel

from brokerd.config import model
from brokerd.config.json_schema import described, json_schema
from brokerd.config.load import ConfigError, build_config, load, load_text

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "config"
PAGE = ROOT / "docs" / "configuration.md"

#: The examples of a cluster's hosts, which have the same clients.
CLUSTER = [f"examples/cluster-{host}.yaml" for host in "abc"]
#: Model, and the path of its keys in the page's headings.
SECTIONS: list[tuple[type[BaseModel], str]] = [
    (model.File, ""),
    (model.ListenEntry, "listen"),
    (model.TlsEntry, "tls"),
    (model.ClientEntry, "clients"),
    (model.CertificateEntry, "certificate"),
    (model.KeyEntry, "keys"),
    (model.RateEntry, "rate"),
    (model.MailboxEntry, "mailbox"),
    (model.StoreEntry, "store"),
    (model.ClusterEntry, "cluster"),
    (model.NatsTlsEntry, "tlscluster"),
    (model.Limits, "limits"),
    (model.Log, "log"),
    (model.LogAreas, "areas"),
    (model.MonitorEntry, "monitor"),
]


@pytest.fixture(scope="module")
def validator() -> Any:
    """A validator for the committed schema."""
    schema = json.loads((CONFIG / "brokerd.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def write_tls_files(folder: Path) -> None:
    """Write the tls/cert.pem, tls/key.pem and tls/ca.pem of the examples."""
    authority = trustme.CA()
    issued = authority.issue_cert("broker.example")
    (folder / "tls").mkdir(exist_ok=True)
    (folder / "tls" / "key.pem").touch(mode=0o600)
    issued.private_key_pem.write_to_path(folder / "tls" / "key.pem")
    issued.cert_chain_pems[0].write_to_path(folder / "tls" / "cert.pem")
    authority.cert_pem.write_to_path(folder / "tls" / "ca.pem")


def uncommented(text: str) -> str:
    """Return the text with the keys that are commented out as examples made active."""
    return re.sub(r"(?m)^( +)# ((?:- |  )?(?:[a-z_0-9]+: |[0-9\"]).*)$", r"\1\2", text)


def test_schema_committed_file_equals_generated_schema() -> None:
    """config/brokerd.schema.json is what ``brokerd schema`` prints."""
    assert (CONFIG / "brokerd.schema.json").read_text(encoding="utf-8") == json.dumps(
        json_schema(), indent=2
    ) + "\n"


@pytest.mark.parametrize(
    "name",
    [
        "brokerd.yaml",
        "clients.d/example.yaml",
        "examples/team.yaml",
        "examples/channels.yaml",
        *CLUSTER,
    ],
)
def test_schema_shipped_config_files_are_valid(name: str, validator: Any) -> None:
    """Each shipped file satisfies the schema, and names the schema where an editor
    looks for it.
    """
    file = CONFIG / name
    text = file.read_text(encoding="utf-8")
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)

    validator.validate(yaml.safe_load(text) or {})

    assert named is not None
    assert (file.parent / named[1]).resolve() == CONFIG / "brokerd.schema.json"


@pytest.mark.parametrize(
    "name", ["brokerd.yaml", "examples/team.yaml", "examples/channels.yaml", *CLUSTER]
)
def test_config_shipped_files_load_once_keys_exist(name: str, tmp_path: Path) -> None:
    """Each shipped file is accepted once the keys exist that its errors ask for."""
    shutil.copytree(CONFIG, tmp_path / "config")
    file = tmp_path / "config" / name

    with pytest.raises(ConfigError) as refused:
        load(file)
    missing = [
        re.fullmatch(r".*: there is no file (\S+) \(.*\)", str(problem))
        for problem in refused.value.problems
    ]
    for number, match in enumerate(missing):
        assert match is not None, refused.value
        key = Path(match[1])
        key.parent.mkdir(exist_ok=True)
        key.write_text(f"key {number}\n")
        key.chmod(0o600)

    assert len(load(file).clients) >= 3


def test_config_shipped_commented_examples_are_valid(tmp_path: Path) -> None:
    """With every example in config/brokerd.yaml made active, the only mistake is that a
    client has too many keys.
    """
    text = uncommented((CONFIG / "brokerd.yaml").read_text(encoding="utf-8"))
    for name in re.findall(r"(?:key_file|file): ([\w./-]+)", text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{name}\n")
        path.chmod(0o600)
    write_tls_files(tmp_path)
    (tmp_path / "clients.d").mkdir()

    with pytest.raises(ConfigError) as refused:
        load_text(text, str(tmp_path / "b.yaml"), {"STATE_DIRECTORY": str(tmp_path)})

    assert [problem.path for problem in refused.value.problems] == ["clients.worker.key"]
    assert "(keep one of key_file, key, key_env, key_credential)" in str(refused.value)


def test_config_shipped_file_shows_every_key() -> None:
    """Every key of each model stands in config/brokerd.yaml, active or as a comment."""
    text = (CONFIG / "brokerd.yaml").read_text(encoding="utf-8")

    for section, _ in SECTIONS:
        for key in section.model_fields:
            assert re.search(rf"(?m)\b{key}\b\s*(:|,| and)", text), key


def test_config_shipped_active_values_are_defaults() -> None:
    """The values that are active in config/brokerd.yaml are the defaults."""
    written = yaml.safe_load((CONFIG / "brokerd.yaml").read_text(encoding="utf-8"))

    def config(limits: Any, log: Any, worker: dict[str, Any]) -> Any:
        return build_config("./b", {"worker": worker}, limits=limits, log=log)

    spelt_out = config(
        written["limits"],
        written["log"],
        {**_without_key(written["clients"]["worker"]), "key": "k"},
    )
    by_default = config({}, {}, {"key": "k"})
    assert set(written["limits"]) == set(model.Limits.model_fields)
    assert set(written["log"]) == set(model.Log.model_fields) - {"audit"}
    assert spelt_out.limits == by_default.limits
    assert spelt_out.log == by_default.log
    assert spelt_out.clients == by_default.clients


def _without_key(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "key_file"}


CERT = {"subject": "CN=alice,O=Example", "fingerprint": ["AB:" * 31 + "CD", "0" * 64]}
VALID = [
    {"listen": ["/run/b.sock", ["localhost", 6000], {"address": "h:1", "allow_md5": True}]},
    {
        "listen": [
            "b.sock",
            "./6000",
            "run/b:1",
            "[::1]:6000",
            "@b",
            "h.example:0",
            "b.socket",
            "./a:1",
        ]
    },
    {
        "listen": [
            {"address": "/b", "mode": "0660", "group": "g"},
            {"address": ["h", 1]},
            {"address": "/c", "group": 5},
        ]
    },
    {"listen": ["./b"], "clients": {"a": {"key": "k"}, "b.c-d": {"peer_uid": [0]}}},
    {
        "listen": ["./b"],
        "clients": {"a": {"keys": [{"key": "k", "not_after": "2026-12-31T00:00:00Z"}]}},
    },
    {
        "listen": ["./b"],
        "clients": {"a": {"key": "k", "rate": {"messages": "5/m", "bytes": 7.5}, "queue": 5}},
    },
    {
        "listen": ["./b"],
        "limits": {"max_message": "1GB", "wait_timeout": 0, "drain_timeout": "1.5h"},
    },
    {"listen": ["./b"], "log": {"level": "error", "format": "json"}, "include": ["none*.yaml"]},
    {"listen": ["./b"], "monitor": "127.0.0.1:6060"},
    {"listen": ["./b"], "monitor": {"address": ["::1", 6060], "per_client": True}},
    {
        "listen": ["./b", {"address": "0.0.0.0:6000", "plain": True}],
        "clients": {"a": {"key": "k", "certificate": CERT}},
    },
    {
        "listen": ["./b"],
        "cluster": {
            "host": "a1",
            "nats": ["nats://127.0.0.1", "tls://[::1]:4223"],
            "prefix": "x.y-z",
            "advertise": ["tls://h:1", "[::1]:6000"],
        },
    },
]
INVALID = [
    {"listen": [5]},
    {"listen": [{"mode": "0600"}]},
    {"listen": [{"address": "h:1", "tls": {"certificate": "c"}}]},
    {"listen": [{"address": "h:1", "tls": {"certificate": "c", "key": "k", "minimum": "1.1"}}]},
    {"listen": ["./b"], "clients": {"a": {"key": "k", "certificate": {}}}},
    {"listen": ["./b"], "clients": {"a": {"key": "k", "certificate": {"fingerprint": "ab:cd"}}}},
    {"listen": [{"address": "/b", "mode": 384}]},
    {"listen": ["./b"], "clients": {"a": {}}},
    {"listen": ["./b"], "clients": {"a": {"key": "k", "key_file": "f"}}},
    {"listen": ["./b"], "clients": {"a": {"key": 5}}},
    {"listen": ["./b"], "clients": {"a": {"keys": []}}},
    {"listen": ["./b"], "clients": {"a": {"keys": [{"key": "k", "file": "f"}]}}},
    {"listen": ["./b"], "clients": {"a": {"keys": [{"key": "k", "not_after": 5}]}}},
    {"listen": ["./b"], "clients": {"a b": {"key": "k"}}},
    {"listen": ["./b"], "clients": {"a": {"key": "k", "conections": 5}}},
    {"listen": ["./b"], "clients": {"a": {"key": "k", "connections": 0}}},
    {"listen": ["./b"], "clients": {"a": {"key": "k", "when_full": "wiat"}}},
    {"listen": ["./b"], "clients": {"a": {"key": "k", "queue": "8M"}}},
    {"listen": ["./b"], "clients": {"a": {"key": "k", "send_to": ["$broker"]}}},
    {"listen": ["./b"], "limits": {"handshake_timeout": 0}},
    {"listen": ["./b"], "monitor": 6060},
    {"listen": ["./b"], "monitor": {"per_client": True}},
    {"listen": ["./b"], "log": {"level": "loud"}},
    {"listen": "b"},
    {"listen": ["6000"]},
    {"listen": ["localhost"]},
    {"listen": ["unix:/run/b.sock"]},
    {"listen": ["127.0.0.1", "./b"]},
    {"listen": ["./b"], "monitor": "localhost"},
    {"listen": ["./b"], "cluster": {"host": "a"}},
    {"listen": ["./b"], "cluster": {"host": "A", "nats": ["nats://localhost"]}},
    {"listen": ["./b"], "cluster": {"host": "all", "nats": ["nats://localhost"]}},
    {"listen": ["./b"], "cluster": {"host": "a", "nats": ["localhost:4222"]}},
    {"listen": ["./b"], "cluster": {"host": "a", "nats": ["nats://u@localhost"]}},
    {"listen": ["./b"], "cluster": {"host": "a", "nats": ["nats://localhost"], "prefix": "a.>"}},
]


@pytest.mark.parametrize("tree", VALID)
def test_schema_tree_accepted_by_loader_is_valid(tree: dict[str, Any], validator: Any) -> None:
    """A configuration that the loader accepts satisfies the schema."""
    load_text(json.dumps(tree))

    validator.validate(tree)


@pytest.mark.parametrize("tree", INVALID)
def test_schema_tree_refused_by_loader_is_invalid(tree: dict[str, Any], validator: Any) -> None:
    """A mistake that an editor can detect is invalid by the schema too."""
    with pytest.raises(ConfigError):
        load_text(json.dumps(tree))

    assert not validator.is_valid(tree)


def test_schema_every_key_has_description() -> None:
    """Every key has a description of one line for the editor to show."""
    for section, _ in SECTIONS:
        for name, field in described(section).model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            assert "\n" not in field.description


def rows() -> Iterator[tuple[str, str, str]]:
    """Yield (section, key, default) of every row in the page's tables of keys."""
    section = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            section = "".join(re.findall(r"`(\w+)`", line))
        row = re.match(r"\| `(\w+)` \| [^|]*\| ([^|]*)\|", line)
        if row:
            yield section, row[1], row[2].strip().replace("`", "")


def test_docs_page_lists_every_key_with_default() -> None:
    """docs/configuration.md lists every key of every model, each in its own section,
    with its true default.
    """
    listed = {(section, key): default for section, key, default in rows()}

    assert set(listed) == {
        (heading, key) for section, heading in SECTIONS for key in section.model_fields
    }
    for section, heading in SECTIONS:
        for name, field in section.model_fields.items():
            default = listed[heading, name]
            extra = field.json_schema_extra
            expected = (
                extra["default"]
                if isinstance(extra, dict) and "default" in extra
                else field.default
            )
            if (
                isinstance(expected, BaseModel)
                or expected is None
                or expected == ()
                or expected == {}
            ):
                assert default in ("none", "no limit", "all", "the broker's own", "see below"), (
                    heading,
                    name,
                )
            elif field.is_required():
                assert default == "required"
            else:
                assert default == _as_yaml(expected), (heading, name)


def _as_yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(f'"{item}"' for item in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if value in ("0600", "1.3") else str(value)


def test_docs_page_yaml_examples_load(tmp_path: Path) -> None:
    """Every block of YAML in the page is part of a configuration that is accepted."""
    blocks = re.findall(r"(?s)```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"))
    assert len(blocks) >= 4
    write_tls_files(tmp_path)
    for block in blocks:
        tree = yaml.safe_load(block) or {}
        for name in re.findall(r"(?:key_file|file|credentials): ([\w./-]+)", block):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{name}\n")
            path.chmod(0o600)
        (tmp_path / "ops").write_text("ops\n")
        (tmp_path / "ops").chmod(0o400)
        text = block if "listen" in tree else f"listen: [b.sock]\n{block}"
        load_text(
            text, str(tmp_path / "b.yaml"), {"CREDENTIALS_DIRECTORY": str(tmp_path), "OPS_KEY": "k"}
        )


def test_docs_page_error_example_equals_printed_errors() -> None:
    """The page's example of errors is what its example of an invalid file prints."""
    page = PAGE.read_text(encoding="utf-8")
    bad, printed = re.search(
        r"(?s)```yaml-with-mistakes\n(.*?)```.*?```text\n(.*?)```", page
    ).groups()  # type: ignore[union-attr]

    with pytest.raises(ConfigError) as refused:
        load_text(bad, "brokerd.yaml")

    assert str(refused.value) + "\n" == printed
