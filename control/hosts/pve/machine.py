# SPDX-License-Identifier: Apache-2.0
"""One machine of Proxmox VE: what its configuration says to a backup, and its volumes at rest. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from vmapipe.access.machine.proxmox_config import parse_config
from vmapipe.control.coordinator.proxmox import ConfigDisk, config_disks
from vmapipe.control.hosts.pve.storages import PveStorage, PveVolume, resolve
from vmapipe.runtime.errors import Failure

_NO = frozenset({"0", "no", "off", "false"})
_SNAPSHOT = re.compile(r"^\[(?!PENDING\]|special:)[^\]]+\]\s*$", re.MULTILINE | re.IGNORECASE)
_PENDING = re.compile(r"^\[PENDING\]\s*$", re.MULTILINE | re.IGNORECASE)
# vzdump's words: QEMU does not have such a disk.
_EFI_WITHOUT_OVMF = "efidisk but no OMVF BIOS"
# An image in one of these may have a base: a linked clone's template.
_MAY_REFER = frozenset({"qcow2", "vmdk"})


class MachineConfig(NamedTuple):
    """A configuration `qemu-server/ID.conf`, and what it says."""

    text: str

    @property
    def _values(self) -> Mapping[str, str]:
        return parse_config(self.text)

    @property
    def name(self) -> str:
        return self._values.get("name", "")

    @property
    def lock(self) -> str:
        """The word of `lock:`; empty: it is not locked."""
        return self._values.get("lock", "").strip()

    @property
    def is_template(self) -> bool:
        return self._values.get("template", "0") not in _NO

    @property
    def tags(self) -> str:
        return self._values.get("tags", "")

    @property
    def freezes(self) -> bool:
        """Tell whether its guest agent is to freeze the file systems for a backup."""
        words = self._values.get("agent", "0").split(",")
        options = dict(word.partition("=")[::2] for word in words)
        enabled = options.get("enabled", words[0] if "=" not in words[0] else "0")
        return enabled not in _NO and options.get("freeze-fs-on-backup", "1") not in _NO

    @property
    def disks(self) -> list[ConfigDisk]:
        """The disks that are the machine's own: no CD drives, nor the drive of cloud-init."""
        found = [disk for disk in config_disks(self.text) if disk.is_its_own]
        if self._values.get("bios", "") == "ovmf":
            return found
        return [
            disk._replace(excluded=_EFI_WITHOUT_OVMF) if disk.key.startswith("efidisk") else disk
            for disk in found
        ]

    @property
    def unused(self) -> list[tuple[str, str]]:
        """Volumes that no drive has, `unused0` and so on, which no backup takes."""
        return [(k, v) for k, v in self._values.items() if re.fullmatch(r"unused\d+", k)]

    def remarks(self) -> list[str]:
        """Return what the archive does not have beside disks, in vzdump's words."""
        found = []
        if _SNAPSHOT.search(self.text):
            found.append("snapshots found (not included into backup)")
        if _PENDING.search(self.text):
            found.append("pending configuration changes found (not included into backup)")
        return found


class DiskAtRest(NamedTuple):
    """A disk of a machine that does not run, and where it is."""

    disk: ConfigDisk
    volume: PveVolume

    def word(self, path: str) -> str:
        """Return it as an argument of --disk. `path`: of its volume as we see it."""
        others = ",others=yes" if self.volume.format in _MAY_REFER else ""
        return f"{self.disk.device}={path},format={self.volume.format}{others}"


def disks_at_rest(
    config: MachineConfig, storages: Mapping[str, PveStorage], node: str
) -> list[DiskAtRest]:
    """Return the disks to back up of a machine that does not run. Raises Failure, naming the disk."""
    found = []
    for disk in config.disks:
        if disk.is_backed_up and disk.options.get("media") != "cdrom":
            try:
                found.append(DiskAtRest(disk, resolve(disk.volume, storages, node)))
            except Failure as failure:
                raise Failure(f"disk {disk.device!r}: {failure}") from failure
    return found
