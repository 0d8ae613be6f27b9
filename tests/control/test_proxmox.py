# SPDX-License-Identifier: Apache-2.0
"""What qmrestore and vzdump's users expect beside the archive's format."""

from __future__ import annotations

import re

import pytest

from vmapipe.control.proxmox import archive_name, config_name, stored_config
from vmapipe.runtime.errors import UsageError

CONF = """\
boot: order=scsi0
lock: backup
name: web
parent: before-upgrade
scsi0: local-lvm:vm-100-disk-0,iothread=1,size=32G
scsi1: nas:100/vm-100-disk-1.qcow2,size=8G
#vzdump#old
#qmdump#map:scsi0:drive-scsi0:old:raw:
unused0: local-lvm:vm-100-disk-9
virtio2: /dev/vg0/data,size=1G

[before-upgrade]
scsi0: local-lvm:vm-100-disk-0,size=30G
"""


def test_an_archive_is_named_as_vzdump_names_it() -> None:
    name = archive_name(100, 1_790_000_000, None)
    assert re.fullmatch(r"vzdump-qemu-100-\d{4}_\d\d_\d\d-\d\d_\d\d_\d\d\.vma", name)
    assert archive_name(100, 0, "zstd").endswith(".vma.zst")


@pytest.mark.parametrize("vmid", [0, 99, -1, 10**9])
def test_a_number_that_no_machine_has_is_refused(vmid: int) -> None:
    with pytest.raises(UsageError, match="100 to 999999999"):
        archive_name(vmid, 0, None)


def test_the_stored_config_ends_with_a_map_line_a_disk() -> None:
    stored = stored_config(CONF, ["drive-scsi0", "drive-scsi1", "drive-virtio2"])
    assert stored == (
        "boot: order=scsi0\n"
        "name: web\n"
        "scsi0: local-lvm:vm-100-disk-0,iothread=1,size=32G\n"
        "scsi1: nas:100/vm-100-disk-1.qcow2,size=8G\n"
        "virtio2: /dev/vg0/data,size=1G\n"
        "\n"
        "#qmdump#map:scsi0:drive-scsi0:local-lvm:raw:\n"
        "#qmdump#map:scsi1:drive-scsi1:nas:qcow2:\n"
        "#qmdump#map:virtio2:drive-virtio2::raw:\n"
    )


def test_a_tpm_state_is_mapped_by_the_name_that_its_backup_has() -> None:
    stored = stored_config("tpmstate0: local:vm-1-disk-2,size=4M\n", ["drive-tpmstate0-backup"])
    assert "#qmdump#map:tpmstate0:drive-tpmstate0-backup:local:raw:\n" in stored


def test_the_configs_of_a_machine_get_the_names_that_archives_use() -> None:
    assert config_name("/etc/pve/qemu-server/100.conf", 100) == "qemu-server.conf"
    assert config_name("/etc/pve/firewall/100.fw", 100) == "qemu-server.fw"
    assert config_name("notes.txt", 100) == "notes.txt"
