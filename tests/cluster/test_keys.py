"""API keys: what the file holds, and which secret opens what."""

import json
import os
import stat
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.errors import ConfigError
from cluster.keys import KeyFile, KeyRing


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys.json")


def test_a_key_is_found_by_what_its_owner_presents_and_by_nothing_else(file: KeyFile) -> None:
    key, presented = file.add("shop", "write", 50)
    other, other_presented = file.add("dashboard", "read")
    ring = KeyRing(file)
    assert (ring.find(presented), ring.find(other_presented)) == (key, other)
    prefix, key_id, secret = presented.split("_")
    wrong = [
        "",
        "_",
        "__",
        presented[:-1],
        presented + "x",
        f"{prefix}_{other.key_id}_{secret}",
        f"rk_{'0' * 12}_{secret}",
    ]
    wrong += [f"sk_{key_id}_{secret}", f"{prefix}_{key_id}_{key.hash}", f"{prefix}__", "\ud800", "ä" * 1_000]
    assert [ring.find(one) for one in wrong] == [None] * len(wrong)


def test_the_file_does_not_hold_the_secret_and_only_its_owner_reads_it(file: KeyFile) -> None:
    _, presented = file.add("shop", "write")
    assert presented.rpartition("_")[2] not in file.path.read_text()
    assert stat.S_IMODE(os.stat(file.path).st_mode) == 0o600


def test_two_keys_of_one_name_have_salts_and_hashes_of_their_own(file: KeyFile) -> None:
    one, other = file.add("shop", "write")[0], file.add("shop", "write")[0]
    assert len({one.key_id, other.key_id, one.salt, other.salt, one.hash, other.hash}) == 6


def test_each_role_may_what_those_before_it_may(file: KeyFile) -> None:
    read, write, admin = (file.add("k", role)[0] for role in ("read", "write", "admin"))
    assert [[key.allows(role) for role in ("read", "write", "admin")] for key in (read, write, admin)] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


def test_a_revoked_key_opens_nothing_and_stays_listed(file: KeyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.keys.LOOK_S", 0)
    key, presented = file.add("shop", "write")
    ring = KeyRing(file)
    assert file.revoke(key.key_id).revoked_us is not None
    ring.look()
    assert (ring.find(presented), ring.is_required) == (None, True)
    assert list(file.read()) == [key.key_id]
    with pytest.raises(ConfigError, match="'nobody' is not there"):
        file.revoke("nobody")


def test_without_a_file_no_key_is_needed_and_the_first_one_changes_that(
    file: KeyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.keys.LOOK_S", 0)
    ring = KeyRing(file)
    ring.look()
    assert not ring.is_required
    _, presented = file.add("shop", "write")
    ring.look()
    assert ring.is_required
    assert ring.find(presented) is not None


def test_a_file_that_is_damaged_or_gone_opens_nothing_to_anyone(file: KeyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.keys.LOOK_S", 0)
    _, presented = file.add("shop", "write")
    ring = KeyRing(file)
    file.path.write_text("{")
    ring.look()
    assert (ring.is_required, ring.find(presented) is not None, ring.find("rk_x_y")) == (True, True, None)
    file.path.unlink()
    ring.look()
    assert ring.is_required


def test_where_keys_are_required_nobody_is_let_in_without_a_file(
    file: KeyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.keys.LOOK_S", 0)
    ring = KeyRing(file, required=True)
    assert (ring.is_required, ring.find("rk_x_y")) == (True, None)
    key, presented = file.add("shop", "write")
    ring.look()
    assert ring.find(presented) == key


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("salt", "no hex"),
        ("salt", "00"),
        ("salt", None),
        ("hash", "ä" * 64),
        ("hash", "00"),
        ("hash", 7),
        ("role", "root"),
        ("rate_per_s", "fast"),
        ("rate_per_s", -1),
    ],
)
def test_a_key_that_no_request_can_be_compared_with_damages_the_file(file: KeyFile, field: str, value: object) -> None:
    file.add("shop", "write")
    stated = json.loads(file.path.read_text())
    stated["keys"][0][field] = value
    file.path.write_text(json.dumps(stated))
    with pytest.raises(ConfigError, match=r"keys\.json: is no file of keys"):
        file.read()


@pytest.mark.parametrize("text", ["{", "[]", '{"keys": [{}]}', '{"keys": [{"key_id": 1}]}', "\xff"])
def test_a_damaged_file_is_named_before_anything_starts(file: KeyFile, text: str) -> None:
    file.path.write_text(text, "latin-1")
    with pytest.raises(ConfigError, match=r"keys\.json: is no file of keys"):
        KeyRing(file)


@pytest.mark.parametrize(
    ("name", "role", "rate"),
    [("", "read", None), ("x" * 101, "read", None), ("a\nb", "read", 1), ("k", "root", 1), ("k", "read", 0)],
)
def test_an_unsound_key_is_not_made(file: KeyFile, name: str, role: str, rate: float | None) -> None:
    with pytest.raises(ConfigError):
        file.add(name, role, rate)
    assert not file.path.exists()


def test_the_command_shows_a_key_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ask(*arguments: str) -> tuple[int, dict]:
        code = main(["keys", *arguments, "--home", str(tmp_path), "--json"])
        out = capsys.readouterr().out
        return code, json.loads(out) if out else {}

    _, made = ask("add", "shop", "--role", "write")
    _, listed = ask("list")
    assert [row["name"] for row in listed["keys"]] == ["shop"]
    assert made["key"] not in json.dumps(listed)
    assert ask("revoke", made["id"])[1]["revoked"] is not None
    assert ask("revoke")[0] == ask("add")[0] == 2
