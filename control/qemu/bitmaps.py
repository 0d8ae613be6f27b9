# SPDX-License-Identifier: Apache-2.0
"""Dirty bitmaps: QEMU's records of what has changed since an archive, each named after its archive.

A bitmap of ours is called `vmapipe-`, the uuid of the archive since whose instant it records, and the
disk's name in it. So it is worth what its name says after any crash, copy or roll-back of an image,
and when the images of two disks change places: an archive of that uuid, checked, and this bitmap,
whole, on the disk's own node, make an incremental backup. All else is a full one.

Two of them are there during a backup: the old one, which records all along, and the new one, which is
added a little before the instant; QEMU never clears either. When the archive is on disk the old
one goes, else the new one. The job itself reads a third one, which is the run's, and which has
the sampled clusters besides (see bitmap_image.py). Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.control.qemu.disks import MachineDisk
from vmapipe.control.qemu.jobs import PREFIX, run_prefix
from vmapipe.control.qmp.connection import Answer, Command
from vmapipe.runtime.text import name_text
from vmapipe.runtime.uuids import uuid_text

_JOBS = re.compile(re.escape(PREFIX) + r"[0-9a-f]{8}-changed")
_ARCHIVES = re.compile(re.escape(PREFIX) + r"([0-9a-f]{32})(?:-(.*))?", re.DOTALL)
# A full backup reads the disk in order, and starts a new chain: with more than half of it to
# send anyway, an incremental one only costs.
_MOST_CHANGED_PERCENT = 50
#: The only format that keeps a bitmap when QEMU ends.
_KEEPS_BITMAPS = "qcow2"


def bitmap_name(archive: bytes, disk: str) -> str:
    """Return the name of the bitmap that records of a disk since the archive of this uuid (16 bytes)."""
    return f"{PREFIX}{archive.hex()}-{disk}"


def archive_of(name: str) -> bytes:
    """Return the uuid of the archive that a bitmap is named after; empty: it is none of ours."""
    match = _ARCHIVES.fullmatch(name)
    return bytes.fromhex(match[1]) if match else b""


def disk_of(name: str) -> str:
    """Return the disk that a bitmap of ours is named after; empty: none."""
    match = _ARCHIVES.fullmatch(name)
    return match[2] or "" if match else ""


def job_bitmap(run: str) -> str:
    """Return the name of the bitmap that a run's jobs read."""
    return f"{run_prefix(run)}changed"


def image_name(run: str) -> str:
    """Return the name of the node that has a bitmap and nothing else (see bitmap_image.py)."""
    return f"{run_prefix(run)}sample"


class Bitmap(NamedTuple):
    """A bitmap on a node, as QEMU describes it; `dirty_bytes` counts whole granules."""

    node: str
    name: str
    recording: bool
    inconsistent: bool
    busy: bool
    granularity_bytes: int
    dirty_bytes: int


def bitmaps_in(nodes: Iterable[Answer]) -> Iterator[Bitmap]:
    """Return all that have a name, in the answer to query-named-block-nodes."""
    for node in nodes:
        for found in node.get("dirty-bitmaps") or ():
            # A running job's own have none.
            if name := str(found.get("name") or ""):
                yield Bitmap(
                    str(node.get("node-name", "")),
                    name,
                    found.get("recording") is True,
                    found.get("inconsistent") is True,
                    found.get("busy") is True,
                    int(found.get("granularity", 0)),
                    int(found.get("count", 0)),
                )


def records_in(nodes: Iterable[Answer]) -> list[Bitmap]:
    """Return those that are named after an archive: records of ours of what has changed since."""
    return [bitmap for bitmap in bitmaps_in(nodes) if archive_of(bitmap.name)]


def node_of(device: str, blocks: Iterable[Answer], nodes: Iterable[Answer]) -> Answer | None:
    """Return the node that QEMU's commands work with by this name, a node's or a drive's.

    It is the active one: below it there may be others, whose bitmaps say nothing of this disk.
    """
    names = {device}
    names |= {
        str((block.get("inserted") or {}).get("node-name", ""))
        for block in blocks
        if block.get("device") == device
    }
    return next((node for node in nodes if node.get("node-name") in names), None)


class BaseArchive(NamedTuple):
    """An archive that a backup may build on: its uuid, and the sizes in bytes of its devices."""

    uuid: bytes
    sizes: Mapping[str, int]


class DiskMethod(NamedTuple):
    """How a disk is backed up. `since`: the old bitmap; empty: in full, for the `reason`."""

    since: str
    reason: str = ""
    dirty_bytes: int = 0

    @property
    def is_incremental(self) -> bool:
        return bool(self.since)


def choose_method(disk: MachineDisk, node: Answer | None, base: BaseArchive) -> DiskMethod:
    """Choose for a disk, whose active node this is. Any doubt means in full."""
    if node is None:
        return DiskMethod("", "QEMU has no node of it that keeps records")
    if fault := _base_fault(disk, base):
        return DiskMethod("", fault)
    name = bitmap_name(base.uuid, disk.name)
    found = [bitmap for bitmap in bitmaps_in([node]) if bitmap.name == name]
    fault = _bitmap_fault(found[0], disk) if found else _why_absent(node, base)
    return DiskMethod("", fault) if fault else DiskMethod(name, dirty_bytes=found[0].dirty_bytes)


