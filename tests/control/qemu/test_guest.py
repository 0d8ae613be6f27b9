# SPDX-License-Identifier: Apache-2.0
"""A real guest on an unmodified QEMU: files are rewritten while its disks are backed up."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil
import pytest

from tests.control.qemu.running_guest import COUNTER_SECTORS, RunningGuest, is_clean
from tests.machine import (
    LIMIT_S,
    Need,
    children,
    end_of,
    good,
    next_event,
    sha256,
    started,
    without_limit,
)


def copy_of(need: Need, image: Path, target: Path) -> Path:
    """As QEMU sees it; the guest has to be stopped."""
    (qemu_img,) = need("qemu-img")
    subprocess.run([qemu_img, "convert", "-U", "-O", "raw", image, target], check=True)
    return target


@pytest.mark.every_qemu
def test_the_archive_of_a_guest_that_was_stopped_equals_its_disks_and_it_stays_stopped(
    need: Need, guest: RunningGuest, images: tuple[Path, Path], tmp_path: Path
) -> None:
    archive = tmp_path / "vm.vma"
    guest.goes_on(3)
    guest.ask("stop")
    truth = [copy_of(need, image, tmp_path / f"truth{n}") for n, image in enumerate(images)]
    with started("backup", "--json", "--qmp", guest.qmp, "--speed", "64K", archive) as process:
        next_event(process, "instant")
        assert guest.ask("query-status")["status"] == "paused"
        guest.ask("cont")
        guest.goes_on(3)
        assert process.poll() is None
        without_limit(process)
        assert end_of(process)[0] == 0
    guest.goes_on(3)
    good("restore", archive, tmp_path / "restored")
    for copy, index in zip(truth, (0, 1), strict=True):
        restored = tmp_path / "restored" / f"disk-drive-virtio{index}.raw"
        assert sha256(restored) == sha256(copy)
    assert (tmp_path / "restored" / "disk-drive-virtio1.raw").stat().st_size == (
        COUNTER_SECTORS * 512
    )


def test_the_archive_of_a_running_guest_is_clean_and_shows_both_disks_at_one_instant(
    need: Need, guest: RunningGuest, tmp_path: Path
) -> None:
    (debugfs,) = need("debugfs")
    archive = tmp_path / "vm.vma"
    guest.goes_on(3)
    before = guest.rounds
    with started("backup", "--json", "--qmp", guest.qmp, "--speed", "12M", archive) as process:
        next_event(process, "instant")
        guest.goes_on(5)
        assert end_of(process)[0] == 0
    good("restore", archive, tmp_path / "restored")
    system = tmp_path / "restored" / "disk-drive-virtio0.raw"
    assert is_clean(need, system)
    words = [debugfs, "-R", "cat /counter", str(system)]
    file = int(subprocess.run(words, capture_output=True, check=True).stdout)
    sector = int((tmp_path / "restored" / "disk-drive-virtio1.raw").read_bytes()[:8])
    assert before <= sector
    assert file in (sector, sector - 1)


@pytest.mark.parametrize("victim", ["producer", "archiver", "coordinator", "all"])
def test_a_guest_does_not_notice_that_its_backup_is_killed(
    guest: RunningGuest, tmp_path: Path, victim: str
) -> None:
    """It is the guest's own script that ends, and says so, when one of its writes fails."""
    archive = tmp_path / "vm.vma"
    with started("backup", "--json", "--qmp", guest.qmp, "--speed", "64K", archive) as process:
        next_event(process, "instant")
        guest.goes_on(2)
        everybody = psutil.Process(process.pid).children(recursive=True)
        guardian = children(process, "vmapipe.control.qemu.guardian")
        if victim == "all":
            victims = [psutil.Process(process.pid), *set(everybody) - set(guardian)]
        elif victim == "coordinator":
            victims = [psutil.Process(process.pid)]
        else:
            victims = children(process, f"vmapipe.{victim}.main")[:1]
        for dying in victims:
            dying.suspend()
        for dying in victims:
            dying.kill()
        guest.goes_on(5)
        assert end_of(process)[0] != 0
    _, alive = psutil.wait_procs(everybody, timeout=LIMIT_S)
    assert alive == []
    guest.is_untouched()
    guest.goes_on(3)
