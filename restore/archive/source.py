# SPDX-License-Identifier: Apache-2.0
"""Sources of an archive's bytes: a file, a pipe, a command, a store; plain or compressed."""

from __future__ import annotations

import io
import os
import stat
import subprocess
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from vmapipe.crypt.magic import is_encrypted
from vmapipe.restore.archive.compressed import (
    MAGIC_BYTES,
    ReadOptions,
    compression_of,
    decompressed,
    is_compressed,
    salvaged_compression,
)
from vmapipe.restore.archive.errors import CompressionError, InputError, NoKeyError, no_key
from vmapipe.restore.archive.input import Input, ProgramInput, interruptible
from vmapipe.restore.archive.object import ObjectInput, RemoteObject
from vmapipe.restore.archive.parts import Proof
from vmapipe.runtime.arguments import check_readable
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError, os_error_text
from vmapipe.runtime.object_names import is_object
from vmapipe.runtime.syscalls import read_at
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.seektable import is_zstd

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from vmapipe.crypt.age import AgeIdentity

# For small reads (headers); larger ones pass it by.
_BUFFER_BYTES = 1 << 16
_MAX_DIGITS = 9
# More threads than this decompress faster than one reader can take.
_MAX_THREADS = 4
# Places of an archive that its disk cannot read. Beyond that little of it would be left.
_MOST_LOST = 10_000