def _base_fault(disk: MachineDisk, base: BaseArchive) -> str:
    """Return why this disk cannot build on the base; empty: it can."""
    if disk.name not in base.sizes:
        return "the base does not have it"
    if base.sizes[disk.name] != disk.size_bytes:
        before = base.sizes[disk.name]
        return f"its size has changed: {disk.size_bytes} bytes, {before} in the base"
    return ""


def _bitmap_fault(bitmap: Bitmap, disk: MachineDisk) -> str:
    """Return why this record cannot be trusted, or is not worth its use; empty: it can."""
    if bitmap.inconsistent:
        return "QEMU was not ended properly, and its record of what has changed is not valid"
    if not bitmap.recording:
        return "somebody has disabled QEMU's record of what has changed"
    if bitmap.busy:
        return "another operation uses QEMU's record of what has changed"
    if bitmap.granularity_bytes != CLUSTER_BYTES:
        return f"QEMU's record {bitmap.name} was not made by vmapipe"
    if bitmap.dirty_bytes * 100 > disk.size_bytes * _MOST_CHANGED_PERCENT:
        return f"more than {_MOST_CHANGED_PERCENT} % of it has changed"
    return ""


def _why_absent(node: Answer, base: BaseArchive) -> str:
    records = records_in([node])
    if names := [
        disk_of(record.name) for record in records if archive_of(record.name) == base.uuid
    ]:
        disks = ", ".join(map(name_text, names))
        return f"its image was that of another disk in the base ({disks})"
    known = ", ".join(uuid_text(archive_of(record.name)) for record in records)
    if known:
        return (
            f"QEMU records what has changed since another archive ({known}), not since the base "
            f"({uuid_text(base.uuid)})"
        )
    if node.get("drv") == _KEEPS_BITMAPS:
        why = (
            "QEMU was killed, a snapshot was taken, the disk was copied or migrated, or nothing "
            "began a record"
        )
    else:
        why = "with this format it is lost whenever QEMU ends; or nothing began it"
    return f"QEMU has no record of what has changed since the base: {why}"


# --- Commands ---


def add_bitmap(device: str, name: str, node: Answer) -> list[Command]:
    """Return the commands that begin a record, the best first: kept when QEMU ends, if it can be."""
    arguments = {"node": device, "name": name, "granularity": CLUSTER_BYTES}
    kept = [True, False] if node.get("drv") == _KEEPS_BITMAPS else [False]
    return [
        Command("block-dirty-bitmap-add", {**arguments, "persistent": persistent})
        for persistent in kept
    ]


def add_job_bitmap(node: str, name: str, *, disabled: bool = False) -> Command:
    """Return the command that adds a bitmap for the time of a backup; it records unless `disabled`."""
    arguments = {"node": node, "name": name, "granularity": CLUSTER_BYTES, "persistent": False}
    return Command("block-dirty-bitmap-add", {**arguments, "disabled": disabled})


def merge_bitmap(node: str, target: str, source: str | Mapping[str, str]) -> Command:
    """Return the command that adds what `source`, on this or another node, has to `target`."""
    arguments = {"node": node, "target": target, "bitmaps": [source]}
    return Command("block-dirty-bitmap-merge", arguments)


def add_image(name: str, path: str, *, read_only: bool) -> Command:
    """Return the command that opens an image of bitmap_image.py."""
    # It is no matter what a crash of the host leaves of it, and syncing would hold the guest up.
    common = {"read-only": read_only, "cache": {"no-flush": True}}
    file = {"driver": "file", "filename": path, **common}
    return Command("blockdev-add", {"driver": "qcow2", "node-name": name, "file": file, **common})


def remove_bitmap(node: str, name: str) -> Command:
    return Command("block-dirty-bitmap-remove", {"node": node, "name": name})


# --- What is left over ---


def of_runs(nodes: Iterable[Answer], prefix: str) -> list[Command]:
    """Return the commands that remove the jobs' own bitmaps of the runs with this prefix."""
    return [
        remove_bitmap(bitmap.node, bitmap.name)
        for bitmap in bitmaps_in(nodes)
        if bitmap.name.startswith(prefix) and _JOBS.fullmatch(bitmap.name) and not bitmap.busy
    ]


def worthless(nodes: Iterable[Answer]) -> list[Command]:
    """Return the commands that remove records of ours which no backup can use any more."""
    return [
        remove_bitmap(bitmap.node, bitmap.name)
        for bitmap in records_in(nodes)
        if not bitmap.busy and (bitmap.inconsistent or not bitmap.recording)
    ]


def all_but(nodes: Iterable[Answer], keep: bytes) -> list[Command]:
    """Return the commands that remove all records of ours from these nodes but those of archive `keep`."""
    return [
        remove_bitmap(bitmap.node, bitmap.name)
        for bitmap in records_in(nodes)
        if archive_of(bitmap.name) != keep and not bitmap.busy
    ]


def since(nodes: Iterable[Answer], archive: bytes) -> list[Command]:
    """Return the commands that remove the records since this archive, wherever they are."""
    return [
        remove_bitmap(bitmap.node, bitmap.name)
        for bitmap in records_in(nodes)
        if archive_of(bitmap.name) == archive and not bitmap.busy
    ]
