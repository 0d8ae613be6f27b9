# SPDX-License-Identifier: Apache-2.0
"""The raw image or block device that a guard owns."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import time
from collections.abc import Iterator

from vmapipe.protocol.nbd.constants import NBD_STATE_HOLE, NBD_STATE_ZERO
from vmapipe.runtime.disk_use import SERVING, lock_image
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.syscalls import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    fallocate,
    read_exactly_at,
    write_at,
)

_PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_ZERO = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE
# The file system, or the device, cannot; EINVAL: not at these bounds.
_CANNOT = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV}
_ZEROES_BYTES = 1 << 20
# Longer than a guard takes to end (nbd.server.DRAIN_S), and to write out what it has.
_LOCK_S = 8.0
_LOCK_AGAIN_S = 0.1


class Image:
    """Open for reading and writing, and locked against others. Every method raises OSError."""

    def __init__(self, name: str, path: str) -> None:
        self.name = name
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise Failure(f"disk {name!r}: cannot open {path}: {os_error_text(error)}") from error
        try:
            self._open(path)
        except BaseException:
            os.close(self.fd)
            raise

    def _open(self, path: str) -> None:
        mode = os.fstat(self.fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise Failure(f"disk {self.name!r}: {path} is neither a file nor a block device")
        if not self._lock():
            raise Failure(
                f"disk {self.name!r}: {path} is in use by another program (a running QEMU, "
                "or another monitor): two writers would destroy it"
            )
        self.size_bytes = os.lseek(self.fd, 0, os.SEEK_END)
        if not self.size_bytes:
            raise Failure(f"disk {self.name!r}: {path} is empty: nothing to serve")
        # 1 MiB that costs one page: it is never written to.
        self._zeroes = memoryview(mmap.mmap(-1, _ZEROES_BYTES, prot=mmap.PROT_READ))

    def _lock(self) -> bool:
        """Waits a little: a guard whose monitor was killed has it while it ends."""
        deadline = time.monotonic() + _LOCK_S
        while True:
            try:
                lock_image(self.fd, SERVING)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(_LOCK_AGAIN_S)

    def try_read(self, target: memoryview, offset: int) -> bool:
        """Read what the page cache holds; False when the device would have to be asked."""
        try:
            return os.preadv(self.fd, [target], offset, os.RWF_NOWAIT) == len(target)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                return False
            raise

    def read(self, target: memoryview, offset: int) -> None:
        read_exactly_at(self.fd, target, offset, self.path)

    def write(self, data: memoryview, offset: int) -> None:
        write_at(self.fd, data, offset)

    def write_zeroes(self, offset: int, length: int, *, may_hole: bool, fast_only: bool) -> None:
        for mode in (_PUNCH, _ZERO) if may_hole else (_ZERO,):
            try:
                fallocate(self.fd, mode, offset, length)
                return
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
        if fast_only:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        for at in range(offset, offset + length, _ZEROES_BYTES):
            self.write(self._zeroes[: min(_ZEROES_BYTES, offset + length - at)], at)

    def trim(self, offset: int, length: int) -> None:
        try:
            fallocate(self.fd, _PUNCH, offset, length)
        except OSError as error:
            if error.errno not in _CANNOT:  # it is only a hint
                raise

    def flush(self) -> None:
        os.fdatasync(self.fd)

    def cache(self, offset: int, length: int) -> None:
        os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_WILLNEED)

    def open_again(self) -> int:
        """A descriptor of its own, for a backup process to read by."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def is_hole(self, offset: int, length: int) -> bool:
        """Return whether these bytes were never written, as far as the file system can tell."""
        return self._next(offset, os.SEEK_DATA) >= offset + length

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Lengths and NBD_STATE_ flags."""
        end = offset + length
        while offset < end:
            data = min(end, self._next(offset, os.SEEK_DATA))
            if data > offset:
                yield data - offset, NBD_STATE_HOLE | NBD_STATE_ZERO
            hole = min(end, self._next(data, os.SEEK_HOLE)) if data < end else end
            # A hole that was made between the two calls.
            hole = max(hole, min(end, data + 1))
            if hole > data:
                yield hole - data, 0
            offset = hole

    def _next(self, offset: int, what: int) -> int:
        try:
            return os.lseek(self.fd, offset, what)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return self.size_bytes
            # Block devices do not know holes: all is data.
            return offset if what == os.SEEK_DATA else self.size_bytes

    def close(self) -> None:
        """Flush what was written, if that works, and close."""
        with contextlib.suppress(OSError):
            os.fdatasync(self.fd)
        os.close(self.fd)
