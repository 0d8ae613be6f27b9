# SPDX-License-Identifier: Apache-2.0
"""Which disks of a real QEMU are taken, from where they are read, and what is said of the others."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.control.qemu.paused_machine import PausedMachine, paused_machine
from tests.machine import Need, bad, end_of, good, next_event, run, started, without_limit

MIB = 1 << 20
VIRTIO = "/machine/peripheral/virtio0/virtio-backend"


def image(need: Need, path: Path, kind: str = "raw", size: str = "8M", *options: str) -> Path:
    qemu_img, qemu_io = need("qemu-img", "qemu-io")
    words = [qemu_img, "create", "-q", "-f", kind, *options, str(path), size]
    subprocess.run(words, check=True)
    if not options:
        words = [qemu_io, "-f", kind, "-c", "write -q -P 0x66 0 2M", str(path)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return path


def backup(machine: PausedMachine, folder: Path, *words: str) -> tuple[dict[str, bytes], Any]:
    """The contents of what was stored, by name, and the events."""
    archive, out = folder / "vm.vma", folder / "out"
    text = good("backup", "--json", "--qmp", machine.qmp, *words, archive)
    events = [json.loads(line) for line in text.splitlines()]
    good("restore", archive, out)
    names = next(e for e in events if e["event"] == "begun")["devices"]
    assert machine.ours() == []
    return {d["name"]: (out / f"disk-{d['name']}.raw").read_bytes() for d in names}, events


def skipped(events: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    return {e["device"]: (e["level"], e["reason"]) for e in events if e["event"] == "skipped"}


def raw(node: str, file: str, *more: str) -> tuple[str, ...]:
    options = ",".join((f"driver=raw,node-name={node},file.driver=file", f"file.filename={file}"))
    return ("-blockdev", ",".join((options, *more)))


# Of a guest's disk, with which its backup would take half an hour. QEMU lets the first request
# through at once, whatever the limit; where two filters share it, the second one waits a second for 4 KiB.
LIMIT = ("-object", "throttle-group,id=g,x-bps-total=4096")
# What it looks like, from the device down to the node that is read.
CHAINS = {
    "throttle": ("throttle,throttle-group=g,file=fmt",),
    "two": (
        "throttle,throttle-group=g,file=t2",
        "throttle,node-name=t2,throttle-group=g,file=fmt",
    ),
    "copy-on-read": (
        "copy-on-read,file=t2",
        "throttle,node-name=t2,throttle-group=g,file=fmt",
    ),
    "raw": ("raw,file=t2", "throttle,node-name=t2,throttle-group=g,file=fmt"),
}


@pytest.mark.every_qemu
@pytest.mark.parametrize(
    ("chain", "kind"),
    [("throttle", "qcow2"), ("two", "raw"), ("copy-on-read", "qcow2"), ("raw", "raw")],
)
def test_a_backup_does_not_use_up_what_a_throttle_filter_lets_its_guest_have(
    qemu: str, need: Need, tmp_path: Path, chain: str, kind: str
) -> None:
    image(need, tmp_path / "a", kind)
    first, *others = CHAINS[chain]
    nodes = [
        *("-blockdev", f"driver={kind},node-name=fmt,file.driver=file,file.filename={{d}}/a"),
        *(word for other in reversed(others) for word in ("-blockdev", f"driver={other}")),
        *("-blockdev", f"driver={first},node-name=drive-virtio0"),
    ]
    device = (
        *("-object", "iothread,id=io"),
        *("-device", "virtio-blk-pci,drive=drive-virtio0,id=virtio0,iothread=io"),
    )
    with paused_machine(need, tmp_path, *LIMIT, *nodes, *device) as machine:
        words = ("backup", "--json", "--qmp", machine.qmp, "--speed", "64K", tmp_path / "vm.vma")
        with started(*words) as process:
            next_event(process, "instant")
            machine.write(VIRTIO, "write -P 0x77 1536k 4k")
            without_limit(process)
            assert end_of(process)[0] == 0
        assert machine.ours() == []
    good("restore", tmp_path / "vm.vma", tmp_path / "out")
    content = (tmp_path / "out" / "disk-drive-virtio0.raw").read_bytes()
    assert content == b"\x66" * (2 * MIB) + bytes(6 * MIB)


def test_what_a_copy_on_read_filter_would_copy_is_not_copied_for_a_backup(
    qemu: str, need: Need, tmp_path: Path
) -> None:
    base = image(need, tmp_path / "base")
    top = image(need, tmp_path / "top", "qcow2", "8M", "-b", str(base), "-F", "raw")
    empty = top.stat().st_size
    nodes = (
        *("-blockdev", "driver=qcow2,node-name=fmt,file.driver=file,file.filename={d}/top"),
        *("-blockdev", "driver=copy-on-read,node-name=c,file=fmt"),
        *("-device", "virtio-blk-pci,drive=c,id=virtio0"),
    )
    with paused_machine(need, tmp_path, *nodes) as machine:
        contents, _ = backup(machine, tmp_path)
    assert contents == {"drive-virtio0": base.read_bytes()}
    # QEMU itself fills up the clusters of its tables.
    assert top.stat().st_size < empty + MIB


def test_a_filter_that_is_not_only_the_guests_stays_in_the_way(
    qemu: str, need: Need, tmp_path: Path
) -> None:
    """What blkdebug makes of a disk is what the guest has; an offset is a part of the disk."""
    image(need, tmp_path / "a")
    nodes = (
        *raw("fmt", "{d}/a"),
        *("-blockdev", "driver=throttle,node-name=t,throttle-group=g,file=fmt"),
        *("-blockdev", "driver=raw,node-name=part,offset=1048576,size=2097152,file=t"),
        *("-device", "virtio-blk-pci,drive=part,id=virtio0"),
    )
    limit = ("-object", "throttle-group,id=g,x-bps-total=100000000")
    with paused_machine(need, tmp_path, *limit, *nodes) as machine:
        contents, _ = backup(machine, tmp_path)
    assert contents == {"drive-virtio0": b"\x66" * MIB + bytes(MIB)}
    (tmp_path / "b").mkdir()
    broken = (
        *raw("fmt", "{d}/a"),
        *("-blockdev", "driver=blkdebug,node-name=bad,image=fmt,inject-error.0.event=none"),
        *("-device", "virtio-blk-pci,drive=bad,id=virtio0"),
    )
    image(need, tmp_path / "b" / "a")
    with paused_machine(need, tmp_path / "b", *broken) as machine:
        words = ("backup", "--qmp", machine.qmp, tmp_path / "broken.vma")
        assert "Input/output error" in bad(*words)


@pytest.mark.every_qemu
def test_nodes_that_are_no_disks_are_neither_offered_nor_taken(
    qemu: str, need: Need, tmp_path: Path
) -> None:
    base = image(need, tmp_path / "base")
    image(need, tmp_path / "top", "qcow2", "8M", "-b", str(base), "-F", "raw")
    image(need, tmp_path / "copy")
    nodes = (
        *("-blockdev", "driver=file,node-name=fil,filename={d}/top"),
        *raw("below", "{d}/base", "read-only=on"),
        *("-blockdev", "driver=qcow2,node-name=fmt,file=fil,backing=below"),
        *("-device", "virtio-blk-pci,drive=fmt,id=virtio0"),
        *("-blockdev", "driver=file,node-name=copy,filename={d}/copy"),
    )
    with paused_machine(need, tmp_path, *nodes) as machine:

        def refused(word: str, code: int) -> str:
            words = ("backup", "--qmp", machine.qmp, "--disk", word, tmp_path / "no.vma")
            return bad(*words, code=code)

        text = refused("vda", 2)
        assert text.endswith("the machine has no disk 'vda', but drive-virtio0")
        assert "'fil': it is part of 'fmt', not a disk: name 'fmt'" in refused("fil", 2)
        assert "it is the backing file of 'fmt'" in refused("below", 2)
        assert "the machine has no disk 'y'" in refused("x=y", 2)
        mirror = {"job-id": "m", "target": "copy", "sync": "full", "speed": 4096}
        machine.ask("blockdev-mirror", device="fmt", **mirror)
        assert "the block job 'm' (mirror) is writing to it" in refused("copy", 1)
        assert "a block job (mirror 'm') is running on it" in refused("virtio0", 1)
        machine.ask("job-cancel", id="m")
    assert not (tmp_path / "no.vma").exists()


@pytest.mark.every_qemu
def test_every_disk_that_is_not_in_the_archive_is_named_with_the_reason(
    qemu: str, need: Need, tmp_path: Path
) -> None:
    for name in ("a", "b", "c"):
        image(need, tmp_path / name)
    options = (
        *("-device", "virtio-scsi-pci,id=bus"),
        *("-drive", "if=none,id=d0,format=raw,file={d}/a", "-device", "scsi-hd,drive=d0,id=scsi0"),
        *("-drive", "if=none,id=d1,format=raw,file={d}/b,readonly=on"),
        *("-device", "scsi-hd,drive=d1,id=scsi1"),
        *("-drive", "if=none,id=d2,format=raw,file={d}/c,readonly=on,media=cdrom"),
        *("-device", "scsi-cd,drive=d2,id=scsi2", "-device", "scsi-cd,id=scsi3"),
        *("-object", "memory-backend-file,id=n,mem-path={d}/nv,size=4M,share=on"),
        *("-device", "nvdimm,id=nv0,memdev=n"),
    )
    (tmp_path / "nv").write_bytes(bytes(4 * MIB))
    with paused_machine(need, tmp_path, *options, memory="64,slots=1,maxmem=256M") as machine:
        contents, events = backup(machine, tmp_path)
        assert list(contents) == ["drive-scsi0"]
        assert {name: level for name, (level, _) in skipped(events).items()} == {
            "drive-scsi1": "warn",
            "drive-scsi2": "info",
            "drive-scsi3": "debug",
            "drive-nv0": "warn",
        }
        # Who names it has it, read-only or not; the rest is named all the same.
        log = tmp_path / "log"
        words = ("--disk", "root=scsi1", "--log", log, tmp_path / "two.vma")
        text = good("backup", "--qmp", machine.qmp, *words).decode()
        assert "not in the archive: drive-scsi0: --disk chooses others" in text
        assert "drive-scsi3" not in text
        assert "exclude disk 'nv0' (it is persistent memory (nvdimm)" in log.read_text()
        assert b"root" in run("list", tmp_path / "two.vma").stdout


def test_disks_of_one_name_are_named_anew(qemu: str, need: Need, tmp_path: Path) -> None:
    image(need, tmp_path / "a", size="2M")
    image(need, tmp_path / "b", size="4M")
    options = (
        *("-drive", "if=none,id=x,format=raw,file={d}/a"),
        *("-device", "virtio-blk-pci,drive=x,id=scsi0"),
        *("-drive", "if=none,id=y,format=raw,file={d}/b"),
        *("-device", "virtio-blk-pci,drive=y,id=drive-scsi0"),
    )
    with paused_machine(need, tmp_path, *options) as machine:
        text = bad("backup", "--qmp", machine.qmp, tmp_path / "no.vma", code=2)
        assert "two devices have the name 'drive-scsi0'" in text
        assert "--disk NAME1=x --disk NAME2=y" in text
        words = ("--disk", "root=scsi0", "--disk", "data=drive-scsi0")
        contents, _ = backup(machine, tmp_path, *words)
        assert {name: len(data) for name, data in contents.items()} == {
            "root": 2 * MIB,
            "data": 4 * MIB,
        }


@pytest.mark.every_qemu
def test_a_machine_that_waits_for_its_migration_is_not_backed_up_here(
    qemu: str, need: Need, tmp_path: Path
) -> None:
    image(need, tmp_path / "a")
    options = (*raw("a", "{d}/a"), "-device", "virtio-blk-pci,drive=a", "-incoming", "defer")
    with paused_machine(need, tmp_path, *options) as machine:
        text = bad("backup", "--qmp", machine.qmp, tmp_path / "no.vma")
        assert "the machine waits for an incoming migration (run state inmigrate)" in text
        assert machine.ours() == []


def test_the_configuration_of_a_proxmox_machine_says_which_disks_are_taken(
    qemu: str, need: Need, tmp_path: Path
) -> None:
    config = tmp_path / "100.conf"
    config.write_text(
        "scsi0: local-lvm:vm-100-disk-0,size=8M\n"
        "scsi1: local-lvm:vm-100-disk-1,backup=0,size=8M\n"
        "scsi2: local:100/vm-100-disk-2.raw,ro=1,size=8M\n"
        "scsi3: local-lvm:vm-100-disk-3,size=8M\n"
        "ide2: local:iso/x.iso,media=cdrom\n"
    )
    options = ["-device", "virtio-scsi-pci,id=bus", "-device", "ide-cd,id=ide2"]
    for index in range(3):
        image(need, tmp_path / str(index))
        read_only = ",read-only=on" if index == 2 else ""
        options += raw(f"n{index}", f"{{d}}/{index}", "auto-read-only=off" + read_only)
        options += ["-device", f"scsi-hd,drive=n{index},id=scsi{index}"]
    folder = tmp_path / "dump"
    folder.mkdir()
    with paused_machine(need, tmp_path, *options) as machine:
        words = ("--json", "--qmp", machine.qmp, "--vmid", "100", "--config", config, folder)
        events = [json.loads(line) for line in good("backup", *words).splitlines()]
        archive = next(folder.glob("*.vma"))
        names = [d["name"] for d in next(e for e in events if e["event"] == "begun")["devices"]]
        assert names == ["drive-scsi0", "drive-scsi2"]
        assert {name: level for name, (level, _) in skipped(events).items()} == {
            "drive-scsi1": "info",
            "drive-scsi3": "warn",
            "drive-ide2": "debug",
        }
        stored = good("config", archive).decode()
        assert "#scsi1: " in stored
        assert "#scsi3: " in stored
        assert "\nscsi2: local:100/vm-100-disk-2.raw,ro=1,size=8M\n" in stored
        log = next(folder.glob("*.log")).read_text()
        assert "exclude disk 'scsi1' (backup=0 in the machine's configuration)" in log
        # Who names a disk has it, whatever the configuration says.
        again = ("--qmp", machine.qmp, "--vmid", "101", "--disk", "scsi1", folder)
        good("backup", "--config", f"qemu-server.conf={config}", *again)
        stored = good("config", next(folder.glob("*-101-*.vma"))).decode()
        assert "\nscsi1: local-lvm:vm-100-disk-1,size=8M\n" in "\n" + stored
