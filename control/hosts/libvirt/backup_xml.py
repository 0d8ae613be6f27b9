# SPDX-License-Identifier: Apache-2.0
"""The XML of libvirt's backup jobs and checkpoints: what we ask for, and what a job says of itself. Pure."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import quoteattr

from vmapipe.access.machine.domain_xml import Element, XmlError, parse_xml
from vmapipe.control.hosts.libvirt.domain import disks_of

#: Our scratch folders: the domain's uuid, and the backup's own id.
FOLDER = re.compile(r"vmapipe-scratch-([0-9a-f]{32})-([0-9a-f]{8})")
#: Our sockets, where they are not in the scratch folder.
SOCKET = re.compile(r"vmapipe-[0-9a-f]{8}\.sock")
_CHECKPOINT = re.compile(r"vmapipe-([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})")


class BackupDisk(NamedTuple):
    """A disk of a job: its target, the scratch file, and the checkpoint since which it is asked for."""

    target: str
    scratch: str
    since: str = ""


def backup_xml(socket: str, disks: Sequence[BackupDisk], left_out: Sequence[str]) -> str:
    """Return the job's description. `left_out`: the domain's other disks, by target.

    The export of a disk with a `since` tells what has changed as the bitmap of its target's name.
    """
    lines = [
        f"<domainbackup mode='pull'><server transport='unix' socket={quoteattr(socket)}/><disks>"
    ]
    for disk in disks:
        target = quoteattr(disk.target)
        mode = " backupmode='full'"
        if disk.since:
            since = quoteattr(disk.since)
            mode = f" backupmode='incremental' incremental={since} exportbitmap={target}"
        lines.append(
            f"<disk name={target} backup='yes' type='file' exportname={target}{mode}>"
            f"<driver type='qcow2'/><scratch file={quoteattr(disk.scratch)}/></disk>"
        )
    lines += [f"<disk name={quoteattr(target)} backup='no'/>" for target in left_out]
    return "".join([*lines, "</disks></domainbackup>"])


def checkpoint_xml(name: str, targets: Sequence[str], left_out: Sequence[str]) -> str:
    """Return the description of a checkpoint of these disks."""
    disks = [f"<disk name={quoteattr(target)} checkpoint='bitmap'/>" for target in targets]
    disks += [f"<disk name={quoteattr(target)} checkpoint='no'/>" for target in left_out]
    text = "made by vmapipe for the archive with this uuid"
    return (
        f"<domaincheckpoint><name>{name}</name><description>{text}</description>"
        f"<disks>{''.join(disks)}</disks></domaincheckpoint>"
    )


def checkpoint_name(uuid: str) -> str:
    """Return the name of the checkpoint that belongs to the archive with this uuid."""
    return f"vmapipe-{uuid}"


def archive_of(name: str) -> str:
    """Return the uuid of the archive that a checkpoint of ours belongs to; empty: it is another's."""
    match = _CHECKPOINT.fullmatch(name)
    return match[1] if match else ""


def checkpoint_disks(xml: str) -> dict[str, str]:
    """Return the disks whose changes a checkpoint records: the image of each then, by its target.

    A checkpoint's bitmaps have one name on all disks: whether a bitmap is of this disk only the
    image tells, by the domain's description of that time. Empty: it is not in the XML.
    """
    try:
        root = parse_xml(xml.encode("utf-8", "surrogateescape"))
    except XmlError:
        return {}
    images = {disk.target: disk.path for disk in disks_of(root.find("domain"))}
    disks = root.find("disks").all("disk")
    recorded = [disk.get("name") for disk in disks if disk.get("checkpoint") == "bitmap"]
    return {target: images.get(target, "") for target in recorded}


class JobPlaces(NamedTuple):
    """Where a job of ours has its scratch files and its socket, `folder` is one of FOLDER's names."""

    folder: str
    socket: str


def our_job(xml: str) -> JobPlaces | None:
    """Return the places of a job of ours by its XML; None: it is another program's."""
    try:
        root = parse_xml(xml.encode("utf-8", "surrogateescape"))
    except XmlError:
        return None
    socket = root.find("server").get("socket")
    folders = {os.path.dirname(path) for path in _scratches(root)}
    if len(folders) != 1:
        return None
    (folder,) = folders
    return JobPlaces(folder, socket) if FOLDER.fullmatch(os.path.basename(folder)) else None


def _scratches(root: Element) -> list[str]:
    disks = [disk for disk in root.find("disks").all("disk") if disk.get("backup", "yes") == "yes"]
    return [disk.find("scratch").get("file") for disk in disks]