class PlainFile:
    """An archive that is not compressed and can be read at any place. Owns `fd`."""

    compression = "none"
    is_encrypted = False
    #: Those with which it was opened: its manifest may be encrypted, too.
    identities: tuple[AgeIdentity, ...] = ()

    def __init__(self, name: str, path: str | None, fd: int, size_bytes: int) -> None:
        self.name = name
        self.path = path
        self.fd = fd
        self.size_bytes = size_bytes
        #: Ranges (offset, length) that its disk cannot read and that read as zeroes; None: that is an error.
        self.lost: list[tuple[int, int]] | None = None

    def lost_in(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Return the ranges among these bytes that cannot be read. Raises InputError."""
        found = _within(self.lost or (), offset, length)
        if not found and self.lost is not None:
            # Another process has met it.
            self.read_into(memoryview(bytearray(length)), offset)
            found = _within(self.lost, offset, length)
        return found

    @property
    def place(self) -> str | None:
        """The path by which it can be opened once more; None where it came as a descriptor."""
        return self.path

    def pread(self, length: int, offset: int) -> bytes:
        """Fewer bytes than asked for only at the file's end. Raises InputError."""
        # Mostly a header of some hundred bytes, in one go.
        try:
            data = os.pread(self.fd, length, offset)
        except OSError as error:
            if self.lost is None:
                raise self._failed(offset, error) from error
            data = b""
        else:
            if not data or len(data) == length:
                return data
        view = memoryview(bytearray(length))
        view[: len(data)] = data
        done = len(data) + self.read_into(view[len(data) :], offset + len(data))
        return bytes(view[:done])

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view`; less than its length only at the file's end. Raises InputError."""
        done = read_at(self.fd, view, offset, self._failed, self.lost)
        if self.lost is not None and len(self.lost) > _MOST_LOST:
            raise InputError(
                f"{self.name}: its disk cannot read it in more than {_MOST_LOST} places"
            )
        return done

    def _failed(self, offset: int, error: OSError) -> InputError:
        return InputError(f"cannot read {self.name} at offset {offset}: {os_error_text(error)}")

    def close(self) -> None:
        os.close(self.fd)


def _within(ranges: Iterable[tuple[int, int]], offset: int, length: int) -> list[tuple[int, int]]:
    return [(at, n) for at, n in ranges if at < offset + length and at + n > offset]


class Stream:
    """An archive that comes in order: a pipe's, decompressed, or decrypted. Owns `raw`.

    `path` is the file's where there is one; `file_bytes` its size, else 0.
    """

    is_encrypted = False
    identities: tuple[AgeIdentity, ...] = ()

    def __init__(
        self,
        name: str,
        path: str | None,
        compression: str,
        raw: io.RawIOBase,
        halt: Cancel,
        file_bytes: int,
    ) -> None:
        self.name = name
        self.path = path
        self.compression = compression
        self.file_bytes = file_bytes
        self._raw = raw
        self._halt = halt
        self._damage = _DamageHeldBack(raw)
        self._reader = io.BufferedReader(self._damage, _BUFFER_BYTES)

    @property
    def place(self) -> str | None:
        """The path or object by which it can be opened once more; None where it comes only once."""
        return self.name if is_object(self.name) else self.path

    @property
    def proof(self) -> Proof | None:
        """State of the compression's checksums; None without compression."""
        return getattr(self._raw, "proof", None)

    def read(self, length: int, *, up_to_damage: bool = False) -> bytes:
        """Fewer bytes than asked for only at the end, which was then found to be sound.

        Raises InputError, CompressionError, Cancelled. With `up_to_damage`, what stands before
        damage is returned first, and the next call raises the error; the one after that goes on
        behind it where the error says that it can.
        """
        data = self._reader.read(length)
        if len(data) < length:
            self._damage.tell_damage(held=up_to_damage and bool(data))
        return data

    def readinto(self, view: memoryview, *, up_to_damage: bool = False) -> int:
        """Fill `view`; what is returned is less than its length only at the end. As `read`."""
        done = 0
        while done < len(view) and (got := self._reader.readinto(view[done:])):
            done += got
        if done < len(view):
            self._damage.tell_damage(held=up_to_damage and bool(done))
        return done

    def stop(self) -> None:
        """Let another thread's `read` end with Cancelled if it waits for data."""
        self._halt.ask("the archive is no longer read")

    def close(self) -> None:
        self._raw.close()
        self._halt.close()


class _DamageHeldBack(io.RawIOBase):
    """Lets a buffered reader see damage as an end: an error would cost it what it holds."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__()
        self._raw = raw
        self._error: CompressionError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        if self._error is not None:
            return 0
        try:
            return self._raw.readinto(buffer)
        except CompressionError as error:
            self._error = error
            return 0

    def tell_damage(self, *, held: bool) -> None:
        """Raise the error, if there is one and it is not to be held back any longer."""
        if self._error is not None and not held:
            error, self._error = self._error, None
            raise error


Source = PlainFile | Stream


def open_source(archive: str, cancel: Cancel, options: ReadOptions | None = None) -> Source:
    """Open `archive`: a path, `-`, `fd:N`, `/dev/fdset/N`, `exec:COMMAND` or `s3://BUCKET/KEY`.

    Raises InputError; UsageError for a name that makes no sense.
    """
    check_readable(archive)
    options = options or ReadOptions()
    source = _open(archive, cancel, options)
    source.identities = options.identities
    return source


def _open(archive: str, cancel: Cancel, options: ReadOptions) -> Source:
    if archive.startswith("exec:"):
        return _stream(
            archive, None, 0, cancel, lambda halts: command_input(archive, halts), options
        )
    if is_object(archive):
        return _open_object(archive, cancel, options)
    number = _descriptor_number(archive)
    if number is not None:
        return _open_descriptor(archive, number, cancel, options)
    return _open_path(archive, cancel, options)


def command_input(word: str, halts: Sequence[Cancel]) -> Input:
    """Open the output of the command in `exec:COMMAND`. Raises InputError, UsageError."""
    command = word.removeprefix("exec:")
    if not command.strip():
        raise UsageError("exec: without a command")
    return ProgramInput(
        f"the command {command!r}", ["/bin/sh", "-c", command], halts, stdin=subprocess.DEVNULL
    )


def _open_object(archive: str, cancel: Cancel, options: ReadOptions) -> Source:
    remote = RemoteObject(archive, (cancel,))
    try:
        start = interruptible(lambda: remote.pread(MAGIC_BYTES, 0), (cancel,))
        source = None
        if is_encrypted(start):
            source = _open_encrypted(
                archive, None, remote.pread, remote.size_bytes, remote.close, cancel, options
            )
        elif (is_compressed(archive, start) and is_zstd(start)) or (
            options.salvage and salvaged_compression(archive, start) == "zstd"
        ):
            source = _open_frames(
                archive, None, remote.pread, remote.size_bytes, remote.close, cancel
            )
    except BaseException:
        remote.close()
        raise
    if source is not None:
        return source
    return _stream(
        archive, None, remote.size_bytes, cancel, lambda halts: ObjectInput(remote, halts), options
    )


def _descriptor_number(archive: str) -> int | None:
    if archive == "-":
        return 0
    for prefix in ("fd:", "/dev/fdset/"):
        if archive.startswith(prefix):
            number = archive.removeprefix(prefix)
            # What fits into a C int, so that nothing after this can be surprised.
            if not (number.isascii() and number.isdigit() and len(number) <= _MAX_DIGITS):
                raise UsageError(f"{archive}: {number!r} is not a descriptor's number")
            return int(number)
    return None


def _open_descriptor(archive: str, number: int, cancel: Cancel, options: ReadOptions) -> Source:
    name = options.called or ("standard input" if archive == "-" else archive)
    try:
        fd = os.dup(number)
    except OSError as error:
        raise InputError(f"cannot read {name}: {os_error_text(error)}") from error
    return _recognise(name, None, fd, cancel, options)


def _open_path(path: str, cancel: Cancel, options: ReadOptions) -> Source:
    try:
        # O_NONBLOCK: opening a FIFO would else wait for its writer, deaf to signals.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InputError(f"cannot open the archive {path}: {os_error_text(error)}") from error
    os.set_blocking(fd, True)
    return _recognise(path, path, fd, cancel, options)


def _recognise(
    name: str, path: str | None, fd: int, cancel: Cancel, options: ReadOptions
) -> Source:
    """Takes `fd` over, also when it fails."""
    try:
        size_bytes = _size_if_seekable(name, fd)
        source = _open_seekable(name, path, fd, size_bytes, cancel, options) if size_bytes else None
    except OSError as error:
        os.close(fd)
        raise InputError(f"cannot read {name}: {os_error_text(error)}") from error
    except BaseException:
        os.close(fd)
        raise
    if source is not None:
        return source
    return _stream(name, path, size_bytes, cancel, lambda halts: Input(name, fd, halts), options)


def _size_if_seekable(name: str, fd: int) -> int:
    """The file's size, or 0 for what is read in order: a pipe, or a file from its middle on."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        raise InputError(f"{name} is a folder, not an archive")
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)) or os.lseek(fd, 0, os.SEEK_CUR):
        return 0
    size_bytes = os.lseek(fd, 0, os.SEEK_END)
    os.lseek(fd, 0, os.SEEK_SET)
    return size_bytes


