# SPDX-License-Identifier: Apache-2.0
"""The disk images that are measured. Made by chance, but the same in every run."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

MIB = 1 << 20
TIB_BYTES = 1 << 40
#: What the 1 TiB image holds.
TIB_DATA_MIB = 64


def dense(path: Path, size_mib: int) -> Path:
    """Random bytes, written by 256 KiB: what the page cache is made of depends on it."""
    chance = random.Random(1)
    with path.open("wb", buffering=0) as image:
        for _ in range(4 * size_mib):
            image.write(chance.randbytes(MIB // 4))
    return path


def quarter(path: Path, size_mib: int) -> Path:
    """A quarter of random bytes, in pieces of 1 MiB; the rest are holes."""
    chance = random.Random(2)
    with path.open("wb") as image:
        image.truncate(size_mib * MIB)
        for index in range(0, size_mib, 4):
            image.seek(index * MIB)
            image.write(chance.randbytes(MIB))
    return path


def zeroes(path: Path, size_mib: int) -> Path:
    """Zeroes that are no holes."""
    with path.open("wb", buffering=0) as image:
        for _ in range(4 * size_mib):
            image.write(bytes(MIB // 4))
    return path


def half_text(path: Path, size_mib: int) -> Path:
    """What compresses to about a half: random bytes with runs of a few words between them."""
    chance = random.Random(3)
    words = [chance.randbytes(6) for _ in range(2000)]
    with path.open("wb") as image:
        for _ in range(size_mib):
            text = b" ".join(chance.choices(words, k=MIB // 14))
            image.write((text + chance.randbytes(MIB - len(text)))[:MIB])
    return path


def sparse(path: Path, size_bytes: int, data_mib: int) -> Path:
    """Pieces of 1 MiB of data, evenly spread over a file of holes."""
    chance = random.Random(4)
    with path.open("wb") as image:
        image.truncate(size_bytes)
        for index in range(data_mib):
            image.seek(size_bytes // data_mib // MIB * index * MIB)
            image.write(chance.randbytes(MIB))
    return path


def qcow2(path: Path, raw: Path) -> Path:
    words = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path)]
    subprocess.run(words, check=True, capture_output=True)
    return path


def copied(path: Path, source: Path) -> Path:
    """Written by 256 KiB, as `dense`."""
    with source.open("rb", buffering=0) as old, path.open("wb", buffering=0) as new:
        while piece := old.read(MIB // 4):
            new.write(piece)
    os.sync()
    return path


def one_percent_changed(path: Path) -> None:
    """Other data in each hundredth cluster of 64 KiB."""
    chance = random.Random(5)
    with path.open("r+b") as image:
        for at in range(0, path.stat().st_size, 100 * 65536):
            image.seek(at)
            image.write(chance.randbytes(4096))
    os.sync()
