# SPDX-License-Identifier: Apache-2.0
"""Plain bytes out of an age file: in order out of any input, or at any place of a file.

It is loaded only where something is encrypted: the library takes 30 ms. Damage is a
`CompressionError` with the place in the stored file; reading goes on behind the chunk.
"""

from __future__ import annotations

import io
import stat
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from vmapipe.crypt.age import (
    CHUNK_BYTES,
    MAX_HEADER_BYTES,
    NONCE_BYTES,
    SEALED_CHUNK_BYTES,
    AgeError,
    AgeIdentity,
    AgePayload,
    DamagedChunk,
    IncompleteHeader,
    NoKeyFits,
    find_file_key,
    parse_header,
)
from vmapipe.crypt.keys import parse_identities
from vmapipe.crypt.primitives import TAG_BYTES
from vmapipe.restore.archive.errors import CompressionError, NoKeyError
from vmapipe.restore.archive.input import Input, Pread
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError, os_error_text
from vmapipe.runtime.process import forbid_core_dumps
from vmapipe.runtime.side_files import read_keys

# A file of identities has a line a key.
_MAX_IDENTITIES_BYTES = 1 << 20
# A header for one recipient takes 200 bytes; what is longer is read in growing pieces.
_FIRST_BYTES = 4 << 10
# Of the stored file at a time, in order: as much as a pipe holds.
_READ_BYTES = 1 << 20
# Decrypted chunks that are kept: for readers of headers, which follow each other closely.
_KEPT_CHUNKS = 32


def read_identities(
    paths: Sequence[str], cancel: Cancel | None = None
) -> tuple[tuple[AgeIdentity, ...], list[str]]:
    """Read what `--identity` names; return the keys, and warnings for the user. Raises UsageError."""
    found: list[AgeIdentity] = []
    warnings = []
    forbid_core_dumps()
    for path in paths:
        try:
            text = read_keys(path, _MAX_IDENTITIES_BYTES, cancel)
            mode = Path(path).stat().st_mode
            found += parse_identities(text)
        except OSError as error:
            raise UsageError(f"--identity {path}: {os_error_text(error)}") from error
        except ValueError as error:
            raise UsageError(f"--identity {path}: {error}") from error
        if stat.S_ISREG(mode) and mode & 0o077:
            warnings.append(
                f"{path}: other users can read this secret key (mode {stat.S_IMODE(mode):04o}): "
                "chmod 600"
            )
    return tuple(found), warnings


def _payload(name: str, start: bytes, identities: Sequence[AgeIdentity]) -> tuple[AgePayload, int]:
    """Return the payload of the file that begins so, and where it begins. Raises IncompleteHeader too."""
    try:
        header = parse_header(start)
        begin = header.length + NONCE_BYTES
        if len(start) < begin:
            raise IncompleteHeader("it ends inside its header")
        file_key = find_file_key(header, identities)
    except IncompleteHeader:
        raise
    except NoKeyFits as error:
        raise NoKeyError(f"{name}: {error}") from error
    except AgeError as error:
        raise CompressionError(f"{name}: the encrypted data is damaged: {error}") from error
    return AgePayload(file_key, start[header.length : begin]), begin


def _cut_off(name: str, error: AgeError) -> CompressionError:
    return CompressionError(f"{name}: the encrypted data is damaged: {error}", cut=True)


def _damaged(name: str, error: AgeError, file_offset: int) -> CompressionError:
    return CompressionError(
        f"{name}: the encrypted data is damaged: {error}", file_offset=file_offset
    )


