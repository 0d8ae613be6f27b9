# SPDX-License-Identifier: Apache-2.0
"""A domain's XML: which disks a backup takes and which it names; the XML of libvirt's jobs and checkpoints."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.access.machine.domain_xml import parse_xml
from vmapipe.control.hosts.libvirt.backup_xml import (
    BackupDisk,
    archive_of,
    backup_xml,
    checkpoint_disks,
    checkpoint_name,
    checkpoint_xml,
    our_job,
)
from vmapipe.control.hosts.libvirt.domain import (
    choose,
    proxmox_map,
    read_domain,
    why_not_at_rest,
    why_not_pulled,
)
from vmapipe.runtime.errors import Failure, UsageError

DISKS = """\
<disk type='file' device='disk'><driver name='qemu' type='qcow2' iothread='1'/>
  <source file='/images/a.qcow2'/><target dev='vda' bus='virtio'/><alias name='virtio-disk0'/></disk>
<disk type='block' device='disk'><driver name='qemu' type='raw' error_policy='report'/>
  <source dev='/dev/vg0/b'/><target dev='sda' bus='scsi'/></disk>
<disk type='network' device='disk'><driver name='qemu' type='raw'/>
  <source protocol='rbd' name='pool/c'/><target dev='vdb' bus='virtio'/></disk>
