# SPDX-License-Identifier: Apache-2.0
"""Brings extents to their targets: blocks where they belong, zeroes where they are needed.

A target is a file, or over NBD an image of a format other than raw.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable
from typing import NoReturn

from vmapipe.clusters.sizes import BLOCK_BYTES, CLUSTER_BYTES
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
from vmapipe.runtime.syscalls import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    fallocate,
    read_at,
)
from vmapipe.vma.extent import ClusterRun, Extent, block_pieces

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


# Below this, writing zeroes is quicker than changing the file's extents.
RANGE_BYTES = 64 * 1024
_ZEROES_BYTES = 1 << 20
# Not supported here; EINVAL: a block device's sectors are larger than the range's ends.
_TRY_ANOTHER_WAY = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV}
# Buffered writes of 1 MiB and more into a new file were slower than these; over
# what is there already, an extent's data in one go took 0.94 of their time.
_NEW_BYTES = 256 * 1024
_OVER_BYTES = 4 << 20
# A written run of at least this is sent on to the disk at once. Without that
# the kernel waits until 10 % of all memory is dirty, and the disk idles: 2 GiB
# into a new file took 1.8 s instead of 1.15 s, its fsync included.
_EARLY_BYTES = 1 << 20
# IOV_MAX, what one pwritev takes.
_MAX_BUFFERS = 1024


def zero_pages() -> memoryview:
    """1 MiB of zeroes that costs next to no memory (all of it is one page)."""
    return memoryview(mmap.mmap(-1, _ZEROES_BYTES, prot=mmap.PROT_READ))


class Zeroer:
    """Zeroes ranges of one descriptor, a file's or a block device's.

    Neighbouring ranges that come one after the other are merged; `flush` at
    the end. OSError carries no offset: `at` tells where it happened.
    """

    def __init__(self, fd: int, zeroes: memoryview) -> None:
        self.at = 0
        self._fd = fd
        self._zeroes = zeroes
        self._start = self._end = 0
        # A hole gives the storage back. A block device that cannot discard
        # still zeroes quicker itself than through us.
        self._modes = [
            FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
            FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
        ]

    def add(self, offset: int, length: int) -> None:
        """Zero these bytes now or at the next `flush`. Raises OSError."""
        if offset != self._end:
            self.flush()
            self._start = offset
        self._end = offset + length

    def flush(self) -> None:
        start, end = self._start, self._end
        self._start = self._end = 0
        if start < end:
            self.at = start
            self._zero(start, end)

    def _zero(self, start: int, end: int) -> None:
        while self._modes and end - start >= RANGE_BYTES:
            try:
                fallocate(self._fd, self._modes[0], start, end - start)
                return
            except OSError as error:
                if error.errno not in _TRY_ANOTHER_WAY:
                    raise
                if error.errno == errno.EINVAL:
                    break  # for this range only
                self._modes.pop(0)
        while start < end:
            self.at = start
            start += os.pwrite(self._fd, self._zeroes[: end - start], start)


class TargetWriter:
    """Writes into the targets of one worker; what belongs to another device is left out."""

    def __init__(self, setups: Iterable[TargetSetup]) -> None:
        zeroes = zero_pages()
        self._targets: dict[int, _FileTarget | NbdTarget] = {
            setup.dev_id: NbdTarget(setup, zeroes) if setup.nbd else _FileTarget(setup, zeroes)
            for setup in setups
        }

    def write(self, extent: Extent, data: memoryview) -> None:
        """`data`: the extent's stored blocks. Raises TargetError."""
        for run in extent.runs:
            target = self._targets.get(run.dev_id)
            if target is not None:
                target.write(run, data)

    def write_changed(self, extent: Extent, data: memoryview) -> int:
        """Write what the targets do not hold yet; return how many bytes of data they held.

        Raises TargetError.
        """
        kept_bytes = 0
        for run in extent.runs:
            target = self._targets.get(run.dev_id)
            if target is None:
                continue
            if target.holds(run, data):
                kept_bytes += run.data_bytes
            else:
                target.write(run, data)
        return kept_bytes

    def read_back(self, extent: Extent, data: memoryview) -> bool:
        """Fill in the extent's stored blocks as the targets hold them.

        False where they cannot be known: not all goes to targets that can be read, or there
        is something else where zeroes must be. Raises TargetError.
        """
        for run in extent.runs:
            target = self._targets.get(run.dev_id)
            if target is None and run.is_zero:
                continue
            if target is None or not target.read_back(run, data):
                return False
        return True

    def flush(self) -> None:
        """After this, all that was given is written. Raises TargetError."""
        for target in self._targets.values():
            target.flush()

    def sync(self, dev_id: int) -> None:
        """Bring a target to the disk. Raises TargetError."""
        self._targets[dev_id].sync()


