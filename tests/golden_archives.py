# SPDX-License-Identifier: Apache-2.0
"""The archives of the reference tool: unpacked, and what they hold."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import NamedTuple

GOLDEN_DIR = Path(__file__).parent / "golden"


class GoldenItem(NamedTuple):
    """One config or device of a golden archive."""

    kind: str  # "config" or "device"
    name: str
    size_bytes: int
    sha256: str


def read_digests() -> dict[str, list[GoldenItem]]:
    """What every golden archive holds, by the archive's name ("g01-rfc.vma")."""
    digests: dict[str, list[GoldenItem]] = {}
    for line in (GOLDEN_DIR / "digests.txt").read_text(encoding="ascii").splitlines():
        archive, kind, name, size, sha256 = line.split(" ")
        digests.setdefault(archive, []).append(GoldenItem(kind, name, int(size), sha256))
    return digests


def unpack_all(target: Path) -> None:
    """Write every golden archive, unpacked, into the folder `target`."""
    for packed in sorted(GOLDEN_DIR.glob("*.vma.xz")):
        (target / packed.stem).write_bytes(lzma.decompress(packed.read_bytes()))
