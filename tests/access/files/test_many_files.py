# SPDX-License-Identifier: Apache-2.0
"""Whole trees of files against what other programs read of the same disks; and how little is read."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine import VMAPIPE, Need, good

MANY = [pytest.param(600, id="600"), pytest.param(10_000, id="10000", marks=pytest.mark.soak)]


def fill(folder: Path, count: int, prefix: str = "f") -> None:
    """Files of all sizes, in folders of some hundred."""
    chance = random.Random(prefix)
    for number in range(count):
        below = folder / f"folder {number // 300}"
        below.mkdir(parents=True, exist_ok=True)
        size = chance.choice([0, 1, 60, 511, 4096, 4097, 9_999, 20_000])
        content = bytes(size) if number % 50 == 7 else chance.randbytes(size)
        (below / f"{prefix} {number} é.bin").write_bytes(content)


def sums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def sums_in(archive: Path, *tool: str) -> dict[str, str]:
    """Of the tar stream of all of its only file system."""
    raw = good("files", "tar", "--no-index-cache", archive, "/", tool=[*tool, *VMAPIPE], cwd="/")
    found = {}
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        for member in tar:
            if member.isfile():
                content = tar.extractfile(member)
                assert content is not None
                found[member.name] = hashlib.sha256(content.read()).hexdigest()
    return found


def without_rights(setpriv: str) -> list[str]:
    """As the user nobody; where Python lies in a folder that nobody may enter, without any capability."""
    if os.geteuid():
        return []
    nobody = [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', ''], check=True)"
    done = subprocess.run([*nobody, sys.executable, "-c", program], capture_output=True)
    if done.returncode:
        return [setpriv, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    return nobody


def backup(disk: Path) -> Path:
    good("backup", "--quiet", "--disk", f"{disk},format=raw", disk.parent / "vm.vma")
    return disk.parent / "vm.vma"


@contextlib.contextmanager
def mounted(need: Need, disk: Path, *words: str) -> Iterator[Path]:
    """By the kernel, or by what `words` says in mount's place. Skipped where that is not possible."""
    losetup, umount = need("losetup", "umount")
    folder = disk.parent / "mounted"
    folder.mkdir(exist_ok=True)
    found = subprocess.run([losetup, "--find", "--show", disk], capture_output=True, text=True)
    if found.returncode:
        pytest.skip("no loop device here")
    device = found.stdout.strip()
    try:
        if subprocess.run([*words, device, folder], capture_output=True).returncode:
            pytest.skip(f"{words[0]} cannot mount here")
        try:
            yield folder
        finally:
            subprocess.run([umount, folder], check=True)
    finally:
        subprocess.run([losetup, "--detach", device], check=True)


