# SPDX-License-Identifier: Apache-2.0
"""The appliance's first process, and what lies on its disks: partitions, volumes and their mounts."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import sys
import time

from vmapipe.access.files.inside.port import Port, Refused
from vmapipe.access.files.inside.tree import Tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    # These take as long to load as all others together.
    from collections.abc import Callable
    from typing import Any

#: What these programs import; all other modules are left behind.
MODULES = ("__future__", "ctypes", "errno", "fcntl", "os", "stat", "struct", "time")
# As in messages.py.
MAX_WORD_BYTES = 4096
# sys/mount.h: read-only, and no setuid, devices, programs, access times.
_MOUNT = 1 | 2 | 4 | 8 | 1024
# Fewer requests for a large file than with the 128 that the kernel begins with.
_READ_AHEAD_KIB = "1024"
# Milliseconds, emulated on a busy machine, too.
_APPEAR_S = 30.0
_POLL_S = 0.01
_FINIT_MODULE = 313  # x86_64
_BTRFS_SCAN = 0x50009404  # BTRFS_IOC_SCAN_DEV
# How file systems are mounted. xfs: the same one may be on two disks of an archive. btrfs: all
# subvolumes, and not the one that is mounted by default.
_MOUNT_OPTIONS = {b"xfs": b"nouuid", b"btrfs": b"subvolid=5"}
# What cryptsetup's exit status says where a key opens no slot; 3: its memory costs more than there is.
_NO_PERMISSION = 2


class FoundVolume:
    """A device with, maybe, a file system."""

    def __init__(
        self, disk: int, name: bytes, device: str, offset: int, layers: tuple[bytes, ...] = ()
    ) -> None:
        self.disk = disk
        # A logical volume may lie on several.
        self.disks = {disk}
        self.name = name
        self.device = device
        self.offset = offset
        self.layers = layers
        self.size = 0
        self.kind = b""
        self.remark = ""
        self.is_container = False
        self.root = ""


class Guest:
    """Answers commands, one after the other."""

    def __init__(self, port: Port, config: dict[str, Any], modules: set[str]) -> None:
        """`config`: what the host has written for this start; `modules`: what is loaded."""
        self._port = port
        self._config = config
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._keys: list[tuple[int, bytes, bytes]] = []
        self._volumes: list[FoundVolume] = []
        self._has_scanned = False
        self._modules = modules
        self._mounts = 0

    def run(self) -> None:
        self._port.tell("PARSERREADY", True)
        while True:
            name, *fields = self._port.hear()
            if name == "KEY":
                disk, place, _, secret = fields
                self._keys.append((disk, place, secret))
            else:
                self._answer(*fields)
                self._port.tell("ANSWEREND")

    def _answer(
        self, action: str, disk: int, where: bytes, path: bytes, offset: int, length: int
    ) -> None:
        try:
            if not self._has_scanned:
                self._scan()
                self._has_scanned = True
            for volume in self._volumes:
                if disk >= 0 and disk not in volume.disks:
                    continue
                if where and volume.name != where:
                    continue
                if self._is_answered(volume, action, path, (offset, length)):
                    return
        except (OSError, Refused) as error:
            text = (error.strerror if isinstance(error, OSError) else "") or str(error)
            self._port.tell("ENTRYFAILED", b"", text.encode()[:400])

    def _is_answered(
        self, volume: FoundVolume, action: str, path: bytes, span: tuple[int, int]
    ) -> bool:
        """Answer for one volume; whether that is all."""
        self._open(volume)
        if action == "volumes":
            self._tell_volume(volume)
        elif not volume.root:
            if action == "find":
                self._tell_volume(volume)
        else:
            tree = Tree(self._port, volume.root)
            found = tree.find(path)
            if found is None:
                return False
            if action != "find":
                tree.answer(action, found, span)
                return True
            self._tell_volume(volume)
        return False

    def _tell_volume(self, volume: FoundVolume) -> None:
        self._port.tell(
            "VOLUME",
            volume.disk,
            volume.name,
            volume.offset,
            volume.size,
            volume.kind,
            bool(volume.root),
            volume.layers,
            os.fsencode(volume.remark)[:MAX_WORD_BYTES],
            volume.is_container,
        )

    # --- what there is ---

    def _scan(self) -> None:
        """Find partitions, then what is in them, until nothing new comes to light."""
        found: list[FoundVolume] = []
        for disk, name in enumerate(self._disks()):
            with open(f"/sys/block/{name}/queue/read_ahead_kb", "w") as file:
                file.write(_READ_AHEAD_KIB)
            parts = _partitions(name)
            found += [FoundVolume(disk, part, device, at) for part, device, at in parts]
            whole = FoundVolume(disk, b"", f"/dev/{name}", 0)
            self._look(whole)
            # The boot sector of a file system can pass for a partition table.
            if not parts or whole.kind:
                found = [item for item in found if item.disk != disk] + [whole]
        for volume in found:
            self._look(volume)
            self._unlock(volume)
        self._volumes = found
        self._activate(found)

    def _disks(self) -> list[str]:
        """Return the kernel's names of the disks, in the archive's order."""
        count = self._config["disks"]

        def look() -> list[str] | None:
            serials = {
                first_line(f"/sys/block/{name}/serial"): name for name in os.listdir("/sys/block")
            }
            names = [serials.get(f"disk{number}", "") for number in range(count)]
            return names if all(names) else None

        found: list[str] = wait_for(look, "all disks")
        return found

    def _look(self, volume: FoundVolume) -> None:
        """Find out the size, and what begins there."""
        try:
            fd = os.open(volume.device, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            volume.remark = error.strerror or ""
            return
        try:
            volume.size = os.lseek(fd, 0, os.SEEK_END)
            for offset, magic, kind in self._config["signatures"]:
                if os.pread(fd, len(magic), offset) == magic:
                    volume.kind = kind
                    break
            if volume.kind == b"ext4" and _is_journal(os.pread(fd, 1024, 1024)):
                volume.kind = b"ext4 journal"
        except OSError:
            volume.kind = b"damaged"
        finally:
            os.close(fd)

    def _unlock(self, volume: FoundVolume) -> None:
        if not volume.kind.startswith(b"luks"):
            return
        wanted = [
            secret
            for disk, name, secret in self._keys
            if disk in (-1, volume.disk) and name in (b"", volume.name)
        ]
        if not wanted:
            volume.remark = "encrypted: give its key with --key-file"
            return
        program = self._config["programs"].get("cryptsetup")
        if program is None:
            volume.remark = "the host has no cryptsetup (Debian: cryptsetup-bin)"
            return
        self._load("crypt")
        said, status = b"", 0
        for secret in wanted:
            name = f"open{volume.disk}-{os.fsdecode(volume.name) or 'disk'}"
            words = ("open", "--type", "luks", "--key-file", "-", "--disable-locks", "--batch-mode")
            status, said = _run([program, *words, volume.device, name], secret)
            if status == 0:
                volume.layers = (*volume.layers, volume.kind)
                volume.device, volume.kind = f"/dev/mapper/{name}", b""
                self._look(volume)
                return
        what = "wrong key" if status == _NO_PERMISSION else "it cannot be opened here"
        volume.remark = f"{what}: {_last_line(said) or 'no key opens it'}"

    def _activate(self, found: list[FoundVolume]) -> None:
        """Find the logical volumes on what was found."""
        members = [volume for volume in found if volume.kind == b"lvm"]
        program = self._config["programs"].get("lvm")
        if not members:
            return
        if program is None:
            for volume in members:
                volume.remark = "the host has no lvm (Debian: lvm2)"
            return
        self._load("lvm")
        os.makedirs("/etc/lvm", exist_ok=True)
        with open("/etc/lvm/lvm.conf", "w") as file:
            file.write(self._config["lvm.conf"])
        status, said = _run([program, "vgchange", "--activate", "y", "--sysinit"], b"")
        complaint = _last_line(said) if status else ""
        by_device = {volume.device: volume for volume in members}
        groups: dict[bytes, list[FoundVolume]] = {}
        for device, group in self._report(program, "pvs", "pv_name,vg_name", 2):
            if member := by_device.get(os.fsdecode(device)):
                groups.setdefault(group, []).append(member)
                member.is_container = bool(group)
                member.remark = f"holds /{os.fsdecode(group)}"
        for group, name, path, layout in self._report(
            program, "lvs", "vg_name,lv_name,lv_dm_path,lv_layout", 4
        ):
            if group not in groups or b"pool" in layout.split(b","):
                continue
            base = groups[group][0]
            item = FoundVolume(
                base.disk,
                b"/%s/%s" % (group, name),
                os.fsdecode(path),
                base.offset,
                (*base.layers, b"lvm"),
            )
            item.disks = {member.disk for member in groups[group]}
            self._look(item)
            if not item.size:
                item.remark = (
                    complaint or "it cannot be activated: does a disk of it lie elsewhere?"
                )
            self._unlock(item)
            self._volumes.append(item)

    def _report(self, program: str, what: str, columns: str, count: int) -> list[list[bytes]]:
        words = [program, what, "--noheadings", "--separator", "|", "-o", columns]
        _, said = _run(words, b"")
        rows = [line.strip().split(b"|") for line in said.splitlines()]
        return [row for row in rows if len(row) == count and row[0]]

    # --- mounts ---

    def _open(self, volume: FoundVolume) -> None:
        """Mount it, if that has not been tried. The kernel replays the log of what it mounts."""
        mounts = self._config["mounts"]
        if volume.root or volume.remark or volume.kind not in mounts:
            return
        mounted_as, missing = mounts[volume.kind]
        if missing:
            volume.remark = missing
            return
        kind = os.fsdecode(volume.kind)
        self._load(kind)
        options = _MOUNT_OPTIONS.get(volume.kind, b"")
        if kind == "btrfs":
            self._scan_btrfs()
        if kind == "ext4":
            options = self._journal_of(volume)
        root = f"/mnt/{self._mounts}"
        os.mkdir(root)
        self._mounts += 1
        _kernel_lines()
        result = self._libc.mount(
            os.fsencode(volume.device), os.fsencode(root), mounted_as, _MOUNT, options
        )
        if not result:
            volume.root = root
            return
        text = os.strerror(ctypes.get_errno())
        lines = [line for line in _kernel_lines() if volume.kind[:3] in line.lower()]
        volume.remark = f"cannot be mounted: {text}"
        if lines:
            volume.remark += f" ({os.fsdecode(lines[-1][:200])})"

    def _scan_btrfs(self) -> None:
        """A btrfs may lie on several devices."""
        for member in self._volumes:
            if member.kind == b"btrfs":
                fd = os.open("/dev/btrfs-control", os.O_RDWR)
                try:
                    path = os.fsencode(member.device).ljust(4088, b"\0")
                    fcntl.ioctl(fd, _BTRFS_SCAN, bytearray(8) + path)
                except OSError:
                    pass  # the mount says what is missing
                finally:
                    os.close(fd)

    def _journal_of(self, volume: FoundVolume) -> bytes:
        """Find the device with its journal, if that is another one. Raises Refused."""
        superblock = _read(volume.device, 1024, 1024)
        (features,) = struct.unpack_from("<I", superblock, 0x5C)
        number = struct.unpack_from("<I", superblock, 0xE0)[0]
        if not features & 4 or number:  # has_journal; s_journal_inum
            return b""
        for other in self._volumes:
            if other is volume:
                continue
            raw = _read(other.device, 1024, 1024)
            if other.kind == b"ext4 journal" and raw[0x68:0x78] == superblock[0xD0:0xE0]:
                return b"journal_path=" + os.fsencode(other.device)
        return b""

    def _load(self, what: str) -> None:
        """Load the modules for it, in the order in which they need each other."""
        load_modules(self._libc, self._config["modules"].get(what, ()), self._modules)


def wait_for(look: Callable[[], Any], what: str) -> Any:
    """Return what `look` finds: devices appear some time after their driver. Raises Refused."""
    deadline = time.monotonic() + _APPEAR_S
    while (found := look()) is None:
        if time.monotonic() >= deadline:
            raise Refused(f"the appliance's kernel does not see {what}")
        time.sleep(_POLL_S)
    return found


def load_modules(libc: Any, paths: Any, loaded: set[str]) -> None:
    for path in paths:
        if path in loaded:
            continue
        loaded.add(path)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if libc.syscall(_FINIT_MODULE, fd, b"", 0):
            number = ctypes.get_errno()
            if number not in (errno.EEXIST, errno.ENODEV):
                print(f"cannot load {path}: {os.strerror(number)}", file=sys.stderr)
        os.close(fd)


def _is_journal(superblock: bytes) -> bool:
    """Whether it is one with the feature journal_dev: the rest of the device is a journal."""
    return len(superblock) == 1024 and bool(superblock[0x60] & 8)


def _read(device: str, offset: int, length: int) -> bytes:
    """Read a device's bytes; zeroes where they cannot be read."""
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(fd, length, offset).ljust(length, b"\0")
        finally:
            os.close(fd)
    except OSError:
        return bytes(length)


