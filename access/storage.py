# SPDX-License-Identifier: Apache-2.0
"""The plain bytes of an archive at any place: of a plain file, or of independent zstd frames."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from typing import Protocol

import zstandard

from vmapipe.runtime.errors import os_error_text
from vmapipe.vma.seektable import Frame

# Of decompressed frames that are kept: 32 of ours, which hold an extent each. A guest
# that boots comes back to the same few dozen.
CACHE_BYTES = 128 << 20


class Storage(Protocol):
    """For any number of threads at once. Offsets and sizes are bytes of the plain archive."""

    size_bytes: int

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view`; less only at the archive's end. Raises OSError (EIO) with the reason."""

    def try_read_into(self, view: memoryview, offset: int) -> bool:
        """The same where it need not wait; False, and nothing is done, where it would."""

    def close(self) -> None: ...


def read_error(name: str, offset: int, why: str) -> OSError:
    return OSError(errno.EIO, f"cannot read {name} at offset {offset}: {why}")


class PlainStorage:
    """A file that is not compressed. Owns `fd`."""

    def __init__(self, name: str, fd: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._name = name
        self._fd = fd

    def read_into(self, view: memoryview, offset: int) -> int:
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise read_error(self._name, offset + done, os_error_text(error)) from error
            if not got:
                break
            done += got
        return done

    def try_read_into(self, view: memoryview, offset: int) -> bool:
        try:
            return os.preadv(self._fd, [view], offset, os.RWF_NOWAIT) == len(view)
        except OSError:
            return False  # EAGAIN, or an error that `read_into` tells

    def close(self) -> None:
        os.close(self._fd)


class FrameStorage:
    """A zstd file of independent frames with a seek table. Owns `fd`.

    A frame is decompressed whole when it is read, and kept while there is room in
    the cache; who wants one that another thread is at work with waits for that.
    """

    def __init__(
        self, name: str, fd: int, frames: list[Frame], cache_bytes: int = CACHE_BYTES
    ) -> None:
        self._name = name
        self._fd = fd
        self._cache_bytes = cache_bytes
        self._file_at, self._plain_at = array("Q", [0]), array("Q", [0])
        for frame in frames:
            self._file_at.append(self._file_at[-1] + frame.compressed_bytes)
            self._plain_at.append(self._plain_at[-1] + frame.plain_bytes)
        self.size_bytes = self._plain_at[-1]
        self._changed = threading.Condition()
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._kept_bytes = 0
        self._under_way: set[int] = set()
        self._local = threading.local()

    def read_into(self, view: memoryview, offset: int) -> int:
        done = 0
        while done < len(view) and offset + done < self.size_bytes:
            number = bisect_right(self._plain_at, offset + done) - 1
            at = offset + done - self._plain_at[number]
            piece = self._frame(number)[at : at + len(view) - done]
            view[done : done + len(piece)] = piece
            done += len(piece)
        return done

    def read_start(self, length: int, offset: int) -> bytes:
        """`length` bytes, of a frame that begins at or before `offset`, and no more work than that.

        For headers: of the 3.6 MiB of a frame only the first block is decompressed.
        """
        number = bisect_right(self._plain_at, offset) - 1
        at = offset - self._plain_at[number]
        with self._changed:
            kept = self._kept.get(number)
        if kept is not None:
            return kept[at : at + length]
        file_at, end = self._file_at[number], self._file_at[number + 1]
        decompressor = zstandard.ZstdDecompressor().decompressobj()
        plain = b""
        while len(plain) < at + length and file_at < end:
            piece = self._pread(min(_START_BYTES, end - file_at), file_at)
            file_at += len(piece)
            try:
                plain += decompressor.decompress(piece)
            except zstandard.ZstdError as error:
                raise read_error(self._name, offset, f"zstd: {error}") from error
        return plain[at : at + length]

    def try_read_into(self, view: memoryview, offset: int) -> bool:
        number = bisect_right(self._plain_at, offset) - 1
        if offset + len(view) > self._plain_at[min(number + 1, len(self._plain_at) - 1)]:
            return False
        with self._changed:
            frame = self._kept.get(number)
            if frame is None:
                return False
            self._kept.move_to_end(number)
        at = offset - self._plain_at[number]
        view[:] = frame[at : at + len(view)]
        return True

    def _frame(self, number: int) -> bytes:
        with self._changed:
            while number in self._under_way:
                self._changed.wait()
            kept = self._kept.get(number)
            if kept is not None:
                self._kept.move_to_end(number)
                return kept
            self._under_way.add(number)
        frame = None
        try:
            frame = self._decompress(number)
        finally:
            with self._changed:
                self._under_way.discard(number)
                if frame is not None:
                    self._keep(number, frame)
                self._changed.notify_all()
        return frame

    def _keep(self, number: int, frame: bytes) -> None:
        self._kept[number] = frame
        self._kept_bytes += len(frame)
        while self._kept_bytes > self._cache_bytes and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= len(oldest)

    def _decompress(self, number: int) -> bytes:
        file_at = self._file_at[number]
        plain_bytes = self._plain_at[number + 1] - self._plain_at[number]
        data = self._pread(self._file_at[number + 1] - file_at, file_at)
        decompressor = getattr(self._local, "decompressor", None)
        if decompressor is None:
            decompressor = self._local.decompressor = zstandard.ZstdDecompressor()
        try:
            # Before it is believed: it says how much memory to take.
            announced = zstandard.frame_content_size(data)
            plain: bytes = b""
            if announced in (-1, plain_bytes):
                plain = decompressor.decompress(data, max_output_size=plain_bytes)
        except zstandard.ZstdError as error:
            raise read_error(self._name, file_at, f"the zstd data is damaged: {error}") from error
        if len(plain) != plain_bytes:
            raise read_error(self._name, file_at, "a zstd frame is not as its seek table says")
        return plain

    def _pread(self, length: int, offset: int) -> bytes:
        try:
            data = os.pread(self._fd, length, offset)
        except OSError as error:
            raise read_error(self._name, offset, os_error_text(error)) from error
        if len(data) != length:
            raise read_error(self._name, offset, "the file is shorter than it was")
        return data

    def close(self) -> None:
        with self._changed, contextlib.suppress(OSError):
            os.close(self._fd)


# Of a compressed frame's start, for the header in it: zstd's blocks hold up to 128 KiB
# of plain data, and random data does not get smaller.
_START_BYTES = 132 << 10
