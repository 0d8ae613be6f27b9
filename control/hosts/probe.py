# SPDX-License-Identifier: Apache-2.0
"""The machines of this host, found by the rules of fleet.toml: what `vmapipe fleet probe` answers.

Nothing is changed and no monitor is talked to. A rule that cannot be followed is told, and what it would
have found counts as unknown, not as vanished.
"""

from __future__ import annotations

import glob
import os
import stat
import xml.etree.ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vmapipe.control.qmp.addresses import Address, is_listening
from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.runtime.text import name_text, one_line

_MOST_MACHINES = 20_000
_XML_BYTES = 4 << 20

Found = dict[str, Any]


def answer(rules: object) -> dict[str, Any]:
    """Return `machines` and `notices` of these rules. Raises UsageError for what is not a list of rules."""
    if not isinstance(rules, list) or not all(isinstance(rule, str) for rule in rules):
        raise UsageError("a probe has to be a list of rules: proxmox, libvirt, qmp:…, disks:…")
    machines, notices = list[Found](), list[str]()
    for rule in rules:
        try:
            machines += _follow(rule)
        except (Failure, OSError) as error:
            notices.append(one_line(f"{rule}: {error}", 1000))
    return {"machines": machines[:_MOST_MACHINES], "notices": notices, "rules": list(rules)}


def _follow(rule: str) -> Iterator[Found]:
    kind, _, pattern = rule.partition(":")
    if kind in ("qmp", "disks") and pattern.startswith("/"):
        paths = sorted(glob.glob(pattern))
        yield from (_sockets if kind == "qmp" else _disks)(paths)
        return
    ways: Mapping[str, Callable[[], Iterator[Found]]] = {"libvirt": _domains, "proxmox": _guests}
    if rule not in ways:
        raise UsageError(f"{name_text(rule)} is not a way to find machines")
    yield from ways[rule]()


def _machine(name: str, identity: str, kind: str, state: str, **more: Any) -> Found:
    return {
        "name": name,
        "identity": identity,
        "kind": kind,
        "state": state,
        "tags": [],
        "storages": [],
        "size_bytes": 0,
        "source": {},
        **more,
    }


def _stem(path: str) -> str:
    return os.path.basename(path).partition(".")[0] or os.path.basename(path)


def _sockets(paths: Sequence[str]) -> Iterator[Found]:
    images = _images_of_monitors() if paths else {}
    for path in paths:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            continue
        state = "running" if is_listening(Address(path)) else "off"
        storages = sorted({storage_of(image) for image in images.get(path, ())})
        yield _machine(
            _stem(path), f"qmp:{path}", "qmp", state, storages=storages, source={"socket": path}
        )


def _images_of_monitors() -> dict[str, set[str]]:
    """Return the images that each QEMU has open, by the path of its monitor."""
    from vmapipe.control.hosts.doctor.this_host import machines_here

    found = dict[str, set[str]]()
    for machine in machines_here():
        option, _, path = machine.options.partition(" ")
        if option == "--qmp":
            found[path] = set(_open_images(machine.pid))
    return found


def _open_images(pid: int) -> Iterator[str]:
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        try:
            status, path = os.stat(f"{folder}/{name}"), os.readlink(f"{folder}/{name}")
        except OSError:
            continue
        is_disk = stat.S_ISBLK(status.st_mode) or (
            stat.S_ISREG(status.st_mode) and status.st_size >= 1 << 20 and status.st_nlink
        )
        if is_disk and not path.startswith(("/dev/shm/", "/memfd:")):
            yield path


def storage_of(path: str) -> str:
    """Return the storage that an image lies on: a volume group, a device, or a mount point."""
    if path.startswith("/dev/mapper/"):
        return (
            path.removeprefix("/dev/mapper/")
            .replace("--", "\0")
            .partition("-")[0]
            .replace("\0", "-")
        )
    if path.startswith("/dev/"):
        parts = path.split("/")
        return parts[2] if len(parts) > 3 else path
    place = os.path.realpath(path)
    while not os.path.ismount(place):
        place = os.path.dirname(place)
    return place


def _disks(paths: Sequence[str]) -> Iterator[Found]:
    for path in paths:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode):
            yield _machine(
                _stem(path),
                f"disk:{path}",
                "disks",
                "off",
                storages=[storage_of(path)],
                size_bytes=status.st_size,
                source={"disk": path},
            )


def _domains() -> Iterator[Found]:
    from vmapipe.control.hosts.libvirt.connect import Host

    host = Host(read_only=True)
    try:
        for domain in host.call(host.connection.listAllDomains):
            uuid, name = domain.UUIDString(), domain.name()
            state = "running" if host.call(domain.isActive) else "off"
            storages, disks = _domain_disks(str(host.call(domain.XMLDesc)))
            yield _machine(
                name,
                f"libvirt:{uuid}",
                "libvirt",
                state,
                storages=storages,
                source={"domain": uuid, "disks": disks},
            )
    finally:
        host.close()


def _domain_disks(text: str) -> tuple[list[str], list[str]]:
    """Return the storages and the disks of a domain's XML."""
    storages, disks = set[str](), list[str]()
    try:
        # libvirt's own output: it has no document type, and is not a stranger's.
        tree = xml.etree.ElementTree.fromstring(text[:_XML_BYTES])
    except xml.etree.ElementTree.ParseError:
        return [], []
    for disk in tree.iterfind("./devices/disk"):
        source, target = disk.find("source"), disk.find("target")
        if disk.get("device", "disk") != "disk" or source is None or target is None:
            continue
        disks.append(target.get("dev", ""))
        if pool := source.get("pool"):
            storages.add(pool)
        elif path := source.get("file") or source.get("dev"):
            storages.add(storage_of(path))
        elif name := source.get("name"):
            storages.add(name.partition("/")[0])
    return sorted(storages), disks


def _guests() -> Iterator[Found]:
    from vmapipe.control.hosts.pve.node import PveNode, root_of

    node = PveNode(root_of(None))
    where = node.cluster() or node.name
    for vmid, guest in sorted(node.inventory().guests.items()):
        if guest.kind != "qemu" or guest.node != node.name or guest.is_template:
            continue
        title, storages = "", set[str]()
        try:
            config = node.config(vmid)
            title = config.name
            disks = [disk for disk in config.disks if disk.is_backed_up]
            storages = {d.volume.partition(":")[0] for d in disks if ":" in d.volume}
            state = "running" if node.is_running(vmid) else "off"
        except Failure as failure:
            state = one_line(str(failure), 200)
        yield _machine(
            # As vzdump and qmrestore call its archives.
            f"vzdump-qemu-{vmid}",
            f"pve:{where}:{vmid}",
            "proxmox",
            state,
            title=title,
            tags=sorted(guest.tags),
            storages=sorted(storages),
            source={"vmid": vmid},
        )
