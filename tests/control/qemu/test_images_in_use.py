# SPDX-License-Identifier: Apache-2.0
"""Images that other programs have open as disks: never written to, never read as if at rest."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.archives import archive
from tests.machine import LIMIT_S, VMA, VMAPIPE, Need, bad, good, run, without_limit
from tests.producer.guard.serving import serving

MIB = 1 << 20


@functools.cache
def old_data() -> bytes:
    return b"\x55" * (4 * MIB)


@functools.cache
def new_data() -> bytes:
    return b"\xaa" * (4 * MIB)


@functools.cache
def new_archive() -> bytes:
    return archive({"d": new_data()})


IN_USE = "is in use: "


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(old_data())
    return path


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "vm.vma"
    path.write_bytes(new_archive())
    return path


@contextmanager
def running(words: Sequence[str | Path], **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(list(map(str, words)), stderr=subprocess.PIPE, **more) as process:
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def holds_locks(process: subprocess.Popen[bytes], image: Path) -> bool:
    """Whether it has the image open as a disk by now.

    The image alone counts: a QEMU with snapshot=on locks its temporary overlay before it.
    """
    for fd in psutil.Process(process.pid).open_files():
        if fd.path != str(image):
            continue
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            info = Path(f"/proc/{process.pid}/fdinfo/{fd.fd}").read_text(encoding="utf-8")
            if "OFDLCK" in info:
                return True
    return False


def wait_until(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def machine(*disk: str) -> list[str]:
    """A QEMU that stands still before its guest's first instruction."""
    system = ["qemu-system-x86_64", "-M", "pc", "-m", "32", "-nodefaults", "-S", "-display", "none"]
    return [*system, "-monitor", "none", *disk]


def blockdev(image: Path, *options: str) -> list[str]:
    node = ",".join([f"driver=file,node-name=f,filename={image}", *options])
    return machine("-blockdev", node, "-device", "virtio-blk-pci,drive=f")


def words_of(use: str, image: Path, folder: Path) -> list[str]:  # noqa: PLR0911
    """Programs that use a raw image, each in another way."""
    match use:
        case "guest":
            return machine("-drive", f"file={image},format=raw,if=virtio")
        case "guest that shares":
            return machine(
                *("-drive", f"file={image},format=raw,if=none,id=d"),
                *("-device", "virtio-blk-pci,drive=d,share-rw=on"),
            )
        case "guest that reads":
            return blockdev(image, "read-only=on")
        case "guest without locks":
            return blockdev(image, "locking=off")
        case "below an overlay":
            overlay = folder / "overlay.qcow2"
            backed = ["-f", "qcow2", "-b", str(image), "-F", "raw", str(overlay)]
            subprocess.run(["qemu-img", "create", "-q", *backed], check=True)
            return machine("-drive", f"file={overlay},format=qcow2,if=virtio")
        case "snapshot=on":
            return machine("-drive", f"file={image},format=raw,if=virtio,snapshot=on")
        case "qemu-nbd":
            return ["qemu-nbd", "-t", "-f", "raw", "-k", str(folder / "nbd.sock"), str(image)]
        case "qemu-nbd that reads":
            return ["qemu-nbd", "-r", "-t", "-f", "raw", "-k", str(folder / "nbd.sock"), str(image)]
        case "storage daemon":
            return [
                *("qemu-storage-daemon", "--blockdev"),
                f"driver=file,node-name=f,filename={image}",
                *("--nbd-server", f"addr.type=unix,addr.path={folder / 'nbd.sock'}"),
                *("--export", "type=nbd,id=e,node-name=f,name=x,writable=on"),
            ]
    raise ValueError(use)


@contextmanager
def used(use: str, image: Path, folder: Path) -> Iterator[None]:
    """The image is in use meanwhile."""
    with running(words_of(use, image, folder)) as process:
        if use == "guest without locks":
            name = str(image)
            wait_until(
                process,
                lambda: name in [f.path for f in psutil.Process(process.pid).open_files()],
            )
        else:
            wait_until(process, lambda: holds_locks(process, image))
        yield


WRITERS = ["guest", "guest that shares", "guest without locks", "qemu-nbd", "storage daemon"]
READERS = ["guest that reads", "below an overlay", "snapshot=on", "qemu-nbd that reads"]


