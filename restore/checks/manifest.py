# SPDX-License-Identifier: Apache-2.0
"""The digests beside an archive, read along with it line by line."""

from __future__ import annotations

import os
from typing import IO

from vmapipe.restore.errors import SourceError
from vmapipe.runtime.errors import os_error_text
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.manifest import MAX_LINE_BYTES, ExtentDigest, ManifestReader, Opening, Totals

SUFFIX = ".manifest.json"


def manifest_beside(archive_path: str | None) -> str | None:
    """The manifest of this archive, if there is one."""
    if archive_path is None:
        return None
    path = archive_path + SUFFIX
    return path if os.path.exists(path) else None


class Manifest:
    """An open manifest. A context manager."""

    def __init__(self, path: str) -> None:
        """Raises SourceError where it cannot be read, ArchiveError where it is damaged."""
        self.path = path
        self._reader = ManifestReader()
        try:
            self._file: IO[bytes] = open(path, "rb")  # noqa: SIM115  closed by close()
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