@pytest.mark.parametrize("count", MANY)
def test_all_files_of_ext4_are_those_that_e2fsck_leaves_of_a_dirty_journal(
    count: int, need: Need, tmp_path: Path
) -> None:
    """As a user without rights. Half of them is on the disk, the other in the journal in part."""
    mke2fs, mount, e2fsck, debugfs, setpriv = need(
        "mke2fs", "mount", "e2fsck", "debugfs", "setpriv"
    )
    live, disk = tmp_path / "live", tmp_path / "disk"
    fill(tmp_path / "tree", count // 2)
    words = ["-q", "-t", "ext4", "-d", str(tmp_path / "tree"), "-N", str(count * 2)]
    subprocess.run([mke2fs, *words, live, f"{count * 12 + 16_000}K"], check=True)
    with mounted(need, live, mount, "-t", "ext4") as folder:
        fill(folder / "new", count // 2, "late")
        for path in sorted((folder / "folder 0").iterdir())[::7]:
            path.unlink()
        fd = os.open(folder, os.O_RDONLY)
        os.fsync(fd)  # the journal is committed, and not written back
        os.close(fd)
        shutil.copyfile(live, disk)
    shutil.copyfile(disk, tmp_path / "replayed")
    done = subprocess.run([e2fsck, "-p", "-E", "journal_only", tmp_path / "replayed"])
    assert done.returncode <= 1
    (tmp_path / "theirs").mkdir()
    words = ["-R", f"rdump / {tmp_path / 'theirs'}", str(tmp_path / "replayed")]
    subprocess.run([debugfs, *words], check=True, capture_output=True)
    theirs = sums(tmp_path / "theirs")
    assert len(theirs) > count * 3 // 4
    archive = backup(disk)
    tool = without_rights(setpriv)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder_name:
        Path(folder_name).chmod(0o755)
        public = Path(folder_name) / "vm.vma"
        shutil.copyfile(archive, public)
        shutil.copyfile(f"{archive}.manifest.json", f"{public}.manifest.json")
        for path in Path(folder_name).iterdir():
            path.chmod(0o644)
        assert sums_in(public, *tool) == theirs


@pytest.mark.parametrize("count", MANY)
def test_all_files_of_fat_are_those_that_mtools_reads(
    count: int, need: Need, tmp_path: Path
) -> None:
    mkfs, mcopy = need("mkfs.fat", "mcopy")
    fill(tmp_path / "tree", count)
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate((count * 14 << 10) + (40 << 20))
    subprocess.run([mkfs, "-F", "32", disk], check=True, capture_output=True)
    folders = sorted((tmp_path / "tree").iterdir())
    subprocess.run([mcopy, "-s", "-i", disk, *folders, "::/"], check=True)
    (tmp_path / "theirs").mkdir()
    subprocess.run([mcopy, "-s", "-n", "-i", disk, "::/*", tmp_path / "theirs"], check=True)
    theirs = sums(tmp_path / "theirs")
    assert len(theirs) == count
    assert sums_in(backup(disk)) == theirs


@pytest.mark.parametrize("count", MANY)
def test_all_files_of_ntfs_are_those_that_ntfs_3g_reads(
    count: int, need: Need, tmp_path: Path
) -> None:
    """Some are compressed, some are holes, some have more streams than one."""
    mkntfs, ntfs3g, ntfscat = need("mkntfs", "ntfs-3g", "ntfscat")
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate((count * 14 << 10) + (40 << 20))
    subprocess.run([mkntfs, "-q", "-F", "-f", disk], check=True, capture_output=True)
    options = "compression,streams_interface=windows"
    with mounted(need, disk, ntfs3g, "-o", options) as folder:
        fill(folder, count)
        for path in list(folder.rglob("*.bin"))[:20]:
            Path(f"{path}:other").write_bytes(b"another stream")
        compressed = folder / "compressed"
        compressed.mkdir()
        with contextlib.suppress(OSError):
            os.setxattr(compressed, "system.ntfs_attrib_be", (0x800).to_bytes(4, "big"))
        (compressed / "text").write_bytes(b"again and again " * 20_000)
        with (folder / "hole").open("wb") as file:
            file.truncate(5_000_000)
            file.seek(3_000_000)
            file.write(b"in the middle")
    with mounted(need, disk, ntfs3g, "-o", "ro") as folder:
        theirs = sums(folder)
    assert len(theirs) == count + 2
    archive = backup(disk)
    assert sums_in(archive) == theirs
    one = next(name for name in sorted(theirs) if name.endswith(".bin"))
    content = subprocess.check_output([ntfscat, disk, f"/{one}"])
    assert good("files", "cat", archive, f"/{one}") == content


def test_a_folder_with_an_index_of_two_levels_has_its_names_and_no_others(
    need: Need, tmp_path: Path
) -> None:
    """What is in an index (hashes, numbers of blocks) can look like an entry of a folder."""
    mke2fs, e2fsck = need("mke2fs", "e2fsck")
    many = tmp_path / "tree/many"
    many.mkdir(parents=True)
    names = {f"{number:04}".ljust(200, "n") for number in range(2000)}
    for name in names:
        (many / name).touch()
    disk = tmp_path / "disk"
    words = ["-q", "-t", "ext4", "-b", "1024", "-N", "4000", "-d", str(tmp_path / "tree")]
    subprocess.run([mke2fs, *words, disk, "16M"], check=True)
    assert subprocess.run([e2fsck, "-fyD", disk], capture_output=True).returncode <= 1
    archive = backup(disk)
    listed = good("files", "ls", "-0", archive, "/many").decode().split("\0")[:-1]
    assert len(listed) == len(names)
    assert set(listed) == names


def test_one_file_of_a_large_disk_costs_little_reading(need: Need, tmp_path: Path) -> None:
    """50 GiB with 200 MiB on it: of the archive its headers, and the extents that hold the file."""
    (mke2fs,) = need("mke2fs")
    tree, disk = tmp_path / "tree", tmp_path / "disk"
    tree.mkdir()
    wanted = random.Random(5).randbytes(500_000)
    (tree / "wanted").write_bytes(wanted)
    with (tree / "other").open("wb") as file:
        piece = random.Random(6).randbytes(1 << 20)
        for number in range(200):
            file.write(number.to_bytes(8, "big") + piece)
    words = ["-q", "-t", "ext4", "-E", "lazy_itable_init=1", "-J", "size=4", "-d", str(tree)]
    subprocess.run([mke2fs, *words, disk, "50G"], check=True)
    archive = backup(disk)
    # What Python itself and the modules are, once: they are files, too.
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "disk").write_bytes(bytes(1 << 20))
    base, _ = bytes_read("files", "ls", "--no-index-cache", backup(empty / "disk"))
    cache = ["--index-cache", str(tmp_path)]
    stored = archive.stat().st_size
    first, content = bytes_read("files", "cat", *cache, archive, "/wanted")
    assert content == wanted
    again, content = bytes_read("files", "cat", *cache, archive, "/wanted")
    assert content == wanted
    assert first - base < stored * 0.15  # a quarter of it are headers, which are read in pieces
    assert again - base < stored * 0.10
    assert first < (50 << 30) * 0.002


def bytes_read(*words: str | Path) -> tuple[int, bytes]:
    """By a command, and what it wrote."""
    command = [*VMAPIPE, *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        text = Path(f"/proc/{process.pid}/io").read_text(encoding="ascii")
    assert process.returncode == 0
    return int(text.partition("rchar: ")[2].split()[0]), output
