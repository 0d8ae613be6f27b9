# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.incremental`: a live backup of a disk of which 1 % has changed, against a full one.

The disk is a qemu-storage-daemon's, as in benchmarks.qemu. An incremental archive is as full as any other, and
written as a whole; what it saves is reads of the guest's disk and what travels.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.images import dense
from benchmarks.place import VMAPIPE
from benchmarks.qemu import Machine

#: The bars: time against a full backup (on this host the base is read, checked and written anew, which is
#: more than a full backup does), and what is sent against what has changed, without the sample.
MOST_TIME = 2.0
MOST_SENT = 1.1
_CHANGED_PERCENT = 1
_CLUSTER = 65536


class Took(NamedTuple):
    """One backup: seconds, and bytes that QEMU has sent."""

    seconds: float
    sent_bytes: int


def back_up(machine: Machine, archive: Path, *words: str) -> Took:
    """Raises SystemExit for a backup that fails."""
    started = time.monotonic()
    command = [*VMAPIPE, "backup", "--json", "--qmp", str(machine.qmp), "--disk", "d", *words]
    done = subprocess.run([*command, str(archive)], capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(done.stderr)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    (end,) = [event for event in events if event["event"] == "done"]
    return Took(seconds, end["read_bytes"])


def change(machine: Machine, size_mib: int, chance: random.Random) -> int:
    """Write to 1 % of the disk's clusters, as a guest; return how many bytes those are."""
    clusters = size_mib * (1 << 20) // _CLUSTER
    chosen = chance.sample(range(clusters), clusters * _CHANGED_PERCENT // 100)
    words = [word for number in chosen for word in ("-c", f"write -q -P 7 {number * _CLUSTER} 4k")]
    uri = f"nbd+unix:///d?socket={machine.nbd}"
    for at in range(0, len(words), 1000):
        subprocess.run(["qemu-io", "-f", "raw", *words[at : at + 1000], uri], check=True)
    return len(chosen) * _CLUSTER


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.incremental", description=__doc__)
    parser.add_argument("--size", type=int, default=2048, metavar="MIB", help="default: 2048")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--folder", type=Path, help="where images and archives go (default: temp)")
    options = parser.parse_args(argv)
    missing = [n for n in ("qemu-io", "qemu-storage-daemon") if shutil.which(n) is None]
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="vmapipe-bench-", dir=options.folder) as name:
        return measure(Path(name), options.size, options.rounds)


def measure(folder: Path, size_mib: int, rounds: int) -> int:
    """Print what it took, and return 1 where a bar is missed."""
    chance = random.Random(1)
    machine = Machine(dense(folder / "image.raw", size_mib), folder)
    times, sent = [], []
    try:
        back_up(machine, folder / "vm-2026-01-01.vma", "--base", "auto")
        for number in range(2, rounds + 2):
            changed = change(machine, size_mib, chance)
            os.sync()
            full = back_up(machine, folder / "full.vma")
            os.sync()
            name = f"vm-2026-01-{number:02}.vma"
            some = back_up(machine, folder / name, "--base", "auto", "--sample", "0")
            print(
                f"  full: {full.seconds:.2f} s, {full.sent_bytes >> 20} MiB sent; incremental: "
                f"{some.seconds:.2f} s, {some.sent_bytes >> 20} MiB sent, {changed >> 20} MiB changed"
            )
            times.append(some.seconds / full.seconds)
            sent.append(some.sent_bytes / changed)
            for path in (folder / "full.vma", folder / f"vm-2026-01-{number - 1:02}.vma"):
                path.unlink()
    finally:
        machine.close()
    missed = False
    for what, ratios, most in (("time", times, MOST_TIME), ("sent", sent, MOST_SENT)):
        ratio = statistics.median(ratios)
        missed = missed or ratio > most
        against = "a full one" if what == "time" else "what has changed"
        verdict = "met" if ratio <= most else "MISSED"
        print(f"{what} against {against}: {ratio:.2f} x, at most {most}: {verdict}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
