# SPDX-License-Identifier: Apache-2.0
"""A booted guest with two disks under load, and a counter in its memory and on both of them."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tests.guest import SCSI_MODULES, Guest, Kernel, booted, make_initramfs
from tests.machine import Need
from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command

SYSTEM_BYTES = 48 << 20
# QEMU sees whole sectors: the last one is padded with zeroes.
COUNTER_BYTES, COUNTER_SECTORS = (8 << 20) + 700, (8 << 11) + 2

# Round n writes n to the second disk, then to a file system on the first, then
# fresh data everywhere: any instant shows n there, and n or n - 1 here. Each
# round first looks whether the disks have what the memory says.
SCRIPT = """
until [ -b $second ]; do true; done
mount -t ext4 /dev/vda /mnt
counted() { dd if=$1 bs=512 count=1 iflag=direct 2>/tmp/words | head -c 8; }
n=0
while true; do
    if [ $n -gt 0 ]; then
        [ "$(counted $second)" = $(printf '%08d' $n) ] || say failed: the second disk is not at $n
        [ "$(counted /mnt/counter)" = $(printf '%08d' $n) ] || say failed: the first disk is not at $n
    fi
    n=$((n + 1))
    printf '%08d' $n | dd of=$second bs=512 conv=notrunc,fsync 2>/tmp/words
    printf '%08d' $n | dd of=/mnt/counter bs=8 conv=notrunc,fsync 2>/tmp/words
    dd if=/dev/urandom of=/mnt/file$((n % 8)) bs=64k count=6 conv=fsync 2>/tmp/words
    dd if=/dev/urandom of=$second bs=64k count=2 seek=$((n % 60 + 2)) conv=notrunc,fsync 2>/tmp/words
    sync
    say round $n
done
"""


#: In front of a script: the guest does what its console tells it, too.
OBEY = """
(while read -r line; do eval "$line"; done) </dev/ttyS1 &
"""


class Extra(NamedTuple):
    """What a guest has besides: QEMU's options, modules, programs by their place, lines of script."""

    options: Sequence[str] = ()
    modules: Sequence[str] = ()
    files: Mapping[str, Path] = MappingProxyType({})
    script: str = ""


NOTHING = Extra()
_SCSI = (
    *("-device", "pcie-root-port,id=bridge,chassis=1"),
    *("-device", "virtio-scsi-pci,bus=bridge,id=bus,iothread=io0"),
    *("-device", "scsi-hd,bus=bus.0,drive=second,id=scsi1"),
)


class RunningGuest:
    """Its console; `qmp` is for the backup, `ask` uses another monitor."""

    def __init__(self, console: Guest, folder: Path) -> None:
        self.console = console
        self.qmp = folder / "qmp.sock"
        self._monitor = QmpClient(str(folder / "tests.sock"))
        self.rounds = 0

    def ask(self, name: str, **arguments: Any) -> Any:
        return self._monitor.execute(Command(name, arguments))

    def goes_on(self, rounds: int) -> None:
        """Wait for so many more rounds than by now; a write that fails ends the script, and this."""
        self.rounds = self.latest_round() + rounds
        self.console.hear(f"round {self.rounds}")

    def next_round(self) -> int:
        """Whatever the guest says next."""
        line = self.console.hear_next()
        assert line.startswith("round "), line
        self.rounds = int(line.removeprefix("round "))
        return self.rounds

    def latest_round(self) -> int:
        """By now."""
        for line in self.console.has_said():
            self.rounds = int(line.removeprefix("round "))
        return self.rounds

    def does(self, command: str) -> None:
        """Needs OBEY; wait until it is done."""
        self.console.tell(f"{command}; say done")
        for line in self.console.hear("done"):
            self.rounds = int(line.removeprefix("round "))

    def is_untouched(self) -> None:
        """QEMU has nothing of ours: no job, node, note or setting."""
        names = ("query-jobs", "query-named-block-nodes", "query-block-exports")
        assert "vmapipe-" not in str([self.ask(name) for name in names])
        assert "vmapipe-" not in str(self.ask("qom-list", path="/objects"))
        assert not [c for c in self.ask("query-migrate-capabilities") if c["state"]]
        assert self.ask("query-migrate-parameters")["max-bandwidth"] == 128 << 20

    def close(self) -> None:
        self._monitor.close()


@contextlib.contextmanager
def running_guest(
    need: Need,
    kernel: Kernel,
    folder: Path,
    disks: Sequence[Path],
    *options: str,
    with_scsi: bool = False,
    extra: Extra = NOTHING,
) -> Iterator[RunningGuest]:
    """With the first disk on an I/O thread of its own.

    The second is a virtio disk, too, or one on a virtio-scsi bus behind another PCI bridge.
    """
    qemu, busybox = need("qemu-system-x86_64", "busybox")
    initramfs = folder / "initramfs"
    script = f"{extra.script}\nsecond=/dev/{'sda' if with_scsi else 'vdb'}{SCRIPT}"
    modules = (*(SCSI_MODULES if with_scsi else ()), *extra.modules)
    initramfs.write_bytes(make_initramfs(kernel, Path(busybox), script, modules, extra.files))
    system, counter = disks
    kind = "qcow2" if system.suffix == ".qcow2" else "raw"
    words = [
        *("-object", "iothread,id=io0"),
        *("-blockdev", f"driver=file,node-name=file0,filename={system}"),
        *("-blockdev", f"driver={kind},node-name=system,file=file0"),
        *("-device", "virtio-blk-pci,drive=system,id=virtio0,iothread=io0"),
        *(_SCSI if with_scsi else ("-device", "virtio-blk-pci,drive=second,id=virtio1")),
        *("-drive", f"if=none,id=second,format=raw,file={counter}"),
        *("-qmp", f"unix:{folder}/qmp.sock,server=on,wait=off"),
        *("-qmp", f"unix:{folder}/tests.sock,server=on,wait=off"),
        *extra.options,
        *options,
    ]
    with (
        booted(qemu, kernel, initramfs, words) as console,
        contextlib.closing(connected(console, folder)) as guest,
    ):
        yield guest
    assert not [line for line in console.kernel_log if "error" in line.lower()]


def connected(console: Guest, folder: Path) -> RunningGuest:
    """Its monitors listen a moment after its start."""
    from tests.control.qemu.storage_daemon import wait_for_socket

    wait_for_socket(folder / "tests.sock", console.process)
    return RunningGuest(console, folder)


def make_images(need: Need, folder: Path) -> tuple[Path, Path]:
    """A file system in a qcow2 image, and a raw one whose size is odd."""
    mkfs, qemu_img = need("mkfs.ext4", "qemu-img")
    raw, system, counter = (folder / name for name in ("raw", "a.qcow2", "b.raw"))
    with raw.open("wb") as file:
        file.truncate(SYSTEM_BYTES)
    subprocess.run([mkfs, "-q", "-F", raw], check=True)
    subprocess.run([qemu_img, "convert", "-O", "qcow2", raw, system], check=True)
    with counter.open("wb") as file:
        file.truncate(COUNTER_BYTES)
    return system, counter


def is_clean(need: Need, system: Path) -> bool:
    """The file system, after its journal was replayed: it was in use."""
    (e2fsck,) = need("e2fsck")
    subprocess.run([e2fsck, "-p", system], check=False, stdout=subprocess.DEVNULL)
    return subprocess.run([e2fsck, "-f", "-n", system], capture_output=True).returncode == 0
