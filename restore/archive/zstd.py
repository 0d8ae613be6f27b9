# SPDX-License-Identifier: Apache-2.0
"""Plain bytes out of a zstd file. The only file of this room that imports the zstd library.

Any zstd file is read in order by one thread. One with a seek table (ours have
one) is read frame by frame, several threads ahead of the reader.
"""

from __future__ import annotations

import functools
import io
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vmapipe.restore.archive.errors import CompressionError, InputError
from vmapipe.restore.archive.input import Pread, ReadAhead, Wait, interruptible
from vmapipe.restore.archive.parts import READ_BYTES, Proof, Rewindable
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.process import keep_freed_memory
from vmapipe.runtime.syscalls import share_one_heap
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.seektable import (
    FOOTER_BYTES,
    ZSTD_MAGIC,
    Frame,
    SeekTable,
    is_skippable,
    is_zstd,
    parse_seek_table,
    seek_table_bytes,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MIB = 1 << 20
# What `zstd -d` takes without being asked. A window is memory that a stranger
# makes us allocate.
DEFAULT_WINDOW_BYTES = 128 * MIB
# What the library can do: `zstd --long=31`.
MAX_WINDOW_BYTES = 2048 * MIB
# What is too large was refused before the library sees it.
_ANY_WINDOW: Mapping[int, int] = {zstd.DecompressionParameter.window_log_max: 31}
# Magic, descriptor, window, dictionary id, content size; and the least that a frame can have.
_MAX_HEADER_BYTES = 4 + 1 + 1 + 4 + 8
_MIN_FRAME_BYTES = 4 + 1 + 1 + 3
# Of a frame at a time, where only a part of it is asked for: of 32 KiB to 1 MiB the quickest.
_CHUNK_BYTES = 64 << 10
_WRONG_LENGTH = "a zstd frame is not as long as its seek table says"
# At a time: a bomb's plain data fills no more memory than this.
_PIECE_BYTES = 1 << 20
# Frames are held whole, twice as many as there are threads: larger ones are
# read in order instead. Ours have a few MiB.
_MAX_FRAME_BYTES = 32 << 20
# Small frames are decompressed together with the next larger one: a thread's turn costs more than they do.
# With less than an extent's data at a time, a store would be asked more often, too.
_JOB_BYTES = 3 << 20
_JOB_FRAMES = 16
# 4 million frames, two to four for each 3.6 MiB, are an archive of 3.6 to 7 TiB, and as much memory, or twice that where any
# place is read: a longer table is left unused.
_MAX_TABLE_BYTES = 32 << 20


class ZstdParts:
    """A zstd file's frames, whatever they are, for a `PartStream`."""

    magic_bytes = _MAX_HEADER_BYTES

    def __init__(self, max_window_bytes: int) -> None:
        self._max_window_bytes = max_window_bytes

    def begin(self, source: Rewindable, name: str) -> ZstdFrame | None:
        while True:
            at = source.position
            start = source.at_least(_MAX_HEADER_BYTES)
            source.rewind(at)
            if not start:
                return None
            if not is_skippable(start):
                return ZstdFrame(source, name, self._header(start, name, at))
            # To the library it is a frame like others, that holds nothing.
            ZstdFrame(source, name, _NO_HEADER).readinto(memoryview(bytearray(1)))

    def _header(self, start: bytes, name: str, at: int) -> _Header:
        """Raises CompressionError where no frame begins here, InputError for one not to be read."""
        try:
            header = _frame_header(start)
        except ValueError as error:
            if ZSTD_MAGIC.startswith(start[:4]) and len(start) < _MAX_HEADER_BYTES:
                raise _cut_off(name, at + len(start)) from error
            what = "garbage after the last zstd frame" if at and not is_zstd(start) else str(error)
            raise CompressionError(f"{name}: {what}", file_offset=at) from error
        if header.dictionary_id:
            raise InputError(
                f"{name} was compressed with a zstd dictionary (number {header.dictionary_id}), "
                "which is not stored with it: exec:'zstd -dc -D DICTIONARY FILE' reads it"
            )
        if header.window_bytes > self._max_window_bytes:
            raise too_large_window(name, header.window_bytes, self._max_window_bytes)
        return header

    def find(self, data: bytes, start: int) -> int:
        at = data.find(ZSTD_MAGIC, start)
        while at >= 0:
            try:
                header = _frame_header(data[at : at + _MAX_HEADER_BYTES])
            except ValueError:
                header = None
            # One in 4 billion of other bytes looks like it: it must not end the reading.
            if (
                header is not None
                and not header.dictionary_id
                and header.window_bytes <= self._max_window_bytes
            ):
                return at
            at = data.find(ZSTD_MAGIC, at + 1)
        return -1


class _Header(NamedTuple):
    """`window_bytes`: what a decoder must hold; `plain_bytes`: None where it is not announced."""

    window_bytes: int
    plain_bytes: int | None
    dictionary_id: int
    has_checksum: bool


_NO_HEADER = _Header(0, 0, 0, has_checksum=False)


def _frame_header(start: bytes) -> _Header:
    """The header of the frame that begins so. Raises ValueError where none does, or not all of it.

    Two facts the library does not tell, and both stand at fixed places (RFC 8878, 3.1.1.1): bit 2
    of byte 4 announces a checksum; byte 5 is the window, unless bit 5 of byte 4 says that
    the window is as large as the content.
    """
    if not start.startswith(ZSTD_MAGIC):
        raise ValueError("not a zstd frame")
    window_bytes = 0
    if len(start) > 5 and not start[4] & 0x20:
        base = 1 << 10 + (start[5] >> 3)
        window_bytes = base + base // 8 * (start[5] & 7)
    if window_bytes > MAX_WINDOW_BYTES:
        return _Header(window_bytes, None, 0, has_checksum=False)  # the library knows none of it
    try:
        known = zstd.get_frame_info(start)
    except zstd.ZstdError as error:
        raise ValueError("a zstd frame with a damaged header, or of an unknown kind") from error
    plain_bytes = known.decompressed_size
    window_bytes = window_bytes or plain_bytes or 0
    return _Header(window_bytes, plain_bytes, known.dictionary_id, _has_checksum(start))


def _has_checksum(start: bytes) -> bool:
    return bool(start[4] & 4)


class ZstdFrame:
    """A zstd frame, decompressed a little at a time."""

    def __init__(self, source: Rewindable, name: str, header: _Header) -> None:
        self.has_checksum = header.has_checksum
        self.plain_bytes = header.plain_bytes
        self._source = source
        self._name = name
        self._decompressor = zstd.ZstdDecompressor(options=_ANY_WINDOW)

    def readinto(self, view: memoryview) -> int:
        decompressor = self._decompressor
        while len(view) and not decompressor.eof:
            data = b""
            if decompressor.needs_input:
                data = self._source.read()
                if not data:
                    raise _cut_off(self._name, self._source.position)
            try:
                plain = decompressor.decompress(data, min(len(view), _PIECE_BYTES))
            except zstd.ZstdError as error:
                _check_memory(error)
                raise CompressionError(
                    f"{self._name}: the zstd data is damaged, in the {READ_BYTES} bytes before the "
                    f"file's offset {self._source.position}: {error}"
                ) from error
            # Behind the frame's end.
            if decompressor.unused_data:
                self._source.rewind(self._source.position - len(decompressor.unused_data))
            if plain:
                view[: len(plain)] = plain
                return len(plain)
        return 0


def decompress_frame(data: bytes | memoryview, plain_bytes: int) -> bytes:
    """The frame `data`, which must hold exactly `plain_bytes`. Raises ValueError where it does not."""
    decompressor = zstd.ZstdDecompressor(options=_ANY_WINDOW)
    try:
        # One byte more than there may be, so that it goes on to the end and its checksum.
        plain = decompressor.decompress(data, plain_bytes + 1)
    except zstd.ZstdError as error:
        raise _damaged(error) from error
    if len(plain) != plain_bytes or not decompressor.eof or decompressor.unused_data:
        raise ValueError(_WRONG_LENGTH)
    return plain


class FrameReader:
    """A frame that is decompressed as far as somebody has asked, and goes on from there.

    `data`: the compressed bytes, in pieces that are taken as they are needed. Any thread may use it. What was
    decompressed is kept in chunks of `_CHUNK_BYTES`.
    """

    def __init__(self, data: Iterator[bytes], plain_bytes: int) -> None:
        #: Bytes that are decompressed; what lies before it does not change any more.
        self.done_bytes = 0
        self.plain_bytes = plain_bytes
        #: Where the last read of it ended, for whoever reads ahead; 0: nobody has read it.
        self.read_to = 0
        self._chunks: list[bytes] = []
        self._data = data
        self._decompressor: zstd.ZstdDecompressor | None = None
        self._failure: BaseException | None = None
        self._lock = threading.Lock()

    def go_to(self, end: int) -> None:
        """Decompress up to `end`; at the frame's end its length and checksum are compared.

        Raises ValueError where it is damaged, or not as long as it should be, and what `data` raises.
        After any error it goes no further: the same is raised again, also for a thread that waited here.
        """
        with self._lock:
            if self.done_bytes < end and self._failure is not None:
                raise self._failure
            try:
                self._go_to(end)
            except BaseException as error:
                self._failure = error
                raise

    def _go_to(self, end: int) -> None:
        while self.done_bytes < end:
            chunk = self._next(min(_CHUNK_BYTES, self.plain_bytes - self.done_bytes))
            self._chunks.append(chunk)
            if self.done_bytes + len(chunk) == self.plain_bytes:
                self._finish()
            self.done_bytes += len(chunk)

    def _next(self, length: int) -> bytes:
        if self._decompressor is None:
            self._decompressor = zstd.ZstdDecompressor(options=_ANY_WINDOW)
        chunk = b""
        while len(chunk) < length:
            more = self._feed(self._decompressor, length - len(chunk))
            chunk = chunk + more if chunk else more
        return chunk

    def _feed(self, decompressor: zstd.ZstdDecompressor, most: int) -> bytes:
        data = next(self._data, b"") if decompressor.needs_input else b""
        if decompressor.eof or (decompressor.needs_input and not data):
            raise ValueError(_WRONG_LENGTH)
        try:
            return decompressor.decompress(data, most)
        except zstd.ZstdError as error:
            raise _damaged(error) from error

    def _finish(self) -> None:
        decompressor, self._decompressor = self._decompressor, None
        while decompressor is not None and not decompressor.eof:
            if self._feed(decompressor, 1):
                raise ValueError(_WRONG_LENGTH)
        if (decompressor is not None and decompressor.unused_data) or next(self._data, b""):
            raise ValueError(_WRONG_LENGTH)

    def copy_to(self, view: memoryview, at: int) -> None:
        """Fill `view` with the bytes from `at` on, which `go_to` has reached."""
        done = 0
        for piece in self.pieces(at, at + len(view)):
            view[done : done + len(piece)] = piece
            done += len(piece)

    def pieces(self, at: int, end: int) -> Iterator[memoryview]:
        """The bytes from `at` to `end`, which `go_to` has reached, where they lie."""
        while at < end:
            number, start = divmod(at, _CHUNK_BYTES)
            piece = memoryview(self._chunks[number])[start : start + end - at]
            yield piece
            at += len(piece)


def decompress_start(pieces: Iterable[bytes], length: int) -> bytes:
    """The first `length` plain bytes of a frame, of which no more `pieces` are taken than needed.

    Fewer where it ends before. Raises ValueError where it is damaged.
    """
    decompressor = zstd.ZstdDecompressor(options=_ANY_WINDOW)
    plain = b""
    try:
        for piece in pieces:
            plain += decompressor.decompress(piece, length - len(plain))
            if len(plain) == length or decompressor.eof:
                break
    except zstd.ZstdError as error:
        raise _damaged(error) from error
    return plain


def _damaged(error: zstd.ZstdError) -> ValueError:
    """Make the error for data that is damaged. Raises MemoryError."""
    _check_memory(error)
    return ValueError(f"the zstd data is damaged: {error}")


def _check_memory(error: zstd.ZstdError) -> None:
    """Raise MemoryError where that is what the library means: then the data may be good."""
    # zstd's common/error_private.c, ZSTD_error_memory_allocation; the library hands on the text only.
    if "not enough memory" in str(error):
        raise MemoryError(str(error)) from error


def _cut_off(name: str, file_offset: int) -> CompressionError:
    return CompressionError(
        f"{name} is cut off inside a zstd frame", file_offset=file_offset, cut=True
    )


def too_large_window(name: str, wanted_bytes: int, limit_bytes: int) -> InputError:
    """Make the error for a good file that needs more memory than was allowed."""
    wanted_mib = -(-wanted_bytes // MIB)
    log = max(10, (wanted_bytes - 1).bit_length())
    way = f"exec:'zstd -dc --long={log} FILE'"
    if wanted_bytes <= MAX_WINDOW_BYTES:
        way = f"--zstd-window {wanted_mib}M, or {way}"
    return InputError(
        f"{name} was compressed with a zstd window of {wanted_mib} MiB; up to "
        f"{limit_bytes // MIB} MiB are taken without being asked, for it is memory: use {way}"
    )


def seekable_frames(pread: Pread, file_bytes: int, halts: Sequence[Cancel]) -> SeekTable | None:
    """The frames of a zstd file with a seek table that can be true and used, else None.

    Without one the file is still a good zstd file: nothing depends on it.
    """
    if file_bytes < FOOTER_BYTES:
        return None
    # Whoever asks for frames decompresses them; before the first thread has a heap of its own.
    share_one_heap()

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
    if not (fits and small):
        return None
    keep_freed_memory()
    return frames


class _Decompressed(NamedTuple):
    """What became of a frame that holds `plain_bytes`."""

    plain_bytes: int
    plain: bytes | CompressionError
    has_checksum: bool = False


class ZstdFrames(io.RawIOBase):
    """Reads a zstd file by its seek table, frames ahead in `threads` threads.

    `pread` (length, offset) reads the file, in these threads; `release` is called when they have
    ended. A stop that one of `halts` asks for ends a wait for them.
    """

    def __init__(
        self,
        name: str,
        pread: Pread,
        frames: Iterable[Frame],
        threads: int,
        release: Callable[[], None],
        halts: Sequence[Cancel],
    ) -> None:
        super().__init__()
        self.proof = Proof()
        self._plain_at = 0
        self._name = name
        self._pread = pread
        self._release = release
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        wait = Wait(self._wake_fd, halts)
        self._ahead = ReadAhead(self._jobs(frames), threads, 2 * threads, self._wake_fd, wait)
        self._ready: deque[_Decompressed] = deque()
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
        if not self._ready:
            self._ready.extend(self._ahead.next() or ())
        if not self._ready:
            self._current = None
            return
        frame = self._ready.popleft()
        self._plain_at += frame.plain_bytes
        if isinstance(frame.plain, CompressionError):
            frame.plain.lost_bytes = frame.plain_bytes
            frame.plain.resumes = True
            raise frame.plain
        self._current = memoryview(frame.plain)
        self.proof.ended(self._plain_at, has_checksum=frame.has_checksum)

    def _jobs(self, frames: Iterable[Frame]) -> Iterator[Callable[[], list[_Decompressed]]]:
        """An extent's header and its data are one job where they are two frames."""
        at, batch, batch_bytes = 0, list[Frame](), 0
        for frame in frames:
            batch.append(frame)
            batch_bytes += frame.plain_bytes
            if batch_bytes >= _JOB_BYTES or len(batch) == _JOB_FRAMES:
                yield functools.partial(self._decompress, at, batch)
                at += sum(frame.compressed_bytes for frame in batch)
                batch, batch_bytes = [], 0
        if batch:
            yield functools.partial(self._decompress, at, batch)

    def _decompress(self, file_at: int, frames: list[Frame]) -> list[_Decompressed]:
        data = memoryview(self._pread(sum(frame.compressed_bytes for frame in frames), file_at))
        done: list[_Decompressed] = []
        at = 0
        for frame in frames:
            end = at + frame.compressed_bytes
            done.append(self._plain_of(data[at:end], frame.plain_bytes, file_at + at))
            at = end
        return done

    def _plain_of(self, data: memoryview, plain_bytes: int, file_at: int) -> _Decompressed:
        start = bytes(data[:_MIN_FRAME_BYTES])
        try:
            if not start.startswith(ZSTD_MAGIC) or len(start) < _MIN_FRAME_BYTES:
                raise ValueError("the zstd data is damaged: no frame begins here")
            plain = decompress_frame(data, plain_bytes)
        except ValueError as error:
            failure = CompressionError(f"{self._name}: {error}", file_offset=file_at)
            return _Decompressed(plain_bytes, failure)
        return _Decompressed(plain_bytes, plain, _has_checksum(start))

    def close(self) -> None:
        if not self.closed:
            # What a thread still reads stays open to the end of the process.
            if self._ahead.close():
                self._release()
            os.close(self._wake_fd)
        super().close()
