# SPDX-License-Identifier: Apache-2.0
"""What qmrestore and vzdump's users expect beside the archive's format."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.control.coordinator.proxmox import (
    archive_name,
    config_disks,
    config_name,
    stored_config,
)
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
    name = archive_name(100, 1_790_000_000, "")
    assert re.fullmatch(r"vzdump-qemu-100-\d{4}_\d\d_\d\d-\d\d_\d\d_\d\d\.vma", name)
    assert archive_name(100, 0, ".zst").endswith(".vma.zst")


@pytest.mark.parametrize("vmid", [0, 99, -1, 10**9])
def test_a_number_that_no_machine_has_is_refused(vmid: int) -> None:
    with pytest.raises(UsageError, match="100 to 999999999"):
        archive_name(vmid, 0, "")


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


# As a machine of Proxmox VE 9 has them.
MANY = """\
efidisk0: local-lvm:vm-100-disk-0,efitype=4m,size=4M
ide0: local-lvm:vm-100-disk-6,media=cdrom
ide1: local:iso/debian-13.iso,media=cdrom,size=800M
ide2: local-lvm:vm-100-cloudinit,media=cdrom
ide3: none,media=cdrom
sata0: nas:100/vm-100-disk-7.qcow2,backup=0,size=8G
scsi0: local-lvm:vm-100-disk-1,iothread=1,size=32G
scsi1: local-lvm:vm-100-disk-2,backup=0,size=8G
scsi2: file=local:100/vm-100-disk-3.raw,ro=1,size=1G
scsihw: virtio-scsi-single
tpmstate0: local-lvm:vm-100-disk-5,size=4M,version=v2.0
unused0: local-lvm:vm-100-disk-9
virtio0: /dev/disk/by-id/ata-x,size=1G
vmstate: local-lvm:vm-100-state-suspend
runningmachine: pc-q35-9.0+pve0

[PENDING]
scsi4: local-lvm:vm-100-disk-8,size=1G
"""


def test_a_line_of_a_disk_that_is_not_in_the_archive_is_a_comment() -> None:
    """Else a restored machine would write to the original's volumes."""
    stored = stored_config(MANY, ["drive-scsi0", "drive-scsi2"])
    lines = stored.splitlines()
    kept = {line.partition(":")[0] for line in lines if line and not line.startswith("#")}
    # ISO images are everybody's, and a cloud-init drive is made anew by every restore.
    assert kept == {"ide1", "ide2", "ide3", "scsi0", "scsi2", "scsihw"}
    assert "#scsi1: local-lvm:vm-100-disk-2,backup=0,size=8G" in lines
    assert "#tpmstate0: local-lvm:vm-100-disk-5,size=4M,version=v2.0" in lines
    assert [line for line in lines if line.startswith("#qmdump")] == [
        "#qmdump#map:scsi0:drive-scsi0:local-lvm:raw:",
        "#qmdump#map:scsi2:drive-scsi2:local:raw:",
    ]


def test_a_disk_that_is_taken_against_its_configuration_is_restored_as_a_disk() -> None:
    """Proxmox VE's restore would leave a line that says `backup=0` out."""
    stored = stored_config(MANY, ["drive-scsi1", "drive-sata0"])
    assert "\nscsi1: local-lvm:vm-100-disk-2,size=8G\n" in stored
    assert "\nsata0: nas:100/vm-100-disk-7.qcow2,size=8G\n" in stored


def test_the_configuration_says_which_disks_are_backed_up() -> None:
    disks = {disk.key: disk for disk in config_disks(MANY)}
    assert "scsi4" not in disks
    assert [key for key, disk in disks.items() if not disk.is_backed_up] == ["sata0", "scsi1"]
    own = {key for key, disk in disks.items() if disk.is_its_own}
    assert set(disks) - own == {"ide1", "ide2", "ide3"}
    assert disks["scsi2"].volume == "local:100/vm-100-disk-3.raw"
    assert disks["tpmstate0"].device == "drive-tpmstate0-backup"


_VALUES = st.text(st.characters(exclude_characters="\n\r", codec="utf-8"), max_size=40)


@given(
    st.lists(st.tuples(st.sampled_from(["scsi0", "ide2", "tpmstate0", "net0", "#x"]), _VALUES)),
    st.sets(st.sampled_from(["drive-scsi0", "drive-ide2", "drive-tpmstate0-backup"])),
)
def test_no_line_ever_points_at_a_volume_that_is_not_in_the_archive(
    lines: list[tuple[str, str]], devices: set[str]
) -> None:
    text = "".join(f"{key}: {value}\n" for key, value in lines)
    keys = {device.removeprefix("drive-").removesuffix("-backup") for device in devices}
    for disk in config_disks(stored_config(text, sorted(devices))):
        assert disk.key in keys or not disk.is_its_own


def test_the_configs_of_a_machine_get_the_names_that_archives_use() -> None:
    assert config_name("/etc/pve/qemu-server/100.conf", 100) == "qemu-server.conf"
    assert config_name("/etc/pve/firewall/100.fw", 100) == "qemu-server.fw"
    assert config_name("notes.txt", 100) == "notes.txt"
