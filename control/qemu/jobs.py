# SPDX-License-Identifier: Apache-2.0
"""The commands that begin a backup, and those that end what is left of one. Pure.

What has to be undone is not remembered but seen: our nodes and jobs have names that begin with
`vmapipe-`, so a later process, after any crash, can tell from QEMU's own answers what the next
command is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.control.qemu.disks import MachineDisk
from vmapipe.control.qemu.features import Features
from vmapipe.control.qemu.graph import Graph
from vmapipe.control.qmp.connection import Answer, Command

PREFIX = "vmapipe-"
# The guardian serves within milliseconds. A SCSI disk of a Linux guest gives up
# after 30 s; a longer wait helps no guest.
RECONNECT_S = 30
# A write of the guest queues behind what the background copy has under way: with
# 1 or 4 workers it waited 75 ms at most for a sink of 20 ms, with 64 over a second.
MAX_WORKERS = 4
# How quick a disk's job is as long as the guest stands still, or the job is to be replaced.
SLOW_BYTES_S = 4096
# Our sink ends the backup after guest-wait; QEMU, where it can, a little later.
CBW_GRACE_S = 5

_ACTIVE = frozenset({"created", "running", "paused", "ready", "standby"})
# All is copied, and the job waits to be finished.
_COPIED = frozenset({"waiting", "pending"})
_LOOK, _FILTER, _TAKE_OUT = "-look", "-filter", "-take-out"
_VIEW = "view"
_ENDED = frozenset({"concluded", "null"})


class NodeBitmap(NamedTuple):
    """A dirty bitmap, and the node that it is on."""

    node: str
    name: str


class Depth(NamedTuple):
    """How much a job reads at once: so many requests, of so many bytes at most each; 0: as QEMU likes."""

    workers: int = MAX_WORKERS
    chunk_bytes: int = 0


# A request of the guest queues behind all that the job has under way. It is to be a quarter of what
# the guest may wait, on a disk that gives 40 MiB/s to who reads at random.
_SLOW_DISK_BYTES_S = 40 << 20
_MOST_CHUNK_BYTES = 1 << 20


def depth_for(bound_s: float) -> Depth:
    """Return how deep a job may read for a guest that is to wait no longer than `bound_s`."""
    chunk = int(bound_s / 4 * _SLOW_DISK_BYTES_S) // CLUSTER_BYTES * CLUSTER_BYTES
    if chunk < _MOST_CHUNK_BYTES:
        return Depth(1, max(CLUSTER_BYTES, chunk))
    return Depth(min(MAX_WORKERS, chunk // _MOST_CHUNK_BYTES))


class BackupTarget(NamedTuple):
    """One disk to back up, and the socket and export of its sink.

    `is_handed_over`: a filter of ours is to take the place of its job soon after the instant,
    and gives up when it has taken `filter_timeout_s` over old data, 0: only when that fails.
    `bitmap`: only what it has is copied; None: all of the disk. `depth`: None: as deep as it pays.
    """

    disk: MachineDisk
    socket: str
    export: str
    is_handed_over: bool = False
    filter_timeout_s: int = 0
    bitmap: NodeBitmap | None = None
    depth: Depth | None = None


class BackupSettings(NamedTuple):
    """The settings of a backup. `run` is its short id; `speed_bytes_s` is each disk's, 0: no limit."""

    run: str
    speed_bytes_s: int
    guest_wait_s: int


def run_prefix(run: str) -> str:
    return f"{PREFIX}{run}-"


def job_name(run: str, index: int) -> str:
    """Return the name of the node, and of the job, of a backup's disk."""
    return f"{run_prefix(run)}{index}"


def absent_name(run: str) -> str:
    """Return a name of ours that no node or job ever has."""
    return f"{run_prefix(run)}none"


def filter_name(run: str, index: int) -> str:
    """Return the name of our copy-before-write filter above a disk."""
    return f"{job_name(run, index)}{_FILTER}"


def job_filter_name(run: str, index: int) -> str:
    """Return the name of the filter of a job that is to be replaced by ours."""
    return f"{job_name(run, index)}-job"


def snapshot_name(run: str, index: int) -> str:
    """Return the name of the node that shows a disk as it was at the instant."""
    return f"{job_name(run, index)}-instant"


def check_name(run: str, index: int) -> str:
    """Return the name of the job that checks whether a disk's snapshot is still whole."""
    return f"{job_name(run, index)}{_LOOK}"


