# SPDX-License-Identifier: Apache-2.0
"""age between the compression and an output; and the manifest of what is encrypted.

It is loaded only where somebody wants encryption: the library takes 30 ms.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from vmapipe.archiver.outputs.base import Buffers, Output, OutputFailure, OutputWrapper
from vmapipe.crypt.age import MAX_RECIPIENTS, AgeError, Encryptor, Recipient
from vmapipe.crypt.keys import parse_recipient, parse_recipients
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError, os_error_text
from vmapipe.runtime.process import forbid_core_dumps, keep_freed_memory
from vmapipe.runtime.side_files import read_keys
from vmapipe.runtime.text import one_line
from vmapipe.vma.sealed import PIECE_BYTES, StoredFile, closing_line, opening_line, piece_line

# A thousand recipients of a line each, with comments.
_MAX_FILE_BYTES = 1 << 20
# Of a recipient that is refused, enough to find it.
_MAX_TOLD_CHARS = 24


def read_recipients(texts: Sequence[str], cancel: Cancel | None = None) -> tuple[Recipient, ...]:
    """Read what `--encrypt-to` says: recipients, and @FILE with one a line.

    Raises UsageError where one of them cannot be read: nothing is ever encrypted to fewer than were
    named. Each is there once in what is returned.
    """
    found: list[Recipient] = []
    for text in texts:
        try:
            if text.startswith("@"):
                found += _of_file(text[1:], cancel)
            else:
                found.append(parse_recipient(text.strip()))
        except ValueError as error:
            raise UsageError(f"--encrypt-to {_shown(text)}: {error}") from error
    found = list(dict.fromkeys(found))
    if len(found) > MAX_RECIPIENTS:
        raise UsageError(f"--encrypt-to: {len(found)} recipients; the limit is {MAX_RECIPIENTS}")
    return tuple(found)


def _shown(text: str) -> str:
    if text.startswith("@"):
        return one_line(text)
    # A secret key that was mistaken for a public one must not get into a log.
    if not text.startswith(("age1", "ssh-")):
        return "…"
    return one_line(text[:_MAX_TOLD_CHARS]) + ("…" if len(text) > _MAX_TOLD_CHARS else "")


def _of_file(path: str, cancel: Cancel | None) -> list[Recipient]:
    """Raises ValueError, in words."""
    try:
        return parse_recipients(read_keys(path, _MAX_FILE_BYTES, cancel))
    except OSError as error:
        raise AgeError(f"it cannot be read: {os_error_text(error)}") from error


class AgeOutput(OutputWrapper):
    """Encrypts into another output. Memory: a chunk of 64 KiB, and one write, encrypted."""

    def __init__(self, inner: Output, recipients: Sequence[Recipient]) -> None:
        super().__init__(inner)
        forbid_core_dumps()
        # Else the system takes the chunks' memory back after each write, and clears it for the next.
        keep_freed_memory()
        self._encryptor = Encryptor(recipients, os.urandom)
        self._begun = False
        self._over = False

    def write(self, buffers: Buffers) -> None:
        self._check()
        sealed = self._encryptor.update(buffers)
        if sealed or not self._begun:
            self._inner.write([*self._start(), *sealed])

    def commit(self) -> None:
        self._check()
        self._inner.write([*self._start(), self._encryptor.finish()])
        self._inner.commit()
        self._over = True

    def abandon(self) -> None:
        self._over = True
        self._inner.abandon()

    def _start(self) -> list[bytes]:
        if self._begun:
            return []
        self._begun = True
        return [self._encryptor.start]

    def _check(self) -> None:
        if self._over:
            raise OutputFailure(f"{self.description} takes no more: it is complete or given up")


class ManifestSealer:
    """Makes a sealed manifest of a plain one: `take` gets its lines, and passes sealed ones on."""

    def __init__(self, recipients: Sequence[Recipient], take: Callable[[str], None]) -> None:
        self._encryptor = Encryptor(recipients, os.urandom)
        self._take = take
        self._held = bytearray(self._encryptor.start)
        self._count = self._bytes = 0
        take(opening_line())

    def line(self, text: str) -> None:
        for chunk in self._encryptor.update([text.encode()]):
            self._held += chunk
        self._pass_on(PIECE_BYTES)

    def finish(self, stored: StoredFile) -> None:
        self._held += self._encryptor.finish()
        self._pass_on(1)
        self._take(closing_line(self._bytes, stored))

    def _pass_on(self, least_bytes: int) -> None:
        while len(self._held) >= least_bytes:
            piece = bytes(self._held[:PIECE_BYTES])
            del self._held[:PIECE_BYTES]
            self._take(piece_line(self._count, piece))
            self._count += 1
            self._bytes += len(piece)
