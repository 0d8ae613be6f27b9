# SPDX-License-Identifier: Apache-2.0
"""The commands that begin a backup, and those that end what is left of one. Pure.

What has to be undone is not remembered but seen: nodes and jobs of ours have
names that begin with `vmapipe-`, so whoever comes later, after any crash, can
tell from QEMU's own answers what the next command is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from vmapipe.control.qemu.disks import Answer, MachineDisk
from vmapipe.control.qemu.qmp import Command

PREFIX = "vmapipe-"
# The guardian serves within milliseconds. A SCSI disk of a Linux guest gives up
# after 30 s; longer than that nobody is helped by waiting.
RECONNECT_S = 30
# A write of the guest queues behind what the background copy has under way: with
# 1 or 4 workers it waited 75 ms at most for a sink of 20 ms, with 64 over a second.
MAX_WORKERS = 4
# Our sink ends the backup after guest-wait; QEMU, where it can, a little later.
_CBW_GRACE_S = 5

_ACTIVE = frozenset({"created", "running", "paused", "ready", "standby"})
# All is copied, and a word of somebody is awaited.
_COPIED = frozenset({"waiting", "pending"})
_LOOK = "-look"
_VIEW = "view"
_ENDED = frozenset({"concluded", "null"})


class Target(NamedTuple):
    """One disk, and the socket and export of its sink."""

    disk: MachineDisk
    socket: str
    export: str


class Settings(NamedTuple):
    """`run` is the short id of this backup; `speed_bytes_s` is each disk's, 0: no limit."""

    run: str
    speed_bytes_s: int
    guest_wait_s: int


class Features(NamedTuple):
    """The members that this QEMU's blockdev-backup has, and those of its x-perf."""

    members: frozenset[str]
    x_perf: frozenset[str]

    @property
    def breaks_snapshots(self) -> bool:
        """Whether old data that cannot be saved costs the backup, and not the guest's write."""
        return "on-cbw-error" in self.members


def features_of(schema: Iterable[Answer]) -> Features:
    """From the answer to query-qmp-schema."""
    types = {str(entry["name"]): entry for entry in schema}
    command = types.get("blockdev-backup", {})
    members = _members(types, command.get("arg-type"))
    return Features(frozenset(members), frozenset(_members(types, members.get("x-perf"))))


def _members(types: Mapping[str, Answer], name: Any) -> dict[str, str]:
    members = types.get(str(name), {}).get("members", ())
    return {member.get("name", ""): member.get("type", "") for member in members}


def run_prefix(run: str) -> str:
    return f"{PREFIX}{run}-"


def name_of(run: str, index: int) -> str:
    """Of the node, and of the job, of a backup's disk."""
    return f"{run_prefix(run)}{index}"


def filter_name(run: str, index: int) -> str:
    """Of the node that a disk's job puts above the disk to copy before it is written to."""
    return f"{name_of(run, index)}-filter"


def look_name(run: str, index: int) -> str:
    """Of the job that looks whether a disk's snapshot is still whole."""
    return f"{name_of(run, index)}{_LOOK}"


def look_nodes(name: str) -> tuple[str, str, str]:
    """Of such a job, each before those that it needs: a sector, the snapshot, the target.

    Short, because QEMU takes names of nodes of up to 31 characters.
    """
    return f"{name}-a", f"{name}-{_VIEW}", f"{name}-n"


def index_of(name: str) -> int:
    """The disk's number from such a name; -1: it is none."""
    tail = name.rpartition("-")[2]
    return int(tail) if name.startswith(PREFIX) and tail.isdecimal() else -1


def begin(targets: Sequence[Target], settings: Settings, features: Features) -> list[Command]:
    """In this order: the targets, then all jobs at one instant."""
    commands = [
        Command("blockdev-add", _nbd_node(target, name_of(settings.run, index)))
        for index, target in enumerate(targets)
    ]
    actions = [
        {"type": "blockdev-backup", "data": _backup(target, index, settings, features)}
        for index, target in enumerate(targets)
    ]
    return [*commands, Command("transaction", {"actions": actions})]


def _nbd_node(target: Target, name: str) -> dict[str, Any]:
    return {
        "driver": "nbd",
        "node-name": name,
        "server": {"type": "unix", "path": target.socket},
        "export": target.export,
        "reconnect-delay": RECONNECT_S,
    }


