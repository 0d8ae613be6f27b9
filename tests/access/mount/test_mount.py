# SPDX-License-Identifier: Apache-2.0
"""A mounted archive: what there is to see, that it cannot be changed, and that nothing is left of it."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.access.files.test_files import ODD, fill
from tests.access.mounting import Mounted, mounting, need_fuse
from tests.archives import extents_of
from tests.control.coordinator.test_events import events
from tests.machine import LIMIT_S, VMAPIPE, Need, bad, eventually, good, make_disk
from vmapipe.access.files.messages import (
    FILE,
    AnswerEnd,
    Ask,
    Entry,
    EntryFailed,
    FileData,
    FromParser,
    ParserReady,
    Volume,
)
from vmapipe.access.files.session import FileReader
from vmapipe.access.mount import guest as guest_module
from vmapipe.access.mount.guest import GuestDisk, GuestReader

CONF = b"memory: 512\nscsi0: whole\n"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, need: Need) -> Path:
    """`tree` on a file system on all of disk `whole`; disk `xfs` looks like one; `vm.vma.zst` has both.

    So has `vm.vma.zst.age`, for the holder of `key`.
    """
    mke2fs, keygen = need("mke2fs", "age-keygen")
    folder = tmp_path_factory.mktemp("mount")
    fill(folder / "tree")
    (folder / "tree/large").chmod(0o4755)
    subprocess.run(
        [mke2fs, "-q", "-t", "ext4", "-d", folder / "tree", folder / "whole", "40M"], check=True
    )
    (folder / "xfs").write_bytes(b"XFSB".ljust(1 << 20, b"\0"))
    (folder / "qemu-server.conf").write_bytes(CONF)
    good(
        *("backup", "--quiet", "--compress", "zstd", "--config", folder / "qemu-server.conf"),
        *("--disk", folder / "whole", "--disk", folder / "xfs", folder / "vm.vma.zst"),
    )
    subprocess.run([keygen, "-o", folder / "key"], check=True, capture_output=True)
    recipient = subprocess.check_output([keygen, "-y", folder / "key"], text=True).strip()
    sealed = folder / "vm.vma.zst.age"
    good(
        "repack",
        "--quiet",
        "--compress",
        "zstd",
        "--encrypt-to",
        recipient,
        folder / "vm.vma.zst",
        sealed,
    )
    return folder


@pytest.fixture(scope="module")
def mounted(work: Path) -> Iterator[Mounted]:
    """The encrypted archive: whoever has its key sees what others see of one in the clear."""
    with mounting(work / "m", work / "vm.vma.zst.age", "--identity", str(work / "key")) as mounted:
        # Its parsers are there before the first test, which would seem to have left them.
        for disk in (mounted.folder / "files").iterdir():
            list(disk.iterdir())
        yield mounted


def test_disks_are_files_with_their_holes(mounted: Mounted, work: Path) -> None:
    disk, image = mounted.folder / "disks/whole.raw", work / "whole"
    subprocess.run(["cmp", disk, image], check=True)
    assert disk.stat().st_size == image.stat().st_size
    assert disk.stat().st_blocks * 512 <= image.stat().st_blocks * 512
    fd = os.open(disk, os.O_RDONLY)
    try:
        at, data = 0, 0
        while at < disk.stat().st_size:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                assert error.errno == errno.ENXIO  # noqa: PT017
                break
            at = os.lseek(fd, start, os.SEEK_HOLE)
            data += at - start
        assert data == disk.stat().st_blocks * 512
    finally:
        os.close(fd)


def test_an_encrypted_archive_is_not_mounted_without_its_key(work: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert "--identity FILE" in bad("mount", work / "vm.vma.zst.age", tmp_path / "m")


def test_configurations_are_files(mounted: Mounted) -> None:
    (one,) = (mounted.folder / "config").iterdir()
    assert one.name == "qemu-server.conf"
    assert one.read_bytes() == CONF


def test_files_have_content_modes_times_links_and_attributes(mounted: Mounted, work: Path) -> None:
    shown, tree = mounted.folder / "files/whole/whole", work / "tree"
    names = sorted(os.listdir(os.fsencode(shown)))
    assert names == sorted([*os.listdir(os.fsencode(tree)), b"lost+found"])
    assert ODD in names
    subprocess.run(["diff", "-r", "--no-dereference", "-x", "lost+found", tree, shown], check=True)
    large, old = (shown / "large").lstat(), (tree / "large").lstat()
    for field in ("st_mode", "st_size", "st_nlink", "st_mtime_ns", "st_uid", "st_gid"):
        assert getattr(large, field) == getattr(old, field), field
    assert large.st_mode & 0o7777 == 0o4755
    assert os.readlink(shown / "link") == "etc/fstab"
    assert os.listxattr(shown / "etc/fstab") == ["user.colour"]
    assert os.getxattr(shown / "etc/fstab", "user.colour") == b"blue"
    with (shown / "sparse").open("rb") as file:
        file.seek(19_999_990)
        assert file.read(30) == bytes(10) + b"in the middle" + bytes(7)
    with pytest.raises(FileNotFoundError):
        (shown / "etc/none").lstat()
    with pytest.raises(NotADirectoryError):
        (shown / "large/none").lstat()


def test_nothing_of_it_can_be_changed_and_no_right_comes_from_it(mounted: Mounted) -> None:
    for path in (mounted.folder / "disks/whole.raw", mounted.folder / "files/whole/whole/large"):
        with pytest.raises(OSError) as caught:  # noqa: PT011  its number is looked at
            path.open("r+b")
        assert caught.value.errno == errno.EROFS
    lines = Path("/proc/self/mounts").read_text().splitlines()
    (line,) = [line for line in lines if str(mounted.folder) in line]
    assert {"ro", "nosuid", "nodev"} <= set(line.split()[3].split(","))


def test_a_parser_that_was_killed_is_started_again(work: Path, tmp_path: Path) -> None:
    with mounting(tmp_path / "m", work / "vm.vma.zst") as one:
        folder = one.folder / "files/whole/whole"
        list(folder.iterdir())
        for parser in psutil.Process(one.process.pid).children():
            parser.kill()
        assert (folder / "large").read_bytes() == (work / "tree/large").read_bytes()


def test_what_cannot_be_shown_is_told(work: Path, tmp_path: Path) -> None:
    with mounting(tmp_path / "m", work / "vm.vma.zst") as one:
        assert list((one.folder / "files/xfs").iterdir()) == []
    assert "xfs (xfs) is not shown" in one.said
    assert "notice" in events(one.said.encode())


@pytest.mark.parametrize("how", ["fusermount3", "SIGINT"])
def test_it_ends_when_it_is_unmounted_or_told_to(
    how: str, work: Path, tmp_path: Path, need: Need
) -> None:
    with mounting(tmp_path / "m", work / "vm.vma.zst") as one:
        list((one.folder / "files/whole/whole").iterdir())
        (parser,) = psutil.Process(one.process.pid).children()
        if how == "fusermount3":
            subprocess.run([*need("fusermount3"), "-u", one.folder], check=True)
        else:
            one.process.send_signal(signal.Signals[how])
        assert one.end() == 0
        assert not os.path.ismount(one.folder)
        assert eventually(lambda: not parser.is_running())


def test_it_ends_though_a_file_is_open_and_whoever_has_it_gets_an_error(
    work: Path, tmp_path: Path
) -> None:
    with mounting(tmp_path / "m", work / "vm.vma.zst") as one:
        fd = os.open(one.folder / "disks/whole.raw", os.O_RDONLY)
        try:
            one.process.terminate()
            assert one.end() == 0
            with pytest.raises(OSError) as caught:  # noqa: PT011  its number is looked at
                os.pread(fd, 4096, 30 << 20)
            assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
        finally:
            with contextlib.suppress(OSError):  # closing tells it once more
                os.close(fd)


def test_of_one_that_was_killed_only_that_is_left_which_umount_clears(
    work: Path, tmp_path: Path, need: Need
) -> None:
    (unmount,) = need("fusermount3")
    folder = tmp_path / "m"
    with mounting(folder, work / "vm.vma.zst") as one:
        list((folder / "files/whole/whole").iterdir())
        (parser,) = psutil.Process(one.process.pid).children()
        one.process.kill()
        one.end()
        assert eventually(lambda: not parser.is_running())
        assert "fusermount3 -u" in bad("mount", work / "vm.vma.zst", folder)
        subprocess.run([unmount, "-u", folder], check=True)


def test_damage_is_an_io_error_with_a_line_and_what_is_whole_is_read_on(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "a", "A" * 200)
    archive = tmp_path / "vm.vma"
    good("backup", "--quiet", "--disk", disk, archive)
    raw = bytearray(archive.read_bytes())
    hit = extents_of(bytes(raw))[1]
    raw[hit.offset + 5000] ^= 1
    archive.write_bytes(raw)
    with mounting(tmp_path / "m", archive) as one:
        archive.unlink()  # it was opened once: who prunes it meanwhile does no harm
        fd = os.open(one.folder / "disks/a.raw", os.O_RDONLY)
        try:
            assert os.pread(fd, 65536, 0) == disk.read_bytes()[:65536]
            with pytest.raises(OSError) as caught:  # noqa: PT011  its number is looked at
                os.pread(fd, 65536, 70 * 65536)
            assert caught.value.errno == errno.EIO
            assert os.pread(fd, 65536, 190 * 65536) == disk.read_bytes()[190 * 65536 : 191 * 65536]
        finally:
            os.close(fd)
    assert f"the extent at offset {hit.offset} is damaged" in one.said


def test_an_archive_of_one_compressed_piece_is_shown_while_it_is_decompressed(
    work: Path, tmp_path: Path, need: Need
) -> None:
    (zstd,) = need("zstd")
    plain = subprocess.check_output([zstd, "-dcq", work / "vm.vma.zst"])
    (tmp_path / "vm.vma.zst").write_bytes(
        subprocess.run([zstd, "-q", "-c"], input=plain, capture_output=True).stdout
    )
    with mounting(tmp_path / "m", tmp_path / "vm.vma.zst") as one:
        subprocess.run(["cmp", one.folder / "disks/whole.raw", work / "whole"], check=True)
        assert (one.folder / "files/whole/whole/etc/fstab").is_file()


# --- who may not, and what is missing ---


def test_a_folder_that_is_not_empty_or_not_there_is_refused(work: Path, tmp_path: Path) -> None:
    need_fuse()
    (tmp_path / "file").touch()
    archive = work / "vm.vma.zst"
    assert "is not empty" in bad("mount", archive, tmp_path, code=2)
    assert "No such file" in bad("mount", archive, tmp_path / "none")
    assert "Not a directory" in bad("mount", archive, tmp_path / "file")


def in_namespace(script: str, *words: str | Path) -> subprocess.CompletedProcess[bytes]:
    """Run a shell's script as root with mounts of its own, if that can be done here."""
    if os.geteuid():
        pytest.skip("needs root")
    command = ["unshare", "-m", "sh", "-c", script, "sh", *map(str, words)]
    return subprocess.run(command, capture_output=True, timeout=LIMIT_S)


