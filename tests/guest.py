# SPDX-License-Identifier: Apache-2.0
"""A small Linux that boots under QEMU within seconds and does what its script says.

No KVM, no installed system, no privileges: Debian's cloud kernel, and an
initramfs that is written here, of busybox, the virtio modules and one script.
The script speaks with the test over a serial port of its own, a line at a time: what
the kernel, firmware, other programs and QEMU itself say goes elsewhere, or it would
come in the middle of a line.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import selectors
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

#: A boot takes 3 s on an idle machine; the rest is for one that is not.
LIMIT_S = 90.0
# In the order in which they need each other: what is loaded too early fails silently.
_MODULES = (
    "virtio/virtio_ring",
    "virtio/virtio",
    "virtio/virtio_pci_legacy_dev",
    "virtio/virtio_pci_modern_dev",
    "virtio/virtio_pci",
    "block/virtio_blk",
)
#: The same for disks on a virtio-scsi bus.
SCSI_MODULES = ("scsi/scsi_common", "scsi/scsi_mod", "scsi/virtio_scsi", "scsi/sd_mod")
#: For a port of the guest agent, and for the variables of UEFI firmware.
PORT_MODULES = ("char/virtio_console",)
EFI_MODULES = ("../fs/efivarfs/efivarfs",)
_QUICK_BOOT = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr"

# In front of every script. The guest has nothing but what is made here.
_PROLOGUE = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
exec </dev/ttyS1 >/dev/ttyS0 2>&1
stty -echo
say() { echo "$*" >/dev/ttyS1; }
say # ends what UEFI firmware, which talks to every port, has left of a line
for module in %s; do
    insmod /modules/$module.ko || say "failed: insmod $module"
done
# The test goes on only when it reads what it expects, so a script may just end.
trap 'say failed: the script ended; poweroff -f' EXIT
set -e
"""


class Kernel(NamedTuple):
    """A kernel and the folder of its drivers."""

    image: Path
    drivers: Path


def find_kernel() -> Kernel | None:
    """Debian 12's cloud kernel: as scripts/setup has unpacked it, or installed."""
    unpacked = Path(__file__).parents[1] / ".venv" / "kernel"
    for root in (unpacked, Path("/")):
        for image in sorted((root / "boot").glob("vmlinuz-*-cloud-amd64"), reverse=True):
            version = image.name.removeprefix("vmlinuz-")
            drivers = root / "lib/modules" / version / "kernel/drivers"
            # Later Debians compress their modules, which busybox's insmod cannot read.
            if os.access(image, os.R_OK) and (drivers / f"{_MODULES[-1]}.ko").is_file():
                return Kernel(image, drivers)
    return None


def make_initramfs(
    kernel: Kernel,
    busybox: Path,
    script: str,
    more_modules: Sequence[str] = (),
    more_files: Mapping[str, Path] | None = None,
) -> bytes:
    """The same arguments, the same bytes. `more_files`: programs, by their place in the guest."""
    modules = (*_MODULES, *more_modules)
    names = [Path(module).name for module in modules]
    archive = _Cpio()
    for folder in ("bin", "dev", "mnt", "modules", "proc", "sys", "tmp"):
        archive.add(folder, stat.S_IFDIR | 0o755)
    archive.add("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes())
    for module, name in zip(modules, names, strict=True):
        driver = (kernel.drivers / f"{module}.ko").read_bytes()
        archive.add(f"modules/{name}.ko", stat.S_IFREG | 0o644, driver)
    files = more_files or {}
    parents = {str(folder) for place in files for folder in Path(place).parents}
    for folder in sorted(parents - {"."}):
        archive.add(folder, stat.S_IFDIR | 0o755)
    for place, file in files.items():
        archive.add(place, stat.S_IFREG | 0o755, file.read_bytes())
    text = _PROLOGUE % " ".join(names) + script
    archive.add("init", stat.S_IFREG | 0o755, text.encode())
    # The lowest level: the guest unpacks it on an emulated processor.
    return gzip.compress(archive.finish(), compresslevel=1, mtime=0)


class _Cpio:
    """The "newc" format of Documentation/driver-api/early-userspace/buffer-format.rst."""

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._inode = 0

    def add(self, name: str, mode: int, data: bytes = b"") -> None:
        self._inode += 1
        path = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(path), 0)
        self._out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + path)
        self._pad()
        self._out.write(data)
        self._pad()

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return self._out.getvalue()

    def _pad(self) -> None:
        self._out.write(bytes(-self._out.tell() % 4))


