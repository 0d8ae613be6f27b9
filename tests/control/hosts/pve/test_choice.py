# SPDX-License-Identifier: Apache-2.0
"""Which machines, disks and folders a node's files and a command line mean."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.control.hosts.pve.simulated import SimulatedNode
from vmapipe.control.hosts.pve.defaults import notes_of, parse_defaults, parse_prune
from vmapipe.control.hosts.pve.guests import Inventory, PveGuest, parse_pools, parse_tags, select
from vmapipe.control.hosts.pve.machine import MachineConfig, disks_at_rest
from vmapipe.control.hosts.pve.node import PveNode
from vmapipe.control.hosts.pve.storages import (
    PveVolume,
    backup_target,
    parse_storages,
    resolve,
)
from vmapipe.runtime.errors import Failure, UsageError

USERS = """\
user:root@pam:1:0:::root@example.org::
pool:prod:the%3Asite:100,101,200,300:local:
pool:prod/web:below:102::
pool:empty::::
pool:night::100::
acl:1:/:root@pam:Administrator:
"""
INVENTORY = Inventory(
    "one",
    {
        100: PveGuest(100, "qemu", "one", tags=frozenset({"gold", "web"})),
        101: PveGuest(101, "qemu", "one"),
        102: PveGuest(102, "qemu", "one", tags=frozenset({"gold"})),
        109: PveGuest(109, "qemu", "one", is_template=True, tags=frozenset({"gold"})),
        200: PveGuest(200, "lxc", "one", tags=frozenset({"gold"})),
        300: PveGuest(300, "qemu", "two", tags=frozenset({"night"})),
    },
    parse_pools(USERS),
)


@pytest.mark.parametrize(
    ("words", "excluded", "vmids"),
    [
        (["100"], [], (100,)),
        (["101,100"], [], (100, 101)),
        (["101", "100"], [], (100, 101)),
        (["all"], [], (100, 101, 102)),
        (["all"], ["101"], (100, 102)),
        (["all"], ["prod", "102"], ()),
        (["prod"], [], (100, 101)),
        (["pool:prod/web"], [], (102,)),
        (["gold"], [], (100, 102)),
        (["tag:GOLD"], ["tag:web"], (102,)),
        (["prod", "gold"], [], (100, 101, 102)),
        (["empty"], [], ()),
        (["109"], [], (109,)),
        (["tag:night"], [], ()),
    ],
)
def test_numbers_pools_tags_and_all_choose_machines(
    words: list[str], excluded: list[str], vmids: tuple[int, ...]
) -> None:
    assert select(words, excluded, INVENTORY).vmids == vmids


def test_who_is_left_out_is_told_why() -> None:
    chosen = select(["all", "prod", "999"], ["101", "555"], INVENTORY)
    assert chosen.vmids == (100, 102)
    told = {guest.vmid: (guest.reason.split(":")[0], guest.failed) for guest in chosen.left_out}
    assert told == {
        101: ("it is excluded", False),
        109: ("it is a template, which does not change", False),
        200: ("it is a container, which vmapipe does not back up", False),
        300: ("it is on node two", False),
        999: ("no machine of this node or its cluster has this number", True),
    }
    assert "pool prod: the pools below it (prod/web) are not included" in chosen.remarks[0]
    assert chosen.remarks[1] == "--exclude 555: no guest has this number"
    assert select(["empty"], [], INVENTORY).remarks == ("--pve empty: there is no machine in it",)


def test_a_machine_that_is_asked_for_by_its_number_and_is_elsewhere_is_a_failure() -> None:
    assert [g.failed for g in select(["300", "200"], [], INVENTORY).left_out] == [True, True]


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("no-such", "'no-such' is not a machine's number, a pool or a tag (pools: empty, night"),
        ("pool:gold", "'gold' is not a pool"),
        ("tag:prod", "'prod' is not a tag"),
        ("night", "'night' is a pool and a tag: say pool:night or tag:night"),
        ("100,,101", "name machines, pools or tags"),
        ("99", "'99' is not a machine's number"),
        ("../100", "'../100' is not a machine's number"),
    ],
)
def test_a_word_that_means_nothing_is_refused(word: str, text: str) -> None:
    with pytest.raises(UsageError) as refusal:
        select([word], [], INVENTORY)
    assert text in str(refusal.value)


def test_tags_are_separated_as_proxmox_separates_them() -> None:
    assert parse_tags("a;B, c") == {"a", "b", "c"}


STORAGES = parse_storages(
    """\
