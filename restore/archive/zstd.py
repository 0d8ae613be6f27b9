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

from vmapipe.restore.archive.errors import CompressionError, InputError
from vmapipe.restore.archive.input import ReadAhead, Wait, interruptible
from vmapipe.restore.archive.parts import READ_BYTES, Proof, Rewindable
from vmapipe.restore.archive.zstdframes import (
    MAX_HEADER_BYTES,
    SKIPPABLE_HEADER_BYTES,
    FrameHeader,
    FrameWalk,
    frame_header,
    is_skippable,
    is_zstd,
)
from vmapipe.runtime.cancel import Cancel
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.seektable import (
    FOOTER_BYTES,
    ZSTD_MAGIC,
    Frame,
    parse_seek_table,
    seek_table_bytes,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# (length, offset): fewer bytes only at the end. Raises InputError.
Pread = Callable[[int, int], bytes]
MIB = 1 << 20
# What `zstd -d` takes without being asked. A window is memory that a stranger
# makes us allocate.
DEFAULT_WINDOW_BYTES = 128 * MIB
# What the library can do: `zstd --long=31`.
MAX_WINDOW_BYTES = 2048 * MIB
# Frames are held whole, twice as many as there are threads: larger ones are
# read in order instead. Ours have a few MiB.
_MAX_FRAME_BYTES = 32 << 20
# 262,144 frames of 4 MiB are an archive of 1 TiB, and 30 MiB of memory for
# the table: a longer table is left unused.
_MAX_TABLE_BYTES = 2 << 20


class ZstdParts:
    """A zstd file's frames, whatever they are, for a `PartStream`."""

    magic_bytes = MAX_HEADER_BYTES

    def __init__(self, max_window_bytes: int) -> None:
        self._max_window_bytes = max_window_bytes
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=max_window_bytes)

    def begin(self, source: Rewindable, name: str) -> ZstdFrame | None:
        while True:
            at = source.position
            start = source.at_least(MAX_HEADER_BYTES)
            source.rewind(at)
            if not start:
                return None
            if is_skippable(start):
                self._pass_over(source, name, start)
                continue
            return ZstdFrame(source, name, self._header(start, name, at), self._decompressor)

    def _header(self, start: bytes, name: str, at: int) -> FrameHeader:
        try:
            header = frame_header(start) if len(start) >= len(ZSTD_MAGIC) else None
        except ValueError as error:
            what = "garbage after the last zstd frame" if at and not is_zstd(start) else str(error)
            raise CompressionError(f"{name}: {what}", file_offset=at) from error
        if header is None:
            raise _cut_off(name, at + len(start))
        if header.dictionary_id:
            raise InputError(
                f"{name} was compressed with a zstd dictionary (number {header.dictionary_id}), "
                "which is not stored with it: exec:'zstd -dc -D DICTIONARY FILE' reads it"
            )
        if header.window_bytes > self._max_window_bytes:
            raise too_large_window(name, header.window_bytes, self._max_window_bytes)
        return header

    def _pass_over(self, source: Rewindable, name: str, start: bytes) -> None:
        """A skippable frame."""
        size_bytes = int.from_bytes(start[4:SKIPPABLE_HEADER_BYTES], "little")
        end = source.position + SKIPPABLE_HEADER_BYTES + size_bytes
        while source.position < end:
            if not source.read():
                raise _cut_off(name, source.position)
        source.rewind(end)

    def find(self, data: bytes, start: int) -> int:
        at = data.find(ZSTD_MAGIC, start)
        while at >= 0:
            try:
                header = frame_header(data[at : at + MAX_HEADER_BYTES])
            except ValueError:
                header = None
            # One in four milliards of other bytes looks like it: it must not end the reading.
            if (
                header is not None
                and not header.dictionary_id
                and header.window_bytes <= self._max_window_bytes
            ):
                return at
            at = data.find(ZSTD_MAGIC, at + 1)
        return -1


