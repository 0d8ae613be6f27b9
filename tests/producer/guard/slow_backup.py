# SPDX-License-Identifier: Apache-2.0
"""A backup that is slow while a program works on the disk of a running monitor."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.machine import LIMIT_S, children, good, next_event, started, without_limit
from tests.producer.guard.serving import Served

MIB = 1 << 20


def run(*words: str | Path, **more: Any) -> str:
    """A program that must end well, and what it said."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        **more,
    )
    assert done.returncode == 0, f"{words[0]}: {done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def during_a_backup(served: Served, archive: Path) -> Iterator[None]:
    """The block runs between the backup's instant and its end; the backup then ends well."""
    # Some seconds for the smallest of these disks: its archiver is stopped before it is over.
    words = ("backup", "--json", "--monitor", served.monitor, "--speed", "1M", archive)
    with started(*words) as process:
        next_event(process, "instant")
        archiver = children(process, "vmapipe.archiver.main")[0]
        archiver.suspend()
        try:
            yield
            assert process.poll() is None, "the backup was over before the program"
            without_limit(process)
        finally:
            archiver.resume()
        _, stderr = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, stderr.decode()


def restored(archive: Path, name: str = "d") -> Path:
    """The disk as the archive has it."""
    good("verify", archive)
    good("restore", "--no-configs", archive, archive.with_suffix(".out"))
    return archive.with_suffix(".out") / f"disk-{name}.raw"