def check_nodes(name: str) -> tuple[str, str, str]:
    """Return the names of its nodes, each before those that it needs: a sector, the snapshot, the
    target.

    Short, because QEMU takes names of nodes of up to 31 characters.
    """
    return f"{name}-a", f"{name}-{_VIEW}", f"{name}-n"


def disk_index(name: str) -> int:
    """Return the disk's index from a job's name; -1: the name is not one of ours."""
    tail = name.rpartition("-")[2]
    return int(tail) if name.startswith(PREFIX) and tail.isdecimal() else -1


class BackupCommands(NamedTuple):
    """The commands that begin a backup, in this order: the jobs' targets, filters of ours, then all
    jobs.

    A filter that QEMU refuses is done without. The jobs begin at one instant.
    """

    targets: Sequence[Command]
    filters: Sequence[Command]
    transaction: Command


def begin_commands(
    targets: Sequence[BackupTarget], settings: BackupSettings, features: Features
) -> BackupCommands:
    adds = [
        Command("blockdev-add", _nbd_node(target, job_name(settings.run, index)))
        for index, target in enumerate(targets)
    ]
    actions = [
        {"type": "blockdev-backup", "data": _backup(target, index, settings, features)}
        for index, target in enumerate(targets)
    ]
    filters = [
        _filter(target, settings.run, index)
        for index, target in enumerate(targets)
        if target.is_handed_over
    ]
    return BackupCommands(adds, filters, Command("transaction", {"actions": actions}))


def refusal_hint(text: str) -> str:
    """Return the way out of a refusal, as the end of its message; empty: none is known."""
    if "ailed to connect" in text:
        return (
            "; QEMU must be able to reach our socket: does it run as another user than root and "
            "the owner of its monitor's socket, or is it confined (AppArmor, SELinux, a container)? "
            "TMPDIR chooses the folder"
        )
    if "read-only" in text or "nactive" in text:
        return (
            "; has the machine been migrated to another host (run state postmigrate)? Then its "
            "disks are that host's"
        )
    if "different sizes" in text:
        return "; the disk was resized just now: start the backup again"
    if "in use" in text or "busy" in text:
        return "; another block job works on the disk: wait for its end, or cancel it"
    return ""


def _nbd_node(target: BackupTarget, name: str) -> dict[str, Any]:
    return {
        "driver": "nbd",
        "node-name": name,
        "server": {"type": "unix", "path": target.socket},
        "export": target.export,
        "reconnect-delay": RECONNECT_S,
    }


def _backup(
    target: BackupTarget, index: int, settings: BackupSettings, features: Features
) -> dict[str, Any]:
    data: dict[str, Any] = {
        "job-id": job_name(settings.run, index),
        "device": target.disk.device,
        "target": job_name(settings.run, index),
        # Nothing is below it: "top" is all of the disk but what was never written to.
        "sync": "top" if target.disk.is_thin else "full",
        "speed": settings.speed_bytes_s,
        **_copying(features, target.depth),
    }
    if target.bitmap:
        data |= _only(target.bitmap.name)
    if target.is_handed_over:
        # What was never written to is not for it to leave out: it ends before the guest has
        # written there. Nor what has not changed: our filter saves that, too, and must not find
        # it written to already. It copies next to nothing itself.
        data = {k: v for k, v in data.items() if not k.startswith("bitmap")}
        data |= {"sync": "full", "speed": SLOW_BYTES_S}
        data["filter-node-name"] = job_filter_name(settings.run, index)
    if features.breaks_snapshots:
        data["on-cbw-error"] = "break-snapshot"
        # The job then ends as if all were well. So it waits until we have checked.
        data["auto-finalize"] = False
        data["filter-node-name"] = filter_name(settings.run, index)
    if "cbw-timeout" in features.members:
        data["cbw-timeout"] = settings.guest_wait_s + CBW_GRACE_S
    return data


def _only(bitmap: str) -> dict[str, str]:
    """Return the arguments of a job that copies what a bitmap has, and leaves the bitmap alone."""
    return {"sync": "bitmap", "bitmap": bitmap, "bitmap-mode": "never"}


def _copying(features: Features, depth: Depth | None) -> dict[str, Any]:
    """Return the arguments that all jobs have that copy to a sink."""
    arguments: dict[str, Any] = {
        "on-source-error": "report",
        "on-target-error": "report",
        # It stays until we have seen how it ended.
        "auto-dismiss": False,
    }
    if "max-workers" in features.x_perf:
        workers, chunk_bytes = depth or Depth()
        arguments["x-perf"] = {"max-workers": workers}
        if chunk_bytes:  # as old as the other
            arguments["x-perf"]["max-chunk"] = chunk_bytes
    return arguments


