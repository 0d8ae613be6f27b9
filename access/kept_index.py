# SPDX-License-Identifier: Apache-2.0
"""An archive's index, kept in a folder of the user's for the next time that it is opened."""

from __future__ import annotations

import contextlib
import os
import stat

from vmapipe.access.index import ArchiveIndex, decode_index, encode_index
from vmapipe.restore.archive.digest import extent_digest
from vmapipe.runtime.folders import made_path
from vmapipe.runtime.side_files import write_whole
from vmapipe.vma.header import Header


def kept_index(
    folder: str | None, identity: tuple[int, ...], header: Header
) -> ArchiveIndex | None:
    """None where there is none that belongs to exactly this file and is whole."""
    if folder is None:
        return None
    try:
        fd = os.open(
            os.path.join(folder, header.uuid.hex()),
            os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK,
        )
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        if not ours or status.st_mode & 0o022:
            return None  # another user could have written it
        with os.fdopen(fd, "rb", closefd=False) as file:
            raw = file.read()
    except OSError:
        return None
    finally:
        os.close(fd)
    head = _identity_line(identity)
    body = raw[len(head) + 16 :]
    if not raw.startswith(head) or extent_digest(body) != raw[len(head) : len(head) + 16]:
        return None
    return decode_index(body, header)


def _identity_line(identity: tuple[int, ...]) -> bytes:
    return (" ".join(map(str, identity)) + "\n").encode()


def keep_index(folder: str | None, identity: tuple[int, ...], index: ArchiveIndex) -> None:
    """Keep the index, if that is possible: without it only the next start is slower."""
    if folder is None:
        return
    body = encode_index(index)
    with contextlib.suppress(OSError), made_path(folder):
        kept = _identity_line(identity) + extent_digest(body) + body
        write_whole(os.path.join(folder, index.uuid.hex()), kept, 0o600)
