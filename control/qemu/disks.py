# SPDX-License-Identifier: Apache-2.0
"""The disks of a running machine: which a backup takes, their names, and storage outside of QEMU.

Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple, NoReturn

from vmapipe.control.qemu.graph import JOB_FILTERS, Graph
from vmapipe.control.qmp.connection import Answer
from vmapipe.runtime.errors import Failure, UsageError

# A device that has an id: as itself, or as the virtio device around it.
_DEVICE = re.compile(r"(?:/machine/peripheral/)?([^/]+)(?:/virtio-backend)?")
# Where UEFI firmware keeps its variables: a flash memory, which has no id of its own.
_FLASH_VARIABLES = "/machine/system.flash1"
_FLASH_NAME = "drive-efidisk0"
# QEMU's own name for it where the user gave none.
_FLASH_DEVICES = frozenset({"", "pflash1"})
# Where its code is: the same in all machines, and never written to.
_FLASH_CODE = "/machine/system.flash0"

#: Why a disk that could be taken is not.
NOT_CHOSEN = "--disk chooses others"
NOT_CONFIGURED = "the machine's configuration does not have it (a disk of its args?)"


class Machine(NamedTuple):
    """The answers to query-block, query-named-block-nodes and query-block-jobs, and what follows.

    `outside`: what its block layer does not have; `added`: what we put there ourselves for the
    backup, each with the words that it may be asked for by.
    """

    blocks: Sequence[Answer]
    nodes: Sequence[Answer]
    jobs: Sequence[Answer]
    graph: Graph = Graph()
    outside: Sequence[OutsideStorage] = ()
    added: Sequence[tuple[MachineDisk, frozenset[str]]] = ()


class DiskChoiceOptions(NamedTuple):
    """The disks that a user wants.

    `requested`: what was asked for, `[NAME=]DEVICE` each; none: all that can be.

    Of that all: `excluded`, by name with the reason, stay out, and `read_only`, by name, are taken
    although they are not writable; with `configured` no others than these are taken.
    """

    requested: Sequence[str] = ()
    excluded: Mapping[str, str] = MappingProxyType({})
    read_only: frozenset[str] = frozenset()
    configured: frozenset[str] | None = None


class MachineDisk(NamedTuple):
    """A disk with its `name` in the archive; `device` is its name in QEMU's commands.

    `is_thin`: what its image was never given is zero, and QEMU can leave it out.
    """

    name: str
    device: str
    size_bytes: int
    is_thin: bool = False


class DiskNames(NamedTuple):
    """The names of a disk: that in the archive, and all by which a user may ask for it."""

    name: str
    aliases: frozenset[str]


def disk_names(block: Answer) -> DiskNames:
    """Return the names of the disk in an entry of query-block."""
    device, qdev = block.get("device", ""), block.get("qdev", "")
    node = (block.get("inserted") or {}).get("node-name", "")
    match = _DEVICE.fullmatch(qdev)
    name = _drive_name(match[1]) if match else device or node or qdev
    if qdev == _FLASH_VARIABLES and device in _FLASH_DEVICES:
        name = _FLASH_NAME
    words = {name, device, node, qdev, match[1] if match else ""}
    return DiskNames(name, frozenset(words - {""}))


#: Level of the line in the log.
Level = Literal["debug", "info", "warn"]


class LeftOut(NamedTuple):
    """A disk of the machine that is not in the archive, and why.

    `level` is the log's: `warn` where a user may rely on its being there, `debug` where nothing
    is lost.
    """

    device: str
    reason: str
    level: Level


class DiskChoice(NamedTuple):
    disks: tuple[MachineDisk, ...]
    left_out: tuple[LeftOut, ...]


class _Found(NamedTuple):
    """A disk, and why it is not taken unasked (`skipped`), or never (`refused`).

    `qemu_names`: what QEMU itself calls it; `aliases`: its name in the archive, too. `is_node`: no
    guest's device; `part_of`: nor a disk at all.
    """

    disk: MachineDisk
    qemu_names: frozenset[str]
    aliases: frozenset[str]
    skipped: str = ""
    level: Level = "warn"
    refused: str = ""
    is_node: bool = False
    part_of: str = ""

    @property
    def left_out(self) -> LeftOut:
        return LeftOut(self.disk.name, self.skipped, self.level)


def choose_disks(machine: Machine, wishes: DiskChoiceOptions) -> DiskChoice:
    """Choose the disks that a user asks for, or all that are writable. Raises Failure, UsageError."""
    found = [_found_block(block, machine) for block in machine.blocks]
    found += [_Found(disk, words, words) for disk, words in machine.added]
    if wishes.requested:
        chosen = _asked_for(machine, found, wishes.requested)
        rest = [disk._replace(skipped=NOT_CHOSEN) for disk in _rest(found, chosen)]
        rest = [disk._replace(level="debug" if disk.level == "debug" else "info") for disk in rest]
        outside = [LeftOut(o.name, o.reason, "info") for o in machine.outside]
    else:
        found = [_as_wished(disk, wishes) for disk in found]
        chosen = [disk for disk in found if not disk.skipped]
        rest = [disk for disk in found if disk.skipped]
        outside = [LeftOut(o.name, o.reason, o.level) for o in machine.outside]
    left_out = (*(disk.left_out for disk in rest), *outside)
    for disk in chosen:
        if disk.refused:
            raise Failure(f"disk {disk.disk.name!r}: {disk.refused}")
    if not chosen:
        raise UsageError(
            "nothing to back up: the machine has no writable disk with a medium"
            + "".join(f"; {disk.device}: {disk.reason}" for disk in left_out)
        )
    _check_names_differ(chosen)
    return DiskChoice(tuple(dict.fromkeys(disk.disk for disk in chosen)), left_out)


def _as_wished(disk: _Found, wishes: DiskChoiceOptions) -> _Found:
    if not disk.skipped and disk.disk.name in wishes.excluded:
        return disk._replace(skipped=wishes.excluded[disk.disk.name], level="info")
    is_known = wishes.configured is None or disk.disk.name in wishes.configured
    if not disk.skipped and not is_known:
        return disk._replace(skipped=NOT_CONFIGURED, level="warn")
    if disk.disk.size_bytes and disk.disk.name in wishes.read_only:
        return disk._replace(skipped="")
    return disk


def _asked_for(machine: Machine, found: list[_Found], words: Sequence[str]) -> list[_Found]:
    found = found + [_found_node(node, machine) for node in machine.nodes]
    chosen = []
    for word in dict.fromkeys(words):
        name, device = "", word
        disk = _named(word, found)
        if disk is None and "=" in word:
            name, _, device = word.partition("=")
            disk = _named(device, found)
        if disk is None or (device != word and not name):
            _refuse_word(device, machine, found)
        elif disk.part_of:
            raise UsageError(f"node {disk.disk.name!r}: {disk.part_of}")
        elif not disk.disk.size_bytes:
            raise Failure(f"disk {disk.disk.name!r}: {disk.skipped}")
        else:
            chosen.append(disk._replace(disk=disk.disk._replace(name=name or disk.disk.name)))
    return chosen


def _named(word: str, found: Sequence[_Found]) -> _Found | None:
    """Find a disk by name, QEMU's own names first: an archive's name may be another disk's id.

    Raises UsageError.
    """
    for words_of in (_qemu_names, _aliases):
        disks = [disk for disk in found if word in words_of(disk)]
        # A device's node is among the nodes, too.
        disks = [disk for disk in disks if not disk.is_node] or disks
        if len({disk.disk.device for disk in disks}) > 1:
            ids = ", ".join(sorted(min(disk.qemu_names, key=len) for disk in disks))
            raise UsageError(f"{word!r} may be several disks: name one of {ids}")
        if disks:
            return disks[0]
    return None


def _qemu_names(disk: _Found) -> frozenset[str]:
    return disk.qemu_names


def _aliases(disk: _Found) -> frozenset[str]:
    return disk.aliases


def _refuse_word(word: str, machine: Machine, found: Sequence[_Found]) -> NoReturn:
    """Raise Failure for storage that no backup can take, UsageError for an unknown name."""
    for outside in machine.outside:
        if word in outside.aliases:
            raise Failure(f"disk {outside.name!r}: {outside.reason}")
    disks = [disk for disk in found if not disk.is_node] or [d for d in found if not d.part_of]
    known = ", ".join(sorted({disk.disk.name for disk in disks}))
    raise UsageError(f"the machine has no disk {word!r}" + (f", but {known}" if known else ""))


def _rest(found: Sequence[_Found], chosen: Sequence[_Found]) -> list[_Found]:
    """Return the disks not chosen; asking for a disk's node chooses the disk."""
    taken = {disk.disk.device for disk in chosen}
    return [disk for disk in found if disk.disk.device not in taken]


