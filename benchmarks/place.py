# SPDX-License-Identifier: Apache-2.0
"""Where the images are, and the commands that many cases have in common."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import images
from benchmarks.measure import run_quietly

VMAPIPE = (sys.executable, "-P", "-m", "vmapipe.control.main")


@dataclass(frozen=True)
class Place:
    """Where everything is. `reference`: the C tool's program, if there is one."""

    disk: Path
    memory: Path
    size_mib: int
    reference: str | None = None

    @property
    def small_mib(self) -> int:
        """For what is slow, or not among the bounds."""
        return max(64, self.size_mib // 4)

    @property
    def dense(self) -> Path:
        return self.disk / "dense.raw"

    @property
    def quarter(self) -> Path:
        return self.disk / "quarter.raw"

    @property
    def zeroes(self) -> Path:
        return self.disk / "zeroes.raw"

    @property
    def tib(self) -> Path:
        return self.disk / "tib.raw"

    @property
    def small(self) -> Path:
        return self.disk / "small.raw"

    @property
    def text(self) -> Path:
        return self.disk / "text.raw"

    def archive(self, image: Path) -> Path:
        return image.with_suffix(".vma")


def vmapipe(*words: str | Path) -> list[str]:
    return [*VMAPIPE, *map(str, words)]


def backup(image: Path, target: str | Path, *more: str) -> list[str]:
    return vmapipe("backup", "--quiet", "--disk", f"drive-scsi0={image}", *more, target)


def make(words: Sequence[str] | str) -> None:
    """Outside the measured time. Raises SystemExit."""
    done = run_quietly(words)
    if done.returncode:
        raise SystemExit(f"{words} failed:\n{done.stdout}{done.stderr}")


def make_images(place: Place) -> None:
    images.dense(place.dense, place.size_mib)
    images.quarter(place.quarter, place.size_mib)
    images.dense(place.small, place.small_mib)
    images.half_text(place.text, place.small_mib)
    images.sparse(place.tib, images.TIB_BYTES, images.TIB_DATA_MIB)


def make_archives(place: Place) -> None:
    for image in (place.dense, place.quarter, place.small):
        if not place.archive(image).exists():
            make(backup(image, place.archive(image)))


def dd(image: Path, target: str | Path, *more: str) -> list[str]:
    return ["dd", f"if={image}", f"of={target}", "bs=1M", "status=none", *more]


def dd_from_pipe(out: Path) -> list[str]:
    return dd(Path("/dev/stdin"), out, "iflag=fullblock", "conv=fdatasync")