class ScriptPort:
    """The port of a guest's script: what it says, a line at a time, and what it is told."""

    def hear(self, what: str, limit_s: float = LIMIT_S) -> list[str]:
        """What the script says up to the line `what`, without that."""
        deadline = time.monotonic() + limit_s
        said: list[str] = []
        while (line := self._word(deadline, f"{what!r}")) != what:
            said.append(line)
        return said

    def hear_next(self, limit_s: float = LIMIT_S) -> str:
        """What the script says next."""
        return self._word(time.monotonic() + limit_s, "anything")

    def has_said(self) -> list[str]:
        """What nobody has heard yet, without waiting for more."""
        said = []
        while (line := self._line(time.monotonic())) is not None:
            said.append(line)
        return said

    def tell(self, line: str) -> None:
        """A line for the script's `read`."""
        raise NotImplementedError

    def _word(self, deadline: float, what: str) -> str:
        line = self._line(deadline)
        if line is None:
            raise AssertionError(f"the guest never said {what}:\n{self._last_words()}")
        return line

    def _line(self, deadline: float) -> str | None:
        """None: there was none in time, or QEMU has ended."""
        raise NotImplementedError

    def _last_words(self) -> str:
        """What is known of the guest, for an error."""
        raise NotImplementedError


class Guest(ScriptPort):
    """A running guest: its script's port is the standard input and output of QEMU."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        assert process.stdout is not None
        self.process = process
        self._folder = folder
        self._said: list[str] = []
        self._unread = b""
        # The first line is not the script's.
        self._has_begun = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(process.stdout, selectors.EVENT_READ)

    def close(self) -> None:
        self._selector.close()

    @property
    def kernel_log(self) -> list[str]:
        """What the guest's kernel and its programs have said to its first port, but for the script."""
        return self._lines("console")

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def _line(self, deadline: float) -> str | None:
        assert self.process.stdout is not None
        while b"\n" not in self._unread:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                return None
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data:
                return None
            self._unread += data
        raw, _, self._unread = self._unread.partition(b"\n")
        line = raw.decode(errors="replace").rstrip("\r")
        if not self._has_begun:
            self._has_begun = True
            # A restored machine goes on in the middle of its script.
            if not line.startswith("round "):
                return self._line(deadline)
        self._said.append(line)
        if line.startswith("failed"):
            raise AssertionError(f"{line}:\n{self._last_words()}")
        return line

    def _lines(self, name: str) -> list[str]:
        return (self._folder / name).read_text(errors="replace").splitlines()

    def _last_words(self) -> str:
        parts = {"script": self._said, "kernel": self.kernel_log, "QEMU": self._lines("stderr")}
        return "\n".join(f"{who}: {line}" for who, lines in parts.items() for line in lines[-30:])


@contextlib.contextmanager
def booted(
    qemu: str, kernel: Kernel, initramfs: Path, options: Sequence[str] = ()
) -> Iterator[Guest]:
    """A guest that runs `initramfs`; ended, if it has not ended itself, with the block.

    `options` are its disks.
    """
    folder = Path(tempfile.mkdtemp(prefix="said-", dir=initramfs.parent))
    words = [
        *(qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "128"),
        *("-chardev", f"file,id=console,path={folder}/console", "-serial", "chardev:console"),
        *("-chardev", "stdio,id=script,signal=off", "-serial", "chardev:script"),
        *("-kernel", str(kernel.image), "-initrd", str(initramfs)),
        # Without a stable clock the kernel spends half a second to measure one. It also counts the
        # timer's ticks, and panics where a busy machine leaves some out.
        *("-append", f"{_QUICK_BOOT} tsc=reliable no_timer_check"),
        *options,
    ]
    with (
        (folder / "stderr").open("wb") as stderr,
        subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
        ) as process,
    ):
        guest = Guest(process, folder)
        try:
            yield guest
        finally:
            guest.close()
            process.kill()
            with contextlib.suppress(BrokenPipeError):
                process.communicate()


def virtio_disk(socket: Path, export: str) -> list[str]:
    """QEMU's options for a virtio disk that is an NBD export."""
    node = f"driver=nbd,node-name=vda,server.type=unix,server.path={socket},export={export}"
    return [
        *("-blockdev", f"{node},reconnect-delay=60"),
        *("-device", "virtio-blk-pci,drive=vda"),
    ]
