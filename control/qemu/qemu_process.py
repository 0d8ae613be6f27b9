# SPDX-License-Identifier: Apache-2.0
"""The process of a QEMU: found behind its monitor; its user, who must reach our sockets, its argv,
and its open files.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from typing import NamedTuple

# QEMU's answer to query-uuid where the user gave none.
_NO_UUID = "00000000-0000-0000-0000-000000000000"
_MOUNT = re.compile(r"^mnt_id:\s*(\d+)$", re.MULTILINE)


def pid_of_qemu(peer_pid: int | None, uuid: str) -> int | None:
    """Find the QEMU behind a monitor; None: not found.

    `peer_pid`: the process that listens there, 0 or None: not known (in another pid namespace, or on
    another host); `uuid`: the machine's, by which it is looked for where something stands in between
    (libvirt, a proxy).
    """
    if peer_pid and is_qemu(peer_pid):
        return peer_pid
    found = _running(uuid)
    return found[0] if len(found) == 1 else None


def uid_of_qemu(path: str, pid: int | None) -> int:
    """Return the uid of the process that pid_of_qemu has found; else the owner of the monitor's
    socket at `path`.

    A QEMU that gave up root (-runas, -run-with) has made that socket before.
    """
    uid = uid_of(pid) if pid else None
    if uid is not None:
        return uid
    try:
        return os.stat(path).st_uid
    except OSError:
        return os.geteuid()


def uid_of(pid: int) -> int | None:
    """Return a process's uid for file systems; None: it has ended."""
    try:
        with open(f"/proc/{pid}/status") as file:
            line = next(line for line in file if line.startswith("Uid:"))
    except (OSError, StopIteration):
        return None
    # Real, effective, saved, and that for file systems.
    return int(line.split()[4])


def is_qemu(pid: int) -> bool:
    """Tell by its program's name whether it is a QEMU, also if started by the dynamic loader."""
    try:
        program = os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        return False
    if program.startswith("ld-"):
        return any(is_qemu_name(os.path.basename(word)) for word in command_line(pid)[1:])
    return is_qemu_name(program)


def is_qemu_name(program: str) -> bool:
    """Tell by a program's name: qemu-system-x86_64, qemu-kvm, kvm, qemu-storage-daemon; NixOS wraps
    them in more letters.
    """
    return program.lstrip(".").startswith(("qemu-", "kvm"))


def command_line(pid: int) -> list[str]:
    """Return its argv; empty when it has ended, or without permission."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return [os.fsdecode(word) for word in file.read().split(b"\0")]
    except OSError:
        return []


def _running(uuid: str) -> list[int]:
    """Find the QEMUs that have this uuid on their command line."""
    if not uuid or uuid == _NO_UUID:
        return []
    pids = (int(name) for name in os.listdir("/proc") if name.isdecimal())
    return [
        pid
        for pid in pids
        if is_qemu(pid) and any(uuid.lower() in word.lower() for word in command_line(pid))
    ]


class OpenFile(NamedTuple):
    """A file that a process had open when it was looked at, and the number of its descriptor."""

    number: str
    status: os.stat_result


class OpenFiles:
    """The files that a QEMU of this host has open. All raise OSError but `is_at`."""

    def __init__(self, pid: int) -> None:
        self._process = f"/proc/{pid}"

    def __iter__(self) -> Iterator[OpenFile]:
        for number in os.listdir(f"{self._process}/fd"):
            try:
                status = os.stat(f"{self._process}/fd/{number}")
            except FileNotFoundError:  # closed meanwhile
                continue
            yield OpenFile(number, status)

    def open(self, file: OpenFile) -> int:
        """Open a file for reading. Raises FileNotFoundError when QEMU has closed it meanwhile."""
        name = f"{self._process}/fd/{file.number}"
        # O_NONBLOCK: by now the descriptor may be that of a FIFO.
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if not os.path.samestat(os.fstat(fd), file.status):
            os.close(fd)
            raise FileNotFoundError(errno.ENOENT, "closed meanwhile", name)
        return fd

    def open_at(self, path: str) -> int:
        """Open the file or block device that is at this path, as QEMU sees it, if QEMU has it open."""
        wanted = self._status(path)
        for file in self:
            is_data = stat.S_ISREG(file.status.st_mode) or stat.S_ISBLK(file.status.st_mode)
            if not (is_data and os.path.samestat(file.status, wanted)):
                continue
            try:
                return self.open(file)
            except FileNotFoundError:
                continue  # it may have it open twice
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    def is_at(self, fd: int, path: str) -> bool:
        """Tell whether the file is at this path, as QEMU sees it."""
        try:
            return os.path.samestat(self._status(path), os.fstat(fd))
        except OSError:
            return False

    def file_system(self, file: OpenFile) -> str:
        """Return the type of the file system that the file lies on; empty: it is not known."""
        with open(f"{self._process}/fdinfo/{file.number}") as info:
            match = _MOUNT.search(info.read())
        mount = match[1] if match else ""
        with open(f"{self._process}/mountinfo") as mounts:
            lines = [line.split() for line in mounts]
        # Behind a lone hyphen: the type (proc_pid_mountinfo(5)).
        kinds = [words[words.index("-") + 1] for words in lines if words[0] == mount]
        return kinds[0] if kinds else ""

    def _status(self, path: str) -> os.stat_result:
        # With an absolute path the working folder does not matter.
        root = f"{self._process}/root" if path.startswith("/") else f"{self._process}/cwd/"
        return os.stat(root + path)
