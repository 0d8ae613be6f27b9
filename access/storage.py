# SPDX-License-Identifier: Apache-2.0
"""The plain bytes of an archive at any place.

Of a plain file or object, of an lzo file's blocks, or of a stream that is decompressed into a
file of its own while it is read; of independent zstd frames: frames.py.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import tempfile
import threading
import time
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from vmapipe.access.lzo import LzoBlocks, decompress_block
from vmapipe.restore.archive.errors import CompressionError, InputError
from vmapipe.restore.archive.input import Pread
from vmapipe.restore.archive.source import Stream
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.process import failure_text
from vmapipe.runtime.syscalls import read_at, try_read_at, write_at
from vmapipe.vma.errors import ArchiveError

# (length, offset): fewer bytes only at the end.

# Of decompressed frames that are kept: those of 32 extents. A guest
# that boots comes back to the same few dozen.
CACHE_BYTES = 128 << 20
# Of an object at a time: a third of an extent, so that a small read does not cost a whole one.
_RANGE_BYTES = 1 << 20
# More than any archive has.
_ENDLESS = 1 << 62
# A thread that decompresses is told to stop, and looks for that at each read.
_JOIN_S = 5.0


class Storage(Protocol):
    """For any number of threads at once. Offsets and sizes are bytes of the plain archive."""

    size_bytes: int

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view`; less only at the archive's end.

        Raises OSError (EIO) with the reason, a DamageError where the archive is damaged.
        """

    def try_read_into(self, view: memoryview, offset: int) -> bool:
        """Like `read_into` if that need not wait; else return False and do nothing."""

    def close(self) -> None: ...


class DamageError(OSError):
    """The archive's own bytes are wrong: reading them again gives the same.

    Any other OSError (a store that does not answer, a disk's fault) may have passed by the next try.
    """


def read_error(name: str, offset: int, why: str) -> OSError:
    return OSError(errno.EIO, _cannot_read(name, offset, why))


def damage_error(name: str, offset: int, why: str) -> DamageError:
    return DamageError(errno.EIO, _cannot_read(name, offset, why))


def _cannot_read(name: str, offset: int, why: str) -> str:
    return f"cannot read {name} at offset {offset}: {why}"


# What is in the page cache is looked for once a second, for so much of a file: what is needed all
# the time stays there, and where it did not, a read waits for the disk as it does elsewhere.
_RESIDENT_S = 1.0
_RESIDENT_SHIFT = 22


class PlainStorage:
    """A file that is not compressed. Owns `fd`."""

    def __init__(self, name: str, fd: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._name = name
        self._fd = fd
        self._map: memoryview | None = None
        with contextlib.suppress(
            OSError, ValueError, OverflowError
        ):  # no room for it, or nothing to map
            self._map = memoryview(mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ))
        # By part of the file: until when it counts as in memory (time.monotonic()).
        self._resident = array("d", bytes(8 * ((size_bytes >> _RESIDENT_SHIFT) + 1)))
        self._probe = memoryview(bytearray(1))

    def view(self, offset: int, length: int) -> memoryview | None:
        """Return bytes where they lie, that nobody may look at (`nbd.backend.Mapped`); None: read them."""
        end = offset + length
        mapped = self._map
        if mapped is None or os.lseek(self._fd, 0, os.SEEK_END) < end:
            return None
        part = offset >> _RESIDENT_SHIFT
        now = time.monotonic()
        if self._resident[part] < now:
            probe = self._probe
            if not (try_read_at(self._fd, probe, offset) and try_read_at(self._fd, probe, end - 1)):
                return None
            self._resident[part] = now + _RESIDENT_S
        return mapped[offset:end]

    def distrust_views(self) -> None:
        self._map = None

    def read_into(self, view: memoryview, offset: int) -> int:
        return read_at(self._fd, view, offset, self._failed)

    def _failed(self, offset: int, error: OSError) -> OSError:
        return read_error(self._name, offset, os_error_text(error))

    def try_read_into(self, view: memoryview, offset: int) -> bool:
        return try_read_at(self._fd, view, offset)

    def close(self) -> None:
        self._map = None  # it has a descriptor of its own
        os.close(self._fd)