class ZstdFrame:
    """One frame, decompressed a little at a time."""

    def __init__(
        self,
        source: Rewindable,
        name: str,
        header: FrameHeader,
        decompressor: zstandard.ZstdDecompressor,
    ) -> None:
        self.has_checksum = header.has_checksum
        self.plain_bytes = header.plain_bytes
        self._source = source
        self._name = name
        self._walk = FrameWalk(name, header, source.position)
        self._error: CompressionError | None = None
        self._plain = decompressor.stream_reader(
            cast(IO[bytes], self),  # it calls `read` only
            read_size=READ_BYTES,
            read_across_frames=False,
        )

    def readinto(self, view: memoryview) -> int:
        try:
            got = int(self._plain.readinto(view))
        except zstandard.ZstdError as error:
            raise CompressionError(
                f"{self._name}: the zstd data is damaged, in the {READ_BYTES} bytes before the "
                f"file's offset {self._source.position}: {error}"
            ) from error
        if not got and not self._walk.ended:
            raise self._error or _cut_off(self._name, self._source.position)
        return got

    def read(self, size: int) -> bytes:
        """What the decompressor reads: the frame's bytes, and nothing behind them."""
        if self._walk.ended or self._error is not None:
            return b""
        piece = self._source.read()
        try:
            taken = self._walk.feed(piece)
        except CompressionError as error:
            # What stands before the first damaged byte is still good.
            self._error = error
            return piece[: error.sound_bytes]
        if taken < len(piece):
            self._source.rewind(self._source.position - (len(piece) - taken))
        return piece[:taken]


def _cut_off(name: str, file_offset: int) -> CompressionError:
    return CompressionError(
        f"{name} is cut off inside a zstd frame", file_offset=file_offset, cut=True
    )


def too_large_window(name: str, wanted_bytes: int, limit_bytes: int) -> InputError:
    """The file is good, and needs more memory than whoever reads it has allowed."""
    wanted_mib = -(-wanted_bytes // MIB)
    log = max(10, (wanted_bytes - 1).bit_length())
    way = f"exec:'zstd -dc --long={log} FILE'"
    if wanted_bytes <= MAX_WINDOW_BYTES:
        way = f"--zstd-window {wanted_mib}M, or {way}"
    return InputError(
        f"{name} was compressed with a zstd window of {wanted_mib} MiB; up to "
        f"{limit_bytes // MIB} MiB are taken without being asked, for it is memory: use {way}"
    )


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
        self.proof = Proof()
        self._plain_at = 0
        self._checked: dict[int, bool] = {}
        self._positions_left = _with_positions(frames)
        self._name = name
        self._pread = pread
        self._release = release
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        wait = Wait(self._wake_fd, halts)
        self._ahead = ReadAhead(self._jobs(frames), threads, 2 * threads, self._wake_fd, wait)
        self._current: memoryview | None = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        while not self._current:
            self._next_frame()
            if self._current is None:
                return 0
        got = min(len(view), len(self._current))
        view[:got] = self._current[:got]
        self._current = self._current[got:]
        return got

    def _next_frame(self) -> None:
        """Its plain bytes become the current ones; None at the end.

        Each is checked before any of it is handed out. Raises CompressionError; the next call
        goes on behind the damaged one.
        """
        try:
            piece = self._ahead.next()
        except CompressionError as error:
            _, frame = next(self._positions_left)
            self._plain_at += frame.plain_bytes
            error.lost_bytes = frame.plain_bytes
            error.resumes = True
            raise
        if piece is None:
            self._current = None
            return
        file_at, _ = next(self._positions_left)
        self._current = memoryview(piece)
        self._plain_at += len(piece)
        self.proof.ended(self._plain_at, has_checksum=self._checked.pop(file_at))

    def _jobs(self, frames: list[Frame]) -> Iterator[Callable[[], bytes]]:
        for file_at, frame in _with_positions(frames):
            yield functools.partial(self._decompress, file_at, frame)

    def _decompress(self, file_at: int, frame: Frame) -> bytes:
        data = self._pread(frame.compressed_bytes, file_at)
        try:
            # Before it is believed: it says how much memory to take.
            header = frame_header(data[:MAX_HEADER_BYTES])
            self._checked[file_at] = header is not None and header.has_checksum
            announced = zstandard.frame_content_size(data)
            plain = b""
            if announced in (-1, frame.plain_bytes):
                plain = zstandard.ZstdDecompressor().decompress(
                    data, max_output_size=frame.plain_bytes, allow_extra_data=False
                )
        except (zstandard.ZstdError, ValueError) as error:
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


def _with_positions(frames: list[Frame]) -> Iterator[tuple[int, Frame]]:
    """Each with its place in the file."""
    file_at = 0
    for frame in frames:
        yield file_at, frame
        file_at += frame.compressed_bytes
