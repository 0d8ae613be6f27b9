# SPDX-License-Identifier: Apache-2.0
"""The folders of keys: a server's pair and the clients it lets in; a client's pair and its server.

A key is one line of 40 characters (Z85, ZeroMQ's RFC 32). Server: `server.key`,
`server.pub`, and `clients/NAME.pub` for each client. Client: `client.key`,
`client.pub`, and `server.pub`: the one server that it talks to.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from vmapipe.runtime.errors import Failure, UsageError, os_error_text

_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_KEY_CHARS = 40
# A client's name is said in logs and may become a folder's name.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Both halves as text."""

    public: str
    secret: str


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """`server`: the public key of the only server that is talked to."""

    pair: KeyPair
    server: str


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """`clients`: the folder with a public key for each client that may come."""

    pair: KeyPair
    clients: Path

    def allowed(self) -> dict[str, str]:
        """Names by public key, as the folder is now. A file that is no key lets nobody in."""
        names: dict[str, str] = {}
        twice = set()
        for name in client_names(self.clients):
            try:
                key = read_key(self.clients / f"{name}.pub")
            except (Failure, OSError):
                continue
            if key in names:
                # Whose jobs would its jobs be?
                twice.add(key)
            names[key] = name
        return {key: name for key, name in names.items() if key not in twice}


def client_names(folder: Path) -> list[str]:
    """Of the clients with a file in this folder; none when the folder cannot be read."""
    try:
        files = sorted(os.listdir(folder))
    except OSError:
        return []
    names = [file.removesuffix(".pub") for file in files if file.endswith(".pub")]
    return [name for name in names if is_client_name(name)]


def is_client_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def read_server_keys(folder: str) -> ServerKeys:
    """Raises Failure for keys that cannot be used or are not secret."""
    home = _folder(folder)
    pair = _read_pair(home, "server")
    clients = home / "clients"
    _refuse_writable(clients)
    for name in client_names(clients):
        read_key(clients / f"{name}.pub")
    return ServerKeys(pair, clients)


def read_client_keys(folder: str) -> ClientKeys:
    """Raises Failure for keys that cannot be used or are not secret."""
    home = _folder(folder)
    pair = _read_pair(home, "client")
    if not (home / "server.pub").exists():
        raise UsageError(
            f"{home}/server.pub is missing: copy the archiver's server.pub there, over a way "
            "that you trust"
        )
    return ClientKeys(pair, read_key(home / "server.pub"))


def write_pair(folder: str, role: str, pair: KeyPair) -> None:
    """Makes the folder, `ROLE.key` and `ROLE.pub`. Overwrites nothing. Raises Failure."""
    home = Path(folder)
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        if role == "server":
            (home / "clients").mkdir(mode=0o700, exist_ok=True)
        for file in (home / f"{role}.key", home / f"{role}.pub"):
            if os.path.lexists(file):
                raise Failure(f"{file} exists already; keys are never overwritten")
        _write(home / f"{role}.key", pair.secret, 0o600)
        _write(home / f"{role}.pub", pair.public, 0o644)
    except OSError as error:
        raise Failure(f"cannot make keys in {home}: {os_error_text(error)}") from error


def read_key(path: Path) -> str:
    """A public key. Raises Failure."""
    try:
        with path.open("rb") as file:
            return _key_in(file.read(_KEY_CHARS + 3), path)
    except OSError as error:
        raise Failure(f"cannot read the key {path}: {os_error_text(error)}") from error


def _folder(folder: str) -> Path:
    home = Path(folder)
    if not home.is_dir():
        raise UsageError(f"--keys {folder}: no such folder; `vmapipe keygen` makes one")
    _refuse_writable(home)
    return home


def _refuse_writable(folder: Path) -> None:
    """Raises Failure when other users could put keys of theirs there."""
    try:
        status = folder.stat()
    except OSError as error:
        raise Failure(f"cannot look into {folder}: {os_error_text(error)}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise Failure(f"{folder} is no folder")
    if status.st_mode & 0o022 or status.st_uid not in (0, os.geteuid()):
        raise Failure(f"{folder}: other users can change what is in it; chmod go-w, or chown it")


def _read_pair(home: Path, role: str) -> KeyPair:
    for half in ("key", "pub"):
        if not (home / f"{role}.{half}").exists():
            flag = " --client" if role == "client" else ""
            raise UsageError(f"{home}/{role}.{half} is missing; `vmapipe keygen{flag}` makes it")
    return KeyPair(read_key(home / f"{role}.pub"), _read_secret(home / f"{role}.key"))


def _read_secret(path: Path) -> str:
    try:
        with path.open("rb") as file:
            # The open file is looked at: what has its name may change meanwhile.
            status = os.fstat(file.fileno())
            if status.st_mode & 0o077 or status.st_uid not in (0, os.geteuid()):
                raise Failure(
                    f"{path}: other users can read or change this secret key "
                    f"(mode {stat.S_IMODE(status.st_mode):04o}, owner {status.st_uid}); take a "
                    "new one, and keep it at mode 0600"
                )
            return _key_in(file.read(_KEY_CHARS + 3), path)
    except OSError as error:
        raise Failure(f"cannot read the key {path}: {os_error_text(error)}") from error


def _key_in(data: bytes, path: Path) -> str:
    text = data.decode("ascii", "replace").rstrip("\r\n")
    if len(text) != _KEY_CHARS or not all(
        _is_z85(text[at : at + 5]) for at in range(0, _KEY_CHARS, 5)
    ):
        raise Failure(f"{path} holds no key: one line of {_KEY_CHARS} characters (Z85)")
    return text


def _is_z85(five: str) -> bool:
    """Whether these stand for four bytes."""
    value = 0
    for char in five:
        digit = _ALPHABET.find(char)
        if digit < 0:
            return False
        value = value * 85 + digit
    return value < 1 << 32


def _write(path: Path, key: str, mode: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(fd, "w", encoding="ascii") as file:
        os.fchmod(fd, mode)  # whatever the umask is
        file.write(key + "\n")
        file.flush()
        os.fsync(fd)
