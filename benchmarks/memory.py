# SPDX-License-Identifier: Apache-2.0
"""The peak memory of a command with all its processes, what they share counted once."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from benchmarks.measure import LIMIT_S, environment, remove
from benchmarks.place import Place, backup, vmapipe

# Some fifty looks at the quickest of these backups.
_LOOK_S = 0.005
_MORE_DEVICES = 8
_MIB = 1 << 20


@dataclass(frozen=True)
class Memory:
    """`limit_mib`: the bound, None where there is none."""

    name: str
    peak_mib: float
    limit_mib: float | None = None


def peak_mib(words: Sequence[str]) -> float:
    """The largest sum of the processes' PSS that was seen. Raises SystemExit when it fails."""
    peak = 0
    deadline = time.monotonic() + LIMIT_S
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, env=environment()) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.terminate()
            peak = max(peak, _pss_bytes(root))
            time.sleep(_LOOK_S)
    if process.returncode:
        raise SystemExit(f"{words} ended with exit code {process.returncode}")
    return peak / _MIB


def _pss_bytes(root: psutil.Process) -> int:
    total = 0
    with contextlib.suppress(psutil.Error):
        for process in [root, *root.children(recursive=True)]:
            # It may be ending just now.
            with contextlib.suppress(OSError), open(f"/proc/{process.pid}/smaps_rollup") as rollup:
                for line in rollup:
                    if line.startswith("Pss:"):
                        total += int(line.split()[1]) * 1024
    return total


def measure(place: Place) -> list[Memory]:
    size = f"{place.size_mib} MiB"
    one = peak_mib(backup(place.dense, "/dev/null"))
    disks = [word for n in range(_MORE_DEVICES) for word in ("--disk", f"d{n}={place.small}")]
    more = peak_mib(vmapipe("backup", "--quiet", *disks, "/dev/null"))
    archive = place.disk / "memory.vma"
    try:
        to_file = peak_mib(backup(place.dense, archive))
        restore = peak_mib(vmapipe("restore", "--quiet", archive, place.disk / "memory"))
    finally:
        for path in (archive, place.disk / "memory"):
            remove(path)
    return [
        Memory(f"backup, 1 disk of {size}, to nothing", one, 256),
        Memory(f"backup, 1 disk of {size}, to a file", to_file, 256),
        Memory(
            "backup, 1 disk of 1 TiB, nearly all holes",
            peak_mib(backup(place.tib, "/dev/null")),
            256,
        ),
        Memory(
            f"backup, each further disk, of {_MORE_DEVICES}", (more - one) / (_MORE_DEVICES - 1), 40
        ),
        Memory(f"restore, 1 disk of {size}, to a file", restore),
    ]
