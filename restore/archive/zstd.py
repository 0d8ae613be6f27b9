# SPDX-License-Identifier: Apache-2.0
"""Plain bytes out of a zstd file. The only file of this room that knows the zstd library.

Any zstd file is read in order by one thread. One with a seek table (ours have
one) is read frame by frame, several threads ahead of the reader.
"""

from __future__ import annotations

import io
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, cast

import zstandard

from vmapipe.restore.archive.inputs import Input
from vmapipe.restore.archive.zstdframes import FrameWalk
from vmapipe.restore.errors import CompressionError, SourceError
from vmapipe.runtime.errors import os_error_text
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.seektable import (
    FOOTER_BYTES,
    Frame,
    parse_seek_table,
    seek_table_bytes,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

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


def seekable_frames(fd: int, file_bytes: int) -> list[Frame] | None:
    """The frames of a zstd file with a seek table that can be true and used, else None.

    Without one the file is still a good zstd file: nothing depends on it.
    """
    if file_bytes < FOOTER_BYTES:
        return None
    table_bytes = seek_table_bytes(os.pread(fd, FOOTER_BYTES, file_bytes - FOOTER_BYTES))
    if table_bytes is None or not FOOTER_BYTES < table_bytes <= min(file_bytes, _MAX_TABLE_BYTES):
        return None
    try:
        frames = parse_seek_table(os.pread(fd, table_bytes, file_bytes - table_bytes))
    except ArchiveError:
        return None
    fits = sum(frame.compressed_bytes for frame in frames) == file_bytes - table_bytes
    small = all(max(frame) <= _MAX_FRAME_BYTES for frame in frames)
    return frames if fits and small else None


class ZstdFrames(io.RawIOBase):
    """Reads a zstd file by its seek table, frames ahead in `threads` threads; owns `fd`."""

    def __init__(self, name: str, fd: int, frames: list[Frame], threads: int) -> None:
        super().__init__()
        self._name = name
        self._fd = fd
        self._frames = iter(frames)
        self._file_at = 0
        self._pool = ThreadPoolExecutor(threads, "zstd")
        self._limit = 2 * threads
        self._ahead: deque[Future[bytes]] = deque()
        self._current = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        while not self._current:
            self._look_ahead()
            if not self._ahead:
                return 0
            self._current = memoryview(self._ahead.popleft().result())
            self._look_ahead()
        got = min(len(view), len(self._current))
        view[:got] = self._current[:got]
        self._current = self._current[got:]
        return got

    def _look_ahead(self) -> None:
        while len(self._ahead) < self._limit:
            frame = next(self._frames, None)
            if frame is None:
                return
            self._ahead.append(self._pool.submit(self._decompress, self._file_at, frame))
            self._file_at += frame.compressed_bytes

    def _decompress(self, file_at: int, frame: Frame) -> bytes:
        try:
            data = os.pread(self._fd, frame.compressed_bytes, file_at)
        except OSError as error:
            raise SourceError(
                f"cannot read {self._name} at offset {file_at}: {os_error_text(error)}"
            ) from error
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
            self._pool.shutdown(cancel_futures=True)
            os.close(self._fd)
        super().close()
