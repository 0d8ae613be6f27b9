# SPDX-License-Identifier: Apache-2.0
"""The next commands of a live restore, from what QEMU says now and what was noted. Pure.

Each disk of the machine stands on an overlay above the archive; a mirror job copies it to its
target, and the machine goes on there. Nothing is remembered between two looks but what has to
survive a crash (`Noted`): so a new process goes on wherever another one was killed.

A job is completed while the machine stands still. Its overlay and its target are equal then,
and the note of which of them counts is on the disk before the machine writes again: there is no
moment in which a crash could leave it unknown.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from vmapipe.control.qmp.connection import Command

# A server that is started again listens within a second, and QEMU tries to connect again after
# 16 s at the latest. What still fails then does not fail for lack of a server.
_FAILING_S = 60.0
# When the archive is known to be damaged, a second try shows whether it is that.
_FAILING_DAMAGED_S = 3.0
# QEMU's own, 16 MiB, go at once whatever the limit is, and some more before it holds.
_LIMITED_BUFFER_BYTES = 1 << 20
_NO_SPACE = "nospace"
#: The run state in which QEMU stops a machine instead of failing its request.
IO_ERROR = "io-error"


class Move(NamedTuple):
    """A disk on its way. `name`: its device in the archive; the others are QEMU's names.

    `below`: the nodes that go when the machine needs them no more, the disk's own first, each
    before those that it needs. `adds`: the commands that make the target's nodes, in order.
    """

    name: str
    job: str
    source: str
    target: str
    below: tuple[str, ...]
    adds: tuple[Command, ...]
    path: str = ""


class MirrorState(NamedTuple):
    """A job as QEMU lists it. `io_status`: `ok`, `failed` or `nospace`.

    `is_final`: of one that has ended with an error, another try does not help.
    """

    status: str
    error: str = ""
    io_status: str = "ok"
    speed: int = 0
    done: int = 0
    total: int = 0
    is_final: bool = False


class MachineView(NamedTuple):
    """What QEMU says. `run_state`: empty where there is no machine (qemu-storage-daemon).

    `used`: the nodes that a device, an export or another node stands on. `broken`: those of a
    device whose last request failed. `failing_s`: by job, and "" for the machine, since when
    nothing helps although the archive is served. `damage`: what the server says of the archive.
    `stubborn`: the nodes that QEMU does not delete. `may_retry`: enough time has passed since the
    last attempt to let things go on.
    """

    run_state: str
    jobs: Mapping[str, MirrorState]
    nodes: frozenset[str]
    used: frozenset[str]
    broken: frozenset[str] = frozenset()
    failing_s: Mapping[str, float] = MappingProxyType({})
    damage: str = ""
    stubborn: frozenset[str] = frozenset()
    may_retry: bool = True


class Noted(NamedTuple):
    """What survives a crash: the jobs whose disks stand on their targets, and whether the machine
    stands still because we stopped it.
    """

    moved: frozenset[str] = frozenset()
    held: bool = False


class Note(NamedTuple):
    """Bring this to the disk, before anything that follows is done."""

    noted: Noted


class GiveUp(NamedTuple):
    """Nothing that we can do helps; the machine stays on its overlays."""

    text: str


Step = Command | Note | GiveUp

#: A job that waits to be let go on.
PAUSED = frozenset({"paused", "standby"})
# A job that is about to end: what it has to do next is QEMU's.
_ENDING = frozenset({"waiting", "pending", "aborting"})


def is_finished(moves: Sequence[Move], seen: MachineView, noted: Noted) -> bool:
    """Tell whether all disks are on their targets, and nothing else is left in QEMU."""
    if noted.held:
        return False
    return all(
        move.job in noted.moved
        and move.job not in seen.jobs
        and not any(node in seen.nodes - seen.stubborn for node in move.below)
        for move in moves
    )


def next_steps(
    moves: Sequence[Move], seen: MachineView, noted: Noted, speed_bytes_s: int = 0
) -> list[Step]:
    """Return what is to be done now, in order; look again afterwards. None: wait."""
    jobs = [(move, seen.jobs.get(move.job)) for move in moves]
    ready = [move for move, job in jobs if job and job.status == "ready"]
    arrived = [move.job for move in moves if _has_arrived(move, seen, noted)]
    if arrived:
        return [Note(noted._replace(moved=noted.moved | set(arrived)))]
    if ready:
        return _complete(ready, seen, noted)
    if any(job and job.status in _ENDING for _, job in jobs):
        return []
    if noted.held:
        if seen.run_state in ("running", ""):
            return [Note(noted._replace(held=False))]
        return [Command("cont", {})]
    steps: list[Step] = []
    share = speed_bytes_s // max(1, sum(move.job not in noted.moved for move in moves))
    for move, job in jobs:
        if move.job in noted.moved:
            steps += _clear(move, job, seen)
        elif job is None:
            steps += _begin(move, seen, share)
        else:
            steps += _tend(move, job, seen, share)
    steps += _wake(moves, seen, noted)
    failed = [step for step in steps if isinstance(step, GiveUp)]
    return [step for step in steps if not isinstance(step, GiveUp)] + failed[:1]


def _has_arrived(move: Move, seen: MachineView, noted: Noted) -> bool:
    """Tell whether the machine stands on the target, and that is not noted yet."""
    if move.job in noted.moved:
        return False
    job = seen.jobs.get(move.job)
    if job is None:
        return move.target in seen.used and move.source not in seen.used
    done = job.status in ("concluded", "null") and not job.error
    return done and move.target in seen.nodes and move.source not in seen.used


def _complete(ready: Sequence[Move], seen: MachineView, noted: Noted) -> list[Step]:
    if seen.run_state == "running":
        stop = Command("stop", {})
        return [stop] if noted.held else [Note(noted._replace(held=True)), stop]
    return [Command("block-job-complete", {"device": move.job}) for move in ready]


def _clear(move: Move, job: MirrorState | None, seen: MachineView) -> list[Step]:
    if job is not None:
        return [Command("job-dismiss", {"id": move.job})]
    left = [node for node in move.below if node in seen.nodes - seen.stubborn]
    return [Command("blockdev-del", {"node-name": node}) for node in left]


def _begin(move: Move, seen: MachineView, share: int) -> list[Step]:
    if move.source not in seen.nodes:
        return [
            GiveUp(
                f"QEMU has no node {move.source!r} any more: where device {move.name!r} stands is "
                "not known"
            )
        ]
    adds = [add for add in move.adds if add.arguments["node-name"] not in seen.nodes]
    mirror: dict[str, object] = {
        "job-id": move.job,
        "device": move.source,
        "target": move.target,
        "sync": "full",
        "copy-mode": "write-blocking",
        "on-source-error": "stop",
        "on-target-error": "stop",
        "auto-dismiss": False,
        "speed": share,
    }
    if share:
        mirror["buf-size"] = _LIMITED_BUFFER_BYTES
    return [*adds, Command("blockdev-mirror", mirror)]


def _tend(move: Move, job: MirrorState, seen: MachineView, share: int) -> list[Step]:
    if job.status in ("concluded", "null"):
        return _ended(move, job, seen)
    steps: list[Step] = []
    if job.speed != share and job.status in ("running", "paused"):
        steps.append(Command("block-job-set-speed", {"device": move.job, "speed": share}))
    # Of a job that has failed `cont` makes one that is only paused.
    if job.io_status == "ok" and job.status not in PAUSED:
        return steps
    if job.io_status != _NO_SPACE and (why := _hopeless(move.job, seen)):
        return [GiveUp(f"device {move.name!r} cannot be copied to {move.path}: {why}")]
    if seen.may_retry:
        steps.append(Command("block-job-resume", {"device": move.job}))
    return steps


def _ended(move: Move, job: MirrorState, seen: MachineView) -> list[Step]:
    """A job has ended, and the machine still is where it was.

    An error while QEMU looks where there is data ends a job that was told to stop and wait.
    """
    dismiss = Command("job-dismiss", {"id": move.job})
    is_cancelled = not job.error or job.error == os.strerror(errno.ECANCELED)
    is_hopeless = job.is_final or bool(_hopeless(move.job, seen))
    why = "somebody has cancelled it" if is_cancelled else is_hopeless and job.error
    if why:
        return [dismiss, GiveUp(f"QEMU's copy of device {move.name!r} has ended too early: {why}")]
    return [dismiss] if seen.may_retry else []


def _wake(moves: Sequence[Move], seen: MachineView, noted: Noted) -> list[Step]:
    """Let a machine go on that has met an error on a disk of ours."""
    ours = {move.source for move in moves if move.job not in noted.moved}
    if seen.run_state != IO_ERROR or (seen.broken and not seen.broken & ours):
        return []
    if why := _hopeless("", seen):
        return [GiveUp(f"the machine stands still: it needs what cannot be read: {why}")]
    return [Command("cont", {})] if seen.may_retry else []


def _hopeless(key: str, seen: MachineView) -> str:
    """Return why trying again does not help; empty: it may."""
    failing_s = seen.failing_s.get(key, 0.0)
    if seen.damage and failing_s > _FAILING_DAMAGED_S:
        return seen.damage
    if failing_s > _FAILING_S:
        return f"it has failed for {_FAILING_S:.0f} s although the archive is served"
    return ""


def changes(moves: Sequence[Move], before: MachineView | None, now: MachineView) -> list[str]:
    """Return the lines for what has changed between two looks that the user should know."""
    told = []
    was = before.run_state if before else ""
    if now.run_state == IO_ERROR and was != IO_ERROR:
        told.append(
            "the machine stands still: a request to a disk failed, and is made again when it can be"
        )
    elif was == IO_ERROR and now.run_state == "running":
        told.append("the machine goes on")
    for move in moves:
        job = now.jobs.get(move.job)
        old = before.jobs.get(move.job) if before else None
        if job and job.io_status != "ok" and (old is None or old.io_status != job.io_status):
            what = (
                f"no space left for {move.path}: make room, and the copy goes on"
                if job.io_status == _NO_SPACE
                else f"the copy to {move.path} waits: a request failed, and is made again"
            )
            told.append(f"{move.name}: {what}")
        if job and job.error and (old is None or old.error != job.error):
            told.append(f"{move.name}: the copy to {move.path} is begun again: {job.error}")
    return told
