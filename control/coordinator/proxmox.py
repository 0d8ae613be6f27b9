# SPDX-License-Identifier: Apache-2.0
"""The parts of a backup that Proxmox VE's tools expect beside its format: names, notes, map lines.

Behaviour as of vzdump and qmrestore (pve-manager, qemu-server): an archive is
found by its name, and the stored configuration says which disk belongs where.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from vmapipe.runtime.arguments import split_named
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, UsageError, os_error_text
from vmapipe.runtime.side_files import open_new, read_awaited
from vmapipe.runtime.text import file_lines
from vmapipe.vma.names import CONFIG_NAME, FIREWALL_NAME

# Proxmox VE's own bounds.
MIN_VMID, MAX_VMID = 100, 999_999_999
# What a backup's configuration does not have: traces of other backups, what holds only for the
# machine as it is now, and the volumes that are never backed up: unused ones, and the memory of a
# machine that was suspended to disk.
_LEFT_OUT = re.compile(
    r"#vzdump#|#qmdump#|lock:|parent:|unused\d+:|vmstate:|running(?:machine|cpu|-nets-host-mtu):"
)
_SECTION = re.compile(r"\[.*\]\s*")
_DISK_KEY = re.compile(r"(?:ide|sata|scsi|virtio|efidisk|tpmstate)\d+")
# A volume of one machine, as storages name them; what else a CD drive has in it (an ISO image) is
# everybody's. A cloud-init drive is made anew by every restore.
_OWN_VOLUME = re.compile(r".*[:/](?:vm|base|subvol)-\d+-.*")
_CLOUD_INIT = re.compile(r".*[:/](?:vm-\d+-)?cloudinit(?:\.\w+)?")
# A blob of an archive has 65535 bytes at most; what is longer is refused there.
MAX_CONFIG_BYTES = 1 << 20
_EXTENSION_FORMATS = {"raw": "raw", "qcow2": "qcow2", "vmdk": "vmdk"}

#: Why a disk whose configuration says `backup=0` is not taken.
NOT_TO_BE_BACKED_UP = "backup=0 in the machine's configuration"
#: A disk that the configuration has, and neither the machine nor the command line.
NOT_THERE = "the machine's configuration has it, and no disk that is backed up has its name"


class ConfigDisk(NamedTuple):
    """A line `scsi0: VOLUME,option=…` of a machine's configuration; `key` is what precedes the colon."""

    key: str
    volume: str
    options: Mapping[str, str]
    #: Why it is not to be backed up, as far as the configuration says; empty: it is.
    excluded: str = ""

    @property
    def device(self) -> str:
        """Its name in an archive, as vzdump gives it."""
        return f"drive-{self.key}" + ("-backup" if self.key.startswith("tpmstate") else "")

    @property
    def is_backed_up(self) -> bool:
        """As far as the configuration says."""
        return not self.excluded

    @property
    def is_its_own(self) -> bool:
        """It has a volume that belongs to this machine alone."""
        if self.volume in ("none", "cdrom", "") or _CLOUD_INIT.fullmatch(self.volume):
            return False
        is_cd = self.options.get("media") == "cdrom"
        return not is_cd or _OWN_VOLUME.fullmatch(self.volume) is not None


_NO = frozenset({"0", "no", "off", "false"})


def config_disks(text: str) -> list[ConfigDisk]:
    """Return the part for the machine as it is: snapshots and pending changes come in sections."""
    found = (_disk_of(line) for line in _main_section(text))
    return [disk for disk in found if disk is not None]


def _main_section(text: str) -> Iterator[str]:
    for line in file_lines(text):
        if _SECTION.fullmatch(line):
            return
        yield line


def _disk_of(line: str) -> ConfigDisk | None:
    key, colon, value = line.partition(":")
    if not colon or not _DISK_KEY.fullmatch(key):
        return None
    volume, options = "", dict[str, str]()
    for index, word in enumerate(value.strip().split(",")):
        name, equals, rest = word.partition("=")
        if name in ("file", "volume") and equals:
            volume = rest
        elif index == 0 and (not equals or ":" in name or "/" in name):
            volume = word
        elif equals:
            options[name] = rest
    is_excluded = options.get("backup", "1") in _NO
    return ConfigDisk(key, volume, options, NOT_TO_BE_BACKED_UP if is_excluded else "")


def archive_name(vmid: int, when: float, ending: str) -> str:
    """`vzdump-qemu-<vmid>-<local time>.vma[.zst][.age]`. Raises UsageError."""
    if not MIN_VMID <= vmid <= MAX_VMID:
        raise UsageError(f"--vmid {vmid}: a machine's number is {MIN_VMID} to {MAX_VMID}")
    stamp = time.strftime("%Y_%m_%d-%H_%M_%S", time.localtime(when))
    return f"vzdump-qemu-{vmid}-{stamp}.vma{ending}"