class AgeFile:
    """A file, or object, that can be read at any place. Any thread may use it.

    `pread` reads the stored file; `size_bytes` is that of the plain content, as far as the stored
    size tells: its last chunk proves it when it is read.
    """

    def __init__(
        self, name: str, pread: Pread, file_bytes: int, identities: Sequence[AgeIdentity]
    ) -> None:
        """Raises NoKeyError, CompressionError for a damaged header, InputError."""
        self._name = name
        self._pread = pread
        self._file_bytes = file_bytes
        self._payload, self._start = self._open(identities)
        body = file_bytes - self._start
        self._chunks = max(1, -(-body // SEALED_CHUNK_BYTES))
        rest = body - (self._chunks - 1) * SEALED_CHUNK_BYTES
        self.size_bytes = (self._chunks - 1) * CHUNK_BYTES + max(0, rest - TAG_BYTES)
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def _open(self, identities: Sequence[AgeIdentity]) -> tuple[AgePayload, int]:
        length = _FIRST_BYTES
        while True:
            start = self._pread(length, 0)
            try:
                return _payload(self._name, start, identities)
            except IncompleteHeader as error:
                if len(start) < length or length > MAX_HEADER_BYTES:
                    raise _cut_off(self._name, error) from error
            length *= 4

    def pread(self, length: int, offset: int) -> bytes:
        """Fewer bytes than asked for only at the end. Raises CompressionError, and as the file's."""
        end = min(offset + length, self.size_bytes)
        if offset >= end:
            return b""
        first, last = offset // CHUNK_BYTES, (end - 1) // CHUNK_BYTES
        chunks = self._read(first, last)
        begin = first * CHUNK_BYTES
        if first == last:
            return chunks[0][offset - begin : end - begin]
        chunks[0] = chunks[0][offset - begin :]
        chunks[-1] = chunks[-1][: end - last * CHUNK_BYTES]
        return b"".join(chunks)

    def _read(self, first: int, last: int) -> list[bytes]:
        """Return these chunks, decrypted."""
        if last - first < _KEPT_CHUNKS:
            with self._lock:
                kept = [self._kept.get(number) for number in range(first, last + 1)]
            if None not in kept:
                return [chunk for chunk in kept if chunk is not None]
        at = self._start + first * SEALED_CHUNK_BYTES
        sealed = memoryview(self._pread((last + 1 - first) * SEALED_CHUNK_BYTES, at))
        chunks = []
        for number in range(first, last + 1):
            place = (number - first) * SEALED_CHUNK_BYTES
            piece = sealed[place : place + SEALED_CHUNK_BYTES]
            try:
                is_last = number == self._chunks - 1
                chunks.append(self._payload.open(number, piece, last=is_last))
            except DamagedChunk as error:
                raise _damaged(self._name, error, at + place) from error
        with self._lock:
            for number, chunk in enumerate(
                chunks[-_KEPT_CHUNKS:], last + 1 - len(chunks[-_KEPT_CHUNKS:])
            ):
                self._kept[number] = chunk
                self._kept.move_to_end(number)
            while len(self._kept) > _KEPT_CHUNKS:
                self._kept.popitem(last=False)
        return chunks


class DecryptedInput(Input):
    """Decrypts `raw`, which it owns, in order. `position` counts plain bytes."""

    def __init__(self, raw: io.RawIOBase, name: str, identities: Sequence[AgeIdentity]) -> None:
        """Raises NoKeyError, CompressionError for a damaged header, InputError, Cancelled."""
        # Not the parent's: it reads a descriptor, and this another input.
        io.RawIOBase.__init__(self)
        self.name = name
        self.position = 0
        self._start = b""
        self._raw = raw
        self._file = io.BufferedReader(raw, _READ_BYTES)
        self._number = 0
        self._plain = memoryview(b"")
        self._pending: CompressionError | None = None
        self._is_over = False
        # Not bytes: a header of 1 MiB in short lines would be copied anew with each of them.
        start = bytearray()
        while True:
            # A line at a time: what stands behind the header is the payload's.
            more = self._file.readline(MAX_HEADER_BYTES)
            start += more
            if more and not more.startswith(b"--- ") and len(start) <= MAX_HEADER_BYTES:
                continue
            start += self._file.read(NONCE_BYTES)
            try:
                self._payload, self._file_at = _payload(name, bytes(start), identities)
            except IncompleteHeader as error:
                raise _cut_off(name, error) from error
            return

    def also_halt(self, halt: Cancel) -> None:
        if isinstance(self._raw, Input):
            self._raw.also_halt(halt)

    def _read_fd(self, view: memoryview) -> int:
        while not self._plain and not self._is_over:
            self._next_chunk()
        got = min(len(view), len(self._plain))
        view[:got] = self._plain[:got]
        self._plain = self._plain[got:]
        return got

    def _next_chunk(self) -> None:
        """Raises CompressionError; the next call goes on behind the damaged chunk."""
        if self._pending is not None:
            error, self._pending = self._pending, None
            self._is_over = True
            raise error
        sealed = self._file.read(SEALED_CHUNK_BYTES)
        is_last = not self._file.peek(1)
        number, at = self._number, self._file_at
        self._number += 1
        self._file_at += len(sealed)
        try:
            self._plain = memoryview(self._payload.open(number, sealed, last=is_last))
        except DamagedChunk as damage:
            self._plain = memoryview(self._sound_elsewhere(number, sealed, is_last, at, damage))
        self._is_over = is_last and self._pending is None

    def _sound_elsewhere(
        self, number: int, sealed: bytes, is_last: bool, at: int, damage: DamagedChunk
    ) -> bytes:
        """Return a chunk that is sound but not where it ends the file, or does not; or raise the damage."""
        try:
            plain = self._payload.open(number, sealed, last=not is_last)
        except DamagedChunk:
            self._is_over = is_last
            error = _damaged(self.name, damage, at)
            error.resumes = not is_last
            error.lost_bytes = max(0, len(sealed) - TAG_BYTES)
            raise error from damage
        why = "it is cut off" if is_last else "there is something behind its end"
        self._pending = CompressionError(
            f"{self.name}: the encrypted data is damaged: {why}",
            file_offset=at + len(sealed),
            cut=True,
        )
        return plain

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        io.RawIOBase.close(self)
