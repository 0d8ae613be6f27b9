# SPDX-License-Identifier: Apache-2.0
"""The folders of keys: a server's pair and the clients it lets in; a client's pair and its server.

A key is one line of 40 characters (Z85, ZeroMQ's RFC 32). Server: `server.key`,
`server.pub`, and `clients/NAME.pub` for each client. Client: `client.key`,
`client.pub`, and `server.pub`: the one server that it talks to.

Files that decide whom we trust must be changeable only by root and by us (`check_trusted`).
That is a matter of the file, of every folder above it, and of every link on the way: a user
who may rename things in one of these chooses what the path leads to.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from dataclasses import dataclass
from pathlib import Path

from vmapipe.runtime.errors import Failure, UsageError, os_error_text

# As many links as the kernel follows in a path.
_MAX_LINKS = 40
# Never waits for a FIFO's writer, never becomes our terminal.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def check_trusted(path: Path) -> None:
    """Raises Failure when another user can change what `path` leads to, and OSError.

    A sticky folder (/tmp) is fine: there nobody renames what belongs to others.
    """
    place, left = Path("/"), [*reversed(Path(os.path.abspath(path)).parts[1:])]
    links = 0
    while left:
        name = left.pop()
        if name == "..":
            place = place.parent
            continue
        entry = place / name
        status = entry.lstat()
        if status.st_uid not in (0, os.geteuid()):
            raise _of_others(entry, status)
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if links > _MAX_LINKS:
                raise Failure(f"{path}: too many links")
            target = Path(os.readlink(entry))
            place = Path("/") if target.is_absolute() else place
            left += [part for part in reversed(target.parts) if part != "/"]
            continue
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if status.st_mode & 0o022 and not sticky:
            raise _of_others(entry, status)
        place = entry


def read_trusted(path: Path, most_bytes: int) -> bytes:
    """Return the content of a file that no other user can change. Raises Failure, OSError; never waits."""
    check_trusted(path)
    return read_regular(path, most_bytes)[0]


def read_regular(path: Path, most_bytes: int) -> tuple[bytes, os.stat_result]:
    """Return content and status of a regular file. Raises Failure, OSError; never waits."""
    fd = os.open(path, _FLAGS)
    try:
        # The open file is looked at: what has its name may change meanwhile.
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Failure(f"{path} is not a file (a folder, FIFO, socket or device is there)")
        return os.read(fd, most_bytes), status
    finally:
        os.close(fd)


def _of_others(path: Path, status: os.stat_result) -> Failure:
    quoted = shlex.quote(str(path))
    ways = []
    if status.st_uid not in (0, os.geteuid()):
        ways.append(f"chown -h {os.geteuid()} {quoted}")
    if status.st_mode & 0o022 and not stat.S_ISLNK(status.st_mode):
        ways.append(f"chmod go-w {quoted}")
    return Failure(
        f"{path}: other users can change it (mode {stat.S_IMODE(status.st_mode):04o}, owner "
        f"{status.st_uid}), and so decide who is trusted: {' && '.join(ways)}"
    )


_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_KEY_CHARS = 40
# Files that are told of at a time: a log that one folder can fill is no log.
_MAX_TOLD = 100
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


class ClientList:
    """The clients of a folder, as it is at each `read`. Not being able to read is no revocation:
    what was read last holds on, and that is told.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        #: By name, as they were read last.
        self._keys: dict[str, str] = {}
        self._told: set[str] = set()
        self._notices: list[str] = []

    def read(self) -> dict[str, str]:
        """Return names by public key. A file that is not a valid key, or that others can change, is left out."""
        try:
            check_trusted(self._folder)
            names = client_names(self._folder)
        except (FileNotFoundError, NotADirectoryError):
            self._tell("", f"{self._folder} is gone: no client may come")
            names = []
        except Failure as failure:
            self._tell("", f"{failure}; no client may come")
            names = []
        except OSError as error:
            # Too many open files, an error of the disk, no permission: nobody has said
            # that a client may no longer come.
            self._keep("", f"cannot read the list of keys {self._folder}", error)
            return self._by_key()
        else:
            self._told.discard("")
        self._keys = {name: key for name in names if (key := self._read(name))}
        return self._by_key()

    def take_notices(self) -> list[str]:
        """Return what is worth a line in the log, once until it changes."""
        notices, self._notices = self._notices, []
        return notices

    def _read(self, name: str) -> str:
        """Empty: this one may not come."""
        file = self._folder / f"{name}.pub"
        try:
            key = read_key(file, checked_folder=True)
        except FileNotFoundError:
            return ""
        except Failure as failure:
            self._tell(name, f"client {name!r} may not come: {failure}")
            return ""
        except OSError as error:
            self._keep(name, f"cannot read the key {file}", error)
            return self._keys.get(name, "")
        self._told.discard(name)
        return key

    def _by_key(self) -> dict[str, str]:
        names: dict[str, str] = {}
        twice = set()
        for name, key in self._keys.items():
            if key in names:
                # Whose jobs would its jobs be?
                twice.add(key)
            names[key] = name
        return {key: name for key, name in names.items() if key not in twice}

    def _keep(self, of: str, what: str, error: OSError) -> None:
        self._tell(of, f"{what}: {os_error_text(error)}; what was read before holds on")

    def _tell(self, of: str, text: str) -> None:
        if of not in self._told and len(self._told) < _MAX_TOLD:
            self._told.add(of)
            self._notices.append(text)


