# SPDX-License-Identifier: Apache-2.0
"""Archives of machines that boot and of ones that do not, and the tests of them that `vmapipe drill` makes."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema

from tests.access.bootable import break_system, config, make_bootable, zero_kernel
from tests.guest import Kernel
from tests.machine import LIMIT_S, VMAPIPE, Need, good
from vmapipe.access.drill.screen import Picture

DOCS = Path(__file__).parent.parent.parent.parent / "docs"
EVENTS = jsonschema.Draft202012Validator(json.loads((DOCS / "events.schema.json").read_text()))
# An emulated machine is up within 4 s (UEFI: 8) on an idle host.
BOOT_LIMIT_S = 80
# More than a good one needs on a busy host to show what it hangs at; nobody has to wait for more.
HANG_LIMIT_S = 20


class Drilled(NamedTuple):
    """One finished test: its exit code, its events, its error, and the archive."""

    code: int
    events: list[dict[str, Any]]
    error: str
    archive: Path

    @property
    def last(self) -> dict[str, Any]:
        return next(event for event in self.events if event["event"] == "drilled")

    def evidence(self, name: str) -> bytes:
        return (self.archive.parent / f"{self.archive.name}.drill" / name).read_bytes()


class Lab:
    """Disks to boot from, archives of them, and tests that run side by side."""

    def __init__(self, need: Need, kernel: Kernel, folder: Path) -> None:
        need("qemu-system-x86_64", "setpriv")
        self.folder = folder
        self._running: list[tuple[subprocess.Popen[bytes], Path]] = []
        self.disks = {
            name: folder / f"{name}.raw" for name in ("good", "hang", "zeroed", "broken", "empty")
        }
        make_bootable(need, kernel, folder / "good", self.disks["good"])
        make_bootable(need, kernel, folder / "hang", self.disks["hang"], "hang")
        for name in ("zeroed", "broken"):
            shutil.copy(self.disks["good"], self.disks[name])
        zero_kernel(need, self.disks["zeroed"])
        break_system(self.disks["broken"])
        with self.disks["empty"].open("wb") as file:
            file.truncate(8 << 20)

    def archive(self, name: str, disk: str, *lines: str) -> Path:
        archive, conf = self.folder / f"{name}.vma", self.folder / f"{name}.conf"
        conf.write_text(config(*lines))
        words = (
            "--disk",
            f"drive-virtio0={self.disks[disk]}",
            "--config",
            f"qemu-server.conf={conf}",
        )
        good("backup", "--quiet", *words, archive)
        return archive

    def start(self, archive: Path, *words: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [*VMAPIPE, "drill", "--json", "--no-index-cache", *words, str(archive)],
            # With a buffer, what _is_booting has read ahead would be lost to finish().
            bufsize=0,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._running.append((process, archive))
        return process

    def finish(self, process: subprocess.Popen[bytes], archive: Path) -> Drilled:
        stdout, stderr = process.communicate(timeout=LIMIT_S + BOOT_LIMIT_S)
        events = [json.loads(line) for line in stdout.decode().splitlines()]
        for event in events:
            EVENTS.validate(event)
        error = stderr.decode()
        assert "Traceback" not in error, error
        return Drilled(process.returncode, events, error, archive)

    def close(self) -> None:
        for process, _ in self._running:
            if process.poll() is None:
                process.kill()
                process.communicate()


PLAN = """
[[step]]
kind = "command"
run = ["/bin/cat", "/proc/version"]
output = "^Linux version [0-9]"
[[step]]
kind = "tcp"
port = 80
send = "GET / HTTP/1.0\\r\\n\\r\\n"
text = "hello from the guest"
required = true
[[step]]
kind = "serial"
regex = "restored login:"
[[step]]
kind = "screen"
text = "restored login:"
"""

# Where QEMU itself has the bridge to ISA.
MISPLACED = """
<domain type='kvm'><memory unit='MiB'>128</memory><os><type machine='pc'>hvm</type></os><devices>
<disk device='disk'><target dev='vda' bus='virtio'/>
  <address type='pci' bus='0x00' slot='0x01' function='0x0'/></disk></devices></domain>
"""


def damage(archive: Path) -> Path:
    """Within the first extent with data: the boot sector and the boot loader."""
    with archive.open("r+b") as file:
        file.seek(40_000)
        file.write(b"damage" * 100)
    return archive


def uuid_in(archive: Path) -> bytes:
    return archive.read_bytes()[8:24]


def picture_in(raw: bytes) -> Picture:
    """A PNG of ours: one chunk of data, no filters."""
    width, height = struct.unpack(">II", raw[16:24])
    rows = zlib.decompress(raw[raw.index(b"IDAT") + 4 : -16])
    step = 3 * width + 1
    return Picture(
        width, height, b"".join(rows[at + 1 : at + step] for at in range(0, len(rows), step))
    )