@pytest.fixture
def programs(qemu: str, need: Need) -> None:
    need("qemu-system-x86_64", "qemu-nbd", "qemu-storage-daemon", "qemu-img")


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("use", [*WRITERS, *READERS])
def test_an_image_that_is_open_as_a_disk_is_never_overwritten(
    tmp_path: Path, image: Path, stored: Path, use: str
) -> None:
    (tmp_path / "map").write_text(f"1:d={image}\n", encoding="utf-8")
    (tmp_path / "format-map").write_text(f"format=raw:0:d={image}\n", encoding="utf-8")
    with used(use, image, tmp_path):
        everything = use == WRITERS[0]  # one of each program is enough for the others
        ways: tuple[tuple[str | Path, ...], ...] = (
            ("restore", stored, tmp_path / "a", "--device", f"d={image}"),
            ("restore", stored, tmp_path / "a", "--device", f"d={image},format=raw", "--overwrite"),
            ("restore", stored, tmp_path / "a", "--map", tmp_path / "map"),
        )
        for words in ways if everything else ways[:1]:
            text = bad(*words)
            assert IN_USE in text
            assert "(process " in text
        for name in ("map", "format-map") if everything else ("format-map",):
            text = bad("extract", "-r", tmp_path / name, stored, tmp_path / "b", tool=VMA)
            assert IN_USE in text
        assert image.read_bytes() == old_data()
        assert not (tmp_path / "a").exists()
        assert not (tmp_path / "b").exists()
    good("restore", stored, tmp_path / "a", "--device", f"d={image}")
    assert image.read_bytes() == new_data()


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("use", WRITERS)
def test_an_image_that_may_be_written_to_is_not_read_as_if_at_rest(
    tmp_path: Path, image: Path, use: str
) -> None:
    out = tmp_path / "out.vma"
    with used(use, image, tmp_path):
        ways: tuple[tuple[Sequence[str], tuple[str | Path, ...]], ...] = (
            (VMAPIPE, ("backup", "--disk", f"d={image}", out)),
            (VMA, ("create", out, "-d", f"format=raw:d={image}")),
            (VMAPIPE, ("backup", "--disk", f"d={image},format=raw,offset=0", out)),
            (VMA, ("create", out, f"d={image}")),
        )
        # One of each program is enough for the uses behind the first.
        for tool, words in ways if use == WRITERS[0] else ways[:2]:
            text = bad(*words, tool=tool)
            assert IN_USE in text
            assert "--force-share" in text
            assert not out.exists()
        done = run("backup", "--force-share", "--disk", f"d={image}", out)
        assert done.returncode == 0, done.stderr
        assert "is read all the same (--force-share)" in (done.stdout + done.stderr).decode()
    assert new_data() not in out.read_bytes()
    good("restore", out, tmp_path / "back")
    assert (tmp_path / "back" / "disk-d.raw").read_bytes() == old_data()


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("use", READERS)
def test_an_image_that_others_only_read_is_backed_up(tmp_path: Path, image: Path, use: str) -> None:
    with used(use, image, tmp_path):
        good("backup", "--disk", f"d={image}", tmp_path / "out.vma")


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("image_format", ["qcow2", "vmdk", "vdi", "vhdx", "qed", "vpc"])
def test_an_image_of_another_format_is_neither_written_to_nor_read_while_a_guest_has_it(
    tmp_path: Path, stored: Path, image_format: str
) -> None:
    image = tmp_path / f"disk.{image_format}"
    size = "4M" if image_format != "vpc" else "8M"
    subprocess.run(["qemu-img", "create", "-q", "-f", image_format, image, size], check=True)
    (tmp_path / "map").write_text(f"format={image_format}:1:d={image}\n", encoding="utf-8")
    before = image.read_bytes()
    words = machine("-drive", f"file={image},format={image_format},if=virtio")
    out = tmp_path / "out.vma"
    with running(words) as process:
        wait_until(process, lambda: holds_locks(process, image))
        opened = image.read_bytes()
        for command in (
            ("--device", f"d={image},format={image_format}", "--overwrite"),
            ("--device", f"d={image},format=raw"),
        ):
            assert IN_USE in bad("restore", stored, tmp_path / "a", *command)
        text = bad("extract", "-r", tmp_path / "map", stored, tmp_path / "b", tool=VMA)
        assert IN_USE in text
        text = bad("backup", "--disk", f"d={image},format={image_format}", out)
        assert IN_USE in text
        assert image.read_bytes() == opened
        good("backup", "--force-share", "--disk", f"d={image},format={image_format}", out)
    assert len(before) <= image.stat().st_size


