# SPDX-License-Identifier: Apache-2.0
"""Addresses of QMP monitors: a path, or QEMU's own notation, unix:PATH and tcp:HOST:PORT.

Also the command-line options that name the monitor of a QEMU.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import stat
import time
from typing import NamedTuple

from vmapipe.runtime.errors import UsageError

# One that does not listen is refused at once; a queue that is full becomes free when the client
# that is served leaves.
_AGAIN_S = 0.05
_HOST_AND_PORT = r"(?:\[([^][]+)\]|([^][:]*)):([0-9]{1,5})"
_COMMA = "\0"


class Address(NamedTuple):
    """A Unix socket's `path`, or `host` and `port`."""

    path: str
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path:
            return self.path
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"

    @property
    def absolute(self) -> str:
        """The address as a process in another folder has to name it."""
        return f"unix:{os.path.abspath(self.path)}".replace(",", ",,") if self.path else str(self)


def parse_address(text: str) -> Address:
    """Parse an address; unix: and tcp: as QEMU reads them, ,options may follow. Raises UsageError."""
    kind, colon, rest = text.partition(":")
    if colon and kind == "unix":
        path, *options = _words(rest)
        if not path or _is_abstract(options):
            raise UsageError(f"{text!r}: a Unix socket is named by its path: unix:/run/vm/qmp.sock")
        return Address(path)
    if colon and kind == "tcp":
        match = re.fullmatch(_HOST_AND_PORT, _words(rest.removeprefix("//"))[0])
        if match is None or not 0 < int(match[3]) < 65536:
            raise UsageError(f"{text!r} is not a valid address like tcp:127.0.0.1:4444")
        # QEMU listens on all addresses then.
        return Address("", match[1] or match[2] or "localhost", int(match[3]))
    match = re.fullmatch(_HOST_AND_PORT, text)
    if match and "/" not in text and not os.path.exists(text):
        raise UsageError(f"there is no socket {text!r}; for a TCP port say tcp:{text}")
    return Address(text)


def _words(text: str) -> list[str]:
    """Commas separate; two are one that belongs to the word."""
    words = text.replace(",,", _COMMA).split(",")
    return [word.replace(_COMMA, ",") for word in words]


def _is_abstract(options: list[str]) -> bool:
    return any(word in ("abstract", "abstract=on") for word in options)


def connect(address: Address, deadline: float) -> socket.socket:
    """Return a connected, non-blocking socket.

    Raises OSError; TimeoutError: its queue of clients stayed full.
    """
    while True:
        left_s = max(0.001, deadline - time.monotonic())
        try:
            if not address.path:
                sock = socket.create_connection((address.host, address.port), left_s)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setblocking(False)
                return sock
            return _connect_unix(address.path)
        except BlockingIOError as error:
            if time.monotonic() + _AGAIN_S > deadline:
                raise TimeoutError("it serves one client at a time, and has others") from error
        time.sleep(_AGAIN_S)


def _connect_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.setblocking(False)
        sock.connect(path)
    except ConnectionRefusedError as error:
        sock.close()
        if not _is_socket(path):
            raise OSError("it is not a socket") from error
        raise
    except BaseException:
        sock.close()
        raise
    return sock


def is_listening(address: Address) -> bool:
    """Tell whether a process listens there, busy or not."""
    try:
        connect(address, time.monotonic()).close()
    except TimeoutError:
        return bool(address.path)  # its queue is full
    except OSError:
        return False
    return True


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return True  # it is gone: as the error says


def add_monitor_options(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, *, required: bool = False, help: str
) -> None:
    parser.add_argument(
        "--qmp",
        required=required,
        metavar="SOCKET",
        help=f"{help}: its Unix socket, or tcp:HOST:PORT (QEMU: -qmp)",
    )
    parser.add_argument(
        "--qmp-share",
        action="store_true",
        help="connect to it for the moment of each command only, so that others who do the same are "
        "served; where it is the machine's only monitor",
    )
