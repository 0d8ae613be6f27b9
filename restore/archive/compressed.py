# SPDX-License-Identifier: Apache-2.0
"""Compression of an archive, recognised by its first bytes: gzip and lzo are read here, zstd in zstd.py.

An archive's name says nothing, except in a salvage where the beginning is damaged.
"""

from __future__ import annotations

import io
import os
import shutil
import threading
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from vmapipe.restore.archive.errors import CompressionError, InputError
from vmapipe.restore.archive.input import Input, ProgramInput
from vmapipe.restore.archive.parts import PartFormat, PartStream, Proof, Rewindable
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.vma.foreign import FOREIGN_COMPRESSIONS
from vmapipe.vma.header import VMA_MAGIC
from vmapipe.vma.seektable import is_zstd

if TYPE_CHECKING:
    from vmapipe.crypt.age import AgeIdentity

# What lzop is fed at a time: as much as a pipe holds.
_PIECE_BYTES = 1 << 16
# The fields of a .lzo file's header in front of the flags: magic, three versions of 2 bytes, method, level.
# Older ones had neither the third version nor the level.
_VERSION_AT, _NEW_VERSION, _FLAGS_AT, _OLD_FLAGS_AT = 9, 0x0940, 17, 14
# Adler-32 or CRC-32 of each block's plain bytes.
_PLAIN_CHECKSUMS = 0x1 | 0x100


def has_checksums(start: bytes) -> bool:
    """Return whether the .lzo file that begins so has checksums of its blocks' plain bytes."""
    version = int.from_bytes(start[_VERSION_AT : _VERSION_AT + 2], "big")
    at = _FLAGS_AT if version >= _NEW_VERSION else _OLD_FLAGS_AT
    return bool(int.from_bytes(start[at : at + 4], "big") & _PLAIN_CHECKSUMS)


class LzopStream(ProgramInput):
    """Plain bytes out of a .lzo file, through lzop (docs/decisions/0002-dependencies.md).

    Owns `raw`, which a thread feeds to the program. `start`: its first bytes.
    """

    def __init__(self, name: str, raw: Input, start: bytes, halts: Sequence[Cancel]) -> None:
        self.proof = Proof()
        self._has_checksums = has_checksums(start)
        lzop = shutil.which("lzop")
        if lzop is None:
            raise InputError(
                f"{name} is compressed with lzop, and the program lzop is not installed"
            )
        self._raw = raw
        # The feeder must end before `raw` is closed, whatever it waits for.
        self._halt = Cancel()
        raw.also_halt(self._halt)
        stdin, self._to_lzop = os.pipe2(os.O_CLOEXEC)
        try:
            super().__init__(name, [lzop, "-dc"], halts, stdin=stdin, keep_words=True)
        except BaseException:
            os.close(self._to_lzop)
            self._halt.close()
            raise
        finally:
            os.close(stdin)
        self._feeder = threading.Thread(target=self._feed, name="lzop-feeder", daemon=True)
        self._feeder.start()

    def _read_fd(self, view: memoryview) -> int:
        got = super()._read_fd(view)
        # lzop compares a block with its checksum before it writes it.
        if self._has_checksums:
            self.proof.proven_bytes += got
        return got

    def _ended(self) -> None:
        super()._ended()
        self.proof.ended(self.proof.proven_bytes, has_checksum=self._has_checksums)

    def _feed(self) -> None:
        try:
            while data := self._raw.read(_PIECE_BYTES):
                view = memoryview(data)
                while view:
                    view = view[os.write(self._to_lzop, view) :]
        except BrokenPipeError:
            pass  # lzop has ended, and says itself why
        except Failure as error:
            self.failed_before = str(error)
        finally:
            os.close(self._to_lzop)

    def _failure(self, how: str) -> Exception:
        # lzop's own message names no place; it stopped within what a pipe holds of this position.
        return CompressionError(
            f"{self.name}: the lzo data is damaged or cut off: lzop {how}",
            file_offset=self._raw.position,
        )

    def close(self) -> None:
        if self.closed:
            return
        self._halt.ask("closed")
        # It has nothing to tidy up, and while it writes it takes no other signal.
        self._process.kill()
        super().close()
        self._feeder.join()
        self._raw.close()
        self._halt.close()


_GZIP_MAGIC = b"\x1f\x8b"
# With the only method there is.
_MEMBER = _GZIP_MAGIC + b"\x08"
_HEADER_BYTES = 10
# Flags that exist; what compressors put into the byte about their effort; systems that exist.
_MAX_FLAGS, _EFFORTS, _MAX_SYSTEM, _UNKNOWN_SYSTEM = 0x1F, (0, 2, 4), 13, 255
# A zlib window with a gzip header and its CRC.
_GZIP_WINDOW_BITS = 31


