# SPDX-License-Identifier: Apache-2.0
"""A real guest on an unmodified QEMU: files are rewritten while its disks are backed up."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ON_CI
from tests.guard.guest import Guest, Kernel, booted, find_kernel, make_initramfs
from tests.machine import LIMIT_S, children, end_of, good, next_event, sha256, started
from vmapipe.control.qemu.plain import PlainQmp
from vmapipe.control.qemu.qmp import Command

Need = Callable[..., list[str]]
SYSTEM_BYTES = 48 << 20
# QEMU sees whole sectors: the last one is padded with zeroes.
COUNTER_BYTES, COUNTER_SECTORS = (8 << 20) + 700, (8 << 11) + 2

# Round n writes n to the second disk, then to a file system on the first, then
# fresh data everywhere: any instant shows n there, and n or n - 1 here.
SCRIPT = """
mount -t ext4 /dev/vda /mnt
n=0
while true; do
    n=$((n + 1))
    printf '%08d' $n | dd of=/dev/vdb bs=512 conv=notrunc,fsync 2>/tmp/words
    printf '%08d' $n | dd of=/mnt/counter bs=8 conv=notrunc,fsync 2>/tmp/words
    dd if=/dev/urandom of=/mnt/file$((n % 8)) bs=64k count=6 conv=fsync 2>/tmp/words
    dd if=/dev/urandom of=/dev/vdb bs=64k count=2 seek=$((n % 60 + 2)) conv=notrunc,fsync 2>/tmp/words
    sync
    say round $n
