# SPDX-License-Identifier: Apache-2.0
"""The folder of a service's sockets, and of services that were killed, which it removes.

With the folder of a killed service come the notes of the uploads that it had
under way to an object store.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from vmapipe.runtime.folders import OwnFolder

# In a job's folder: a line for each of its uploads.
_UPLOADS = "uploads"
# As many as 16 KiB of notes tell; a job has two.
_MAX_NOTES_BYTES = 16 << 10


class WorkFolder(OwnFolder):
    """`takes_uploads`: this service goes to a store, and can abort what another one
    has left there; without, that stays for one that can. `left_uploads`: that, as
    (the object's name, the upload's id).
    """

    def __init__(self, *, takes_uploads: bool = False) -> None:
        self.left_uploads: list[tuple[str, str]] = []
        self._takes_uploads = takes_uploads
        # systemd's, which stays while the service is started again; its /tmp does not.
        parent = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
        super().__init__("service", parent, self._keeps)

    def _keeps(self, path: str) -> bool:
        notes = Path(path).glob(f"*/{_UPLOADS}")
        left = [upload for file in notes for upload in read_uploads(file)]
        if left and not self._takes_uploads:
            return True
        self.left_uploads += left
        return False


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
