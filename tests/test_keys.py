"""Key files and `chord-keys`: made once, read by their owner alone, allowed and revoked by name."""

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zmq

from common.errors import OperatorError
from common.keys.allowed import LOOK_S, AllowedKeys, ServerKeys
from common.keys.folder import KeyFolder, check_server_keys, forbidden_bits, key_name_of, only_peer_name, peer_keys
from tests.test_inbox import wait_until


def chord_keys(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "common.keys", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_command_makes_pairs_allows_peers_revokes_and_lists(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    done = chord_keys("create", folder, "learner", "actor-0", "pool")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        "actor-0.public", "actor-0.secret", "learner.public", "learner.secret", "pool.public", "pool.secret",
    ]  # fmt: skip
    assert {mode_of(path) for path in folder.glob("*.secret")} == {0o600}
    assert sorted(path.name for path in (folder / "allowed").iterdir()) == ["actor-0.public", "pool.public"]
    assert chord_keys("revoke", folder, "pool").returncode == 0
    listed = chord_keys("list", folder).stdout.splitlines()
    assert [line.split("\t") for line in listed] == [
        ["actor-0", "pair", "allowed"], ["learner", "pair", "-"], ["pool", "pair", "-"],
    ]  # fmt: skip
    assert chord_keys("allow", folder, folder / "pool.public").returncode == 0
    assert KeyFolder(folder).allowed_names() == ["actor-0", "pool"]


def test_a_secret_key_is_never_readable_by_others_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        KeyFolder(tmp_path / "keys").create("a")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "keys" / "a.secret") == 0o600
    assert mode_of(tmp_path / "keys") == 0o700


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_public_keys_are_readable_by_a_learner_that_is_another_user_whatever_the_umask(
    tmp_path: Path, umask: int
) -> None:
    folder = KeyFolder(tmp_path / "keys")
    before = os.umask(umask)
    try:
        folder.create("a")
        folder.allow("a", folder.public("a"))
    finally:
        os.umask(before)
    public = [folder.path / "a.public", folder.allowed / "a.public"]
    assert [mode_of(path) for path in public] == [0o644, 0o644]
    assert (mode_of(folder.allowed), mode_of(folder.path / "a.secret")) == (0o755, 0o600)


def test_a_folder_of_keys_that_is_none_is_named_in_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "nope", Path(__file__)):
        listed = chord_keys("list", path)
        expected = f"chord-keys: {path}: got no folder, expected one of keys (see chord-keys create)\n"
        assert (listed.returncode, listed.stdout, listed.stderr) == (2, "", expected)
    with pytest.raises(OperatorError, match="Not a directory, expected a folder of keys that can be listed"):
        KeyFolder(tmp_path, Path(__file__)).allowed_names()


def test_an_existing_key_is_never_overwritten(tmp_path: Path) -> None:
    KeyFolder(tmp_path).create("a")
    secret = (tmp_path / "a.secret").read_bytes()
    refused = chord_keys("create", tmp_path, "a")
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        f"chord-keys: {tmp_path}/a.secret: got a key that exists, expected a new name (keys are never overwritten)"
    ]
    assert (tmp_path / "a.secret").read_bytes() == secret


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_secret_key_that_others_can_read_is_refused_in_one_line(tmp_path: Path, mode: int) -> None:
    KeyFolder(tmp_path).create("learner")
    (tmp_path / "learner.secret").chmod(mode)
    with pytest.raises(OperatorError) as refused:
        check_server_keys(str(tmp_path))
    expected = f"{tmp_path}/learner.secret: got mode {mode:04o}, expected 0600: others can read this secret key"
    assert str(refused.value) == expected


@pytest.mark.parametrize(
    ("mode", "owner", "reader", "is_fine"),
    [
        (0o600, 7, 7, True), (0o400, 7, 7, True), (0o440, 7, 7, False),
        (0o440, 0, 7, True),  # a credential of systemd, a Secret of Kubernetes
        (0o444, 0, 7, False), (0o460, 0, 7, False), (0o440, 0, 0, False), (0o440, 8, 7, False),
    ],
)  # fmt: skip
def test_only_root_may_hand_a_secret_key_over_through_a_group(
    mode: int, owner: int, reader: int, is_fine: bool
) -> None:
    assert (mode & forbidden_bits(owner, reader) == 0) == is_fine


