# SPDX-License-Identifier: Apache-2.0
"""An image of a format other than raw as a worker's target: written over NBD."""

from __future__ import annotations

import os
import socket
from collections import deque
from typing import NoReturn

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.protocol.errors import ProtocolError
from vmapipe.protocol.nbd.client_handshake import NbdClientHandshake
from vmapipe.protocol.nbd.client_transfer import NbdClientTransmission
from vmapipe.protocol.nbd.constants import (
    NBD_CMD_FLUSH,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_FLAG_SEND_WRITE_ZEROES,
)
from vmapipe.protocol.nbd.reply import RequestDone
from vmapipe.protocol.nbd.session import encode_request
from vmapipe.protocol.restore import TargetSetup
from vmapipe.restore.archive.errors import TargetError
from vmapipe.restore.targets.image import EXPORT
from vmapipe.runtime.errors import os_error_text
from vmapipe.vma.extent import ClusterRun, block_pieces

# QEMU's server works on 16 requests of a connection at once.
_IN_FLIGHT = 16
_WRITE_BYTES = 1 << 20
# So much can be zeroed by one request that no answer takes too long.
_ZERO_BYTES = 256 << 20
_SECTOR_BYTES = 512
# A daemon that says nothing for so long hangs with its disk.
_TIMEOUT_S = 120.0
_RECEIVE_BYTES = 4096


class NbdTarget:
    """A worker's connection to one image. Zeroes are written where it may hold other data."""

    def __init__(self, setup: TargetSetup, zeroes: memoryview) -> None:
        """`zeroes`: of `_WRITE_BYTES`, for a server that cannot zero. Raises TargetError."""
        self._size_bytes = setup.size_bytes
        self._write_zeroes = setup.write_zeroes
        # A range of zeroes that is not written yet: the next one may go on there.
        self._zero_start = self._zero_end = 0
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
        export = handshake.session.export
        self._knows_zeroes = bool(export.flags & NBD_FLAG_SEND_WRITE_ZEROES)
        most = min(_ZERO_BYTES, export.block_sizes.maximum)
        self._zero_bytes = (most if self._knows_zeroes else _WRITE_BYTES) & -_SECTOR_BYTES
        self._zeroes = zeroes

    def write(self, run: ClusterRun, data: memoryview) -> None:
        """`data` must not change before `flush`. Raises TargetError."""
        at = run.first_cluster * CLUSTER_BYTES
        end = min(at + run.count * CLUSTER_BYTES, self._size_bytes)
        for piece_at, data_at, length in block_pieces(run, self._size_bytes):
            self._zero(at, piece_at)
            at = piece_at + length
            for start in range(0, length, _WRITE_BYTES):
                piece = data[data_at + start : data_at + min(length, start + _WRITE_BYTES)]
                if odd := len(piece) % _SECTOR_BYTES:
                    # The disk's end: some formats take whole sectors only, and have them.
                    piece = memoryview(bytes(piece) + bytes(_SECTOR_BYTES - odd))
                self._request(NBD_CMD_WRITE, piece_at + start, piece, len(piece))
        self._zero(at, end)

    def holds(self, run: ClusterRun, data: memoryview) -> bool:
        """An image is always written anew: what an interrupted restore has left of it is unknown."""
        return False

    def read_back(self, run: ClusterRun, data: memoryview) -> bool:
        return False

    def _zero(self, start: int, end: int) -> None:
        if not self._write_zeroes or start >= end:
            return
        if start != self._zero_end:
            self._flush_zeroes()
            self._zero_start = start
        self._zero_end = end

    def _flush_zeroes(self) -> None:
        start, end = self._zero_start, self._zero_end
        self._zero_start = self._zero_end = 0
        # As with data, the last sector is written whole.
        end = -(-end // _SECTOR_BYTES) * _SECTOR_BYTES
        for at in range(start, end, self._zero_bytes):
            length = min(self._zero_bytes, end - at)
            if self._knows_zeroes:
                self._request(NBD_CMD_WRITE_ZEROES, at, memoryview(b""), length)
            else:
                self._request(NBD_CMD_WRITE, at, self._zeroes[:length], length)

    def flush(self) -> None:
        """Wait until all that was given is written. Raises TargetError."""
        self._flush_zeroes()
        while self._codec.in_flight:
            self._receive()

    def sync(self) -> None:
        """Bring it to the disk. Raises TargetError."""
        self.flush()
        self._request(NBD_CMD_FLUSH, 0, memoryview(b""), 0)
        self.flush()

    def _request(self, kind: int, offset: int, data: memoryview, length: int) -> None:
        while self._codec.in_flight >= _IN_FLIGHT:
            self._receive()
        try:
            request = self._codec.request(kind, offset, length)
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
                if isinstance(event, RequestDone):
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
