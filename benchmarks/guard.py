# SPDX-License-Identifier: Apache-2.0
"""What a guest feels: fio's NBD engine against our server and others, and during a backup."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.images import dense
from benchmarks.measure import read
from benchmarks.place import VMAPIPE
from benchmarks.servers import Served, all_servers, wait_for_event
from benchmarks.servers import vmapipe as start_vmapipe

# Long enough for a stable median, short enough that what else the machine does
# meets all servers of a round alike.
_RUN_S = 2
# What a backup may read; a disk of a server's own speed would be read in no time.
_SPEED = "200M"
# All servers' images together stay in the page cache.
_IDLE_MIB = 1024
# Of writes during a backup. fio ends first: while it runs, a backup gets
# nowhere near the end of the image, whatever --size says.
_BACKUP_RUN_S = 2
_BACKUP_MIB = 4096


class Load(NamedTuple):
    """What fio does. `random` loads are compared by operations, the others by bytes a second."""

    name: str
    words: Sequence[str]
    by_bytes: bool = False
    goal: str = ""


class Felt(NamedTuple):
    """A run of fio."""

    iops: float
    bytes_s: float
    p50_us: float
    p99_us: float
    max_us: float


_BETTER = "at least the better peer's"
LOADS = (
    Load("4K random writes, depth 1", ("--rw=randwrite", "--bs=4k", "--iodepth=1"), goal=_BETTER),
    Load("4K random writes, depth 16", ("--rw=randwrite", "--bs=4k", "--iodepth=16"), goal=_BETTER),
    Load("64K writes, depth 16", ("--rw=write", "--bs=64k", "--iodepth=16"), by_bytes=True),
    Load("1M writes, depth 16", ("--rw=write", "--bs=1M", "--iodepth=16"), by_bytes=True),
)
_DURING = "during a backup"


@dataclass
class Result:
    """The runs of one load: by server, a figure a round.

    `least`: ours / the better peer's; `least_iops`: operations a second, whatever a peer has.
    """

    title: str
    goal: str
    by_bytes: bool
    felt: dict[str, list[Felt]]
    least: float = 1.0
    least_iops: float = 0.0


def _title(load: Load, when: str = "idle") -> str:
    return f"guard: {load.name}, {when}"


def run_guard(folder: Path, size_mib: int, rounds: int, only: str) -> Iterator[Result]:
    """All cases whose title has the word."""
    idle = [load for load in LOADS if only in _title(load)]
    during = [load for load in LOADS[:2] if only in _title(load, _DURING)]
    if (idle or during) and shutil.which("fio") is None:
        print("\nguard: fio is not installed; left out")
        return
    if idle:
        yield from _idle(folder, size_mib, rounds, idle)
    for load in during:
        yield _during_backups(folder, rounds, load)


def _idle(folder: Path, size_mib: int, rounds: int, loads: Sequence[Load]) -> Iterator[Result]:
    starts = all_servers()
    results = {
        load: Result(_title(load), load.goal, load.by_bytes, {"vmapipe": []}) for load in loads
    }
    with (
        _copies(folder, min(size_mib, _IDLE_MIB), len(starts)) as images,
        contextlib.ExitStack() as running,
    ):
        # Who sleeps costs nothing, so that all may run all the time.
        servers = [
            running.enter_context(start(image, folder))
            for start, image in zip(starts, images, strict=True)
        ]
        chance = random.Random(1)
        for turn in range(rounds + 1):
            for load in loads:
                cached(images)
                order = list(servers)
                chance.shuffle(order)
                for server in order:
                    felt = run_fio(server, load, folder, _RUN_S if turn else 1)
                    if turn:  # the first round warms up
                        results[load].felt.setdefault(server.name, []).append(felt)
    yield from results.values()


def _during_backups(folder: Path, rounds: int, load: Load) -> Result:
    result = Result(_title(load, _DURING), "p99 below 5 x idle", False, {"idle": [], "backup": []})
    with (
        _copies(folder, _BACKUP_MIB, 1) as (image,),
        start_vmapipe(image, folder) as server,
    ):
        for turn in range(rounds + 1):
            cached([image])
            idle = run_fio(server, load, folder, _BACKUP_RUN_S)
            with _backing_up(server):
                busy = run_fio(server, load, folder, _BACKUP_RUN_S)
            if turn:
                result.felt["idle"].append(idle)
                result.felt["backup"].append(busy)
    return result


@contextlib.contextmanager
def _backing_up(server: Served) -> Iterator[None]:
    """From the backup's instant on, and cancelled at the end.

    Raises SystemExit when it ends before the block does.
    """
    words = ("backup", "--json", "--monitor", str(server.monitor), "--speed", _SPEED, "/dev/null")
    with subprocess.Popen(
        [*VMAPIPE, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            wait_for_event(process, "instant")
            yield
            ended = process.poll() is not None
        finally:
            process.terminate()
            _, stderr = process.communicate()
    if ended:
        raise SystemExit(f"the backup was over before fio: {stderr.decode()}")


@contextlib.contextmanager
def _copies(folder: Path, size_mib: int, count: int) -> Iterator[list[Path]]:
    """Images of the same bytes that have come into the page cache in the same way.

    How large the cache's pieces are (folios) depends on the size of the writes
    that made them, and the speed of small writes to them depends on it: several
    times between an image made by `dd bs=1M` and one made by `cp`.
    """
    base = dense(folder / "guard-base.raw", size_mib)
    images = [folder / f"guard-{number}.raw" for number in range(count)]
    try:
        for image in images:
            words = ["cp", "--sparse=never", "--reflink=never", str(base), str(image)]
            subprocess.run(words, check=True)
        base.unlink()
        os.sync()
        yield images
    finally:
        for image in [base, *images]:
            image.unlink(missing_ok=True)


def cached(images: Sequence[Path]) -> None:
    """What nobody reads for a minute may have left the page cache (DAMON's reclaim).

    A backup's and a guest's reads of old data would then wait for the disk, and
    how often that is depends on how long ago the image was made.
    """
    for image in images:
        read(image)


def run_fio(server: Served, load: Load, folder: Path, seconds: int) -> Felt:
    """Raises SystemExit for any error that fio has seen."""
    direction = "write" if any("write" in word for word in load.words) else "read"
    output = folder / "fio.json"
    os.sync()  # what the run before has left is not this one's work
    done = subprocess.run(
        [
            *("fio", "--name=guard", "--ioengine=nbd", *load.words, "--randrepeat=0"),
            *(f"--runtime={seconds}", "--time_based", "--norandommap", "--lat_percentiles=1"),
            *("--percentile_list=50:99", "--output-format=json", f"--output={output}"),
            f"--uri={server.uri}",
        ],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    if done.returncode:
        raise SystemExit(f"fio failed on {server.name}:\n{done.stdout}{done.stderr}")
    (job,) = json.loads(output.read_text())["jobs"]
    if job["error"] or job.get("total_err"):
        raise SystemExit(f"{server.name}: fio saw I/O errors")
    done_io = job[direction]
    latency = done_io["lat_ns"]
    p50, p99 = (latency["percentile"][f"{percent}.000000"] for percent in (50, 99))
    return Felt(done_io["iops"], done_io["bw_bytes"], p50 / 1000, p99 / 1000, latency["max"] / 1000)


# --- the report ---


def text(result: Result) -> str:
    lines = [f"\n{result.title}" + (f"  ({result.goal})" if result.goal else "")]
    lines += [f"  {n:<12} {_figures(runs)}{_ratio(result, n)}" for n, runs in result.felt.items()]
    if result.goal:
        lines.append(f"  {_verdict(result)}")
    return "\n".join(lines) + "\n"


def report(result: Result) -> None:
    print(text(result), end="", flush=True)


def _figures(runs: Sequence[Felt]) -> str:
    middle = Felt(*(statistics.median(column) for column in zip(*runs, strict=True)))
    return (
        f"{middle.iops:7.0f} IOPS {middle.bytes_s / (1 << 20):6.0f} MiB/s"
        f"  median {middle.p50_us:6.0f} us  p99 {middle.p99_us:6.0f} us"
    )


def ratios(result: Result, peers: Sequence[str]) -> list[float]:
    """Ours / the best of the peers, round by round; with a backup: its p99 / idle's."""
    if "backup" in result.felt:
        pairs = zip(result.felt["backup"], result.felt["idle"], strict=True)
        return [busy.p99_us / idle.p99_us for busy, idle in pairs]
    rounds = zip(result.felt["vmapipe"], *(result.felt[peer] for peer in peers), strict=True)
    return [
        _speed(ours, result) / max(_speed(other, result) for other in others)
        for ours, *others in rounds
    ]


def _speed(felt: Felt, result: Result) -> float:
    return felt.bytes_s if result.by_bytes else felt.iops


def _ratio(result: Result, name: str) -> str:
    if name in ("vmapipe", "backup", "idle"):
        return ""
    return f"   vmapipe has {_spread(ratios(result, [name]))}"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):5.2f} x  ({min(values):.2f} .. {max(values):.2f})"


def _verdict(result: Result) -> str:
    peers = [name for name in result.felt if name not in ("vmapipe", "backup", "idle")]
    if "backup" in result.felt:
        values = ratios(result, [])
        met = statistics.median(values) < 5
        what = f"p99 is {_spread(values)} idle's, no write error"
    elif result.least_iops:
        values = [felt.iops for felt in result.felt["vmapipe"]]
        met = statistics.median(values) >= result.least_iops
        what = f"{statistics.median(values):.0f} a second  ({min(values):.0f} .. {max(values):.0f})"
    elif peers:
        values = ratios(result, peers)
        met = statistics.median(values) >= result.least
        what = f"vmapipe / better peer: {_spread(values)}"
    else:
        return "no peer is installed"
    return f"{what}: {'met' if met else 'MISSED'}"
