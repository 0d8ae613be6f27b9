# SPDX-License-Identifier: Apache-2.0
"""Errors of archives, and of contents that an archive cannot hold.

`ArchiveError` is about bytes that were read (the archive is damaged, or is no
archive); `LimitError` is about something the caller wants to store and the
format cannot hold.
"""

from __future__ import annotations


class VmaError(Exception):
    """Base of all errors of this room; `exit_code` is the process's verdict."""

    exit_code = 1


class LimitError(VmaError):
    """The format cannot hold what was asked for (too many devices, a blob too large, ...)."""


class ArchiveError(VmaError):
    """The archive cannot be read as it is.

    `offset` is the position in the plain archive stream, in bytes, of the
    structure in question (None: unknown). `reference_text` is the wording of
    the reference tool where it has one: scripts look for it. `advice`: what can
    be had of the archive all the same, in words; it is said behind the error.
    """

    advice = ""

    def __init__(
        self, text: str, *, offset: int | None = None, reference_text: str | None = None
    ) -> None:
        self.text = text
        self.offset = offset
        self.reference_text = reference_text if reference_text is not None else text
        super().__init__(text if offset is None else f"{text} (archive offset {offset})")


class NotAnArchiveError(ArchiveError):
    """The first bytes are not those of a VMA archive."""


class HeaderError(ArchiveError):
    """The archive's header is damaged or lies."""


class ExtentError(ArchiveError):
    """An extent is damaged or lies."""


class CoverageError(ArchiveError):
    """Clusters are missing, double, out of order or beyond the device's end."""

    def __init__(
        self,
        text: str,
        *,
        device: str,
        cluster_num: int | None = None,
        offset: int | None = None,
        reference_text: str | None = None,
    ) -> None:
        self.device = device
        self.cluster_num = cluster_num
        super().__init__(text, offset=offset, reference_text=reference_text)