def _check_names_differ(chosen: Sequence[_Found]) -> None:
    """Refuse two devices with one name. Raises UsageError."""
    by_name: dict[str, dict[MachineDisk, str]] = {}
    for found in chosen:
        word = min(found.qemu_names, key=lambda w: (w.startswith(("/", "#")), len(w)), default="")
        by_name.setdefault(found.disk.name, {})[found.disk] = word
    for name, devices in by_name.items():
        if len(devices) > 1:
            words = " ".join(f"--disk NAME{n}={word}" for n, word in enumerate(devices.values(), 1))
            raise UsageError(
                f"two devices have the name {name!r}: give each a name of its own: {words}"
            )


def _found_block(block: Answer, machine: Machine) -> _Found:
    inserted = block.get("inserted") or {}
    device, node = block.get("device", ""), inserted.get("node-name", "")
    qdev = block.get("qdev", "")
    name, words = disk_names(block)
    size = (inserted.get("image") or {}).get("virtual-size", 0)
    chain = machine.graph.below_filters(node)
    # The name where there is one: QEMU's commands know it as well as the node's.
    source = chain[-1] if len(chain) > 1 else device or node
    read = machine.graph.node(chain[-1]) or inserted
    disk = MachineDisk(name, source, size, _is_thin(read, machine.graph))
    skipped = ""
    level: Level = "warn"
    if not inserted:
        skipped, level = "no medium is in it", "debug"
    elif not size:
        skipped = "it is empty, or QEMU does not know its size"
    elif inserted.get("ro"):
        skipped = "it is read-only (--disk takes it when it is named)"
        level = "info" if block.get("removable") else "warn"
        if qdev == _FLASH_CODE:
            skipped, level = "it is firmware's code, which is read-only", "debug"
    refused = _job_on(inserted, {device, node}, machine.jobs) or _job_among(chain, machine)
    # Its name in the archive is ours; as far as it is none of QEMU's own as well.
    match = _DEVICE.fullmatch(qdev)
    own = frozenset({device, node, qdev, match[1] if match else ""} - {""})
    return _Found(disk, own, words, skipped, level, refused)


