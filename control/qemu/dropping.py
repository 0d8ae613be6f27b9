# SPDX-License-Identifier: Apache-2.0
"""A target in place of a dead sink: takes QEMU's requests, acknowledges and drops them."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from vmapipe.producer.nbd.backend import Write, WriteOnlyBackend, sink_export
from vmapipe.producer.nbd.server import Offer, Server


class Dropping(WriteOnlyBackend):
    """The `Backend` of one disk, and its server. Nothing is accepted until `start`."""

    def __init__(self, listener: socket.socket, size_bytes: int) -> None:
        #: Whether QEMU has sent something.
        self.served = False
        self._started = False
        self._server = Server([listener], [Offer(sink_export(size_bytes), self)])

    @property
    def clients(self) -> int:
        return self._server.clients

    def start(self) -> None:
        if not self._started:
            self._started = True
            self._server.start()

    def stop(self) -> None:
        """Shuts the listening socket down, for all that hold it."""
        self._server.stop()

    def try_writes(self, writes: Sequence[Write]) -> list[OSError | None]:
        self.served = True
        return [None] * len(writes)

    def try_zeroes(self, offset: int, length: int) -> bool:
        self.served = True
        return True

    def write(self, data: memoryview, offset: int) -> None:
        self.served = True

    def write_zeroes(self, offset: int, length: int, *, may_hole: bool, fast_only: bool) -> None:
        self.served = True

    def flush(self) -> None:
        self.served = True
