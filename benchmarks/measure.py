# SPDX-License-Identifier: Apache-2.0
"""Runs commands in turn, in shuffled order, and compares them pair by pair."""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

# A command of ours that takes longer hangs; the slowest here takes half a minute.
LIMIT_S = 300.0
#: On one core, and without a bound: a median of three.
FEWEST_PAIRS = 3
# What has taken this long by then has no more of them: all of it is to end within 32 minutes on a
# slower machine or disk, too, with every row that has a bound.
_CASE_S = 30.0
OURS = "vmapipe"


@dataclass(frozen=True)
class Command:
    """`words` is one command, or a shell line when it is a single string.

    `makes` is removed before each run, outside the measured time. `needs`: a
    program without which the command is left out. `since` and `until`: only the time between the last
    of an event that it tells (`--json`) and the first of another is measured; empty: its start, its end.
    """

    name: str
    words: Sequence[str] | str
    makes: Path | None = None
    needs: str | None = None
    since: str = ""
    until: str = ""

    @property
    def possible(self) -> bool:
        return self.needs is None or shutil.which(self.needs) is not None


@dataclass(frozen=True)
class Bound:
    """The median of the pairs `command` / `peer` is to be at most `limit`.

    `words`: the bound as a person says it. `peer` "": it is `command`'s own figure that has the limit.
    `per_core`: the peer's figure counts divided by the cores that we may use. `one_core`: another limit on one core.
    `cpu`: CPU seconds are compared, and not the time; `gib`: for each of so many GiB.
    """

    words: str
    command: str
    peer: str
    limit: float
    per_core: bool = False
    one_core: float | None = None
    cpu: bool = False
    gib: float = 1.0

    def limit_on(self, cores: int) -> float:
        return self.limit if self.one_core is None or cores > 1 else self.one_core


@dataclass(frozen=True)
class Case:
    """One kind of work: ours first, then the peers; each bound is a row of the table.

    `before` makes what the case needs, and `leaves` is removed at its end; both
    are outside the measured time. `pinned`: also on one core (what waits for a disk is not).
    """

    name: str
    commands: Sequence[Command]
    bounds: Sequence[Bound] = ()
    pinned: bool = True
    #: Read before each run, so that all of it is in the page cache.
    warm: Sequence[Path] = ()
    before: Callable[[], object] | None = None
    leaves: Sequence[Path] = ()
    #: The first round does not count, unless it would cost too much for what it tells.
    warm_up: bool = True
    #: Runs from the first round to the last (a QEMU, a server), outside the measured time. The CPU
    #: seconds of the processes whose ids it gives count with those of each command.
    beside: Callable[[], AbstractContextManager[Sequence[int]]] | None = None


@dataclass
class Timing:
    """Of every run: wall seconds, and CPU seconds of all its processes."""

    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def of(self, *, cpu: bool) -> list[float]:
        return self.cpu_s if cpu else self.seconds

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def median_cpu_s(self) -> float:
        return statistics.median(self.cpu_s)


@dataclass
class Result:
    """What one case gave: a timing a command. `cores`: how many could be used."""

    case: Case
    cores: int
    timings: dict[str, Timing]

    def ratios(self, command: str, peer: str) -> list[float]:
        """Run by run: what slows the machine slows both."""
        pairs = zip(self.timings[command].seconds, self.timings[peer].seconds, strict=True)
        return [ours / theirs for ours, theirs in pairs]

    def figures(self, bound: Bound) -> list[float]:
        """What a bound speaks of, run by run; empty where its command or its peer is not here."""
        if not {bound.command, bound.peer or bound.command} <= set(self.timings):
            return []
        ours = self.timings[bound.command].of(cpu=bound.cpu)
        if not bound.peer:
            return ours
        factor = self.cores if bound.per_core else 1
        peers = self.timings[bound.peer].of(cpu=bound.cpu)
        # A quick peer may take less than a tick of CPU time.
        return [factor * a / max(b, 0.01) for a, b in zip(ours, peers, strict=True)]


def remove(path: Path) -> None:
    """A file with its manifest, or a folder; nothing when it is not there."""
    if path.is_dir():
        shutil.rmtree(path)
        return
    path.unlink(missing_ok=True)
    path.with_name(path.name + ".manifest.json").unlink(missing_ok=True)


