# SPDX-License-Identifier: Apache-2.0
"""Thin disks of a running QEMU: empty space is neither sent nor counted, and nothing is left out."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.control.qemu.daemon_backup import check_one_instant, slow_backup
from tests.control.qemu.hammer import CLUSTER
from tests.control.qemu.storage_daemon import StorageDaemon, storage_daemon
from tests.machine import Need, end_of, eventually, good, make_disk, next_event, started
from vmapipe.control.qmp.client import QmpClient
from vmapipe.control.qmp.connection import Command

pytestmark = pytest.mark.every_qemu


def convert(source: Path, target: Path, *options: str) -> None:
    words = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options]
    subprocess.run([*words, str(source), str(target)], check=True)


@pytest.fixture
def thin(
    qemu: str,
    need: Need,
    tmp_path: Path,
    contents: dict[str, bytes],
    cluster_size: str,
) -> Iterator[StorageDaemon]:
    """The disks of `daemon` in qcow2 images: what is zero was never written."""
    need("qemu-storage-daemon", "qemu-img")
    images = {}
    for name, content in contents.items():
        raw = tmp_path / f"{name}.raw"
        raw.write_bytes(content)
        images[name] = tmp_path / f"{name}.qcow2"
        convert(raw, images[name], "-o", f"cluster_size={cluster_size}")
    with storage_daemon(tmp_path, **images) as machine:
        yield machine


# QEMU copies 64 KiB at a time, whatever the image's clusters are.
@pytest.mark.parametrize(("cluster_size", "speed"), [("64K", "6M"), ("4K", "0"), ("2M", "0")])
def test_a_guest_may_write_into_the_empty_space_meanwhile(
    thin: StorageDaemon, contents: dict[str, bytes], tmp_path: Path, speed: str
) -> None:
    check_one_instant(thin, contents, tmp_path, speed)


def test_empty_space_takes_no_time_however_low_the_limit_is(
    qemu: str, need: Need, tmp_path: Path
) -> None:
    """Counted as read, these 16 GiB would take 4 hours."""
    need("qemu-storage-daemon", "qemu-img")
    image, archive = tmp_path / "a.qcow2", tmp_path / "vm.vma"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "16G"], check=True)
    write = "write -P 7 10G 64K"
    subprocess.run(["qemu-io", "-c", write, str(image)], check=True, stdout=subprocess.DEVNULL)
    with storage_daemon(tmp_path, a=image) as machine:
        good("backup", "--qmp", machine.qmp, "--disk", "a", "--speed", "1M", archive)
        assert machine.ours() == []
    good("restore", archive, tmp_path / "restored")
    with (tmp_path / "restored" / "disk-a.raw").open("rb") as disk:
        disk.seek((10 << 30) - CLUSTER)
        assert disk.read(3 * CLUSTER) == bytes(CLUSTER) + b"\7" * CLUSTER + bytes(CLUSTER)


LIMIT = 8 << 20


@pytest.fixture
def holes(qemu: str, need: Need, tmp_path: Path) -> Iterator[StorageDaemon]:
    """A raw disk: three times 4 GiB of hole and 16 MiB of data."""
    need("qemu-storage-daemon")
    image, chance = tmp_path / "a.raw", random.Random(9)
    with image.open("wb") as disk:
        for _ in range(3):
            disk.seek(4 << 30, os.SEEK_CUR)
            disk.write(chance.randbytes(16 << 20))
    with storage_daemon(tmp_path, a=image) as machine:
        yield machine


def test_holes_of_a_raw_disk_do_not_count_and_data_is_held_to_the_limit(
    holes: StorageDaemon, tmp_path: Path
) -> None:
    """Counted, they would take 25 minutes. Data: in no time more than the limit and a burst."""
    words = ("backup", "--json", "--qmp", str(holes.qmp), "--disk", "a", "--speed", str(LIMIT))
    with started(*words, str(tmp_path / "vm.vma")) as backup:
        next_event(backup, "instant")
        began, came = time.monotonic(), [(0.0, 0)]
        assert backup.stdout is not None
        for line in backup.stdout:
            event = json.loads(line)
            if event["event"] == "transfer":
                came.append((time.monotonic() - began, event["read_bytes"]))
        assert end_of(backup)[0] == 0
    assert came[-1][1] == 48 << 20
    # 4 MiB at once after a hole; of each of QEMU's four requests one more megabyte before the
    # limit is in force, and one that it counts as begun.
    for at, read_bytes in came:
        assert read_bytes <= LIMIT * at + 3 * ((4 << 20) + (5 << 20)) + (2 << 20)
    assert holes.ours() == []


def test_what_lies_in_a_backing_file_is_copied(qemu: str, need: Need, tmp_path: Path) -> None:
    need("qemu-storage-daemon", "qemu-img")
    base, top = tmp_path / "base.qcow2", tmp_path / "a.qcow2"
    raw = make_disk(tmp_path / "raw", "A0AAh0A")
    convert(raw, base)
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(top)]
    subprocess.run(words, check=True)
    with storage_daemon(tmp_path, a=top) as machine:
        good("backup", "--qmp", machine.qmp, "--disk", "a", tmp_path / "vm.vma")
    good("restore", tmp_path / "vm.vma", tmp_path / "restored")
    assert (tmp_path / "restored" / "disk-a.raw").read_bytes() == raw.read_bytes()


def test_a_job_that_has_vanished_stores_nothing_even_when_all_data_has_come(
    daemon: StorageDaemon, out: Path
) -> None:
    """Without us it ends, and somebody dismisses it: how it ended is not known."""
    with (
        slow_backup(daemon, out) as backup,
        contextlib.closing(QmpClient(str(daemon.second))) as qemu,
    ):
        backup.send_signal(signal.SIGSTOP)
        for job in qemu.execute(Command("query-block-jobs", {})):
            arguments = {"device": job["device"], "speed": 0}
            qemu.execute(Command("block-job-set-speed", arguments))

        def all_ended() -> bool:
            jobs = qemu.execute(Command("query-jobs", {}))
            for job in jobs:
                if job["status"] == "pending":  # those of QEMU 10.1 and later wait for us
                    qemu.execute(Command("job-finalize", {"id": job["id"]}))
            return all(job["status"] == "concluded" for job in jobs)

        assert eventually(all_ended)
        for job in qemu.execute(Command("query-jobs", {})):
            qemu.execute(Command("job-dismiss", {"id": job["id"]}))
        backup.send_signal(signal.SIGCONT)
        code, said = end_of(backup)
    assert code == 1
    assert list(out.iterdir()) == []
    assert "somebody has removed QEMU's backup job" in said
