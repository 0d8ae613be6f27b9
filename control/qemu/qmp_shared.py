# SPDX-License-Identifier: Apache-2.0
"""QEMU's monitor borrowed for the moment of each command, so that others are served in between.

Where it is the machine's only one, and its other users connect for a moment, too (Proxmox VE's
services, panels). QEMU takes the next in its queue as soon as one has left; events that come while
nobody is connected are lost.
"""

from __future__ import annotations

import os
from typing import Any

from vmapipe.control.qemu.addresses import Address, parse_address
from vmapipe.control.qemu.qmp import Command, Link, Peer, QmpGone
from vmapipe.control.qemu.qmp_client import QmpClient, open_qmp

# A person's or a program's command takes seconds at the very most; who stays longer occupies it.
_TURN_S = 30.0


class _InTurn(Peer):
    """QEMU, whose others are waited for."""

    greeting_s = _TURN_S

    def no_greeting(self, path: str) -> QmpGone:
        return QmpGone(
            f"{path}: the QMP monitor has served somebody else for {_TURN_S:.0f} s, who does not "
            "share it (--qmp-share): give QEMU a second -qmp for backups"
        )


class SharedQmp:
    """A connection for each command. `execute` raises QmpRefused, QmpGone."""

    is_shared = True

    def __init__(self, address: Address) -> None:
        """Connects once, so that whoever does not answer is told now. Raises QmpGone."""
        self.path = str(address)
        self._address = address
        self._peer = _InTurn()
        client = QmpClient(address, self._peer)
        #: The process at the other end; None: it is not known.
        self.peer_pid = client.peer_pid
        client.close()
        # Nothing is ever told by itself.
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._is_closed = False

    def execute(self, command: Command) -> Any:
        client = QmpClient(self._address, self._peer, is_brief=True)
        try:
            return client.execute(command)
        finally:
            client.close()

    def events(self) -> list[dict[str, Any]]:
        return []

    def give_fd(self, fd: int, name: str) -> None:
        raise RuntimeError("a descriptor belongs to a connection that stays")

    def add_fd(self, fd: int) -> int:
        raise RuntimeError("a descriptor belongs to a connection that stays")

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            os.close(self.fd)


def open_link(address: str, *, share: bool) -> Link:
    """QEMU's monitor as a user names it. Raises UsageError, QmpGone."""
    return SharedQmp(parse_address(address)) if share else open_qmp(address)