def _found_node(node: Answer, machine: Machine) -> _Found:
    """Return a node without a guest device: of a qemu-storage-daemon, or asked for by its name."""
    graph, name = machine.graph, node.get("node-name", "")
    size = (node.get("image") or {}).get("virtual-size", 0)
    skipped = "" if size else "it is empty, or QEMU does not know its size"
    chain = graph.below_filters(name)
    refused = _job_on(node, {name}, machine.jobs) or _job_among(chain, machine)
    owner, part = graph.owner(name), ""
    if owner is not None and graph.driver(owner.name) in JOB_FILTERS:
        refused = refused or f"a block job is running on it (its filter is {owner.name!r})"
    elif owner is not None:
        kind = "the backing file" if owner.role == "backing" else "part"
        part = f"it is {kind} of {owner.name!r}, not a disk: name {graph.top(name)!r}"
    words = frozenset({name} - {""})
    read = graph.node(chain[-1]) or node
    disk = MachineDisk(name, chain[-1], size, _is_thin(read, graph))
    return _Found(disk, words, words, skipped, "warn", refused, is_node=True, part_of=part)


def _is_thin(node: Answer, graph: Graph) -> bool:
    """Tell whether unallocated clusters of this node are certain to be zero.

    So it is in a qcow2 image without a backing file. A raw file tells its holes as
    zeroes that are allocated; other formats are not worth a doubt.
    """
    image = node.get("image") or {}
    backed = (
        node.get("backing_file") or node.get("backing_file_depth") or image.get("backing-image")
    )
    backed = backed or image.get("backing-filename") or graph.has_backing(node.get("node-name", ""))
    return node.get("drv") == "qcow2" and not backed


def _drive_name(device_id: str) -> str:
    """Return Proxmox VE's name for the drive, so that its restore knows where it belongs."""
    return device_id if device_id.startswith("drive-") else f"drive-{device_id}"


def _job_on(node: Answer, names: set[str], jobs: Sequence[Answer]) -> str:
    """Return why a block job prevents the backup; empty: none is known. QEMU itself checks again."""
    running = list(_jobs_named(names, jobs))
    if running:
        return _job_text(running[0])
    if node.get("drv") in JOB_FILTERS:
        known = ", ".join(repr(job.get("device", "")) for job in jobs) or "none is listed"
        return f"a block job is running on it ({known}); wait for its end, or cancel it"
    return ""