def _filter(target: BackupTarget, run: str, index: int) -> Command:
    """Add our filter with the job's target, above the disk; the job's own filter will come in between.

    Not added above that: QEMU 7.2 keeps what a filter still has to copy in the node below it,
    and ends itself when that node goes first.
    """
    arguments: dict[str, Any] = {
        "driver": "copy-before-write",
        "node-name": filter_name(run, index),
        "file": target.disk.device,
        "target": job_name(run, index),
        "on-cbw-error": "break-snapshot",
    }
    if target.filter_timeout_s:
        arguments["cbw-timeout"] = target.filter_timeout_s
    return Command("blockdev-add", arguments)


def rehearse(run: str, device: str) -> tuple[Command, Command]:
    """Return commands that add and delete a snapshot's node: some QEMUs know it and refuse it."""
    name = snapshot_name(run, 0)
    arguments = {"driver": "snapshot-access", "node-name": name, "file": device, "read-only": True}
    return Command("blockdev-add", arguments), Command("blockdev-del", {"node-name": name})


def copy_snapshot(run: str, index: int, target: BackupTarget, features: Features) -> list[Command]:
    """Return the commands that copy what our filter shows to the job's target.

    With a bitmap, what that has by now: all of it is shown as it was at the instant.
    """
    name, source = job_name(run, index), snapshot_name(run, index)
    view = {"driver": "snapshot-access", "node-name": source, "file": filter_name(run, index)}
    arguments = {"job-id": name, "device": source, "target": name, "sync": "full"}
    commands = [Command("blockdev-add", {**view, "read-only": True})]
    if target.bitmap:
        copy = {"node": source, "name": target.bitmap.name, "granularity": CLUSTER_BYTES}
        merge = {
            "node": source,
            "target": target.bitmap.name,
            "bitmaps": [target.bitmap._asdict()],
        }
        commands += [
            Command("block-dirty-bitmap-add", copy),
            Command("block-dirty-bitmap-merge", merge),
        ]
        arguments |= _only(target.bitmap.name)
    # As with a job that breaks its snapshot: we look before it ends.
    more = {"speed": SLOW_BYTES_S, "auto-finalize": False, **_copying(features, target.depth)}
    return [*commands, Command("blockdev-backup", {**arguments, **more})]


class DeviceAboveFilter(NamedTuple):
    """A guest's device whose writes go through a filter of ours: its path in QEMU, the filter, and the
    node below that."""

    path: str
    node: str
    below: str

    def put_back(self) -> Command:
        return put_device(self.path, self.below)


def put_device(path: str, node: str) -> Command:
    """Return the command by which the device at this path uses this node."""
    return Command("qom-set", {"path": path, "property": "drive", "value": node})


def device_path(block: Answer) -> str:
    """Return the path of the device in an entry of query-block; empty: it cannot use another node."""
    qdev = str(block.get("qdev", ""))
    if not qdev or block.get("removable"):
        return ""
    return qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"


def devices_above_filters(
    blocks: Iterable[Answer], below: Callable[[str], str], prefix: str
) -> list[DeviceAboveFilter]:
    """Find them in query-block's answer; `below` returns the node below a node, empty: not known."""
    found = []
    for block in blocks:
        node = str((block.get("inserted") or {}).get("node-name", ""))
        if node.startswith(prefix) and node.endswith(_FILTER) and (path := device_path(block)):
            found.append(DeviceAboveFilter(path, node, below(node)))
    return found


class OverlayAboveFilter(NamedTuple):
    """An image that was put above a filter of ours by an external snapshot, the filter, and
    the node below that."""

    overlay: str
    node: str
    below: str

    def take_out(self) -> Command:
        """Put the image on the node below, and write that node's format into its header.

        There is nothing between the two that has data, so nothing is copied.
        """
        arguments = {"job-id": f"{self.node}{_TAKE_OUT}", "device": self.overlay}
        return Command("block-stream", {**arguments, "base-node": self.below})


def overlays_above_filters(graph: Graph, nodes: Iterable[str]) -> list[OverlayAboveFilter]:
    """Find them above those of our `nodes` that are filters."""
    return [
        OverlayAboveFilter(overlay, node, below)
        for node in nodes
        if node.endswith(_FILTER) and (below := graph.below(node))
        for overlay in graph.overlays(node)
    ]


