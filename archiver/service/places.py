# SPDX-License-Identifier: Apache-2.0
"""Where the archives of each client go, how much it may store, and what the host has left."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat

from vmapipe.archiver.compression import parse_compression
from vmapipe.archiver.manifests import beside
from vmapipe.archiver.service.jobs import Place, Room
from vmapipe.archiver.service.memory import available_memory_bytes
from vmapipe.archiver.service.rules import ClientRules, Rules
from vmapipe.protocol import jobs
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.runtime.errors import Failure, UsageError, os_error_text
from vmapipe.runtime.folders import HeldFolder
from vmapipe.vma.errors import LimitError
from vmapipe.vma.header import Config, Device, check_contents

# Where a file system keeps no attributes of its users, an empty file says it; no client can make
# one of that name.
_MARK_ATTRIBUTE = "user.vmapipe.service"
_MARK_FILE = ".vmapipe-service"


class Places:
    """The facts that the core of the service asks for (admission.Facts)."""

    def __init__(self, directory: str, rules: ClientRules) -> None:
        """Raises Failure."""
        self._directory = os.path.abspath(directory)
        self._rules = rules
        if not os.path.isdir(self._directory):
            raise UsageError(f"--directory {directory}: no such folder")
        if not os.access(self._directory, os.W_OK | os.X_OK):
            raise Failure(f"--directory {directory}: we may not write there")

    def place(self, client: str, request: jobs.Open) -> Place:
        """Raises RemoteProtocolError."""
        check_request(request)
        try:
            rules = self._rules.of(client)
            folder = self._folder_of(rules)
            mark_as_service(folder)
        except Failure as failure:
            raise RemoteProtocolError("failed", f"on the service's side: {failure}") from failure
        path = os.path.join(folder, request.name)
        return Place(
            path,
            exists=os.path.lexists(path) or os.path.lexists(beside(path)),
            max_jobs=rules.max_jobs,
            quota_bytes=rules.quota_bytes,
            used_bytes=_used_bytes(folder) if rules.quota_bytes else 0,
            shared=self._rules.has_others(client),
        )

    def room(self) -> Room:
        return Room(shutil.disk_usage(self._directory).free, available_memory_bytes())

    def used_bytes(self, client: str) -> int:
        try:
            return _used_bytes(self._folder_of(self._rules.of(client)))
        except Failure:
            return 0  # rules that cannot be read just now end no job

    def _folder_of(self, rules: Rules) -> str:
        """Made if it is not there. Raises Failure."""
        if not rules.folder:
            return self._directory
        folder = os.path.join(self._directory, rules.folder)
        try:
            with HeldFolder(self._directory) as held:
                with contextlib.suppress(FileExistsError):
                    held.make_folder(rules.folder).close()
                status = held.status(rules.folder)
            # Not through a link: it could lead anywhere.
            if not status or not stat.S_ISDIR(status.st_mode):
                raise Failure(f"{folder} is no folder")
        except OSError as error:
            raise Failure(f"cannot make {folder}: {os_error_text(error)}") from error
        return folder


def _used_bytes(folder: str) -> int:
    """Of all files in a client's folder, with what is being written."""
    used = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # got its final name just now
            used += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return used


def check_request(request: jobs.Open) -> None:
    """Raises RemoteProtocolError when no archive could hold these."""
    devices = tuple(Device(index, name, 1) for index, name in enumerate(request.devices, 1))
    configs = tuple(Config(name, data) for name, data in request.configs)
    try:
        check_contents(devices, configs)
        if request.compress:
            parse_compression(request.compress, 1)
    except (LimitError, UsageError) as error:
        raise RemoteProtocolError("bad-contents", str(error)) from error


def mark_as_service(folder: str) -> None:
    """So that `vmapipe prune` knows that clients choose the names there. Never raises."""
    try:
        with HeldFolder(folder) as held:
            if is_of_service(held):
                return
            try:
                os.setxattr(held.fd, _MARK_ATTRIBUTE, b"1")
            except OSError:  # a file system without
                os.close(held.open(_MARK_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    except OSError:
        pass  # opening the archive there will tell what is wrong


def is_of_service(folder: HeldFolder) -> bool:
    """Whether a service stores there."""
    with contextlib.suppress(OSError):
        os.getxattr(folder.fd, _MARK_ATTRIBUTE)
        return True
    with contextlib.suppress(OSError):
        return folder.status(_MARK_FILE) is not None
    return False