def _job_among(chain: Sequence[str], machine: Machine) -> str:
    """Return the same for all nodes from a disk down to the one that is read."""
    for node in chain:
        for parent in machine.graph.jobs(node):
            jobs = [job for job in machine.jobs if job.get("device") == parent.name]
            job = jobs[0] if jobs else {"device": parent.name}
            if parent.role == "target":
                return (
                    f"the block job {parent.name!r} ({job.get('type', 'of some kind')}) is "
                    "writing to it; wait for its end, or cancel it"
                )
            return _job_text(job)
        if machine.graph.driver(node) in JOB_FILTERS:
            return _job_on({"drv": machine.graph.driver(node)}, set(), machine.jobs)
    return ""


def _job_text(job: Answer) -> str:
    return (
        f"a block job ({job.get('type', 'of some kind')} {job.get('device', '')!r}) is running "
        "on it; wait for its end, or cancel it"
    )


def _jobs_named(names: set[str], jobs: Sequence[Answer]) -> Iterator[Answer]:
    """A job that was started without an id has the name of its disk."""
    return (job for job in jobs if job.get("device") in names - {""})


#: As Proxmox VE's vzdump calls the state of a TPM in an archive.
TPM_NAME = "drive-tpmstate0-backup"

_ELSEWHERE = "another process has its data ({}), and QEMU cannot read it: back it up there"
_PASSED = "a device of the host is passed through ({}): what is stored on it is not in the archive"
_PERSISTENT = "it is persistent memory ({}), no disk: back its file up when the machine is off"
_TPM = (
    "the state of the TPM {!r}: {}; a guest that seals its keys with it (BitLocker, LUKS) may ask "
    "for its recovery key when it is restored without"
)
_CHIP = "the TPM is a chip of this host, whose state cannot be copied"
# QEMU's types of devices. What QEMU 7.2 to 11.1 have of them is in all three.
_KINDS: Sequence[tuple[re.Pattern[str], Level, str]] = (
    (re.compile(r"vhost-user-(?:blk|scsi|device)|vhost-scsi|vhost-vdpa"), "warn", _ELSEWHERE),
    (re.compile(r"nvdimm|virtio-pmem|cxl-type3"), "warn", _PERSISTENT),
    (re.compile(r"vfio-|usb-host"), "info", _PASSED),
)
_CHILD = re.compile(r"child<(.+)>")


class OutsideStorage(NamedTuple):
    """Storage outside of QEMU's block layer.

    `aliases`: names by which a user may ask for it; `level`: the log's.
    """

    name: str
    aliases: frozenset[str]
    reason: str
    level: Level


def storage_outside(devices: Mapping[str, Sequence[Answer]]) -> list[OutsideStorage]:
    """Find such storage in the answers to qom-list, by path (/machine/peripheral and -anon)."""
    found = []
    for path, entries in devices.items():
        for entry in entries:
            name, child = str(entry.get("name", "")), _CHILD.fullmatch(str(entry.get("type", "")))
            for pattern, level, reason in _KINDS if child else ():
                if child and pattern.match(child[1]):
                    named = f"drive-{name.removeprefix('drive-')}"
                    if path.endswith("-anon"):
                        named = f"{path}/{name}"
                    words = frozenset({name, named, f"{path}/{name}"})
                    found.append(OutsideStorage(named, words, reason.format(child[1]), level))
                    break
    return found


def tpm_aliases(tpm: Answer) -> frozenset[str]:
    """Return the names of a TPM's state, from an entry of query-tpm."""
    return frozenset({str(tpm.get("id", "")), TPM_NAME, "tpmstate0"} - {""})


def is_emulated(tpm: Answer) -> bool:
    """Tell whether a TPM is emulated by swtpm, which keeps its state in files."""
    return (tpm.get("options") or {}).get("type") == "emulator"


def tpm_outside(tpm: Answer, why: str) -> OutsideStorage:
    """Describe a TPM whose state cannot be read, and `why`."""
    name = str(tpm.get("id", ""))
    reason = _TPM.format(name, why) if is_emulated(tpm) else _CHIP
    return OutsideStorage(TPM_NAME, tpm_aliases(tpm), reason, "warn")
