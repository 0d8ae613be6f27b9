# SPDX-License-Identifier: Apache-2.0
"""Backups of a storage daemon's two disks, which a guest may write to meanwhile."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.control.qemu.hammer import CLUSTER, Hammer
from tests.control.qemu.storage_daemon import StorageDaemon
from tests.machine import LIMIT_S, good, next_event, started

SIZES = {"a": 192 * CLUSTER + 512, "b": 128 * CLUSTER}
BOTH = ("--disk", "a", "--disk", "b")


class Busy(NamedTuple):
    """A backup under way, all of its processes, and the guest that writes."""

    process: subprocess.Popen[bytes]
    everybody: list[psutil.Process]
    guest: Hammer


def restored(archive: Path, folder: Path) -> dict[str, bytes]:
    good("restore", archive, folder)
    return {name: (folder / f"disk-{name}.raw").read_bytes() for name in SIZES}


@contextlib.contextmanager
def slow_backup(
    daemon: StorageDaemon, out: Path, *options: str, **more: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A backup that takes half a minute, from its instant on."""
    words = ("backup", "--json", "--qmp", str(daemon.qmp), *BOTH, "--speed", "1M", *options)
    with started(*words, str(out / "vm.vma"), **more) as process:
        next_event(process, "instant")
        yield process


@contextlib.contextmanager
def busy_backup(daemon: StorageDaemon, out: Path, *options: str, **more: Any) -> Iterator[Busy]:
    """The same with a guest that writes from before it on, and that still does at the end."""
    with busy_guest(daemon) as guest, slow_backup(daemon, out, *options, **more) as process:
        guest.wait_for(20)
        yield Busy(process, psutil.Process(process.pid).children(recursive=True), guest)
        guest.wait_for(50)


def check_one_instant(
    daemon: StorageDaemon, contents: dict[str, bytes], folder: Path, speed: str
) -> None:
    """Back up while two guests write: both disks come back as after so many of the writes of each."""
    archive = folder / "vm.vma"
    sizes = {name: len(content) for name, content in contents.items()}
    with contextlib.ExitStack() as stack:
        hammers = [
            stack.enter_context(Hammer(daemon.path, sizes, lane, 2, pause_s=0.001))
            for lane in range(2)
        ]
        for hammer in hammers:
            hammer.wait_for(20)
        good("backup", "--qmp", daemon.qmp, *BOTH, "--speed", speed, archive)
        for hammer in hammers:
            hammer.wait_for(20)
    copies = restored(archive, folder / "restored")
    model = {name: bytearray(content) for name, content in contents.items()}
    for hammer in hammers:
        count = hammer.replay(copies, model)
        assert 20 <= count < hammer.done
    assert copies == model
    assert daemon.ours() == []


def busy_guest(daemon: StorageDaemon) -> Hammer:
    """It writes some hundred times a second: what it writes to is copied, and takes it ten seconds."""
    return Hammer(daemon.path, SIZES, pause_s=0.005)


def wait_for_end(processes: list[psutil.Process]) -> None:
    """Of the guardian, too, which may outlive the command."""
    _, alive = psutil.wait_procs(processes, timeout=LIMIT_S)
    assert alive == []
