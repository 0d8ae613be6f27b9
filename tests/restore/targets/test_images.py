# SPDX-License-Identifier: Apache-2.0
"""Restores to images of formats other than raw, without a raw copy in between."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.machine import LIMIT_S, Need, bad, good, make_disk, next_event, started


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "d.raw", "A0hpA" * 40, tail_bytes=65024)


@pytest.fixture
def archive(tmp_path: Path, disk: Path) -> Path:
    good("backup", "--disk", f"d={disk}", "--disk", f"e={disk}", tmp_path / "vm.vma")
    return tmp_path / "vm.vma"


@pytest.mark.parametrize("image_format", ["qcow2", "qed", "vdi", "vhdx", "vmdk", "vpc"])
def test_an_image_holds_what_the_disk_held(
    tmp_path: Path, disk: Path, archive: Path, need: Need, image_format: str
) -> None:
    qemu_img, _ = need("qemu-img", "qemu-storage-daemon")
    image = tmp_path / f"d.{image_format}"
    good("restore", archive, tmp_path, "--device", f"d={image},format={image_format}")
    words = [qemu_img, "compare", "-f", "raw", "-F", image_format, str(disk), str(image)]
    done = subprocess.run(words, capture_output=True, timeout=LIMIT_S)
    # A format may round the size up; what is beyond reads as zero.
    assert done.returncode == 0, done.stdout + done.stderr


def test_zeroes_and_holes_take_no_room_in_a_qcow2(
    tmp_path: Path, archive: Path, need: Need
) -> None:
    need("qemu-img", "qemu-storage-daemon")
    image = tmp_path / "d.qcow2"
    good("restore", archive, tmp_path, "--device", f"d={image},format=qcow2")
    # 200 clusters, 80 of them full, 40 with one block (a qcow2's clusters are 64 KiB, too).
    assert image.stat().st_size < (80 + 40 + 10) * 65536


def test_images_and_files_are_restored_together_from_a_pipe(
    tmp_path: Path, disk: Path, archive: Path, need: Need
) -> None:
    qemu_img, _ = need("qemu-img", "qemu-storage-daemon")
    with archive.open("rb") as stream:
        good(
            *(
                "restore",
                "-",
                tmp_path / "out",
                "--device",
                f"d={tmp_path / 'd.qcow2'},format=qcow2",
            ),
            *("--device", "e"),
            stdin=stream,
        )
    for image in (tmp_path / "d.qcow2", tmp_path / "out" / "disk-e.raw"):
        words = [qemu_img, "compare", "-f", "raw", str(disk), str(image)]
        assert subprocess.run(words, capture_output=True, timeout=LIMIT_S).returncode == 0


def test_a_format_that_nobody_knows_is_refused(tmp_path: Path, archive: Path) -> None:
    words = bad(
        "restore", archive, tmp_path, "--device", f"d={tmp_path / 'x'},format=floppy", code=2
    )
    assert "'floppy' is none of raw, qcow2" in words


def test_an_image_that_exists_is_not_overwritten(tmp_path: Path, archive: Path, need: Need) -> None:
    need("qemu-img", "qemu-storage-daemon")
    (tmp_path / "d.qcow2").write_text("precious")
    words = bad("restore", archive, tmp_path, "--device", f"d={tmp_path / 'd.qcow2'},format=qcow2")
    assert "exists already" in words
    assert (tmp_path / "d.qcow2").read_text() == "precious"


def test_without_the_storage_daemon_the_message_names_the_package(
    tmp_path: Path, archive: Path
) -> None:
    words = bad(
        *("restore", archive, tmp_path, "--device", f"d={tmp_path / 'd.qcow2'},format=qcow2"),
        env={**os.environ, "PATH": "/nowhere"},
    )
    assert "qemu-img is needed (Debian: qemu-utils)" in words
    assert not (tmp_path / "d.qcow2").exists()


@pytest.mark.parametrize("victim", ["daemon", "restore"])
def test_nothing_is_left_when_the_daemon_or_the_restore_is_killed(
    tmp_path: Path, need: Need, victim: str
) -> None:
    need("qemu-img", "qemu-storage-daemon", "setpriv")
    big = make_disk(tmp_path / "big.raw", "A" * 2000)
    good("backup", "--no-manifest", "--disk", f"d={big}", tmp_path / "big.vma")
    out = tmp_path / "out"
    # The archive comes through a pipe that we hold: the restore cannot end before.
    read_end, write_end = os.pipe()
    target = f"d={out / 'd.qcow2'},format=qcow2"
    with started("restore", "--json", "-", out, "--device", target, stdin=read_end) as process:
        os.close(read_end)
        with (tmp_path / "big.vma").open("rb") as archive:
            os.write(write_end, archive.read(65536))
        next_event(process, "restoring")
        family = psutil.Process(process.pid).children(recursive=True)
        daemon = next(child for child in family if "storage" in child.name())
        (daemon if victim == "daemon" else process).kill()
        if victim == "daemon":
            try:
                with (tmp_path / "big.vma").open("rb") as archive:
                    archive.seek(65536)
                    while piece := archive.read(1 << 20):
                        os.write(write_end, piece)
            except BrokenPipeError:
                pass
        os.close(write_end)
        _, stderr = process.communicate(timeout=LIMIT_S)
        assert process.returncode not in (0, None)
        assert b"Traceback" not in stderr
        if victim == "daemon":
            assert b"'d': cannot write to" in stderr
        _, alive = psutil.wait_procs(family, timeout=LIMIT_S)
        assert not alive
    assert not (out / "d.qcow2").exists()
