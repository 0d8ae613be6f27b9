# SPDX-License-Identifier: Apache-2.0
"""What is known of an archive without reading its data: is it seekable, checked, drilled."""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from vmapipe.access.drill.result import DrillResult, read_result
from vmapipe.access.lzo import can_read_lzo
from vmapipe.restore.archive.compressed import MAGIC_BYTES, compression_of
from vmapipe.restore.archive.input import Pread
from vmapipe.restore.archive.manifest import Manifest, manifest_beside
from vmapipe.restore.archive.object import RemoteObject
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure
from vmapipe.runtime.objectstore import is_object
from vmapipe.vma.errors import ArchiveError


class Condition(NamedTuple):
    """`compression`: "none", "zstd", "gzip", "lzo", or "" where it cannot be looked at twice (a pipe).

    `is_seekable`: any place can be read at once, by serve, mount and files; else they decompress the
    archive up to there first. `has_digests`: its manifest stands beside it, so that what is read
    is checked. `drill`: the latest restore test; None: there was none.
    """

    compression: str
    is_seekable: bool
    has_digests: bool
    drill: DrillResult | None


def condition_of(name: str, uuid: bytes, cancel: Cancel) -> Condition:
    """Of the archive at `name`, whose header has this uuid. What cannot be found out is not there."""
    compression, is_seekable = _stored_form(name, cancel)
    if not compression:
        return Condition("", False, False, None)
    drill = None if is_object(name) else read_result(name, uuid)
    return Condition(compression, is_seekable, _has_manifest(name, uuid, cancel), drill)


def _stored_form(name: str, cancel: Cancel) -> tuple[str, bool]:
    try:
        if is_object(name):
            remote = RemoteObject(name, (cancel,))
            try:
                return _form(remote.pread, remote.size_bytes, cancel)
            finally:
                remote.close()
        if not _is_file(name):
            return "", False
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            size_bytes = os.lseek(fd, 0, os.SEEK_END)
            form = _form(lambda length, offset: os.pread(fd, length, offset), size_bytes, cancel)
            # Its blocks are independent; finding them all here would take as long as opening it.
            return ("lzo", can_read_lzo()) if form[0] == "lzo" else form
        finally:
            os.close(fd)
    except Cancelled:
        raise
    except (OSError, Failure, ArchiveError):
        return "", False


def _is_file(name: str) -> bool:
    """False for "-", "exec:…" and the like, which no file is called, and for FIFOs."""
    mode = os.stat(name).st_mode
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def _form(pread: Pread, size_bytes: int, cancel: Cancel) -> tuple[str, bool]:
    compression = compression_of(pread(MAGIC_BYTES, 0))
    if compression == "zstd":
        # Listing a plain archive does without a library that many installations have not.
        from vmapipe.restore.archive.zstd import seekable_frames

        return compression, seekable_frames(pread, size_bytes, (cancel,)) is not None
    return compression, compression == "none"


def _has_manifest(name: str, uuid: bytes, cancel: Cancel) -> bool:
    try:
        path = manifest_beside(name, cancel)
        if path is None:
            return False
        with Manifest(path, cancel) as manifest:
            return manifest.opening.uuid == uuid
    except Cancelled:
        raise
    except (OSError, Failure, ArchiveError):
        return False
