# SPDX-License-Identifier: Apache-2.0
"""Folders held open by descriptor, and temporary folders for sockets.

Another user who may rename things in a folder above can put a link in the place of ours
between two of our steps. So a HeldFolder is opened once, and everything below it is named
relative to that descriptor, without ever following a link.

Folders for sockets are locked as long as they are used. The kernel gives a lock back however
a process ends, so the next process that makes such a folder can tell which ones are left over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator

from vmapipe.runtime.errors import Failure
from vmapipe.runtime.syscalls import (
    rename_noreplace,
)

# What is made here holds all that a machine knows: not for other users.
_MODE = 0o600
_FOLDER_MODE = 0o700
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# What a file system says that has no hard links, and one that cannot rename in that way.
NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_NO_NOREPLACE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
# Each turn means that another process took a file of ours for a leftover in the moment
# before its lock. So often in a row it is no chance any more.
_TRIES = 100


class HeldFolder:
    """A folder by its descriptor, `fd`; `path` is for messages. A context manager.

    A `name` is a single component: no slash, not `.` or `..`. Every method raises OSError.
    """

    def __init__(self, path: str) -> None:
        """Links in `path` are followed, this once: it is the user's word."""
        self.path = path or "."
        try:
            self.fd = os.open(self.path, _FOLDER)
        except PermissionError:
            # One that may not be listed, in which things may be made all the same.
            self.fd = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    @classmethod
    def of_descriptor(cls, path: str, fd: int) -> HeldFolder:
        """The folder that `fd` has open, which is now this object's."""
        folder = cls.__new__(cls)
        folder.path, folder.fd = path, fd
        return folder

    def __enter__(self) -> HeldFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def duplicate(self) -> HeldFolder:
        """Return the same folder with a descriptor of its own."""
        return self.of_descriptor(self.path, fcntl.fcntl(self.fd, fcntl.F_DUPFD_CLOEXEC, 0))

    # --- What is in it ---

    def names(self) -> list[str]:
        return os.listdir(self.fd)

    def status(self, name: str) -> os.stat_result | None:
        """Return the status of the name itself, also of a link; None: there is no such name."""
        try:
            return os.stat(_checked(name), dir_fd=self.fd, follow_symlinks=False)
        except OSError as error:
            # No file can have a name that is too long for one.
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
                return None
            raise

    def holds(self, name: str, fd: int) -> bool:
        """Return whether `name` is the file that `fd` has open."""
        status = self.status(name)
        return status is not None and os.path.samestat(status, os.fstat(fd))

    def address(self, name: str) -> str:
        """Return the address of a Unix socket in it, valid in this process while the folder is open."""
        if self.changeable_by_others():
            return f"/proc/self/fd/{self.fd}/{_checked(name)}"
        # It cannot be led elsewhere, and it is what users are shown.
        return os.path.join(self.path, _checked(name))

    # --- Opening and making ---

    def open(self, name: str, flags: int, mode: int = _MODE) -> int:
        """A descriptor; a link is never followed (ELOOP)."""
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(_checked(name), flags, mode, dir_fd=self.fd)

    def folder(self, name: str) -> HeldFolder:
        """A folder in it, which must not be a link."""
        return self.of_descriptor(os.path.join(self.path, name), self.open(name, _FOLDER))

    def make_folder(self, name: str, mode: int = _FOLDER_MODE) -> HeldFolder:
        """Make a folder in it, which no other user can have replaced: else ESTALE."""
        os.mkdir(_checked(name), mode, dir_fd=self.fd)
        made = self.folder(name)
        status = os.fstat(made.fd)
        if status.st_uid != os.geteuid() or made.names():
            made.close()
            raise _os_error(errno.ESTALE)
        return made

    def make_unnamed(self, mode: int = _MODE) -> int:
        """Make a file without a name; return its descriptor. OSError where that is not possible."""
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode, dir_fd=self.fd)

    def make_locked(self, prefix: str, suffix: str, mode: int = _MODE) -> tuple[str, int]:
        """(name, descriptor) of a new file that is locked (flock) while anybody has it open.

        So `remove_leftovers` can tell it from what a killed process has left.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        for _ in range(_TRIES):
            name = f"{prefix}{os.urandom(8).hex()}{suffix}"
            fd = self.open(name, flags, mode)
            # Where files cannot be locked, leftovers cannot be told apart, and none is removed.
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.holds(name, fd):
                return name, fd
            os.close(fd)
        raise _os_error(errno.EAGAIN)

    def remove_leftovers(self, prefix: str, suffix: str) -> list[str]:
        """Remove files of this pattern that are ours and not locked; return their names."""
        removed = []
        for name in self.names():
            if not (name.startswith(prefix) and name.endswith(suffix)):
                continue
            # It belongs to another user, is in use, or is gone just now: not ours to remove.
            with contextlib.suppress(OSError):
                fd = self.open(name, os.O_RDWR | os.O_NONBLOCK)
                try:
                    status = os.fstat(fd)
                    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        if self.remove(name, fd):
                            removed.append(name)
                finally:
                    os.close(fd)
        return removed

    # --- Naming and removing ---

    def name_unnamed(self, fd: int, name: str) -> None:
        """Give a file without a name one, which must be free (FileExistsError)."""
        # With a folder's descriptor Python calls linkat, which follows /proc's symlink.
        os.link(f"/proc/self/fd/{fd}", _checked(name), dst_dir_fd=self.fd)

    def rename_new(self, old: str, new: str) -> None:
        """Rename within the folder; `new` must be free (FileExistsError)."""
        _checked(old)
        try:
            os.link(
                old,
                _checked(new),
                src_dir_fd=self.fd,
                dst_dir_fd=self.fd,
                follow_symlinks=False,
            )
            os.unlink(old, dir_fd=self.fd)
            return
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
        try:
            rename_noreplace(old, new, self.fd)
            return
        except OSError as error:
            if error.errno not in _NO_NOREPLACE:
                raise
        # Neither links nor a safe rename (FAT): look, then rename.
        if self.status(new) is not None:
            raise _os_error(errno.EEXIST)
        os.rename(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def replace(self, old: str, new: str) -> None:
        """Rename within the folder; a file `new` is replaced in one step."""
        os.replace(_checked(old), _checked(new), src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def remove(self, name: str, fd: int) -> bool:
        """Unlink `name` if it is the file that `fd` has open; whether it was."""
        if not self.holds(name, fd):
            return False
        os.unlink(name, dir_fd=self.fd)
        return True

    def remove_folder(self, name: str, folder: HeldFolder) -> bool:
        """Remove the empty folder `name` if it is the one that `folder` holds; whether it was."""
        if not self.holds(name, folder.fd):
            return False
        os.rmdir(name, dir_fd=self.fd)
        return True

    def sync(self) -> None:
        """Bring the names in it to the disk."""
        try:
            os.fsync(self.fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that has nothing to do there
                raise

    # --- Who else ---

    def changeable_by_others(self) -> str:
        """A folder on the way to this one, or it, in which another user can rename; else empty."""
        for path, status in self._way():
            foreign = status.st_uid not in (0, os.geteuid())
            open_to_all = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
            if foreign or open_to_all:
                return path
        return ""

    def _way(self) -> Iterator[tuple[str, os.stat_result]]:
        """The folder, those that really are above it, and those that its path names."""
        path = os.path.abspath(self.path)
        fd = os.dup(self.fd)
        try:
            here = os.fstat(fd)
            name = os.path.realpath(path)
            while True:
                yield name, here
                # O_PATH: to walk through a folder one need not be able to list it.
                above = os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
                os.close(fd)
                fd, below = above, here
                here, name = os.fstat(fd), os.path.dirname(name)
                if os.path.samestat(here, below):
                    break
        finally:
            os.close(fd)
        while path != "/":
            path = os.path.dirname(path)
            with contextlib.suppress(OSError):
                yield path, os.stat(path)


class MadeFolder:
    """A new folder, its owner's alone, as a context manager: what it gives is a `HeldFolder`.

    Where an error ends it, the folder is removed again, if nothing came into it.
    """

    def __init__(self, path: str) -> None:
        """Raises OSError: FileExistsError where anything has the name."""
        place, self._name = os.path.split(path.rstrip("/"))
        if self._name in ("", ".", ".."):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        self._above = HeldFolder(place)
        try:
            self._folder = self._above.make_folder(self._name)
        except BaseException:
            self._above.close()
            raise
        # The word that the paths of what is in it begin with.
        self._folder.path = path

    def __enter__(self) -> HeldFolder:
        return self._folder

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is not None:
            with contextlib.suppress(OSError):
                self._above.remove_folder(self._name, self._folder)
        self._folder.close()
        self._above.close()


def made_path(path: str) -> HeldFolder:
    """Open a folder; what is missing of its path is made, for its owner alone. Raises OSError."""
    try:
        return HeldFolder(path)
    except FileNotFoundError:
        place, name = os.path.split(path.rstrip("/"))
        if not name:
            raise
    with made_path(place or ".") as above:
        try:
            return above.make_folder(name)
        except FileExistsError:  # another process was quicker
            return above.folder(name)


def _checked(name: str) -> str:
    if name in ("", ".", "..") or "/" in name:
        raise OSError(errno.EINVAL, "not a name in a folder", name)
    return name


def _os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


# sun_path has 108 bytes with its NUL.
MAX_SOCKET_PATH_BYTES = 107
# The longest of ours below the folder for them: a kind, mkdtemp's eight letters, a socket.
_LONGEST_BELOW = len("/vmapipe-storage-12345678/daemon.sock")
_SHORT_FOLDER = "/tmp"  # where every Linux program may make things, and short


def folder_for_sockets(wanted: str = "") -> str:
    """Return where folders for sockets are made: `wanted`, TMPDIR, or /tmp.

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
    """Give all that is made meanwhile at most these permissions, from its first moment on.

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
            # Where files cannot be locked, leftovers cannot be told apart, and none is removed.
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
        """Remove it: if we are killed now, nothing is left."""
        _remove(self.path)

    def remove(self) -> None:
        self.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _remove(path: str) -> None:
    # No other user can lead this path elsewhere: see `folder_for_sockets`.
    shutil.rmtree(path, ignore_errors=True)


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _remove_leftovers(parent: str, prefix: str, keeps: Callable[[str], bool]) -> None:
    # A folder that cannot be listed can still take ours.
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for path in [entry.path for entry in entries if entry.name.startswith(prefix)]:
            # It belongs to another user, is in use, or is gone just now: not ours to remove.
            with contextlib.suppress(OSError):
                fd = _open(path)
                try:
                    if os.fstat(fd).st_uid == os.geteuid():
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        if not keeps(path):
                            _remove(path)
                finally:
                    os.close(fd)