def _partitions(name: str) -> list[tuple[bytes, str, int]]:
    """Return number, device and place of each, but for containers of others."""
    found = []
    for part in os.listdir(f"/sys/block/{name}"):
        folder = f"/sys/block/{name}/{part}"
        number = first_line(f"{folder}/partition")
        # An extended partition is shown with two sectors.
        if number and int(first_line(f"{folder}/size") or 0) > 2:
            found.append((int(first_line(f"{folder}/start") or 0) * 512, int(number), part))
    return [(b"%d" % number, f"/dev/{part}", at) for at, number, part in sorted(found)]


def first_line(path: str) -> str:
    try:
        with open(path) as file:
            return file.readline().strip()
    except OSError:
        return ""


def _last_line(said: bytes) -> str:
    return os.fsdecode(said.strip().rpartition(b"\n")[2][:300])


def _kernel_lines() -> list[bytes]:
    """Return what the kernel has said since the last call."""
    global _kernel_log
    if _kernel_log < 0:
        _kernel_log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    lines: list[bytes] = []
    while True:
        try:
            record = os.read(_kernel_log, 8192)
        except BlockingIOError:
            return lines
        except OSError:
            continue  # some were overwritten
        lines.append(record.partition(b";")[2].partition(b"\n")[0])


_kernel_log = -1


