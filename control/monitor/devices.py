# SPDX-License-Identifier: Apache-2.0
"""Which devices a backup takes, checked before it begins, with the RFC's errors. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vmapipe.control.qemu.disks import Answer, names_of
from vmapipe.control.qmp.server import QmpError

_SEPARATORS = re.compile("[,;:]")


class Device(NamedTuple):
    """`words`: what it may be asked for by; `unasked`: it is taken when nobody names any."""

    words: frozenset[str]
    has_medium: bool = True
    read_only: bool = False
    unasked: bool = True


def split_devlist(text: str) -> list[str]:
    """The names, separated by `,`, `;` or `:`; each once."""
    return list(dict.fromkeys(word for word in _SEPARATORS.split(text) if word))


def check_devices(devices: Sequence[Device], devlist: str | None) -> list[str]:
    """The names to back up, none: all that can be. Raises QmpError."""
    if devlist is None:
        if not any(d.unasked and d.has_medium and not d.read_only for d in devices):
            raise QmpError("empty device list")
        return []
    names = split_devlist(devlist)
    if not names:
        raise QmpError("empty device list")
    for name in names:
        found = next((device for device in devices if name in device.words), None)
        if found is None:
            raise QmpError(f"Device '{name}' not found", "DeviceNotFound")
        if not found.has_medium:
            raise QmpError(f"Device '{name}' has no medium")
        if found.read_only:
            raise QmpError(f"Device '{name}' is read only")
    return names


def machine_devices(blocks: Sequence[Answer], nodes: Sequence[Answer]) -> list[Device]:
    """From a QEMU's answers to query-block and query-named-block-nodes."""
    devices = []
    for block in blocks:
        inserted = block.get("inserted")
        read_only = bool(inserted and inserted.get("ro"))
        devices.append(Device(names_of(block).words, bool(inserted), read_only))
    for node in nodes:
        words = frozenset({str(node.get("node-name", ""))} - {""})
        devices.append(Device(words, read_only=bool(node.get("ro")), unasked=False))
    return devices


def served_blocks(disks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The answer to `query-block`, from the disks that a monitor serves itself."""
    return [
        {
            "device": disk["name"],
            "type": "unknown",
            "locked": False,
            "removable": False,
            "inserted": {
                "file": disk["path"],
                "drv": "raw",
                "ro": False,
                "encrypted": False,
                "image": {
                    "filename": disk["path"],
                    "format": "raw",
                    "virtual-size": disk["size"],
                },
            },
        }
        for disk in disks
    ]
