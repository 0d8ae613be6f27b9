# SPDX-License-Identifier: Apache-2.0
"""A disk that changes between two backups."""

from __future__ import annotations

import random
from pathlib import Path

from tests.machine import good
from vmapipe.clusters.sizes import CLUSTER_BYTES

PATTERN = "Ap0hA" * 60


def change(disk: Path, *numbers: int, seed: int = 7) -> set[int]:
    """Write other data to these clusters; their numbers."""
    chance = random.Random(seed)
    with disk.open("r+b") as file:
        for number in numbers:
            file.seek(number * CLUSTER_BYTES + 4096)
            file.write(chance.randbytes(5000))
    return set(numbers)


def restored(archive: Path, folder: Path) -> bytes:
    good("verify", archive)
    good("restore", archive, folder)
    return (folder / "disk-a.raw").read_bytes()
