# SPDX-License-Identifier: Apache-2.0
"""QEMU's nodes of a live restore: their names, QEMU's command line, and what a running QEMU has. Pure.

A disk's own node is called as its device in the archive, so that a user's command can name it:
an overlay in qcow2 for what the machine writes, above the archive's NBD export.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from vmapipe.access.live.moves import Move
from vmapipe.control.qemu.graph import JOB_FILTERS, Graph
from vmapipe.control.qemu.qemu_process import is_qemu_name
from vmapipe.control.qmp.connection import Command
from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.text import name_text
from vmapipe.vma.header import Device

#: What our jobs and nodes begin with. Not `vmapipe-`: `vmapipe cleanup` ends what is called so.
PREFIX = "live-restore-"
# A request that waits longer fails, and the machine stands still. A Linux guest gives up a request
# to a SCSI or SATA disk after 30 s; a server is started again within a second.
RECONNECT_S = 20
# What QEMU takes as the name of a node.
_NODE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,30}")
_SECTOR_BYTES = 512
_COMMA = "\0"


class LiveDisk(NamedTuple):
    """A disk that is restored while the machine runs.

    `node`: QEMU's node that the machine's device stands on; `below`: as of `Move`; `overlay`: the
    file that we have made for it, empty: it is the user's. `path`: the target, `image_format` its
    format, `limit_bytes`: it is larger, and only so much of it is used; 0: it is not.
    """

    dev_id: int
    name: str
    size_bytes: int
    node: str
    below: tuple[str, ...]
    overlay: str
    path: str
    image_format: str
    is_block: bool
    limit_bytes: int = 0

    @property
    def job(self) -> str:
        return f"{PREFIX}{self.dev_id}"

    @property
    def target(self) -> str:
        return f"{self.job}-target"

    @property
    def move(self) -> Move:
        adds = tuple(Command("blockdev-add", node) for node in self.target_nodes(self.target))
        return Move(self.name, self.job, self.node, self.target, self.below, adds, self.path)

    def target_nodes(self, top: str) -> list[dict[str, Any]]:
        """Return the target's nodes, in the order of their making; the last one is called `top`."""
        driver = "host_device" if self.is_block else "file"
        file = f"{self.job}-file"
        # Without discard zeroes would be allocated.
        nodes = [{"driver": driver, "node-name": file, "filename": self.path, "discard": "unmap"}]
        image: dict[str, Any] = {"driver": self.image_format, "node-name": top, "file": file}
        nodes.append({**image, "discard": "unmap"})
        if self.limit_bytes and self.image_format == "raw":
            nodes[-1]["size"] = str(self.limit_bytes)
        elif self.limit_bytes:
            inner = f"{self.job}-image"
            nodes[-1]["node-name"] = inner
            nodes.append({"driver": "raw", "node-name": top, "file": inner, "discard": "unmap"})
            nodes[-1]["size"] = str(self.limit_bytes)
        return [_typed(node) for node in nodes]

    def overlay_nodes(self, socket: str) -> list[dict[str, Any]]:
        """Return the nodes that the machine begins with."""
        archive, file = own_nodes_below(self.job)
        server = {"type": "unix", "path": socket}
        return [
            {
                "driver": "nbd",
                "node-name": archive,
                "server": server,
                "export": self.name,
                "reconnect-delay": RECONNECT_S,
                "read-only": True,
            },
            {"driver": "file", "node-name": file, "filename": self.overlay, "discard": "unmap"},
            {
                "driver": "qcow2",
                "node-name": self.node,
                "file": file,
                "backing": archive,
                "discard": "unmap",
            },
        ]


def _typed(node: Mapping[str, Any]) -> dict[str, Any]:
    return {key: int(value) if key == "size" else value for key, value in node.items()}


def own_nodes_below(job: str) -> tuple[str, str]:
    """Return the names of the nodes below a disk's own: the archive's export, the overlay's file."""
    return f"{job}-archive", f"{job}-overlay"


def node_names(devices: Sequence[Device]) -> dict[int, str]:
    """Return the name of each disk's node by dev_id: the device's own where QEMU takes it."""
    names: dict[int, str] = {}
    for device in devices:
        fits = _NODE_NAME.fullmatch(device.name) and not device.name.startswith(PREFIX)
        names[device.dev_id] = device.name if fits else ""
    taken = set(names.values())
    for dev_id in [dev_id for dev_id, name in names.items() if not name]:
        name = f"disk{dev_id}"
        while name in taken:
            name += "x"
        taken.add(name)
        names[dev_id] = name
    return names


