# SPDX-License-Identifier: Apache-2.0
"""The base of a running QEMU's backup: what its records of changes can build on, and the report of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmapipe.archiver.base.check import Base
    from vmapipe.control.qemu.bitmaps import BaseArchive, DiskMethod
    from vmapipe.runtime.event_types import BaseDevice, BaseEvent


def base_archive(base: Base) -> BaseArchive:
    """Return the base as QEMU's side sees it."""
    from vmapipe.control.qemu.bitmaps import BaseArchive

    return BaseArchive(base.uuid, {device.name: device.size_bytes for device in base.devices})


def base_report(told: BaseEvent | None, methods: Mapping[str, DiskMethod]) -> BaseEvent:
    """Return what is reported of the base: what the archiver says of it, and QEMU of each disk."""
    devices: list[BaseDevice] = []
    of_archiver = {device["name"]: device for device in told["devices"]} if told else {}
    for name, method in methods.items():
        device = of_archiver.pop(name, {"name": name, "incremental": False, "reason": ""})
        is_incremental = device["incremental"] and method.is_incremental
        reason = method.reason or device["reason"]
        report: BaseDevice = {"name": name, "incremental": is_incremental, "reason": reason}
        if is_incremental:
            report["changed_bytes"] = method.dirty_bytes
        devices.append(report)
    return {
        "event": "base",
        "archive": told["archive"] if told else "",
        "uuid": told["uuid"] if told else "",
        "devices": [*devices, *of_archiver.values()],
    }
