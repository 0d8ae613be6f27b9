# SPDX-License-Identifier: Apache-2.0
"""The process of a QEMU: found behind its monitor; its user, who must reach our sockets, and its
argv.
"""

from __future__ import annotations

import os

# QEMU's answer to query-uuid where the user gave none.
_NO_UUID = "00000000-0000-0000-0000-000000000000"


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
