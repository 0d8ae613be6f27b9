# SPDX-License-Identifier: Apache-2.0
"""Brings extents to their targets: blocks where they belong, zeroes where they are needed.

A target is a file here; an image of a format other than raw is one of nbd_target.py's.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from vmapipe.clusters.sizes import BLOCK_BYTES, CLUSTER_BYTES
from vmapipe.protocol.restore import TargetSetup
from vmapipe.restore.archive.errors import TargetError
from vmapipe.runtime.errors import os_error_text
from vmapipe.runtime.syscalls import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    fallocate,
    read_at,
)
from vmapipe.vma.extent import ClusterRun, Extent, block_pieces

if TYPE_CHECKING:
    from vmapipe.restore.workers.nbd_target import NbdTarget

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
            setup.dev_id: _nbd_target(setup, zeroes) if setup.nbd else _FileTarget(setup, zeroes)
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


def _nbd_target(setup: TargetSetup, zeroes: memoryview) -> NbdTarget:
    # Late: with all of NBD, 12 ms of a start, which restores of raw disks do without.
    from vmapipe.restore.workers.nbd_target import NbdTarget

    return NbdTarget(setup, zeroes)


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