class _FileTarget:
    def __init__(self, setup: TargetSetup, zeroes: memoryview) -> None:
        self._fd = setup.fd
        self._size_bytes = setup.size_bytes
        self._zeroes = zeroes
        self._zeroer = Zeroer(setup.fd, zeroes) if setup.write_zeroes else None
        self._write_bytes = _OVER_BYTES if setup.write_zeroes else _NEW_BYTES
        name = setup.name.decode("utf-8", "backslashreplace")
        self._label = f"device {name!r}: cannot write to {os.fsdecode(setup.path)}"
        self._at = 0

    def write(self, run: ClusterRun, data: memoryview) -> None:
        pieces = block_pieces(run, self._size_bytes)
        try:
            if self._zeroer is None:
                for at, data_at, length in pieces:
                    self._write_data(at, data[data_at : data_at + length])
            else:
                self._write_all(run, pieces, data, self._zeroer)
        except OSError as error:
            raise self._failed(error, self._at) from error
        if run.data_bytes >= _EARLY_BYTES:
            start = run.first_cluster * CLUSTER_BYTES
            # Linux begins to write out what is dirty in a range that is not needed again.
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._fd, start, run.count * CLUSTER_BYTES, os.POSIX_FADV_DONTNEED)

    def holds(self, run: ClusterRun, data: memoryview) -> bool:
        """Return whether all of this run is there already. Raises TargetError."""
        return self._compare(run, lambda there, at, length: there == data[at : at + length])

    def read_back(self, run: ClusterRun, data: memoryview) -> bool:
        """Fill in the run's stored blocks; False: zeroes are missing. Raises TargetError."""

        def take(there: memoryview, at: int, length: int) -> bool:
            data[at : at + length] = there
            # The last block of a disk whose size is not whole blocks is stored with zeroes.
            padding = -length % BLOCK_BYTES
            data[at + length : at + length + padding] = bytes(padding)
            return True

        return self._compare(run, take)

    def _compare(self, run: ClusterRun, take: Callable[[memoryview, int, int], bool]) -> bool:
        """Give `take` what is there of each piece, with the piece's place in the extent's data.

        Whether it said yes to all, and what lies between them is zero where that matters.
        """
        at = run.first_cluster * CLUSTER_BYTES
        end = min(at + run.count * CLUSTER_BYTES, self._size_bytes)
        there = self._read(at, end - at)
        start = at
        for piece_at, data_at, length in block_pieces(run, self._size_bytes):
            if not self._is_zero(there[at - start : piece_at - start]):
                return False
            at = piece_at + length
            if not take(there[piece_at - start : at - start], data_at, length):
                return False
        return self._is_zero(there[at - start :])

    def _is_zero(self, there: memoryview) -> bool:
        if self._zeroer is None:
            return True  # zeroes are not written because the user says that they are there
        step = len(self._zeroes)
        pieces = (there[at : at + step] for at in range(0, len(there), step))
        return all(piece == self._zeroes[: len(piece)] for piece in pieces)

    def _read(self, at: int, length: int) -> memoryview:
        """Read from the target; beyond its end there are zeroes. Raises TargetError."""
        buffer = memoryview(bytearray(length))
        read_at(self._fd, buffer, at, self._unreadable)
        return buffer

    def _unreadable(self, at: int, error: OSError) -> TargetError:
        return TargetError(f"{self._label} (nor read it) at offset {at}: {os_error_text(error)}")

    def _write_data(self, at: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            self._at = at + done
            done += os.pwrite(self._fd, data[done : done + self._write_bytes], at + done)

    def _write_all(
        self,
        run: ClusterRun,
        pieces: list[tuple[int, int, int]],
        data: memoryview,
        zeroer: Zeroer,
    ) -> None:
        """The whole run, zeroes too: small gaps are written with their neighbours in one go."""
        at = run.first_cluster * CLUSTER_BYTES
        end = min(at + run.count * CLUSTER_BYTES, self._size_bytes)
        start = at
        buffers: list[memoryview] = []
        for piece_at, data_at, length in pieces:
            gap = piece_at - at
            if gap and buffers and gap < RANGE_BYTES and len(buffers) < _MAX_BUFFERS - 1:
                buffers.append(self._zeroes[:gap])
            elif gap or len(buffers) >= _MAX_BUFFERS - 1:
                self._write_buffers(start, buffers)
                buffers = []
                if gap:
                    self._zero(zeroer, at, gap)
                start = piece_at
            elif not buffers:
                start = piece_at
            buffers.append(data[data_at : data_at + length])
            at = piece_at + length
        self._write_buffers(start, buffers)
        if at < end:
            self._zero(zeroer, at, end - at)

    def _zero(self, zeroer: Zeroer, at: int, length: int) -> None:
        self._at = at
        zeroer.add(at, length)

    def _write_buffers(self, at: int, buffers: list[memoryview]) -> None:
        if len(buffers) == 1:
            self._write_data(at, buffers[0])
            return
        while buffers:
            self._at = at
            written = os.pwritev(self._fd, buffers, at)
            at += written
            while buffers and written >= len(buffers[0]):
                written -= len(buffers.pop(0))
            if buffers:
                buffers[0] = buffers[0][written:]

    def flush(self) -> None:
        if self._zeroer is not None:
            try:
                self._zeroer.flush()
            except OSError as error:
                raise self._failed(error, self._zeroer.at) from error

    def sync(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise TargetError(f"{self._label}: {os_error_text(error)}") from error

    def _failed(self, error: OSError, at: int) -> TargetError:
        return TargetError(f"{self._label} at offset {at}: {os_error_text(error)}")
