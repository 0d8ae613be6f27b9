# SPDX-License-Identifier: Apache-2.0
"""The folder with the sockets of one backup's sinks: made, given to QEMU, found again, removed.

Only we can make or remove names in it; QEMU, if it is another user's, may pass through it
and connect. TMPDIR may be a folder that QEMU's user can change (confined QEMUs reach
nothing else): so the folder is held open, and nothing is done by its path.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.folders import HeldFolder, made_with, temporary_folder
from vmapipe.runtime.syscalls import write_at

#: In it: what QEMU writes the machine's memory to.
STREAM_NAME = "memory.fifo"
#: In it, for a moment: a sample of a disk's clusters, which QEMU reads.
IMAGE_NAME = "sample.qcow2"
#: In it, for the moment of the instant: what QEMU reads of a TPM.
TPM_STATE_NAME = "tpm.state"
_PREFIX = "vmapipe-sinks-"
# As tempfile's names, which those of earlier versions were.
_FOLDER = re.compile(re.escape(_PREFIX) + r"[a-z0-9_]{8}")
_SINK = re.compile(r"(?:0|[1-9][0-9]{0,2})\.sock")
# Producers, and after a crash QEMU's connections, come one by one.
_BACKLOG = 128
# In it, QEMU's own: where QEMU makes a socket for a moment (see vmstate_commands.activate_disks).
_QEMUS = "qemu"
# QEMU's user passes through; what is in it is told by no list.
_PASS_THROUGH = 0o711
# The longest path of a socket below TMPDIR.
_LONGEST_BELOW = len(f"/{_PREFIX}12345678/{_QEMUS}/activate.sock")


class SinkFolder:
    """A folder of ours, held open."""

    def __init__(self, above: HeldFolder, folder: HeldFolder) -> None:
        """Both are this object's now. Use `make` or `find`."""
        self._above = above
        self._folder = folder
        # Another user's QEMU.
        self._qemus_uid: int | None = None

    @classmethod
    def make(cls) -> SinkFolder:
        """Make a new one in TMPDIR. Raises Failure."""
        place = temporary_folder(_LONGEST_BELOW)
        try:
            above = HeldFolder(place)
            try:
                folder = above.make_folder(f"{_PREFIX}{secrets.token_hex(4)}")
                folder.make_folder(_QEMUS).close()
            except BaseException:
                above.close()
                raise
        except OSError as error:
            raise Failure(
                f"cannot make a folder for sockets in {place}: {os_error_text(error)}"
            ) from error
        return cls(above, folder)

    @classmethod
    def find(cls, path: str, *, make: bool = False) -> SinkFolder | None:
        """Open the one at a path that QEMU reports; None: there is none of ours.

        `make`: one that is gone is made again, but only in our own TMPDIR.
        """
        place, name = os.path.split(path)
        if not _FOLDER.fullmatch(name) or os.path.normpath(path) != path:
            return None
        try:
            above = HeldFolder(place)
        except OSError:
            return None
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(above.close)
            if make and place == temporary_folder(_LONGEST_BELOW):
                with contextlib.suppress(FileExistsError):
                    above.make_folder(name).close()
            folder = above.folder(name)
            stack.callback(folder.close)
            status = os.fstat(folder.fd)
            # No other user can have made what is in it.
            if status.st_uid == os.geteuid() and not status.st_mode & 0o022:
                stack.pop_all()
                return cls(above, folder)
        return None

    @property
    def path(self) -> str:
        """The path, for QEMU and messages; our own work is done by descriptor."""
        return self._folder.path

    def listen(self, name: str) -> socket.socket:
        """Listen on a socket of this name, `0.sock`, `1.sock` …, in place of a left-over.

        Raises Failure.
        """
        if not _SINK.fullmatch(name):
            raise Failure(f"{name!r} is not a sink's name")
        listener = socket.socket(socket.AF_UNIX)
        try:
            owner = self._remove(name)
            with made_with(0o600):
                listener.bind(self._folder.address(name))
            listener.listen(_BACKLOG)
            if owner is not None and owner != os.geteuid():
                self._give(name, owner)
        except OSError as error:
            listener.close()
            where = os.path.join(self.path, name)
            raise Failure(f"cannot listen on {where}: {os_error_text(error)}") from error
        return listener

    def make_stream(self) -> tuple[int, int]:
        """A pipe for the memory: QEMU's end, and the reader's. Raises OSError.

        QEMU gets an end that reads as well as it writes: the stream cannot break,
        whatever dies; at worst it stands still until it is read again.
        """
        os.mkfifo(STREAM_NAME, 0o600, dir_fd=self._folder.fd)
        qemu_fd = self._folder.open(STREAM_NAME, os.O_RDWR)
        return qemu_fd, self._folder.open(STREAM_NAME, os.O_RDONLY)

    @contextlib.contextmanager
    def image(self, pieces: Iterable[tuple[int, bytes]]) -> Iterator[tuple[str, int]]:
        """A file of these pieces (offset, bytes) that QEMU can open meanwhile: path and descriptor.

        Raises OSError.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(IMAGE_NAME, flags, 0o600, dir_fd=self._folder.fd)
        try:
            for offset, data in pieces:
                write_at(fd, memoryview(data), offset)
            if self._qemus_uid is not None:
                os.fchown(fd, self._qemus_uid, -1)
            yield os.path.join(self.path, IMAGE_NAME), fd
        finally:
            os.close(fd)
            os.unlink(IMAGE_NAME, dir_fd=self._folder.fd)

    def lend(self, name: str, data: bytes, uid: int) -> str:
        """Make a file that QEMU's user may read; return its path. Raises Failure."""
        try:
            fd = self._folder.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(fd, "wb") as file:
                file.write(data)
            if uid != os.geteuid() == 0:
                self._give(name, uid)
        except OSError as error:
            where = os.path.join(self.path, name)
            raise Failure(f"cannot write {where}: {os_error_text(error)}") from error
        return os.path.join(self.path, name)

    def qemus_socket(self) -> str:
        """A path at which QEMU may make a socket of its own."""
        return os.path.join(self.path, _QEMUS, "activate.sock")

    def open_stream(self) -> int | None:
        """The reading end of the pipe that a crashed backup has left; None: there is none."""
        return open_stream(STREAM_NAME, self._folder.fd)

    def give_to(self, uid: int) -> None:
        """QEMU's user may connect to all sinks, and pass through to them. Raises OSError.

        The sockets first: until the folder's own mode changes no other user can enter, so that a name
        cannot be another file by the time it is given away. The folder stays ours: its owner could
        put something else in the place of its names later.
        """
        for name in self._folder.names():
            if _SINK.fullmatch(name) or name == _QEMUS:
                self._give(name, uid)
        os.fchmod(self._folder.fd, _PASS_THROUGH)
        self._qemus_uid = uid

    def address(self, name: str) -> str:
        """The path to connect to in this process."""
        return self._folder.address(name)

    def sinks(self) -> list[str]:
        """The path to connect to, in this process."""
        try:
            names = self._folder.names()
        except OSError:
            return []
        return [self._folder.address(name) for name in names if _SINK.fullmatch(name)]

    def remove_names(self, *names: str) -> None:
        """Remove these, as far as they are sockets or the pipe, and what was lent; and the folder, if
        nothing else is in it.
        """
        for name in (*names, TPM_STATE_NAME):
            with contextlib.suppress(OSError):
                self._remove(name)
        # QEMU's own folder holds what its user made: only names in it go.
        with contextlib.suppress(OSError):
            if self._folder.names() == [_QEMUS]:
                with self._folder.folder(_QEMUS) as qemus:
                    for name in qemus.names():
                        os.unlink(name, dir_fd=qemus.fd)
                    self._folder.remove_folder(_QEMUS, qemus)
        with contextlib.suppress(OSError):
            self._above.remove_folder(os.path.basename(self.path), self._folder)

    def remove(self) -> None:
        """Remove it, and what is in it. Never raises."""
        with contextlib.suppress(OSError):
            names = self._folder.names()
            self.remove_names(
                *(n for n in names if _SINK.fullmatch(n) or n in (STREAM_NAME, IMAGE_NAME))
            )

    def close(self) -> None:
        """Close it; what is there stays."""
        self._folder.close()
        self._above.close()

    def _give(self, name: str, uid: int) -> None:
        os.chown(name, uid, -1, dir_fd=self._folder.fd, follow_symlinks=False)

    def _remove(self, name: str) -> int | None:
        """Remove a name; return its owner, None: it was not there.

        Raises OSError for other kinds of files.
        """
        status = self._folder.status(name)
        if status is None:
            return None
        is_pipe = stat.S_ISFIFO(status.st_mode) and status.st_uid == os.geteuid()
        is_lent = name in (TPM_STATE_NAME, IMAGE_NAME) and stat.S_ISREG(status.st_mode)
        if not (stat.S_ISSOCK(status.st_mode) or is_pipe or is_lent):
            raise FileExistsError(errno.EEXIST, "it exists, and is not a socket", name)
        os.unlink(name, dir_fd=self._folder.fd)
        return status.st_uid