class GzipMembers:
    """Zero bytes after the last member are padding, as for gzip itself."""

    magic_bytes = _HEADER_BYTES

    def begin(self, source: Rewindable, name: str) -> GzipMember | None:
        at = source.position
        start = source.at_least(len(_MEMBER))
        while start and not start.strip(b"\0") and at:
            at = source.position
            start = source.at_least(len(_MEMBER))
        if at:  # not the first: there may be padding before it, and then nothing
            stripped = start.lstrip(b"\0")
            at += len(start) - len(stripped)
            start = stripped
        source.rewind(at)
        if not start:
            return None
        if not start.startswith(_MEMBER[: len(start)]):
            raise CompressionError(
                f"{name}: the gzip data is damaged, or garbage follows it", file_offset=at
            )
        return GzipMember(source, name)

    def find(self, data: bytes, start: int) -> int:
        """Three bytes alone are in any 16 MiB of compressed data."""
        at = data.find(_MEMBER, start)
        while 0 <= at <= len(data) - _HEADER_BYTES:
            flags, effort, system = data[at + 3], data[at + 8], data[at + 9]
            if (
                flags <= _MAX_FLAGS
                and effort in _EFFORTS
                and (system <= _MAX_SYSTEM or system == _UNKNOWN_SYSTEM)
            ):
                return at
            at = data.find(_MEMBER, at + 1)
        return -1


class GzipMember:
    """One gzip member that is being read."""

    has_checksum = True
    plain_bytes: int | None = None

    def __init__(self, source: Rewindable, name: str) -> None:
        self._source = source
        self._name = name
        self._inflater = zlib.decompressobj(_GZIP_WINDOW_BITS)
        self._ended = False

    def readinto(self, view: memoryview) -> int:
        if not len(view):
            return 0
        while not self._ended:
            data = self._inflater.unconsumed_tail or self._source.read()
            if not data:
                raise CompressionError(
                    f"{self._name} is cut off inside its gzip data",
                    file_offset=self._source.position,
                    cut=True,
                )
            try:
                plain = self._inflater.decompress(data, len(view))
            except zlib.error as error:
                raise CompressionError(
                    f"{self._name}: the gzip data is damaged: {error}",
                    file_offset=self._source.position,
                ) from error
            if self._inflater.eof:
                self._ended = True
                self._source.rewind(self._source.position - len(self._inflater.unused_data))
            if plain:
                view[: len(plain)] = plain
                return len(plain)
        return 0


_LZOP_MAGIC = b"\x89LZO\0\r\n\x1a\n"
# lzop's header up to its flags is the longest.
MAGIC_BYTES = 32


class ReadOptions(NamedTuple):
    """`max_window_bytes`: memory that a zstd file may ask for; 0: as much as `zstd -d` takes.

    `salvage`: where the beginning is damaged, a file is compressed with what its name says.
    `past_errors`: sectors of a plain file that its disk cannot read are zeroes, and are remembered.
    `identities`: secret keys for what is encrypted. `called`: what errors call a descriptor's file.
    """

    max_window_bytes: int = 0
    salvage: bool = False
    past_errors: bool = False
    identities: tuple[AgeIdentity, ...] = ()
    called: str = ""


def compression_of(start: bytes) -> str:
    """Return the compression of a file that begins so; `none` for anything unknown."""
    if is_zstd(start):
        return "zstd"
    if start.startswith(_GZIP_MAGIC):
        return "gzip"
    return "lzo" if start.startswith(_LZOP_MAGIC) else "none"


def salvaged_compression(name: str, start: bytes) -> str:
    """Like `compression_of`; where the beginning may be damaged, by the file's name."""
    found = compression_of(start)
    if found == "none" and not start.startswith(VMA_MAGIC):
        endings = {".zst": "zstd", ".gz": "gzip"}
        plain_name = name.removesuffix(".age")
        found = next((kind for end, kind in endings.items() if plain_name.endswith(end)), "none")
    return found


def is_compressed(name: str, start: bytes) -> bool:
    """Raises InputError for what is known and cannot be read here."""
    for magic, (program, command) in FOREIGN_COMPRESSIONS.items():
        if start.startswith(magic):
            raise InputError(
                f"{name} is compressed with {program}, which is not known here: "
                f"decompress it on the way, with exec:'{command} FILE'"
            )
    return compression_of(start) != "none"


def decompressed(
    name: str, source: Input, start: bytes, halts: Sequence[Cancel], options: ReadOptions
) -> tuple[io.RawIOBase, str]:
    """Plain bytes of what begins with `start`, and the name of its compression."""
    if not options.salvage:
        is_compressed(name, start)  # refuses what is known and cannot be read
    compression = salvaged_compression(name, start) if options.salvage else compression_of(start)
    if compression == "none":
        return source, "none"
    if compression == "lzo":
        return LzopStream(name, source, start, halts), compression
    kind: PartFormat
    if compression == "gzip":
        kind = GzipMembers()
    else:
        # A compiled library: 15 ms.
        from vmapipe.restore.archive.zstd import DEFAULT_WINDOW_BYTES, ZstdParts

        kind = ZstdParts(options.max_window_bytes or DEFAULT_WINDOW_BYTES)
    return PartStream(name, source, kind), compression
