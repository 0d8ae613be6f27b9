# SPDX-License-Identifier: Apache-2.0
"""The table of blobs behind the fixed part of the header: names, and configs' contents."""

from __future__ import annotations

import struct

from vmapipe.vma.errors import HeaderError, LimitError
from vmapipe.vma.layout import MAX_BLOB_BYTES


class BlobTable:
    """Collects blobs; positions start at 1 because 0 means "none"."""

    def __init__(self) -> None:
        self.data = bytearray(1)

    def add(self, blob: bytes) -> int:
        position = len(self.data)
        self.data += struct.pack("<H", len(blob)) + blob
        return position


def name_bytes(name: str, what: str) -> bytes:
    """A device or config name as stored: UTF-8, undecodable bytes kept, a NUL at the end.

    Raises LimitError when the format cannot hold the name.
    """
    try:
        raw = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise LimitError(f"{what} name {name!r} is no text") from error
    if not raw:
        raise LimitError(f"{what} has an empty name")
    if b"\0" in raw:
        raise LimitError(f"{what} name {name!r} contains a NUL byte")
    if len(raw) >= MAX_BLOB_BYTES:
        raise LimitError(f"{what} name is {len(raw)} bytes long; the limit is {MAX_BLOB_BYTES - 1}")
    return raw + b"\0"


class BlobReader:
    """Takes blobs out of the table.

    Two names may share a blob, and then share it here; blobs that overlap are
    a lie that would make many times its size out of a header, and are refused.
    """

    def __init__(self, table: bytes, offset: int) -> None:
        self._table = table
        self._offset = offset
        self._left = len(table)
        self._blobs: dict[int, bytes] = {}
        self._names: dict[int, str] = {}

    def blob(self, pointer: int, what: str) -> bytes:
        if pointer in self._blobs:
            return self._blobs[pointer]
        start = pointer + 2
        if start > len(self._table):
            raise HeaderError(f"{what} points outside the blob table", offset=self._offset)
        (length,) = struct.unpack_from("<H", self._table, pointer)
        blob = self._table[start : start + length]
        if len(blob) < length:
            raise HeaderError(f"{what} is cut off in the blob table", offset=self._offset + pointer)
        self._left -= 2 + length
        if self._left < 0:
            raise HeaderError(
                f"{what} overlaps others in the blob table", offset=self._offset + pointer
            )
        self._blobs[pointer] = blob
        return blob

    def name(self, pointer: int, what: str) -> str:
        if pointer not in self._names:
            raw = self.blob(pointer, what)
            if len(raw) < 2 or raw[-1] != 0 or 0 in raw[:-1]:
                raise HeaderError(
                    f"{what} is no name (no NUL at its end)", offset=self._offset + pointer
                )
            self._names[pointer] = raw[:-1].decode("utf-8", "surrogateescape")
        return self._names[pointer]
