# SPDX-License-Identifier: Apache-2.0
"""Where the archives of each client go, how much it may store, and what the host has left."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import stat
import threading
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vmapipe.archiver.outputs.compress import parse_compression
from vmapipe.archiver.outputs.manifests import SIGNATURE_SUFFIX, SUFFIX, beside
from vmapipe.archiver.outputs.object import abort_stale_uploads, abort_upload
from vmapipe.archiver.service.admission import FreeSpace
from vmapipe.archiver.service.jobs import ArchivePlace
from vmapipe.protocol import service
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.runtime.arguments import size
from vmapipe.runtime.errors import Failure, UsageError, os_error_text
from vmapipe.runtime.folders import HeldFolder
from vmapipe.runtime.keys import client_names, read_trusted
from vmapipe.runtime.object_names import check_prefix
from vmapipe.runtime.objectstore import StoredObject
from vmapipe.vma.errors import LimitError
from vmapipe.vma.header import Config, Device, check_contents

# A few lines are expected; more is not what we look for.
_MAX_RULES_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """The limits of one client. `folder`: below the service's; empty: the service's own."""

    folder: str = ""
    quota_bytes: int = 0
    max_jobs: int = 0


class ClientRules:
    """`usual`: for clients without limits of their own. `folder`: with NAME.toml for the others.

    They are read anew for each job. `per_client`: a client's archives go into a
    folder of its name.
    """

    def __init__(self, usual: ClientLimits, folder: Path | None, *, per_client: bool) -> None:
        """Raises Failure for a file that makes no sense."""
        self._usual = usual
        self._folder = folder
        self._per_client = per_client
        self._listed: frozenset[str] = frozenset()
        for file in sorted(folder.glob("*.toml")) if folder else ():
            read_client_limits(file, usual)

    def others_of(self, client: str) -> frozenset[str]:
        """Return the clients that may come beside this one, as they were listed last."""
        if not self._folder or not client:
            return frozenset()
        # A folder that cannot be read for a moment takes no client's place away.
        with contextlib.suppress(OSError):
            self._listed = frozenset(client_names(self._folder))
        return self._listed - {client}

    def of(self, client: str) -> ClientLimits:
        """Raises Failure."""
        usual = replace(self._usual, folder=client if self._per_client else "")
        file = self._folder / f"{client}.toml" if self._folder and client else None
        return read_client_limits(file, usual) if file and file.exists() else usual


def read_client_limits(file: Path, usual: ClientLimits) -> ClientLimits:
    """`quota`, `jobs` and `directory` of one client. Raises Failure."""
    try:
        values = tomllib.loads(read_trusted(file, _MAX_RULES_BYTES).decode())
        rules = usual
        for key, value in values.items():
            match key, value:
                case "quota", str():
                    rules = replace(rules, quota_bytes=size(value))
                case "jobs", int() if value > 0:
                    rules = replace(rules, max_jobs=value)
                case "directory", str() if not service.archive_name_fault(value):
                    rules = replace(rules, folder=value)
                case _:
                    raise Failure(
                        f'{file}: {key!r} makes no sense; it may have quota = "500G", jobs = 2, '
                        'directory = "name"'
                    )
    except OSError as error:
        raise Failure(f"cannot read {file}: {os_error_text(error)}") from error
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise Failure(f"{file}: {error}") from error
    if rules.quota_bytes and not rules.folder:
        raise Failure(
            f"{file}: a quota needs a directory of its own: add one, or give the service --per-client"
        )
    return rules


# Where a file system keeps no attributes of its users, an empty file says it; no client can make
# one of that name.
_MARK_ATTRIBUTE = "user.vmapipe.service"
_MARK_FILE = ".vmapipe-service"


# A client that could make its archive of another's would hear by digests what is in that.
_SHARED_FOLDER = (
    "this service's clients share a folder, and none of them may build on another's archives: give the "
    "service --keys and --per-client"
)


def why_no_base(rules: ClientLimits, ending: str, *, is_of_one_host: bool) -> str:
    """Return why a client's archives cannot be bases here; empty: they can."""
    if ending:
        return "this service encrypts what it stores, and cannot read it again"
    return "" if rules.folder or is_of_one_host else _SHARED_FOLDER


class FolderStorage:
    """The facts that the core of the service asks for (admission.Facts)."""

    def __init__(
        self,
        directory: str,
        rules: ClientRules,
        ending: str = "",
        *,
        is_of_one_host: bool = False,
    ) -> None:
        """`ending`: what each archive's name ends with, whatever its client says. Raises Failure.

        `is_of_one_host`: all clients are processes here, who may use its socket.
        """
        self._ending = ending
        self._is_of_one_host = is_of_one_host
        self._directory = os.path.abspath(directory)
        self._rules = rules
        if not os.path.isdir(self._directory):
            raise UsageError(f"--directory {directory}: no such folder")
        if not os.access(self._directory, os.W_OK | os.X_OK):
            raise Failure(f"--directory {directory}: we may not write there")

    def place(self, client: str, request: service.Open) -> ArchivePlace:
        """Raises RemoteProtocolError."""
        check_request(request)
        try:
            rules = self._rules.of(client)
            folder = self._folder_of(rules)
            mark_as_service(folder)
        except Failure as failure:
            raise RemoteProtocolError("failed", f"on the service's side: {failure}") from failure
        path = os.path.join(folder, with_ending(request.name, self._ending))
        return ArchivePlace(
            path,
            exists=os.path.lexists(path) or os.path.lexists(beside(path)),
            max_jobs=rules.max_jobs,
            quota_bytes=rules.quota_bytes,
            used_bytes=_used_bytes(folder) if rules.quota_bytes else 0,
            others=self._rules.others_of(client),
            why_no_base=why_no_base(rules, self._ending, is_of_one_host=self._is_of_one_host),
        )

    def room(self) -> FreeSpace:
        return FreeSpace(shutil.disk_usage(self._directory).free, available_memory_bytes())

    def used_bytes(self, client: str) -> int:
        try:
            return _used_bytes(self._folder_of(self._rules.of(client)))
        except Failure:
            return 0  # rules that cannot be read just now end no job

    def _folder_of(self, rules: ClientLimits) -> str:
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
                raise Failure(f"{folder} is not a folder")
        except OSError as error:
            raise Failure(f"cannot make {folder}: {os_error_text(error)}") from error
        return folder