def config_name(path: str, vmid: int) -> str:
    """`100.conf` and `100.fw` of machine 100 have other names inside an archive."""
    name = os.path.basename(path)
    known = {f"{vmid}.conf": CONFIG_NAME, f"{vmid}.fw": FIREWALL_NAME}
    return known.get(name, name)


def stored_config(text: str, devices: Sequence[str]) -> str:
    """The configuration as it goes into the archive, a map line for each of `devices` at its end.

    A disk that is not among them becomes a comment: what restores the archive would otherwise give
    the restored machine the original's volume, to write to. Proxmox VE's restore makes the same
    comment of a disk with `backup=0`. It would do so of one that is in the archive all the same, so
    that word goes.
    """
    lines = []
    volumes: dict[str, str] = {}
    keys = {device.removeprefix("drive-").removesuffix("-backup") for device in devices}
    for line in _main_section(text):
        disk = _disk_of(line)
        if _LEFT_OUT.match(line):
            continue
        if disk is None:
            lines.append(line)
            continue
        volumes[disk.key] = disk.volume
        if disk.key in keys:
            lines.append(_BACKUP_WORD.sub("", line))
        else:
            lines.append(f"#{line}" if disk.is_its_own else line)
    for device in devices:
        key = device.removeprefix("drive-").removesuffix("-backup")
        storage, image_format = _volume(volumes.get(key, ""))
        lines.append(f"#qmdump#map:{key}:{device}:{storage}:{image_format}:")
    return "\n".join(lines) + "\n"


_BACKUP_WORD = re.compile(r",backup=\w+(?=,|\s*$)")


def _volume(volume: str) -> tuple[str, str]:
    """`local:100/vm-100-disk-0.qcow2` to (`local`, `qcow2`); what it does not say is empty or raw."""
    storage, colon, rest = volume.partition(":")
    if not colon or volume.startswith("/"):
        return "", "raw"
    return storage, _EXTENSION_FORMATS.get(rest.rpartition(".")[2], "raw")


class Configs(NamedTuple):
    """Read the configs of `[NAME=]PATH` options for --vmid: the machine's own have the archive's names.

    `texts`: the machine's configuration, by its place among `words`. `own_disks`: its disks, where who
    has read it knows more of them.
    """

    words: Sequence[str]
    texts: Mapping[int, str]
    own_disks: Sequence[ConfigDisk] | None = None

    @property
    def disks(self) -> list[ConfigDisk]:
        """Names of the disks for which the machine has a volume of its own."""
        if self.own_disks is not None:
            return list(self.own_disks)
        text = next(iter(self.texts.values()), "")
        return [disk for disk in config_disks(text) if disk.is_its_own]

    def stored(self, devices: Sequence[str]) -> tuple[list[str], list[int]]:
        """The options, and the descriptors that go with them: memory files with the map lines."""
        words, fds = list(self.words), []
        for index, text in self.texts.items():
            fd = os.memfd_create(CONFIG_NAME, 0)
            with open(fd, "wb", closefd=False) as file:
                file.write(stored_config(text, devices).encode("utf-8", "surrogateescape"))
            os.lseek(fd, 0, os.SEEK_SET)
            words[index] = f"{CONFIG_NAME}=/dev/fd/{fd}"
            fds.append(fd)
        return words, fds


def read_configs(configs: Sequence[str], vmid: int, cancel: Cancel) -> Configs:
    """Raises Failure, Cancelled."""
    words, texts = [], {}
    for index, text in enumerate(configs):
        name, path = split_named(text)
        if name == os.path.basename(path):
            name = config_name(path, vmid)
        words.append(f"{name}={path}")
        if name != CONFIG_NAME:
            continue
        try:
            data = read_awaited(path, MAX_CONFIG_BYTES, cancel)
            texts[index] = data.decode("utf-8", "surrogateescape")
        except OSError as error:
            raise Failure(f"unable to read file '{path}': {os_error_text(error)}") from error
    return Configs(words, texts)


def write_mark(archive: str) -> None:
    """`.protected` beside the archive: neither Proxmox VE nor `vmapipe prune` removes it. Raises Failure."""
    path = f"{archive}.protected"
    try:
        os.close(open_new(path))
    except OSError as error:
        raise Failure(
            f"the archive is stored, and cannot be marked as protected: {path}: {os_error_text(error)}"
        ) from error


def write_notes(archive: str, notes: str) -> None:
    """`.notes` beside the archive, which Proxmox VE shows. Raises Failure."""
    path = f"{archive}.notes"
    try:
        with open(open_new(path), "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(notes + "\n")
    except OSError as error:
        raise Failure(f"cannot write the notes {path}: {os_error_text(error)}") from error
