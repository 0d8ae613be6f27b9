# SPDX-License-Identifier: Apache-2.0
"""Disks that are unplugged, or get an external snapshot, while they are backed up."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path

import pytest

from tests.conftest import absent
from tests.control.qemu.paused_machine import PausedMachine, paused_machine
from tests.control.qemu.running_guest import OBEY, Extra, make_images, running_guest
from tests.guest import find_kernel
from tests.machine import Need, end_of, eventually, good, next_event, started, without_limit
from vmapipe.control.qmp.connection import QmpRefused

MIB = 1 << 20
SIZE = 2 * MIB


def machine_options(folder: Path, *, with_drives: bool) -> list[str]:
    """Two disks, full of sixes."""
    options = ["-device", "virtio-scsi-pci,id=bus"]
    for number in range(2):
        (folder / f"{number}.raw").write_bytes(b"\x66" * SIZE)
        if with_drives:
            options += ["-drive", f"if=none,id=d{number},format=raw,file={{d}}/{number}.raw"]
        else:
            file = f"driver=file,node-name=f{number},filename={{d}}/{number}.raw"
            options += ["-blockdev", file]
            options += ["-blockdev", f"driver=raw,node-name=d{number},file=f{number}"]
        options += ["-device", f"scsi-hd,drive=d{number},id=scsi{number}"]
    return options


def takes_snapshot(machine: PausedMachine, image: Path, **disk: str) -> bool:
    """Whether QEMU lets it."""
    words = {"snapshot-file": str(image), "format": "qcow2", **disk}
    try:
        machine.ask("blockdev-snapshot-sync", **words)
    except QmpRefused:
        return False
    return True


@pytest.mark.every_qemu
def test_a_snapshot_by_a_drives_name_costs_the_backup_and_not_the_guest(
    qemu: str, need: Need, tmp_path: Path, out: Path
) -> None:
    """The drive's name is our filter's then: the image has to be a usable one of the disk itself."""
    (qemu_img,) = need("qemu-img")
    archive, overlay = out / "vm.vma", tmp_path / "overlay.qcow2"
    words = ("backup", "--json", "--speed", "64K", "--qmp")
    with paused_machine(need, tmp_path, *machine_options(tmp_path, with_drives=True)) as machine:
        with started(*words, machine.qmp, archive) as process:
            next_event(process, "instant")
            taken = takes_snapshot(machine, overlay, device="d1")
            assert machine.can_write("scsi1", "write -P 1 0 64k")
            without_limit(process)
            code, text = end_of(process)
        assert machine.ours() == []
        assert machine.can_write("scsi1", "write -P 2 64k 64k")
        if taken:
            assert (code, archive.exists()) == (1, False)
            assert "disk 'drive-scsi1': somebody has put QEMU's node" in text
            info = [qemu_img, "info", "-U", "--output=json", str(overlay)]
            shown = json.loads(subprocess.run(info, check=True, capture_output=True).stdout)
            assert shown["backing-filename-format"] == "raw"
            assert shown["backing-filename"] == str(tmp_path / "1.raw")
            assert (tmp_path / "1.raw").read_bytes() == b"\x66" * SIZE
        else:
            assert code == 0, text
        good("backup", "--qmp", machine.qmp, out / "next.vma")
        assert machine.ours() == []
    good("restore", out / "next.vma", tmp_path / "restored")
    copy = (tmp_path / "restored" / "disk-drive-scsi1.raw").read_bytes()
    assert copy == b"\x01" * 65536 + b"\x02" * 65536 + b"\x66" * (SIZE - 131072)


@pytest.mark.every_qemu
def test_a_disk_that_is_unplugged_and_one_with_a_snapshot_by_its_node_are_backed_up(
    qemu: str, need: Need, tmp_path: Path, out: Path
) -> None:
    """As they were at the instant; and both are free afterwards."""
    overlay = tmp_path / "overlay.qcow2"
    words = ("backup", "--json", "--speed", "64K", "--qmp")
    with paused_machine(need, tmp_path, *machine_options(tmp_path, with_drives=False)) as machine:
        with started(*words, machine.qmp, out / "vm.vma") as process:
            next_event(process, "instant")
            assert machine.can_write("scsi0", "write -P 1 0 64k")
            machine.ask("device_del", id="scsi0")
            names = {"node-name": "d1", "snapshot-node-name": "overlay"}
            taken = takes_snapshot(machine, overlay, **names)
            assert machine.can_write("scsi1", "write -P 1 0 64k")
            without_limit(process)
            code, text = end_of(process)
        assert (code, machine.ours()) == (0, []), text
        devices = {b["qdev"]: b["inserted"]["node-name"] for b in machine.ask("query-block")}
        assert devices == {"scsi1": "overlay" if taken else "d1"}
        machine.ask("blockdev-del", **{"node-name": "d0"})
        assert machine.can_write("scsi1", "write -P 2 64k 64k")
    good("restore", out / "vm.vma", tmp_path / "restored")
    for number in range(2):
        copy = (tmp_path / "restored" / f"disk-drive-scsi{number}.raw").read_bytes()
        assert copy == b"\x66" * SIZE


@pytest.mark.every_qemu
def test_disks_may_be_unplugged_one_after_the_other_while_what_their_guest_feels_steers(
    qemu: str, need: Need, tmp_path: Path, out: Path
) -> None:
    """A device is gone, and with it its numbers; the node and its job are there to the end."""
    words = ("backup", "--json", "--guest-latency", "20ms", "--latency-floor", "64K")
    with paused_machine(need, tmp_path, *machine_options(tmp_path, with_drives=False)) as machine:
        with started(*words, "--speed", "64K", "--qmp", machine.qmp, out / "vm.vma") as process:
            next_event(process, "instant")
            for name, other in (("scsi0", "scsi1"), ("scsi1", "")):
                assert machine.can_write(name, "write -P 1 0 64k")
                next_event(process, "progress")
                machine.ask("device_del", id=name)
                next_event(process, "progress")
                assert not other or machine.can_write(other, "write -P 2 64k 64k")
            without_limit(process)
            code, text = end_of(process)
        assert (code, machine.ours()) == (0, []), text
        assert machine.ask("query-block") == []
        for number in range(2):
            machine.ask("blockdev-del", **{"node-name": f"d{number}"})
    good("restore", out / "vm.vma", tmp_path / "restored")
    for number in range(2):
        copy = (tmp_path / "restored" / f"disk-drive-scsi{number}.raw").read_bytes()
        assert copy == b"\x66" * SIZE


# The guest's driver has let go of a disk.
_IS_GONE = "while [ -e /sys/block/{} ]; do true; done"


def _spare_disk(folder: Path, name: str) -> Path:
    path = folder / f"{name}.raw"
    path.write_bytes(b"\x66" * SIZE)
    return path


@pytest.mark.parametrize("felt", [(), ("--guest-latency", "10s")])
def test_a_guest_that_gives_a_disk_back_meanwhile_goes_on(
    felt: tuple[str, ...], need: Need, tmp_path: Path, out: Path
) -> None:
    """A virtio disk goes only when the guest's driver lets it."""
    kernel = find_kernel()
    if kernel is None:
        absent("a kernel for a guest; scripts/setup unpacks Debian's into .venv/kernel")
    node, drive = (_spare_disk(tmp_path, name) for name in ("node", "drive"))
    options = (
        *("-device", "pcie-root-port,id=port0,chassis=2,slot=2"),
        *("-device", "pcie-root-port,id=port1,chassis=3,slot=3"),
        *("-blockdev", f"driver=file,node-name=spare,filename={node}"),
        *("-device", "virtio-blk-pci,drive=spare,id=virtio2,bus=port0"),
        *("-drive", f"if=none,id=drive,format=raw,file={drive}"),
        *("-device", "virtio-blk-pci,drive=drive,id=virtio3,bus=port1"),
    )
    words = ("backup", "--json", "--speed", "64K", *felt, "--qmp")
    extra = Extra(options, script=OBEY)
    with running_guest(need, kernel, tmp_path, make_images(need, tmp_path), extra=extra) as guest:
        guest.console.hear("round 1")

        def backed_up_without(device: str, disk: str, archive: Path) -> tuple[int, str]:
            with started(*words, guest.qmp, archive) as process:
                next_event(process, "instant")
                guest.ask("device_del", id=device)
                guest.does(_IS_GONE.format(disk))
                assert eventually(lambda: device not in str(guest.ask("query-block")))
                guest.goes_on(1)
                with contextlib.suppress(AssertionError):  # it may have ended with the disk
                    without_limit(process)
                code, text = end_of(process)
            guest.is_untouched()
            guest.goes_on(1)
            return code, text

        code, text = backed_up_without("virtio2", "vdc", out / "node.vma")
        assert code == 0, text
        guest.ask("blockdev-del", **{"node-name": "spare"})
        code, text = backed_up_without("virtio3", "vdd", out / "drive.vma")
        # QEMU may have ended the job of a -drive with it.
        was_ended = "'drive-virtio3': it was removed from the machine" in text
        assert (code, was_ended) in ((0, False), (1, True)), text
        assert (out / "drive.vma").exists() is not was_ended
        good("backup", "--qmp", guest.qmp, out / "next.vma")
        guest.is_untouched()
    for archive, numbers in ((out / "node.vma", (2, 3)), (out / "drive.vma", (3,))):
        if archive.exists():
            folder = tmp_path / archive.stem
            good("restore", archive, folder)
            copies = {
                path.name: path.read_bytes() for path in folder.glob("disk-drive-virtio[23]*")
            }
            assert copies == {f"disk-drive-virtio{n}.raw": b"\x66" * SIZE for n in numbers}