done
"""


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    found = find_kernel()
    if found is None:
        reason = "no kernel for a guest: scripts/setup unpacks Debian's into .venv/kernel"
        if ON_CI:
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture
def images(need: Need, tmp_path: Path) -> tuple[Path, Path]:
    """A file system in a qcow2 image, and a raw one whose size is odd."""
    mkfs, qemu_img = need("mkfs.ext4", "qemu-img")
    raw, system, counter = (tmp_path / name for name in ("raw", "a.qcow2", "b.raw"))
    with raw.open("wb") as file:
        file.truncate(SYSTEM_BYTES)
    subprocess.run([mkfs, "-q", "-F", raw], check=True)
    subprocess.run([qemu_img, "convert", "-O", "qcow2", raw, system], check=True)
    with counter.open("wb") as file:
        file.truncate(COUNTER_BYTES)
    return system, counter


class RunningGuest:
    """Its console; `qmp` is for the backup, `ask` uses another monitor."""

    def __init__(self, console: Guest, folder: Path) -> None:
        self.console = console
        self.qmp = folder / "qmp.sock"
        self._monitor = PlainQmp(str(folder / "tests.sock"))
        self.rounds = 0

    def ask(self, name: str) -> Any:
        return self._monitor.execute(Command(name, {}))

    def goes_on(self, rounds: int) -> None:
        """Wait for so many more rounds: a write that fails ends the script, and this."""
        self.rounds += rounds
        self.console.hear(f"round {self.rounds}")

    def close(self) -> None:
        self._monitor.close()


@pytest.fixture
def guest(
    need: Need, kernel: Kernel, images: tuple[Path, Path], tmp_path: Path
) -> Iterator[RunningGuest]:
    qemu, busybox = need("qemu-system-x86_64", "busybox")
    initramfs = tmp_path / "initramfs"
    initramfs.write_bytes(make_initramfs(kernel, Path(busybox), SCRIPT))
    system, counter = images
    options = [
        *("-object", "iothread,id=io0"),
        *("-blockdev", f"driver=file,node-name=file0,filename={system}"),
        *("-blockdev", "driver=qcow2,node-name=system,file=file0"),
        *("-device", "virtio-blk-pci,drive=system,id=virtio0,iothread=io0"),
        *("-drive", f"if=none,id=drive-virtio1,format=raw,file={counter}"),
        *("-device", "virtio-blk-pci,drive=drive-virtio1,id=virtio1"),
        *("-qmp", f"unix:{tmp_path}/qmp.sock,server=on,wait=off"),
        *("-qmp", f"unix:{tmp_path}/tests.sock,server=on,wait=off"),
    ]
    with booted(qemu, kernel, initramfs, options) as console:
        console.hear("round 1")
        running = RunningGuest(console, tmp_path)
        running.rounds = 1
        with contextlib.closing(running):
            yield running
        assert not [line for line in console.console if "error" in line.lower()]


def copy_of(need: Need, image: Path, target: Path) -> Path:
    """As QEMU sees it; the guest has to be stopped."""
    (qemu_img,) = need("qemu-img")
    subprocess.run([qemu_img, "convert", "-U", "-O", "raw", image, target], check=True)
    return target


def test_the_archive_of_a_guest_that_was_stopped_equals_its_disks_and_it_stays_stopped(
    need: Need, guest: RunningGuest, images: tuple[Path, Path], tmp_path: Path
) -> None:
    archive = tmp_path / "vm.vma"
    guest.goes_on(3)
    guest.ask("stop")
    truth = [copy_of(need, image, tmp_path / f"truth{n}") for n, image in enumerate(images)]
    with started("backup", "--json", "--qmp", guest.qmp, "--speed", "12M", archive) as process:
        next_event(process, "instant")
        assert guest.ask("query-status")["status"] == "paused"
        guest.ask("cont")
        guest.goes_on(3)
        assert process.poll() is None
        assert end_of(process)[0] == 0
    guest.goes_on(3)
    good("restore", archive, tmp_path / "restored")
    for copy, index in zip(truth, (0, 1), strict=True):
        restored = tmp_path / "restored" / f"disk-drive-virtio{index}.raw"
        assert sha256(restored) == sha256(copy)
    assert (tmp_path / "restored" / "disk-drive-virtio1.raw").stat().st_size == (
        COUNTER_SECTORS * 512
    )


def test_the_archive_of_a_running_guest_is_clean_and_shows_both_disks_at_one_instant(
    need: Need, guest: RunningGuest, tmp_path: Path
) -> None:
    e2fsck, debugfs = need("e2fsck", "debugfs")
    archive = tmp_path / "vm.vma"
    guest.goes_on(3)
    before = guest.rounds
    with started("backup", "--json", "--qmp", guest.qmp, "--speed", "12M", archive) as process:
        next_event(process, "instant")
        guest.goes_on(5)
        assert end_of(process)[0] == 0
    good("restore", archive, tmp_path / "restored")
    system = tmp_path / "restored" / "disk-drive-virtio0.raw"
    # The journal of a file system that was in use is replayed; then nothing is wrong.
    subprocess.run([e2fsck, "-p", system], check=False, stdout=subprocess.DEVNULL)
    assert subprocess.run([e2fsck, "-f", "-n", system], capture_output=True).returncode == 0
    words = [debugfs, "-R", "cat /counter", str(system)]
    file = int(subprocess.run(words, capture_output=True, check=True).stdout)
    sector = int((tmp_path / "restored" / "disk-drive-virtio1.raw").read_bytes()[:8])
    assert before <= sector
    assert file in (sector, sector - 1)


@pytest.mark.parametrize("victim", ["producer", "coordinator"])
def test_a_guest_does_not_notice_that_its_backup_is_killed(
    guest: RunningGuest, tmp_path: Path, victim: str
) -> None:
    archive = tmp_path / "vm.vma"
    with started("backup", "--json", "--qmp", guest.qmp, "--speed", "2M", archive) as process:
        next_event(process, "instant")
        guest.goes_on(2)
        everybody = psutil.Process(process.pid).children(recursive=True)
        if victim == "coordinator":
            process.kill()
        else:
            children(process, "vmapipe.producer.main")[0].kill()
        guest.goes_on(5)
        assert end_of(process)[0] != 0
    _, alive = psutil.wait_procs(everybody, timeout=LIMIT_S)
    assert alive == []
    for what in ("query-jobs", "query-named-block-nodes"):
        assert "vmapipe-" not in str(guest.ask(what))
    guest.goes_on(3)
