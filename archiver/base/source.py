# SPDX-License-Identifier: Apache-2.0
"""Where a base's bytes are read from: a file, or an object of a store, by ranges and some of them ahead."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Hashable
from typing import TYPE_CHECKING, BinaryIO, Protocol

from vmapipe.runtime.object_names import is_object
from vmapipe.runtime.objectstore import StoredObject, StoreError
from vmapipe.runtime.side_files import open_regular
from vmapipe.runtime.syscalls import read_at
from vmapipe.runtime.threads import DaemonPool

if TYPE_CHECKING:
    from concurrent.futures import Future

    from _typeshed import WriteableBuffer

# One request of it takes as long as many answer times; with those that are ahead it is 32 MiB of memory.
_PIECE_BYTES = 8 << 20
_AHEAD = 2


class BaseSource(Protocol):
    """Errors: OSError; ValueError, in words, for an object that cannot be read, or was replaced."""

    size_bytes: int
    #: A descriptor of it, for files to share its blocks; -1: it has none.
    fd: int

    @property
    def identity(self) -> Hashable:
        """What tells this file from another in its place, and from what it was before a write."""

    def read_into(self, view: memoryview, at: int) -> int:
        """Fill the view from `at` on; how much there is, less only at the end."""

    def close(self) -> None:
        """Give it back."""


def open_source(archive: str) -> BaseSource:
    """Raises OSError, ValueError as a BaseSource."""
    return ObjectSource(archive) if is_object(archive) else FileSource(archive)


def read_source(source: BaseSource, length: int, at: int) -> bytes:
    """All of these bytes. Raises as a BaseSource; ValueError where it ends before."""
    data = bytearray(length)
    if source.read_into(memoryview(data), at) < length:
        raise ValueError("it ends too early")
    return bytes(data)


def open_side_file(name: str) -> BinaryIO:
    """A file that lies beside an archive, to be read; of an object a copy. Raises OSError, ValueError."""
    if not is_object(name):
        return open(open_regular(name), "rb")
    source = ObjectSource(name)
    try:
        # Its length is that of what it describes: 12 MiB a TiB, and 256 for digests of clusters.
        copy = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
        with io.BufferedReader(source) as reader:
            while piece := reader.read(_PIECE_BYTES):
                copy.write(piece)
        copy.seek(0)
        return copy
    finally:
        source.close()


class FileSource:
    """A regular file."""

    def __init__(self, path: str) -> None:
        """Raises OSError."""
        self.fd = open_regular(path)
        self.size_bytes = os.fstat(self.fd).st_size

    @property
    def identity(self) -> Hashable:
        status = os.fstat(self.fd)
        return (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)

    def read_into(self, view: memoryview, at: int) -> int:
        return read_at(self.fd, view, at)

    def close(self) -> None:
        os.close(self.fd)


class ObjectSource(io.RawIOBase):
    """An object, as it was when it was opened: a request for another one is refused by the store."""

    fd = -1

    def __init__(self, name: str) -> None:
        """Raises FileNotFoundError, ValueError."""
        super().__init__()
        self._store = StoredObject(name)
        try:
            found = self._store.head()
            if found is None:
                raise FileNotFoundError(f"{name} does not exist")
        except StoreError as error:
            self._store.close()
            raise ValueError(str(error)) from error
        except BaseException:
            self._store.close()
            raise
        self.size_bytes, self._etag = found.size_bytes, found.etag
        self._pieces: dict[int, Future[bytes]] = {}
        self._pool: DaemonPool | None = None
        self._at = 0

    @property
    def identity(self) -> Hashable:
        return self._etag

    def read_into(self, view: memoryview, at: int) -> int:
        done = 0
        while done < len(view) and at + done < self.size_bytes:
            number, start = divmod(at + done, _PIECE_BYTES)
            piece = memoryview(self._piece(number))[start : start + len(view) - done]
            view[done : done + len(piece)] = piece
            done += len(piece)
        return done

    def _piece(self, number: int) -> bytes:
        if self._pool is None:
            self._pool = DaemonPool(1 + _AHEAD, "base")
        is_next = number - 1 in self._pieces
        # The one before: an extent may reach from it into this one.
        wanted = range(number - 1, number + 1 + (_AHEAD if is_next else 0))
        for other in set(self._pieces).difference(wanted):
            del self._pieces[other]
        for other in wanted:
            if other >= number and other not in self._pieces:
                self._pieces[other] = self._pool.submit(lambda at=other: self._fetch(at))  # type: ignore[misc]
        try:
            return self._pieces[number].result()
        except StoreError as error:
            raise ValueError(str(error)) from error

    def _fetch(self, number: int) -> bytes:
        at = number * _PIECE_BYTES
        length = min(_PIECE_BYTES, self.size_bytes - at)
        return self._store.read(length, at, self._etag) if length > 0 else b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        got = self.read_into(memoryview(buffer).cast("B"), self._at)
        self._at += got
        return got

    def close(self) -> None:
        if not self.closed:
            if self._pool is not None:
                self._pool.close()
            self._store.close()
        super().close()
