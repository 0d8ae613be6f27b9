# SPDX-License-Identifier: Apache-2.0
"""Sources of a disk's bytes: raw files and block devices at rest, read by two requests at a time."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import NamedTuple, Protocol

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.runtime.disk_use import use_of
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.syscalls import read_at

# Below it, waking the helper costs more than it saves.
_WORTH_BYTES = 1 << 20
_ALIGNED = 4096


class ShortRead(Exception):
    """The file ended at `offset`."""

    def __init__(self, offset: int) -> None:
        super().__init__(f"the file ended at offset {offset}")
        self.offset = offset


class ReadFailed(Exception):
    """The file cannot be read at `offset`."""

    def __init__(self, offset: int, error: OSError) -> None:
        super().__init__(f"cannot read at offset {offset}")
        self.offset = offset
        self.error = error


class PairReader:
    """Fills buffers from a descriptor, which it does not own.

    A disk likes to have two requests, so that a helper reads the second half of
    what has to come from there. What is in the page cache is copied by this thread
    alone: two cores copy hardly faster than one, and wait for each other.
    With one core there is no helper.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        #: True: the file system can tell which data would have to be waited for.
        self._tells = True
        self._todo: SimpleQueue[tuple[memoryview, int] | None] = SimpleQueue()
        self._done: SimpleQueue[Exception | None] = SimpleQueue()
        self._helper: threading.Thread | None = None
        self._alone = len(os.sched_getaffinity(0)) < 2

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Raises ReadFailed, ShortRead: the first in the file's order."""
        if not self._alone and self._tells:
            cached = self._read_cached(buffer, offset)
            if cached == len(buffer):
                return
            buffer, offset = buffer[cached:], offset + cached
        if self._alone or len(buffer) < _WORTH_BYTES:
            _fill(self._fd, buffer, offset)
        else:
            self._read_halves(buffer, offset)

    def _read_cached(self, buffer: memoryview, offset: int) -> int:
        """Read as many bytes as come without waiting for the disk; return how many."""
        try:
            return os.preadv(self._fd, [buffer], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            # Not every file system can; one that cannot read at all says so below.
            self._tells = False
            return 0

    def _read_halves(self, buffer: memoryview, offset: int) -> None:
        if self._helper is None:
            # A daemon: a read that hangs must not keep the process from ending.
            self._helper = threading.Thread(target=self._help, name="reader", daemon=True)
            self._helper.start()
        half = len(buffer) // 2 // _ALIGNED * _ALIGNED
        self._todo.put((buffer[half:], offset + half))
        try:
            _fill(self._fd, buffer[:half], offset)
        finally:
            # The buffer is the caller's again only when the helper has left it.
            error = self._done.get()
        if error is not None:
            raise error

    def _help(self) -> None:
        while (task := self._todo.get()) is not None:
            try:
                _fill(self._fd, *task)
            except Exception as error:  # noqa: BLE001  raised in the waiting thread
                self._done.put(error)
            else:
                self._done.put(None)

    def close(self) -> None:
        """End the helper; call it before the descriptor is closed."""
        if self._helper is not None:
            self._todo.put(None)
            self._helper.join()


def _fill(fd: int, buffer: memoryview, offset: int) -> None:
    done = read_at(fd, buffer, offset, ReadFailed)
    if done < len(buffer):
        raise ShortRead(offset + done)


class DiskSourceError(Failure):
    """A disk cannot be read; the text names the device, and the offset where there is one."""


class Segment(NamedTuple):
    """Bytes [start, end) of a disk; both are multiples of 64 KiB, but for the disk's end."""

    start: int
    end: int
    is_data: bool


class Source(Protocol):
    """A disk of `size_bytes` bytes that does not change while it is read."""

    name: str
    size_bytes: int

    def segments(self) -> Iterator[Segment]:
        """Data and holes, in order, without gaps. A hole reads as zero."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset`. Raises DiskSourceError."""

    def check_unchanged(self) -> None:
        """Raises DiskSourceError when the disk's size is no longer `size_bytes`, or it was changed."""

    def close(self) -> None: ...


class Sharing(NamedTuple):
    """The user's word on reading a disk although others may write to it; `tell` reports that it is."""

    force: bool = False
    tell: Callable[[str], None] = lambda text: None


UNSHARED = Sharing()


def open_at_rest(name: str, path: str, sharing: Sharing) -> int:
    """Open an image or block device that no other program writes to while it is open.

    Raises DiskSourceError: it cannot be opened, is not a disk, or is in use.
    """
    try:
        # O_NONBLOCK: opening a FIFO by mistake must not hang.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise DiskSourceError(
            f"disk {name!r}: cannot open {path}: {os_error_text(error)}"
        ) from error
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise DiskSourceError(f"disk {name!r}: {path} is a folder, not a disk image")
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise DiskSourceError(f"disk {name!r}: {path} is neither a file nor a block device")
        try:
            used = use_of(fd, path, writing=False)
        except OSError as error:
            raise DiskSourceError(
                f"disk {name!r}: cannot see whether {path} is in use: {os_error_text(error)}"
            ) from error
        if used and not sharing.force:
            raise DiskSourceError(
                f"disk {name!r}: {path} is in use: {used}; back up the running machine (--qmp, "
                "--monitor), or read the disk all the same with --force-share: the archive may "
                "then hold what never was on it at one time"
            )
        if used:
            sharing.tell(
                f"disk {name!r}: {path} is in use: {used}; it is read all the same (--force-share), "
                "and the archive may hold what never was on it at one time"
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def segments_of(fd: int, size_bytes: int) -> Iterator[Segment]:
    """Yield the segments of a raw image or block device of this size. Behind the file's end is a hole.

    Raises OSError for one that says where data begins, and not where it ends.
    """
    at = 0
    while at < size_bytes:
        data, hole = _next_data(fd, at, size_bytes)
        # A cluster that is partly hole is read as a whole.
        start = max(at, data - data % CLUSTER_BYTES)
        end = min(size_bytes, -(-hole // CLUSTER_BYTES) * CLUSTER_BYTES)
        if start > at:
            yield Segment(at, start, is_data=False)
        if end > start:
            yield Segment(start, end, is_data=True)
        at = max(end, start)


def _next_data(fd: int, at: int, size_bytes: int) -> tuple[int, int]:
    """The next data range [start, end) from `at` on; at the end both are the size."""
    try:
        data = os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size_bytes, size_bytes
        # Block devices and some file systems do not know holes: all is data.
        return at, size_bytes
    data = min(data, size_bytes)
    return data, min(size_bytes, os.lseek(fd, data, os.SEEK_HOLE))


class RawSource:
    """A raw image file or a block device."""

    def __init__(self, name: str, path: str, sharing: Sharing = UNSHARED) -> None:
        self.name = name
        self.path = path
        self._sharing = sharing
        self._fd = open_at_rest(name, path, sharing)
        try:
            status = os.fstat(self._fd)
            self._changed_ns = status.st_mtime_ns
            self.size_bytes = self._checked_size(status.st_mode)
            self._reader = PairReader(self._fd)
        except BaseException:
            os.close(self._fd)
            raise

    def _checked_size(self, mode: int) -> int:
        size = self._size_now()
        if not size:
            raise DiskSourceError(f"disk {self.name!r}: {self.path} is empty: nothing to back up")
        if stat.S_ISREG(mode):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return size

    def _size_now(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_END)

    def segments(self) -> Iterator[Segment]:
        return segments_of(self._fd, self.size_bytes)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        try:
            self._reader.read_into(buffer, offset)
        except ReadFailed as failed:
            raise DiskSourceError(
                f"disk {self.name!r}: cannot read {self.path} at offset {failed.offset}: "
                f"{os_error_text(failed.error)}"
            ) from failed.error
        except ShortRead as short:
            raise DiskSourceError(
                f"disk {self.name!r}: {self.path} ended at offset {short.offset}, but had "
                f"{self.size_bytes} bytes: it shrank while it was read"
            ) from short

    def check_unchanged(self) -> None:
        size = self._size_now()
        if size != self.size_bytes:
            change = "grew" if size > self.size_bytes else "shrank"
            raise DiskSourceError(
                f"disk {self.name!r}: {self.path} {change} from {self.size_bytes} to {size} bytes "
                f"while it was read (offset {min(size, self.size_bytes)}): is it in use?"
            )
        status = os.fstat(self._fd)
        if self._sharing.force or not stat.S_ISREG(status.st_mode):
            return
        if status.st_mtime_ns != self._changed_ns:
            raise DiskSourceError(
                f"disk {self.name!r}: {self.path} was written to while it was read: is it in use?"
            )

    def close(self) -> None:
        self._reader.close()
        os.close(self._fd)