# A device file for everybody, as udev makes it; the machine's own may be root's only.
OPEN_DEVICE = """
set -e
mount -t tmpfs none "$1/dev" && mknod -m 666 "$1/dev/fuse" c 10 229
mount --bind "$1/dev/fuse" /dev/fuse
"""
MOUNT = " ".join([*VMAPIPE, "mount", "--no-index-cache"])
AS_NOBODY = "setpriv --reuid=65534 --regid=65534 --clear-groups"


@pytest.fixture
def nobodys(work: Path, short_folder: Path) -> Path:
    """A folder where the user nobody can mount: `m` in it, and a copy of the archive."""
    short_folder.chmod(0o755)
    (short_folder / "dev").mkdir()
    (short_folder / "m").mkdir()
    os.chown(short_folder / "m", 65534, 65534)
    for name in ("vm.vma.zst", "vm.vma.zst.manifest.json"):
        (short_folder / name).write_bytes((work / name).read_bytes())
        (short_folder / name).chmod(0o644)
    return short_folder


# For a shell: waits until it is mounted, and reads something of everything.
WAIT_AND_LOOK = """
for i in $(seq 300); do grep -qs mounted "$1/out" && break; sleep 0.1; done
look() { cat "$1/m/files/whole/whole/etc/fstab" "$1/m/config/qemu-server.conf"; }
"""