class SinkName(NamedTuple):
    """The folder and name of a sink's socket."""

    folder: str
    name: str


def sink_name(path: str) -> SinkName | None:
    """Split the path of a sink's socket; None: not the shape of one of ours."""
    folder, name = os.path.split(path)
    fits = path.startswith("/") and _FOLDER.fullmatch(os.path.basename(folder))
    return SinkName(folder, name) if fits and _SINK.fullmatch(name) else None


def open_stream(path: str, folder_fd: int | None = None) -> int | None:
    """Open a pipe of our own uid for reading; None: the path is not one.

    What QEMU reports as ours, or has open, may be another user's pipe, which must not be read here.
    """
    # Not waiting for a writer; reads wait again.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    if folder_fd is not None:
        flags |= os.O_NOFOLLOW
    try:
        # A pipe is looked at before it is opened for reading, which its writers notice.
        looked = os.stat(path, dir_fd=folder_fd, follow_symlinks=folder_fd is None)
        if not (stat.S_ISFIFO(looked.st_mode) and looked.st_uid == os.geteuid()):
            return None
        fd = os.open(path, flags, dir_fd=folder_fd)
    except OSError:
        return None
    if not os.path.samestat(looked, os.fstat(fd)):
        os.close(fd)
        return None
    os.set_blocking(fd, True)
    return fd