def client_names(folder: Path) -> list[str]:
    """Return the names of the clients with a file in this folder. Raises OSError."""
    files = sorted(os.listdir(folder))
    names = [file.removesuffix(".pub") for file in files if file.endswith(".pub")]
    return [name for name in names if is_client_name(name)]


def is_client_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def read_server_keys(folder: str) -> ServerKeys:
    """Raises Failure for keys that cannot be used or are not secret."""
    home = _folder(folder)
    pair = _read_pair(home, "server")
    clients = home / "clients"
    _check_folder(clients)
    try:
        for name in client_names(clients):
            _read_public(clients / f"{name}.pub")
    except OSError as error:
        raise Failure(f"cannot look into {clients}: {os_error_text(error)}") from error
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
    return ClientKeys(pair, _read_public(home / "server.pub"))


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


def read_key(path: Path, *, checked_folder: bool = False) -> str:
    """Read a public key that no other user can have changed. Raises Failure, OSError.

    `checked_folder`: the folder that it is in was looked at just now.
    """
    if not checked_folder or path.is_symlink():
        check_trusted(path)
    data, status = read_regular(path, _KEY_CHARS + 3)
    if status.st_mode & 0o022 or status.st_uid not in (0, os.geteuid()):
        check_trusted(path)  # says so
    return _key_in(data, path)


def _read_public(path: Path) -> str:
    """Raises Failure."""
    try:
        return read_key(path)
    except OSError as error:
        raise Failure(f"cannot read the key {path}: {os_error_text(error)}") from error


def _folder(folder: str) -> Path:
    home = Path(folder)
    if not home.is_dir():
        raise UsageError(f"--keys {folder}: no such folder; `vmapipe keygen` makes one")
    _check_folder(home)
    return home


def _check_folder(folder: Path) -> None:
    """Raises Failure when other users could put keys of theirs there."""
    try:
        check_trusted(folder)
        if not stat.S_ISDIR(folder.stat().st_mode):
            raise Failure(f"{folder} is not a folder")
    except OSError as error:
        raise Failure(f"cannot look into {folder}: {os_error_text(error)}") from error


def _read_pair(home: Path, role: str) -> KeyPair:
    for half in ("key", "pub"):
        if not (home / f"{role}.{half}").exists():
            flag = " --client" if role == "client" else ""
            raise UsageError(f"{home}/{role}.{half} is missing; `vmapipe keygen{flag}` makes it")
    return KeyPair(_read_public(home / f"{role}.pub"), _read_secret(home / f"{role}.key"))


def _read_secret(path: Path) -> str:
    try:
        data, status = read_regular(path, _KEY_CHARS + 3)
        if status.st_mode & 0o077 or status.st_uid not in (0, os.geteuid()):
            raise Failure(
                f"{path}: other users can read or change this secret key "
                f"(mode {stat.S_IMODE(status.st_mode):04o}, owner {status.st_uid}); take a "
                "new one, and keep it at mode 0600"
            )
        check_trusted(path)
        return _key_in(data, path)
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
    """Return whether these five characters stand for four bytes."""
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
