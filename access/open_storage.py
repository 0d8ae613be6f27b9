# SPDX-License-Identifier: Apache-2.0
"""The storage of an archive by its name: what kind it is, and so how any place of it is read."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from vmapipe.access.frames import WHOLE_FRAME_BYTES, FrameStorage
from vmapipe.access.lzo import MAGIC, can_read_lzo, lzo_blocks
from vmapipe.access.storage import (
    LzoStorage,
    PlainStorage,
    RangeStorage,
    SpoolStorage,
    Storage,
)
from vmapipe.crypt.magic import is_encrypted
from vmapipe.restore.archive.compressed import MAGIC_BYTES, ReadOptions, is_compressed
from vmapipe.restore.archive.errors import InputError, no_key
from vmapipe.restore.archive.input import Pread
from vmapipe.restore.archive.object import RemoteObject
from vmapipe.restore.archive.source import Source, Stream, open_source
from vmapipe.restore.archive.zstd import seekable_frames
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError, os_error_text
from vmapipe.runtime.object_names import is_object
from vmapipe.vma.seektable import is_zstd

if TYPE_CHECKING:
    from vmapipe.crypt.age import AgeIdentity


class Caches(NamedTuple):
    """`index_folder`: where an index is kept for the next time; None: nowhere.

    `spool_folder`: where what comes as one compressed piece is kept, of `spool_bytes` at most.
    `identities`: secret keys for an encrypted archive, of which no index is kept: it would tell of it.
    """

    index_folder: str | None
    spool_folder: str
    spool_bytes: int
    identities: tuple[AgeIdentity, ...] = ()


def refuse_streams(name: str) -> None:
    """Raise UsageError for an archive that can only be read from its start to its end."""
    if name == "-" or name.startswith(("fd:", "exec:", "/dev/fdset/")):
        raise UsageError(
            f"{name}: what comes in order, and once, cannot be read at any place: "
            "put the archive into a file first"
        )


def open_storage(name: str, cancel: Cancel, caches: Caches) -> tuple[Storage, tuple[int, ...]]:
    """Open the archive `name`, a path or s3://…, at any place.

    Return its storage, and the identity that a kept index of it must have (empty: keep none). Raises
    InputError, ArchiveError, UsageError, Cancelled.
    """
    refuse_streams(name)
    if is_object(name):
        return _open_object(name, cancel, caches), ()
    try:
        # O_NONBLOCK: opening a FIFO would else wait for its writer, deaf to signals.
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InputError(f"cannot open the archive {name}: {os_error_text(error)}") from error
    try:
        status = os.fstat(fd)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            raise InputError(f"{name} is neither a file nor a block device: it cannot be served")
        size = os.lseek(fd, 0, os.SEEK_END)
        os.lseek(fd, 0, os.SEEK_SET)
        identity = (status.st_dev, status.st_ino, size, status.st_mtime_ns)
        start = os.pread(fd, MAGIC_BYTES, 0)

        def pread(length: int, offset: int) -> bytes:
            return os.pread(fd, length, offset)

        if is_encrypted(start):
            decrypted = _decrypted(name, pread, size, lambda: os.close(fd), cancel, caches)
            if decrypted is not None:
                return decrypted, ()
        elif not is_compressed(name, start):
            return PlainStorage(name, fd, size), identity

        frames = seekable_frames(pread, size, (cancel,)) if is_zstd(start) else None
        if frames is not None:
            return FrameStorage(name, pread, lambda: os.close(fd), frames), identity
        blocks = (
            lzo_blocks(pread, (cancel,)) if start.startswith(MAGIC) and can_read_lzo() else None
        )
        if blocks is not None:
            return LzoStorage(name, fd, blocks), identity
        options = ReadOptions(identities=caches.identities, called=name)
        source = open_source(f"fd:{fd}", cancel, options)
    except OSError as error:
        os.close(fd)
        raise InputError(f"cannot read {name}: {os_error_text(error)}") from error
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return _spool(name, source, caches), ()


def _open_object(name: str, cancel: Cancel, caches: Caches) -> Storage:
    remote = RemoteObject(name, (cancel,))
    try:
        start = remote.pread(MAGIC_BYTES, 0)
        if is_encrypted(start):
            decrypted = _decrypted(
                name, remote.pread, remote.size_bytes, remote.close, cancel, caches
            )
            if decrypted is not None:
                return decrypted
        elif not is_compressed(name, start):
            return RangeStorage(name, remote.pread, remote.close, remote.size_bytes)
        frames = None
        if is_zstd(start):
            frames = seekable_frames(remote.pread, remote.size_bytes, (cancel,))
        if frames is not None:
            release, piece_bytes = remote.close, WHOLE_FRAME_BYTES
            return FrameStorage(name, remote.pread, release, frames, piece_bytes=piece_bytes)
    except BaseException:
        remote.close()
        raise
    remote.close()
    source = open_source(name, cancel, ReadOptions(identities=caches.identities))
    return _spool(name, source, caches)


def _decrypted(
    name: str,
    pread: Pread,
    size_bytes: int,
    release: Callable[[], None],
    cancel: Cancel,
    caches: Caches,
) -> Storage | None:
    """What is encrypted, where any place of it can be read; else None. Raises InputError, ArchiveError."""
    if not caches.identities:
        raise no_key(name)
    from vmapipe.restore.archive.decrypt import AgeFile  # a compiled library: 30 ms

    file = AgeFile(name, pread, size_bytes, caches.identities)
    start = file.pread(MAGIC_BYTES, 0)
    if not is_compressed(name, start):
        return RangeStorage(name, file.pread, release, file.size_bytes)
    if not is_zstd(start):
        return None
    frames = seekable_frames(file.pread, file.size_bytes, (cancel,))
    if frames is None:
        return None
    return FrameStorage(name, file.pread, release, frames, piece_bytes=WHOLE_FRAME_BYTES)


def _spool(name: str, source: Source, caches: Caches) -> Storage:
    if not isinstance(source, Stream):
        source.close()
        raise InputError(f"{name} changed while it was opened")
    return SpoolStorage(name, source, caches.spool_folder, caches.spool_bytes)