def _open_seekable(
    name: str, path: str | None, fd: int, size_bytes: int, cancel: Cancel, options: ReadOptions
) -> Source | None:
    """None where it has to be read in order after all."""
    file = PlainFile(name, path, fd, size_bytes)
    file.lost = [] if options.past_errors else None
    start = file.pread(MAGIC_BYTES, 0)
    if is_encrypted(start):
        return _open_encrypted(
            name, path, file.pread, size_bytes, lambda: os.close(fd), cancel, options
        )
    if options.salvage:
        compression = salvaged_compression(name, start)
    else:
        is_compressed(name, start)  # refuses what is known and cannot be read
        compression = compression_of(start)
    if compression == "none":
        return file
    if compression != "zstd":
        return None
    return _open_frames(
        name,
        path,
        PlainFile(name, path, fd, size_bytes).pread,
        size_bytes,
        lambda: os.close(fd),
        cancel,
    )


def _open_encrypted(
    name: str,
    path: str | None,
    pread: Callable[[int, int], bytes],
    size_bytes: int,
    release: Callable[[], None],
    cancel: Cancel,
    options: ReadOptions,
) -> Stream | None:
    """An encrypted zstd file by its seek table; None: it has to be read in order."""
    if not options.identities:
        raise no_key(name)
    from vmapipe.restore.archive.decrypt import AgeFile  # a compiled library: 30 ms

    try:
        file = AgeFile(name, pread, size_bytes, options.identities)
        is_framed = salvaged_compression(name, file.pread(MAGIC_BYTES, 0)) == "zstd"
        source = None
        if is_framed:
            source = _open_frames(name, path, file.pread, file.size_bytes, release, cancel)
    except NoKeyError:
        raise
    except ArchiveError:
        return None  # damage: in order it is told, and what can be read before and behind it is
    if source is not None:
        source.file_bytes = size_bytes
        source.is_encrypted = True
    return source


def _open_frames(
    name: str,
    path: str | None,
    pread: Callable[[int, int], bytes],
    size_bytes: int,
    release: Callable[[], None],
    cancel: Cancel,
) -> Stream | None:
    """A zstd file by its seek table; None where it has none that can be used."""
    from vmapipe.restore.archive import zstd  # a compiled library: 15 ms

    frames = zstd.seekable_frames(pread, size_bytes, (cancel,))
    if frames is None:
        return None
    threads = min(os.cpu_count() or 1, _MAX_THREADS)
    halt = Cancel()
    raw = zstd.ZstdFrames(name, pread, frames, threads, release, (cancel, halt))
    return Stream(name, path, "zstd", raw, halt, size_bytes)


def _stream(
    name: str,
    path: str | None,
    file_bytes: int,
    cancel: Cancel,
    open_input: Callable[[Sequence[Cancel]], Input],
    options: ReadOptions,
) -> Stream:
    """A stream of what `open_input` reads, decompressed if need be."""
    halt = Cancel()
    halts = (cancel, halt)
    source: Input | None = None
    try:
        source = open_input(halts)
        start = source.peek_start(MAGIC_BYTES)
        encrypted = is_encrypted(start)
        if encrypted and not options.identities:
            raise no_key(name)
        if encrypted:
            from vmapipe.restore.archive.decrypt import DecryptedInput  # a compiled library: 30 ms

            source = DecryptedInput(source, name, options.identities)
            start = source.peek_start(MAGIC_BYTES)
            if is_encrypted(start):
                raise InputError(
                    f"{name} is an age file inside an age file: decrypt it once, as by `age -d -i KEY`, and read what "
                    "comes of that"
                )
        raw, compression = decompressed(name, source, start, halts, options)
    except BaseException:
        if source is not None:
            source.close()
        halt.close()
        raise
    stream = Stream(name, path, compression, raw, halt, file_bytes)
    stream.is_encrypted = encrypted
    return stream
