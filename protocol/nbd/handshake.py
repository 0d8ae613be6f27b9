# SPDX-License-Identifier: Apache-2.0
"""What the handshakes of both ends have in common: one structure is taken after the other."""

from __future__ import annotations

from collections.abc import Callable

from vmapipe.protocol.errors import LocalProtocolError
from vmapipe.protocol.nbd.constants import Bytes
from vmapipe.protocol.nbd.errors import NbdProtocolError, NbdRefusedError
from vmapipe.protocol.nbd.intake import Intake
from vmapipe.protocol.nbd.session import Session


class Handshake:
    """The first structure has `first_bytes`, and `take` takes it."""

    def __init__(self, first_bytes: int, take: Callable[[bytes], bytes]) -> None:
        self.session: Session | None = None
        #: What was fed beyond the handshake's end: the beginning of the transmission phase.
        self.unread = b""
        self._intake = Intake(first_bytes)
        # Takes the structure that is complete and returns what to send; None: the end.
        self._next: Callable[[bytes], bytes] | None = take

    @property
    def wanted_bytes(self) -> int:
        """So many bytes at least are still the handshake's; 0: it is over."""
        return self._intake.missing_bytes if self._next is not None else 0

    def feed(self, data: Bytes) -> bytes:
        """Take bytes as they come, cut anywhere; returns what is to be sent.

        More than `wanted_bytes` is no loss: see `unread`. Raises NbdProtocolError, and at
        the client NbdRefusedError.
        """
        if self._next is None:
            raise LocalProtocolError("the handshake is over")
        rest = memoryview(data)
        out = []
        try:
            while self._next is not None:
                rest = self._intake.add(rest)
                if self._intake.missing_bytes:
                    break
                out.append(self._next(self._intake.take()))
        except (NbdProtocolError, NbdRefusedError) as error:
            self._next = None
            error.unsent = b"".join(out) + error.unsent
            raise
        if self.session:
            self.unread = bytes(rest)
        return b"".join(out)
