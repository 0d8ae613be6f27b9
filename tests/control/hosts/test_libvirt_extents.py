# SPDX-License-Identifier: Apache-2.0
"""What virtnbdbackup, another program for libvirt's backup jobs, reads of a domain is what we read."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.control.hosts.libvirtd import Libvirtd, disk_xml, domain_xml
from tests.machine import LIMIT_S, Need, good

pytestmark = pytest.mark.soak

MIB = 1 << 20
CLUSTER = 1 << 16
SIZE = 16 * MIB
NAMES = ("vda", "vdb")


class Domain(NamedTuple):
    """A machine that stands still, with two disks; `write` writes in its guest's place."""

    libvirtd: Libvirtd
    name: str

    def write(self, disk: str, offset: int, length: int, pattern: int = 0) -> None:
        """`pattern` 0: zeroes without data, as a guest's discard."""
        number = NAMES.index(disk)
        what = f"write -P {pattern}" if pattern else "write -z -u"
        device = f"/machine/peripheral/virtio-disk{number}/virtio-backend"
        command = f'qemu-io -d {device} "{what} {offset} {length}"'
        self.libvirtd("qemu-monitor-command", self.name, "--hmp", command)


@contextmanager
def standing(libvirtd: Libvirtd, qemu: str, name: str, images: list[Path]) -> Iterator[Domain]:
    folder = libvirtd.folder / name
    folder.mkdir()
    for image in images:
        shutil.copy(image, folder)
    libvirtd.give(folder)
    devices = "".join(
        disk_xml(target, folder / image.name, "qcow2")
        for target, image in zip(NAMES, images, strict=True)
    )
    libvirtd.define(domain_xml(libvirtd, qemu, name, devices))
    libvirtd("start", name, "--paused")
    try:
        yield Domain(libvirtd, name)
    finally:
        libvirtd("destroy", name)


def virtnbdbackup(program: str, domain: Domain, level: str, out: Path) -> None:
    libvirtd = domain.libvirtd
    words = [program, "-U", libvirtd.uri, "-d", domain.name, "-l", level, "-o", str(out), "-n"]
    words += ["-S", str(libvirtd.scratch), "-f", str(libvirtd.scratch / "other.sock")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr


class Frame(NamedTuple):
    """Bytes [start, start + length) of a disk in its archive; `data` None: zeroes."""

    start: int
    length: int
    data: bytes | None


def frames(path: Path) -> Iterator[Frame]:
    """Read an archive of one disk: lines `KIND START LENGTH`, hexadecimal, and bytes behind those of data."""
    with path.open("rb") as file:
        while (line := file.readline()) and not line.startswith(b"stop"):
            kind, start, length = line.split()
            place = int(start, 16), int(length, 16)
            data = None if kind == b"zero" else file.read(place[1])
            assert kind == b"zero" or file.read(2) == b"\r\n"
            if kind in (b"data", b"zero"):
                yield Frame(*place, data)


def clusters(found: list[Frame]) -> set[int]:
    return {
        cluster
        for frame in found
        for cluster in range(frame.start // CLUSTER, -(-(frame.start + frame.length) // CLUSTER))
    }


def backup(domain: Domain, out: Path, *more: str) -> dict[str, Any]:
    """By us; what is told last of each disk."""
    libvirtd = domain.libvirtd
    where = ("--connect", libvirtd.uri, "--scratch", libvirtd.scratch)
    lines = good("backup", "--json", "--libvirt", domain.name, *where, *more, out).splitlines()
    progress = [e["devices"] for e in map(json.loads, lines) if e["event"] == "progress"][-1]
    return {device["name"]: device for device in progress}


def test_data_is_read_where_virtnbdbackup_reads_it_in_full_and_incremental_backups(
    libvirtd: Libvirtd, need: Need, tmp_path: Path
) -> None:
    qemu, qemu_img = need("qemu-system-x86_64", "qemu-img")
    (theirs,) = need("virtnbdbackup")
    archives = [tmp_path / f"vm-2026-01-0{day}.vma" for day in (1, 2)]
    chance, images = random.Random(1), []
    for name in NAMES:
        raw = tmp_path / f"{name}.raw"
        with raw.open("wb") as file:
            file.truncate(SIZE)
            for _ in range(12):
                file.seek(chance.randrange(0, SIZE - MIB, CLUSTER))
                file.write(chance.randbytes(chance.randrange(1, 8) * CLUSTER))
            file.seek(9 * MIB)
            file.write(chance.randbytes(MIB))
        images.append(tmp_path / f"{name}.qcow2")
        words = [qemu_img, "convert", "-f", "raw", "-O", "qcow2", str(raw), str(images[-1])]
        subprocess.run(words, check=True, timeout=LIMIT_S)
    with (
        standing(libvirtd, qemu, "ours", images) as ours,
        standing(libvirtd, qemu, "theirs", images) as other,
    ):
        full = backup(ours, archives[0], "--base", "auto")
        virtnbdbackup(theirs, other, "full", tmp_path / "theirs")
        for machine in (ours, other):
            machine.write("vda", 3 * MIB + 512, 100_352, 0x11)
            machine.write("vdb", 5 * MIB, 2 * MIB, 0x22)
            machine.write("vdb", 9 * MIB, MIB)
        changed = backup(ours, archives[1], "--base", "auto")
        virtnbdbackup(theirs, other, "inc", tmp_path / "theirs")
    for archive in archives:
        good("restore", archive, tmp_path / archive.stem)
    for name in NAMES:
        disk = bytearray(SIZE)
        whole = list(frames(tmp_path / "theirs" / f"{name}.full.data"))
        since = list(frames(tmp_path / "theirs" / f"{name}.inc.virtnbdbackup.1.data"))
        states = []
        for part in (whole, since):
            for frame in part:
                disk[frame.start : frame.start + frame.length] = frame.data or bytes(frame.length)
            states.append(bytes(disk))
        ours_then = [(tmp_path / a.stem / f"disk-{name}.raw").read_bytes() for a in archives]
        assert ours_then == states
        # No cluster with data is all zeroes here.
        read = clusters([frame for frame in whole if frame.data is not None])
        assert read == {
            n for n in range(SIZE // CLUSTER) if any(states[0][n * CLUSTER :][:CLUSTER])
        }
        assert full[name]["zero_bytes"] == SIZE - CLUSTER * len(read)
        # All that is dirty has changed, so as many clusters are the same ones.
        dirty = clusters(since)
        assert dirty == {
            n
            for n in range(SIZE // CLUSTER)
            if states[0][n * CLUSTER :][:CLUSTER] != states[1][n * CLUSTER :][:CLUSTER]
        }
        assert changed[name]["unchanged_bytes"] == SIZE - CLUSTER * len(dirty)
