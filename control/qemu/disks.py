# SPDX-License-Identifier: Apache-2.0
"""Which disks of a running machine a backup takes, and what they are called. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vmapipe.runtime.errors import Failure, UsageError

Answer = Mapping[str, Any]

# A device that has an id: as itself, or as the virtio device around it.
_DEVICE = re.compile(r"(?:/machine/peripheral/)?([^/]+)(?:/virtio-backend)?")
# Where UEFI firmware keeps its variables: a flash memory, which has no id of its own.
_FLASH_VARIABLES = "/machine/system.flash1"
_FLASH_NAME = "drive-efidisk0"
# QEMU's own word for it where nobody gave it one.
_FLASH_DEVICES = frozenset({"", "pflash1"})
# What QEMU puts above a disk while one of its block jobs works on it.
_JOB_FILTERS = frozenset({"backup-top", "commit_top", "copy-before-write", "mirror_top"})


class Machine(NamedTuple):
    """The answers to query-block, query-named-block-nodes and query-block-jobs."""

    blocks: Sequence[Answer]
    nodes: Sequence[Answer]
    jobs: Sequence[Answer]


class MachineDisk(NamedTuple):
    """`name` in the archive; `device` is what QEMU's commands call it.

    `is_thin`: what its image was never given is zero, and QEMU can leave it out.
    """

    name: str
    device: str
    size_bytes: int
    is_thin: bool = False


class Names(NamedTuple):
    """Of a disk: its name in the archive, and all that it may be asked for by."""

    name: str
    words: frozenset[str]


def names_of(block: Answer) -> Names:
    """From an entry of query-block."""
    device, qdev = block.get("device", ""), block.get("qdev", "")
    node = (block.get("inserted") or {}).get("node-name", "")
    match = _DEVICE.fullmatch(qdev)
    name = _drive_name(match[1]) if match else device or node or qdev
    if qdev == _FLASH_VARIABLES and device in _FLASH_DEVICES:
        name = _FLASH_NAME
    words = {name, device, node, qdev, match[1] if match else ""}
    return Names(name, frozenset(words - {""}))


class _Found(NamedTuple):
    """`skipped`, `refused`: why not, when nobody asked for it; `words`: what it may be asked by."""

    disk: MachineDisk
    words: frozenset[str]
    skipped: str = ""
    refused: str = ""


def choose_disks(machine: Machine, wanted: Sequence[str]) -> tuple[MachineDisk, ...]:
    """All that are in and can be written to, or those that `wanted` names. Raises Failure."""
    found = [_found_block(block, machine) for block in machine.blocks]
    if wanted:
        found += [_found_node(node, machine) for node in machine.nodes]
        chosen = [_named(word, found) for word in dict.fromkeys(wanted)]
    else:
        chosen = [disk for disk in found if not disk.skipped]
    for disk in chosen:
        if reason := disk.skipped or disk.refused:
            raise Failure(f"disk {disk.disk.name!r}: {reason}")
    if not chosen:
        raise UsageError(
            "nothing to back up: the machine has no writable disk with a medium"
            + "".join(f"; {disk.disk.name}: {disk.skipped}" for disk in found)
        )
    return tuple(dict.fromkeys(disk.disk for disk in chosen))


def _named(word: str, found: Sequence[_Found]) -> _Found:
    for disk in found:
        if word in disk.words:
            return disk
    known = ", ".join(sorted({disk.disk.name for disk in found}))
    raise UsageError(f"the machine has no disk {word!r}" + (f", but {known}" if known else ""))


def _found_block(block: Answer, machine: Machine) -> _Found:
    inserted = block.get("inserted") or {}
    device, node = block.get("device", ""), inserted.get("node-name", "")
    name, words = names_of(block)
    # The name where there is one: QEMU's commands know it as well as the node's.
    size = (inserted.get("image") or {}).get("virtual-size", 0)
    disk = MachineDisk(name, device or node, size, _is_thin(inserted))
    skipped = ""
    if not inserted:
        skipped = "no medium is in it"
    elif inserted.get("ro"):
        skipped = "it is read-only, so its image can be backed up at rest"
    elif not size:
        skipped = "it is empty"
    refused = _job_on(inserted, {device, node}, machine.jobs)
    return _Found(disk, words, skipped, refused)


def _found_node(node: Answer, machine: Machine) -> _Found:
    """A node that is no guest device's: one of a qemu-storage-daemon, or asked for by its name."""
    name, size = node.get("node-name", ""), (node.get("image") or {}).get("virtual-size", 0)
    skipped = ""
    if node.get("ro"):
        skipped = "it is read-only, so its image can be backed up at rest"
    elif not size:
        skipped = "it is empty"
    refused = _job_on(node, {name}, machine.jobs)
    disk = MachineDisk(name, name, size, _is_thin(node))
    return _Found(disk, frozenset({name} - {""}), skipped, refused)


def _is_thin(node: Answer) -> bool:
    """Whether what is not allocated in this node is certain to be zero.

    So it is in a qcow2 image without a backing file. A raw file tells its holes as
    zeroes that are allocated; other formats are not worth a doubt.
    """
    image = node.get("image") or {}
    backed = (
        node.get("backing_file") or node.get("backing_file_depth") or image.get("backing-image")
    )
    return node.get("drv") == "qcow2" and not (backed or image.get("backing-filename"))


def _drive_name(device_id: str) -> str:
    """As Proxmox VE calls it, so that its restore knows where it belongs."""
    return device_id if device_id.startswith("drive-") else f"drive-{device_id}"


def _job_on(node: Answer, names: set[str], jobs: Sequence[Answer]) -> str:
    """Why a job stands in the way; empty: none is known. QEMU itself looks again."""
    running = list(_jobs_named(names, jobs))
    if running:
        job = running[0]
        return (
            f"a block job ({job.get('type', 'of some kind')} {job.get('device', '')!r}) is running "
            "on it; wait for its end, or cancel it"
        )
    if node.get("drv") in _JOB_FILTERS:
        known = ", ".join(repr(job.get("device", "")) for job in jobs) or "none is listed"
        return f"a block job is running on it ({known}); wait for its end, or cancel it"
    return ""


def _jobs_named(names: set[str], jobs: Sequence[Answer]) -> Iterator[Answer]:
    """A job that was started without an id has the name of its disk."""
    return (job for job in jobs if job.get("device") in names - {""})
