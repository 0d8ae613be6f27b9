# SPDX-License-Identifier: Apache-2.0
"""Errors of a restore. Damage of an archive is an `ArchiveError` of `vmapipe.vma.errors`."""

from __future__ import annotations

from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.vma.errors import ArchiveError


class RestoreError(Failure):
    """The restore cannot be done. `reference_text`: the reference tool's message, if it has one."""

    def __init__(self, text: str, *, reference_text: str | None = None) -> None:
        self.reference_text = reference_text if reference_text is not None else text
        super().__init__(text)


class InputError(RestoreError):
    """The archive's bytes cannot be got: no file, a read error, a command that failed."""


class NoKeyError(InputError):
    """It is encrypted, and no key that was given opens it."""


def no_key(name: str) -> NoKeyError:
    return NoKeyError(f"{name} is encrypted (age): name a file with a key, --identity FILE")


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
    """The compressed file is damaged; `file_offset` is the place in it, in bytes, if known.

    `cut`: it ends too early, and nothing says that what came is wrong. `resumes`: reading again
    goes on behind the damage, `lost_bytes` of plain data further on (None: unknown).
    `unproven_from`: what came from this plain position on is covered by a checksum that was
    wrong or was not reached (None: all that came was checked).
    """

    def __init__(self, text: str, *, file_offset: int | None = None, cut: bool = False) -> None:
        self.file_offset = file_offset
        self.cut = cut
        self.resumes = False
        self.lost_bytes: int | None = None
        self.unproven_from: int | None = None
        super().__init__(text if file_offset is None else f"{text} (file offset {file_offset})")


class DigestError(ArchiveError):
    """The data is not what was backed up: the manifest's digest differs."""
