# SPDX-License-Identifier: Apache-2.0
"""Copy-before-write filters of our own: a disk handed over to one, and its snapshot checked.

A backup job of QEMU before 10.1 fails a guest's write when the old data cannot be read. A
filter node can be told to give the snapshot up instead. It cannot begin at one instant with
others; jobs can. So the jobs begin, slowly, and a moment later the disks' filters take their
places: what a guest has written in between was saved by the jobs, all else is as it was at
the instant, and a sink keeps of each cluster what comes first. Then a job of ours copies
what the filter shows. See docs/decisions/0022-read-errors.md.

A filter with `on-cbw-error: break-snapshot` lets a guest's write go on when the old data cannot be
saved, saves nothing from then on, and reports nothing. But a reader of its snapshot is refused then,
so one sector of it is copied to nowhere (`SnapshotCheck`). Checked when all of a disk has been copied,
the answer counts for all of it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vmapipe.control.qemu.disks import MachineDisk
from vmapipe.control.qemu.features import Features
from vmapipe.control.qemu.graph import Graph
from vmapipe.control.qemu.jobs import (
    CBW_GRACE_S,
    BackupTarget,
    check_nodes,
    copy_snapshot,
    device_path,
    filter_name,
    job_filter_name,
    job_name,
    put_device,
    rehearse,
    snapshot_name,
)
from vmapipe.control.qmp.connection import ANSWER_S, Answer, Command, Qmp, QmpRefused
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.text import name_text

_POLL_S = 0.002
# What a job that we have cancelled says.
_CANCELLED = "Operation canceled"
# QEMU sends a thin disk's empty part as requests of 1 MiB, when it is read through a filter;
# a job can leave it out: 0.1 s a GiB. Up to so much that is no matter, or up to
# so many times of what has to be copied anyway.
_EMPTY_BYTES = 4 << 30
_EMPTY_TIMES = 2
# Before these QEMU may end itself when a snapshot is read through a filter: by an assertion on
# overlapping reads, or on what a hole in a qcow2 image is.
_FIRST_OLD, _AFTER_OLD = (7, 2, 15), (7, 3, 0)
_FIRST_NEW = (10, 0, 0)


# Before this a filter's timeout in nanoseconds has 32 bits: 25 s are 3.5 s.
_LONG_TIMEOUT = (8, 0, 0)
# Before this a node is added to a disk that is in use by another thread without that thread's
# lock, and QEMU ends itself when the guest has a request under way.
_UNLOCKED = (9, 0, 0)
# A disk on a controller on a bridge.
_MOST_BUSES = 3

Release = tuple[int, ...]


def disks_to_hand_over(
    qmp: Qmp, release: Release, disks: Sequence[MachineDisk], blocks: Sequence[Answer]
) -> list[int]:
    """Return the indices of the disks whose hand-over is harmless and cheap. Raises QmpGone."""
    found = []
    for index, disk in enumerate(disks):
        users = [block for block in blocks if disk.device in _names(block)]
        path = device_path(users[0]) if len(users) == 1 else ""
        if not path or users[0]["inserted"].get("ro"):
            continue
        used_bytes = users[0]["inserted"].get("image", {}).get("actual-size", disk.size_bytes)
        if disk.is_thin and not _is_quick(disk.size_bytes, int(used_bytes)):
            continue
        if release < _UNLOCKED and _has_iothread(qmp, path):
            continue
        found.append(index)
    return found


def _names(block: Answer) -> set[str]:
    inserted = block.get("inserted") or {}
    return {str(inserted.get("node-name", "")), str(block.get("device", ""))} if inserted else set()


def _is_quick(size_bytes: int, used_bytes: int) -> bool:
    return size_bytes - used_bytes <= max(_EMPTY_BYTES, _EMPTY_TIMES * used_bytes)


def _has_iothread(qmp: Qmp, path: str) -> bool:
    """Tell whether the device, or the controller whose bus it is on, has an I/O thread of its own."""
    for _ in range(_MOST_BUSES):
        if _property(qmp, path, "iothread"):
            return True
        bus = _property(qmp, path, "parent_bus")
        if not bus.startswith("/"):
            return False
        path = bus.rpartition("/")[0]
    return False


def _property(qmp: Qmp, path: str, name: str) -> str:
    try:
        return str(qmp.execute(Command("qom-get", {"path": path, "property": name})) or "")
    except QmpRefused:
        return ""


def needed_release(qmp: Qmp, features: Features) -> Release | None:
    """Return the release of a QEMU that needs hand-overs and supports them; else None.

    Raises QmpGone.
    """
    needed = {"copy-before-write", "snapshot-access", "null-co"} <= features.drivers
    if features.breaks_snapshots or not needed:
        return None
    try:
        version = qmp.execute(Command("query-version", {}))["qemu"]
        # A later cleanup has to see what is below a filter.
        qmp.execute(Command("x-debug-query-block-graph", {}))
    except QmpRefused:
        return None
    release = tuple(int(version.get(part, 0)) for part in ("major", "minor", "micro"))
    return release if release >= _FIRST_NEW or _FIRST_OLD <= release < _AFTER_OLD else None


def filter_timeout_s(release: Release, wanted_s: int) -> int:
    """Return the filter's timeout; 0: none.

    The sink's own bound, and QEMU's for a lost connection, remain.
    """
    return wanted_s if release >= _LONG_TIMEOUT else 0


def shows_snapshots(qmp: Qmp, run: str, device: str) -> bool:
    """Tell whether this QEMU shows when a snapshot is broken. Raises QmpGone."""
    add, delete = rehearse(run, device)
    try:
        qmp.execute(add)
        qmp.execute(delete)
    except QmpRefused:
        return False
    return True


class BackupMethod(NamedTuple):
    """The method of a backup: the features of QEMU that it uses, and which disks are handed over to
    filters with this timeout.
    """

    features: Features
    handed_over: Sequence[int]
    timeout_s: int


def choose_method(
    qmp: Qmp, run: str, features: Features, disks: Sequence[MachineDisk], guest_wait_s: int
) -> BackupMethod:
    """Choose how the disks of this QEMU are backed up. Raises QmpGone."""
    handed_over: list[int] = []
    timeout_s = 0
    if release := needed_release(qmp, features):
        blocks = qmp.execute(Command("query-block", {}))
        handed_over = disks_to_hand_over(qmp, release, disks, blocks)
        timeout_s = filter_timeout_s(release, guest_wait_s + CBW_GRACE_S)
    tried = handed_over or ([0] if features.breaks_snapshots else [])
    if tried and not shows_snapshots(qmp, run, disks[tried[0]].device):
        features, handed_over = features.without_snapshots(), []
    return BackupMethod(features, handed_over, timeout_s)


class Handover:
    """The hand-over of these disks, by index, in one backup whose jobs have just begun."""

    def __init__(
        self, qmp: Qmp, run: str, targets: Mapping[int, BackupTarget], features: Features
    ) -> None:
        self._qmp = qmp
        self._run = run
        self._targets = targets
        self._features = features

    @property
    def indices(self) -> Sequence[int]:
        return tuple(self._targets)

    def carry_out(self) -> list[int]:
        """Return the disks whose writes go through a filter of ours from now on; the others keep
        their jobs.

        These copy slowly until they are told otherwise. Raises Failure, QmpGone.
        """
        blocks = self._qmp.execute(Command("query-block", {}))
        taken = [index for index in self._targets if self._insert(index, blocks)]
        for index in taken:
            with contextlib.suppress(QmpRefused):  # it has ended
                self._qmp.execute(Command("job-cancel", {"id": job_name(self._run, index)}))
        return [index for index, error in self._ends(taken) if self._copy(index, error)]

    def why_covered(self, index: int) -> str:
        """Return what was put between this disk's filter and our view of it, as text; empty:
        nothing. Raises QmpGone.
        """
        try:
            nodes = self._qmp.execute(Command("query-named-block-nodes", {"flat": True}))
            answer = self._qmp.execute(Command("x-debug-query-block-graph", {}))
        except QmpRefused:
            return ""
        view = Graph(nodes, answer).below(snapshot_name(self._run, index))
        if view in ("", filter_name(self._run, index)):
            return ""
        return (
            f"somebody has put QEMU's node {name_text(view)} above it while it was backed up (an "
            "external snapshot by the drive's name, for instance), and its old data cannot be read "
            "below that"
        )

    def _insert(self, index: int, blocks: Sequence[Answer]) -> bool:
        """Insert the filter below the one device that uses this disk.

        False: impossible; its job stays.
        """
        below = job_filter_name(self._run, index)
        users = [b for b in blocks if (b.get("inserted") or {}).get("node-name") == below]
        path = device_path(users[0]) if len(users) == 1 else ""
        filter_node = filter_name(self._run, index)
        with contextlib.suppress(QmpRefused):
            if path:
                self._qmp.execute(put_device(path, filter_node))
                return True
        with contextlib.suppress(QmpRefused):  # it was refused itself
            self._qmp.execute(Command("blockdev-del", {"node-name": filter_node}))
        return False

    def _ends(self, indices: Sequence[int]) -> list[tuple[int, str]]:
        """Wait until all jobs have ended; return the error of each."""
        deadline = time.monotonic() + ANSWER_S
        while True:
            jobs = {job["id"]: job for job in self._qmp.execute(Command("query-jobs", {}))}
            found = [(index, jobs.get(job_name(self._run, index), {})) for index in indices]
            if all(job.get("status", "concluded") == "concluded" for _, job in found):
                return [(index, str(job.get("error", ""))) for index, job in found]
            if time.monotonic() > deadline:
                raise Failure(f"QEMU's backup jobs do not end within {ANSWER_S:.0f} s")
            time.sleep(_POLL_S)

    def _copy(self, index: int, error: str) -> bool:
        """Begin to copy what the filter shows.

        False: the disk's job has ended by itself, and is judged later.
        """
        if error != _CANCELLED:
            return False
        commands = [
            Command("job-dismiss", {"id": job_name(self._run, index)}),
            *copy_snapshot(self._run, index, self._targets[index], self._features),
        ]
        for command in commands:
            try:
                self._qmp.execute(command)
            except QmpRefused as refused:
                raise Failure(f"QEMU refuses the backup: {command.name}: {refused}") from refused
        return True


# It takes some milliseconds.
_CHECK_POLL_S = 0.002
# The whole of a null device, and of what is read: QEMU counts in sectors.
_SECTOR_BYTES = 512
#: The error that QEMU gives a reader of a broken snapshot, and what it means.
REFUSED = "Permission denied"
BROKEN = (
    "old data that a write of the guest was about to replace could not be read or sent; the write "
    "went on, but the archive would be wrong: look for read errors of the disk in the host's log, "
    "and back it up again"
)


class SnapshotCheck(NamedTuple):
    """The commands of one check through the filter node `filter_node`; `name` is the job's."""

    name: str
    filter_node: str

    def begin(self) -> list[Command]:
        piece, view, nowhere = check_nodes(self.name)
        return [
            _node(view, "snapshot-access", {"file": self.filter_node, "read-only": True}),
            _node(piece, "raw", {"file": view, "size": _SECTOR_BYTES, "read-only": True}),
            _node(nowhere, "null-co", {"size": _SECTOR_BYTES}),
            Command(
                "blockdev-backup",
                {
                    "job-id": self.name,
                    "device": piece,
                    "target": nowhere,
                    "sync": "full",
                    "on-source-error": "report",
                    "auto-dismiss": False,
                },
            ),
        ]

    def end(self) -> list[Command]:
        """Return the commands that remove the check when its job has ended."""
        nodes = [Command("blockdev-del", {"node-name": node}) for node in check_nodes(self.name)]
        return [Command("job-dismiss", {"id": self.name}), *nodes]