def whole_sectors(size_bytes: int) -> int:
    """Return the size that QEMU gives a disk."""
    return -(-size_bytes // _SECTOR_BYTES) * _SECTOR_BYTES


def export_uri(socket: str, export: str) -> str:
    return f"nbd+unix:///{quote(export)}?socket={quote(socket)}"


# --- QEMU's command line ---


def machine_command(
    words: Sequence[str], disks: Sequence[LiveDisk], moved: Iterable[str], socket: str, qmp: str
) -> list[str]:
    """Return the user's command with our nodes and monitor in it. Raises UsageError.

    They come before all other options; each device that stands on one of our nodes is told to
    stop the machine where a request fails.
    """
    at = next((i for i, word in enumerate(words) if is_qemu_name(os.path.basename(word))), None)
    if at is None:
        raise UsageError(
            f"{words[0]!r} is not a QEMU: behind -- say qemu-system-x86_64 and its options"
        )
    for word in words[at + 1 :]:
        if word.lstrip("-") in ("daemonize", "incoming", "loadvm"):
            raise UsageError(
                f"leave {word} out: QEMU is started in the background, and boots from its disks"
            )
    arrived = set(moved)
    ours = ["-qmp", f"unix:{qmp.replace(',', ',,')},server=on,wait=off"]
    for disk in disks:
        nodes = disk.target_nodes(disk.node) if disk.job in arrived else disk.overlay_nodes(socket)
        for node in nodes:
            ours += ["-blockdev", json.dumps(node)]
    names = {disk.node for disk in disks}
    return [*words[: at + 1], *ours, *with_policies(words[at + 1 :], names)]


def with_policies(words: Sequence[str], nodes: Iterable[str]) -> list[str]:
    """Return options in which each device on one of `nodes` stops the machine where it fails.

    Raises UsageError where a device is told to do something else.
    """
    names = set(nodes)
    found = list(words)
    for index, word in enumerate(words[:-1]):
        if word in ("-device", "--device"):
            found[index + 1] = _with_policy(words[index + 1], names)
    return found


def _with_policy(device: str, nodes: set[str]) -> str:
    is_json = device.lstrip().startswith("{")
    if is_json:
        try:
            members = dict(json.loads(device))
        except ValueError:
            return device  # QEMU says what is wrong with it
    else:
        pairs = [item.partition("=") for item in _items(device)]
        members = {key: value for key, _, value in pairs}
    if members.get("drive") not in nodes:
        return device
    added = {}
    for key in ("rerror", "werror"):
        policy = members.get(key)
        if policy not in (None, "stop"):
            raise UsageError(
                f"-device {device}: say {key}=stop, or leave it out: with {policy!r} the guest "
                "would see an I/O error when the archive cannot be read for a moment"
            )
        if policy is None:
            added[key] = "stop"
    if is_json:
        return json.dumps({**members, **added})
    return device + "".join(f",{key}={value}" for key, value in added.items())


def _items(text: str) -> list[str]:
    """Split QEMU's option at its commas; two are one that belongs to a value."""
    return [item.replace(_COMMA, ",") for item in text.replace(",,", _COMMA).split(",")]


# --- A running QEMU ---


class OverlaySource(NamedTuple):
    """A disk of a running machine that stands on an archive's export.

    `node`: the machine's own; `below`: as of `Move`; `export` and `socket`: the archive's server.
    """

    node: str
    below: tuple[str, ...]
    export: str
    socket: str


def find_sources(graph: Graph) -> list[OverlaySource]:
    """Find the disks that stand on overlays above NBD exports."""
    found = []
    for node in graph.nodes:
        place = _export(str(node.get("file", "")))
        name = str(node.get("node-name", ""))
        if node.get("drv") != "nbd" or place is None:
            continue
        top = _top_overlay(name, graph)
        if top:
            found.append(OverlaySource(top, tuple(graph.tree(top)), *place))
    return found


def _top_overlay(node: str, graph: Graph) -> str:
    """Return the last of the overlays above an export; empty: there is none.

    A filter above it (a limit of the guest's) is none: it stays where it is.
    """
    base = [user.name for user in graph.users(node) if user.role == "file"]
    if base and graph.driver(base[0]) == "raw":
        node = base[0]
    top = ""
    while True:
        above = [one for one in graph.overlays(node) if graph.driver(one) not in JOB_FILTERS]
        if not above:
            return top
        node = top = above[0]


def _export(file: str) -> tuple[str, str] | None:
    """Return the export and the socket in QEMU's words for an NBD node; None: it is elsewhere."""
    kind, _, rest = file.partition(":///")
    name, found, socket = rest.rpartition("?socket=")
    if kind != "nbd+unix" or not found:
        return None
    return unquote(name), unquote(socket)


def match_sources(
    sources: Sequence[OverlaySource], graph: Graph, devices: Sequence[Device]
) -> Iterator[tuple[Device, OverlaySource]]:
    """Give each device its disk of the running machine. Raises UsageError."""
    there = ", ".join(name_text(source.export) for source in sources) or "none"
    for device in devices:
        found = [source for source in sources if source.export == device.name]
        if len(found) != 1:
            number = "no disk" if not found else f"{len(found)} disks"
            raise UsageError(
                f"the machine has {number} on an overlay above an export {name_text(device.name)}; "
                f"exports below its disks: {there}; --device chooses"
            )
        there_bytes = graph.size_bytes(found[0].node)
        if there_bytes != whole_sectors(device.size_bytes):
            raise UsageError(
                f"the machine's disk above the export {name_text(device.name)} has {there_bytes} "
                f"bytes, and the archive's device {device.size_bytes}: it is another disk"
            )
        yield device, found[0]
