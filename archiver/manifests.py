# SPDX-License-Identifier: Apache-2.0
"""Where a manifest goes: a file beside the archive, a named file, or whoever listens."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Protocol

from vmapipe.archiver.outputs.file import FileOutput

SUFFIX = ".manifest.json"
# Lines of 40 bytes are not worth a system call each.
_BUFFER_BYTES = 64 << 10


class ManifestSink(Protocol):
    """Takes a manifest line by line. Errors are Failures."""

    def line(self, text: str) -> None:
        """The next line, with its end."""

    def commit(self) -> None:
        """All lines are there."""

    def abandon(self) -> None:
        """Leave nothing behind, after a commit too. Never raises."""


class ManifestFile:
    """A file, committed like an archive. `replace`: one that exists is stale.

    That is so beside an archive that does not exist yet. A file that the user
    named is not replaced.
    """

    def __init__(self, path: str, *, replace: bool) -> None:
        self._path = path
        self._output = FileOutput(path, replace=replace)
        self._lines: list[bytes] = []
        self._length = 0
        self._committed = False

    def line(self, text: str) -> None:
        raw = text.encode()
        self._lines.append(raw)
        self._length += len(raw)
        if self._length >= _BUFFER_BYTES:
            self._flush()

    def commit(self) -> None:
        self._flush()
        self._output.commit()
        self._committed = True

    def abandon(self) -> None:
        self._output.abandon()
        if self._committed:
            self._committed = False
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    def _flush(self) -> None:
        lines, self._lines, self._length = self._lines, [], 0
        self._output.write([b"".join(lines)])


class ManifestLines:
    """Hands each line to a function, for instance as an event."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take = take

    def line(self, text: str) -> None:
        self._take(text)

    def commit(self) -> None:
        """Whoever takes the lines knows the last one by its start."""

    def abandon(self) -> None:
        """What was said cannot be unsaid; the job's end tells that it failed."""


def beside(archive: str) -> str:
    """The path of an archive's manifest."""
    return archive + SUFFIX
