# SPDX-License-Identifier: Apache-2.0
"""What Proxmox VE's tools expect of a backup beside its format: names, notes, map lines.

Behaviour as of vzdump and qmrestore (pve-manager, qemu-server): an archive is
found by its name, and the stored configuration says which disk belongs where.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence

from vmapipe.runtime.cli import split_named
from vmapipe.runtime.errors import Failure, UsageError, os_error_text

CONFIG_NAME = "qemu-server.conf"
FIREWALL_NAME = "qemu-server.fw"
# Proxmox VE's own bounds.
MIN_VMID, MAX_VMID = 100, 999_999_999
# What a backup's configuration does not have: traces of other backups, and what
# holds only for the machine as it is now.
_LEFT_OUT = re.compile(r"#vzdump#|#qmdump#|lock:|parent:|unused\d+:")
_SECTION = re.compile(r"\[.*\]\s*")
_DISK_KEY = re.compile(r"(?:ide|sata|scsi|virtio|efidisk|tpmstate)\d+")
# A blob of an archive has 65535 bytes at most; what is longer is refused there.
MAX_CONFIG_CHARS = 1 << 20
_EXTENSION_FORMATS = {"raw": "raw", "qcow2": "qcow2", "vmdk": "vmdk"}


def archive_name(vmid: int, when: float, compress: str | None) -> str:
    """`vzdump-qemu-<vmid>-<local time>.vma[.zst]`. Raises UsageError."""
    if not MIN_VMID <= vmid <= MAX_VMID:
        raise UsageError(f"--vmid {vmid}: a machine's number is {MIN_VMID} to {MAX_VMID}")
    stamp = time.strftime("%Y_%m_%d-%H_%M_%S", time.localtime(when))
    return f"vzdump-qemu-{vmid}-{stamp}.vma" + (".zst" if compress else "")


def config_name(path: str, vmid: int) -> str:
    """`100.conf` and `100.fw` of machine 100 have other names inside an archive."""
    name = os.path.basename(path)
    known = {f"{vmid}.conf": CONFIG_NAME, f"{vmid}.fw": FIREWALL_NAME}
    return known.get(name, name)


def stored_config(text: str, devices: Sequence[str]) -> str:
    """The configuration as it goes into the archive, a map line for each of `devices` at its end."""
    lines = []
    volumes: dict[str, str] = {}
    for line in text.splitlines():
        if _SECTION.fullmatch(line):
            break  # snapshots, and changes that are not in force yet
        if _LEFT_OUT.match(line):
            continue
        lines.append(line)
        key, colon, value = line.partition(":")
        if colon and _DISK_KEY.fullmatch(key):
            volumes[key] = value.strip().partition(",")[0]
    for device in devices:
        key = device.removeprefix("drive-").removesuffix("-backup")
        storage, image_format = _volume(volumes.get(key, ""))
        lines.append(f"#qmdump#map:{key}:{device}:{storage}:{image_format}:")
    return "\n".join(lines) + "\n"


def _volume(volume: str) -> tuple[str, str]:
    """`local:100/vm-100-disk-0.qcow2` to (`local`, `qcow2`); what it does not say is empty or raw."""
    storage, colon, rest = volume.partition(":")
    if not colon or volume.startswith("/"):
        return "", "raw"
    return storage, _EXTENSION_FORMATS.get(rest.rpartition(".")[2], "raw")


def rename_configs(
    configs: Sequence[str], vmid: int, devices: Sequence[str]
) -> list[tuple[str, int]]:
    """`[NAME=]PATH` options as (option, descriptor): the machine's own under the archive's names.

    Its configuration gets its map lines, in a memory file whose descriptor is to
    be inherited; -1 where nothing is. Raises Failure.
    """
    renamed = []
    for text in configs:
        name, path = split_named(text)
        if name == os.path.basename(path):
            name = config_name(path, vmid)
        if name != CONFIG_NAME:
            renamed.append((f"{name}={path}", -1))
            continue
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                stored = stored_config(file.read(MAX_CONFIG_CHARS), devices)
        except OSError as error:
            raise Failure(f"unable to read file '{path}': {os_error_text(error)}") from error
        fd = os.memfd_create(CONFIG_NAME, 0)
        os.write(fd, stored.encode("utf-8", "surrogateescape"))
        os.lseek(fd, 0, os.SEEK_SET)
        renamed.append((f"{name}=/dev/fd/{fd}", fd))
    return renamed


def write_notes(archive: str, notes: str) -> None:
    """`.notes` beside the archive, which Proxmox VE shows. Raises OSError."""
    with open(f"{archive}.notes", "x", encoding="utf-8") as file:
        file.write(notes + "\n")
