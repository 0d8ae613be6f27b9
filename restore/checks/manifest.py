# SPDX-License-Identifier: Apache-2.0
"""The digests beside an archive, read along with it line by line."""

from __future__ import annotations

import io
import os
from typing import IO

from vmapipe.restore.archive.inputs import Input
from vmapipe.restore.archive.source import Source, command_input
from vmapipe.restore.errors import SourceError
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import os_error_text
from vmapipe.runtime.objectnames import is_object
from vmapipe.runtime.sidefiles import open_regular
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.manifest import MAX_LINE_BYTES, ExtentDigest, ManifestReader, Opening, Totals

SUFFIX = ".manifest.json"


def manifest_beside(source: Source, cancel: Cancel) -> str | None:
    """The manifest of this archive, if there is one. Raises SourceError, Cancelled."""
    if is_object(source.name):
        from vmapipe.restore.archive.object import object_exists

        name = source.name + SUFFIX
        return name if object_exists(name, (cancel,)) else None
    if source.path is None:
        return None
    path = source.path + SUFFIX
    try:
        os.close(open_regular(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SourceError(f"cannot open the manifest {path}: {os_error_text(error)}") from error
    return path


def _open(path: str, cancel: Cancel) -> IO[bytes] | io.BufferedReader:
    if path.startswith("exec:"):
        return io.BufferedReader(command_input(path, (cancel,)))
    if not is_object(path):
        # A FIFO's writer is waited for as an archive's is, and not deaf to signals.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        os.set_blocking(fd, True)
        return io.BufferedReader(Input(f"the manifest {path}", fd, (cancel,)))
    from vmapipe.restore.archive.object import ObjectInput, RemoteObject

    return io.BufferedReader(ObjectInput(RemoteObject(path, (cancel,)), (cancel,)))


class Manifest:
    """An open manifest. A context manager."""

    def __init__(self, path: str, cancel: Cancel) -> None:
        """`path` may be an object's name.

        Raises SourceError where it cannot be read, ArchiveError where it is damaged.
        """
        self.path = path
        self._reader = ManifestReader()
        try:
            self._file = _open(path, cancel)
        except OSError as error:
            raise SourceError(f"cannot open the manifest {path}: {os_error_text(error)}") from error
        try:
            opening = self._line()
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

    def next(self) -> ExtentDigest | Totals:
        """The next extent's digest or, at the end, the totals. Raises ArchiveError."""
        line = self._line()
        if isinstance(line, Opening):
            raise RuntimeError("a manifest's opening comes once")
        return line

    def _line(self) -> Opening | ExtentDigest | Totals:
        try:
            raw = self._file.readline(MAX_LINE_BYTES)
        except OSError as error:
            raise SourceError(
                f"cannot read the manifest {self.path}: {os_error_text(error)}"
            ) from error
        if not raw.endswith(b"\n"):
            raise ArchiveError(f"the manifest {self.path} is cut off or damaged")
        try:
            return self._reader.line(raw.decode("ascii"))
        except UnicodeDecodeError as error:
            raise ArchiveError(f"the manifest {self.path} is damaged: {error}") from error
