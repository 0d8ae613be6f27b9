# SPDX-License-Identifier: Apache-2.0
"""A domain of libvirt's whose guest writes all the time, backed up through libvirt's own backup job."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest

from tests.control.hosts.domain_backups import (
    PROXY,
    everybody,
    frozen_status,
    instant_of,
    kill_together,
    processes_with,
    qemus_own,
    seldom,
    words_for,
)
from tests.control.hosts.libvirtd import DomainGuest, Libvirtd, disk_xml, domain_xml
from tests.machine import (
    LIMIT_S,
    Need,
    bad,
    end_of,
    eventually,
    good,
    make_disk,
    next_event,
    sha256,
    started,
    without_limit,
)


@contextmanager
def another_programs_backup(libvirtd: Libvirtd, name: str) -> Iterator[None]:
    """A job as other programs make it: in pull mode it lasts until somebody ends it."""
    place = libvirtd.folder / "images"
    text = (
        f"<domainbackup mode='pull'><server transport='unix' socket='{place}/other.sock'/><disks>"
        f"<disk name='vda' backup='yes' type='file'><scratch file='{place}/other.scratch'/></disk>"
        "<disk name='vdb' backup='no'/></disks></domainbackup>"
    )
    (libvirtd.folder / "other.xml").write_text(text)
    libvirtd("backup-begin", name, libvirtd.folder / "other.xml")
    try:
        yield
    finally:
        libvirtd("domjobabort", name)
        assert eventually(lambda: "None" in libvirtd("domjobinfo", name))


def test_a_running_domain_is_backed_up_at_one_instant_and_is_as_before(
    need: Need, domain: DomainGuest, tmp_path: Path
) -> None:
    libvirtd, archive = domain.libvirtd, tmp_path / "vm.vma"
    domain.goes_on(2)
    # libvirt writes there whether the guest's agent has come, which starts beside what makes rounds.
    assert eventually(lambda: "state='connected'" in libvirtd("dumpxml", domain.name))
    xml = libvirtd("dumpxml", domain.name)
    before = domain.rounds
    felt = ("--guest-latency", "10s")
    with started(*words_for(domain, "--json", "--speed", "64K", *felt, archive)) as process:
        next_event(process, "instant")
        assert "libvirt tells the mean" in next_event(process, "notice")["text"]
        while not (told := next_event(process, "guest-latency"))["requests"]:
            pass
        assert 0 < told["p99_s"] < 10
        domain.goes_on(3)
        without_limit(process)
        assert end_of(process)[0] == 0
    domain.is_untouched()
    assert libvirtd("dumpxml", domain.name) == xml
    assert before <= instant_of(need, archive, tmp_path / "restored")
    # Both descriptions, as libvirt gives them, and where Proxmox VE would have the disks.
    assert good("config", archive, "--name", "vm1.active.xml").decode().strip() == xml.strip()
    inactive = libvirtd("dumpxml", "--inactive", "--security-info", domain.name)
    assert good("config", archive, "--name", "vm1.xml").decode().strip() == inactive.strip()
    lines = good("config", archive, "--name", "vmapipe-devices.map").decode().splitlines()
    assert lines == ["#qmdump#map:virtio0:vda::raw:", "#qmdump#map:virtio1:vdb::raw:"]


def test_a_second_backup_of_a_domain_is_refused_ours_and_another_programs(
    domain: DomainGuest, tmp_path: Path
) -> None:
    archive = tmp_path / "vm.vma"
    with started(*words_for(domain, "--json", "--speed", "64K", archive)) as process:
        next_event(process, "instant")
        said = bad(*words_for(domain, tmp_path / "second.vma"))
        assert "another backup of the domain 'vm1' is running" in said
        without_limit(process)
        assert end_of(process)[0] == 0
    libvirtd = domain.libvirtd
    with another_programs_backup(libvirtd, domain.name):
        said = bad(*words_for(domain, tmp_path / "second.vma"))
        assert "another program's backup of the domain 'vm1' is running" in said
        where = ("--connect", libvirtd.uri, "--scratch", libvirtd.scratch)
        assert "another program's backup" in bad("cleanup", "--libvirt", domain.name, *where)
        assert "Backup" in libvirtd("domjobinfo", domain.name)
    assert not (tmp_path / "second.vma").exists()
    domain.is_untouched()


def test_with_freeze_the_archived_file_system_needs_no_recovery(
    need: Need, domain: DomainGuest, tmp_path: Path
) -> None:
    (dumpe2fs,) = need("dumpe2fs")
    archive = tmp_path / "vm.vma"
    with started(*words_for(domain, "--json", "--freeze", archive)) as process:
        assert next_event(process, "thawed")["seconds"] < LIMIT_S
        next_event(process, "instant")
        domain.goes_on(2)
        assert end_of(process)[0] == 0
    assert frozen_status(domain) == "thawed"
    good("restore", archive, tmp_path / "restored", "--device", "vda")
    words = [dumpe2fs, "-h", str(tmp_path / "restored" / "disk-vda.raw")]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "needs_recovery" not in said
    domain.is_untouched()


def test_a_full_scratch_space_costs_the_backup_and_not_the_guest(
    domain: DomainGuest, tmp_path: Path
) -> None:
    archive = tmp_path / "vm.vma"
    # An empty scratch file has less; the guest overwrites more within a round or two.
    limits = ("--scratch-size", "1M", "--speed", "64K")
    with started(*words_for(domain, "--json", *limits, archive)) as process:
        next_event(process, "instant")
        code, said = end_of(process)
    assert code == 1
    assert "more than --scratch-size 1.0 MiB: the guest goes on, and the backup has failed" in said
    assert not archive.exists()
    domain.is_untouched()
    domain.goes_on(2)


def test_a_guest_that_was_paused_by_a_full_scratch_file_goes_on_without_an_error(
    need: Need, domain: DomainGuest
) -> None:
    """As after a crash of everything of ours: nobody looks at the files any more."""
    mount, umount = need("mount", "umount")
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    libvirtd = domain.libvirtd
    uuid = libvirtd("domuuid", domain.name).strip().replace("-", "")
    small = libvirtd.folder / "small"
    small.mkdir()
    subprocess.run([mount, "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(small)], check=True)
    try:
        folder = small / f"vmapipe-scratch-{uuid}-00000000"
        folder.mkdir()
        libvirtd.give(small)
        disks = "".join(
            f"<disk name='{name}' backup='yes' type='file'><scratch file='{folder}/{name}.qcow2'/></disk>"
            for name in ("vda", "vdb")
        )
        server = f"<server transport='unix' socket='{folder}/nbd.sock'/>"
        text = f"<domainbackup mode='pull'>{server}<disks>{disks}</disks></domainbackup>"
        (libvirtd.folder / "small.xml").write_text(text)
        libvirtd("backup-begin", domain.name, libvirtd.folder / "small.xml")
        assert eventually(lambda: libvirtd("domstate", domain.name).strip() == "paused")
        assert "no space" in libvirtd("domblkerror", domain.name)
        words = ("--libvirt", domain.name, "--connect", libvirtd.uri, "--scratch", libvirtd.scratch)
        assert "the pause of the guest" in good("cleanup", *words).decode()
        domain.goes_on(2)
    finally:
        libvirtd.try_virsh("domjobabort", domain.name)
        subprocess.run([umount, "-l", str(small)], check=True)
        small.rmdir()
    domain.is_untouched()


def bytes_unchanged(need: Need, domain: DomainGuest, target: str) -> int:
    """What the job's export says that has not changed since the checkpoint."""
    (nbdinfo,) = need("nbdinfo")
    xml = domain.libvirtd("backup-dumpxml", domain.name)
    place = xml.partition(" socket='")[2].partition("'")[0]
    words = [nbdinfo, f"--map=qemu:dirty-bitmap:{target}", "--json"]
    where = f"nbd+unix:///{target}?socket={place}"
    done = subprocess.run([*words, where], capture_output=True, check=True, timeout=LIMIT_S)
    return sum(extent["length"] for extent in json.loads(done.stdout) if not extent["type"])


