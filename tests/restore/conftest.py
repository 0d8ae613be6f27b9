# SPDX-License-Identifier: Apache-2.0
"""What several files' restores write to."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine import Need
from tests.restore.support import is_root

MIB = 1 << 20


@pytest.fixture
def loop(tmp_path: Path, need: Need) -> Iterator[str]:
    """A block device of 16 MiB full of garbage."""
    if not is_root():
        pytest.skip("making a loop device needs root")
    (losetup,) = need("losetup")
    image = tmp_path / "loop.img"
    image.write_bytes(b"\xaa" * (16 * MIB))
    done = subprocess.run(
        [losetup, "--find", "--show", image], capture_output=True, check=True, text=True
    )
    yield done.stdout.strip()
    subprocess.run([losetup, "--detach", done.stdout.strip()], check=True)
