# SPDX-License-Identifier: Apache-2.0
"""An archive that is an object of an S3 store: read by ranges, several at the same time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from vmapipe.restore.archive.errors import InputError
from vmapipe.restore.archive.input import Input, ReadAhead, interruptible
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.objectstore import ConflictError, StoredObject, StoreError

# An archive's header fits, with the configs of most machines: `list` asks for no more.
_FIRST_BYTES = 64 << 10
# What stores advise for one request, and four at the same time: 32 MiB on their way fill a
# line of 1 Gbit/s at an answer time of a quarter of a second.
_RANGE_BYTES = 8 << 20
THREADS = 4


class NoObjectError(InputError):
    """The store has no object of that name."""


def object_exists(name: str, halts: Sequence[Cancel]) -> bool:
    """Raises InputError where that cannot be found out."""
    try:
        RemoteObject(name, halts).close()
    except NoObjectError:
        return False
    return True


class RemoteObject:
    """The object `name` as it is now. Raises InputError where there is none or no way to it.

    `pread` may be called by any thread and is not ended by a stop: errors are
    told within a minute or two.
    """

    def __init__(self, name: str, halts: Sequence[Cancel]) -> None:
        self.name = name
        self.size_bytes = 0
        self._etag = ""
        self._store = StoredObject(name)
        try:
            interruptible(self._look, halts)
        except BaseException:
            self._store.close()
            raise

    def _look(self) -> bytes:
        try:
            found = self._store.head()
        except StoreError as error:
            raise InputError(str(error)) from error
        if found is None:
            raise NoObjectError(f"cannot open {self.name}: there is no such object")
        self.size_bytes, self._etag = found.size_bytes, found.etag
        return b""

    def pread(self, length: int, offset: int) -> bytes:
        """Fewer bytes than asked for only at the object's end. Raises InputError."""
        length = min(length, self.size_bytes - offset)
        if length <= 0:
            return b""
        try:
            return self._store.read(length, offset, self._etag)
        except ConflictError as error:
            raise InputError(
                f"{self.name} was replaced while it was read (at offset {offset})"
            ) from error
        except StoreError as error:
            raise InputError(str(error)) from error

    def ranges(self, start: int = 0) -> Iterator[Callable[[], bytes]]:
        """Jobs that read all of it in order, from `start` on."""
        at, length = start, _RANGE_BYTES if start else _FIRST_BYTES
        while at < self.size_bytes:
            yield lambda at=at, length=length: self.pread(length, at)  # type: ignore[misc]
            at, length = at + length, _RANGE_BYTES

    def close(self) -> None:
        self._store.close()


class ObjectInput(Input):
    """The object in order, from `start` on. Owns `remote`."""

    def __init__(self, remote: RemoteObject, halts: Sequence[Cancel], start: int = 0) -> None:
        wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        super().__init__(remote.name, wake_fd, halts)
        self._remote = remote
        self._ahead = ReadAhead(remote.ranges(start), THREADS, THREADS, wake_fd, self._wait)
        self._piece = memoryview(b"")

    def _read_fd(self, view: memoryview) -> int:
        if not self._piece:
            self._piece = memoryview(self._ahead.next() or b"")
        got = min(len(view), len(self._piece))
        view[:got] = self._piece[:got]
        self._piece = self._piece[got:]
        return got

    def close(self) -> None:
        if not self.closed:
            self._ahead.close()
            self._remote.close()
        super().close()
