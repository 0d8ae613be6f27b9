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
# Each of these takes a frame of some MiB, so that what counts is how many are decompressed at a time.
_DEEP = Load("4K random reads of a .zst, depth 4", ("--rw=randread", "--bs=4k", "--iodepth=4"))
_SHALLOW = Load("depth 1", ("--rw=randread", "--bs=4k", "--iodepth=1"))


def run_serve(folder: Path, size_mib: int, rounds: int, only: str) -> Iterator[Result]:
    """All cases whose title has the word."""
    plain = [case for case in _PLAIN if only in _title(case.load)]
    is_zstd = only in _title(_DEEP)
    if not plain and not is_zstd:
        return
    if shutil.which("fio") is None or shutil.which("nbdkit") is None:
        print("\nserve: fio or nbdkit is not installed; left out")
        return
    size_mib = min(size_mib, _MIB)
    if plain:
        yield from _against_nbdkit(folder, size_mib, rounds, plain)
    if is_zstd:
        yield _compressed(folder, size_mib, rounds)


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


def _compressed(folder: Path, size_mib: int, rounds: int) -> Result:
    raw, stored = images.half_text(folder / "serve.raw", size_mib), folder / "serve.vma.zst"
    result = Result(
        _title(_DEEP), "at least 3 x depth 1's", False, {"vmapipe": [], _SHALLOW.name: []}, 3.0
    )
    with _removed(raw, stored):
        make(backup(raw, stored, "--compress", "zstd"))
        raw.unlink()
        with archive(stored, folder) as server:
            for turn in range(rounds + 1):
                cached([stored])
                deep, shallow = (
                    run_fio(server, load, folder, _RUN_S) for load in (_DEEP, _SHALLOW)
                )
                if turn:
                    result.felt["vmapipe"].append(deep)
                    result.felt[_SHALLOW.name].append(shallow)
    return result


@contextlib.contextmanager
def _removed(*paths: Path) -> Iterator[None]:
    try:
        yield
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
            Path(f"{path}.manifest.json").unlink(missing_ok=True)
