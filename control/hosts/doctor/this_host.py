# SPDX-License-Identifier: Apache-2.0
"""This host: machines that run here, programs, libraries and rights. Nothing is changed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from vmapipe.access.files.engines import obstacle
from vmapipe.access.machine.accelerator import KVM, accelerator
from vmapipe.control.hosts.doctor.findings import Diagnosis, Finding, Verdict
from vmapipe.control.hosts.libvirt.connect import Library
from vmapipe.control.qemu.qemu_process import command_line, is_qemu
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.folders import temporary_folder
from vmapipe.runtime.sandbox import can_filter
from vmapipe.runtime.text import human_bytes, name_text

# What a backup keeps of old data in memory, for each disk of a machine in use (--buffer).
_BUFFER_BYTES = 64 << 20
_QMP_PATH = re.compile(r"(?:unix:|path=)([^,]+)")


class Optional(NamedTuple):
    """A program or a library that some commands need; `way_out`: how to have it."""

    name: str
    what_for: str
    way_out: str


_PROGRAMS: Sequence[Optional] = (
    Optional("qemu-img", "restores onto images that are not raw", "apt install qemu-utils"),
    Optional("qemu-nbd", "images that are not raw", "apt install qemu-utils"),
    Optional(
        "qemu-storage-daemon",
        "images that are not raw: fast backups of them, and restores onto them",
        "apt install qemu-system-common",
    ),
    Optional(
        "qemu-system-x86_64",
        "drill, restore --live, files and mount of other file systems",
        "apt install qemu-system-x86",
    ),
    Optional("fusermount3", "mount, without root", "apt install fuse3"),
)
_LIBRARIES: Sequence[Optional] = (
    Optional("lzallright", "serve, files and mount of .lzo archives", "pip install 'vmapipe[lzo]'"),
    Optional("mfusepy", "mount", "pip install 'vmapipe[mount]'"),
    Optional("pytsk3", "files, without a virtual machine", "pip install 'vmapipe[files]'"),
    Optional(
        "cryptography",
        "encrypted and signed archives, and files on LUKS1 volumes",
        "pip install 'vmapipe[age]'",
    ),
    Optional("botocore", "archives in object stores (s3://)", "pip install 'vmapipe[s3]'"),
)


# What a kernel, Debian's or Ubuntu's, has against user namespaces, below /proc/sys.
_NAMESPACE_SETTINGS = (
    ("user/max_user_namespaces", "0"),
    ("kernel/unprivileged_userns_clone", "0"),
    ("kernel/apparmor_restrict_unprivileged_userns", "1"),
)


class MachineHere(NamedTuple):
    """A QEMU that runs here, by its argv, and the options by which a backup reaches it."""

    pid: int
    name: str
    options: str


def machines_here() -> list[MachineHere]:
    """Return the machines that run on this host, as far as their argv can be read."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    found = []
    for pid in sorted(pids):
        words = command_line(pid) if is_qemu(pid) else []
        if any("qemu-system" in word or "kvm" in word for word in words[:3]):
            found.append(machine_of(pid, words))
    return found


def machine_of(pid: int, words: Sequence[str]) -> MachineHere:
    """Read a QEMU's argv: who manages it, its name, and a monitor that can be had. Pure."""
    values = {word: after for word, after in pairwise(words) if word[:1] == "-"}
    name = values.get("-name", "").removeprefix("guest=").partition(",")[0]
    joined = " ".join(words)
    if "/var/run/qemu-server/" in joined or "/run/qemu-server/" in joined:
        return MachineHere(pid, name, f"--pve {values.get('-id', '').partition(',')[0]}")
    if "libvirt" in joined and name:
        return MachineHere(pid, name, f"--libvirt {name}")
    for word, after in pairwise(words):
        match = _QMP_PATH.search(after) if word == "-qmp" else None
        if match:
            return MachineHere(pid, name, f"--qmp {match[1]}")
    chardevs = dict(_chardev(after) for word, after in pairwise(words) if word == "-chardev")
    for word, after in pairwise(words):
        if word == "-mon" and "mode=control" in after:
            fields = dict(part.partition("=")[::2] for part in after.split(","))
            path = chardevs.get(fields.get("chardev", after.partition(",")[0]), "")
            if path:
                return MachineHere(pid, name, f"--qmp {path}")
    return MachineHere(pid, name, "")


def _chardev(text: str) -> tuple[str, str]:
    """The id and the path of a chardev."""
    fields = dict(part.partition("=")[::2] for part in text.split(","))
    return fields.get("id", ""), fields.get("path", "")