def _run(words: list[str], secret: bytes) -> tuple[int, bytes]:
    """Run a program; return its exit status and what it said."""
    read_in, write_in = os.pipe()
    read_out, write_out = os.pipe()
    environment = {"PATH": "/", "DM_DISABLE_UDEV": "1", "LC_ALL": "C"}
    for name in ("LD_LIBRARY_PATH",):
        if name in os.environ:
            environment[name] = os.environ[name]
    actions = [
        (os.POSIX_SPAWN_DUP2, read_in, 0),
        (os.POSIX_SPAWN_DUP2, write_out, 1),
        (os.POSIX_SPAWN_DUP2, write_out, 2),
    ]
    pid = os.posix_spawn(words[0], words, environment, file_actions=actions)
    os.close(read_in)
    os.close(write_out)
    try:
        # At most 64 KiB: a pipe takes that at once.
        os.write(write_in, secret)
    except BrokenPipeError:
        pass
    os.close(write_in)
    said = bytearray()
    while part := os.read(read_out, 65536):
        said += part
    os.close(read_out)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), bytes(said)


def _find_port() -> str | None:
    folder = "/sys/class/virtio-ports"
    if os.path.isdir(folder):
        for name in os.listdir(folder):
            device = f"/dev/{name}"
            if first_line(f"{folder}/{name}/name") == "files" and os.path.exists(device):
                return device
    return None


def run(config: dict[str, Any]) -> None:
    """Be the first process of the appliance's kernel, and serve the host.

    It never returns: the kernel would panic.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for kind, place in ((b"proc", b"/proc"), (b"sysfs", b"/sys"), (b"devtmpfs", b"/dev")):
        libc.mount(b"none", place, kind, 0, None)
    loaded: set[str] = set()
    load_modules(libc, config["modules"]["base"], loaded)
    port = os.open(wait_for(_find_port, "the port"), os.O_RDWR | os.O_CLOEXEC)
    Guest(Port(port), config, loaded).run()
