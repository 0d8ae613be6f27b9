# SPDX-License-Identifier: Apache-2.0
"""Targets that are something else than a raw disk, or larger, or named by mistake."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from tests.archives import archive
from tests.machine import LIMIT_S, VMA, Need, bad, good, make_disk
from tests.restore.support import is_root
from vmapipe.runtime.image_format import format_of_content, format_of_name

MIB = 1 << 20
DISK = (b"\xaa" * 65536 + bytes(65536)) * 32
FORMATS = ["qcow2", "qed", "vdi", "vhdx", "vmdk", "vpc"]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "vm.vma"
    path.write_bytes(archive({"d": DISK}, {"vm.conf": b"name: web\n"}))
    return path


def qemu_img(*words: str | Path) -> bytes:
    done = subprocess.run(["qemu-img", *map(str, words)], capture_output=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def raw_of(image: Path, image_format: str, size_bytes: int = len(DISK)) -> bytes:
    raw = image.with_suffix(".out")
    qemu_img("convert", "-f", image_format, "-O", "raw", image, raw)
    return raw.read_bytes()[:size_bytes]


def driver_of(image: Path) -> str:
    raw = image.read_bytes()
    found = format_of_content(lambda at, length: raw[at : at + length], len(raw))
    return found.driver if found is not None else ""


def heads() -> dict[str, tuple[int, bytes]]:
    return {
        "qcow2": (0, b"QFI\xfb\0\0\0\3"),
        "vmdk": (0, b"KDMV\1\0\0\0"),
        "a vmdk image": (0, b"# Disk DescriptorFile\nversion=1\n"),
        "vhdx": (0, b"vhdxfile"),
        "vpc": (0, b"conectix"),
        "a vpc image": (len(DISK) - 512, b"conectix"),
        "vdi": (0x40, struct.pack("<I", 0xBEDA107F)),
        "qed": (0, b"QED\0"),
        "a parallels image": (0, b"WithouFreSpacExt"),
        "a LUKS container": (0, b"LUKS\xba\xbe\0\2"),
        "an ISO 9660 image": (32769, b"CD001"),
        "a VMA archive": (0, b"VMA\0\0\0\0\1"),
        "a zstd file": (0, b"\x28\xb5\x2f\xfd"),
        "a tar file": (257, b"ustar"),
    }


@pytest.mark.parametrize("what", heads())
def test_what_is_not_a_raw_disk_is_overwritten_only_when_that_is_said(
    tmp_path: Path, stored: Path, what: str
) -> None:
    at, magic = heads()[what]
    target = tmp_path / "target"
    target.write_bytes(bytes(len(DISK)))
    with target.open("r+b") as file:
        file.seek(at)
        file.write(magic)
    before = target.read_bytes()
    (tmp_path / "map").write_text(f"0:d={target}\n", encoding="utf-8")
    text = bad("restore", stored, tmp_path / "o", "--device", f"d={target}", code=2)
    assert f"looks like {what}" in text or f"looks like a {what} image" in text
    assert f"d={target},format=raw" in text
    bad("extract", "-r", tmp_path / "map", stored, tmp_path / "o", tool=VMA, code=2)
    bad("restore", stored, tmp_path / "o", "--map", tmp_path / "map", code=2)
    assert target.read_bytes() == before
    assert not (tmp_path / "o").exists()
    good("restore", stored, tmp_path / "o", "--device", f"d={target},format=raw")
    assert target.read_bytes() == DISK
    target.write_bytes(before)
    good("restore", stored, tmp_path / "o2", "--device", f"d={target}", "--overwrite")
    assert target.read_bytes() == DISK
    target.write_bytes(before)
    (tmp_path / "map").write_text(f"format=raw:1:d={target}\n", encoding="utf-8")
    good("extract", "-r", tmp_path / "map", stored, tmp_path / "o3", tool=VMA)
    assert target.read_bytes() == DISK


@pytest.mark.parametrize("image_format", FORMATS)
def test_real_images_are_known_for_what_they_are(
    tmp_path: Path, need: Need, image_format: str
) -> None:
    need("qemu-img")
    image = tmp_path / "image"
    qemu_img("create", "-q", "-f", image_format, image, "8M")
    assert driver_of(image) == image_format


def test_a_fixed_vhd_and_a_descriptor_are_known(tmp_path: Path, need: Need) -> None:
    need("qemu-img")
    qemu_img("create", "-q", "-f", "vpc", "-o", "subformat=fixed", tmp_path / "a.vhd", "8M")
    qemu_img("create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", tmp_path / "b", "8M")
    for name, driver in (("a.vhd", "vpc"), ("b", "vmdk")):
        assert driver_of(tmp_path / name) == driver


def test_a_raw_disk_with_whatever_is_on_it_is_overwritten_as_ever(
    tmp_path: Path, stored: Path, need: Need
) -> None:
    (mkfs,) = need("mkfs.ext4")
    for partitioned in (False, True):
        target = tmp_path / "disk.img"
        target.write_bytes(bytes(len(DISK)))
        if partitioned:
            with target.open("r+b") as file:
                file.seek(510)
                file.write(b"\x55\xaa")
        else:
            subprocess.run([mkfs, "-q", target], check=True, timeout=LIMIT_S)
        good("restore", stored, tmp_path / "o", "--device", f"d={target}")
        assert target.read_bytes() == DISK


@pytest.mark.parametrize(
    "name", ["x.qcow2", "x.QCOW2", "x.vmdk", "x.vdi", "x.vhdx", "x.vhd", "x.qed"]
)
def test_a_new_file_with_the_name_of_a_format_needs_the_word(
    tmp_path: Path, stored: Path, name: str
) -> None:
    promised = format_of_name(name)
    target = tmp_path / name
    text = bad("restore", stored, tmp_path / "o", "--device", f"d={target}", code=2)
    assert f"say d={target},format={promised}, or d={target},format=raw" in text
    assert not target.exists()
    assert not (tmp_path / "o").exists()
    good("restore", stored, tmp_path / "o", "--device", f"d={target},format=raw")
    assert target.read_bytes() == DISK
    # And now it is there: still raw, under that name.
    bad("restore", stored, tmp_path / "o2", "--device", f"d={target}", code=2)
    good("restore", stored, tmp_path / "o2", "--device", f"d={target},format=raw")


@pytest.mark.parametrize("name", ["x.iso", "x.dmg", "x.hdd"])
def test_a_name_of_a_format_that_cannot_be_made_is_refused_too(
    tmp_path: Path, stored: Path, name: str
) -> None:
    text = bad("restore", stored, tmp_path / "o", "--device", f"d={tmp_path / name}", code=2)
    assert f"say d={tmp_path / name},format=raw" in text


@pytest.mark.parametrize(
    "name", ["x", "x.raw", "x.img", "x.bin", "vm-100-disk-0", "qcow2", "x.qcow2.old"]
)
def test_other_names_are_raw_disks(name: str) -> None:
    assert format_of_name(f"/some.qcow2/{name}") == ""


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("zeroes", ["0", "1"])
def test_the_drop_in_writes_into_the_image_that_a_map_names(
    tmp_path: Path, stored: Path, need: Need, image_format: str, zeroes: str
) -> None:
    need("qemu-img", "qemu-storage-daemon")
    image = tmp_path / "image"
    old = make_disk(tmp_path / "old.raw", "A" * 64)
    if zeroes == "1":
        qemu_img("convert", "-f", "raw", "-O", image_format, old, image)
    else:
        qemu_img("create", "-q", "-f", image_format, image, str(len(DISK)))
    (tmp_path / "map").write_text(
        f"throttling.group=g:format={image_format}:{zeroes}:d={image}\n", encoding="utf-8"
    )
    good("extract", "-r", tmp_path / "map", stored, tmp_path / "o", tool=VMA)
    assert raw_of(image, image_format) == DISK
    with stored.open("rb") as stream:
        out = tmp_path / "o2"
        good("extract", "-r", tmp_path / "map", "-", out, tool=VMA, stdin=stream)
    assert raw_of(image, image_format) == DISK


def test_an_existing_image_is_written_into_only_with_overwrite(
    tmp_path: Path, stored: Path, need: Need
) -> None:
    need("qemu-img", "qemu-storage-daemon")
    image = tmp_path / "x.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", make_disk(tmp_path / "old", "A" * 64), image)
    word = f"d={image},format=qcow2"
    text = bad("restore", stored, tmp_path / "o", "--device", word)
    assert "exists already and is not overwritten" in text
    good("restore", stored, tmp_path / "o", "--device", word, "--overwrite")
    assert raw_of(image, "qcow2") == DISK


@pytest.mark.parametrize(
    "kind", ["backing", "data file", "another format", "raw", "small", "large"]
)
def test_an_image_that_is_not_what_a_map_says_is_refused_and_not_written_to(
    tmp_path: Path, stored: Path, need: Need, kind: str
) -> None:
    need("qemu-img", "qemu-storage-daemon")
    image, base = tmp_path / "x.qcow2", make_disk(tmp_path / "base", "A" * 64)
    create = ["create", "-q", "-f", "qcow2"]
    match kind:
        case "backing":
            qemu_img(*create, "-b", base, "-F", "raw", image)
        case "data file":
            qemu_img(*create, "-o", f"data_file={tmp_path / 'data'}", image, str(len(DISK)))
        case "another format":
            qemu_img("create", "-q", "-f", "vmdk", image, str(len(DISK)))
        case "raw":
            image.write_bytes(bytes(len(DISK)))
        case "small":
            qemu_img(*create, image, str(len(DISK) - 512))
        case "large":
            qemu_img(*create, image, str(len(DISK) + 5 * MIB))
    before = image.read_bytes()
    (tmp_path / "map").write_text(f"format=qcow2:1:d={image}\n", encoding="utf-8")
    text = bad("extract", "-r", tmp_path / "map", stored, tmp_path / "o", tool=VMA)
    expected = {
        "backing": "refers to another file",
        "data file": "refers to another file",
        "another format": "is to be a qcow2 image, but is a vmdk image",
        "raw": "is to be a qcow2 image, but is not",
        "small": "unexpected size",
        "large": "unexpected size",
    }
    assert expected[kind] in text
    assert image.read_bytes() == before


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("size", [70_001, 512, 1, 65_537])
def test_disks_of_any_size_go_into_images(
    tmp_path: Path, need: Need, image_format: str, size: int
) -> None:
    need("qemu-img", "qemu-storage-daemon")
    disk = os.urandom(size)
    (tmp_path / "odd.vma").write_bytes(archive({"odd": disk}))
    image = tmp_path / f"odd.{image_format}"
    word = f"odd={image},format={image_format}"
    good("restore", tmp_path / "odd.vma", tmp_path / "o", "--device", word)
    whole = raw_of(image, image_format, 1 << 40)
    assert whole[:size] == disk
    assert whole[size:] == bytes(len(whole) - size)


def test_all_disks_become_images_at_once(tmp_path: Path, need: Need) -> None:
    need("qemu-img", "qemu-storage-daemon")
    disks = {"a": DISK, "b": DISK[:70_001], "vmstate": b"\1" * 65536}
    (tmp_path / "vm.vma").write_bytes(archive(disks, {"vm.conf": b"name: web\n"}))
    good("restore", tmp_path / "vm.vma", tmp_path / "o", "--format", "qcow2")
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [
        "disk-a.qcow2",
        "disk-b.qcow2",
        "vm.conf",
        "vmstate.bin",
    ]
    assert raw_of(tmp_path / "o" / "disk-a.qcow2", "qcow2") == DISK
    assert raw_of(tmp_path / "o" / "disk-b.qcow2", "qcow2", 70_001) == DISK[:70_001]
    # What says it itself is what it says.
    words = ["--format", "qcow2", "--device", f"a={tmp_path / 'a.img'},format=raw", "--device", "b"]
    good("restore", tmp_path / "vm.vma", tmp_path / "o2", *words)
    assert (tmp_path / "a.img").read_bytes() == DISK
    assert raw_of(tmp_path / "o2" / "disk-b.qcow2", "qcow2", 70_001) == DISK[:70_001]


def test_a_larger_file_is_taken_when_that_is_said_and_the_rest_is_left_alone(
    tmp_path: Path, stored: Path
) -> None:
    target = tmp_path / "large"
    rest = b"\x77" * (5 * MIB)
    target.write_bytes(bytes(len(DISK)) + rest)
    (tmp_path / "map").write_text(f"1:d={target}\n", encoding="utf-8")
    text = bad("restore", stored, tmp_path / "o", "--device", f"d={target}")
    assert "--allow-larger" in text
    text = bad("extract", "-r", tmp_path / "map", stored, tmp_path / "o", tool=VMA)
    assert "unexpected size" in text
    assert "`vmapipe restore --map`" in text
    good("restore", stored, tmp_path / "o", "--device", f"d={target}", "--allow-larger")
    assert target.read_bytes() == DISK + rest
    good("restore", stored, tmp_path / "o2", "--map", tmp_path / "map", "--allow-larger")
    assert target.read_bytes() == DISK + rest
    target.write_bytes(bytes(len(DISK) - 1))
    assert "smaller" in bad(
        "restore", stored, tmp_path, "--device", f"d={target}", "--allow-larger"
    )


def test_a_larger_block_device_is_taken_by_restore_and_not_by_the_drop_in(
    tmp_path: Path, stored: Path, loop: str
) -> None:
    (tmp_path / "map").write_text(f"1:d={loop}\n", encoding="utf-8")
    assert "unexpected size" in bad(
        "extract", "-r", tmp_path / "map", stored, tmp_path / "o", tool=VMA
    )
    good("restore", stored, tmp_path / "o", "--map", tmp_path / "map")
    good("restore", stored, tmp_path / "o2", "--device", f"d={loop}")
    raw = Path(loop).read_bytes()
    assert raw[: len(DISK)] == DISK
    assert set(raw[len(DISK) :]) == {0xAA}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "d="], "d= names no target"),
        (["--device", "d=,format=qcow2"], "names no target"),
        (["--device", "=x"], "names no device"),
        (["--device", ""], "names no device"),
        (["--map", ""], "--map names no file"),
        (["--manifest", ""], "--manifest names no file"),
    ],
)
def test_empty_words_are_refused_at_once(tmp_path: Path, words: list[str], said: str) -> None:
    # Before the archive is looked at: there is none.
    assert said in bad("restore", tmp_path / "absent.vma", tmp_path / "o", *words, code=2)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_or_archive_is_refused_at_once(tmp_path: Path, stored: Path) -> None:
    assert "DIR is empty" in bad("restore", stored, "", code=2, cwd=tmp_path)
    assert "ARCHIVE is empty" in bad("restore", "", tmp_path / "o", code=2)


# --- Block devices that the kernel uses ---


@pytest.fixture
def mounted(loop: str, tmp_path: Path, need: Need) -> str:
    """A loop device with a mounted file system."""
    mkfs, mount = need("mkfs.ext4", "mount")
    subprocess.run([mkfs, "-q", "-F", loop], check=True)
    (tmp_path / "mnt").mkdir()
    subprocess.run([mount, loop, tmp_path / "mnt"], check=True)
    return loop


def test_a_mounted_device_or_its_file_is_neither_overwritten_nor_read_as_if_at_rest(
    tmp_path: Path, mounted: str, need: Need
) -> None:
    (umount,) = need("umount")
    image = tmp_path / "loop.img"
    (tmp_path / "big.vma").write_bytes(archive({"d": b"\1" * (16 * MIB)}))
    try:
        for target in (mounted, image):
            text = bad("restore", tmp_path / "big.vma", tmp_path / "o", "--device", f"d={target}")
            assert f"mounted at {tmp_path / 'mnt'}" in text
            text = bad("backup", "--disk", f"d={target}", tmp_path / "b.vma")
            assert f"mounted at {tmp_path / 'mnt'}" in text
            good("backup", "--force-share", "--disk", f"d={target}", tmp_path / "b.vma")
            (tmp_path / "b.vma").unlink()
        remount = ["mount", "-o", "remount,ro", str(tmp_path / "mnt")]
        subprocess.run(remount, check=True)
        # Nobody writes to it now; it is not to be overwritten all the same.
        good("backup", "--disk", f"d={mounted}", tmp_path / "ro.vma")
        bad("restore", tmp_path / "big.vma", tmp_path / "o", "--device", f"d={mounted}")
    finally:
        subprocess.run([umount, tmp_path / "mnt"], check=True)


def test_a_disk_with_a_mounted_partition_is_not_overwritten(
    tmp_path: Path, stored: Path, need: Need
) -> None:
    losetup, mkfs, mount, umount = need("losetup", "mkfs.ext4", "mount", "umount")
    if not is_root():
        pytest.skip("making a loop device needs root")
    image = tmp_path / "disk.img"
    # An MBR with one Linux partition, of 8 MiB from 1 MiB on.
    entry = struct.pack("<B3sB3sII", 0, bytes(3), 0x83, bytes(3), 2048, 16384)
    image.write_bytes((bytes(446) + entry + bytes(48) + b"\x55\xaa").ljust(16 * MIB, b"\0"))
    done = subprocess.run(
        [losetup, "-P", "--find", "--show", image], capture_output=True, check=True, text=True
    )
    loop = done.stdout.strip()
    try:
        name = f"{os.path.basename(loop)}p1"
        number = Path(f"/sys/class/block/{name}/dev")
        if not number.exists():
            pytest.skip("this kernel finds no partitions on loop devices")
        # There may be no udev that makes one.
        part = tmp_path / "part"
        major, minor = map(int, number.read_text().split(":"))
        os.mknod(part, 0o600 | stat.S_IFBLK, os.makedev(major, minor))
        subprocess.run([mkfs, "-q", "-F", part], check=True)
        (tmp_path / "mnt").mkdir()
        subprocess.run([mount, part, tmp_path / "mnt"], check=True)
        try:
            for target in (loop, str(image)):
                text = bad("restore", stored, tmp_path / "o", "--device", f"d={target}")
                assert f"its partition /dev/{name} is mounted at {tmp_path / 'mnt'}" in text
                assert "mounted" in bad("backup", "--disk", f"d={target}", tmp_path / "b.vma")
        finally:
            subprocess.run([umount, tmp_path / "mnt"], check=True)
        assert "attached to" in bad("restore", stored, tmp_path, "--device", f"d={image}")
    finally:
        subprocess.run([losetup, "--detach", loop], check=True)


def test_a_device_that_somebody_writes_to_without_any_lock_is_found(
    tmp_path: Path, loop: str
) -> None:
    (tmp_path / "big.vma").write_bytes(archive({"d": b"\1" * (16 * MIB)}))
    fd = os.open(loop, os.O_RDWR)
    try:
        text = bad("restore", tmp_path / "big.vma", tmp_path / "o", "--device", f"d={loop}")
        assert f"(process {os.getpid()})" in text
        text = bad("backup", "--disk", f"d={loop}", tmp_path / "b.vma")
        assert f"(process {os.getpid()})" in text
    finally:
        os.close(fd)
    good("backup", "--disk", f"d={loop}", tmp_path / "b.vma")
    good("restore", tmp_path / "big.vma", tmp_path / "o", "--device", f"d={loop}")