class RangeStorage:
    """A plain object of a store, read by ranges that are kept while there is room."""

    def __init__(
        self,
        name: str,
        pread: Pread,
        release: Callable[[], None],
        size_bytes: int,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.size_bytes = size_bytes
        self._name = name
        self._pread_file = pread
        self._release = release
        self._cache = Cache(cache_bytes, _cost_of_bytes)

    def read_into(self, view: memoryview, offset: int) -> int:
        done = 0
        while done < len(view) and offset + done < self.size_bytes:
            number, at = divmod(offset + done, _RANGE_BYTES)
            piece = self._cache.get(number, self._range)[at : at + len(view) - done]
            if not piece:
                raise read_error(self._name, offset + done, "it is shorter than it was")
            view[done : done + len(piece)] = piece
            done += len(piece)
        return done

    def try_read_into(self, view: memoryview, offset: int) -> bool:
        number, at = divmod(offset, _RANGE_BYTES)
        kept = self._cache.kept(number)
        if kept is None or at + len(view) > len(kept):
            return False
        view[:] = kept[at : at + len(view)]
        return True

    def _range(self, number: int) -> bytes:
        at = number * _RANGE_BYTES
        return whole_read(self._name, self._pread_file, min(_RANGE_BYTES, self.size_bytes - at), at)

    def close(self) -> None:
        self._release()


class LzoStorage:
    """A .lzo file of independent blocks, which are kept while there is room. Owns `fd`."""

    def __init__(
        self, name: str, fd: int, blocks: LzoBlocks, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.size_bytes = blocks.plain_at[-1]
        self._name = name
        self._fd = fd
        self._blocks = blocks
        self._cache = Cache(cache_bytes, _cost_of_bytes)

    def read_into(self, view: memoryview, offset: int) -> int:
        done = 0
        while done < len(view) and offset + done < self.size_bytes:
            number = bisect_right(self._blocks.plain_at, offset + done) - 1
            at = offset + done - self._blocks.plain_at[number]
            piece = self._cache.get(number, self._block)[at : at + len(view) - done]
            view[done : done + len(piece)] = piece
            done += len(piece)
        return done

    def try_read_into(self, view: memoryview, offset: int) -> bool:
        number = bisect_right(self._blocks.plain_at, offset) - 1
        kept = self._cache.kept(number)
        at = offset - self._blocks.plain_at[min(number, len(self._blocks.plain_at) - 1)]
        if kept is None or at + len(view) > len(kept):
            return False
        view[:] = kept[at : at + len(view)]
        return True

    def _block(self, number: int) -> bytes:
        start, end = self._blocks.file_at[number], self._blocks.file_at[number + 1]
        try:
            raw = os.pread(self._fd, end - start, start)
        except OSError as error:
            raise read_error(self._name, start, os_error_text(error)) from error
        if len(raw) < end - start:
            raise read_error(self._name, start, "the file is shorter than it was")
        try:
            return decompress_block(raw, self._blocks.flags)
        except ValueError as error:
            raise damage_error(self._name, start, str(error)) from error

    def close(self) -> None:
        os.close(self._fd)


class SpoolStorage:
    """A stream's plain bytes, in a nameless file of `folder` that fills while it is read.

    A read of bytes that have not come yet waits for them. `size_bytes` is the size once all is there, and
    far beyond anything until then. Owns `source`.
    """

    def __init__(self, name: str, source: Stream, folder: str, limit_bytes: int) -> None:
        """Raises InputError where no file can be made."""
        self.size_bytes = _ENDLESS
        self._name = name
        self._source = source
        self._limit_bytes = limit_bytes
        self._changed = threading.Condition()
        self._there = 0
        self._error = ""
        self._is_damaged = False
        self._ended = False
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by close()
        except OSError as error:
            source.close()
            raise InputError(
                f"cannot make a file in {folder} for what is decompressed: {os_error_text(error)}"
            ) from error
        self._thread = threading.Thread(target=self._fill, name="spool", daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        error = ""
        try:
            view = memoryview(bytearray(_RANGE_BYTES))
            while got := self._source.readinto(view):
                if self._there + got > self._limit_bytes:
                    raise InputError(
                        f"{self._name} has more than {self._limit_bytes} bytes when it is "
                        "decompressed: raise --cache-size"
                    )
                write_at(self._file.fileno(), view[:got], self._there)
                with self._changed:
                    self._there += got
                    self._changed.notify_all()
        except OSError as failure:
            error = f"cannot keep what is decompressed: {os_error_text(failure)}"
        except Exception as failure:  # noqa: BLE001  readers wait for it: they hear of any end
            error = failure_text(failure)
            self._is_damaged = isinstance(failure, ArchiveError)
        with self._changed:
            self._error, self._ended = error, True
            self.size_bytes = self._there
            self._changed.notify_all()

    def read_into(self, view: memoryview, offset: int) -> int:
        with self._changed:
            while self._there < offset + len(view) and not self._ended:
                self._changed.wait()
            if self._error and self._there < offset + len(view):
                error_of = damage_error if self._is_damaged else read_error
                raise error_of(self._name, self._there, self._error)
        return read_at(self._file.fileno(), view, offset)

    def check_end(self) -> None:
        """Raise CompressionError or InputError where the bytes ended before the stream's end."""
        with self._changed:
            if self._error:
                kind = CompressionError if self._is_damaged else InputError
                raise kind(self._error)

    def try_read_into(self, view: memoryview, offset: int) -> bool:
        there = offset + len(view) <= self._there
        return there and try_read_at(self._file.fileno(), view, offset)

    def stop(self) -> None:
        """Nothing more comes; whoever waits for it hears so."""
        self._source.stop()

    def close(self) -> None:
        self.stop()
        self._thread.join(_JOIN_S)
        if not self._thread.is_alive():
            self._source.close()
            self._file.close()


_Piece = TypeVar("_Piece")


def _cost_of_bytes(piece: bytes) -> int:
    return len(piece)


class Cache(Generic[_Piece]):
    """Pieces by number, the least used forgotten first. Each is made by one thread at a time."""

    def __init__(self, limit_bytes: int, cost_of: Callable[[_Piece], int]) -> None:
        self._limit_bytes = limit_bytes
        self._cost_of = cost_of
        self._changed = threading.Condition()
        self._kept: OrderedDict[int, _Piece] = OrderedDict()
        self._bytes = 0
        self._under_way: set[int] = set()

    def kept(self, number: int) -> _Piece | None:
        with self._changed:
            piece = self._kept.get(number)
            if piece is not None:
                self._kept.move_to_end(number)
            return piece

    def get(self, number: int, make: Callable[[int], _Piece]) -> _Piece:
        with self._changed:
            while number in self._under_way:
                self._changed.wait()
            piece = self._kept.get(number)
            if piece is not None:
                self._kept.move_to_end(number)
                return piece
            self._under_way.add(number)
        try:
            piece = make(number)
        finally:
            with self._changed:
                self._under_way.discard(number)
                self._changed.notify_all()
        with self._changed:
            if number not in self._kept:
                self._bytes += self._cost_of(piece)
            self._kept[number] = piece
            while self._bytes > self._limit_bytes and len(self._kept) > 1:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= self._cost_of(oldest)
        return piece

    def forget(self, number: int) -> None:
        with self._changed:
            piece = self._kept.pop(number, None)
            if piece is not None:
                self._bytes -= self._cost_of(piece)


def whole_read(name: str, pread: Pread, length: int, offset: int) -> bytes:
    """Raises OSError (EIO) with the reason; DamageError where what `pread` undoes is damaged."""
    try:
        return pread(length, offset)
    except OSError as error:
        raise read_error(name, offset, os_error_text(error)) from error
    except ArchiveError as error:
        raise damage_error(name, offset, str(error)) from error
    except Failure as error:
        raise read_error(name, offset, str(error)) from error