def test_with_a_base_only_what_has_changed_since_its_checkpoint_is_read(
    need: Need, domain: DomainGuest, tmp_path: Path
) -> None:
    """A checkpoint is one archive's; it goes when that was not stored, and with the next that is."""
    libvirtd = domain.libvirtd
    names = [tmp_path / f"vm-2026-01-0{day}.vma" for day in (1, 2, 3, 4)]
    words = words_for(domain, "--json", "--base", "auto")

    def checkpoints() -> list[str]:
        return libvirtd("checkpoint-list", "--name", domain.name).split()

    stored: list[str] = []
    for name in names[:2]:
        domain.goes_on(1)
        before = domain.rounds
        with started(*words, *(["--speed", "64K"] if stored else []), name) as process:
            base = next_event(process, "base")
            uuid = UUID(next_event(process, "begun")["uuid"])
            if stored:
                assert base["archive"] == str(names[0])
                first = next(d for d in base["devices"] if d["name"] == "vda")
                assert first["incremental"]
                unread = bytes_unchanged(need, domain, "vda")
                without_limit(process)
                # Neither more nor less than any other reader of the export would leave out.
                assert process.stdout is not None
                events = [json.loads(line) for line in process.stdout]
                progress = [event["devices"] for event in events if event["event"] == "progress"]
                last = next(d for d in progress[-1] if d["name"] == "vda")
                assert last["unchanged_bytes"] == unread > 0
                assert any(event.get("base_bytes") for event in events)
            assert end_of(process)[0] == 0
        assert checkpoints() == [f"vmapipe-{uuid}"]
        assert before <= instant_of(need, name, tmp_path / name.stem)
        stored = checkpoints()
    # One that fails, and one that is killed as a whole: the old checkpoint stays, and is used again.
    with started(*words, "--scratch-size", "1", "--speed", "4K", names[2]) as process:
        assert end_of(process)[0] == 1
    assert checkpoints() == stored
    with started(*words, "--speed", "4K", names[2]) as process:
        next_event(process, "begun")
        kill_together(everybody(process, domain))
    assert len(checkpoints()) == 2
    with started(*words, names[3]) as process:
        assert next_event(process, "base")["archive"] == str(names[1])
        assert end_of(process)[0] == 0
    (left,) = checkpoints()
    assert left not in stored
    instant_of(need, names[3], tmp_path / "last")
    where = ("--connect", libvirtd.uri, "--scratch", libvirtd.scratch)
    assert left in good("cleanup", "--libvirt", domain.name, *where).decode()
    assert left in good("cleanup", "--libvirt", domain.name, *where, "--bitmaps").decode()
    for name in (*names, *(tmp_path / f"{name.name}.partial" for name in names)):
        name.unlink(missing_ok=True)
    domain.is_untouched()


