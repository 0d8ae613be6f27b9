# SPDX-License-Identifier: Apache-2.0
"""Restores that can go on after they were interrupted: a journal, and files that are kept for that.

The journal says of which archive the restore is, where its disks go, and up to which place
of the archive all was written. It is a hint and no more: what lies before that place is
checked, against the manifest or the archive itself, before it is left as it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
from typing import Any

from vmapipe.restore.archive.errors import PlanError, TargetError
from vmapipe.restore.archive.reader import Archive
from vmapipe.restore.targets.files import Folders, NewFile
from vmapipe.restore.targets.plan import Kind, Plan
from vmapipe.runtime.errors import os_error_text
from vmapipe.runtime.folders import HeldFolder

NAME = ".vmapipe-resume"
#: The name of a new file until it is complete.
UNFINISHED = ".unfinished"
_FORMAT = 1
# 254 targets with the longest paths that there are.
_MAX_BYTES = 2 << 20
_MARK_DIGITS = 20

#: A file's device and inode.
Inode = tuple[int, int]


class Journal:
    """`mark`: the offset in the archive before which all was written once. A context manager.

    Locked while it is open, so that two restores do not go on with one; `begun`: targets
    were written to, so that it has to stay.
    """

    def __init__(self, folder: HeldFolder, archive: Archive, plan: Plan) -> None:
        """Raises TargetError, PlanError: it is of another restore, or in use."""
        self.path = os.path.join(folder.path, NAME)
        self.begun = False
        self.mark = 0
        self._folder = folder
        self._files: dict[int, Inode] = {}
        self._mark_at = 0
        self._noted = 0
        try:
            self._fd = folder.open(NAME, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise TargetError(f"cannot open {self.path}: {os_error_text(error)}") from error
        try:
            self._read(_opening(archive, plan))
        except OSError as error:
            os.close(self._fd)
            raise TargetError(f"cannot use {self.path}: {os_error_text(error)}") from error
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self.begun:
            self.remove()
        os.close(self._fd)

    def _read(self, opening: str) -> None:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise TargetError(f"{self.path} is not a journal of yours: remove it")
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TargetError(f"{self.path} is locked: another restore goes on there") from None
        lines = os.pread(self._fd, _MAX_BYTES, 0).decode("utf-8", "replace").split("\n")[:-1]
        if not lines:
            # New, or its maker was killed before anything else was made.
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{opening}\n".encode(), 0)
        elif lines[0] != opening:
            raise PlanError(
                f"{self.path} tells of another restore that was interrupted (another archive, or "
                "other targets): go on with that one, or remove it and what is called …"
                f"{UNFINISHED}"
            )
        else:
            self.begun = True
            self._files = _files(lines[1]) if len(lines) > 1 else {}
            if len(lines) > 2 and lines[2].isdecimal() and len(lines[2]) == _MARK_DIGITS:
                self.mark = int(lines[2])
        self._opening = opening

    def inode(self, dev_id: int) -> Inode | None:
        """Return the inode of the new file that the interrupted restore had for a device."""
        return self._files.get(dev_id)

    def opened(self, files: dict[int, Inode]) -> None:
        """Note the new files, so that they are known again. All targets are open. Raises TargetError."""
        second = json.dumps({str(dev_id): list(inode) for dev_id, inode in files.items()})
        if self._files != files:
            # Without these files nothing is there that could be believed.
            self.mark = 0
        self._noted = self.mark
        text = f"{self._opening}\n{second}\n"
        self._mark_at = len(text.encode())
        try:
            os.pwrite(self._fd, f"{text}{self.mark:0{_MARK_DIGITS}}\n".encode(), 0)
            os.ftruncate(self._fd, self._mark_at + _MARK_DIGITS + 1)
        except OSError as error:
            raise TargetError(f"cannot write {self.path}: {os_error_text(error)}") from error

    def note(self, mark: int) -> None:
        """Note that all before this offset of the archive was written. Errors are ignored."""
        if mark > self._noted:
            self._noted = mark
            with contextlib.suppress(OSError):
                os.pwrite(self._fd, f"{mark:0{_MARK_DIGITS}}\n".encode(), self._mark_at)

    def remove(self) -> None:
        """Remove the journal: all is complete, or nothing was begun."""
        with contextlib.suppress(OSError):
            self._folder.remove(NAME, self._fd)


def _opening(archive: Archive, plan: Plan) -> str:
    """The journal's first line: equal for the same archive and the same targets."""
    targets: dict[str, Any] = {}
    for dev_id, spec in sorted(plan.targets.items()):
        identity = [] if spec.kind is Kind.NEW else _identity(spec.path)
        path = os.path.abspath(spec.path)
        targets[str(dev_id)] = [path, spec.kind.value, spec.image_format, identity]
    return json.dumps(
        {
            "vmapipe-resume": _FORMAT,
            "uuid": archive.header.uuid.hex(),
            "header": hashlib.sha256(archive.raw_header).hexdigest(),
            "targets": targets,
        }
    )


