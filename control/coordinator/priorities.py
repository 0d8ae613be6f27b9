# SPDX-License-Identifier: Apache-2.0
"""The share of the host that a backup may use: CPU and I/O priority, cores, memory for buffers."""

from __future__ import annotations

import argparse
import os
from typing import NamedTuple

from vmapipe.runtime.arguments import MIN_BUFFER_BYTES, size
from vmapipe.runtime.errors import Failure, UsageError, os_error_text

# Classes of ioprio_set(2). Realtime is not among them: a backup must not starve guests.
_IO_CLASSES = {"best-effort": 2, "idle": 3}
_LOWEST_IO_LEVEL = 7


class Priorities(NamedTuple):
    """`io` is a class and a level; empty and None: as inherited."""

    nice: int | None = None
    io: tuple[int, int] | None = None
    cores: tuple[int, ...] = ()

    def apply_to_us(self) -> None:
        """To this process and those that it will start. Raises Failure."""
        self.apply(os.getpid(), guest_waits=False)

    def apply(self, pid: int, *, guest_waits: bool) -> None:
        """To a process that has just been started. Raises Failure.

        A process that a guest's writes may wait for keeps its priority, or these
        would wait with it; its cores are the others' all the same.
        """
        if self == AS_INHERITED:
            return
        # Imported here: a backup starts sooner without.
        import psutil

        try:
            process = psutil.Process(pid)
            if self.cores:
                process.cpu_affinity(list(self.cores))
            if guest_waits:
                return
            if self.nice is not None:
                process.nice(self.nice)
            if self.io is not None:
                process.ionice(self.io[0], self.io[1] if self.io[0] != _IO_CLASSES["idle"] else 0)
        except psutil.NoSuchProcess:
            return  # it says itself why it has ended
        except (psutil.Error, OSError, ValueError) as error:
            text = os_error_text(error) if isinstance(error, OSError) else str(error)
            raise Failure(f"cannot set the priority of the job's processes: {text}") from error


AS_INHERITED = Priorities()


def add_priority_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options, and return their group for more of the kind."""
    group = parser.add_argument_group("load on this host")
    group.add_argument(
        "--nice",
        type=_nice,
        metavar="N",
        help="CPU priority, 19 (lowest) to -20; of disks in use only the archiver's: a guest's "
        "write may have to wait for the others (default of --monitor: 5 for both)",
    )
    group.add_argument(
        "--ionice",
        type=_io_priority,
        metavar="CLASS",
        help="I/O priority, idle or best-effort:N (0 high to 7 low); of disks in use only the "
        "archiver's",
    )
    group.add_argument(
        "--cpus", type=_cores, default=(), metavar="LIST", help="run on these cores only (0-2,5)"
    )
    group.add_argument(
        "--buffer-total",
        type=size,
        default=0,
        metavar="SIZE",
        help="divide this much memory among the buffers (--buffer) of all live disks, at least "
        f"{MIN_BUFFER_BYTES >> 20}M a disk; processes have some 50 MiB each beside it",
    )
    return group


def add_io_priority_option(parser: argparse._ActionsContainer) -> None:
    """For a job whose I/O is all that others may have to wait for."""
    parser.add_argument(
        "--ionice",
        type=_io_priority,
        metavar="CLASS",
        help="I/O priority, idle or best-effort:N (0 high to 7 low)",
    )


def priorities(options: argparse.Namespace) -> Priorities:
    """Return the priorities of the options that the command has."""
    return Priorities(getattr(options, "nice", None), options.ionice, getattr(options, "cpus", ()))


def buffer_of_each(buffer_bytes: int, total_bytes: int, disks: int) -> int:
    """Return the bytes of `--buffer` for each of so many live disks. Raises UsageError."""
    if not total_bytes or not disks:
        return buffer_bytes
    share = total_bytes // disks
    if share < MIN_BUFFER_BYTES:
        raise UsageError(
            f"--buffer-total: {disks} live disks need at least {disks * MIN_BUFFER_BYTES >> 20}M"
        )
    return min(buffer_bytes, share)


def _nice(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 99
    if not -20 <= value <= 19:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from -20 to 19")
    return value


def _io_priority(text: str) -> tuple[int, int]:
    name, colon, level = text.partition(":")
    if name == "idle" and not colon:
        return _IO_CLASSES[name], 0
    if name == "best-effort" and level.isdecimal() and int(level) <= _LOWEST_IO_LEVEL:
        return _IO_CLASSES[name], int(level)
    raise argparse.ArgumentTypeError(f"{text!r} is neither idle nor best-effort:0 to best-effort:7")


def _cores(text: str) -> tuple[int, ...]:
    allowed = os.sched_getaffinity(0)
    cores: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"{text!r} is not a valid list of cores like 0-2,5")
        # No machine has more cores than that, and a range is made before it is looked at.
        cores |= set(range(int(first), min(int(last or first), 1 << 16) + 1))
    if not cores or not cores <= allowed:
        known = ",".join(map(str, sorted(allowed)))
        raise argparse.ArgumentTypeError(f"{text!r}: cores that may be used here are {known}")
    return tuple(sorted(cores))
