# SPDX-License-Identifier: Apache-2.0
"""Receives a packet together with the descriptors that were sent with it."""

from __future__ import annotations

import array
import socket


def receive_fds(
    sock: socket.socket, size_bytes: int, max_fds: int, flags: int = 0
) -> tuple[bytes, list[int]]:
    """As `socket.recv_fds`, which ignores its flags in Python 3.11. Raises OSError."""
    fds = array.array("i")
    space = socket.CMSG_SPACE(max_fds * fds.itemsize)
    packet, control, _, _ = sock.recvmsg(size_bytes, space, flags | socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return packet, list(fds)
