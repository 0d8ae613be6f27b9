# SPDX-License-Identifier: Apache-2.0
"""How quickly a served archive is read, against nbdkit's file plugin on the raw disk."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import images
from benchmarks.guard import Felt, Load, Result, cached, run_fio
from benchmarks.place import backup, make
from benchmarks.servers import Served, archive, nbdkit

_RUN_S = 2
_MIB = 1024
_PEER = "nbdkit file"


class _Case(NamedTuple):
    """`least`: our rate / the peer's."""

    load: Load
    least: float


_PLAIN = (
    _Case(Load("4K random reads, depth 1", ("--rw=randread", "--bs=4k", "--iodepth=1")), 0.9),
    _Case(Load("4K random reads, depth 16", ("--rw=randread", "--bs=4k", "--iodepth=16")), 0.9),
    _Case(Load("1M reads, depth 4", ("--rw=read", "--bs=1M", "--iodepth=4"), by_bytes=True), 1.5),
)


class _Compressed(NamedTuple):
    """`level` of the archive; `least`: reads a second."""

    load: Load
    level: int
    least: int


def _random_reads(of: str, depth: int) -> Load:
    words = ("--rw=randread", "--bs=4k", f"--iodepth={depth}")
    return Load(f"4K random reads of {of}, depth {depth}", words)


# Each of these decompresses half of a frame, which holds a half of 3.6 MiB, or at level 1 a third, so that what counts is how many are
# decompressed at a time: no more than there are processors. The rates are those that two idle ones can give.
_COMPRESSED = (
    _Compressed(_random_reads("a .zst", 1), 3, 300),
    _Compressed(_random_reads("a .zst", 4), 3, 900),
    _Compressed(_random_reads("a .zst of level 1", 1), 1, 300),
    _Compressed(_random_reads("a .zst of level 1", 4), 1, 900),
)


def run_serve(folder: Path, size_mib: int, rounds: int, only: str) -> Iterator[Result]:
    """All cases whose title has the word."""
    plain = [case for case in _PLAIN if only in _title(case.load)]
    compressed = [case for case in _COMPRESSED if only in _title(case.load)]
    if not plain and not compressed:
        return
    if shutil.which("fio") is None or shutil.which("nbdkit") is None:
        print("\nserve: fio or nbdkit is not installed; left out")
        return
    size_mib = min(size_mib, _MIB)
    if plain:
        yield from _against_nbdkit(folder, size_mib, rounds, plain)
    for level in (3, 1):
        if cases := [case for case in compressed if case.level == level]:
            yield from _compressed(folder, size_mib, rounds, cases)


def _title(load: Load) -> str:
    return f"serve: {load.name}"


def _against_nbdkit(
    folder: Path, size_mib: int, rounds: int, cases: Sequence[_Case]
) -> Iterator[Result]:
    raw, stored = images.dense(folder / "serve.raw", size_mib), folder / "serve.vma"
    results = {}
    for load, least in cases:
        goal = f"at least {least} x {_PEER}"
        felt: dict[str, list[Felt]] = {"vmapipe": [], _PEER: []}
        results[load] = Result(_title(load), goal, load.by_bytes, felt, least)
    with _removed(raw, stored), contextlib.ExitStack() as running:
        make(backup(raw, stored))
        servers = [
            running.enter_context(start) for start in (archive(stored, folder), nbdkit(raw, folder))
        ]
        _checked(servers[0], folder)
        chance = random.Random(1)
        for turn in range(rounds + 1):
            for load in results:
                cached([raw, stored])
                chance.shuffle(servers)
                for server in servers:
                    felt = run_fio(server, load, folder, _RUN_S if turn else 1)
                    if turn:  # the first round warms up
                        results[load].felt[server.name].append(felt)
    yield from results.values()


def _checked(server: Served, folder: Path) -> None:
    """Have each extent compared with the manifest, which happens once."""
    load = Load("all of it", ("--rw=read", "--bs=1M", "--iodepth=4"))
    run_fio(server, load, folder, 2 * _RUN_S)


def _compressed(
    folder: Path, size_mib: int, rounds: int, cases: Sequence[_Compressed]
) -> Iterator[Result]:
    """Beside nbdkit on the raw disk, which has nothing to decompress."""
    raw, stored = images.half_text(folder / "serve.raw", size_mib), folder / "serve.vma.zst"
    results = {
        load: Result(
            _title(load),
            f"at least {least} a second",
            False,
            {"vmapipe": [], _PEER: []},
            least_iops=least,
        )
        for load, _, least in cases
    }
    with _removed(raw, stored), contextlib.ExitStack() as running:
        make(backup(raw, stored, "--compress", f"zstd:{cases[0].level}"))
        servers = [
            running.enter_context(start) for start in (archive(stored, folder), nbdkit(raw, folder))
        ]
        _checked(servers[0], folder)
        for turn in range(rounds + 1):
            for load, result in results.items():
                cached([stored, raw])
                for server in servers:
                    felt = run_fio(server, load, folder, _RUN_S)
                    if turn:
                        result.felt[server.name].append(felt)
    yield from results.values()


@contextlib.contextmanager
def _removed(*paths: Path) -> Iterator[None]:
    try:
        yield
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
            Path(f"{path}.manifest.json").unlink(missing_ok=True)
