# SPDX-License-Identifier: Apache-2.0
"""Receives a packet together with the descriptors that were sent with it."""

from __future__ import annotations

import array
import socket

# Python's flags are enums, and joining two of them takes longer than a system call.
_CLOSE_ON_EXEC = int(socket.MSG_CMSG_CLOEXEC)
_RIGHTS = (int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS))


def receive_fds(
    sock: socket.socket, size_bytes: int, max_fds: int, flags: int = 0
) -> tuple[bytes, list[int]]:
    """As `socket.recv_fds`, which ignores its flags in Python 3.11. Raises OSError."""
    fds = array.array("i")
    space = socket.CMSG_SPACE(max_fds * fds.itemsize)
    packet, control, _, _ = sock.recvmsg(size_bytes, space, flags | _CLOSE_ON_EXEC)
    for level, kind, data in control:
        if (level, kind) == _RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return packet, list(fds)
