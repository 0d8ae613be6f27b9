# SPDX-License-Identifier: Apache-2.0
"""Makes images.tar.zst, the disks of tests/access/files/test_appliance.py: run it by hand, as root or not.

    .venv/bin/python -m tests.access.images.make

A guest fills them and is killed while they are mounted, a moment after it has made files and
called fsync: their logs hold what the trees do not. That takes device mapper, which a host may lack.
"""

from __future__ import annotations

import os
import random
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import zstandard

from tests.guest import Kernel, booted, find_kernel
from vmapipe.access.files.appliance_image import Initramfs, find_program
from vmapipe.access.machine import kernels

IMAGES = Path(__file__).parent / "images.tar.zst"
KEY = b"the key of the test\nwith a second line\0and more"
_MODULES = (
    *("virtio_pci", "virtio_blk", "dm_mod", "dm_thin_pool", "dm_crypt", "xts", "aesni_intel"),
    *("aes_generic", "sha256_generic", "algif_skcipher", "algif_hash", "xfs", "btrfs", "ext4"),
    *("crc32c_generic", "xxhash_generic", "blake2b_generic"),
)
_PROGRAMS = ("lvm", "cryptsetup", "mkfs.xfs", "mkfs.ext4")
_DISKS = {"xfs": 320, "btrfs": 160, "luks2": 12, "lvm0": 400, "lvm1": 64, "fast": 16}
_LVM = 'activation{udev_sync=0 udev_rules=0} devices{external_device_info_source="none"}'
_SCRIPT = f"""\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/bin:/usr/sbin DM_DISABLE_UDEV=1
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs devtmpfs /dev
exec </dev/ttyS1 >/dev/ttyS0 2>&1
stty -echo
say() {{ echo "$*" >/dev/ttyS1; }}
say
for module in $(cat /modules/order); do insmod /modules/$module.ko; done
trap 'say failed: the script ended; poweroff -f' EXIT
set -e
until [ -b /dev/vdf ]; do sleep 0.1; done
# A tree as it is found on real disks, synced; then one that only the log has.
fill() {{
    mkdir $1/old
    echo before > $1/old/file
    sync
    mkdir $1/new
    echo after > $1/new/file
    printf odd > "$1/new/$(printf 'line\\n\\377\\t')x"
    ln -s ../old/file $1/new/link
    ln $1/new/file $1/new/second
    mkfifo $1/new/fifo
    mknod $1/new/null c 1 3
    truncate -s 30000000 $1/new/sparse
    printf middle | dd of=$1/new/sparse bs=1 seek=20000000 conv=notrunc
    chown 1000:100 $1/new/second
    chmod 4750 $1/new/second
    touch -d '2020-02-02 02:02:02' $1/new/sparse
    ls / > $1/new/gone && rm $1/new/gone
}}
settle() {{
    for file in $1/new/sparse $1/new/line* $1/new/file; do
        dd if=/dev/null of="$file" conv=notrunc,fsync
    done
}}
lvm() {{ what=$1; shift; /usr/sbin/lvm $what --config '{_LVM}' -y "$@"; }}
mkdir -p /mnt/xfs /mnt/btrfs /mnt/luks2 /mnt/thin /mnt/linear /mnt/fast
mount -t xfs /dev/vda /mnt/xfs
mount -t btrfs /dev/vdb /mnt/btrfs
cryptsetup luksFormat --type luks2 --key-file /key --disable-locks --batch-mode \\
    --pbkdf argon2id --pbkdf-memory 32 --pbkdf-force-iterations 4 \\
    --luks2-metadata-size 16k --luks2-keyslots-size 256k /dev/vdc2
cryptsetup open --key-file /key --disable-locks --batch-mode /dev/vdc2 opened
lvm pvcreate /dev/mapper/opened
lvm vgcreate -s 256k inner /dev/mapper/opened
lvm lvcreate -Wn -Zn -L 7M -n root inner
mkfs.ext4 -q -O ^has_journal -N 64 /dev/mapper/inner-root
mount -t ext4 /dev/mapper/inner-root /mnt/luks2
lvm pvcreate /dev/vdd /dev/vde
lvm vgcreate group /dev/vdd /dev/vde
lvm lvcreate -Wn -Zn -L 316M -n linear group /dev/vdd
lvm lvcreate -Wn -Zn -L 32M -V 200M -T group/pool -n thin
mkfs.xfs -q /dev/mapper/group-linear
mkfs.ext4 -q /dev/mapper/group-thin
mount -t xfs /dev/mapper/group-linear /mnt/linear
mount -t ext4 /dev/mapper/group-thin /mnt/thin
mkfs.ext4 -q -O fast_commit /dev/vdf
mount -t ext4 /dev/vdf /mnt/fast
for name in xfs btrfs luks2 linear thin fast; do fill /mnt/$name; done
sync /mnt/thin
for name in xfs btrfs luks2 linear fast; do settle /mnt/$name; done
say ready
read answer
"""