def _identity(path: str) -> list[int]:
    """Return what identifies an existing target; one that is not there is refused when it is opened."""
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [status.st_dev, status.st_ino, status.st_rdev]


def _files(line: str) -> dict[int, Inode]:
    """Parse the second line; empty where it is damaged: the files are then written anew."""
    files: dict[int, Inode] = {}
    try:
        told = json.loads(line)
        for dev_id, inode in told.items():
            device, number = inode
            files[int(dev_id)] = (int(device), int(number))
    except (ValueError, TypeError, AttributeError):
        return {}
    return files


class ResumableFile(NewFile):
    """A new file that has a name of its own, NAME.unfinished, until it is published.

    It stays where the restore fails. `has_old_data`: an interrupted one has written to it.
    """

    def __init__(self, path: str, folders: Folders, journal: Journal, known: Inode | None) -> None:
        """`known`: the file of the interrupted restore. Raises TargetError."""
        self.path = path
        self.partial = ""
        self._published = False
        self._journal = journal
        try:
            self.folder, self._name = folders.of(path)
            self._unfinished = self._name + UNFINISHED
            self.fd = self._opened(known)
        except OSError as error:
            raise TargetError(f"cannot create {path}: {os_error_text(error)}") from error

    def _opened(self, known: Inode | None) -> int:
        there = self.folder.status(self._name)
        if there is not None and known != (there.st_dev, there.st_ino):
            raise TargetError(f"{self.path} exists already and is not overwritten")
        # Killed after it was published, and before all others were.
        self._published = there is not None
        name = self._name if self._published else self._unfinished
        self._is_new = self.folder.status(name) is None
        if not self._is_new and not self._journal.begun:
            raise TargetError(
                f"{self.path}{UNFINISHED} exists, and no journal ({self._journal.path}) tells "
                "whose it is: remove it"
            )
        flags = os.O_RDWR if self._published else os.O_RDWR | os.O_CREAT
        fd = self.folder.open(name, flags | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                raise TargetError(f"{self.path}{UNFINISHED} is not a file of yours: remove it")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise TargetError(f"{self.path} is being written by another restore") from None
        except BaseException:
            os.close(fd)
            raise
        self.has_old_data = status.st_size > 0
        return fd

    @property
    def inode(self) -> Inode:
        status = os.fstat(self.fd)
        return status.st_dev, status.st_ino

    def _give_name(self) -> None:
        if not self._published:
            if not self.folder.holds(self._unfinished, self.fd):
                raise OSError(errno.ESTALE, "it was replaced by another program")
            self.folder.rename_new(self._unfinished, self._name)
        elif self.folder.holds(self._unfinished, self.fd):
            # Killed between its two names.
            self.folder.remove(self._unfinished, self.fd)

    def withdraw(self) -> None:
        """Give it its unfinished name back: it is complete, and the others may be soon."""
        if self._published:
            with contextlib.suppress(OSError):
                self.folder.rename_new(self._name, self._unfinished)
            self._published = False

    def close(self) -> None:
        """Close it; remove it only if nothing was written."""
        if self.fd >= 0:
            if self._is_new and not self._journal.begun:
                with contextlib.suppress(OSError):
                    self.folder.remove(self._unfinished, self.fd)
            os.close(self.fd)
            self.fd = -1
