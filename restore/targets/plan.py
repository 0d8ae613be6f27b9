# SPDX-License-Identifier: Apache-2.0
"""Plans: which device is restored to which target. Pure: nothing is opened or written here."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from vmapipe.restore.archive.errors import PlanError, RestoreError
from vmapipe.restore.targets.map_file import IMAGE_FORMATS, MapEntry
from vmapipe.runtime.image_format import format_of_name
from vmapipe.runtime.text import MAX_NAME_CHARS, name_text, one_line
from vmapipe.vma.header import Device, Header
from vmapipe.vma.names import safe_file_name


class Kind(enum.Enum):
    """NEW: a file that must not exist yet. EXISTING: a file or block device that must.

    MADE: as EXISTING; the caller has just made it for this restore, and removes it if that fails.
    """

    NEW = "new"
    EXISTING = "existing"
    MADE = "made"


class Larger(enum.Enum):
    """Which existing targets may be more than 4 MiB larger than their devices."""

    NEVER = "never"
    DEVICES = "block devices"
    ALWAYS = "always"


class TargetSpec(NamedTuple):
    """Target of one device.

    `write_zeroes`: an existing target may hold old data; else it reads as zero
    already, as a new file always does. `bytes_per_s`: 0, or a limit.
    `image_format`: as QEMU calls it; empty: raw, by default. `overwrite`: an
    existing file is overwritten whatever it is.
    """

    path: str
    kind: Kind
    write_zeroes: bool = True
    bytes_per_s: int = 0
    image_format: str = ""
    overwrite: bool = False
    larger: Larger = Larger.DEVICES

    @property
    def is_raw(self) -> bool:
        return self.image_format in ("", "raw")


class TargetDefaults(NamedTuple):
    """Options of all targets that have none of their own.

    `image_format`: of every disk; empty: raw, where that is plain. `overwrite`: what is
    there is overwritten, whatever it is. `larger`: how much larger it may be.
    """

    image_format: str = ""
    overwrite: bool = False
    larger: Larger = Larger.DEVICES


class Plan(NamedTuple):
    """Targets by dev_id; a device that has none is skipped.

    `configs_folder`: where the configs are written, or None. `is_chosen`: the devices were
    chosen one by one, so that those left out may be damaged.
    """

    targets: Mapping[int, TargetSpec] = MappingProxyType({})
    configs_folder: str | None = None
    is_chosen: bool = False


def disk_path(folder: str, device: Device, image_format: str = "") -> str:
    """`disk-NAME.raw` or `vmstate.bin` in `folder`. Raises HeaderError for an unsafe name."""
    if device.is_vmstate:
        return os.path.join(folder, "vmstate.bin")
    suffix = f".{image_format or 'raw'}"
    name = safe_file_name(device.name, f"device {device.dev_id}", prefix="disk-", suffix=suffix)
    return os.path.join(folder, name)


def config_paths(header: Header, folder: str) -> list[str]:
    """Return the configs' paths, in the header's order. Raises HeaderError for an unsafe name.

    A second one of the same name gets the first free of `NAME.2`, `NAME.3`, …
    """
    names = {config.name for config in header.configs}
    taken: set[str] = set()
    paths = []
    for index, config in enumerate(header.configs):
        name = config.name
        number = 1
        while name in taken or (number > 1 and name in names):
            number += 1
            name = f"{config.name}.{number}"
        taken.add(name)
        paths.append(os.path.join(folder, safe_file_name(name, f"config {index}")))
    return paths


def renamed_configs(header: Header) -> list[str]:
    """Return notices about configs that get another name because theirs is taken."""
    return [
        f"the archive has several configs of the name {name_text(config.name)}: one of them is "
        f"written as {name_text(os.path.basename(path))}"
        for config, path in zip(header.configs, config_paths(header, ""), strict=True)
        if os.path.basename(path) != config.name
    ]


def plan_folder(
    header: Header,
    folder: str,
    chosen: Sequence[tuple[str, str | None]] = (),
    *,
    exists: Callable[[str], bool] = os.path.exists,
    configs: bool = True,
    wishes: TargetDefaults = TargetDefaults(),  # noqa: B008  it cannot be changed
) -> Plan:
    """Restore to new files in `folder`: all devices, or those `chosen`, as (name, target).

    A target that exists is overwritten in place, zeroes included; one that
    does not becomes a new file; None: a new file in the folder. A target may
    end in `,format=FORMAT`: then it has to be a new file, unless it is to be overwritten.
    Raises PlanError, HeaderError.
    """
    check_chosen(chosen)
    targets: dict[int, TargetSpec] = {}
    wanted: list[tuple[Device, str | None]] = [
        (device_named(header, name), target) for name, target in chosen
    ]
    if not chosen:
        wanted = [(device, None) for device in header.devices]
    for device, target in wanted:
        if device.dev_id in targets:
            raise PlanError(f"device {device.name!r} was named twice")
        image_format = "" if device.is_vmstate else wishes.image_format
        if target is None:
            path = disk_path(folder, device, image_format)
            targets[device.dev_id] = TargetSpec(path, Kind.NEW, image_format=image_format)
        else:
            targets[device.dev_id] = _target(device, target, image_format, wishes, exists)
    return Plan(targets, folder if configs else None, bool(chosen))


def check_chosen(chosen: Iterable[tuple[str, str | None]]) -> None:
    """Raises PlanError for options without a device or target, before any archive is opened."""
    for name, target in chosen:
        if not name:
            raise PlanError(f"--device ={target or ''} names no device")
        if target is not None and not split_format(target)[0]:
            raise PlanError(f"--device {name}={target} names no target")


def _target(
    device: Device,
    target: str,
    image_format: str,
    wishes: TargetDefaults,
    exists: Callable[[str], bool],
) -> TargetSpec:
    """Raises PlanError."""
    path, said = split_format(target)
    image_format = said or image_format
    spec = TargetSpec(path, Kind.NEW, image_format=image_format)
    if not spec.is_raw and device.is_vmstate:
        raise PlanError("vmstate is not a disk: it can only be restored as it is")
    there = exists(path)
    promised = format_of_name(path)
    if not image_format and promised and not there:
        raise PlanError(
            f"{path} would be a raw disk with the name of another format: say "
            f"{ways_to_say(device.name, path, promised)}"
        )
    if there and (spec.is_raw or wishes.overwrite):
        return spec._replace(kind=Kind.EXISTING, overwrite=wishes.overwrite, larger=wishes.larger)
    return spec


def ways_to_say(name: str, path: str, image_format: str) -> str:
    """Return the options to choose from where it is not clear what is to be written."""
    raw = f"{name}={path},format=raw if raw bytes are meant"
    return (
        f"{name}={path},format={image_format}, or {raw}" if image_format in IMAGE_FORMATS else raw
    )


def split_format(target: str) -> tuple[str, str]:
    """`PATH,format=FORMAT` or `PATH` to (path, format); empty: none is said. Raises PlanError."""
    path, comma, image_format = target.rpartition(",format=")
    if not comma:
        return target, ""
    if image_format not in IMAGE_FORMATS:
        raise PlanError(f"{target}: format {image_format!r} is none of {', '.join(IMAGE_FORMATS)}")
    return path, image_format


def plan_map(
    header: Header,
    entries: Mapping[str, MapEntry],
    folder: str,
    wishes: TargetDefaults = TargetDefaults(larger=Larger.NEVER),  # noqa: B008  it cannot be changed
) -> Plan:
    """Restore as the reference tool's map says; vmstate always to a new file in `folder`.

    A target of a format other than raw is an image that exists, and is written into.

    The configs are not part of the plan: the caller that answers with the map reads
    them first. Raises PlanError, with the reference tool's text where it has one.
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
                entry.path,
                Kind.EXISTING,
                entry.write_zeroes,
                entry.bytes_per_s,
                entry.image_format or wishes.image_format,
                wishes.overwrite,
                wishes.larger,
            )
    return Plan(targets, is_chosen=any(entry.skip for entry in entries.values()))


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
        if known[dev_id].is_vmstate and spec.kind is not Kind.NEW:
            raise PlanError(
                f"vmstate can only be restored to a new file, and {spec.path} exists: "
                "its size is not known before its end"
            )
    _check_distinct((known[dev_id].name for dev_id in plan.targets), "devices have the name")
    paths = [spec.path for spec in plan.targets.values() if spec.kind is Kind.NEW]
    if plan.configs_folder is not None:
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
