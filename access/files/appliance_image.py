# SPDX-License-Identifier: Apache-2.0
"""What is in the appliance: our interpreter with the programs of inside/, modules, lvm and cryptsetup.

The kernel's first file system holds all of it, with the libraries that this host's programs need.
It is not compressed: writing it takes milliseconds, so that none is kept, and an emulated
processor has nothing to unpack.
"""

from __future__ import annotations

import importlib.util
import itertools
import marshal
import os
import re
import shutil
import stat
import struct
import subprocess
import sys

from vmapipe.access.files.inside.volumes import MODULES, run
from vmapipe.access.machine.kernels import Kernel
from vmapipe.runtime.errors import Failure, os_error_text

# ldd's answer for one library: "libm.so.6 => /lib/libm.so.6 (0x…)", or "/lib64/ld-linux… (0x…)".
_LIBRARY = re.compile(r"(?:=> |^\s*)(/\S.*) \(0x", re.MULTILINE)
_LDD_S = 30.0
# ELF, 64 bits (elf.h): where its header says where the segments and the sections are.
_PROGRAM_HEADERS_AT, _SECTIONS_AT, _COUNTS_AT = 32, 40, 54
_SEGMENT = struct.Struct("<IIQQQQQQ")


class Initramfs:
    """Collects files; `finish` gives the archive (cpio, "newc", as the kernel takes it).

    The form: Documentation/driver-api/early-userspace/buffer-format.rst of Linux.
    """

    def __init__(self) -> None:
        self._out = bytearray()
        self._folders: set[str] = set()
        self._names: set[str] = set()
        #: Folders of the libraries, for LD_LIBRARY_PATH.
        self.library_folders: list[str] = []

    def add_folder(self, path: str) -> None:
        """Add a folder, and those that it is in. Paths are absolute."""
        path = os.path.normpath(path)
        if path == "/" or path in self._folders:
            return
        self.add_folder(os.path.dirname(path))
        self._folders.add(path)
        self._add(path, stat.S_IFDIR | 0o755, b"", 2)

    def add_file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a file; one that is there already stays."""
        path = os.path.normpath(path)
        if path in self._names:
            return
        self._names.add(path)
        self.add_folder(os.path.dirname(path))
        self._add(path, stat.S_IFREG | mode, data, 1)

    def add_program(self, path: str) -> None:
        """Add a program or library of this host, at its place, with the libraries that it needs.

        Raises Failure.
        """
        self._add_from_host(path)
        for library in _libraries(path):
            self._add_from_host(library)
            folder = os.path.dirname(library)
            if folder not in self.library_folders:
                self.library_folders.append(folder)

    def finish(self) -> bytes:
        self._add("/TRAILER!!!", 0, b"", 1)
        return bytes(self._out)

    def _add_from_host(self, path: str) -> None:
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise Failure(f"cannot read {path}: {os_error_text(error)}") from error
        self.add_file(path, without_sections(data), 0o755)

    def _add(self, path: str, mode: int, data: bytes, links: int) -> None:
        name = os.fsencode(path.lstrip("/")) + b"\0"
        number = len(self._names) + len(self._folders)
        fields = (number, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(name), 0)
        self._out += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        self._out += bytes(-len(self._out) % 4)
        self._out += data
        self._out += bytes(-len(self._out) % 4)


def find_program(name: str) -> str | None:
    """Return the path of a program; a user's PATH often lacks the folders of root's."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def _libraries(path: str) -> list[str]:
    ldd = find_program("ldd")
    if ldd is None:
        raise Failure(
            "the libraries of a program are not known: there is no ldd (Debian: libc-bin)"
        )
    try:
        result = subprocess.run(
            [ldd, path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_LDD_S,
            env={"PATH": os.defpath, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        raise Failure(f"ldd {path} is not done within {_LDD_S:.0f} s") from error
    text = os.fsdecode(result.stdout)
    if "not found" in text:
        raise Failure(f"{path} needs a library that is not there: ldd {path} names it")
    # A static program has none, and ldd fails.
    return _LIBRARY.findall(text)


def without_sections(data: bytes) -> bytes:
    """Return an ELF program less what is not loaded, such as symbols for debuggers."""
    if data[:6] != b"\x7fELF\x02\x01":
        return data
    (table,) = struct.unpack_from("<Q", data, _PROGRAM_HEADERS_AT)
    size, count = struct.unpack_from("<HH", data, _COUNTS_AT)
    if size != _SEGMENT.size or table + count * size > len(data):
        return data
    end = table + count * size
    for index in range(count):
        kind, _, offset, _, _, length, _, _ = _SEGMENT.unpack_from(data, table + index * size)
        if kind:
            end = max(end, offset + length)
    if end > len(data):
        return data
    kept = bytearray(data[:end])
    struct.pack_into("<Q", kept, _SECTIONS_AT, 0)
    struct.pack_into("<HHH", kept, _COUNTS_AT + 4, 0, 0, 0)
    return bytes(kept)


PYTHON = os.path.realpath(sys.executable)
#: The script that it runs.
START = "/start.py"
#: Without these no disk and no host can be reached.
NEEDED_MODULES = ("virtio_pci", "virtio_blk", "virtio_console")
# What there is to load for each; modules that the kernel has built in, or lacks, are left out.
_MODULES = {
    "crypt": (
        *("dm_crypt", "xts", "cbc", "ecb", "essiv", "aes_generic", "aesni_intel", "sha256_generic"),
        *("sha512_generic", "twofish_generic", "serpent_generic", "algif_skcipher", "algif_hash"),
    ),
    "lvm": (
        *("dm_mod", "dm_thin_pool", "dm_snapshot", "dm_mirror", "dm_raid", "raid1", "raid10"),
        *("raid456", "raid0", "dm_cache", "dm_cache_smq", "dm_writecache", "dm_zero"),
    ),
}
# By the kernel's name of a file system.
_FILE_SYSTEMS = {
    "xfs": ("xfs", "crc32c_generic", "crc32c_intel"),
    "btrfs": ("btrfs", "crc32c_generic", "xxhash_generic", "sha256_generic", "blake2b_generic"),
    "ext4": ("ext4", "crc32c_generic"),
    "ntfs3": ("ntfs3",),
    "vfat": ("vfat", "nls_cp437", "nls_ascii", "nls_iso8859_1", "nls_utf8"),
    "exfat": ("exfat",),
    "iso9660": ("isofs",),
    "f2fs": ("f2fs", "crc32_generic"),
    "jfs": ("jfs",),
    "squashfs": ("squashfs",),
}
# Where and how each kind begins, in the order in which they are looked for; for one that the kernel
# mounts, its name of that.
_SIGNATURES = (
    (0, b"LUKS\xba\xbe\0\1", b"luks1", ""),
    (0, b"LUKS\xba\xbe\0\2", b"luks2", ""),
    (0x218, b"LVM2 001", b"lvm", ""),
    (0x1000, b"\xfc\x4e\x2b\xa9", b"raid", ""),
    (0xFF6, b"SWAPSPACE2", b"swap", ""),
    (3, b"-FVE-FS-", b"bitlocker", ""),
    (0, b"XFSB", b"xfs", "xfs"),
    (0x10040, b"_BHRfS_M", b"btrfs", "btrfs"),
    (0x438, b"\x53\xef", b"ext4", "ext4"),
    (0x400, b"\x10\x20\xf5\xf2", b"f2fs", "f2fs"),
    (0x8000, b"JFS1", b"jfs", "jfs"),
    (0x8001, b"CD001", b"iso9660", "iso9660"),
    (0, b"hsqs", b"squashfs", "squashfs"),
    (3, b"NTFS    ", b"ntfs", "ntfs3"),
    (3, b"EXFAT   ", b"exfat", "exfat"),
    (0x52, b"FAT32   ", b"fat32", "vfat"),
    (0x36, b"FAT16   ", b"fat16", "vfat"),
    (0x36, b"FAT12   ", b"fat12", "vfat"),
)
# No daemon, no udev, no locks, and no checks by programs that are not there.
_LVM_CONF = """\
global {
  locking_type = 0
  use_lvmpolld = 0
  thin_check_executable = ""
  cache_check_executable = ""
}
activation { udev_sync = 0 udev_rules = 0 monitoring = 0 }
devices {
  obtain_device_list_from_udev = 0
  external_device_info_source = "none"
  use_devicesfile = 0
}
backup { backup = 0 archive = 0 }
"""
_INSIDE = os.path.join(os.path.dirname(__file__), "inside")


def make_initramfs(kernel: Kernel, disks: int, *, has_keys: bool) -> Initramfs:
    """Raises Failure."""
    made = Initramfs()
    for folder in ("/dev", "/etc", "/mnt", "/proc", "/run", "/sys", "/tmp"):
        made.add_folder(folder)
    _add_python(made)
    programs = {}
    for name in ("lvm", "cryptsetup") if has_keys else ("lvm",):
        if path := find_program(name):
            programs[name] = os.path.realpath(path)
            made.add_program(programs[name])
    chains = {name: kernel.chain(names) for name, names in _MODULES.items()}
    chains["base"] = kernel.chain(NEEDED_MODULES)
    mounts: dict[bytes, tuple[bytes, str]] = {}
    for _, _, kind, mounted_as in _SIGNATURES:
        if mounted_as:
            driver, *_ = modules = _FILE_SYSTEMS[mounted_as]
            chains[kind.decode()] = kernel.chain(modules)
            missing = "" if kernel.has(driver) else f"the kernel {kernel.version} has no {driver}"
            mounts[kind] = (mounted_as.encode(), missing)
    for module in itertools.chain(*chains.values()):
        made.add_file(_module_path(module), kernel.module(module))
    config = {
        "disks": disks,
        "signatures": [signature[:3] for signature in _SIGNATURES],
        "modules": {name: list(map(_module_path, chain)) for name, chain in chains.items()},
        "mounts": mounts,
        "programs": programs,
        "lvm.conf": _LVM_CONF,
    }
    start = f"from {run.__module__} import run\nrun({config!r})\n"
    made.add_file(START, start.encode())
    return made


def _module_path(module: str) -> str:
    return f"/modules/{module}.ko"


def _add_python(made: Initramfs) -> None:
    made.add_program(PYTHON)
    for path in _python_modules():
        if path.endswith(".py"):
            made.add_file(f"{path}c", _compiled(path))
        else:
            made.add_program(path)
    # Folders without __init__.py are packages, too.
    place = f"/{run.__module__.rpartition('.')[0].replace('.', '/')}"
    for name in sorted(os.listdir(_INSIDE)):
        if name.endswith(".py") and name != "__init__.py":
            made.add_file(f"{place}/{name}c", _compiled(os.path.join(_INSIDE, name)))


def _python_modules() -> list[str]:
    """The files of the modules that guest.py needs. Raises Failure."""
    code = (
        f"import sys, {', '.join(MODULES)}\n"
        "for module in list(sys.modules.values()):\n"
        "    path = getattr(module, '__file__', None) or getattr(module.__spec__, 'origin', None)\n"
        "    if path and path.startswith('/'): print(path)\n"
    )
    result = subprocess.run(
        [PYTHON, "-EsSB", "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    if result.returncode:
        raise Failure(f"{PYTHON} cannot be taken into the appliance: it does not run by itself")
    return os.fsdecode(result.stdout).splitlines()


def _compiled(path: str) -> bytes:
    """Return a module as Python's loader takes it without its source."""
    with open(path, "rb") as file:
        code = compile(file.read(), os.path.basename(path), "exec", dont_inherit=True, optimize=0)
    return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code)