def run_once(
    command: Command, warm: Sequence[Path] = (), beside: Sequence[int] = ()
) -> tuple[float, float]:
    """Wall and CPU seconds, those of the processes `beside` among them.

    Raises SystemExit when the command fails: its time would mean nothing.
    """
    if command.makes is not None:
        remove(command.makes)
    for path in warm:
        read(path)
    # What the run before has left to be written is not this one's work.
    os.sync()
    before, beside_s = os.times(), sum(map(_cpu_s, beside))
    started = time.perf_counter()
    if command.since or command.until:
        seconds = _between_events(command)
    else:
        done = run_quietly(command.words)
        seconds = time.perf_counter() - started
        if done.returncode:
            raise SystemExit(f"{command.name} failed:\n{done.stdout}{done.stderr}")
    after = os.times()
    cpu = after.children_user - before.children_user
    cpu += after.children_system - before.children_system
    return seconds, cpu + sum(map(_cpu_s, beside)) - beside_s


def _cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process and of its children that have ended."""
    return sum(psutil.Process(pid).cpu_times()[:4])


def _between_events(command: Command) -> float:
    """Return the seconds between two of a command's events, as we hear of them. Raises SystemExit."""
    begin = time.perf_counter()
    heard: dict[str, tuple[float, float]] = {}
    with subprocess.Popen(
        command.words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        # Its end ends the loop, too.
        limit = threading.Timer(LIMIT_S, process.kill)
        limit.start()
        for line in process.stdout or ():
            now = time.perf_counter()
            name = json.loads(line)["event"]
            heard[name] = heard.get(name, (now, now))[0], now
        said = process.stderr.read() if process.stderr else ""
        process.wait()
        limit.cancel()
    ended = time.perf_counter()
    missing = [name for name in (command.since, command.until) if name and name not in heard]
    if process.returncode or missing:
        raise SystemExit(f"{command.name} failed: {said or f'no event {missing}'}")
    since = heard[command.since][1] if command.since else begin
    return (heard[command.until][0] if command.until else ended) - since


def run_quietly(words: Sequence[str] | str) -> subprocess.CompletedProcess[str]:
    shell = isinstance(words, str)
    return subprocess.run(
        words, shell=shell, capture_output=True, text=True, env=environment(), timeout=LIMIT_S
    )


def environment() -> dict[str, str]:
    """A user's Python keeps compiled modules; some build environments forbid it."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def read(path: Path) -> None:
    """Bring a file's data into the page cache."""
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        data = hole = 0
        with suppress(OSError):  # no data behind the last
            while True:
                data = os.lseek(file.fileno(), hole, os.SEEK_DATA)
                hole = os.lseek(file.fileno(), data, os.SEEK_HOLE)
                file.seek(data)
                while file.tell() < hole and file.readinto(buffer):
                    pass


def forget(path: Path) -> None:
    """Take a file out of the page cache, so that whoever reads it first decides on its pieces there.

    A file lies there as it was written: one in small pieces takes twice as long to
    read as another that was read from the disk. Here all are read by `read`.
    """
    os.sync()
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def pinned_to_one_core(wanted: bool) -> Iterator[int]:
    """Whatever is started in the block runs on one core; gives the number of cores."""
    cores = os.sched_getaffinity(0)
    if wanted:
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield 1 if wanted else len(cores)
    finally:
        os.sched_setaffinity(0, cores)


def run_case(case: Case, pairs: int, *, pinned: bool = False, seed: int = 1) -> Result:
    """A B A B ..., each round in an order of its own; fewer than `pairs` where they take long."""
    commands = [command for command in case.commands if command.possible]
    timings = {command.name: Timing() for command in commands}
    chance = random.Random(seed)
    begin = time.monotonic()
    start_beside = case.beside or (lambda: nullcontext(()))
    with pinned_to_one_core(pinned) as cores, start_beside() as beside:
        for turn in range(-1 if case.warm_up else 0, pairs):
            if turn >= FEWEST_PAIRS and time.monotonic() - begin > _CASE_S:
                break
            order = list(commands)
            chance.shuffle(order)
            for command in order:
                seconds, cpu = run_once(command, case.warm, beside)
                if turn >= 0:
                    timings[command.name].seconds.append(seconds)
                    timings[command.name].cpu_s.append(cpu)
    return Result(case, cores, timings)
