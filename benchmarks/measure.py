# SPDX-License-Identifier: Apache-2.0
"""Runs commands in turn, in shuffled order, and compares them pair by pair."""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """`words` is one command, or a shell line when it is a single string with a pipe.

    `makes` is removed before each run, outside the measured time. `needs`: a
    program without which the command is left out.
    """

    name: str
    words: Sequence[str] | str
    makes: Path | None = None
    needs: str | None = None

    @property
    def possible(self) -> bool:
        return self.needs is None or shutil.which(self.needs) is not None


@dataclass
class Case:
    """One kind of work: ours first, then the peers. The ratio is ours / peer."""

    name: str
    ours: Command
    peers: Sequence[Command]
    goal: str = ""


@dataclass
class Timing:
    """Wall seconds of every run; cpu and memory of the last one's whole process tree."""

    seconds: list[float] = field(default_factory=list)
    cpu_s: float = 0.0

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def run_once(command: Command) -> tuple[float, float]:
    """Wall and CPU seconds. Raises SystemExit when the command fails: its time would mean nothing."""
    if command.makes is not None:
        if command.makes.is_dir():
            shutil.rmtree(command.makes)
        command.makes.unlink(missing_ok=True)
        command.makes.with_name(command.makes.name + ".manifest.json").unlink(missing_ok=True)
    # What the run before has left to be written is not this one's work.
    os.sync()
    # A user's Python keeps compiled modules; some build environments forbid it.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    before = os.times()
    started = time.perf_counter()
    done = subprocess.run(
        command.words,
        shell=isinstance(command.words, str),
        capture_output=True,
        text=True,
        env=environment,
    )
    seconds = time.perf_counter() - started
    after = os.times()
    if done.returncode:
        raise SystemExit(f"{command.name} failed:\n{done.stdout}{done.stderr}")
    cpu = after.children_user - before.children_user
    cpu += after.children_system - before.children_system
    return seconds, cpu


def run_case(case: Case, pairs: int, seed: int) -> dict[str, Timing]:
    """A B A B ..., each round in an order of its own, after one round that does not count."""
    commands = [case.ours, *(peer for peer in case.peers if peer.possible)]
    timings = {command.name: Timing() for command in commands}
    chance = random.Random(seed)
    for turn in range(pairs + 1):
        order = list(commands)
        chance.shuffle(order)
        for command in order:
            seconds, cpu = run_once(command)
            if turn:
                timings[command.name].seconds.append(seconds)
                timings[command.name].cpu_s = cpu
    return timings


def ratios(ours: Timing, peer: Timing) -> list[float]:
    """Ours / peer, run by run: what slows the machine slows both."""
    return [a / b for a, b in zip(ours.seconds, peer.seconds, strict=True)]
