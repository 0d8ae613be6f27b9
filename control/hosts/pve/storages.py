# SPDX-License-Identifier: Apache-2.0
"""Where the volumes of Proxmox VE's storages are: /etc/pve/storage.cfg, as paths. Pure.

Paths as PVE::Storage's plugins make them (pve-storage). A path is that of the host itself; where the
host's files lie below another folder, who opens it adds that folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.runtime.text import file_lines, name_text

# What is mounted by Proxmox VE itself, at /mnt/pve/ID where nothing else is said.
_MOUNTED = frozenset({"nfs", "cifs", "cephfs", "glusterfs"})
_FOLDERS = frozenset({"dir", "btrfs", *_MOUNTED})
_FORMATS = {"raw": "raw", "qcow2": "qcow2", "vmdk": "vmdk"}
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_HEAD = re.compile(r"([a-z][a-z0-9]*):\s*(\S+)\s*")
_OPTION = re.compile(r"\s+([a-z][a-z0-9_-]*)(?:\s+(.*?))?\s*")
_ISCSI = re.compile(r"\d+\.\d+\.\d+\.([A-Za-z0-9_.:+-]+)")

_AT_REST = (
    "a machine that does not run cannot be read from it; start the machine (it may stay paused)"
)


class PveStorage(NamedTuple):
    """A section of storage.cfg: `TYPE: ID`, and its options."""

    id: str
    type: str
    options: Mapping[str, str]

    @property
    def contents(self) -> frozenset[str]:
        return frozenset(filter(None, re.split(r"[,\s]+", self.options.get("content", ""))))

    @property
    def path(self) -> str:
        """The folder of a storage of files; empty: it has none."""
        if self.type not in _FOLDERS:
            return ""
        default = f"/mnt/pve/{self.id}" if self.type in _MOUNTED else ""
        return self.options.get("path", default).rstrip("/")

    @property
    def must_be_mounted(self) -> str:
        """The mount point without which its folder is another file system's; empty: none is known."""
        if self.type in _MOUNTED:
            return self.path
        said = self.options.get("is_mountpoint", "no")
        if said.startswith("/"):
            return said
        return self.path if said in ("1", "yes", "on", "true") else ""

    def is_for(self, node: str) -> bool:
        """Tell whether this node has it, and it is not disabled."""
        nodes = set(filter(None, re.split(r"[,\s]+", self.options.get("nodes", ""))))
        return "disable" not in self.options and (not nodes or node in nodes)

    def folder_of(self, content: str, default: str) -> str:
        """Return the folder for a kind of content (`content-dirs backup=…,images=…`)."""
        words = self.options.get("content-dirs", "").split(",")
        dirs = {key: value for key, _, value in (word.partition("=") for word in words)}
        return f"{self.path}/{dirs.get(content, default).strip('/')}"


# Proxmox VE has it without an entry, too.
_LOCAL = PveStorage("local", "dir", {"path": "/var/lib/vz", "content": "backup,iso,vztmpl"})


class PveVolume(NamedTuple):
    """A volume of a machine: a file or a block device, and QEMU's name for its format.

    `lv`: VG/LV, if it has to be activated before it is read.
    """

    path: str
    format: str
    lv: str = ""


def parse_storages(text: str) -> dict[str, PveStorage]:
    """Return the storages by their ids. Lines that are none of a storage's are passed over."""
    found = {_LOCAL.id: _LOCAL}
    options: dict[str, str] | None = None
    for line in file_lines(text):
        if match := _HEAD.fullmatch(line):
            options = {}
            found[match[2]] = PveStorage(match[2], match[1], options)
        elif not line.strip():
            options = None
        elif options is not None and (match := _OPTION.fullmatch(line)):
            options[match[1]] = match[2] or ""
    return found


