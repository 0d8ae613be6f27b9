# SPDX-License-Identifier: Apache-2.0
"""What Proxmox VE's tools expect of a backup beside its format: names, notes, map lines, a log.

Behaviour as of vzdump and qmrestore (pve-manager, qemu-server): an archive is
found by its name, and the stored configuration says which disk belongs where.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from types import TracebackType

from vmapipe.runtime.cli import split_named
from vmapipe.runtime.errors import Failure, UsageError, os_error_text
from vmapipe.runtime.events import Event

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


class JobLog:
    """`.log` beside the archive, in the form of vzdump's: time, level, text."""

    def __init__(self, path: str, vmid: int) -> None:
        """Raises OSError."""
        self._vmid = vmid
        self._started = time.monotonic()
        self._file = open(path, "x", encoding="utf-8")  # noqa: SIM115  closed by __exit__
        self._percent = -1
        self._say("INFO", f"Starting Backup of VM {vmid} (qemu)")

    def __enter__(self) -> JobLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            seconds = int(time.monotonic() - self._started)
            took = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
            self._say("INFO", f"Finished Backup of VM {self._vmid} ({took})")
        else:
            self._say("ERROR", f"Backup of VM {self._vmid} failed - {error}")
        self._file.close()

    def __call__(self, event: Event) -> None:
        """Take in what the job tells."""
        match event["event"]:
            case "reading":
                name = event["device"].removeprefix("drive-")
                self._say("INFO", f"include disk '{name}' {event['path']} {event['bytes']} bytes")
            case "instant":
                self._say("INFO", f"all disks held for {1000 * event['held_s']:.0f} ms")
            case "progress":
                self._progress(event)
            case "stored":
                self._say("INFO", f"archive file size: {event['stored_bytes']} bytes")
            case "notice":
                self._say("INFO", str(event["text"]))

    def _progress(self, event: Event) -> None:
        done = sum(device["done_bytes"] for device in event["devices"])
        total = sum(device["bytes"] for device in event["devices"])
        percent = 100 * done // total if total else 100
        # vzdump tells more at the beginning and less in the middle; a line a
        # percent at most says as much and keeps the log short.
        if percent > self._percent:
            self._percent = percent
            seconds = int(time.monotonic() - self._started)
            self._say("INFO", f"{percent}% ({done} of {total} bytes) in {seconds}s")

    def _say(self, level: str, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime())
        self._file.write(f"{stamp} {level}: {text}\n")
        self._file.flush()
