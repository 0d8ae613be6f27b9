# SPDX-License-Identifier: Apache-2.0
"""Plain bytes out of gzip files of any number of members."""

from __future__ import annotations

import zlib

from vmapipe.restore.archive.rewind import Rewindable
from vmapipe.restore.errors import CompressionError

MAGIC = b"\x1f\x8b"
# With the only method there is.
_MEMBER = MAGIC + b"\x08"
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
    """One member."""

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
