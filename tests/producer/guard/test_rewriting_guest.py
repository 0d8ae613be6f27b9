# SPDX-License-Identifier: Apache-2.0
"""A guest that rewrites its files while its disk is backed up: the archive has the old ones."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from tests.conftest import absent
from tests.guest import Kernel, booted, find_kernel, make_initramfs, virtio_disk
from tests.machine import LIMIT_S, Need
from tests.producer.guard.serving import serving
from tests.producer.guard.slow_backup import MIB, during_a_backup, restored, run

# The guest says how far it is; the test says when to go on.
GUEST_SCRIPT = """
mount -t ext4 /dev/vda /mnt
mkdir /mnt/early
for n in 1 2 3; do dd if=/dev/urandom of=/mnt/early/$n bs=64k count=12 2>/dev/null; done
sync
cd /mnt
for file in prepared/* early/*; do say file $(md5sum $file); done
say ready
read word
# Everything that was complete is changed, in place where that is possible.
for file in prepared/* early/*; do
    dd if=/dev/urandom of=$file bs=64k count=12 conv=notrunc,fsync 2>/dev/null
done
rm prepared/3 early/2
mv prepared/4 moved
mkdir late
for n in 1 2 3 4 5 6; do dd if=/dev/urandom of=late/$n bs=100k count=7 conv=fsync 2>/dev/null; done
for file in prepared/* early/* late/*; do say file $(md5sum $file); done
say written
read word
cd /
umount /mnt
say unmounted
trap - EXIT
poweroff -f
"""


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    found = find_kernel()
    if found is None:
        absent("linux-image-cloud-amd64, or its kernel cannot be read")
        raise AssertionError  # absent() does not return
    return found


def test_a_guest_rewrites_its_files_while_a_backup_runs_which_has_the_old_ones(
    tmp_path: Path, need: Need, kernel: Kernel
) -> None:
    names = ("qemu-system-x86_64", "busybox", "mke2fs", "e2fsck", "debugfs")
    qemu, busybox, mke2fs, e2fsck, debugfs = need(*names)
    tree = tmp_path / "tree"
    (tree / "prepared").mkdir(parents=True)
    chance = random.Random(4)
    for number in range(8):
        (tree / "prepared" / str(number)).write_bytes(chance.randbytes(MIB + 1000 * number))
    disk = tmp_path / "d.raw"
    run(mke2fs, "-q", "-t", "ext4", "-d", tree, disk, "48M")
    initramfs = tmp_path / "initramfs.gz"
    initramfs.write_bytes(make_initramfs(kernel, Path(busybox), GUEST_SCRIPT))
    archive = tmp_path / "vm.vma"
    with (
        serving(tmp_path, d=disk) as served,
        booted(qemu, kernel, initramfs, virtio_disk(served.socket("d"), "d")) as guest,
    ):
        before = digests(guest.hear("ready"))
        with during_a_backup(served, archive):
            guest.tell("go on")
            after = digests(guest.hear("written"))
        guest.tell("go on")
        guest.hear("unmounted")
        assert guest.process.wait(LIMIT_S) == 0
    for number in range(8):
        content = (tree / "prepared" / str(number)).read_bytes()
        assert before[f"prepared/{number}"] == md5(content)
    assert len(before) == 11
    copy = restored(archive)
    # As after a power cut: the journal brings back what it promised, and then all is sound.
    run(e2fsck, "-y", "-E", "journal_only", copy)
    run(e2fsck, "-fn", copy)
    assert md5_in(debugfs, copy, before) == before
    assert "late" not in run(debugfs, "-R", "ls -p /", copy)
    # The guest's own disk has the new ones, and so had reason to disturb the backup.
    run(e2fsck, "-fn", disk)
    assert md5_in(debugfs, disk, after) == after
    both = before.keys() & after.keys()
    assert len(both) == 8
    assert all(before[name] != after[name] for name in both)


def digests(lines: list[str]) -> dict[str, str]:
    """The guest's "file DIGEST NAME" lines, by name."""
    words = [line.split() for line in lines if line.startswith("file ")]
    return {name: digest for _, digest, name in words}


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def md5_in(debugfs: str, image: Path, names: dict[str, str]) -> dict[str, str]:
    """The digests of files in a file system that is not mounted."""
    folder = image.parent / f"{image.stem}-files"
    folder.mkdir()
    script = folder / "commands"
    outs = {name: folder / name.replace("/", "-") for name in names}
    script.write_text("".join(f"dump /{name} {out}\n" for name, out in outs.items()))
    run(debugfs, "-f", script, image)
    return {name: md5(out.read_bytes()) for name, out in outs.items()}
