# SPDX-License-Identifier: Apache-2.0
"""A device of an archive that can be written to: writes are kept in a sparse file beside it.

The file holds the disk's written blocks at their own offsets, then a table with a bit for
each block of 4 KiB, then a trailer that says which archive's device it belongs to. Data
reaches the disk before the table that points to it; so after a crash a block is either
the old one or the new one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Iterator, Sequence
from uuid import UUID, uuid5

from vmapipe.access.disk import ArchiveDisk
from vmapipe.clusters.sizes import BLOCK_BYTES
from vmapipe.producer.nbd.backend import Write, one_by_one
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.side_files import open_to_change
from vmapipe.runtime.syscalls import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    fallocate,
    read_exactly_at,
    try_read_at,
    write_at,
)
from vmapipe.vma.header import Header

_TRAILER = struct.Struct("<16s16sIQ")
_MAGIC = b"vmapipe-cow-1\n\0\0"
# The table is written in pieces of this size, those that changed.
_PAGE_BYTES = 4096
# So long a run of blocks is looked at in one step.
_ZEROES_BYTES = 1 << 20


def archive_id(header: Header) -> bytes:
    """Return 16 bytes that tell an archive from others with its uuid: stable ones of one machine share it."""
    return uuid5(UUID(bytes=header.uuid), str(header.ctime_s)).bytes


class OverlayDisk:
    """An `ArchiveDisk` below, and the file `path` above it. Owns the file. See `nbd.backend.Backend`."""

    def __init__(
        self,
        below: ArchiveDisk,
        path: str,
        uuid: bytes,
        dev_id: int,
        *,
        is_kept: bool = True,
    ) -> None:
        """A new file is made, or one of the same device is gone on with. Raises Failure.

        `is_kept`: False: it has no name from its first moment on, and nothing is made to last.
        """
        self.size_bytes = below.size_bytes
        self._below = below
        self._path = path
        self._blocks = -(-self.size_bytes // BLOCK_BYTES)
        self._table_at = self._blocks * BLOCK_BYTES
        self._table = bytearray(-(-self._blocks // (8 * _PAGE_BYTES)) * _PAGE_BYTES)
        self._dirty: set[int] = set()
        # Blocks are marked, and filled up from below, one write at a time.
        self._lock = threading.Lock()
        self._is_kept = is_kept
        self._fd = self._open(_TRAILER.pack(_MAGIC, uuid, dev_id, self.size_bytes))
        if not is_kept:
            os.unlink(path)

    @property
    def stored_bytes(self) -> int:
        """How much of its file's disk it takes."""
        return os.fstat(self._fd).st_blocks * 512

    def _open(self, trailer: bytes) -> int:
        end = self._table_at + len(self._table)
        try:
            fd = open_to_change(self._path)
        except OSError as error:
            raise Failure(f"cannot open {self._path}: {os_error_text(error)}") from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise Failure(f"{self._path} is not a file: writes cannot be kept there")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = os.fstat(fd).st_size
            if not size:
                os.truncate(fd, end)
                os.pwrite(fd, trailer, end)
            elif size != end + len(trailer) or os.pread(fd, len(trailer), end) != trailer:
                raise Failure(
                    f"{self._path} exists, and does not hold writes to this device of this archive"
                )
            else:
                read_exactly_at(fd, memoryview(self._table), self._table_at, self._path)
        except BlockingIOError:
            os.close(fd)
            raise Failure(f"{self._path} is in use by another process") from None
        except OSError as error:
            os.close(fd)
            raise Failure(f"cannot use {self._path}: {os_error_text(error)}") from error
        except BaseException:
            os.close(fd)
            raise
        return fd

    # --- which blocks are here ---

    def _is_here(self, block: int) -> bool:
        return bool(self._table[block >> 3] >> (block & 7) & 1)

    def _mark(self, first: int, end: int) -> None:
        for block in range(first, end):
            self._table[block >> 3] |= 1 << (block & 7)
        self._dirty.update(range(first >> 15, (end - 1 >> 15) + 1))

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """(offset, length, whether it is here) of consecutive parts."""
        end = offset + length
        while offset < end:
            block = offset // BLOCK_BYTES
            here, last = self._is_here(block), block + 1
            while last * BLOCK_BYTES < end and self._is_here(last) == here:
                last += 1
            stop = min(end, last * BLOCK_BYTES)
            yield offset, stop - offset, here
            offset = stop

    # --- reads ---

    def try_read(self, target: memoryview, offset: int) -> bool:
        at = offset
        for start, length, here in self._runs(offset, len(target)):
            piece = target[start - at : start - at + length]
            if here:
                if not try_read_at(self._fd, piece, start):
                    return False
            elif not self._below.try_read(piece, start):
                return False
        return True

    def views(self, offset: int, length: int) -> Sequence[memoryview] | None:
        """See `nbd.backend.Mapped`: what nobody has written to, as the archive has it."""
        _, whole, here = next(self._runs(offset, length))
        return None if here or whole < length else self._below.views(offset, length)

    def distrust_views(self) -> None:
        self._below.distrust_views()

    def read(self, target: memoryview, offset: int) -> None:
        at = offset
        for start, length, here in self._runs(offset, len(target)):
            piece = target[start - at : start - at + length]
            if here:
                read_exactly_at(self._fd, piece, start, self._path)
            else:
                self._below.read(piece, start)

    def cache(self, offset: int, length: int) -> None:
        """Nothing is gained by it."""

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        for start, part, here in self._runs(offset, length):
            if here:
                yield part, 0
            else:
                yield from self._below.extents(start, part)

    # --- writes ---

    def try_writes(self, writes: Sequence[Write]) -> list[OSError | None]:
        return one_by_one(self._try_write, writes)

    def _try_write(self, data: memoryview, offset: int) -> bool:
        """Write whole blocks only: a part of one may have to be filled up from the archive."""
        end = offset + len(data)
        if offset % BLOCK_BYTES or (end % BLOCK_BYTES and end != self.size_bytes):
            return False
        self._write_blocks(data, offset)
        return True

    def try_zeroes(self, offset: int, length: int) -> bool:
        return False

    def settle(self, *, idle: bool) -> None:
        """Nothing is ever put off."""

    def write(self, data: memoryview, offset: int) -> None:
        with self._lock:
            self._fill_up(offset)
            self._fill_up(offset + len(data))
        self._write_blocks(data, offset)

    def _fill_up(self, offset: int) -> None:
        """With the lock held: the block that `offset` cuts is here afterwards."""
        block, within = divmod(offset, BLOCK_BYTES)
        if not within or offset >= self.size_bytes or self._is_here(block):
            return
        start = block * BLOCK_BYTES
        piece = memoryview(bytearray(min(BLOCK_BYTES, self.size_bytes - start)))
        self._below.read(piece, start)
        write_at(self._fd, piece, start)
        self._mark(block, block + 1)

    def _write_blocks(self, data: memoryview, offset: int) -> None:
        if not len(data):
            return
        write_at(self._fd, data, offset)
        with self._lock:
            self._mark(offset // BLOCK_BYTES, -(-(offset + len(data)) // BLOCK_BYTES))

    def write_zeroes(self, offset: int, length: int, *, may_hole: bool, fast_only: bool) -> None:
        """Holes of the file: a block that is here and was never written reads as zeroes."""
        end = offset + length
        first, last = -(-offset // BLOCK_BYTES), end // BLOCK_BYTES
        if end == self.size_bytes:
            last = self._blocks
        if first >= last:
            self.write(memoryview(bytes(length)), offset)
            return
        middle, after = first * BLOCK_BYTES, min(last * BLOCK_BYTES, end)
        if middle > offset:
            self.write(memoryview(bytes(middle - offset)), offset)
        if end > after:
            self.write(memoryview(bytes(end - after)), after)
        try:
            mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
            fallocate(self._fd, mode, middle, last * BLOCK_BYTES - middle)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            if fast_only:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)) from error
            for at in range(middle, after, _ZEROES_BYTES):
                zeroes = memoryview(bytes(min(_ZEROES_BYTES, after - at)))
                write_at(self._fd, zeroes, at)
        with self._lock:
            self._mark(first, last)

    def trim(self, offset: int, length: int) -> None:
        """Zero whole blocks; parts of blocks at both ends stay."""
        first = -(-offset // BLOCK_BYTES) * BLOCK_BYTES
        end = offset + length
        last = end if end == self.size_bytes else end // BLOCK_BYTES * BLOCK_BYTES
        if last > first:
            self.write_zeroes(first, last - first, may_hole=True, fast_only=False)

    def flush(self) -> None:
        if not self._is_kept:
            return
        with self._lock:
            dirty, self._dirty = sorted(self._dirty), set()
            pages = [(page, bytes(self._page(page))) for page in dirty]
        try:
            os.fdatasync(self._fd)
            for page, raw in pages:
                write_at(self._fd, memoryview(raw), self._table_at + page * _PAGE_BYTES)
            if pages:
                os.fdatasync(self._fd)
        except OSError:
            with self._lock:
                self._dirty.update(dirty)
            raise

    def _page(self, page: int) -> memoryview:
        return memoryview(self._table)[page * _PAGE_BYTES : (page + 1) * _PAGE_BYTES]

    def close(self) -> None:
        """Raises OSError where the last writes cannot be kept."""
        try:
            self.flush()
        finally:
            os.close(self._fd)
