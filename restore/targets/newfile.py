# SPDX-License-Identifier: Apache-2.0
"""New files, which appear under their names when they are complete; and the folders they lie in."""

from __future__ import annotations

import contextlib
import os

from vmapipe.restore.errors import TargetError
from vmapipe.runtime.errors import os_error_text
from vmapipe.runtime.folders import HeldFolder

# What a new file is called where it has to have a name before it is complete.
PARTIAL = (".vmapipe-", ".partial")


class Folders:
    """The folders that targets lie in, each opened once and held to the end. A context manager.

    `notices`: what the user should know of them.
    """

    def __init__(self, held: HeldFolder | None = None) -> None:
        """`held`: what the restore's own folder is, whatever stands at its path by now."""
        self.notices: list[str] = []
        self.own = held
        self._held: dict[str, HeldFolder] = {}
        if held is not None:
            self._take(held)

    def __enter__(self) -> Folders:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for folder in self._held.values():
            if folder is not self.own:
                folder.close()
        self._held.clear()

    def of(self, path: str) -> tuple[HeldFolder, str]:
        """The folder of a file, and the file's name in it. Raises OSError."""
        place, name = os.path.split(path)
        key = _key(place)
        if key not in self._held:
            self._take(HeldFolder(key))
        return self._held[key], name

    def look_at(self, path: str) -> None:
        """Note whether others can change the folder of an existing target."""
        with contextlib.suppress(OSError):
            self.of(path)

    def _take(self, folder: HeldFolder) -> None:
        self._held[_key(folder.path)] = folder
        if changeable := folder.changeable_by_others():
            self.notices.append(
                f"other users can change {changeable}, and so decide where {folder.path} leads: "
                "restore to a folder that only you can change"
            )
        # Where files without a name cannot be, a killed restore leaves some with one.
        with contextlib.suppress(OSError):
            for name in folder.remove_leftovers(*PARTIAL):
                self.notices.append(
                    f"removed {os.path.join(folder.path, name)}, which a killed restore had left"
                )


def _key(folder: str) -> str:
    """Equal for a folder's path with and without slashes at its end."""
    return os.path.dirname(os.path.join(folder, "x")) or "."


class NewFile:
    """A file that has no name until it is published, or, where that cannot be, another one.

    A file without a name is gone whatever happens to us. Elsewhere (NFS, FUSE)
    `partial` is the name of a hidden file in the target's folder, which is locked, so that
    the next restore removes it if nobody else could.
    """

    #: Whether it may hold other data than zeroes before anything is written.
    has_old_data = False

    def __init__(self, path: str, folders: Folders) -> None:
        """Raises TargetError, also when something of that name exists."""
        self.path = path
        self.partial = ""
        self._published = False
        try:
            self.folder, self._name = folders.of(path)
            if self.folder.status(self._name) is not None:
                raise TargetError(f"{path} exists already and is not overwritten")
            self.fd = self._open_unnamed()
        except OSError as error:
            raise TargetError(f"cannot create {path}: {os_error_text(error)}") from error

    def _open_unnamed(self) -> int:
        with contextlib.suppress(OSError):
            fd = self.folder.make_unnamed()
            # Without /proc it could never get its name.
            if os.path.exists(f"/proc/self/fd/{fd}"):
                return fd
            os.close(fd)
        self.partial, fd = self.folder.make_locked(*PARTIAL)
        return fd

    def set_size(self, size_bytes: int) -> None:
        try:
            os.ftruncate(self.fd, size_bytes)
        except OSError as error:
            raise TargetError(
                f"cannot make {self.path} {size_bytes} bytes long: {os_error_text(error)}"
            ) from error

    def publish(self) -> None:
        """Give it its name, which must still be free. The data must be on the disk."""
        try:
            self._give_name()
            self._published = True
            self.partial = ""
            if not self.folder.holds(self._name, self.fd):
                raise TargetError(f"{self.path} was replaced by somebody else")
        except FileExistsError as error:
            raise TargetError(
                f"{self.path} has appeared meanwhile and is not overwritten"
            ) from error
        except OSError as error:
            raise TargetError(f"cannot name {self.path}: {os_error_text(error)}") from error

    def _give_name(self) -> None:
        if not self.partial:
            self.folder.name_unnamed(self.fd, self._name)
        elif self.folder.holds(self.partial, self.fd):
            self.folder.rename_new(self.partial, self._name)

    def withdraw(self) -> None:
        """Another file of the same job could not be published: take this one back."""
        if self._published:
            with contextlib.suppress(OSError):
                self.folder.remove(self._name, self.fd)
            self._published = False

    def close(self) -> None:
        """What was not published is gone."""
        if self.partial:
            with contextlib.suppress(OSError):
                self.folder.remove(self.partial, self.fd)
            self.partial = ""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def publish_all(files: list[NewFile]) -> None:
    """Give all of them their names, or none; they stay open. Raises TargetError."""
    try:
        for file in files:
            file.publish()
        for folder in {file.folder for file in files}:
            _sync(folder)
    except BaseException:
        for file in files:
            file.withdraw()
        raise


def _sync(folder: HeldFolder) -> None:
    try:
        folder.sync()
    except OSError as error:
        raise TargetError(
            f"cannot sync the folder {folder.path}: {os_error_text(error)}"
        ) from error
