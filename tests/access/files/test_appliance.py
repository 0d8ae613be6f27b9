# SPDX-License-Identifier: Apache-2.0
"""The engine vm: what it reads is what was written, logs replayed, and nothing of it is left.

The disks (images/make.py) were copied while a guest had them mounted, a moment after fsync.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import leaks
from tests.access.images.make import KEY, many_files, unpack
from tests.access.mounting import mounting
from tests.conftest import absent
from tests.guest import find_kernel
from tests.machine import LIMIT_S, VMAPIPE, Need, bad, good
from vmapipe.access.archive import open_for_access
from vmapipe.access.disk import ArchiveDisk
from vmapipe.access.files import engines as module
from vmapipe.access.files.appliance import Appliance
from vmapipe.access.files.copies import TarWriter
from vmapipe.access.files.engines import AUTO, Engines
from vmapipe.access.files.messages import (
    Entry,
    EntryFailed,
    FileData,
    FromParser,
    Key,
    Stretch,
    Volume,
)
from vmapipe.access.files.session import FileSession
from vmapipe.access.machine import accelerator, kernels
from vmapipe.access.open_storage import Caches
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure

_ODD = b"line\n\xff\tx"


@pytest.fixture(scope="module")
def kernel_folder(need: Need) -> Path:
    need("qemu-system-x86_64", "ldd", "lvm", "cryptsetup", "setpriv")
    kernel = find_kernel()
    if kernel is None:
        absent("Debian's cloud kernel (scripts/setup unpacks it)")
    return kernel.image.parent.parent


@pytest.fixture(scope="module")
def _environment(kernel_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernels.VARIABLE, str(kernel_folder))
        # What a test waits for must not depend on how a probe ends on a busy machine.
        patch.setenv(accelerator.VARIABLE, "tcg")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, _environment: None) -> Path:
    folder = tmp_path_factory.mktemp("appliance")
    unpack(folder)
    # The magic number is there, and little else is.
    with (folder / "damaged").open("wb") as file:
        file.write((folder / "xfs").read_bytes()[:4096])
        file.seek(600)
        file.write(bytes(3000))
        file.truncate(320 << 20)
    (folder / "key").write_bytes(KEY)
    path = folder / "vm.vma.zst"
    (folder / "locked").write_bytes((folder / "luks2").read_bytes())
    names = ("xfs", "btrfs", "luks2", "locked", "lvm0", "lvm1", "fast", "damaged")
    disks = [word for name in names for word in ("--disk", f"{folder}/{name}")]
    good("backup", "--quiet", "--compress", "zstd", *disks, path)
    return path


@contextlib.contextmanager
def opened(archive: Path, cancel: Cancel) -> Iterator[list[tuple[str, ArchiveDisk]]]:
    caches = Caches(None, str(archive.parent), 1 << 30)
    access = open_for_access(str(archive), cancel, lambda text: None, caches)
    try:
        yield [(item.name, ArchiveDisk(access, item)) for item in access.header.devices]
    finally:
        access.close()


@contextlib.contextmanager
def booted(archive: Path, cancel: Cancel, keys: tuple[Key, ...] = ()) -> Iterator[Appliance]:
    with opened(archive, cancel) as disks, Appliance(disks, cancel, keys) as made:
        yield made


@pytest.fixture(scope="module")
def appliance(archive: Path) -> Iterator[Appliance]:
    """One that is up for all tests that only ask."""
    cancel = Cancel()
    keys = (Key(2, b"", b"key", KEY), Key(3, b"", b"wrong key", KEY[:-1]))
    with booted(archive, cancel, keys) as made:
        yield made
    cancel.close()


@pytest.fixture(scope="module")
def volumes(appliance: Appliance) -> dict[str, Volume]:
    answer = appliance.ask("volumes")
    return {appliance.place_of(item): item for item in answer if isinstance(item, Volume)}


def ask(appliance: Appliance, action: str, volume: Volume, path: bytes) -> list[FromParser]:
    return list(appliance.ask(action, volume.disk, volume.name, path))


def contents(answer: list[FromParser]) -> dict[bytes, bytes]:
    """Files by their paths, holes as zeroes."""
    found: dict[bytes, bytearray] = {}
    data = bytearray()
    for item in answer:
        match item:
            case Entry(kind=0):
                data = found[item.path] = bytearray(item.size_bytes)
            case FileData(offset, piece):
                data[offset : offset + len(piece)] = piece
            case EntryFailed():
                raise AssertionError(item)
    return {path: bytes(data) for path, data in found.items()}


def test_each_volume_is_named_with_what_it_lies_in(volumes: dict[str, Volume]) -> None:
    found = {
        place: (item.kind, item.can_read, item.layers, item.is_container)
        for place, item in volumes.items()
    }
    assert found == {
        "xfs": (b"xfs", True, (), False),
        "btrfs": (b"btrfs", True, (), False),
        "luks2:1": (b"", False, (), False),
        "luks2:2": (b"lvm", False, (b"luks2",), True),
        "luks2/inner/root": (b"ext4", True, (b"luks2", b"lvm"), False),
        "locked:1": (b"", False, (), False),
        "locked:2": (b"luks2", False, (), False),
        "fast": (b"ext4", True, (), False),
        "lvm0": (b"lvm", False, (), True),
        "lvm1": (b"lvm", False, (), True),
        "lvm0/group/linear": (b"xfs", True, (b"lvm",), False),
        "lvm0/group/thin": (b"ext4", True, (b"lvm",), False),
        "damaged": (b"xfs", False, (), False),
    }


@pytest.mark.parametrize("place", ["xfs", "btrfs", "luks2/inner/root", "lvm0/group/linear", "fast"])
def test_what_was_synced_before_the_copy_is_there(
    place: str, appliance: Appliance, volumes: dict[str, Volume]
) -> None:
    files = contents(ask(appliance, "read", volumes[place], b"/new"))
    files |= contents(ask(appliance, "read", volumes[place], b"/old"))
    assert files[b"/old/file"] == b"before\n"
    assert files[b"/new/file"] == b"after\n"
    assert files[b"/new/" + _ODD] == b"odd"
    sparse = files[b"/new/sparse"]
    assert len(sparse) == 30_000_000
    assert sparse.strip(b"\0") == b"middle"
    assert sparse.index(b"middle") == 20_000_000


def test_a_thin_volume_is_read(appliance: Appliance, volumes: dict[str, Volume]) -> None:
    volume = volumes["lvm0/group/thin"]
    assert contents(ask(appliance, "read", volume, b"/old/file")) == {b"/old/file": b"before\n"}


def test_everything_that_a_tree_has_survives_in_a_tar_stream(
    appliance: Appliance, volumes: dict[str, Volume]
) -> None:
    out = io.BytesIO()
    writer = TarWriter(out, b"/new", lambda text: None)
    for message in ask(appliance, "read", volumes["xfs"], b"/new"):
        match message:
            case Entry():
                writer.entry(message)
            case Stretch():
                writer.stretch(message)
            case FileData():
                writer.data(message)
    writer.close()
    assert writer.is_whole
    assert len(out.getvalue()) < 200_000, "the hole is in it"
    out.seek(0)
    with tarfile.open(fileobj=out) as packed:
        found: dict[str, Any] = {os.fsencode(m.name).decode("latin-1"): m for m in packed}
        assert set(found) == {
            *("new", "new/file", "new/second", "new/link", "new/fifo", "new/null", "new/sparse"),
            f"new/{_ODD.decode('latin-1')}",
        }
        one, other = sorted((found["new/file"], found["new/second"]), key=lambda m: m.islnk())
        assert other.linkname == one.name
        assert (one.mode, one.uid, one.gid) == (0o4750, 1000, 100)
        assert found["new/link"].linkname == "../old/file"
        assert found["new/fifo"].isfifo()
        null = found["new/null"]
        assert (null.type, null.devmajor, null.devminor) == (tarfile.CHRTYPE, 1, 3)
        assert found["new/sparse"].mtime == 1_580_608_922
        assert stat.S_IMODE(found["new/fifo"].mode) == 0o644


@pytest.mark.slow
def test_ten_thousand_files_are_what_they_were(
    appliance: Appliance, volumes: dict[str, Volume]
) -> None:
    found = contents(ask(appliance, "read", volumes["btrfs"], b"/many"))
    assert found == {f"/{name}".encode(): text for name, text in many_files()}


def test_extended_attributes_are_told(appliance: Appliance, volumes: dict[str, Volume]) -> None:
    (entry,) = ask(appliance, "entry", volumes["btrfs"], b"/many")
    assert isinstance(entry, Entry)
    assert entry.xattrs == (b"user.colour", b"blue")


def test_a_folder_of_many_files_is_what_it_was(
    appliance: Appliance, volumes: dict[str, Volume]
) -> None:
    found = contents(ask(appliance, "read", volumes["btrfs"], b"/many/7"))
    wanted = {f"/{name}".encode(): text for name, text in many_files() if "/7/" in name}
    assert len(wanted) == 100
    assert found == wanted


def test_a_damaged_file_system_is_refused_with_the_kernels_reason(
    volumes: dict[str, Volume],
) -> None:
    remark = volumes["damaged"].remark.decode()
    assert remark.startswith("cannot be mounted: "), remark
    assert "XFS" in remark
    assert "\n" not in remark


def test_a_wrong_key_is_said(volumes: dict[str, Volume]) -> None:
    assert volumes["locked:2"].remark == b"wrong key: No key available with this passphrase."


def test_a_mount_shows_what_only_the_virtual_machine_reads(archive: Path, tmp_path: Path) -> None:
    with mounting(tmp_path / "m", archive) as mounted:
        files = mounted.folder / "files"
        assert [item.name for item in (files / "xfs").iterdir()] == ["whole"]
        assert (files / "xfs/whole/new/file").read_bytes() == b"after\n"
        # The parser reads this one, less what the log has.
        assert (files / "fast/whole/new/file").read_bytes() == b"after\n"
        assert (files / "lvm0/group/linear/old/file").read_bytes() == b"before\n"
        assert list((files / "damaged").iterdir()) == []
    assert "damaged (xfs) is not shown: cannot be mounted: " in mounted.said


def test_a_mount_without_the_virtual_machine_says_which_log_is_not_replayed(
    archive: Path, tmp_path: Path
) -> None:
    with mounting(tmp_path / "m", archive, "--engine", "parser") as mounted:
        files = mounted.folder / "files"
        assert list((files / "xfs").iterdir()) == []
        assert (files / "fast/whole/old/file").read_bytes() == b"before\n"
    assert "xfs (xfs) is not shown: " in mounted.said
    assert "fast (ext4): " in mounted.said


def test_a_killed_qemu_is_one_clear_line(archive: Path) -> None:
    cancel = Cancel()
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + LIMIT_S
        while not killed and time.monotonic() < deadline:
            for child in leaks.children():
                with contextlib.suppress(psutil.Error):  # one that has ended
                    if child.pid not in others and "virtio-blk-pci" in " ".join(child.cmdline()):
                        child.kill()
                        killed.append(child.pid)
            time.sleep(0.05)

    others = {child.pid for child in leaks.children()}
    thread = threading.Thread(target=kill)
    thread.start()
    with (
        pytest.raises(Failure, match="QEMU was killed by SIGKILL") as caught,
        booted(archive, cancel),
    ):
        pytest.fail("it has come up")
    thread.join()
    assert "\n" not in str(caught.value)
    cancel.close()


def test_a_stop_while_it_boots_ends_it_at_once(
    archive: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(short_folder))
    cancel = Cancel()
    timer = threading.Timer(0.5, cancel.ask, ["enough"])
    timer.start()
    with pytest.raises(Cancelled), booted(archive, cancel):
        pytest.fail("it has come up")
    timer.join()
    cancel.close()
    assert not list(short_folder.iterdir())


def is_qemu(process: psutil.Process) -> bool:
    try:
        return "qemu" in process.name()
    except psutil.NoSuchProcess:  # the one that has probed KVM ends before this
        return False


def test_nothing_is_left_of_it_when_we_are_killed(
    archive: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(short_folder))
    command = [*VMAPIPE, "files", "ls", "--engine", "vm", str(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ours:
        process = psutil.Process(ours.pid)
        deadline = time.monotonic() + LIMIT_S
        family: list[psutil.Process] = []
        # Once QEMU has all open, its folder is gone, and it boots for some seconds.
        while not family or any(short_folder.iterdir()):
            assert time.monotonic() < deadline
            assert ours.poll() is None
            family = [p for p in process.children() if is_qemu(p)]
            time.sleep(0.01)
        ours.kill()
        ours.communicate()
    psutil.wait_procs(family, LIMIT_S)
    assert not [member for member in family if member.is_running()]
    assert not list(short_folder.iterdir())


def test_the_command_takes_the_appliance_for_what_the_parser_cannot_read(archive: Path) -> None:
    pytest.importorskip("pytsk3")
    key = f"luks2:2={archive.parent}/key"
    said = good("files", "cat", "--key-file", key, archive, "luks2/inner/root:/new/file")
    assert said == b"after\n"


def test_by_itself_it_is_taken_for_a_log_that_the_parser_does_not_replay(
    archive: Path, appliance: Appliance, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pytsk3")
    # The one that is up stays up.
    monkeypatch.setattr(module, "Appliance", lambda *words: contextlib.nullcontext(appliance))
    cancel, told = Cancel(), list[str]()
    with opened(archive, cancel) as disks:
        with Engines(disks, cancel, (), AUTO, None, told.append) as engines:
            # The parser sees neither of the first, and reads nothing of the second.
            for place, path in ((6, b"/new/file"), (6, b"/old/file"), (0, b"/new")):
                reader, volume = engines.find(place, b"", path)
                assert reader is appliance
                assert volume.disk == place
        monkeypatch.undo()
        with Engines(disks, cancel, (), AUTO, "/nowhere", told.append) as engines:
            with pytest.raises(Failure, match="the log is not replayed of fast:; the engine vm"):
                engines.find(6, b"", b"/new/file")
            assert not told
            reader, _ = engines.find(6, b"", b"/old/file")
            assert isinstance(reader, FileSession)
            assert "would replay its log, but: there is no Linux kernel in /nowhere" in told[0]
    cancel.close()


def test_a_host_without_a_kernel_is_told_how_to_get_one(archive: Path, tmp_path: Path) -> None:
    words = ("files", "ls", "--appliance", tmp_path, archive, "xfs:/new")
    said = bad(*words, "--engine", "vm")
    assert f"there is no Linux kernel in {tmp_path}" in said
    assert "linux-image-cloud-amd64" in said
    assert "Traceback" not in said
    pytest.importorskip("pytsk3")
    said = bad(*words)
    assert "not looked into: xfs: (xfs)" in said
    assert "the engine vm is for that, but: there is no Linux kernel" in said


def test_the_list_says_what_the_appliance_would_read(archive: Path) -> None:
    pytest.importorskip("pytsk3")
    lines = good("files", "ls", archive).decode().splitlines()
    kinds = {line.split()[0]: line.partition("MiB")[2].strip() for line in lines}
    assert kinds["xfs:"] == "xfs (read by the engine vm)"
    assert kinds["lvm0/group/thin:"] == "lvm thin (read by the engine vm)"


def test_a_kernel_without_a_driver_that_is_needed_is_refused(tmp_path: Path) -> None:
    version = "6.1.0-test"
    (tmp_path / "boot").mkdir()
    (tmp_path / "boot" / f"vmlinuz-{version}").write_bytes(b"kernel")
    modules = tmp_path / "lib/modules" / version
    modules.mkdir(parents=True)
    (modules / "modules.builtin").write_text("kernel/drivers/virtio/virtio_pci.ko\n")
    with pytest.raises(Failure, match="has no virtio_blk"):
        kernels.find_kernel(str(tmp_path), ("virtio_pci", "virtio_blk"))