def with_ending(name: str, ending: str) -> str:
    return name if name.endswith(ending) else name + ending


def _used_bytes(folder: str) -> int:
    """Return the size of all files in a client's folder, including archives being written."""
    used = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # got its final name just now
            used += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return used


def check_request(request: service.Open) -> None:
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
    """Return whether another service uses this folder."""
    with contextlib.suppress(OSError):
        os.getxattr(folder.fd, _MARK_ATTRIBUTE)
        return True
    with contextlib.suppress(OSError):
        return folder.status(_MARK_FILE) is not None
    return False


_GROUPS = Path("/sys/fs/cgroup")


def available_memory_bytes() -> int:
    """Return the memory available on the host, or less where systemd's MemoryMax= (cgroup v2) leaves less."""
    import psutil

    available = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError):
        name = Path("/proc/self/cgroup").read_text().partition("0::/")[2].strip()
        group = _GROUPS / name
        while group != _GROUPS:
            available = min(available, left_in_group(group, available))
            group = group.parent
    return available


def left_in_group(group: Path, otherwise: int) -> int:
    """Bytes below a group's limit; pages that the kernel can drop do not count."""
    try:
        most = (group / "memory.max").read_text().strip()
        if most == "max":
            return otherwise
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(most) - used + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return otherwise


# Parts that wait and five on their way are 96 MiB (and more above 31 GiB), the library 40.
STORE_JOB_MEMORY_BYTES = 256 << 20
# The slashes, a folder, an archive's name, and what an encrypted one's manifest has behind that.
_LONGEST_REST_BYTES = 2 * (1 + service.MAX_ARCHIVE_NAME_BYTES) + len(
    f".age{SUFFIX}{SIGNATURE_SUFFIX}"
)
# A store does not say what is free.
_WITHOUT_LIMIT_BYTES = 1 << 62

Uploads = Sequence[tuple[str, str]]


class ObjectStorage:
    """The facts that the core of the service asks for (admission.Facts)."""

    def __init__(
        self, prefix: str, rules: ClientRules, ending: str = "", *, is_of_one_host: bool = False
    ) -> None:
        """`prefix`: s3://BUCKET or s3://BUCKET/PREFIX; `ending` as for a folder. Raises UsageError."""
        self._ending = ending
        self._is_of_one_host = is_of_one_host
        check_prefix(prefix, _LONGEST_REST_BYTES)
        self._prefix = prefix.removesuffix("/")
        self._rules = rules

    def place(self, client: str, request: service.Open) -> ArchivePlace:
        """Raises RemoteProtocolError."""
        check_request(request)
        try:
            rules = self._rules.of(client)
            _refuse_quota(rules)
        except Failure as failure:
            raise RemoteProtocolError("failed", f"on the service's side: {failure}") from failure
        folder = f"{self._prefix}/{rules.folder}" if rules.folder else self._prefix
        return ArchivePlace(
            f"{folder}/{with_ending(request.name, self._ending)}",
            max_jobs=rules.max_jobs,
            others=self._rules.others_of(client),
            why_no_base=why_no_base(rules, self._ending, is_of_one_host=self._is_of_one_host),
        )

    def room(self) -> FreeSpace:
        return FreeSpace(_WITHOUT_LIMIT_BYTES, available_memory_bytes())

    def used_bytes(self, client: str) -> int:
        """Return 0: an object store has no quotas."""
        return 0

    def check(self, left: Uploads, tell: Callable[[str], None]) -> None:
        """Before the first job: the store answers, and what was left there is aborted.

        `left`: uploads of services that were killed on this host. Others below
        the prefix are left over when nothing was added for a day. Raises Failure.
        """
        # Any name of ours will do.
        with contextlib.closing(StoredObject(f"{self._prefix}/vm.vma")) as store:
            store.look_at_bucket()
            for name, upload in left:
                abort_upload(name, upload)
                tell(f"an upload of {name} that a killed service left behind was aborted")
            abort_stale_uploads(store, tell, below=True)


def _refuse_quota(rules: ClientLimits) -> None:
    """Raises Failure."""
    if rules.quota_bytes:
        raise Failure("a quota is not counted in an object store: set a limit at the store")


def abort_uploads(uploads: Uploads) -> threading.Thread:
    """Abort the upload of an archiver that was killed. In a thread: the store may be slow."""

    def work() -> None:
        for name, upload in uploads:
            abort_upload(name, upload)

    thread = threading.Thread(target=work, name="s3-cleaner", daemon=True)
    thread.start()
    return thread