# a comment
dir: local
\tpath /var/lib/vz
\tcontent iso,vztmpl,backup,images
\tprune-backups keep-daily=7,keep-last=3

dir: usb
\tpath /mnt/usb
\tcontent backup
\tis_mountpoint yes
\tcontent-dirs backup=archives,images=disks

dir: isos
\tpath /srv/isos
\tcontent iso

nfs: nas
\texport /export
\tserver 10.0.0.1
\tcontent images,backup

lvmthin: local-lvm
\tthinpool data
\tvgname pve
\tcontent rootdir,images

lvm: san
\tvgname vgsan
\tcontent images

zfspool: tank
\tpool rpool/data
\tcontent images

rbd: ceph
\tpool vms
\tcontent images

rbd: ceph-k
\tpool vms
\tkrbd 1
\tcontent images

iscsi: target
\tportal 10.0.0.2
\ttarget iqn.2026-11.example:a

pbs: backups
\tserver 10.0.0.3
\tcontent backup

btrfs: fs
\tpath /srv/fs
\tcontent images

dir: elsewhere
\tpath /srv/e
\tnodes two,three
\tcontent images,backup

dir: off
\tpath /srv/off
\tdisable
\tcontent images
"""
)


@pytest.mark.parametrize(
    ("volid", "volume"),
    [
        (
            "local:100/vm-100-disk-0.raw",
            PveVolume("/var/lib/vz/images/100/vm-100-disk-0.raw", "raw"),
        ),
        (
            "local:100/vm-100-disk-0.qcow2",
            PveVolume("/var/lib/vz/images/100/vm-100-disk-0.qcow2", "qcow2"),
        ),
        (
            "local:9000/base-9000-disk-0.qcow2/100/vm-100-disk-0.qcow2",
            PveVolume("/var/lib/vz/images/100/vm-100-disk-0.qcow2", "qcow2"),
        ),
        ("usb:100/vm-100-disk-0.vmdk", PveVolume("/mnt/usb/disks/100/vm-100-disk-0.vmdk", "vmdk")),
        (
            "nas:100/vm-100-disk-0.qcow2",
            PveVolume("/mnt/pve/nas/images/100/vm-100-disk-0.qcow2", "qcow2"),
        ),
        (
            "local-lvm:vm-100-disk-0",
            PveVolume("/dev/pve/vm-100-disk-0", "raw", "pve/vm-100-disk-0"),
        ),
        (
            "local-lvm:base-9-disk-0/vm-100-disk-0",
            PveVolume("/dev/pve/vm-100-disk-0", "raw", "pve/vm-100-disk-0"),
        ),
        (
            "san:vm-100-disk-0.qcow2",
            PveVolume("/dev/vgsan/vm-100-disk-0.qcow2", "qcow2", "vgsan/vm-100-disk-0.qcow2"),
        ),
        ("tank:vm-100-disk-0", PveVolume("/dev/zvol/rpool/data/vm-100-disk-0", "raw")),
        ("ceph-k:vm-100-disk-0", PveVolume("/dev/rbd/vms/vm-100-disk-0", "raw")),
        ("target:0.0.1.scsi-36001405", PveVolume("/dev/disk/by-id/scsi-36001405", "raw")),
        ("fs:100/vm-100-disk-0.raw", PveVolume("/srv/fs/images/100/vm-100-disk-0/disk.raw", "raw")),
        ("/dev/disk/by-id/ata-X", PveVolume("/dev/disk/by-id/ata-X", "raw")),
    ],
)
def test_a_volume_is_where_its_storage_has_it(volid: str, volume: PveVolume) -> None:
    assert resolve(volid, STORAGES, "one") == volume


@pytest.mark.parametrize(
    ("volid", "text"),
    [
        ("gone:vm-100-disk-0", "no storage 'gone' is configured"),
        ("ceph:vm-100-disk-0", "is rbd without krbd, which only QEMU opens"),
        ("elsewhere:100/vm-100-disk-0.raw", "disabled, or not on this node"),
        ("off:100/vm-100-disk-0.raw", "disabled, or not on this node"),
        ("backups:vm/100", "of type pbs"),
        ("local:../../etc/shadow", "not a valid name of a volume"),
        ("local-lvm:../sda", "not a valid name of a volume"),
        ("local:100/vm-100-disk-0.iso", "not a raw, qcow2 or vmdk file"),
        ("local:vm-100-disk-0.raw", "not the name of a file"),
        ("target:x", "not the name of an iSCSI unit"),
    ],
)
def test_a_volume_that_cannot_be_read_at_rest_is_named_with_the_reason(
    volid: str, text: str
) -> None:
    with pytest.raises(Failure) as failure:
        resolve(volid, STORAGES, "one")
    assert text in str(failure.value)


@given(st.text(max_size=60))
def test_no_name_of_a_volume_leads_out_of_its_storage(name: str) -> None:
    for storage, below in (
        ("local", "/var/lib/vz/images/"),
        ("local-lvm", "/dev/pve/"),
        ("tank", "/dev/zvol/rpool/data/"),
    ):
        try:
            volume = resolve(f"{storage}:{name}", STORAGES, "one")
        except Failure:
            continue
        assert volume.path.startswith(below)
        assert ".." not in volume.path.split("/")


def test_archives_go_to_a_folder_or_to_a_storage_that_is_for_them() -> None:
    assert backup_target("/backup", STORAGES, "one").folder == "/backup"
    local = backup_target("local", STORAGES, "one")
    assert (local.folder, local.storage, local.mount_point) == ("/var/lib/vz/dump", "local", "")
    assert local.prune == "keep-daily=7,keep-last=3"
    usb = backup_target("usb", STORAGES, "one")
    assert (usb.folder, usb.mount_point) == ("/mnt/usb/archives", "/mnt/usb")
    assert backup_target("nas", STORAGES, "one").mount_point == "/mnt/pve/nas"
    assert backup_target("local", parse_storages(""), "one").folder == "/var/lib/vz/dump"


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("isos", "storage isos is not for backups: `pvesm set isos --content backup,iso`"),
        ("backups", "a Proxmox Backup Server, which takes no archives"),
        ("local-lvm", "of type lvmthin: it cannot hold archives"),
        ("elsewhere", "disabled, or not on this node"),
    ],
)
def test_a_storage_that_cannot_hold_archives_is_refused(word: str, text: str) -> None:
    with pytest.raises(UsageError) as refusal:
        backup_target(word, STORAGES, "one")
    assert text in str(refusal.value)


def test_the_disks_of_a_machine_at_rest_are_those_that_vzdump_takes() -> None:
    config = MachineConfig(
        "bios: ovmf\nefidisk0: local-lvm:vm-100-disk-1,size=4M\nide2: local:iso/x.iso,media=cdrom\n"
        "sata0: local-lvm:vm-100-cloudinit,media=cdrom\nscsi0: local:100/vm-100-disk-0.qcow2,size=8M\n"
        "scsi1: local-lvm:vm-100-disk-2,backup=no\ntpmstate0: local-lvm:vm-100-disk-3,version=v2.0\n"
        "unused0: local-lvm:vm-100-disk-9\n\n[snap]\nscsi5: gone:vm-100-disk-0\n"
    )
    found = disks_at_rest(config, STORAGES, "one")
    assert [disk.word(disk.volume.path) for disk in found] == [
        "drive-efidisk0=/dev/pve/vm-100-disk-1,format=raw",
        "drive-scsi0=/var/lib/vz/images/100/vm-100-disk-0.qcow2,format=qcow2,others=yes",
        "drive-tpmstate0-backup=/dev/pve/vm-100-disk-3,format=raw",
    ]
    assert config.unused == [("unused0", "local-lvm:vm-100-disk-9")]
    assert config.remarks() == ["snapshots found (not included into backup)"]
    without = MachineConfig(config.text.replace("bios: ovmf\n", ""))
    reasons = {disk.key: disk.excluded for disk in without.disks if disk.excluded}
    assert reasons["efidisk0"] == "efidisk but no OMVF BIOS"


@pytest.mark.parametrize(
    ("line", "freezes"),
    [
        ("", False),
        ("agent: 1", True),
        ("agent: enabled=1,fstrim_cloned_disks=1", True),
        ("agent: 1,freeze-fs-on-backup=0", False),
        ("agent: 0", False),
        ("agent: enabled=0", False),
    ],
)
def test_the_agent_freezes_where_the_configuration_says_so(line: str, freezes: bool) -> None:
    assert MachineConfig(f"memory: 64\n{line}\n").freezes is freezes


def test_the_defaults_of_vzdump_are_taken_and_what_is_not_is_named() -> None:
    found = parse_defaults(
        "# vzdump default settings\n\n#tmpdir: DIR\nbwlimit: 1024\nmode: stop\nscript: /usr/local/bin/hook\n"
        "storage: usb\ndumpdir: /backup\ncompress: zstd\nnotes-template: {{guestname}}\nprotected: 1\n"
        "prune-backups: keep-last=3,keep-daily=0\nremove: 0\nexclude: 101 102\nionice: 8\ntmpdir: /var/tmp\n"
        "compress: best\nnonsense\nfrob: 1\n"
    )
    assert found._replace(remarks=()) == found._replace(
        speed_bytes_s=1 << 20,
        mode="stop",
        script="/usr/local/bin/hook",
        storage="usb",
        dump_folder="/backup",
        compress="zstd",
        notes="{{guestname}}",
        is_protected=True,
        prune="keep-last=3,keep-daily=0",
        removes=False,
        exclude=("101", "102"),
        ionice=8,
        remarks=(),
    )
    assert [remark.partition(":")[0] for remark in found.remarks] == [
        "'tmpdir' has no use here",
        "line 17 is not understood, and not used",
        "line 18 is not understood, and not used",
        "line 19 is not understood, and not used",
    ]


@given(st.text(max_size=200))
def test_no_line_of_the_defaults_is_an_error(text: str) -> None:
    parse_defaults(text)


def test_rules_of_pruning_are_read_as_proxmox_reads_them() -> None:
    assert parse_prune("keep-last=3,keep-weekly=2") == {"last": 3, "weekly": 2}
    assert parse_prune("keep-all=1,keep-last=3") == {}
    assert parse_prune("keep-forever=1") is None


@pytest.mark.parametrize("link", ["local", "qemu-server"])
def test_a_node_is_called_as_its_own_folder_is(node: SimulatedNode, link: str) -> None:
    for other in {"local", "qemu-server"} - {link}:
        (node.pve / other).unlink()
    node.configure(100, "memory: 64\ntags: a\n")
    inventory = PveNode(str(node.root)).inventory()
    assert inventory.node == "one"
    assert inventory.guests == {100: PveGuest(100, "qemu", "one", tags=frozenset({"a"}))}


def test_a_node_without_a_cluster_has_its_machines_in_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "etc/pve/qemu-server"
    folder.mkdir(parents=True)
    (folder / "100.conf").write_text("memory: 64\ntemplate: 1\n")
    (tmp_path / "etc/hostname").write_text("alone.example.org\n")
    inventory = PveNode(str(tmp_path)).inventory()
    assert inventory.guests == {100: PveGuest(100, "qemu", "alone", is_template=True)}


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_a_line_ends_nowhere_but_at_its_end(end: str) -> None:
    """What a user has pasted into a comment is no second line, whatever Unicode calls it."""
    config = MachineConfig(f"#a{end}lock: x{end}scsi5: l:6{end}[b]\r\nscsi0: l:1\r\nname: é\r\n")
    assert (config.lock, config.name, [disk.key for disk in config.disks]) == ("", "é", ["scsi0"])
    assert parse_pools(f"pool:a:x{end}pool:b::7:y:100:l:\r\npool:c::101::\r\n").keys() == {"a", "c"}
    assert parse_storages(f"dir: a\r\n\tpath /a{end}dir: b\r\n\tcontent images\r\n").keys() == {
        "a",
        "local",
    }
    assert (
        parse_defaults(f"#x{end}mode: stop\r\nstorage: s\r\n")[:] == parse_defaults("storage: s")[:]
    )


def test_notes_have_the_variables_of_vzdump() -> None:
    text = notes_of(
        r"{{guestname}}\n{{vmid}} {{node}} {{cluster}} \\n {{else}}",
        vmid=100,
        name="web",
        node="one",
        cluster="",
    )
    assert text == "web\n100 one standalone node \\n {{else}}"