def _backup(target: Target, index: int, settings: Settings, features: Features) -> dict[str, Any]:
    data: dict[str, Any] = {
        "job-id": name_of(settings.run, index),
        "device": target.disk.device,
        "target": name_of(settings.run, index),
        # Nothing is below it: "top" is all of the disk but what was never written to.
        "sync": "top" if target.disk.is_thin else "full",
        "speed": settings.speed_bytes_s,
        "on-source-error": "report",
        "on-target-error": "report",
        # It stays until we have seen how it ended.
        "auto-dismiss": False,
    }
    if "max-workers" in features.x_perf:
        data["x-perf"] = {"max-workers": MAX_WORKERS}
    if features.breaks_snapshots:
        data["on-cbw-error"] = "break-snapshot"
        # The job then ends as if all were well. So it waits for us, who look before.
        data["auto-finalize"] = False
        data["filter-node-name"] = filter_name(settings.run, index)
    if "cbw-timeout" in features.members:
        data["cbw-timeout"] = settings.guest_wait_s + _CBW_GRACE_S
    return data


class Left(NamedTuple):
    """What is left of a backup, by name: jobs by their state, and nodes.

    `copied`: jobs that have copied all and wait for a word; they send nothing any more.
    """

    active: tuple[str, ...]
    copied: tuple[str, ...]
    ending: tuple[str, ...]
    ended: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def nothing(self) -> bool:
        return not any(self)

    def unthrottle(self) -> list[Command]:
        """So that each job sends something: QEMU only connects again when it has to send."""
        return [Command("block-job-set-speed", {"device": job, "speed": 0}) for job in self.active]

    def undo(self) -> list[Command]:
        """What can be done now; look again afterwards. Nodes go when no job needs them.

        What looks at a disk's snapshot goes before the job that keeps it.
        """
        jobs = {*self.active, *self.copied, *self.ending, *self.ended}
        looks = {job for job in jobs if job.endswith(_LOOK)}
        if not looks and (nodes := [node for node in self.nodes if f"{_LOOK}-" in node]):
            return _delete(nodes)
        now = looks or jobs
        commands = [
            Command("job-cancel", {"id": job}) for job in (*self.active, *self.copied) if job in now
        ]
        commands += [Command("job-dismiss", {"id": job}) for job in self.ended if job in now]
        return commands if jobs else _delete(self.nodes)


def _delete(nodes: Sequence[str]) -> list[Command]:
    """Of those that look, a piece before the view that it needs."""
    return [Command("blockdev-del", {"node-name": node}) for node in sorted(nodes, key=_depth)]


def _depth(node: str) -> int:
    return 1 if node.endswith(f"-{_VIEW}") else 0


def left_of(jobs: Sequence[Answer], nodes: Sequence[Answer], prefix: str) -> Left:
    """From query-jobs and query-named-block-nodes."""
    ours = {j["id"]: j["status"] for j in jobs if str(j.get("id", "")).startswith(prefix)}
    return Left(
        tuple(name for name, status in ours.items() if status in _ACTIVE),
        tuple(name for name, status in ours.items() if status in _COPIED),
        tuple(name for name, status in ours.items() if status not in _ACTIVE | _COPIED | _ENDED),
        tuple(name for name, status in ours.items() if status == "concluded"),
        tuple(
            str(node["node-name"])
            for node in nodes
            if str(node.get("node-name", "")).startswith(prefix)
        ),
    )


class LeftTarget(NamedTuple):
    """A target node of a crashed run, and where it looks for its sink."""

    node: str
    socket: str
    size_bytes: int


def left_targets(nodes: Sequence[Answer]) -> list[LeftTarget]:
    """Of all runs, by QEMU's own answer: it names the socket of each."""
    found = []
    for node in nodes:
        name, file = str(node.get("node-name", "")), str(node.get("file", ""))
        # The file of a filter is that of the disk below it.
        if name.startswith(PREFIX) and node.get("drv") == "nbd" and "?socket=" in file:
            size = (node.get("image") or {}).get("virtual-size", 0)
            found.append(LeftTarget(name, file.partition("?socket=")[2], size))
    return found
