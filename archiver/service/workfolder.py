# SPDX-License-Identifier: Apache-2.0
"""The folder of a service's sockets, and of services that were killed, which it removes.

The folder is locked as long as its service lives: the kernel gives the lock
back however that ends. With the folder of a killed service come the notes of
the uploads that it had under way to an object store.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "vmapipe-service-"
# In a job's folder: a line for each of its uploads.
_UPLOADS = "uploads"
# As many as 16 KiB of notes tell; a job has two.
_MAX_NOTES_BYTES = 16 << 10


class WorkFolder:
    """Only its owner can enter it.

    `takes_uploads`: this service goes to a store, and can abort what another one
    has left there; without, that stays for one that can. `left_uploads`: that, as
    (the object's name, the upload's id).
    """

    def __init__(self, *, takes_uploads: bool = False) -> None:
        self.left_uploads: list[tuple[str, str]] = []
        # systemd's, which stays while the service is started again; its /tmp does not.
        parent = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0] or tempfile.gettempdir()
        self._remove_leftovers(Path(parent), takes_uploads=takes_uploads)
        while True:
            self.path = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            if os.path.exists(self.path):
                return
            # Another service took it for a leftover in the moment before the lock.
            os.close(self._fd)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._fd)

    def _remove_leftovers(self, parent: Path, *, takes_uploads: bool) -> None:
        for path in parent.glob(f"{_PREFIX}*"):
            # Somebody else's, one in use, or gone just now: not ours to remove.
            with contextlib.suppress(OSError):
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(path, flags)
                try:
                    if os.fstat(fd).st_uid == os.geteuid():
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        self._remove(path, takes_uploads=takes_uploads)
                finally:
                    os.close(fd)

    def _remove(self, path: Path, *, takes_uploads: bool) -> None:
        left = [upload for notes in path.glob(f"*/{_UPLOADS}") for upload in read_uploads(notes)]
        if left and not takes_uploads:
            return
        self.left_uploads += left
        shutil.rmtree(path, ignore_errors=True)


def note_upload(folder: str, name: str, upload: str) -> None:
    """For whoever comes after this service, if that is killed with its archivers."""
    # A disk that is full costs the note, and no backup.
    with contextlib.suppress(OSError), open(os.path.join(folder, _UPLOADS), "ab") as notes:
        notes.write(json.dumps([name, upload]).encode() + b"\n")


def read_uploads(notes: Path) -> list[tuple[str, str]]:
    """(the object's name, the upload's id) each; what was not written whole is passed over."""
    uploads = []
    with notes.open("rb") as file:
        for line in file.read(_MAX_NOTES_BYTES).splitlines():
            with contextlib.suppress(ValueError):
                match json.loads(line):
                    case [str(name), str(upload)]:
                        uploads.append((name, upload))
    return uploads
