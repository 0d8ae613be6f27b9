# SPDX-License-Identifier: Apache-2.0
"""Where data waits for its turn: in the archive itself where any place can be read, else in a nameless file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

from vmapipe.access.frames import FrameStorage
from vmapipe.access.storage import RangeStorage, Storage
from vmapipe.restore.archive.errors import InputError
from vmapipe.restore.archive.input import Pread
from vmapipe.restore.archive.object import RemoteObject
from vmapipe.restore.archive.source import PlainFile, Source
from vmapipe.restore.archive.zstd import seekable_frames
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, UsageError, os_error_text
from vmapipe.runtime.object_names import is_object
from vmapipe.runtime.syscalls import read_at, write_at
from vmapipe.runtime.text import human_bytes

#: As much as a machine of some hundred GiB writes to out of order while it is backed up, and no full disk.
SPOOL_BYTES = 16 << 30


class Spool:
    """`keep` and `recall` of an `Ordering`, for data of one source. A context manager.

    A file that can be read at any place keeps nothing: its data is read there once more. What comes
    only in order goes into a file without a name in `folder`, of `limit_bytes` at most.
    """

    def __init__(self, source: Source, folder: str, limit_bytes: int, cancel: Cancel) -> None:
        self._source = source
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._cancel = cancel
        self._storage: Storage | None = None
        self._looked = False
        self._fd = -1
        #: What was kept so far, in bytes.
        self.kept_bytes = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._storage is not None:
            self._storage.close()
        if self._fd >= 0:
            os.close(self._fd)

    def keep(self, data: memoryview, at: int) -> int:
        """Say where data is found that stands at `at` in the archive. Raises Failure."""
        if not self._looked:
            self._looked = True
            self._storage = _any_place(self._source, self._cancel)
        if self._storage is not None or isinstance(self._source, PlainFile):
            return at
        if self._fd < 0:
            self._fd = _nameless_file(self._folder)
        place = self.kept_bytes
        self.kept_bytes += len(data)
        if self.kept_bytes > self._limit_bytes:
            raise Failure(
                f"{self._source.name}: more than {human_bytes(self._limit_bytes)} of it come out of "
                "order, and it can be read only once, from its start to its end: give more with "
                "--spool-size, or store it in a file first (a plain one, or `vmapipe copy --compress zstd`)"
            )
        try:
            write_at(self._fd, data, place)
        except OSError as error:
            raise Failure(
                f"cannot write what comes out of order to the folder {self._folder}: "
                f"{os_error_text(error)}; another one: --spool DIR"
            ) from error
        return place

    def recall(self, place: int, length: int) -> memoryview:
        """Raises InputError, Failure."""
        view = memoryview(bytearray(length))
        try:
            if self._fd >= 0:
                done = read_at(self._fd, view, place)
            elif isinstance(self._source, PlainFile):
                done = self._source.read_into(view, place)
            elif self._storage is not None:
                done = self._storage.read_into(view, place)
            else:
                raise RuntimeError("nothing was kept")
        except OSError as error:
            raise InputError(
                f"cannot read {self._source.name} at offset {place}: {os_error_text(error)}"
            ) from error
        if done < length:
            raise InputError(f"{self._source.name} is shorter than it was, at offset {place}")
        return view


def _any_place(source: Source, cancel: Cancel) -> Storage | None:
    """The archive once more, by its name, if any place of it can be read; None where not."""
    name = source.place
    if name is None or isinstance(source, PlainFile) or source.is_encrypted:
        return None
    if source.compression not in ("none", "zstd"):
        return None
    if is_object(name):
        remote = RemoteObject(name, (cancel,))
        if source.compression == "none":
            return RangeStorage(name, remote.pread, remote.close, remote.size_bytes)
        return _frames(name, remote.pread, remote.size_bytes, remote.close, cancel)
    if source.compression == "none":
        return None  # a pipe
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    return _frames(
        name,
        lambda length, offset: os.pread(fd, length, offset),
        os.fstat(fd).st_size,
        lambda: os.close(fd),
        cancel,
    )


def _frames(
    name: str, pread: Pread, size_bytes: int, release: Callable[[], None], cancel: Cancel
) -> Storage | None:
    """A zstd file or object by its seek table; None, and released, where it has none."""
    frames = seekable_frames(pread, size_bytes, (cancel,)) if size_bytes else None
    if frames is None:
        release()
        return None
    return FrameStorage(name, pread, release, frames)


def _nameless_file(folder: str) -> int:
    """Raises UsageError."""
    try:
        # Ours alone; the name is gone before anything is written.
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.dup(file.fileno())
    except OSError as error:
        raise UsageError(
            f"--spool {folder}: no file can be made there: {os_error_text(error)}"
        ) from error
