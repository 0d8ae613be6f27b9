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
from vmapipe.runtime.folders import HeldFolder, made_with

_BACKLOG = 128
# sun_path has 108 bytes with its NUL.
_MAX_PATH_BYTES = 107
# A turn takes a millisecond; another process's lock on the folder may last for ever.
_TURN_S = 5.0
_TURN_LOOK_S = 0.01


class Listener:
    """A listening socket, and its name in the folder that it holds (`path` empty: none)."""

    def __init__(
        self, sock: socket.socket, path: str = "", folder: HeldFolder | None = None
    ) -> None:
        self.socket = sock
        self.path = path
        self._folder = folder
        self._name = os.path.basename(path)
        self._status = folder.status(self._name) if folder else None

    @property
    def fd(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        """Close it and remove its name, unless another process has taken that meanwhile."""
        self.socket.close()
        folder, self._folder = self._folder, None
        if folder is None:
            return
        with folder, contextlib.suppress(OSError):
            now = folder.status(self._name)
            if now and self._status and os.path.samestat(now, self._status):
                os.unlink(self._name, dir_fd=folder.fd)


def listen(address: str, mode: int, *, insecure_tcp: bool = False) -> Listener:
    """Listen on a path, or at tcp://HOST:PORT. Raises Failure, UsageError."""
    if address.startswith("tcp://"):
        return Listener(_listen_tcp(address, insecure_tcp=insecure_tcp))
    return listen_unix(address, mode, socket.SOCK_STREAM)


def listen_unix(path: str, mode: int, kind: socket.SocketKind) -> Listener:
    """Listen on a Unix socket, taking over the name of a dead one. Raises Failure."""
    if not 0 < len(os.fsencode(path)) <= _MAX_PATH_BYTES:
        raise UsageError(f"{path!r}: a socket's path has 1..{_MAX_PATH_BYTES} bytes")
    place, name = os.path.split(path)
    try:
        folder = HeldFolder(place)
    except OSError as error:
        raise Failure(f"cannot listen in {place or '.'}: {os_error_text(error)}") from error
    try:
        with alone_in(folder):
            _remove_stale(folder, name, kind)
            return Listener(_bound(folder, name, mode, kind), path, folder)
    except BaseException:
        folder.close()
        raise


def private_folder(path: str, *, others_may_look: bool = False) -> str:
    """Make a folder that only we can enter, or check the existing one. Raises Failure.

    `others_may_look`: one that another user made for us and that only we can write to will do.
    No other user can replace it, so that its path leads to it from now on.
    """
    place, name = os.path.split(path.rstrip("/"))
    try:
        with HeldFolder(place) as above:
            if changer := above.changeable_by_others():
                raise Failure(
                    f"cannot use the folder {path}: other users can rename what is in {changer}; "
                    "choose a place where only root and this user can"
                )
            with contextlib.suppress(FileExistsError):
                above.make_folder(name).close()
            status = above.status(name)
    except OSError as error:
        raise Failure(f"cannot make the folder {path}: {os_error_text(error)}") from error
    forbidden, do = (0o022, "write to") if others_may_look else (0o077, "enter")
    ours = status and stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not ours or (status and status.st_mode & forbidden):
        raise Failure(f"{path} exists, and is not a folder that only this user can {do}: remove it")
    return path


@contextlib.contextmanager
def alone_in(folder: HeldFolder) -> Iterator[None]:
    """Makers and removers of sockets in a folder take turns. Raises Failure."""
    deadline = time.monotonic() + _TURN_S
    while True:
        try:
            fcntl.flock(folder.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Failure(f"cannot listen in {folder.path}: another process locks it") from None
            time.sleep(_TURN_LOOK_S)
        except OSError:
            yield  # we may make names here, and not read them: then without a turn
            return
    try:
        yield
    finally:
        fcntl.flock(folder.fd, fcntl.LOCK_UN)


def _bound(folder: HeldFolder, name: str, mode: int, kind: socket.SocketKind) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        with made_with(mode):
            sock.bind(folder.address(name))
            sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        where = os.path.join(folder.path, name)
        raise Failure(f"cannot listen on {where}: {os_error_text(error)}") from error
    return sock


def _remove_stale(folder: HeldFolder, name: str, kind: socket.SocketKind) -> None:
    path = os.path.join(folder.path, name)
    try:
        status = folder.status(name)
    except OSError:
        return  # bind will say what is wrong
    if status is None:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise Failure(f"cannot listen on {path}: it exists, and is not a socket")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(folder.address(name))
        except ConnectionRefusedError:
            # Its owner died without removing it.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder.fd)
            return
        except OSError:
            pass  # a process is there, and busy, or of another kind
    raise Failure(f"cannot listen on {path}: another process does")


def _listen_tcp(address: str, *, insecure_tcp: bool) -> socket.socket:
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise UsageError(f"{address!r} is not a valid tcp://HOST:PORT")
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