def _node(name: str, driver: str, arguments: dict[str, object]) -> Command:
    return Command("blockdev-add", {"driver": driver, "node-name": name, **arguments})


def broken_reason(qmp: Qmp, look: SnapshotCheck) -> str:
    """Return why a snapshot is not valid; empty: it is whole. Raises QmpGone.

    Any doubt is a reason. Objects added to QEMU are removed again, or left to the cleanup (undo.py).
    """
    try:
        for command in look.begin():
            qmp.execute(command)
        error = _job_error(qmp, look.name)
        for command in look.end():
            qmp.execute(command)
    except QmpRefused as refused:
        return f"QEMU does not show whether all old data was saved: {refused}"
    if error == REFUSED:
        return BROKEN
    return f"QEMU does not show whether all old data was saved: {error}" if error else ""


def _job_error(qmp: Qmp, name: str) -> str:
    """Wait until a job has ended; return its error."""
    deadline = time.monotonic() + ANSWER_S
    while True:
        jobs = qmp.execute(Command("query-jobs", {}))
        job = next((job for job in jobs if job.get("id") == name), None)
        if job is None:
            return "the job that checks it was removed"
        if job.get("status") == "concluded":
            return str(job.get("error", ""))
        if time.monotonic() > deadline:
            raise QmpRefused(f"reading one sector takes more than {ANSWER_S:.0f} s")
        time.sleep(_CHECK_POLL_S)