def test_a_program_that_has_it_open_for_writing_is_found_without_locks(
    tmp_path: Path, image: Path, stored: Path
) -> None:
    code = f"f = open({str(image)!r}, 'r+b'); print('open', flush=True); input()"
    words = [sys.executable, "-c", code]
    with running(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        who = f"(process {process.pid})"
        assert who in bad("backup", "--disk", f"d={image}", tmp_path / "out.vma")
        assert who in bad("restore", stored, tmp_path / "a", "--device", f"d={image}")
    assert image.read_bytes() == old_data()


def test_a_disk_that_a_monitor_serves_is_not_read_or_overwritten_beside_it(
    tmp_path: Path, image: Path, stored: Path
) -> None:
    with serving(tmp_path, d=image):
        assert IN_USE in bad("backup", "--disk", f"d={image}", tmp_path / "out.vma")
        assert IN_USE in bad("restore", stored, tmp_path / "a", "--device", f"d={image}")


@contextmanager
def half_a_restore(image: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A restore onto an image that has begun and waits for the rest of its archive."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    command = ["restore", str(fifo), str(tmp_path / "out"), "--device", f"d={image}"]
    with running([*VMAPIPE, *command]) as process, fifo.open("wb", buffering=0) as writer:
        writer.write(new_archive()[: len(new_archive()) // 2])
        wait_until(process, lambda: holds_locks(process, image))
        yield process
        rest = new_archive()[len(new_archive()) // 2 :]
        while rest:
            rest = rest[writer.write(rest) :]
        writer.close()
        assert process.wait(LIMIT_S) == 0


def refused(words: Sequence[str | Path]) -> str:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode != 0, words
    return done.stderr


@pytest.mark.every_qemu
@pytest.mark.usefixtures("programs")
def test_nobody_opens_an_image_that_is_being_restored_onto(
    tmp_path: Path, image: Path, stored: Path
) -> None:
    with half_a_restore(image, tmp_path):
        for use in ("guest", "guest that reads", "qemu-nbd", "storage daemon"):
            assert "lock" in refused(words_of(use, image, tmp_path))
        assert "lock" in refused(["qemu-img", "convert", "-f", "raw", "-O", "raw", image, "/x"])
        assert IN_USE in bad("backup", "--disk", f"d={image}", tmp_path / "b.vma")
        assert IN_USE in bad("restore", stored, tmp_path / "c", "--device", f"d={image}")
    assert image.read_bytes() == new_data()


@pytest.mark.every_qemu
@pytest.mark.usefixtures("programs")
def test_no_writer_opens_an_image_that_is_being_backed_up(
    tmp_path: Path, image: Path, stored: Path
) -> None:
    image.write_bytes(old_data() * 8)
    words = ["backup", "--speed", "64K", "--disk", f"d={image}", str(tmp_path / "slow.vma")]
    with running([*VMAPIPE, *words], stdout=subprocess.DEVNULL) as process:
        partial = tmp_path / "slow.vma.partial"
        wait_until(process, lambda: partial.exists() and partial.stat().st_size > 0)
        for use in ("guest", "guest that shares", "qemu-nbd", "storage daemon"):
            assert "lock" in refused(words_of(use, image, tmp_path))
        assert IN_USE in bad("restore", stored, tmp_path / "c", "--device", f"d={image}")
        # Others may read, and so may we.
        info = ["qemu-img", "info", "-f", "raw", str(image)]
        assert subprocess.run(info, capture_output=True, timeout=LIMIT_S).returncode == 0
        good("backup", "--disk", f"d={image}", tmp_path / "quick.vma")
        without_limit(process)
        assert process.wait(LIMIT_S) == 0


def test_an_image_that_is_written_to_while_it_is_read_is_not_called_stored(
    tmp_path: Path, image: Path
) -> None:
    image.write_bytes(old_data() * 8)
    words = ["backup", "--speed", "64K", "--disk", f"d={image}", str(tmp_path / "slow.vma")]
    with running([*VMAPIPE, *words], stdout=subprocess.DEVNULL) as process:
        partial = tmp_path / "slow.vma.partial"
        wait_until(process, lambda: partial.exists() and partial.stat().st_size > 0)
        with image.open("r+b") as file:
            file.write(b"torn")
        without_limit(process)
        _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert "was written to while it was read" in errors.decode()
    assert not (tmp_path / "slow.vma").exists()
