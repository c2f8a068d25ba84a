"""API keys: who may ask a server for what, and how often.

In:  a file in the home folder.  Out: keys made, listed, revoked; the key that a secret belongs to.
Knows nothing of HTTP or of which route needs which role.

A key is `rk_ID_SECRET`, shown once. Of the secret, 256 random bits, the file holds a BLAKE2b hash under a salt of the
key's own; nothing slower is needed for what nobody can guess. Whoever can write the file can make keys.
"""

import base64
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cluster.errors import ConfigError

ROLES = ("read", "write", "admin")
"""Each may what those before it may."""
PREFIX = "rk"
ID_BYTES, SECRET_BYTES, SALT_BYTES, HASH_BYTES = 6, 32, 16, 32
MAX_NAME_CHARS = 100
LOOK_S = 1.0
"""How long a change of the file may go unnoticed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What is known of a key: not the key."""

    key_id: str
    name: str
    role: str
    salt: str
    hash: str
    created_us: int
    revoked_us: int | None = None
    rate_per_s: float | None = None
    """Requests a second; none is what the server grants every key."""

    def allows(self, role: str) -> bool:
        """Whether it may do what needs this role."""
        return ROLES.index(self.role) >= ROLES.index(role)


class KeyFile:
    """The keys of one home."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Key]:
        """Return all keys by id, revoked ones too; none where there is no file. Raises `ConfigError`."""
        try:
            stated = json.loads(self.path.read_text("utf-8"))
            keys = {raw["key_id"]: Key(**raw) for raw in stated["keys"]}
            for key in keys.values():
                _check(key)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{self.path}: is no file of keys ({error}); restore it, or remove it") from error
        return keys

    def add(self, name: str, role: str, rate_per_s: float | None = None) -> tuple[Key, str]:
        """Make a key; return it, and what its owner presents, which cannot be had again. Raises `ConfigError`."""
        if role not in ROLES:
            raise ConfigError(f"--role {role}: must be one of {', '.join(ROLES)}")
        if not name.strip() or len(name) > MAX_NAME_CHARS or not name.isprintable():
            raise ConfigError(f"name {name[:20]!r}: must have 1 to {MAX_NAME_CHARS} printable characters")
        if rate_per_s is not None and not 0 < rate_per_s < float("inf"):
            raise ConfigError(f"--rate {rate_per_s}: must be above 0")
        secret, salt = _encode(secrets.token_bytes(SECRET_BYTES)), secrets.token_hex(SALT_BYTES)
        key = Key(
            key_id=secrets.token_hex(ID_BYTES),
            name=name,
            role=role,
            salt=salt,
            hash=_hash(secret, salt),
            created_us=time.time_ns() // 1_000,
            rate_per_s=rate_per_s,
        )
        with self._changing() as keys:
            keys[key.key_id] = key
        return key, f"{PREFIX}_{key.key_id}_{secret}"

    def revoke(self, key_id: str) -> Key:
        """Make a key worthless; it stays listed. Raises `ConfigError` for one that is not there."""
        with self._changing() as keys:
            if key_id not in keys:
                raise ConfigError(f"key {key_id!r} is not there; see recloop keys list")
            if keys[key_id].revoked_us is None:
                keys[key_id] = replace(keys[key_id], revoked_us=time.time_ns() // 1_000)
            return keys[key_id]

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Key]]:
        """Read, let the block change, and replace the file; one process at a time."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = self.read()
            yield keys
            scratch = self.path.with_suffix(".new")
            with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump({"keys": [asdict(key) for key in keys.values()]}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(self.path)


class KeyRing:
    """A home's keys as a server sees them: read again when the file has changed, kept when it is damaged or gone."""

    def __init__(self, file: KeyFile, *, required: bool = False) -> None:
        """Where keys are `required`, nobody is known until there is a file. Raises `ConfigError` for a damaged one."""
        self._file = file
        self._stamp: object = None
        self._keys: Mapping[str, Key] = {}
        self._next_look_s = 0.0
        self.is_required = required
        """Whether requests need a key: from the first one on, whatever becomes of it."""
        self._take_up()

    def find(self, presented: str) -> Key | None:
        """Return the key that was presented; none for one that is unknown, wrong or revoked."""
        prefix, _, rest = presented.partition("_")
        key_id, _, secret = rest.partition("_")
        key = self._keys.get(key_id)
        known = key if key is not None else _NOBODY  # an unknown id takes as long as a wrong secret
        is_right = hmac.compare_digest(_hash(secret, known.salt), known.hash)
        if not is_right or prefix != PREFIX or key is None or key.revoked_us is not None:
            return None
        return key

    def look(self) -> None:
        """Take up what has changed, at most once a second."""
        if time.monotonic() >= self._next_look_s:
            self._next_look_s = time.monotonic() + LOOK_S
            try:
                self._take_up()
            except ConfigError:
                return  # those read before stay in force; the command that reads the file says what is wrong with it

    def _take_up(self) -> None:
        try:
            found = self._file.path.stat()
        except OSError:
            return
        stamp = (found.st_mtime_ns, found.st_ino, found.st_size)
        if stamp != self._stamp:
            self._keys = self._file.read()
            self._stamp = stamp
            self.is_required = self.is_required or bool(self._keys)


def _check(key: Key) -> None:
    """Raise `ValueError` or `TypeError` for what no request could be compared with."""
    if key.role not in ROLES:
        raise ValueError("a role is unknown")
    if (len(bytes.fromhex(key.salt)), len(bytes.fromhex(key.hash))) != (SALT_BYTES, HASH_BYTES):
        raise ValueError("a salt or a hash is of another length")
    if key.rate_per_s is not None and not 0 < key.rate_per_s < float("inf"):
        raise ValueError("a rate is not above 0")


def _hash(secret: str, salt: str) -> str:
    return hashlib.blake2b(
        secret.encode("utf-8", "replace"), digest_size=HASH_BYTES, salt=bytes.fromhex(salt)
    ).hexdigest()


def _encode(secret: bytes) -> str:
    return base64.urlsafe_b64encode(secret).decode().rstrip("=").replace("_", "~")


_NOBODY = Key(
    key_id="", name="", role="read", salt="00" * SALT_BYTES, hash="00" * HASH_BYTES, created_us=0, revoked_us=0
)
