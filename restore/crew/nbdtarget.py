# SPDX-License-Identifier: Apache-2.0
"""A worker's target that is reached over NBD: an image of a format other than raw."""

from __future__ import annotations

import os
import socket
from collections import deque
from typing import NoReturn

from vmapipe.protocol.errors import ProtocolError
from vmapipe.protocol.nbd.client_handshake import NbdClientHandshake
from vmapipe.protocol.nbd.client_transmission import NbdClientTransmission
from vmapipe.protocol.nbd.constants import NBD_CMD_FLUSH, NBD_CMD_WRITE
from vmapipe.protocol.nbd.events import Done
from vmapipe.protocol.nbd.request import encode_request
from vmapipe.protocol.restore_work import TargetSetup
from vmapipe.restore.errors import TargetError
from vmapipe.restore.targets.image import EXPORT
from vmapipe.runtime.errors import os_error_text
from vmapipe.vma.extent import ClusterRun, block_pieces

# QEMU's server works on 16 requests of a connection at once.
_IN_FLIGHT = 16
_WRITE_BYTES = 1 << 20
# A daemon that says nothing for so long hangs with its disk.
_TIMEOUT_S = 120.0
_RECEIVE_BYTES = 4096


class NbdTarget:
    """One connection, of one worker. A new image reads as zero: only data is written."""

    def __init__(self, setup: TargetSetup) -> None:
        """Raises TargetError."""
        self._size_bytes = setup.size_bytes
        name = setup.name.decode("utf-8", "backslashreplace")
        self._label = f"device {name!r}: cannot write to {os.fsdecode(setup.path)}"
        # Offsets of what is under way, oldest first.
        self._offsets: deque[int] = deque()
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(_TIMEOUT_S)
            self._socket.connect(os.fsdecode(setup.nbd))
            handshake = NbdClientHandshake(EXPORT, structured=False)
            while handshake.wanted_bytes:
                data = self._socket.recv(handshake.wanted_bytes)
                if not data:
                    handshake.eof()
                self._socket.sendall(handshake.feed(data))
        except (OSError, ProtocolError) as error:
            self._socket.close()
            self._fail(error)
        if handshake.session is None:
            raise RuntimeError("a handshake that ended without a session")
        self._codec = NbdClientTransmission(handshake.session)

    def write(self, run: ClusterRun, data: memoryview) -> None:
        """`data` must not change before `flush`. Raises TargetError."""
        for at, data_at, length in block_pieces(run, self._size_bytes):
            for start in range(0, length, _WRITE_BYTES):
                piece = data[data_at + start : data_at + min(length, start + _WRITE_BYTES)]
                self._request(NBD_CMD_WRITE, at + start, piece)

    def flush(self) -> None:
        """All that was given is written. Raises TargetError."""
        while self._codec.in_flight:
            self._receive()

    def sync(self) -> None:
        """Bring it to the disk. Raises TargetError."""
        self._request(NBD_CMD_FLUSH, 0, memoryview(b""))
        self.flush()

    def _request(self, kind: int, offset: int, data: memoryview) -> None:
        while self._codec.in_flight >= _IN_FLIGHT:
            self._receive()
        try:
            request = self._codec.request(kind, offset, len(data))
            self._offsets.append(offset)
            self._socket.sendall(encode_request(request))
            self._socket.sendall(data)
        except (OSError, ProtocolError) as error:
            self._fail(error)

    def _receive(self) -> None:
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
            if not data:
                raise EOFError("its storage daemon has ended")
            for event in self._codec.feed(data):
                if isinstance(event, Done):
                    self._offsets.popleft()
                    if event.error:
                        raise OSError(event.error, os.strerror(event.error))
        except (OSError, EOFError, ProtocolError) as error:
            self._fail(error)

    def _fail(self, error: Exception) -> NoReturn:
        # Answers come in any order: the oldest request is where it cannot be far from.
        near = f" near offset {self._offsets[0]}" if self._offsets else ""
        text = os_error_text(error) if isinstance(error, OSError) else str(error)
        raise TargetError(f"{self._label}{near}: {text}") from error
