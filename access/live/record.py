# SPDX-License-Identifier: Apache-2.0
"""The note of a live restore in its folder: what a new process needs to go on after any crash."""

from __future__ import annotations

import fcntl
import json
import os
from typing import Any, NamedTuple

from vmapipe.access.live.moves import Noted
from vmapipe.access.live.nodes import LiveDisk
from vmapipe.control.qmp.answers import FLAG, NAME, SIZE, TEXT, List, Record, Whole
from vmapipe.runtime.errors import Failure, UsageError, os_error_text
from vmapipe.runtime.folders import HeldFolder

#: In the folder of the targets; it is gone when all is restored.
NOTE_NAME = "live-restore.json"
_NEW_NAME = "live-restore.json.new"
_LOCK_NAME = "live-restore.lock"
_VERSION = 1
# 254 disks, with two long paths each.
_MOST_BYTES = 4 << 20
_DISK = Record(
    {
        "dev_id": Whole(1),
        "name": NAME,
        "size_bytes": SIZE,
        "node": NAME,
        "below": List(NAME),
        "overlay": TEXT,
        "path": TEXT,
        "image_format": NAME,
        "is_block": FLAG,
        "limit_bytes": SIZE,
    }
)
_SHAPE = Record(
    {
        "version": SIZE,
        "archive": TEXT,
        "uuid": NAME,
        "qmp": TEXT,
        "socket": TEXT,
        "owned": FLAG,
        "prepared": FLAG,
        "held": FLAG,
        "moved": List(NAME),
        "disks": List(_DISK),
    }
)


class LiveNote(NamedTuple):
    """`archive` and its `uuid`; `qmp`: the machine's monitor; `socket`: the archive's server.

    `owned`: we have started the machine, on overlays of ours. `prepared`: the targets are there.
    """

    archive: str
    uuid: str
    qmp: str
    socket: str
    owned: bool
    disks: tuple[LiveDisk, ...]
    prepared: bool = False
    noted: Noted = Noted()


def read_members(folder: HeldFolder, name: str, shape: Record, version: int) -> Any:
    """Return what a note of a live restore says, checked.

    Raises FileNotFoundError, Failure; UsageError: it is of another version.
    """
    path = os.path.join(folder.path, name)
    try:
        with open(folder.open(name, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            found = json.loads(file.read(_MOST_BYTES))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise Failure(f"cannot read {path}: {error}") from error
    if fault := shape.fault(found):
        raise Failure(f"{path} is not a note of a live restore: it{fault}")
    if found["version"] != version:
        raise UsageError(f"{path} was written by another version of vmapipe")
    return found


class NoteFile:
    """The note's place; one process at a time uses it. A context manager."""

    def __init__(self, folder: HeldFolder) -> None:
        """Raises Failure where another process is at work there."""
        self._folder = folder
        self.path = os.path.join(folder.path, NOTE_NAME)
        try:
            while True:
                self._lock = folder.open(_LOCK_NAME, os.O_RDWR | os.O_CREAT)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if folder.holds(_LOCK_NAME, self._lock):
                    return
                os.close(self._lock)  # the one before us has just removed it
        except BlockingIOError:
            os.close(self._lock)
            raise Failure(f"another `vmapipe restore --live` is at work in {folder.path}") from None
        except OSError as error:
            raise Failure(f"cannot write in {folder.path}: {os_error_text(error)}") from error

    def __enter__(self) -> NoteFile:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            if self._folder.status(NOTE_NAME) is None:
                self._folder.remove(_LOCK_NAME, self._lock)
        finally:
            os.close(self._lock)

    def read(self) -> LiveNote | None:
        """None: there is none. Raises Failure, UsageError."""
        try:
            found = read_members(self._folder, NOTE_NAME, _SHAPE, _VERSION)
        except FileNotFoundError:
            return None
        disks = tuple(
            LiveDisk(**{**disk, "below": tuple(disk["below"])})
            for disk in ({key: disk[key] for key in LiveDisk._fields} for disk in found["disks"])
        )
        noted = Noted(frozenset(found["moved"]), found["held"])
        return LiveNote(
            found["archive"],
            found["uuid"],
            found["qmp"],
            found["socket"],
            found["owned"],
            disks,
            found["prepared"],
            noted,
        )

    def write(self, note: LiveNote) -> None:
        """Bring it to the disk before returning. Raises Failure."""
        noted = note.noted
        members = {
            "version": _VERSION,
            **note._asdict(),
            "disks": [disk._asdict() for disk in note.disks],
            "held": noted.held,
            "moved": sorted(noted.moved),
        }
        members.pop("noted")
        data = json.dumps(members, indent=1).encode("utf-8", "surrogateescape")
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            with open(self._folder.open(_NEW_NAME, flags), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._folder.replace(_NEW_NAME, NOTE_NAME)
            self._folder.sync()
        except OSError as error:
            raise Failure(f"cannot write {self.path}: {os_error_text(error)}") from error

    def remove(self) -> None:
        """All is restored, or nothing has begun. Raises Failure."""
        try:
            fd = self._folder.open(NOTE_NAME, os.O_RDONLY | os.O_NONBLOCK)
            try:
                self._folder.remove(NOTE_NAME, fd)
            finally:
                os.close(fd)
            self._folder.sync()
        except FileNotFoundError:
            return
        except OSError as error:
            raise Failure(f"cannot remove {self.path}: {os_error_text(error)}") from error
