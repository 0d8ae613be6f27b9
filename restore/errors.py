# SPDX-License-Identifier: Apache-2.0
"""What ends a restore. Damage of an archive is an `ArchiveError` of `vmapipe.vma.errors`."""

from __future__ import annotations

from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.vma.errors import ArchiveError


class RestoreError(Failure):
    """The restore cannot be done. `reference_text`: the reference tool's words, where it has any."""

    def __init__(self, text: str, *, reference_text: str | None = None) -> None:
        self.reference_text = reference_text if reference_text is not None else text
        super().__init__(text)


class SourceError(RestoreError):
    """The archive's bytes cannot be got: no file, a read error, a command that failed."""


class TargetError(RestoreError):
    """A target cannot be opened, does not fit, or cannot be written."""


class PlanError(UsageError):
    """The user asks for something the archive does not have, or for one thing twice.

    `reference_text` as in RestoreError.
    """

    def __init__(self, text: str, *, reference_text: str | None = None) -> None:
        self.reference_text = reference_text if reference_text is not None else text
        super().__init__(text)


class CompressionError(ArchiveError):
    """The compressed file is damaged; `file_offset` is the place in it, in bytes, if known."""

    def __init__(self, text: str, *, file_offset: int | None = None) -> None:
        self.file_offset = file_offset
        super().__init__(text if file_offset is None else f"{text} (file offset {file_offset})")


class DigestError(ArchiveError):
    """The data is not what was backed up: the manifest's digest differs."""