def test_allowed_keys_may_lie_apart_from_the_secret(tmp_path: Path) -> None:
    keys, secret, allowed = KeyFolder(tmp_path / "keys"), tmp_path / "secret", tmp_path / "allowed"
    for name in ("learner", "a"):
        keys.create(name)
    secret.mkdir()
    (secret / "learner.secret").write_bytes((keys.path / "learner.secret").read_bytes())
    (secret / "learner.secret").chmod(0o400)
    context: zmq.Context[Any] = zmq.Context()
    served = ServerKeys(context, str(secret), allowed=str(allowed))
    assert served.pair == keys.pair("learner")
    KeyFolder(secret, allowed).allow("a", keys.public("a"))
    wait_until(lambda: served.allowed.name_of(keys.public("a")) == "a", timeout_s=10 * LOOK_S)
    served.close()
    context.term()


@pytest.mark.parametrize("name", ["a.b", "", "a" * 33, "../a", "ä"])
def test_a_name_that_will_not_do_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OperatorError, match=r"key name: got .*, expected 1 to 32 letters"):
        KeyFolder(tmp_path).create(name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"x" * 40 + b"y", b"\xff" * 40, b" " * 40, b"x" * 10_000])
def test_a_damaged_key_is_named(tmp_path: Path, content: bytes) -> None:
    KeyFolder(tmp_path).create("a")
    (tmp_path / "a.secret").write_bytes(content)
    with pytest.raises(OperatorError, match=r"a\.secret: got no key, expected one line of 40 characters of Z85"):
        KeyFolder(tmp_path).pair("a")


def test_the_key_of_a_peer_is_named_by_the_first_part_of_its_name(tmp_path: Path) -> None:
    folder = KeyFolder(tmp_path)
    for name in ("learner", "pool"):
        folder.create(name)
    (tmp_path / "learner.secret").unlink()
    assert key_name_of("pool.machine-1.x") == "pool"
    keys = peer_keys(str(tmp_path), "pool.machine-1.x")
    assert keys
    assert keys.pair.public == zmq.curve_public(keys.pair.secret) == folder.public("pool")
    assert keys.learner == folder.public("learner")
    assert "secret" not in repr(keys)
    assert only_peer_name(str(tmp_path)) == "pool"
    assert peer_keys("", "anyone") is None
    with pytest.raises(OperatorError, match=r"holds no other\.secret \(it holds: pool\), expected the key that speaks"):
        peer_keys(str(tmp_path), "other")
    folder.create("pool-2")
    with pytest.raises(OperatorError, match="--name: got none and 2 keys of peers"):
        only_peer_name(str(tmp_path))


def test_the_learner_is_no_peer(tmp_path: Path) -> None:
    folder = KeyFolder(tmp_path)
    folder.create("learner")
    with pytest.raises(OperatorError, match="got the name learner, expected that of an actor or evaluator"):
        folder.allow("learner", folder.public("learner"))


def test_allowed_keys_follow_the_folder_and_a_broken_file_locks_nobody_else_out(tmp_path: Path) -> None:
    folder = KeyFolder(tmp_path)
    for name in ("a", "b"):
        folder.create(name)
        folder.allow(name, folder.public(name))
    allowed = AllowedKeys(folder.allowed)
    assert allowed.name_of(folder.public("a")) == "a"
    folder.revoke("a")
    (folder.allowed / "broken.public").write_bytes(b"no key")
    wait_until(lambda: allowed.name_of(folder.public("a")) is None, timeout_s=10 * LOOK_S)
    assert allowed.name_of(folder.public("b")) == "b"
    folder.allow("a", folder.public("a"))
    wait_until(lambda: allowed.name_of(folder.public("a")) == "a", timeout_s=10 * LOOK_S)
    (folder.allowed / "c.public").write_bytes(folder.public("a"))
    wait_until(lambda: "ignored" in str(allowed._complaints) or not allowed.name_of(b""), timeout_s=10 * LOOK_S)
    assert allowed.name_of(folder.public("a")) == "a"


def test_other_machines_are_served_only_with_keys_or_on_purpose() -> None:
    def check(*overrides: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "learner", "--check", *overrides]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    for host in ("0.0.0.0", "10.0.0.1", "learner.example"):
        refused = check(f"network.host={host}")
        assert refused.returncode == 2
        (line,) = refused.stderr.splitlines()
        assert f'network.keys: got none with network.host "{host}", expected a folder of keys' in line
    assert check("network.host=0.0.0.0", "network.allow_unauthenticated=true").returncode == 0
    assert check("network.host=0.0.0.0", "network.keys=keys").returncode == 0
    assert check("network.host=127.0.0.9").returncode == 0
    refused = check("network.allowed_keys=allowed")
    assert (refused.returncode, 'network.allowed_keys: got "allowed" without network.keys' in refused.stderr) == (
        2,
        True,
    )
