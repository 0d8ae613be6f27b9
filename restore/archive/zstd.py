# SPDX-License-Identifier: Apache-2.0
"""Plain bytes out of a zstd file. The only file of this room that knows the zstd library.

Any zstd file is read in order by one thread. One with a seek table (ours have
one) is read frame by frame, several threads ahead of the reader.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, cast

import zstandard

from vmapipe.restore.archive.ahead import Ahead, interruptible
from vmapipe.restore.archive.inputs import Input, Wait
from vmapipe.restore.archive.zstdframes import FrameWalk
from vmapipe.restore.errors import CompressionError
from vmapipe.runtime.cancel import Cancel
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.seektable import (
    FOOTER_BYTES,
    Frame,
    parse_seek_table,
    seek_table_bytes,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# (length, offset): fewer bytes only at the end. Raises SourceError.
Pread = Callable[[int, int], bytes]
# What `zstd -d` takes without being asked. A window is memory that a stranger
# makes us allocate.
_MAX_WINDOW_BYTES = 128 << 20
# Small, so that a message can say where the damage is.
_READ_BYTES = 128 << 10
# Frames are held whole, twice as many as there are threads: larger ones are
# read in order instead. Ours have a few MiB.
_MAX_FRAME_BYTES = 32 << 20
# 262,144 frames of 4 MiB are an archive of 1 TiB, and 30 MiB of memory for
# the table: a longer table is left unused.
_MAX_TABLE_BYTES = 2 << 20


class ZstdStream(io.RawIOBase):
    """Reads a whole zstd file in order, whatever its frames; owns `raw`."""

    def __init__(self, name: str, raw: Input) -> None:
        super().__init__()
        self._name = name
        self._raw = raw
        self._walk = FrameWalk(name)
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        self._plain = decompressor.stream_reader(
            cast(IO[bytes], _Compressed(raw, self._walk)),  # it calls `read` only
            read_size=_READ_BYTES,
            read_across_frames=True,
        )

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        try:
            got = self._plain.readinto(buffer)
        except zstandard.ZstdError as error:
            raise CompressionError(
                f"{self._name}: the zstd data is damaged, in the {_READ_BYTES} bytes before the "
                f"file's offset {self._walk.position}: {error}"
            ) from error
        if not got:
            self._walk.finish()
        return int(got)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Compressed:
    """What the decompressor reads from; the walk looks at every byte that passes."""

    def __init__(self, raw: Input, walk: FrameWalk) -> None:
        self._raw = raw
        self._walk = walk

    def read(self, size: int) -> bytes:
        data = self._raw.read(size) or b""
        # What stands before the first damaged byte is still good.
        return data[: self._walk.feed(data)]


def seekable_frames(pread: Pread, file_bytes: int, halts: Sequence[Cancel]) -> list[Frame] | None:
    """The frames of a zstd file with a seek table that can be true and used, else None.

    Without one the file is still a good zstd file: nothing depends on it.
    """
    if file_bytes < FOOTER_BYTES:
        return None

    def last(length: int) -> bytes:
        return interruptible(lambda: pread(length, file_bytes - length), halts)

    table_bytes = seek_table_bytes(last(FOOTER_BYTES))
    if table_bytes is None or not FOOTER_BYTES < table_bytes <= min(file_bytes, _MAX_TABLE_BYTES):
        return None
    try:
        frames = parse_seek_table(last(table_bytes))
    except ArchiveError:
        return None
    fits = sum(frame.compressed_bytes for frame in frames) == file_bytes - table_bytes
    # Frames that hold nothing would be work for the threads, and none for a reader in order.
    small = all(min(frame) > 0 and max(frame) <= _MAX_FRAME_BYTES for frame in frames)
    return frames if fits and small else None


class ZstdFrames(io.RawIOBase):
    """Reads a zstd file by its seek table, frames ahead in `threads` threads.

    `pread` (length, offset) reads the file, in these threads; `release` is called when they have
    ended. A stop that one of `halts` asks for ends a wait for them.
    """

    def __init__(
        self,
        name: str,
        pread: Pread,
        frames: list[Frame],
        threads: int,
        release: Callable[[], None],
        halts: Sequence[Cancel],
    ) -> None:
        super().__init__()
        self._name = name
        self._pread = pread
        self._release = release
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        wait = Wait(self._wake_fd, halts)
        self._ahead = Ahead(self._jobs(frames), threads, 2 * threads, self._wake_fd, wait)
        self._current = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        while not self._current:
            piece = self._ahead.next()
            if piece is None:
                return 0
            self._current = memoryview(piece)
        got = min(len(view), len(self._current))
        view[:got] = self._current[:got]
        self._current = self._current[got:]
        return got

    def _jobs(self, frames: list[Frame]) -> Iterator[Callable[[], bytes]]:
        file_at = 0
        for frame in frames:
            yield functools.partial(self._decompress, file_at, frame)
            file_at += frame.compressed_bytes

    def _decompress(self, file_at: int, frame: Frame) -> bytes:
        data = self._pread(frame.compressed_bytes, file_at)
        try:
            # Before it is believed: it says how much memory to take.
            announced = zstandard.frame_content_size(data)
            plain = b""
            if announced in (-1, frame.plain_bytes):
                plain = zstandard.ZstdDecompressor().decompress(
                    data, max_output_size=frame.plain_bytes, allow_extra_data=False
                )
        except zstandard.ZstdError as error:
            raise CompressionError(
                f"{self._name}: the zstd data is damaged: {error}", file_offset=file_at
            ) from error
        if len(plain) != frame.plain_bytes:
            raise CompressionError(
                f"{self._name}: a zstd frame is not as long as its seek table says",
                file_offset=file_at,
            )
        return plain

    def close(self) -> None:
        if not self.closed:
            # What a thread still reads stays open to the end of the process.
            if self._ahead.close():
                self._release()
            os.close(self._wake_fd)
        super().close()