def test_a_user_without_rights_can_mount_by_fusermount3(
    work: Path, nobodys: Path, need: Need
) -> None:
    need_fuse()
    (setpriv, _) = need("setpriv", "fusermount3")
    image = nobodys / "whole"
    image.write_bytes((work / "whole").read_bytes())
    user = AS_NOBODY.replace("setpriv", setpriv)
    done = in_namespace(
        f'{OPEN_DEVICE} {user} {MOUNT} "$1/vm.vma.zst" "$1/m" >"$1/out" & P=$!'
        f'{WAIT_AND_LOOK} {user} cmp "$1/m/disks/whole.raw" "$2" >&2 || :\n'
        f'{user} cat "$1/m/config/qemu-server.conf"; {user} fusermount3 -u "$1/m"; wait $P',
        nobodys,
        image,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert (done.stdout, done.stderr) == (CONF, b"")


def test_a_user_without_rights_and_helpers_can_mount_in_a_namespace(
    nobodys: Path, need: Need
) -> None:
    need_fuse()
    (unshare,) = need("unshare")
    os.chown(nobodys / "m", os.geteuid(), os.getegid())
    script = (
        f'{MOUNT} "$1/vm.vma.zst" "$1/m" >"$1/out" & P=$!'
        f'{WAIT_AND_LOOK} look "$1"; umount "$1/m"; wait $P'
    )
    words = [unshare, "-Urm", "sh", "-c", script, "sh", str(nobodys)]
    done = subprocess.run(words, capture_output=True, timeout=LIMIT_S)
    if b"unshare failed" in done.stderr:
        pytest.skip(done.stderr.decode())  # a sandbox without user namespaces
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b"/dev/vda1 / ext4\n" + CONF


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3", b"there is no /dev/fuse here"),
        ("mount --bind /proc/sys/kernel/version /dev/fuse", b"cannot open /dev/fuse"),
        (f"{OPEN_DEVICE}\nPATH=/nowhere {{user}}", b"there is no fusermount3 here"),
        (f"{OPEN_DEVICE}\n{{user}} --no-new-privs", b"cannot mount on"),
    ],
    ids=["no-device", "closed-device", "no-fusermount3", "no-right"],
)
def test_what_is_missing_is_one_line_with_a_way_out(
    script: str, words: bytes, nobodys: Path, need: Need
) -> None:
    need_fuse()
    (setpriv,) = need("setpriv")
    user = AS_NOBODY.replace("setpriv", setpriv)
    script = script.replace("{user}", user) if "{user}" in script else f"{script}\n"
    done = in_namespace(f'{script} {MOUNT} "$1/vm.vma.zst" "$1/m"', nobodys)
    lines = [line for line in done.stderr.splitlines() if line.startswith(b"vmapipe mount: ")]
    assert done.returncode == 1, done.stderr
    assert len(lines) == 1, done.stderr
    assert words in lines[0]
    assert b"vmapipe files" in lines[0] or b"unshare" in lines[0]
    assert b"Traceback" not in done.stderr


