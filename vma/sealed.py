# SPDX-License-Identifier: Apache-2.0
"""The manifest of an encrypted archive: what anybody may see, and the plain manifest as an age file in it.

One JSON document with the same line discipline as a plain one (docs/vma-format.md): an opening, pieces
of the age file in base64, and the length and digest of the archive as it is stored.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, NamedTuple

from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.manifest import ALGORITHM, DIGEST_BYTES, SHA256_BYTES

FORMAT = "vmapipe-sealed-manifest"
VERSION = 1
ENCRYPTION = "age-encryption.org/v1"
#: Of the age file in one line; a multiple of three, so that lines joined are base64, too.
PIECE_BYTES = 48 << 10
MAX_LINE_BYTES = PIECE_BYTES // 3 * 4 + 8
_OPENING = (
    json.dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "encryption": ENCRYPTION,
            "algorithm": ALGORITHM,
        }
    )[:-1]
    + ', "sealed": [\n'
)
#: What a sealed manifest begins with, and no other file.
MAGIC = f'{{"format": "{FORMAT}", '.encode()


class StoredFile(NamedTuple):
    """Length and digest of an archive's file as it is stored; `sha256`: empty where it was not made."""

    total_bytes: int
    digest: bytes
    sha256: bytes = b""


def opening_line() -> str:
    return _OPENING


def piece_line(index: int, piece: bytes) -> str:
    return f'{"," if index else " "}"{base64.b64encode(piece).decode()}"\n'


def closing_line(sealed_bytes: int, stored: StoredFile) -> str:
    tail: dict[str, Any] = {"sealed_bytes": sealed_bytes, "file": file_fields(stored)}
    return "], " + json.dumps(tail)[1:] + "\n"


def file_fields(stored: StoredFile) -> dict[str, Any]:
    """Return the entry `file` of a manifest."""
    fields: dict[str, Any] = {"bytes": stored.total_bytes, "digest": stored.digest.hex()}
    if stored.sha256:
        fields["sha256"] = stored.sha256.hex()
    return fields


class SealedReader:
    """Feed it the lines in order. Raises ArchiveError for one that is not as it would be written."""

    def __init__(self) -> None:
        self.stored: StoredFile | None = None
        self._begun = False
        self._count = 0
        self._bytes = 0

    def line(self, text: str) -> bytes:
        """Return the piece of the age file that the line holds; empty for the opening and the end."""
        try:
            return self._line(text)
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise ArchiveError(f"the manifest is damaged: {error}") from error

    def _line(self, text: str) -> bytes:
        if len(text) > MAX_LINE_BYTES:
            raise ValueError(f"a line of {len(text)} characters")
        if self.stored is not None:
            raise ValueError("text after the end")
        if not self._begun:
            _must_equal(text, opening_line())
            self._begun = True
            return b""
        if text.startswith("], "):
            self._close(text)
            return b""
        try:
            piece = base64.b64decode(text[2:-2], validate=True)
        except binascii.Error as error:
            raise ValueError("a line that is not as vmapipe writes it") from error
        _must_equal(text, piece_line(self._count, piece))
        self._count += 1
        self._bytes += len(piece)
        return piece

    def _close(self, text: str) -> None:
        tail = json.loads("{" + text[3:])
        sealed_bytes, file = int(tail["sealed_bytes"]), tail["file"]
        sha256 = bytes.fromhex(file["sha256"]) if "sha256" in file else b""
        stored = StoredFile(int(file["bytes"]), bytes.fromhex(file["digest"]), sha256)
        if len(stored.digest) != DIGEST_BYTES or len(sha256) not in (0, SHA256_BYTES):
            raise ValueError("a digest of the wrong length")
        _must_equal(text, closing_line(sealed_bytes, stored))
        if sealed_bytes != self._bytes:
            raise ValueError(f"{self._bytes} bytes are there, {sealed_bytes} announced")
        self.stored = stored


def _must_equal(text: str, written: str) -> None:
    if text != written:
        raise ValueError("a line that is not as vmapipe writes it")