class OwnObjects(NamedTuple):
    """The objects of a backup in QEMU, by name: jobs by state, nodes, devices and images above
    filters of ours.

    `copied`: jobs that have copied all and wait to be finished; they send nothing any more.
    `bitmaps`: the commands that remove those that the jobs read.
    """

    active: tuple[str, ...]
    copied: tuple[str, ...]
    ending: tuple[str, ...]
    ended: tuple[str, ...]
    nodes: tuple[str, ...]
    writers: tuple[DeviceAboveFilter, ...] = ()
    overlays: tuple[OverlayAboveFilter, ...] = ()
    bitmaps: tuple[Command, ...] = ()

    @property
    def nothing(self) -> bool:
        return not any(self)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of jobs, nodes and bitmaps."""
        bitmaps = [str(command.arguments["name"]) for command in self.bitmaps]
        known = (*self.active, *self.copied, *self.ending, *self.ended, *self.nodes, *bitmaps)
        return tuple(dict.fromkeys(known))

    def unthrottle(self) -> list[Command]:
        """Lift the jobs' limits so that each sends something: QEMU reconnects only when it has to
        send.
        """
        return [Command("block-job-set-speed", {"device": job, "speed": 0}) for job in self.active]

    def cleanup_commands(self) -> list[Command]:
        """Return what can be undone now; ask QEMU again afterwards. Nodes go when no job needs them.

        The check of a disk's snapshot goes before the job that keeps it.
        """
        jobs = {*self.active, *self.copied, *self.ending, *self.ended}
        looks = {job for job in jobs if job.endswith(_LOOK)}
        if not looks and (nodes := [node for node in self.nodes if f"{_LOOK}-" in node]):
            return _delete(nodes)
        now = looks or jobs
        commands = [
            Command("job-cancel", {"id": job})
            for job in (*self.active, *self.copied)
            if job in now and not job.endswith(_TAKE_OUT)  # that one ends by itself
        ]
        commands += [Command("job-dismiss", {"id": job}) for job in self.ended if job in now]
        if jobs:
            return commands
        # A device that goes back takes the node below the filter as it is now: a user may have
        # put another image there. Where that is refused, or not known, it is looked at again.
        back = [writer.put_back() for writer in self.writers if writer.below]
        back += [overlay.take_out() for overlay in self.overlays]
        return [*self.bitmaps, *back, *_delete(self.nodes)]


def _delete(nodes: Sequence[str]) -> list[Command]:
    """Each before those that it needs."""
    return [Command("blockdev-del", {"node-name": node}) for node in sorted(nodes, key=_depth)]


def _depth(node: str) -> int:
    """Rank nodes for deletion: a check's nodes before its view, a snapshot before its filter,
    targets last.
    """
    order = {"a": 0, "n": 0, _VIEW: 1, "instant": 1, "filter": 2}
    return order.get(node.rpartition("-")[2], 3)


def own_objects(
    jobs: Sequence[Answer],
    nodes: Sequence[Answer],
    prefix: str,
    writers: Sequence[DeviceAboveFilter] = (),
    overlays: Sequence[OverlayAboveFilter] = (),
    bitmaps: Sequence[Command] = (),
) -> OwnObjects:
    """Find the objects whose names begin with `prefix`, from query-jobs and query-named-block-
    nodes.
    """
    ours = {j["id"]: j["status"] for j in jobs if str(j.get("id", "")).startswith(prefix)}
    return OwnObjects(
        tuple(name for name, status in ours.items() if status in _ACTIVE),
        tuple(name for name, status in ours.items() if status in _COPIED),
        tuple(name for name, status in ours.items() if status not in _ACTIVE | _COPIED | _ENDED),
        tuple(name for name, status in ours.items() if status == "concluded"),
        tuple(
            str(node["node-name"])
            for node in nodes
            if str(node.get("node-name", "")).startswith(prefix)
        ),
        tuple(writers),
        tuple(overlays),
        tuple(bitmaps),
    )


class OwnTarget(NamedTuple):
    """A target node of a crashed run, and where it looks for its sink."""

    node: str
    socket: str
    size_bytes: int


def own_targets(nodes: Sequence[Answer]) -> list[OwnTarget]:
    """Find the targets of all runs; QEMU's answer names the socket of each."""
    found = []
    for node in nodes:
        name, file = str(node.get("node-name", "")), str(node.get("file", ""))
        # The file of a filter is that of the disk below it.
        if name.startswith(PREFIX) and node.get("drv") == "nbd" and "?socket=" in file:
            size = (node.get("image") or {}).get("virtual-size", 0)
            found.append(OwnTarget(name, file.partition("?socket=")[2], size))
    return found