def diagnose_host(cancel: Cancel) -> Diagnosis:
    """Look at this host. Raises Cancelled."""
    findings = [*_machines(), *_basics(), *_optional(), *_virtual_machines(cancel)]
    return Diagnosis("this host", findings)


def _machines() -> Iterator[Finding]:
    found = machines_here()
    for machine in found:
        who = (
            f"{name_text(machine.name)} (process {machine.pid})"
            if machine.name
            else f"process {machine.pid}"
        )
        if machine.options:
            text = f"{who} runs: vmapipe doctor {machine.options}"
            yield Finding("info", "machine", text)
        else:
            yield Finding(
                "warning",
                "machine",
                f"{who} runs, and has no QMP monitor that a backup could use",
                "at its next start: -qmp unix:/run/NAME.qmp,server=on,wait=off; until then: at rest, when off",
            )
    if not found:
        yield Finding(
            "info", "machine", "no QEMU runs here, or its argv cannot be read (not root?)"
        )


def _basics() -> Iterator[Finding]:
    yield Finding("ok", "Python", f"{platform.python_version()} on {platform.machine()}")
    if sys.version_info < (3, 13):
        yield Finding(
            "info", "Python", "TLS with a shared key (tls-psk-file) for --nbd needs Python 3.13"
        )
    place = temporary_folder()
    if not os.access(place, os.W_OK | os.X_OK):
        yield Finding(
            "problem",
            "TMPDIR",
            f"no folder for sockets can be made in {place}",
            "set TMPDIR to a folder that you may write to, with a short path",
        )
    else:
        status = os.statvfs(place)
        free = status.f_bavail * status.f_frsize
        yield Finding("ok", "TMPDIR", f"{place} can be written to, {human_bytes(free)} are free")
    with open("/proc/meminfo", encoding="ascii") as file:
        available = next(
            (int(line.split()[1]) for line in file if line.startswith("MemAvailable")), 0
        )
    disks = (available << 10) // _BUFFER_BYTES
    verdict: Verdict = "ok" if disks > 1 else "warning"
    text = f"{human_bytes(available << 10)} available: buffers of {disks} disks in use (--buffer, --buffer-total)"
    yield Finding(verdict, "memory", text)
    if os.geteuid():
        yield Finding(
            "info", "rights", "not root: only disks, sockets and processes of this user are reached"
        )


def _optional() -> Iterator[Finding]:
    for program in _PROGRAMS:
        if shutil.which(program.name):
            yield Finding("ok", "program", f"{program.name}: {program.what_for}")
        else:
            yield Finding(
                "info", "program", f"no {program.name}, for {program.what_for}", program.way_out
            )
    for library in _LIBRARIES:
        if importlib.util.find_spec(library.name):
            yield Finding("ok", "library", f"{library.name}: {library.what_for}")
        else:
            text = f"no {library.name}, for {library.what_for}"
            yield Finding("info", "library", text, library.way_out)
    try:
        Library.find()
        yield Finding("ok", "library", "libvirt: --libvirt")
    except Failure as failure:
        yield Finding("info", "library", f"--libvirt: {failure}")


def why_no_namespaces(folder: str = "/proc/sys") -> str:
    """Return which setting keeps user namespaces from users who are not root; empty: none does."""
    for name, value in _NAMESPACE_SETTINGS:
        with contextlib.suppress(OSError), open(f"{folder}/{name}", encoding="ascii") as file:
            if file.read().strip() == value:
                return f"{name.replace('/', '.')} = {value}"
    return ""


def _virtual_machines(cancel: Cancel) -> Iterator[Finding]:
    """What `drill`, `restore --live` and `files` start themselves. Raises Cancelled."""
    if why := obstacle(None):
        yield Finding("info", "files --engine vm", why)
    else:
        yield Finding(
            "ok", "files --engine vm", "a kernel and QEMU for other file systems are here"
        )
    if can_filter():
        yield Finding(
            "ok", "sandbox", "whatever parses a stranger's file system is held by seccomp"
        )
    else:
        text = "no seccomp filter for this kernel or processor: parsers of file systems run with fewer limits"
        yield Finding("warning", "sandbox", text, "vmapipe files --engine vm")
    if not os.path.exists("/dev/fuse"):
        yield Finding("info", "mount", "no /dev/fuse here", "modprobe fuse")
    elif why := why_no_namespaces():
        yield Finding("info", "mount", f"only for root, not inside `unshare -Urm`: {why}")
    try:
        kind = accelerator(cancel)
    except Failure as failure:
        yield Finding("info", "KVM", str(failure))
        return
    if kind == KVM:
        yield Finding("ok", "KVM", "it runs a guest: drill and files are quick")
    else:
        text = "it runs no guest here: drill and files emulate one, some 10 times slower"
        yield Finding("info", "KVM", text)
