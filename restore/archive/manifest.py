# SPDX-License-Identifier: Apache-2.0
"""The digests beside an archive, read along with it line by line."""

from __future__ import annotations

import errno
import io
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vmapipe.restore.archive.errors import InputError, no_key
from vmapipe.restore.archive.input import Input
from vmapipe.restore.archive.object import ObjectInput, RemoteObject, object_exists
from vmapipe.restore.archive.source import command_input
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import os_error_text
from vmapipe.runtime.object_names import is_object
from vmapipe.runtime.side_files import open_regular
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.extent import Extent
from vmapipe.vma.manifest import MAX_LINE_BYTES, ExtentDigest, ManifestReader, Opening, Totals
from vmapipe.vma.sealed import MAGIC, SealedReader, StoredFile
from vmapipe.vma.sealed import MAX_LINE_BYTES as SEALED_LINE_BYTES

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from vmapipe.crypt.age import AgeIdentity

# How far away the line of an extent is looked for when bytes are missing or added: 14 GiB of
# data, in some hundred KiB of memory.
_LOOK_LINES = 4096
SUFFIX = ".manifest.json"


def manifest_beside(archive: str | None, cancel: Cancel) -> str | None:
    """The manifest of the archive at this `place` (path or object; None: nowhere), if there is one.

    Raises InputError, Cancelled.
    """
    if archive is None:
        return None
    path = archive + SUFFIX
    if is_object(archive):
        return path if object_exists(path, (cancel,)) else None
    try:
        os.close(open_regular(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None  # no file can have that name
        raise InputError(f"cannot open the manifest {path}: {os_error_text(error)}") from error
    return path


def open_manifest_file(path: str, cancel: Cancel) -> io.BufferedReader:
    """Open a file, an object or a command's output, to be read from its start. Raises OSError, InputError."""
    if path.startswith("exec:"):
        return io.BufferedReader(command_input(path, (cancel,)))
    if not is_object(path):
        # A FIFO's writer is waited for as an archive's is, and not deaf to signals.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        os.set_blocking(fd, True)
        return io.BufferedReader(Input(f"the manifest {path}", fd, (cancel,)))
    return io.BufferedReader(ObjectInput(RemoteObject(path, (cancel,)), (cancel,)))


def _is_sealed(file: io.BufferedReader) -> bool:
    return file.peek(len(MAGIC)).startswith(MAGIC)


class SealedPieces(io.RawIOBase):
    """The age file in a sealed manifest, whose lines `file` gives. `stored` is there at its end."""

    def __init__(self, name: str, file: io.BufferedReader) -> None:
        super().__init__()
        self._name = name
        self._file = file
        self._reader = SealedReader()
        self._piece = b""

    @property
    def stored(self) -> StoredFile | None:
        return self._reader.stored

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        while not self._piece and self._reader.stored is None:
            self._piece = self._line()
        got = min(len(view), len(self._piece))
        view[:got] = self._piece[:got]
        self._piece = self._piece[got:]
        return got

    def _line(self) -> bytes:
        raw = self._file.readline(SEALED_LINE_BYTES)
        if not raw.endswith(b"\n"):
            raise ArchiveError(f"{self._name} is cut off or damaged")
        try:
            piece = self._reader.line(raw.decode("ascii"))
        except UnicodeDecodeError as error:
            raise ArchiveError(f"{self._name} is damaged: {error}") from error
        if self._reader.stored is not None and self._file.read(1):
            raise ArchiveError(f"{self._name} is damaged: text after the end")
        return piece

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def read_stored(path: str, cancel: Cancel) -> StoredFile | None:
    """Return what a sealed manifest tells everybody; None: it is not sealed. Raises InputError, ArchiveError."""
    try:
        file = open_manifest_file(path, cancel)
    except OSError as error:
        raise InputError(f"cannot open the manifest {path}: {os_error_text(error)}") from error
    with SealedPieces(f"the manifest {path}", file) as pieces:
        if not _is_sealed(file):
            return None
        while pieces.read(MAX_LINE_BYTES):
            cancel.check()
        return pieces.stored


class ManifestWalk:
    """Finds the line of each extent of an archive, damaged or not; `finish` at the end.

    As long as nothing is wrong, that is the next line. Behind damage an extent is known by its
    place, or by its digest, wherever it stands: bytes may be missing, or be there twice.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.totals: Totals | None = None
        self.matched = 0
        self._manifest = manifest
        self._read = 0
        self._last = 0
        #: Lines in order with where their extents stood: those behind us, and those to come.
        self._past: deque[_Line] = deque(maxlen=_LOOK_LINES)
        self._coming: deque[_Line] = deque()
        self._next_at = manifest.opening.header.total_bytes
        self._shift = 0
        self._certain = True

    def doubt(self) -> None:
        """Something is wrong with the archive: the next extent need not be that of the next line."""
        self._certain = False

    def digest_of(self, extent: Extent, compute: Callable[[], bytes]) -> bytes | None:
        """Return the digest that the extent must have; None where the manifest does not list it.

        `compute`: the digest that it has. Raises ArchiveError where the manifest is damaged.
        """
        line = self._line(0)
        if self._certain and line is not None and self._fits(line, extent):
            return self._take(0, extent)
        found = compute()
        place = self._with_digest(extent, found)
        if place is not None:
            self._go_to(place)
            self._certain = True
            self._shift = extent.offset - self._coming[0].at
            return self._take(0, extent)
        self._certain = False
        index = 0
        while (line := self._line(index)) is not None and line.at + self._shift < extent.offset:
            index += 1
            if index >= _LOOK_LINES:
                self._go_to(index)
                index = 0
        return self._take(index, extent) if line is not None and self._fits(line, extent) else None

    def finish(self) -> int:
        """How many lines there are behind that of the last extent. Raises ArchiveError."""
        while self.totals is None:
            self._line(0)
            self._coming.clear()
        return self._read - self._last

    @property
    def is_complete(self) -> bool:
        """After `finish`: whether all extents that are listed were found."""
        return self.matched == self._read

    def _fits(self, line: _Line, extent: Extent) -> bool:
        is_there = line.at + self._shift == extent.offset
        return is_there and line.expected.total_bytes == extent.total_bytes

    def _with_digest(self, extent: Extent, digest: bytes) -> int | None:
        """The place of the line with this digest: 0 is the next one, -1 the last one passed."""
        wanted = ExtentDigest(extent.total_bytes, digest)
        self._line(_LOOK_LINES)
        for index, line in enumerate(self._coming):
            if line.expected == wanted and line.taken_by != _key(extent):
                return index
        for index, line in enumerate(reversed(self._past), 1):
            # One that this very extent has had: now it is there twice.
            if line.expected == wanted and line.taken_by != _key(extent):
                return -index
        return None

    def _go_to(self, place: int) -> None:
        for _ in range(place):
            self._past.append(self._coming.popleft())
        for _ in range(-place):
            self._coming.appendleft(self._past.pop())

    def _take(self, place: int, extent: Extent) -> bytes:
        if place:
            self._go_to(place)
        line = self._coming.popleft()
        self._past.append(line._replace(taken_by=_key(extent)))
        self.matched += 1 if line.taken_by is None else 0
        self._last = max(self._last, line.number)
        return line.expected.digest

    def _line(self, index: int) -> _Line | None:
        """A line to come; None behind the last one."""
        while len(self._coming) <= index and self.totals is None:
            line = self._manifest.next()
            if isinstance(line, Totals):
                self.totals = line
            elif isinstance(line, ExtentDigest):
                self._read += 1
                self._coming.append(_Line(self._read, self._next_at, line))
                self._next_at += line.total_bytes
        return self._coming[index] if index < len(self._coming) else None


class _Line(NamedTuple):
    """Place and digest of an extent when it was stored; `taken_by`: key of the extent found for it."""

    number: int
    at: int
    expected: ExtentDigest
    taken_by: tuple[int, int, int] | None = None


def _key(extent: Extent) -> tuple[int, int, int]:
    """Return a key that differs between extents of an archive, unless one is there twice."""
    if not extent.runs:
        return 0, 0, 0
    run = extent.runs[0]
    return run.dev_id, run.first_cluster, run.count


class Manifest:
    """An open manifest, which may be that of an encrypted archive. A context manager."""

    def __init__(self, path: str, cancel: Cancel, identities: Sequence[AgeIdentity] = ()) -> None:
        """`path` may be an object's name.

        Raises InputError where it cannot be read, which it cannot without a key if it is sealed;
        ArchiveError where it is damaged.
        """
        self.path = path
        self._reader = ManifestReader()
        self._sealed: SealedPieces | None = None
        try:
            self._file = open_manifest_file(path, cancel)
        except OSError as error:
            raise InputError(f"cannot open the manifest {path}: {os_error_text(error)}") from error
        try:
            if _is_sealed(self._file):
                self._unseal(identities)
            opening = self.next()
        except BaseException:
            self._file.close()
            raise
        if not isinstance(opening, Opening):
            raise RuntimeError("a manifest's first line is its opening")
        self.opening = opening

    def __enter__(self) -> Manifest:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def _unseal(self, identities: Sequence[AgeIdentity]) -> None:
        """From now on `_file` is the plain manifest."""
        name = f"the manifest {self.path}"
        if not identities:
            raise no_key(name)
        from vmapipe.restore.archive.decrypt import DecryptedInput

        self._sealed = SealedPieces(name, self._file)
        self._file = io.BufferedReader(DecryptedInput(self._sealed, name, identities))

    def next(self) -> Opening | ExtentDigest | Totals:
        """The next line: an extent's digest or, at the end, the totals. Raises ArchiveError."""
        line = self._next()
        if isinstance(line, Totals) and self._sealed is not None:
            self._check_seal(line, self._sealed)
        return line

    def _check_seal(self, totals: Totals, sealed: SealedPieces) -> None:
        """What anybody may see must be what the sealed part says."""
        if self._file.read(1):
            raise ArchiveError(f"the manifest {self.path} is damaged: text after the end")
        if sealed.stored is None or sealed.stored[:2] != (totals.file_bytes, totals.file_digest):
            raise ArchiveError(f"the manifest {self.path} is damaged: its two parts do not agree")

    def _next(self) -> Opening | ExtentDigest | Totals:
        try:
            raw = self._file.readline(MAX_LINE_BYTES)
        except OSError as error:
            raise InputError(
                f"cannot read the manifest {self.path}: {os_error_text(error)}"
            ) from error
        if not raw.endswith(b"\n"):
            raise ArchiveError(f"the manifest {self.path} is cut off or damaged")
        try:
            return self._reader.line(raw.decode("ascii"))
        except UnicodeDecodeError as error:
            raise ArchiveError(f"the manifest {self.path} is damaged: {error}") from error
