# SPDX-License-Identifier: Apache-2.0
"""Places for the disks of a new domain: a pool of libvirt's, or a folder."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from typing import Any, NamedTuple, Protocol

from vmapipe.access.machine.domain import Placement
from vmapipe.access.machine.domain_xml import XmlError, made, parse_xml, render_xml
from vmapipe.control.hosts.libvirt.connect import Host, LibvirtFailure
from vmapipe.control.hosts.libvirt.host_facts import QemuUser
from vmapipe.control.hosts.libvirt.undo import Made, MadeJournal, made_of, remove_file
from vmapipe.restore.targets.plan import Kind, Larger, TargetSpec
from vmapipe.runtime.errors import Failure, UsageError, os_error_text

# Pools whose volumes are files, and those whose volumes are block devices of this host.
_FILE_POOLS = ("dir", "fs", "netfs")
_BLOCK_POOLS = ("logical",)
#: Where libvirt itself has firmware's variables, if the disks are in no folder.
_NVRAM = "/var/lib/libvirt/qemu/nvram"
# What XML has no way to write, and what it may read back as spaces (line ends, tabs).
_NOT_IN_XML = re.compile("[\0-\x1f\ud800-\udfff\ufffe\uffff]")
# One that fills up with names of files that exist was filled on purpose.
_MOST_NAMES = 100


class Wanted(NamedTuple):
    """A disk that needs a place. `name`: of its file or volume, without a suffix."""

    name: str
    size_bytes: int
    image_format: str


class Occupied(NamedTuple):
    """What has the wanted name already. `path`; `volume`: in a pool, its name."""

    path: str
    volume: str = ""


class ChosenPlace(NamedTuple):
    """A place for a disk. `target`: for the restore; `old`: what it comes instead of, at the end."""

    placement: Placement
    target: TargetSpec
    old: Occupied | None


class Place(Protocol):
    """Where disks are made. Every method raises Failure."""

    usual_format: str

    def choose(self, wanted: Wanted, journal: MadeJournal, *, overwrite: bool) -> ChosenPlace:
        """Make room for a disk, which is noted in the journal; what exists stays as it is."""

    def folder(self) -> str:
        """Return a folder for files that are no disks (firmware's variables)."""

    def live_folder(self) -> str:
        """Return a folder for what a machine writes before its disks are there. Raises UsageError."""

    def find(self, path: str) -> Occupied | None:
        """Return a disk that is here; None: it is elsewhere, or there is none."""

    def remove_old(self, old: Occupied) -> None:
        """Remove what a new disk has come instead of."""

    def reconnect(self, host: Host) -> None:
        """Ask this connection from now on: the other one is lost."""

    def settle(self) -> None:
        """All is written: let libvirt look."""


class FolderPlace:
    """Files in a folder."""

    usual_format = "qcow2"

    def __init__(self, path: str, user: QemuUser | None) -> None:
        """Raises Failure where libvirt's QEMU cannot enter it."""
        self._path = os.path.abspath(path)
        check_reachable(self._path, user)

    def folder(self) -> str:
        return self._path

    def live_folder(self) -> str:
        return self._path

    def free(self, name: str, *, overwrite: bool) -> tuple[str, Occupied | None]:
        """Return a free path, and what has the wanted name. Without `overwrite` that is a UsageError."""
        path = os.path.join(self._path, name)
        if not os.path.lexists(path):
            return path, None
        if not overwrite:
            raise UsageError(f"{path} exists already: --name another, or --overwrite")
        if not os.path.isfile(path) or os.path.islink(path):
            raise UsageError(f"{path} exists, and is not a file: --name another")
        stem, dot, suffix = name.rpartition(".")
        for number in range(1, _MOST_NAMES):
            other = os.path.join(self._path, f"{stem}-{number}{dot}{suffix}")
            if not os.path.lexists(other):
                return other, Occupied(path)
        raise Failure(f"{self._path} has too many files of the name {name}")

    def choose(self, wanted: Wanted, journal: MadeJournal, *, overwrite: bool) -> ChosenPlace:
        name = f"{wanted.name}.{wanted.image_format}"
        path, old = self.free(name, overwrite=overwrite)
        # It has no name until all are complete: a killed restore leaves none of them.
        target = TargetSpec(path, Kind.NEW, image_format=wanted.image_format)
        return ChosenPlace(Placement("file", path, wanted.image_format), target, old)

    def find(self, path: str) -> Occupied | None:
        is_here = os.path.dirname(path) == self._path
        return Occupied(path) if is_here and os.path.isfile(path) else None

    def remove_old(self, old: Occupied) -> None:
        try:
            os.unlink(old.path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise Failure(f"cannot remove {old.path}: {os_error_text(error)}") from error

    def reconnect(self, host: Host) -> None:
        pass

    def settle(self) -> None:
        pass


class PoolPlace:
    """Volumes in a pool, made by libvirt."""

    def __init__(self, host: Host, name: str, user: QemuUser | None) -> None:
        """Raises Failure: no such pool, not started, or not one of files or block devices."""
        self._host, self.name = host, name
        self._pool = find_pool(host, name)
        if not host.call(self._pool.isActive):
            raise Failure(f"the pool {name} is not started: `virsh pool-start {name}`")
        try:
            root = parse_xml(host.call(self._pool.XMLDesc).encode())
        except XmlError as error:
            raise Failure(
                f"libvirt's answer about the pool {name} cannot be read: {error}"
            ) from error
        kind = root.get("type")
        if kind not in (*_FILE_POOLS, *_BLOCK_POOLS):
            raise UsageError(
                f"the pool {name} is of the type {kind}, which has no volumes that can be written "
                f"here: use one of the types {', '.join((*_FILE_POOLS, *_BLOCK_POOLS))}, or --dir"
            )
        self._is_block = kind in _BLOCK_POOLS
        self.usual_format = "raw" if self._is_block else "qcow2"
        self._folder = root.find("target/path").text.strip()
        if not self._is_block:
            check_reachable(self._folder, user)

    def folder(self) -> str:
        if not self._is_block:
            return self._folder
        if os.path.isdir(_NVRAM) and os.access(_NVRAM, os.W_OK):
            return _NVRAM
        raise UsageError(
            f"the pool {self.name} has no place for files (firmware's variables), nor is {_NVRAM} "
            "writable: use --dir, or a pool that is a folder"
        )

    def live_folder(self) -> str:
        if not self._is_block:
            return self._folder
        raise UsageError(
            f"the pool {self.name} has no place for what a machine writes before its disks are there: "
            "use --dir, or a pool that is a folder, or leave --live out"
        )

    def _free(self, name: str, *, overwrite: bool) -> tuple[str, Occupied | None]:
        self._refresh()
        there = {v.name(): v for v in self._host.call(self._pool.listAllVolumes)}
        if name not in there:
            return name, None
        if not overwrite:
            raise UsageError(
                f"the pool {self.name} has a volume {name} already: --name another, or --overwrite"
            )
        path = self._host.call(there[name].path)
        stem, dot, suffix = name.rpartition(".") if "." in name else (name, "", "")
        for number in range(1, _MOST_NAMES):
            other = f"{stem}-{number}{dot}{suffix}"
            if other not in there:
                return other, Occupied(path, name)
        raise Failure(f"the pool {self.name} has too many volumes of the name {name}")

    def choose(self, wanted: Wanted, journal: MadeJournal, *, overwrite: bool) -> ChosenPlace:
        if self._is_block and wanted.image_format != "raw":
            raise UsageError(f"the pool {self.name} has block devices: use --format raw")
        suffix = "" if self._is_block else f".{wanted.image_format}"
        name, old = self._free(f"{wanted.name}{suffix}", overwrite=overwrite)
        # What qcow2, too, can hold: whole sectors.
        size_bytes = -(-wanted.size_bytes // 512) * 512
        if wanted.image_format == "raw" and not self._is_block:
            size_bytes = wanted.size_bytes
        allocation = size_bytes if self._is_block else 0
        description = made(
            "volume",
            made("name", text=name),
            made("capacity", text=str(size_bytes), unit="bytes"),
            made("allocation", text=str(allocation), unit="bytes"),
        )
        if not self._is_block:
            kind = made("format", type_=wanted.image_format)
            description.children.append(made("target", kind))
        journal.plan(Made("", 0, 0, self.name, name).words)
        try:
            volume = self._host.call(self._pool.createXML, render_xml(description))
        except LibvirtFailure as failure:
            raise Failure(f"the pool {self.name} makes no volume {name}: {failure}") from failure
        try:
            path = self._host.call(volume.path)
            journal.add(_made(path, self.name, name))
        except BaseException:
            with contextlib.suppress(LibvirtFailure):
                self._host.call(volume.delete)
            raise
        kind_of = "block" if self._is_block else "file"
        target = TargetSpec(
            path,
            Kind.MADE,
            # A file that is new reads as zero; a logical volume has what was there before.
            write_zeroes=self._is_block,
            image_format=wanted.image_format,
            overwrite=True,
            larger=Larger.ALWAYS,
        )
        return ChosenPlace(Placement(kind_of, path, wanted.image_format), target, old)  # type: ignore[arg-type]

    def find(self, path: str) -> Occupied | None:
        for volume in self._host.call(self._pool.listAllVolumes):
            if self._host.call(volume.path) == path:
                return Occupied(path, volume.name())
        return None

    def remove_old(self, old: Occupied) -> None:
        remove_volume(self._host, self.name, old.volume)

    def reconnect(self, host: Host) -> None:
        self._host, self._pool = host, find_pool(host, self.name)

    def settle(self) -> None:
        self._refresh()

    def _refresh(self) -> None:
        try:
            self._host.call(self._pool.refresh)
        except LibvirtFailure as failure:
            raise Failure(f"the pool {self.name} cannot be read: {failure}") from failure


def _made(path: str, pool: str, volume: str) -> Made:
    """Raises Failure."""
    try:
        return made_of(path, pool, volume)
    except OSError as error:
        raise Failure(
            f"the volume {volume} of the pool {pool} is not on this host ({path}: "
            f"{os_error_text(error)})"
        ) from error


def find_pool(host: Host, name: str) -> Any:
    """Return a pool. Raises UsageError."""
    try:
        return host.call(host.connection.storagePoolLookupByName, name)
    except LibvirtFailure as failure:
        names = sorted(pool.name() for pool in host.call(host.connection.listAllStoragePools))
        raise UsageError(
            f"libvirt has no pool {name}; it has {', '.join(names) or 'none'}: choose one with "
            "--pool, or a folder with --dir"
        ) from failure


def remove_made(host: Host, one: Made) -> bool:
    """Remove what a restore has made, if it is still that; whether it was. Raises Failure."""
    if not one.pool:
        return remove_file(one)
    if one.inode:
        try:
            status = os.stat(one.path)
        except OSError:
            return False
        if (status.st_dev, status.st_ino) != (one.device, one.inode):
            return False
    return remove_volume(host, one.pool, one.volume)


def remove_volume(host: Host, pool: str, volume: str) -> bool:
    """Remove a volume; False: it is not there. Raises Failure."""
    try:
        found = host.call(host.connection.storagePoolLookupByName, pool)
        host.call(host.call(found.storageVolLookupByName, volume).delete)
    except LibvirtFailure as failure:
        absent = (host.lib.VIR_ERR_NO_STORAGE_VOL, host.lib.VIR_ERR_NO_STORAGE_POOL)
        if failure.code in absent:
            return False
        raise Failure(
            f"cannot remove the volume {volume} of the pool {pool}: {failure}"
        ) from failure
    return True


def check_reachable(folder: str, user: QemuUser | None) -> None:
    """Raises UsageError for a folder that is not there, or that libvirt or its QEMU cannot use."""
    if _NOT_IN_XML.search(folder):
        raise UsageError(
            f"{folder}: libvirt cannot have a path with control characters or bytes that are no UTF-8 "
            "(its XML has none): use another folder"
        )
    if not os.path.isdir(folder):
        raise UsageError(f"{folder} is not a folder: make it first")
    if user is None or user.uid in (0, os.geteuid()) or os.geteuid() != 0:
        return
    done = subprocess.run(
        ["test", "-x", folder],
        user=user.uid,
        group=user.gid,
        extra_groups=(),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        timeout=10,
    )
    if done.returncode:
        raise UsageError(
            f"libvirt's QEMU (user {user.uid}) cannot enter {folder}: use another folder, or let it "
            f"(chmod o+x on each folder of the path, or setfacl -m u:{user.uid}:x)"
        )
