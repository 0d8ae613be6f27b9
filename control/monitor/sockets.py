# SPDX-License-Identifier: Apache-2.0
"""Listening sockets: made safely, found again after a crash, removed at the end."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import stat
import time
from collections.abc import Iterator

from vmapipe.runtime.errors import Failure, UsageError, os_error_text
from vmapipe.runtime.folders import made_with

_BACKLOG = 128
# sun_path has 108 bytes with its NUL.
_MAX_PATH_BYTES = 107
# A turn takes a millisecond; somebody else's lock on the folder may last for ever.
_TURN_S = 5.0
_TURN_LOOK_S = 0.01


class Listener:
    """A listening socket, and its name in the file system (empty: none)."""

    def __init__(self, sock: socket.socket, path: str) -> None:
        self.socket = sock
        self.path = path
        self._identity = _identity(path) if path else None

    @property
    def fd(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        """The name goes too, unless somebody else has taken it meanwhile."""
        self.socket.close()
        if self.path and _identity(self.path) == self._identity:
            with contextlib.suppress(OSError):
                os.unlink(self.path)


def listen(address: str, mode: int, *, insecure_tcp: bool = False) -> Listener:
    """A path, or tcp://HOST:PORT. Raises Failure, UsageError."""
    if address.startswith("tcp://"):
        return Listener(_listen_tcp(address, insecure_tcp=insecure_tcp), "")
    return listen_unix(address, mode, socket.SOCK_STREAM)


def listen_unix(path: str, mode: int, kind: socket.SocketKind) -> Listener:
    """Takes over the name of a socket that nobody listens on any more. Raises Failure."""
    if not 0 < len(os.fsencode(path)) <= _MAX_PATH_BYTES:
        raise UsageError(f"{path!r}: a socket's path has 1..{_MAX_PATH_BYTES} bytes")
    with alone_in(os.path.dirname(path) or "."):
        return _listen_unix(path, mode, kind)


def private_folder(path: str, *, others_may_look: bool = False) -> str:
    """A folder that only we can enter: a new one, or the one that is there. Raises Failure.

    `others_may_look`: one that somebody else made for us and that only we can write to will do.
    """
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        status = os.lstat(path)
    except OSError as error:
        raise Failure(f"cannot make the folder {path}: {os_error_text(error)}") from error
    forbidden, do = (0o022, "write to") if others_may_look else (0o077, "enter")
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not ours or status.st_mode & forbidden:
        raise Failure(f"{path} exists, and is no folder that only this user can {do}: remove it")
    return path


@contextlib.contextmanager
def alone_in(folder: str) -> Iterator[None]:
    """Makers and removers of sockets in a folder take turns. Raises Failure."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        yield  # we may make names here, and not read them: then without a turn
        return
    except OSError as error:
        raise Failure(f"cannot listen in {folder}: {os_error_text(error)}") from error
    try:
        deadline = time.monotonic() + _TURN_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Failure(f"cannot listen in {folder}: another process locks it") from None
                time.sleep(_TURN_LOOK_S)
        yield
    finally:
        os.close(fd)


def _listen_unix(path: str, mode: int, kind: socket.SocketKind) -> Listener:
    _remove_stale(path, kind)
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        with made_with(mode):
            sock.bind(path)
            sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise Failure(f"cannot listen on {path}: {os_error_text(error)}") from error
    return Listener(sock, path)


def _remove_stale(path: str, kind: socket.SocketKind) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise Failure(f"cannot listen on {path}: it exists, and is no socket")
    except OSError:
        return  # not there, or bind will say what is wrong
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            # Its owner died without removing it.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        except OSError:
            pass  # somebody is there, and busy, or of another kind
    raise Failure(f"cannot listen on {path}: another process does")


def _listen_tcp(address: str, *, insecure_tcp: bool) -> socket.socket:
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise UsageError(f"{address!r} is no tcp://HOST:PORT")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise Failure(f"cannot listen on {address}: {os_error_text(error)}") from error
    if not insecure_tcp and not ipaddress.ip_address(found[4][0]).is_loopback:
        raise UsageError(
            f"{address}: whoever reaches it can read and write the disk, without a password; "
            "use a Unix socket or a loopback address (and ssh -L), or accept the risk with "
            "--insecure-plain-tcp"
        )
    sock = socket.socket(found[0], socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(found[4])
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise Failure(f"cannot listen on {address}: {os_error_text(error)}") from error
    return sock


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
