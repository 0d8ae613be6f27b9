# SPDX-License-Identifier: Apache-2.0
"""A backup's speed, changed by its parent while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tests.control.qemu.storage_daemon import storage_daemon
from tests.machine import LIMIT_S, good, make_disk
from tests.producer.guard.serving import serving
from vmapipe.runtime.children import Children
from vmapipe.runtime.events import speed_command

# At this speed the disk below would take four hours.
CRAWL = "--speed=4K"
CLUSTERS = 900


def backed_up_after_a_change(words: list[str], archive: Path) -> None:
    """Begins at a crawl, and ends because it is told to go on without a limit."""
    events = []
    deadline = time.monotonic() + LIMIT_S
    with Children() as children:
        child = children.start(
            "the backup", "vmapipe.control.cli.backup", [*words, CRAWL, str(archive)]
        )
        while child.running:
            assert time.monotonic() < deadline
            for _, event in children.wait(1.0):
                if event is None:
                    continue
                events.append(event["event"])
                if event["event"] == "instant":
                    child.tell(speed_command(0))
    assert child.verdict() == ""
    assert events.index("instant") < events.index("speed") < events.index("stored")
    good("verify", archive)


def test_a_guarded_disks_backup_follows(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "d.raw", "A" * CLUSTERS)
    with serving(tmp_path, d=disk) as served:
        backed_up_after_a_change([f"--monitor={served.monitor}"], tmp_path / "vm.vma")


def test_a_running_machines_backup_follows(tmp_path: Path, need: Callable[..., list[str]]) -> None:
    need("qemu-storage-daemon")
    disk = make_disk(tmp_path / "d.raw", "A" * CLUSTERS)
    with storage_daemon(tmp_path, d=disk) as machine:
        words = [f"--qmp={machine.qmp}", "--disk=d"]
        backed_up_after_a_change(words, tmp_path / "vm.vma")


def test_a_disk_at_rest_is_read_at_the_new_speed(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "d.raw", "A" * CLUSTERS)
    deadline = time.monotonic() + LIMIT_S
    with Children() as children:
        words = [f"--disk=d={disk}", CRAWL, str(tmp_path / "vm.vma")]
        child = children.start("the backup", "vmapipe.control.cli.backup", words)
        while child.running:
            assert time.monotonic() < deadline
            for _, event in children.wait(1.0):
                if event is not None and event["event"] == "begun":
                    child.tell(speed_command(0))
    assert child.verdict() == ""
