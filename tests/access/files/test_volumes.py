# SPDX-License-Identifier: Apache-2.0
"""Files in logical volumes and in encrypted ones, in each other, on several disks."""

from __future__ import annotations

import json
import random
import struct
import subprocess
from pathlib import Path

import pytest

from tests.access.volumes import (
    EXTENT_BYTES,
    KEY,
    ROOT,
    SPAN,
    encrypted,
    physical_volumes,
    put,
    put_striped,
)
from tests.machine import Need, bad, good, run
from vmapipe.access.archive import open_for_access
from vmapipe.access.disk import ArchiveDisk
from vmapipe.access.files.session import FileSession
from vmapipe.access.mount.guest import GuestDisk, GuestReader
from vmapipe.access.mount.tree import ArchiveTree
from vmapipe.access.open_storage import Caches
from vmapipe.runtime.cancel import Cancel

LARGE = random.Random(4).randbytes(900_001)


def ext4(need: Need, folder: Path, name: str, size_bytes: int) -> bytes:
    """A file system with the file `name`, which says where it is, and a larger one."""
    (mke2fs,) = need("mke2fs")
    tree, image = folder / f"{name}.tree", folder / f"{name}.ext4"
    tree.mkdir()
    (tree / name).write_text(f"this is {name}\n")
    (tree / "large").write_bytes(LARGE)
    with image.open("wb") as file:
        file.truncate(size_bytes)
    words = ["-q", "-t", "ext4", "-O", "^has_journal", "-d"]
    subprocess.run([mke2fs, *words, tree, image], check=True)
    return image.read_bytes()


def backup(folder: Path, **disks: bytes | bytearray) -> Path:
    words: list[str | Path] = []
    for name, content in disks.items():
        (folder / name).write_bytes(content)
        words += ["--disk", f"{folder / name},format=raw"]
    good("backup", "--quiet", *words, folder / "vm.vma")
    return folder / "vm.vma"


