# SPDX-License-Identifier: Apache-2.0
"""Journals of restores to libvirt: what each has made, so that a killed one's can be removed.

A journal is written before and after each step, and is locked while its restore lives. Whoever finds
one that nobody has locked knows that its restore was killed. The domain is the last thing that is
made: where it is, the restore is complete, and only the journal goes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from vmapipe.control.qmp.answers import NAME, SIZE, TEXT, Record
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.folders import HeldFolder, made_path
from vmapipe.runtime.text import one_line

_SUFFIX = ".libvirt-restore"
_DISK_SUFFIX = ".qcow2"
# 254 disks with the longest paths, twice.
_MOST_BYTES = 4 << 20
_HEAD = Record({"version": SIZE, "uri": TEXT, "name": NAME, "uuid": NAME, "archive": TEXT})
_VERSION = 1


class Made(NamedTuple):
    """A file of ours by its path and inode; in a pool, also a volume. An inode of 0: a block device."""

    path: str
    device: int
    inode: int
    pool: str = ""
    volume: str = ""

    @property
    def words(self) -> str:
        return f"the volume {self.volume} of the pool {self.pool}" if self.pool else self.path


def made_of(path: str, pool: str = "", volume: str = "") -> Made:
    """Return what is at a path. Raises OSError."""
    status = os.stat(path)
    if stat.S_ISBLK(status.st_mode):
        return Made(path, 0, 0, pool, volume)
    return Made(path, status.st_dev, status.st_ino, pool, volume)


_MADE = Record({"path": TEXT, "device": SIZE, "inode": SIZE, "pool": NAME, "volume": NAME})


class Told(NamedTuple):
    """What a journal tells. `planned`: a volume that may have been made just when its restore was killed."""

    uri: str
    name: str
    uuid: str
    archive: str
    made: tuple[Made, ...]
    planned: tuple[str, ...]


def state_folder() -> str:
    """Return where journals are: the XDG base directory for what has to outlive a process."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(base, "vmapipe")


class MadeJournal:
    """The journal of one restore, new or left by a killed one; locked. A context manager."""

    def __init__(self, folder: HeldFolder, name: str, fd: int) -> None:
        self._folder, self._name, self._fd = folder, name, fd
        self.path = os.path.join(folder.path, name)

    @classmethod
    def new(cls, uri: str, name: str, uuid: str, archive: str) -> MadeJournal:
        """Begin one. Raises Failure."""
        head = {"version": _VERSION, "uri": uri, "name": name, "uuid": uuid, "archive": archive}
        try:
            folder = made_path(state_folder())
            file_name = f"{name}-{uuid}{_SUFFIX}"
            fd = folder.open(file_name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Failure(
                f"cannot write a journal in {state_folder()}: {os_error_text(error)}"
            ) from error
        journal = cls(folder, file_name, fd)
        journal._append(head)
        return journal

    def __enter__(self) -> MadeJournal:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)
        self._folder.close()

    def plan(self, what: str) -> None:
        """A volume is about to be made, which only libvirt can undo."""
        self._append({"planned": what})

    def add(self, made: Made) -> None:
        """A file or a volume is there, or will be with the next step."""
        self._append({"made": made._asdict()})

    def _append(self, line: dict[str, Any]) -> None:
        """Bring it to the disk before returning. Raises Failure."""
        data = json.dumps(line).encode("utf-8", "surrogateescape") + b"\n"
        try:
            os.lseek(self._fd, 0, os.SEEK_END)
            os.write(self._fd, data)
            os.fsync(self._fd)
            self._folder.sync()
        except OSError as error:
            raise Failure(f"cannot write {self.path}: {os_error_text(error)}") from error

    def read(self) -> Told:
        """Raises Failure where it was not written by this program."""
        lines = os.pread(self._fd, _MOST_BYTES, 0).split(b"\n")[:-1]
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise Failure(f"{self.path} is not a journal of a restore: {error}") from error
        if not found or (fault := _HEAD.fault(found[0])) or found[0]["version"] != _VERSION:
            why = fault if found else " is empty"
            raise Failure(f"{self.path} is not a journal of a restore: it{why}")
        made, planned = [], []
        for line in found[1:]:
            if isinstance(line, dict) and isinstance(line.get("planned"), str):
                planned.append(line["planned"])
            elif isinstance(line, dict) and not _MADE.fault(line.get("made")):
                entry = line["made"]
                made.append(Made(**{key: entry[key] for key in Made._fields}))
            else:
                raise Failure(f"{self.path} is not a journal of a restore")
        head = found[0]
        done = {one.words for one in made}
        return Told(
            head["uri"],
            head["name"],
            head["uuid"],
            head["archive"],
            tuple(made),
            tuple(what for what in planned if what not in done),
        )

    def remove(self) -> None:
        """All is complete, or undone."""
        with contextlib.suppress(OSError):
            self._folder.remove(self._name, self._fd)


def abandoned() -> Iterator[MadeJournal]:
    """Yield the journals of restores that were killed, each locked; use each as a context manager."""
    try:
        folder = HeldFolder(state_folder())
    except OSError:
        return  # there has never been one
    with folder:
        for name in sorted(folder.names()):
            if not name.endswith(_SUFFIX):
                continue
            try:
                fd = folder.open(name, os.O_RDWR | os.O_NONBLOCK)
            except OSError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its restore may have ended, and removed it, between the two.
                if not folder.holds(name, fd):
                    raise BlockingIOError
            except OSError:
                os.close(fd)
                continue
            if not os.fstat(fd).st_size:
                # Killed before its first line: nothing was made.
                with contextlib.suppress(OSError):
                    folder.remove(name, fd)
                os.close(fd)
                continue
            yield MadeJournal(folder.duplicate(), name, fd)


def remove_file(made: Made) -> bool:
    """Remove a file if it is the one that was made; whether it was. Raises Failure."""
    place, name = os.path.split(made.path)
    try:
        with HeldFolder(place) as folder:
            status = folder.status(name)
            if status is None or (status.st_dev, status.st_ino) != (made.device, made.inode):
                return False
            if stat.S_ISDIR(status.st_mode):
                _remove_folder(folder, name)
            else:
                os.unlink(name, dir_fd=folder.fd)
            return True
    except FileNotFoundError:
        return False
    except OSError as error:
        raise Failure(f"cannot remove {made.path}: {os_error_text(error)}") from error


def _remove_folder(above: HeldFolder, name: str) -> None:
    """Remove a folder of ours, with all but disks: those are removed by themselves. Raises OSError."""
    with HeldFolder.of_descriptor(name, above.open(name, os.O_RDONLY | os.O_DIRECTORY)) as folder:
        for inner in folder.names():
            if not inner.endswith(_DISK_SUFFIX):
                os.unlink(inner, dir_fd=folder.fd)
    os.rmdir(name, dir_fd=above.fd)


def told_words(made: Sequence[Made]) -> str:
    return ", ".join(one_line(one.words, 300) for one in made) or "nothing"