def many_files() -> Iterator[tuple[str, bytes]]:
    """What is on the btrfs from its beginning: 10,000 files of different sizes and texts."""
    chance = random.Random(15)
    for number in range(10_000):
        # Texts that compress: the images are kept with the tests.
        text = b"%06d\n" % number * chance.choice((0, 1, 1, 2, 3, 500))
        yield f"many/{number % 100}/file {number}", text


def unpack(folder: Path) -> None:
    """Write the images, sparse as they were, into a folder."""
    with zstandard.open(IMAGES, "rb") as packed, tarfile.open(fileobj=packed, mode="r|") as archive:
        archive.extractall(folder, filter="data")


def _initramfs(kernel: kernels.Kernel, busybox: str) -> bytes:
    made = Initramfs()
    for folder in ("/bin", "/dev", "/etc", "/mnt", "/proc", "/run", "/sys", "/tmp"):
        made.add_folder(folder)
    made.add_file("/bin/busybox", Path(busybox).read_bytes(), 0o755)
    for program in _PROGRAMS:
        path = find_program(program)
        assert path is not None, program
        made.add_program(path)
    order = kernel.chain(_MODULES)
    for module in order:
        made.add_file(f"/modules/{module}.ko", kernel.module(module))
    made.add_file("/modules/order", "\n".join(order).encode())
    made.add_file("/key", KEY)
    made.add_file("/init", _SCRIPT.encode(), 0o755)
    return made.finish()


def main() -> None:
    unpacked = find_kernel()
    busybox = find_program("busybox")
    assert unpacked is not None
    assert busybox is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for disk, mib in _DISKS.items():
            with (folder / disk).open("wb") as file:
                file.truncate(mib << 20)
        for place, text in many_files():
            (folder / "tree" / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / "tree" / place).write_bytes(text)
        os.setxattr(folder / "tree/many", "user.colour", b"blue")
        subprocess.run(["mkfs.xfs", "-q", folder / "xfs"], check=True)
        subprocess.run(
            ["mkfs.btrfs", "-q", "-m", "single", "--rootdir", folder / "tree", folder / "btrfs"],
            check=True,
        )
        table = b"label: gpt\nsize=1M\nsize=9M\n"
        subprocess.run(["sfdisk", "-q", folder / "luks2"], input=table, check=True)
        initramfs = folder / "initramfs"
        kernel = kernels.find_kernel(str(unpacked.image.parent.parent), ())
        initramfs.write_bytes(_initramfs(kernel, busybox))
        options = ["-m", "512"]
        for disk in _DISKS:
            options += [
                "-drive",
                f"if=none,id={disk},format=raw,file={folder}/{disk},discard=unmap",
            ]
            options += ["-device", f"virtio-blk-pci,drive={disk}"]
        with booted(
            "qemu-system-x86_64", Kernel(unpacked.image, unpacked.drivers), initramfs, options
        ) as guest:
            guest.hear("ready", 180)
            (folder / "copy").mkdir()
            for disk in _DISKS:
                subprocess.run(
                    ["cp", "--sparse=always", folder / disk, folder / "copy"], check=True
                )
        words = [
            "tar",
            "--sparse",
            "--owner=0",
            "--group=0",
            "--numeric-owner",
            "-I",
            "zstd -19 --long=27",
        ]
        subprocess.run([*words, "-cf", IMAGES, "-C", folder / "copy", *_DISKS], check=True)
    print(IMAGES, os.path.getsize(IMAGES))


if __name__ == "__main__":
    main()