def partitioned(content: bytes) -> bytes:
    """A disk whose second partition has this content."""
    rows = struct.pack("<B3xB3xII", 0, 0x83, 2048, 2048)
    rows += struct.pack("<B3xB3xII", 0, 0x83, 4096, len(content) // 512)
    head = bytes(446) + rows.ljust(64, b"\0") + b"\x55\xaa"
    return head.ljust(4096 * 512, b"\0") + content


def rows(*words: str | Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in good("files", "ls", "--json", *words).splitlines()]


@pytest.fixture(scope="module")
def group(need: Need, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume group on two disks, one of them in a partition: root, span (on both), striped."""
    folder = tmp_path_factory.mktemp("group")
    pvs = physical_volumes()
    put(pvs, ROOT, ext4(need, folder, "root", len(ROOT) * EXTENT_BYTES))
    put(pvs, SPAN, ext4(need, folder, "span", len(SPAN) * EXTENT_BYTES))
    put_striped(pvs, ext4(need, folder, "striped", 16 * EXTENT_BYTES))
    return backup(folder, sda=bytes(pvs["a"]), sdb=partitioned(bytes(pvs["b"])))


def test_logical_volumes_are_listed_where_they_begin(group: Path) -> None:
    found = [
        (row["disk"], row["partition"], row["volume"], row["kind"], row["in"], row["remark"])
        for row in rows(group)
    ]
    assert found == [
        ("sda", "", None, "lvm", [], "holds /vg0"),
        ("sda", "", "/vg0/root", "ext4", ["lvm"], None),
        ("sda", "", "/vg0/gap", "", ["lvm"], None),
        ("sda", "", "/vg0/striped", "ext4", ["lvm"], None),
        ("sdb", "1", None, "", [], None),
        ("sdb", "2", None, "lvm", [], "holds /vg0"),
        ("sdb", "", "/vg0/span", "ext4", ["lvm"], None),
    ]


@pytest.mark.parametrize("name", ["root", "span", "striped"])
def test_a_file_in_a_logical_volume_is_read_by_the_name_of_its_group(
    group: Path, name: str
) -> None:
    assert good("files", "cat", group, f"/{name}") == f"this is {name}\n".encode()
    assert good("files", "cat", group, f"vg0/{name}:/large") == LARGE


def test_either_disk_names_a_volume_that_lies_on_both(group: Path) -> None:
    for disk in ("sda", "sdb"):
        assert good("files", "cat", group, f"{disk}/vg0/span:/span") == b"this is span\n"


def test_a_volume_that_is_not_there_is_told_with_those_that_are(group: Path) -> None:
    text = bad("files", "ls", group, "sda/vg0/home:/", code=2)
    assert "there is sda:, sda/vg0/root:, sda/vg0/gap:" in text
    assert "sda/vg0/root:, sda/vg0/striped:, sdb/vg0/span:" in bad(
        "files", "cat", group, "/large", code=2
    )


def test_a_disk_that_is_missing_costs_the_volumes_on_it_and_no_other(
    need: Need, tmp_path: Path
) -> None:
    pvs = physical_volumes()
    put(pvs, ROOT, ext4(need, tmp_path, "root", len(ROOT) * EXTENT_BYTES))
    archive = backup(tmp_path, sda=pvs["a"])
    assert good("files", "cat", archive, "/root") == b"this is root\n"
    kinds = {row["volume"]: (row["kind"], row["readable"]) for row in rows(archive)}
    assert kinds["/vg0/root"] == ("ext4", True)
    assert kinds["/vg0/span"] == kinds["/vg0/striped"] == ("lvm", False)
    assert "not in this archive" in bad("files", "ls", archive, "/span")


def test_a_disk_that_is_there_twice_is_not_guessed_at(need: Need, tmp_path: Path) -> None:
    pvs = physical_volumes()
    put(pvs, ROOT, ext4(need, tmp_path, "root", len(ROOT) * EXTENT_BYTES))
    archive = backup(tmp_path, sda=pvs["a"], sdb=pvs["a"])
    assert "is there more than once" in bad("files", "cat", archive, "/root")


def test_a_logical_volume_in_an_encrypted_partition_is_read_with_the_key(
    need: Need, tmp_path: Path
) -> None:
    pvs = physical_volumes()
    put(pvs, ROOT, ext4(need, tmp_path, "root", len(ROOT) * EXTENT_BYTES))
    encrypted(need, bytes(pvs["a"]), tmp_path / "luks")
    archive = backup(tmp_path, sda=partitioned((tmp_path / "luks").read_bytes()))
    key = tmp_path / "luks.key"
    for word in (f"sda:2={key}", f"sda={key}"):
        found = good("files", "cat", "--key-file", word, archive, "sda/vg0/root:/root")
        assert found == b"this is root\n"
    text = good("files", "ls", "--key-file", key, archive).decode()
    assert "sda/vg0/root:" in text
    assert "ext4 in luks1" in text


def test_an_encrypted_logical_volume_is_read_with_the_key(need: Need, tmp_path: Path) -> None:
    pvs = physical_volumes()
    plain = ext4(need, tmp_path, "root", 2 << 20)
    encrypted(need, plain, tmp_path / "luks", cipher="aes-cbc-essiv:sha256", bits=256)
    put(pvs, SPAN, (tmp_path / "luks").read_bytes())
    archive = backup(tmp_path, sda=pvs["a"], sdb=pvs["b"])
    key = tmp_path / "luks.key"
    for word in (f"{key}", f"vg0/span={key}"):
        found = good("files", "cat", "--key-file", word, archive, "vg0/span:/large")
        assert found == LARGE


@pytest.fixture(scope="module")
def secret(need: Need, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secret")
    encrypted(need, ext4(need, folder, "root", 4 << 20), folder / "luks")
    (folder / "wrong.key").write_bytes(KEY + b"\n")
    return backup(folder, sda=(folder / "luks").read_bytes())


def test_without_a_key_it_is_said_that_one_is_needed(secret: Path) -> None:
    assert b"luks1 (encrypted: give its key with --key-file)" in good("files", "ls", secret)
    assert "give its key with --key-file" in bad("files", "cat", secret, "/root")


def test_a_wrong_key_is_one_line_and_nothing_is_guessed(secret: Path) -> None:
    wrong = secret.parent / "wrong.key"
    for action, *place in (["ls"], ["cat", "/root"], ["ls", "sda:/"]):
        text = bad("files", action, "--key-file", wrong, secret, *place)
        assert "wrong key: " in text
        assert "wrong.key' (its last byte is a new line, and counts) opens none" in text
        assert KEY.decode() not in text
    # A key of its own is the only one that is tried there.
    key = secret.parent / "luks.key"
    own = f"sda={wrong}"
    text = bad("files", "cat", "--key-file", own, "--key-file", key, secret, "/root")
    assert "wrong key: " in text


def test_a_key_comes_from_a_file_or_from_standard_input(secret: Path) -> None:
    assert good("files", "cat", "--key-file", "-", secret, "/root", input=KEY) == b"this is root\n"
    assert "cannot read the key file" in bad("files", "ls", "--key-file", "/nope", secret)
    empty = run("files", "ls", "--key-file", "/dev/null", secret)
    assert empty.returncode == 2
    assert b"has to hold 1 byte to 64 KiB" in empty.stderr
    assert b"has to hold 1 byte" in run("files", "ls", "--key-file", "/dev/zero", secret).stderr


def test_partitions_are_numbered_as_linux_numbers_them(need: Need, tmp_path: Path) -> None:
    plain = ext4(need, tmp_path, "root", 2 << 20)
    disk = bytearray(partitioned(plain))
    disk[446 + 16 : 446 + 48] = bytes(16) + disk[446 + 16 : 446 + 32]
    archive = backup(tmp_path, sda=disk)
    assert [row["partition"] for row in rows(archive)] == ["1", "3"]
    assert good("files", "cat", archive, "sda:3:/root") == b"this is root\n"


def test_a_mount_shows_logical_volumes_on_all_their_disks(group: Path) -> None:
    """As its tree, without the kernel's part; with keys as `vmapipe files` has them."""
    cancel = Cancel()
    told: list[str] = []
    archive = open_for_access(str(group), cancel, told.append, Caches(None, "/tmp", 0))
    disks = [(device.name, ArchiveDisk(archive, device)) for device in archive.header.devices]
    reader = GuestReader("both", lambda: FileSession(disks, cancel))
    guests = {
        name: GuestDisk(name, index, told.append, reader, None)
        for index, (name, _) in enumerate(disks)
    }
    try:
        tree = ArchiveTree(archive, disks, guests, told.append)
        assert sorted(name for name, _ in tree.names(b"/files/sda/vg0")) == [b"root", b"striped"]
        path = b"/files/sdb/vg0/span/span"
        assert tree.read(path, 0, tree.attributes(path).size_bytes) == b"this is span\n"
    finally:
        reader.close()
        archive.close()
        cancel.close()
    assert not [line for line in told if "holds /vg0" in line]