def resolve(volid: str, storages: Mapping[str, PveStorage], node: str) -> PveVolume:
    """Return where a volume is. Raises Failure, with the reason, where that cannot be known or read."""
    if volid.startswith("/"):
        # A disk of the host that was passed through; or an image by its path.
        ending = volid.rpartition(".")[2]
        return PveVolume(
            volid, _FORMATS.get(ending, "raw") if not volid.startswith("/dev/") else "raw"
        )
    storage_id, colon, name = volid.partition(":")
    storage = storages.get(storage_id)
    if not colon or storage is None:
        raise Failure(
            f"volume {name_text(volid)}: no storage {name_text(storage_id)} is configured"
        )
    if not storage.is_for(node):
        raise Failure(f"volume {volid}: storage {storage.id} is disabled, or not on this node")
    if storage.type == "iscsi":
        match = _ISCSI.fullmatch(name)
        if match is None:
            raise Failure(f"volume {name_text(volid)}: not the name of an iSCSI unit")
        return PveVolume(f"/dev/disk/by-id/{match[1]}", "raw")
    parts = name.split("/")
    if not all(_PART.fullmatch(part) for part in parts):
        raise Failure(f"volume {name_text(volid)}: not a valid name of a volume")
    if storage.type in _FOLDERS:
        return _of_folder(storage, volid, parts)
    return _of_device(storage, volid, parts[-1])


def _of_folder(storage: PveStorage, volid: str, parts: list[str]) -> PveVolume:
    """Return a file: `ID/vm-ID-disk-0.qcow2`; a linked clone's begins with its base's `ID/NAME`."""
    if len(parts) not in (2, 4) or not storage.path:
        raise Failure(f"volume {volid}: not the name of a file of storage {storage.id}")
    vmid, name = parts[-2:]
    image_format = _FORMATS.get(name.rpartition(".")[2], "")
    if not image_format:
        raise Failure(f"volume {volid}: not a raw, qcow2 or vmdk file")
    images = storage.folder_of("images", "images")
    if storage.type == "btrfs" and image_format == "raw":
        # A subvolume of its own for each.
        return PveVolume(f"{images}/{vmid}/{name.removesuffix('.raw')}/disk.raw", "raw")
    return PveVolume(f"{images}/{vmid}/{name}", image_format)


def _of_device(storage: PveStorage, volid: str, name: str) -> PveVolume:
    options = storage.options
    match storage.type:
        case "lvm" | "lvmthin":
            group = options.get("vgname", "")
            if not _PART.fullmatch(group):
                raise Failure(f"storage {storage.id}: it has no valid vgname")
            # Since 9.0 a thick volume may hold a qcow2 image, for its snapshots.
            image_format = "qcow2" if storage.type == "lvm" and name.endswith(".qcow2") else "raw"
            return PveVolume(f"/dev/{group}/{name}", image_format, f"{group}/{name}")
        case "zfspool":
            pool = options.get("pool", storage.id)
            if not all(_PART.fullmatch(part) for part in pool.split("/")):
                raise Failure(f"storage {storage.id}: it has no valid pool")
            return PveVolume(f"/dev/zvol/{pool}/{name}", "raw")
        case "rbd":
            pool, space = options.get("pool", "rbd"), options.get("namespace", "")
            if options.get("krbd", "0") not in ("1", "yes", "on", "true"):
                raise Failure(
                    f"volume {volid}: storage {storage.id} is rbd without krbd, which only QEMU opens: "
                    f"{_AT_REST}, or say `pvesm set {storage.id} --krbd 1`"
                )
            return PveVolume("/".join(filter(None, ["/dev/rbd", pool, space, name])), "raw")
    raise Failure(f"volume {volid}: storage {storage.id} is of type {storage.type}: {_AT_REST}")


class Target(NamedTuple):
    """Where archives go: a folder, and the storage whose it is, if any.

    `mount_point`: what has to be mounted, so that they do not fill the host's own disk.
    """

    folder: str
    storage: str = ""
    mount_point: str = ""
    prune: str = ""


def backup_target(word: str, storages: Mapping[str, PveStorage], node: str) -> Target:
    """Return the folder for archives that a user names: a path, or a storage. Raises UsageError."""
    storage = storages.get(word)
    if storage is None:
        return Target(word)
    if storage.type == "pbs":
        raise UsageError(
            f"storage {word} is a Proxmox Backup Server, which takes no archives: name a folder, or a "
            "storage of files with content backup"
        )
    if not storage.path:
        raise UsageError(f"storage {word} is of type {storage.type}: it cannot hold archives")
    if "backup" not in storage.contents:
        raise UsageError(
            f"storage {word} is not for backups: `pvesm set {word} --content "
            f"{','.join(sorted({*storage.contents, 'backup'}))}`, or name another"
        )
    if not storage.is_for(node):
        raise UsageError(f"storage {word} is disabled, or not on this node")
    prune = storage.options.get("prune-backups", "")
    return Target(storage.folder_of("backup", "dump"), word, storage.must_be_mounted, prune)
