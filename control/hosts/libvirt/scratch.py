# SPDX-License-Identifier: Apache-2.0
"""The folder with one backup's scratch files, in which QEMU keeps old data: made, watched, removed.

libvirt makes the files, as QEMU's user, while we hold the folder open: nothing is done by its path,
as QEMU's user may change names in it. The lock on it tells that its backup is alive.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator

from vmapipe.control.hosts.libvirt.backup_xml import FOLDER
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.folders import HeldFolder

#: Where scratch files are made if nobody says where: not in memory, unlike /tmp on many hosts.
DEFAULT_PLACE = "/var/tmp"
#: What stays free on the file system: a guest that writes 1 GiB/s needs a quarter of a second for it,
#: and the backup is ended within that.
RESERVE_BYTES = 256 << 20
# One for each disk, and the socket; QEMU's user could make any number.
_MOST_FILES = 256
# Where a guest that stayed frozen is noted.
_FROZEN = "frozen"


class ScratchFolder:
    """A folder of ours, held open and locked."""

    def __init__(self, above: HeldFolder, folder: HeldFolder) -> None:
        """Both are this object's now. Use `make` or `find`."""
        self._above = above
        self._folder = folder
        self.run = folder.path[-8:]
        # The files that were seen, by name and inode: QEMU goes on writing to one that somebody removes.
        self._held: dict[tuple[str, int], int] = {}

    @classmethod
    def make(cls, place: str, uuid: str, owner: int) -> ScratchFolder:
        """Make one in `place` for the domain with this uuid; `owner`: QEMU's user. Raises Failure."""
        name = f"vmapipe-scratch-{uuid.replace('-', '')}-{secrets.token_hex(4)}"
        try:
            above = HeldFolder(os.path.abspath(place))
        except OSError as error:
            raise Failure(f"--scratch {place}: {os_error_text(error)}") from error
        try:
            folder = above.make_folder(name)
            try:
                fcntl.flock(folder.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if owner != os.geteuid() == 0:
                    os.fchown(folder.fd, owner, -1)
            except OSError:
                with contextlib.suppress(OSError):
                    above.remove_folder(name, folder)
                folder.close()
                raise
        except OSError as error:
            above.close()
            raise Failure(
                f"--scratch {place}: cannot make a folder for scratch files: {os_error_text(error)}"
            ) from error
        return cls(above, folder)

    @classmethod
    def find(cls, path: str) -> ScratchFolder | None:
        """Open and lock one that a crashed backup has left; None: there is none, or it is in use."""
        place, name = os.path.split(path)
        if not FOLDER.fullmatch(name):
            return None
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            above = stack.enter_context(HeldFolder(place))
            folder = stack.enter_context(above.folder(name))
            fcntl.flock(folder.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stack.pop_all()
            return cls(above, folder)
        return None

    @property
    def path(self) -> str:
        return self._folder.path

    def file(self, target: str) -> str:
        """Return the path of a disk's scratch file, for libvirt."""
        return os.path.join(self.path, f"{target}.qcow2")

    @property
    def socket(self) -> str:
        """Return the path of the socket, where QEMU has no better place for it."""
        return os.path.join(self.path, "nbd.sock")

    def used_bytes(self) -> int:
        """Return what the scratch files take on the disk, also those that somebody has removed since."""
        for name in self._names():
            with contextlib.suppress(OSError):
                status = self._folder.status(name)
                if status and stat.S_ISREG(status.st_mode):
                    self._hold(name, status.st_ino)
        return sum(os.fstat(fd).st_blocks * 512 for fd in self._held.values())

    def _hold(self, name: str, inode: int) -> None:
        """Raises OSError."""
        if (name, inode) in self._held or len(self._held) >= _MOST_FILES:
            return
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, dir_fd=self._folder.fd)
        self._held[name, os.fstat(fd).st_ino] = fd

    def free_bytes(self) -> int:
        """Return what is free on their file system, for QEMU's user."""
        status = os.fstatvfs(self._folder.fd)
        return status.f_bavail * status.f_frsize

    def store(self, name: str, data: bytes) -> str:
        """Make a file of our own in it; return its path. Raises OSError."""
        fd = self._folder.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        with open(fd, "wb") as file:
            file.write(data)
        return os.path.join(self.path, name)

    @property
    def is_frozen(self) -> bool:
        """Tell whether the guest was being frozen, and nobody has noted that it was thawed."""
        return _FROZEN in self._names()

    def note_frozen(self, is_frozen: bool) -> None:
        """Note that the guest is about to be frozen, or is thawed. Raises OSError."""
        if is_frozen:
            self.store(_FROZEN, b"")
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(_FROZEN, dir_fd=self._folder.fd)

    def remove(self) -> str:
        """Remove it with its files; return what could not be done, empty: nothing. Closes it."""
        try:
            for name in self._folder.names():
                status = self._folder.status(name)
                if status and (stat.S_ISREG(status.st_mode) or stat.S_ISSOCK(status.st_mode)):
                    os.unlink(name, dir_fd=self._folder.fd)
            self._above.remove_folder(os.path.basename(self.path), self._folder)
        except OSError as error:
            return f"{self.path} stays: {os_error_text(error)}"
        finally:
            self.close()
        return ""

    def close(self) -> None:
        """Close it; what is there stays."""
        while self._held:
            os.close(self._held.popitem()[1])
        self._folder.close()
        self._above.close()

    def _names(self) -> list[str]:
        try:
            return self._folder.names()
        except OSError:
            return []


def left_folders(place: str, uuid: str) -> Iterator[str]:
    """The paths of scratch folders of this domain in `place`."""
    with contextlib.suppress(OSError):
        for name in os.listdir(place):
            match = FOLDER.fullmatch(name)
            if match and match[1] == uuid.replace("-", ""):
                yield os.path.join(os.path.abspath(place), name)
