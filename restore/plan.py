# SPDX-License-Identifier: Apache-2.0
"""What is to be restored to where. Pure: nothing is opened or written here."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from vmapipe.restore.errors import PlanError, RestoreError
from vmapipe.restore.mapping import MapEntry
from vmapipe.runtime.texts import MAX_NAME_CHARS, one_line
from vmapipe.vma.header import Device, Header
from vmapipe.vma.names import safe_file_name

# What QEMU can make, and write to.
IMAGE_FORMATS = ("raw", "qcow2", "qed", "vdi", "vhdx", "vmdk", "vpc")


class Kind(enum.Enum):
    """NEW: a file that must not exist yet. EXISTING: a file or block device that must."""

    NEW = "new"
    EXISTING = "existing"


class TargetSpec(NamedTuple):
    """Where one device goes.

    `write_zeroes`: an existing target may hold old data; else it reads as zero
    already, as a new file always does. `bytes_per_s`: 0, or a limit.
    `image_format`: of a new file, as QEMU calls it.
    """

    path: str
    kind: Kind
    write_zeroes: bool = True
    bytes_per_s: int = 0
    image_format: str = "raw"


class Plan(NamedTuple):
    """Targets by dev_id; a device that has none is skipped.

    `configs_folder`: where the configs are written, or None.
    """

    targets: Mapping[int, TargetSpec] = MappingProxyType({})
    configs_folder: str | None = None


def disk_path(folder: str, device: Device) -> str:
    """`disk-NAME.raw` or `vmstate.bin` in `folder`. Raises HeaderError for an unsafe name."""
    if device.is_vmstate:
        return os.path.join(folder, "vmstate.bin")
    name = safe_file_name(device.name, f"device {device.dev_id}", prefix="disk-", suffix=".raw")
    return os.path.join(folder, name)


def config_paths(header: Header, folder: str) -> list[str]:
    """Where the configs go, in the header's order. Raises HeaderError for an unsafe name."""
    return [
        os.path.join(folder, safe_file_name(config.name, f"config {index}"))
        for index, config in enumerate(header.configs)
    ]


def plan_folder(
    header: Header,
    folder: str,
    chosen: Sequence[tuple[str, str | None]] = (),
    *,
    exists: Callable[[str], bool] = os.path.exists,
    configs: bool = True,
) -> Plan:
    """Restore to new files in `folder`: all devices, or those `chosen`, as (name, target).

    A target that exists is overwritten in place, zeroes included; one that
    does not becomes a new file; None: a new file in the folder. A target may
    end in `,format=FORMAT`: then it has to be a new file. Raises PlanError,
    HeaderError.
    """
    targets = {}
    if not chosen:
        for device in header.devices:
            targets[device.dev_id] = TargetSpec(disk_path(folder, device), Kind.NEW)
    for name, target in chosen:
        device = device_named(header, name)
        if device.dev_id in targets:
            raise PlanError(f"device {name!r} was named twice")
        if target is None:
            targets[device.dev_id] = TargetSpec(disk_path(folder, device), Kind.NEW)
        else:
            path, image_format = split_format(target)
            if image_format != "raw" and device.is_vmstate:
                raise PlanError("vmstate is no disk: it can only be restored as it is")
            is_new = image_format != "raw" or not exists(path)
            targets[device.dev_id] = TargetSpec(
                path, Kind.NEW if is_new else Kind.EXISTING, image_format=image_format
            )
    return Plan(targets, folder if configs else None)


def split_format(target: str) -> tuple[str, str]:
    """`PATH,format=FORMAT` or `PATH` to (path, format). Raises PlanError."""
    path, comma, image_format = target.rpartition(",format=")
    if not comma:
        return target, "raw"
    if image_format not in IMAGE_FORMATS:
        raise PlanError(f"{target}: format {image_format!r} is none of {', '.join(IMAGE_FORMATS)}")
    return path, image_format


def plan_map(header: Header, entries: Mapping[str, MapEntry], folder: str) -> Plan:
    """Restore as the reference tool's map says; vmstate always to a new file in `folder`.

    The configs are not part of the plan: whoever answers with the map reads
    them first. Raises PlanError, in the reference tool's words where it has some.
    """
    unknown = [name for name in entries if name not in {d.name for d in header.devices}]
    if unknown:
        raise unknown_device(header, unknown[0])
    targets = {}
    for device in header.devices:
        entry = entries.get(device.name)
        if entry is None and not device.is_vmstate:
            raise PlanError(f"no device name mapping for {device.name}")
        if device.is_vmstate and (entry is None or not entry.skip):
            targets[device.dev_id] = TargetSpec(disk_path(folder, device), Kind.NEW)
        elif entry is not None and not entry.skip:
            targets[device.dev_id] = TargetSpec(
                entry.path, Kind.EXISTING, entry.write_zeroes, entry.bytes_per_s
            )
    return Plan(targets)


def device_named(header: Header, name: str) -> Device:
    """Raises PlanError where there is none, or more than one."""
    found = [device for device in header.devices if device.name == name]
    if len(found) != 1:
        if found:
            raise PlanError(f"the archive has {len(found)} devices of the name {name!r}")
        raise unknown_device(header, name)
    return found[0]


def unknown_device(header: Header, name: str) -> PlanError:
    names = (
        ", ".join(one_line(device.name, MAX_NAME_CHARS) for device in header.devices)
        or "none at all"
    )
    return PlanError(f"the archive has no device {name!r}; it has {names}")


def check_plan(header: Header, plan: Plan) -> None:
    """Raises RestoreError or PlanError for a plan that cannot be carried out as it is.

    What only the file system knows (sizes, links to one file) is checked when
    the targets are opened.
    """
    known = {device.dev_id: device for device in header.devices}
    for dev_id, spec in plan.targets.items():
        if dev_id not in known:
            raise PlanError(f"the archive has no device {dev_id}")
        if known[dev_id].is_vmstate and spec.kind is Kind.EXISTING:
            raise PlanError(
                f"vmstate can only be restored to a new file, and {spec.path} exists: "
                "its size is not known before its end"
            )
    _check_distinct((known[dev_id].name for dev_id in plan.targets), "devices have the name")
    paths = [spec.path for spec in plan.targets.values() if spec.kind is Kind.NEW]
    if plan.configs_folder is not None:
        _check_distinct((config.name for config in header.configs), "configs have the name")
        paths += config_paths(header, plan.configs_folder)
    _check_distinct(map(_canonical, paths), "things would be written to")


def _canonical(path: str) -> str:
    """Equal for two ways to write the path of one new file."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder or "."), name)


def _check_distinct(names: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise RestoreError(f"two {what} {name!r}: nothing was restored")
        seen.add(name)
