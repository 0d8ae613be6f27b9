# SPDX-License-Identifier: Apache-2.0
"""Telling systemd how a service is: sd_notify(3), a datagram to the socket in NOTIFY_SOCKET."""

from __future__ import annotations

import os
import socket


def notify(*lines: str) -> None:
    """`READY=1`, `STOPPING=1`, `STATUS=...`. Nothing where nobody listens; it never fails."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect("\0" + address[1:] if address[0] == "@" else address)
            sock.send("\n".join(lines).encode())
    except OSError:
        pass  # systemd's side is gone or full: our work goes on