<disk type='file' device='disk'><source file='/images/d'/><target dev='vdc' bus='virtio'/><shareable/></disk>
<disk type='file' device='disk'><source file='/images/e'/><target dev='vdd' bus='virtio'/><readonly/></disk>
<disk type='vhostuser' device='disk'><source type='unix' path='/run/f'/><target dev='vde' bus='virtio'/></disk>
<disk type='block' device='lun'><source dev='/dev/sdx'/><target dev='sdb' bus='scsi'/></disk>
<disk type='file' device='cdrom'><source file='/iso'/><target dev='sdc' bus='sata'/><readonly/></disk>
<disk type='file' device='cdrom'><target dev='sdd' bus='sata'/><readonly/></disk>
"""
OTHERS = """\
<filesystem type='mount'><source dir='/srv'/><target dir='shared'/></filesystem>
<hostdev mode='subsystem' type='pci'><alias name='hostdev0'/></hostdev>
<tpm model='tpm-tis'><backend type='passthrough'/></tpm>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
"""
XML = (
    "<domain type='kvm' id='1'><name>vm</name><uuid>8649036f-0690-416a-b487-5e40209f7fd6</uuid>"
    "<os firmware='efi'><nvram format='qcow2'>/nvram/vm.fd</nvram></os>"
    f"<devices>{DISKS}{OTHERS}</devices></domain>"
)


def test_each_disk_is_taken_or_named_with_the_reason() -> None:
    domain = read_domain(XML)
    taken, left_out = choose(domain, ())
    assert [chosen.name for chosen in taken] == ["vda", "sda", "vdb"]
    levels = {out.device: out.level for out in left_out}
    assert levels == {
        "vdc": "warn",
        "vdd": "info",
        "vde": "warn",
        "sdb": "warn",
        "sdc": "info",
        "sdd": "debug",
        "shared": "warn",
        "hostdev0": "info",
        "tpm": "warn",
    }
    assert (domain.nvram, domain.nvram_format, domain.has_tpm, domain.has_agent) == (
        *("/nvram/vm.fd", "qcow2"),
        *(False, True),
    )


def test_a_disk_is_asked_for_by_target_alias_or_path_and_may_have_another_name() -> None:
    domain = read_domain(XML)
    taken, left_out = choose(domain, ("root=virtio-disk0", "/dev/vg0/b", "vdd"))
    assert [(chosen.name, chosen.disk.target) for chosen in taken] == [
        ("root", "vda"),
        ("sda", "sda"),
        ("vdd", "vdd"),
    ]
    assert ("vdb", "--disk chooses others") in [(out.device, out.reason) for out in left_out]
    assert proxmox_map(taken) == (
        "#qmdump#map:virtio0:root::raw:\n#qmdump#map:scsi0:sda::raw:\n#qmdump#map:virtio3:vdd::raw:\n"
    )


@pytest.mark.parametrize(
    ("requested", "words"),
    [
        (("vdx",), "the domain 'vm' has no disk 'vdx', but vda, sda"),
        (("vdc",), "disk 'vdc' cannot be taken: <shareable/>"),
        (("vde",), "disk 'vde' cannot be taken: another program"),
        (("vda", "x=virtio-disk0"), "--disk names 'vda' twice"),
    ],
)
def test_a_wish_that_cannot_be_fulfilled_is_a_users_mistake(
    requested: tuple[str, ...], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        choose(read_domain(XML), requested)


def test_disks_whose_guest_a_pulled_backup_could_harm_and_those_that_only_qemu_opens_are_told() -> (
    None
):
    disks = {disk.target: disk for disk in read_domain(XML).disks}
    assert "I/O thread" in why_not_pulled(disks["vda"], (7, 2))
    assert why_not_pulled(disks["vda"], (9, 0)) == ""
    assert "error_policy='report'" in why_not_pulled(disks["sda"], (9, 0))
    assert "network disk (rbd)" in why_not_at_rest(disks["vdb"])
    assert why_not_at_rest(disks["vda"]) == ""


@pytest.mark.parametrize(
    "xml", ["", "<domain", "<!DOCTYPE x [<!ENTITY e 'x'>]><domain>&e;</domain>"]
)
def test_what_is_not_a_domains_xml_is_one_line(xml: str) -> None:
    with pytest.raises(Failure, match="libvirt's XML of the domain cannot be read"):
        read_domain(xml)


PATHS = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/\0"),
    min_size=1,
    max_size=20,
)


@given(PATHS, st.lists(PATHS, min_size=1, max_size=4, unique=True))
def test_a_job_of_ours_is_known_by_its_folder_whatever_its_disks_are_called(
    place: str, targets: list[str]
) -> None:
    folder = f"/{place}/vmapipe-scratch-8649036f0690416ab4875e40209f7fd6-0123abcd"
    disks = [BackupDisk(target, f"{folder}/{target}.qcow2") for target in targets]
    xml = backup_xml(f"/{place}/nbd.sock", disks, ["other"])
    assert [d.get("name") for d in parse_xml(xml.encode()).find("disks").all("disk")] == [
        *targets,
        "other",
    ]
    job = our_job(xml)
    assert job is not None
    assert (job.folder, job.socket) == (folder, f"/{place}/nbd.sock")
    elsewhere = [BackupDisk(target, f"/{place}/{target}.qcow2") for target in targets]
    assert our_job(backup_xml("/s", elsewhere, [])) is None


def test_a_checkpoint_says_of_which_archive_it_is_and_anothers_is_nobodys() -> None:
    uuid = "8649036f-0690-416a-b487-5e40209f7fd6"
    name = checkpoint_name(uuid)
    assert archive_of(name) == uuid
    assert archive_of("virtnbdbackup.0") == archive_of(f"{name}x") == ""
    xml = checkpoint_xml(name, ["vda", "vdc"], ["vdb"])
    assert checkpoint_disks(xml) == {"vda": "", "vdc": ""}
    disks = "".join(
        f"<disk type='file' device='disk'><source file='/{image}'/><target dev='{target}'/></disk>"
        for target, image in (("vda", "a.qcow2"), ("vdb", "b.qcow2"))
    )
    xml = xml.replace(
        "</domaincheckpoint>", f"<domain><devices>{disks}</devices></domain></domaincheckpoint>"
    )
    assert checkpoint_disks(xml) == {"vda": "/a.qcow2", "vdc": ""}
    assert checkpoint_disks("<no") == {}