def test_with_push_qemu_sends_the_disks_itself_and_the_guest_is_frozen_and_thawed(
    need: Need, domain: DomainGuest, tmp_path: Path
) -> None:
    archive = tmp_path / "vm.vma"
    domain.goes_on(1)
    before = domain.rounds
    felt = ("--guest-latency", "10s")
    with started(*words_for(domain, "--json", "--push", "--freeze", *felt, archive)) as process:
        assert next_event(process, "thawed")["seconds"] < LIMIT_S
        next_event(process, "instant")
        domain.goes_on(2)
        assert end_of(process)[0] == 0
    assert before <= instant_of(need, archive, tmp_path / "restored")
    assert frozen_status(domain) == "thawed"
    assert '"vmapipe-' not in qemus_own(domain)
    asked = '{"execute": "query-blockstats"}'
    assert "histogram" not in domain.libvirtd("qemu-monitor-command", domain.name, asked)
    assert eventually(lambda: not processes_with(PROXY, domain))
    domain.is_untouched()


@pytest.fixture(scope="module")
def other(libvirtd: Libvirtd, need: Need) -> Iterator[str]:
    """A domain without an operating system, of disks of each kind."""
    qemu, qemu_img = need("qemu-system-x86_64", "qemu-img")
    folder = libvirtd.folder / "other"
    folder.mkdir()
    base, top, plain, shared, fixed = (
        folder / name for name in ("base.raw", "top.qcow2", "plain.raw", "shared.raw", "fixed.raw")
    )
    for seed, path in enumerate((base, plain, shared, fixed)):
        make_disk(path, "A0AhA", seed=seed)
    words = ["create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(top)]
    subprocess.run([qemu_img, *words], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 9 64K 64K", str(top)], check=True, stdout=-3)
    libvirtd.give(folder)
    devices = [
        disk_xml("sda", top, "qcow2", "sata"),
        disk_xml("vda", plain),
        disk_xml("vdb", shared, more="<shareable/>"),
        disk_xml("vdc", fixed, more="<readonly/>"),
        "<disk type='file' device='cdrom'><target dev='sdb' bus='sata'/></disk>",
        "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>",
    ]
    libvirtd.define(domain_xml(libvirtd, qemu, "vm2", "".join(devices)))
    yield "vm2"
    libvirtd.try_virsh("destroy", "vm2")
    libvirtd("undefine", "vm2")


def test_a_domain_that_is_shut_off_is_backed_up_from_its_images_and_cannot_be_started_meanwhile(
    need: Need, libvirtd: Libvirtd, other: str, tmp_path: Path
) -> None:
    (qemu_img,) = need("qemu-img")
    archive, folder = tmp_path / "vm.vma", libvirtd.folder / "other"
    where = ("--connect", libvirtd.uri, "--scratch", libvirtd.scratch)
    words = ("backup", "--libvirt", other, *where, "--json", "--speed", "4K", archive)
    with started(*words) as process:
        left_out = [next_event(process, "skipped") for _ in range(3)]
        next_event(process, "begun")
        refused = libvirtd.try_virsh("start", other)
        assert "lock" in refused.stderr
        without_limit(process)
        assert end_of(process)[0] == 0
    levels = {event["device"]: event["level"] for event in left_out}
    assert levels == {"vdb": "warn", "vdc": "info", "sdb": "debug"}
    good("restore", archive, tmp_path / "restored")
    flat = tmp_path / "flat.raw"
    subprocess.run([qemu_img, "convert", "-O", "raw", folder / "top.qcow2", flat], check=True)
    assert sha256(tmp_path / "restored" / "disk-sda.raw") == sha256(flat)
    assert sha256(tmp_path / "restored" / "disk-vda.raw") == sha256(folder / "plain.raw")


def test_where_no_agent_runs_nothing_is_frozen_and_nobody_says_that_it_may_be(
    libvirtd: Libvirtd, other: str, tmp_path: Path
) -> None:
    libvirtd("start", other)
    where = ("--connect", libvirtd.uri, "--scratch", libvirtd.scratch)
    said = bad("backup", "--libvirt", other, *where, "--freeze", tmp_path / "vm.vma")
    assert "libvirt cannot freeze the guest: " in said
    assert "Without --freeze" in said
    assert "FROZEN" not in said
    assert list(libvirtd.scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        *seldom(("domjobabort", "somebody has ended its backup job (virsh domjobabort)")),
        ("destroy", "it was destroyed (virsh destroy)"),
    ],
)
def test_a_domain_whose_backup_somebody_ends_is_one_line(
    libvirtd: Libvirtd, other: str, tmp_path: Path, command: str, reason: str
) -> None:
    archive = tmp_path / "vm.vma"
    if libvirtd("domstate", other).strip() != "running":
        libvirtd("start", other)
    # A read-only disk is taken if somebody asks for it.
    where = ("--connect", libvirtd.uri, "--scratch", libvirtd.scratch)
    disks = ("--disk", "system=sda", "--disk", "vda", "--disk", "vdc")
    words = ("backup", "--libvirt", other, *where, *disks, "--json", "--speed", "4K", archive)
    with started(*words) as process:
        devices = next_event(process, "begun")["devices"]
        assert [device["name"] for device in devices] == ["system", "vda", "vdc"]
        libvirtd(command, other)
        code, said = end_of(process)
    assert (code, len(said.splitlines())) == (1, 1), said
    assert said.strip().endswith(f"the domain 'vm2' cannot be backed up any more: {reason}")
    assert list(tmp_path.iterdir()) == []
    assert list(libvirtd.scratch.iterdir()) == []


def test_a_running_domain_that_has_nothing_to_write_to_is_told_so_without_libvirts_job(
    need: Need, libvirtd: Libvirtd, tmp_path: Path
) -> None:
    """libvirt refuses a job without a disk, in words about its XML."""
    (qemu,) = need("qemu-system-x86_64")
    libvirtd.define(domain_xml(libvirtd, qemu, "nothing", ""))
    libvirtd("start", "nothing")
    try:
        words = ("--connect", libvirtd.uri, "--scratch", libvirtd.scratch, tmp_path / "x.vma")
        text = bad("backup", "--libvirt", "nothing", *words, code=2)
        assert "nothing to back up: the domain 'nothing' has no writable disk" in text
        assert os.listdir(libvirtd.scratch) == []
    finally:
        libvirtd("destroy", "nothing")
        libvirtd("undefine", "nothing")