def test_without_the_extra_it_says_what_to_install(work: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['mfusepy'] = None; from vmapipe.control.main import main; "
        "sys.exit(main(['mount', *sys.argv[1:]]))"
    )
    words = [sys.executable, "-c", program, str(work / "vm.vma.zst"), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, timeout=LIMIT_S)
    assert done.returncode == 2
    assert b"pip install 'vmapipe[mount]'" in done.stderr


# --- a parser that has been taken over ---


class Hostile(FileReader):
    """In an engine's place: answers with what it was given."""

    prepared: tuple[FromParser, ...] = ()

    def close(self) -> None: ...

    def answers(self, _: Ask) -> Iterator[FromParser]:
        yield from self.prepared


def entry(path: bytes, kind: int = FILE) -> Entry:
    return Entry(path, kind, 0o644, 0, 0, 5, 0, 1, 1, 0, b"", ())


@pytest.fixture
def hostile() -> Iterator[tuple[GuestDisk, list[str]]]:
    told: list[str] = []
    reader = GuestReader("d", Hostile)
    yield GuestDisk("d", 0, told.append, reader, None), told
    reader.close()


def test_names_that_no_folder_can_hold_are_left_out_and_told(
    hostile: tuple[GuestDisk, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, told = hostile
    odd = [b"/top/..", b"/top/.", b"/top/", b"/top/a/b", b"/a", b"/top/\0", b"/top/" + b"n" * 256]
    answers = (*map(entry, odd), entry(b"/top/good"))
    monkeypatch.setattr(Hostile, "prepared", answers)
    assert list(disk.entries(b"1", b"/top")) == [b"good"]
    assert len(told) == len(odd)


def test_a_folder_without_an_end_and_bytes_that_were_not_asked_for_are_errors(
    hostile: tuple[GuestDisk, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, told = hostile
    monkeypatch.setattr(guest_module, "_MAX_ENTRIES", 100)
    monkeypatch.setattr(Hostile, "prepared", tuple(entry(b"/%d" % n) for n in range(1000)))
    with pytest.raises(OSError, match="more than 100 entries"):
        disk.entries(b"1", b"/")
    for data in (FileData(0, b"abc"), FileData(12, b"xxxx"), FileData(9, b"x")):
        monkeypatch.setattr(Hostile, "prepared", (data,))
        with pytest.raises(OSError, match="not asked for"):
            disk.read(b"1", b"/f", 10, 5)
    assert told


def test_what_is_remembered_of_folders_is_bounded_and_the_rest_asked_again(
    hostile: tuple[GuestDisk, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, _ = hostile
    monkeypatch.setattr(guest_module, "_MAX_ENTRIES", 100)
    for folder in range(20):
        answers = tuple(entry(b"/%d/%d" % (folder, n)) for n in range(30))
        monkeypatch.setattr(Hostile, "prepared", answers)
        assert len(disk.entries(b"1", b"/%d" % folder)) == 30
    # The latest ones are remembered, and what was forgotten for them is asked for again.
    monkeypatch.setattr(Hostile, "prepared", ())
    assert [len(disk.entries(b"1", b"/%d" % folder)) for folder in (17, 18, 19)] == [30] * 3
    assert [len(disk.entries(b"1", b"/%d" % folder)) for folder in range(17)] == [0] * 17


def test_an_entry_that_fails_costs_only_itself(
    hostile: tuple[GuestDisk, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, told = hostile
    monkeypatch.setattr(
        Hostile, "prepared", (entry(b"/a"), EntryFailed(b"/b", b"bad block"), entry(b"/c"))
    )
    assert list(disk.entries(b"1", b"/")) == [b"a", b"c"]
    assert told == ["d: '/b': bad block"]


def test_volumes_of_a_group_and_a_partition_are_asked_once(
    hostile: tuple[GuestDisk, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, _ = hostile
    volumes = (
        ParserReady(True),
        Volume(0, b"1", 0, 10, b"ext4", True, (), b"", False),
        Volume(0, b"/vg/root", 0, 10, b"ext4", True, (b"lvm",), b"", False),
        AnswerEnd(),
    )
    monkeypatch.setattr(Hostile, "prepared", volumes)
    assert [volume.name for volume in disk.volumes()] == [b"1", b"/vg/root"]
    monkeypatch.setattr(Hostile, "prepared", ())
    assert len(disk.volumes()) == 2
