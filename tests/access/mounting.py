# SPDX-License-Identifier: Apache-2.0
"""`vmapipe mount`, run as a user runs it, for as long as a `with` lasts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.machine import LIMIT_S, VMAPIPE, next_event


class Mounted:
    """A running mount; at the end `said` has what it said on stdout and stderr."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.said = ""

    def end(self) -> int:
        """Wait for its end, which something else has asked for."""
        stdout, stderr = self.process.communicate(timeout=LIMIT_S)
        self.said += stdout.decode() + stderr.decode()
        assert "Traceback" not in self.said
        return self.process.returncode


def need_fuse() -> None:
    """Skip where the kernel has no FUSE for us: a device cannot be installed."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        pytest.skip(f"/dev/fuse: {error.strerror}")
    if os.geteuid() and not os.path.exists("/usr/bin/fusermount3"):
        pytest.skip("not installed: fusermount3")


@contextlib.contextmanager
def mounting(
    folder: Path, archive: str | Path, *words: str, before: Sequence[str] = ()
) -> Iterator[Mounted]:
    """Mounted until the block ends; then it is stopped, if it is still there."""
    need_fuse()
    folder.mkdir(exist_ok=True)
    command = [*before, *VMAPIPE, "mount", "--json", "--no-index-cache", *words]
    process = subprocess.Popen(
        [*command, str(archive), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    mounted = Mounted(process, folder)
    try:
        next_event(process, "mounted")
        yield mounted
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                mounted.end()
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                raise
            finally:
                if os.path.ismount(folder):
                    subprocess.run(["umount", "-l", folder])
    assert list(folder.iterdir()) == []
