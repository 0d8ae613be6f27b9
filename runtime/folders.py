# SPDX-License-Identifier: Apache-2.0
"""Folders for sockets: locked as long as they are used; those of killed processes are removed.

The kernel gives a lock back however a process ends, so that whoever makes the
next folder of the same kind can tell which ones are left over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator

from vmapipe.runtime.errors import Failure
from vmapipe.runtime.heldfolder import HeldFolder

# sun_path has 108 bytes with its NUL.
MAX_SOCKET_PATH_BYTES = 107
# The longest of ours below the folder for them: a kind, mkdtemp's eight letters, a socket.
_LONGEST_BELOW = len("/vmapipe-storage-12345678/daemon.sock")
_SHORT_FOLDER = "/tmp"  # where every Linux program may make things, and short


def folder_for_sockets(wanted: str = "") -> str:
    """Where folders with sockets in them are made: `wanted`, TMPDIR, or /tmp.

    /tmp where a socket's path would be too long, or where another user could put something else in
    the place of such a folder. Raises Failure.
    """
    unsafe = ""
    for place in filter(None, (wanted, temporary_folder(_LONGEST_BELOW), _SHORT_FOLDER)):
        try:
            with HeldFolder(place) as folder:
                changer = folder.changeable_by_others()
        except OSError:
            changer = ""  # making the folder will tell why
        if not changer:
            return place
        unsafe = unsafe or changer
    raise Failure(
        f"no safe place for sockets: other users can rename what is in {unsafe}, and in "
        f"{_SHORT_FOLDER}; set TMPDIR to a folder where only root and this user can"
    )


def temporary_folder(longest_below: int = 0) -> str:
    """TMPDIR, or /tmp: also where a socket's path, of so many characters below it, would be too long.

    Not tempfile's, which makes a file there to see whether it can.
    """
    chosen = os.path.abspath(os.environ.get("TMPDIR") or _SHORT_FOLDER)
    too_long = longest_below and len(os.fsencode(chosen)) > MAX_SOCKET_PATH_BYTES - longest_below
    usable = os.path.isdir(chosen) and os.access(chosen, os.W_OK | os.X_OK)
    return chosen if usable and not too_long else _SHORT_FOLDER


@contextlib.contextmanager
def made_with(mode: int) -> Iterator[None]:
    """What is made meanwhile has at most these permissions, from its first moment on.

    A chmod afterwards would come late. The whole process has one such mask.
    """
    before = os.umask(0o777 & ~mode)
    try:
        yield
    finally:
        os.umask(before)


class OwnFolder:
    """Only its owner can enter it. `kind` is a part of its name, `parent` where it is made.

    Keep kinds, and names of sockets in it, short: a socket's path has at most 107 bytes,
    and most of them may be the path of TMPDIR.

    A folder that a killed process has left is removed, unless `keeps` says of its path
    that it is still needed.
    Use it in a `with`, or call `remove`.
    """

    def __init__(
        self, kind: str, parent: str = "", keeps: Callable[[str], bool] = lambda path: False
    ) -> None:
        parent, prefix = folder_for_sockets(parent), f"vmapipe-{kind}-"
        _remove_leftovers(parent, prefix, keeps)
        while True:
            self.path = tempfile.mkdtemp(prefix=prefix, dir=parent)
            try:
                self._fd = _open(self.path)
            except FileNotFoundError:
                # Another process took it for a leftover, in the moment before the lock.
                continue
            # Where nothing can be locked nobody can tell a leftover, and none is removed.
            with contextlib.suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_EX)
            if os.path.exists(self.path):
                return
            # The same, a moment later.
            os.close(self._fd)

    def __enter__(self) -> OwnFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def clear(self) -> None:
        """It is needed no more; whoever kills us now leaves nothing."""
        _remove(self.path)

    def remove(self) -> None:
        self.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _remove(path: str) -> None:
    # Nobody else can lead this path elsewhere: see `folder_for_sockets`.
    shutil.rmtree(path, ignore_errors=True)


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _remove_leftovers(parent: str, prefix: str, keeps: Callable[[str], bool]) -> None:
    # A folder that cannot be listed can still take ours.
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for path in [entry.path for entry in entries if entry.name.startswith(prefix)]:
            # Somebody else's, one in use, or gone just now: not ours to remove.
            with contextlib.suppress(OSError):
                fd = _open(path)
                try:
                    if os.fstat(fd).st_uid == os.geteuid():
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        if not keeps(path):
                            _remove(path)
                finally:
                    os.close(fd)
