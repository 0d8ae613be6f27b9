# SPDX-License-Identifier: Apache-2.0
"""Archives that become domains of libvirt's: defined, booted, never over anything, and undone where it fails."""

from __future__ import annotations

import argparse
import json
import lzma
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.access.bootable import make_bootable
from tests.conftest import absent
from tests.control.hosts.libvirtd import Libvirtd, started_libvirtd
from tests.control.qemu.test_tpm import DEFINE, KEY, READ, WRITE, asked
from tests.golden_archives import GOLDEN_DIR, read_digests
from tests.guest import find_kernel
from tests.machine import (
    Need,
    bad,
    end_of,
    eventually,
    good,
    make_disk,
    next_event,
    run,
    sha256,
    started,
)
from vmapipe.control.cli.restore import main
from vmapipe.control.qemu.tpm import VOLUME_BYTES, as_volume

MANUAL = Path(__file__).parents[3] / "docs/operations/hosts-libvirt.md"
TPM = "drive-tpmstate0-backup"
UUID = "9c2b2a2e-3c1e-4cf2-9b0a-0fb4ad10a9a3"
MAC = "52:54:00:aa:bb:cc"
WEB = f"""\
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web</name><uuid>{UUID}</uuid><memory unit='MiB'>256</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type><boot dev='hd'/></os>
  <features><acpi/></features>
  <devices><emulator>/host/evil</emulator>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
      <source file='/host/web.qcow2'/><target dev='vda' bus='virtio'/></disk>
    <interface type='bridge'><mac address='{MAC}'/><source bridge='br-host'/>
      <model type='virtio'/></interface>
    <channel type='unix'><source mode='bind' path='/host/agent'/>
      <target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <hostdev mode='subsystem' type='pci'/>
  </devices>
  <qemu:commandline><qemu:arg value='-evil'/></qemu:commandline>
</domain>
"""
# Two devices at one place, which libvirt tells when it is asked.
CONFLICT = WEB.replace(
    "</devices>",
    "".join(
        "<sound model='ich9'><address type='pci' bus='0' slot='0x1b' function='0'/></sound>"
        for _ in range(2)
    )
    + "</devices>",
)

# A disk that cannot have a thread: libvirt tells it when the domain is defined, and not before.
LATE = (
    WEB.replace("<vcpu>", "<iothreads>1</iothreads><vcpu>")
    .replace("type='qcow2'/>", "type='qcow2' iothread='1'/>")
    .replace("dev='vda' bus='virtio'", "dev='sda' bus='sata'")
)


class Bench(NamedTuple):
    """A libvirtd with a pool `p`, and archives to restore."""

    libvirt: Libvirtd
    pool: Path
    folder: Path

    def words(self, archive: Path, *more: str | Path) -> list[str | Path]:
        return ["restore", archive, "--libvirt", "--connect", self.libvirt.uri, *more]

    def archive(self, name: str, config: str, *disks: str, config_name: str = "web.xml") -> Path:
        """An archive of these words of --disk, with a manifest."""
        path = self.folder / name
        (self.folder / config_name).write_text(config)
        words = [word for disk in disks for word in ("--disk", disk)]
        good("backup", *words, "--config", self.folder / config_name, path)
        return path

    def place(self, name: str) -> Path:
        """A folder for disks that libvirt's QEMU can enter."""
        folder = self.libvirt.folder / name
        folder.mkdir()
        self.libvirt.give(folder)
        return folder

    def domains(self) -> set[str]:
        return set(self.libvirt("list", "--all", "--name").split())

    def state(self) -> tuple[set[str], set[str], list[str]]:
        """All that a restore could leave: domains, volumes, journals."""
        volumes = {path.name for path in self.pool.iterdir()}
        journals = self.libvirt.folder / "state" / "vmapipe"
        left = sorted(p.name for p in journals.iterdir()) if journals.exists() else []
        return self.domains(), volumes, left


@pytest.fixture(scope="module")
def bench(need: Need, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    daemon, virsh = need("libvirtd", "virsh")
    need("qemu-system-x86_64", "qemu-storage-daemon", "qemu-img")
    with started_libvirtd(daemon, virsh) as libvirt, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(libvirt.folder / "state"))
        patch.setenv("VMAPIPE_ACCELERATOR", "tcg")
        bench = Bench(libvirt, libvirt.folder / "pool", tmp_path_factory.mktemp("archives"))
        bench.pool.mkdir()
        libvirt.give(bench.pool)
        libvirt("pool-create-as", "p", "dir", "--target", bench.pool)
        yield bench


@pytest.fixture(scope="module")
def small(bench: Bench) -> Path:
    """An archive of web with a disk of a few clusters."""
    disk = make_disk(bench.folder / "small.raw", "AhA0ppA" * 8)
    return bench.archive("small.vma", WEB, f"vda={disk}")


@pytest.fixture(scope="module")
def large(bench: Bench) -> Path:
    """One of which a restore at a low speed is still under way when something happens to it."""
    disk = make_disk(bench.folder / "large.raw", "A" * 256)
    return bench.archive("large.vma", WEB, f"vda={disk}")


def attributes(bench: Bench, name: str, pattern: str) -> list[str]:
    return re.findall(pattern, bench.libvirt("dumpxml", "--inactive", name))


def content(path: Path, size_bytes: int, image_format: str) -> bytes:
    raw = path.with_suffix(".content")
    words = ["qemu-img", "convert", "-f", image_format, "-O", "raw", str(path), str(raw)]
    subprocess.run(words, check=True)
    data = raw.read_bytes()[:size_bytes]
    raw.unlink()
    return data


# --- It comes back ---


# By BIOS: write this sector to the next one of the disk that was booted, then stand still.
BOOT_SECTOR = (
    bytes.fromhex("31c0 8ed8 8ec0 b80103 bb007c b90200 b600 cd13 f4 ebfd").ljust(510, b"\0")
    + b"\x55\xaa"
)


def test_a_machine_of_libvirt_comes_back_under_another_name_and_boots(
    bench: Bench, tmp_path: Path
) -> None:
    disk = tmp_path / "boot.raw"
    disk.write_bytes(BOOT_SECTOR.ljust(1 << 20, b"\0"))
    archive = bench.archive("sector.vma", WEB, f"drive-virtio-disk0={disk}")
    words = bench.words(archive, "--name", "web2", "--pool", "p", "--format", "raw", "--start")
    said = good(*words).decode()
    try:
        assert "not as it was: qemu:commandline: it runs words of its own choice" in said
        assert "disk vda: 'drive-virtio-disk0' in" in said
        xml = bench.libvirt("dumpxml", "web2")
        for word in ("evil", "/host", "br-host", MAC, UUID):
            assert word not in xml
        assert "<mac address='52:54:00:" in xml
        volume = bench.pool / "web2-vda.raw"
        assert eventually(lambda: volume.read_bytes()[512:1024] == BOOT_SECTOR)
        # Its disk is at work, so it is not touched, whatever is asked for.
        assert "is running" in bad(*bench.words(archive, "--name", "web2", "--overwrite"))
    finally:
        bench.libvirt.try_virsh("destroy", "web2")
    bench.libvirt("undefine", "web2")
    bench.libvirt("vol-delete", "web2-vda.raw", "p")


@pytest.mark.soak  # a Linux takes a minute to boot where two processors are shared
def test_a_linux_of_libvirt_comes_back_and_its_agent_answers(
    need: Need, bench: Bench, tmp_path: Path
) -> None:
    kernel = find_kernel()
    if kernel is None:
        absent("Debian's cloud kernel")
    disk = bench.folder / "boot.raw"
    make_bootable(need, kernel, tmp_path / "parts", disk)
    archive = bench.archive("boot.vma", WEB, f"drive-virtio-disk0={disk}")
    good(*bench.words(archive, "--name", "web2", "--pool", "p", "--start"))
    try:
        ping = ("qemu-agent-command", "web2", '{"execute":"guest-ping"}')
        assert eventually(lambda: bench.libvirt.try_virsh(*ping).returncode == 0)
    finally:
        bench.libvirt.try_virsh("destroy", "web2")
    bench.libvirt("undefine", "web2")
    bench.libvirt("vol-delete", "web2-vda.qcow2", "p")


def test_a_machine_of_proxmox_becomes_a_domain_with_its_disks(bench: Bench) -> None:
    archive = bench.folder / "golden.vma"
    archive.write_bytes(lzma.decompress((GOLDEN_DIR / "g02-two-disks-cfg.vma.xz").read_bytes()))
    place = bench.place("proxmox")
    good(*bench.words(archive, "--dir", place, "--format", "raw", "--start"))
    bench.libvirt("destroy", "golden")
    digests = {
        i.name: i.sha256 for i in read_digests()["g02-two-disks-cfg.vma"] if i.kind == "device"
    }
    assert sha256(place / "golden-vda.raw") == digests["drive-virtio0"]
    # SeaBIOS has only read.
    assert sha256(place / "golden-sda.raw") == digests["drive-scsi0"]
    assert attributes(bench, "golden", r"target dev='\w+' bus='\w+'") == [
        "target dev='sda' bus='scsi'",
        "target dev='vda' bus='virtio'",
    ]
    if os.geteuid() == 0:
        assert {p.stat().st_uid for p in place.iterdir()} == {place.stat().st_uid}
    bench.libvirt("undefine", "golden")


def test_the_same_machine_has_its_uuid_and_addresses_and_no_second_one_can(
    bench: Bench, small: Path
) -> None:
    good(*bench.words(small, "--pool", "p", "--same"))
    assert attributes(bench, "web", r"<uuid>(.*)</uuid>") == [UUID]
    assert attributes(bench, "web", r"mac address='(.*)'") == [MAC]
    before = bench.state()
    said = bad(*bench.words(small, "--pool", "p", "--same", "--name", "other"), code=2)
    assert "the domain web has the uuid" in said
    assert bench.state() == before
    volume = bench.pool / "web-vda.qcow2"
    disk = bench.folder / "small.raw"
    assert content(volume, disk.stat().st_size, "qcow2") == disk.read_bytes()
    bench.libvirt("undefine", "web")
    bench.libvirt("vol-delete", volume.name, "p")


def test_firmware_has_the_variables_that_are_in_the_archive(need: Need, bench: Bench) -> None:
    if not Path("/usr/share/OVMF/OVMF_VARS_4M.fd").exists():
        absent("ovmf")
    disk = make_disk(bench.folder / "uefi.raw", "A")
    # As a storage of Proxmox VE's rounds it up.
    variables = bench.folder / "vars.raw"
    variables.write_bytes(b"variables".ljust(4 << 20, b"\0"))
    config = (
        "bios: ovmf\nmachine: q35\nmemory: 128\nname: uefi\nefidisk0: l:1,efitype=4m\nscsi0: l:2\n"
    )
    archive = bench.archive(
        "uefi.vma",
        config,
        f"drive-scsi0={disk}",
        f"drive-efidisk0={variables}",
        config_name="qemu-server.conf",
    )
    place = bench.place("uefi")
    good(*bench.words(archive, "--dir", place))
    (path,) = attributes(bench, "uefi", r"<nvram[^>]*>(.*)</nvram>")
    assert path == str(place / "uefi_VARS.fd")
    assert Path(path).read_bytes() == b"variables".ljust(540672, b"\0")
    bench.libvirt("undefine", "--nvram", "uefi")


def test_a_tpm_knows_in_the_restored_machine_what_it_knew(
    need: Need, bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    need("swtpm_setup")  # libvirt has no TPMs without it
    (tmp_path / "old").mkdir()
    asked(need, tmp_path, f"dir={tmp_path / 'old'}", DEFINE, WRITE)
    state = (tmp_path / "old" / "tpm2-00.permall").read_bytes()
    volume = tmp_path / "tpm.raw"
    volume.write_bytes(as_volume({"permall": state}).ljust(VOLUME_BYTES, b"\0"))
    disk = make_disk(tmp_path / "disk.raw", "A")
    config = WEB.replace(
        "</devices>",
        "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm></devices>",
    )
    archive = bench.archive("tpm.vma", config, f"vda={disk}", f"{TPM}={volume}")
    # The daemon's settings, of which a root's restore to another user's libvirt knows.
    monkeypatch.setenv("XDG_CONFIG_HOME", str(bench.libvirt.folder / "config"))
    words = bench.words(archive, "--pool", "p", "--name", "tpm")
    said = good(*words).decode()
    assert "not as it was: tpm" not in said
    (uuid,) = attributes(bench, "tpm", r"<uuid>(.*)</uuid>")
    kept = bench.libvirt.folder / "config/libvirt/qemu/swtpm" / uuid / "tpm2"
    assert (kept / "tpm2-00.permall").read_bytes() == state
    # libvirt's own swtpm takes it: a new one it would have set up first.
    bench.libvirt("start", "tpm")
    bench.libvirt("destroy", "tpm")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "tpm2-00.permall").write_bytes((kept / "tpm2-00.permall").read_bytes())
    assert KEY in asked(need, tmp_path, f"dir={tmp_path / 'new'}", READ)
    # So does a machine that starts while its disk is restored.
    live = bench.words(archive, "--pool", "p", "--name", "tpmlive", "--start", "--live")
    assert "not as it was: tpm" not in good(*live).decode()
    bench.libvirt("destroy", "tpmlive")
    (uuid,) = attributes(bench, "tpmlive", r"<uuid>(.*)</uuid>")
    bench.libvirt("undefine", "--keep-tpm", "tpmlive")
    kept = bench.libvirt.folder / "config/libvirt/qemu/swtpm" / uuid / "tpm2"
    (tmp_path / "live").mkdir()
    (tmp_path / "live" / "tpm2-00.permall").write_bytes((kept / "tpm2-00.permall").read_bytes())
    assert KEY in asked(need, tmp_path, f"dir={tmp_path / 'live'}", READ)
    # Where it cannot be put, the machine has a new one, and somebody is told.
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    said = good(*words, "--overwrite").decode()
    assert (
        "not as it was: tpm: this libvirt keeps TPMs where we cannot write; the machine has" in said
    )
    bench.libvirt("undefine", "tpm")
    for path in bench.pool.iterdir():
        bench.libvirt("vol-delete", path.name, "p")


# --- Nothing that exists is touched ---


def test_a_domain_a_volume_or_a_file_that_exists_is_not_overwritten(
    bench: Bench, small: Path
) -> None:
    place = bench.place("taken")
    (place / "web-vda.raw").write_bytes(b"mine")
    (bench.pool / "web-vda.qcow2").write_bytes(b"mine")
    good(*bench.words(small, "--pool", "p", "--name", "taken"))
    before = bench.state()
    in_dir = ("--dir", place, "--format", "raw")
    assert "exists already" in bad(*bench.words(small, *in_dir), code=2)
    assert "has a volume web-vda.qcow2 already" in bad(*bench.words(small, "--pool", "p"), code=2)
    assert "has a domain taken already" in bad(
        *bench.words(small, "--name", "taken", *in_dir), code=2
    )
    assert bench.state() == before
    assert [p.read_bytes() for p in place.iterdir()] == [b"mine"]
    assert (bench.pool / "web-vda.qcow2").read_bytes() == b"mine"
    (bench.pool / "web-vda.qcow2").unlink()
    bench.libvirt("undefine", "taken")
    bench.libvirt("vol-delete", "taken-vda.qcow2", "p")


def test_overwrite_takes_the_domains_place_and_removes_its_old_disks_at_the_end(
    bench: Bench, small: Path
) -> None:
    good(*bench.words(small, "--pool", "p"))
    uuid = attributes(bench, "web", r"<uuid>(.*)</uuid>")
    bench.libvirt("define", _written(bench, bench.libvirt("dumpxml", "web"), "web", "user"))
    # Another domain has the disk.
    assert "is a disk of the domain user" in bad(
        *bench.words(small, "--pool", "p", "--overwrite"), code=2
    )
    bench.libvirt("undefine", "user")
    for name in ("web-vda-1.qcow2", "web-vda.qcow2"):
        good(*bench.words(small, "--pool", "p", "--overwrite"))
        assert attributes(bench, "web", r"source file='(.*)'") == [str(bench.pool / name)]
        assert [path.name for path in bench.pool.iterdir()] == [name]
    assert attributes(bench, "web", r"<uuid>(.*)</uuid>") == uuid
    bench.libvirt("undefine", "web")
    bench.libvirt("vol-delete", "web-vda.qcow2", "p")


def _written(bench: Bench, xml: str, old: str, new: str) -> Path:
    path = bench.folder / "other.xml"
    xml = re.sub(r"<uuid>.*</uuid>|<mac .*/>", "", xml)
    path.write_text(xml.replace(f"<name>{old}<", f"<name>{new}<"))
    return path


# --- Nothing is left where it fails ---


def test_what_fails_in_the_middle_leaves_nothing_and_the_old_domain_as_it_was(
    bench: Bench, small: Path
) -> None:
    damaged = bench.folder / "damaged.vma"
    data = bytearray(small.read_bytes())
    data[-5000] ^= 1
    damaged.write_bytes(data)
    manifest = Path(f"{small}.manifest.json")
    Path(f"{damaged}.manifest.json").write_bytes(manifest.read_bytes())
    place = bench.place("failed")
    before = bench.state()
    for where in (("--pool", "p"), ("--dir", place, "--format", "raw")):
        assert "damaged" in bad(*bench.words(damaged, *where))
        assert bench.state() == before
        assert list(place.iterdir()) == []
    good(*bench.words(small, "--pool", "p"))
    before, xml = bench.state(), bench.libvirt("dumpxml", "web")
    bad(*bench.words(damaged, "--pool", "p", "--overwrite"))
    assert (bench.state(), bench.libvirt("dumpxml", "web")) == (before, xml)
    bench.libvirt("undefine", "web")
    bench.libvirt("vol-delete", "web-vda.qcow2", "p")


@pytest.mark.parametrize(("config", "is_early"), [(CONFLICT, True), (LATE, False)])
def test_a_domain_that_libvirt_does_not_take_leaves_nothing(
    config: str, is_early: bool, bench: Bench, small: Path
) -> None:
    path = bench.folder / "refused.xml"
    path.write_text(config)
    place = bench.place(f"refused-{is_early}")
    before = bench.state()
    where = ("--pool", "p") if is_early else ("--dir", place)
    done = run(*bench.words(small, *where, "--config", path, "--json"))
    assert done.returncode == 1
    assert "libvirt does not take the domain" in done.stderr.decode()
    assert (b'"restoring"' in done.stdout) is not is_early
    assert bench.state() == before
    assert list(place.iterdir()) == []


def _interrupted(bench: Bench, archive: Path, how: int, *where: str | Path) -> None:
    """A restore that gets this signal when some of its disk is written."""
    words = bench.words(archive, *where, "--speed", "256K", "--json", "--workers", "1")
    with started(*words) as restoring:
        while next_event(restoring, "progress")["done_bytes"] == 0:
            pass
        restoring.send_signal(how)
        restoring.wait()


def test_ctrl_c_leaves_nothing(bench: Bench, large: Path) -> None:
    place = bench.place("stopped")
    before = bench.state()
    for where in (("--pool", "p"), ("--dir", place)):
        _interrupted(bench, large, signal.SIGINT, *where)
        assert bench.state() == before
        assert list(place.iterdir()) == []


def test_a_domain_that_is_started_meanwhile_keeps_its_disks(
    bench: Bench, small: Path, large: Path
) -> None:
    good(*bench.words(small, "--pool", "p"))
    before = bench.state()
    words = bench.words(large, "--pool", "p", "--overwrite", "--speed", "8M", "--json")
    with started(*words) as restoring:
        while next_event(restoring, "progress")["done_bytes"] == 0:
            pass
        bench.libvirt("start", "web")
        code, said = end_of(restoring)
    assert (code, "the domain web is running" in said) == (1, True)
    assert bench.state() == before
    bench.libvirt("destroy", "web")
    bench.libvirt("undefine", "web")
    bench.libvirt("vol-delete", "web-vda.qcow2", "p")


def test_a_libvirtd_that_is_started_again_meanwhile_is_no_trouble(
    bench: Bench, large: Path
) -> None:
    words = bench.words(large, "--pool", "p", "--name", "again", "--speed", "8M", "--json")
    with started(*words) as restoring:
        while next_event(restoring, "progress")["done_bytes"] == 0:
            pass
        bench.libvirt.kill()
        bench.libvirt.start()
        assert next_event(restoring, "defined")["domain"] == "again"
    bench.libvirt("undefine", "again")
    bench.libvirt("vol-delete", "again-vda.qcow2", "p")


def test_what_a_killed_restore_has_left_is_removed_by_the_next_and_told(
    bench: Bench, small: Path, large: Path
) -> None:
    before = bench.state()
    _interrupted(bench, large, signal.SIGKILL, "--pool", "p", "--name", "killed")
    assert bench.state()[1] == {"killed-vda.qcow2"}
    assert len(bench.state()[2]) == 1
    # Any other restore to this libvirt.
    said = good(*bench.words(small, "--pool", "p", "--name", "next")).decode()
    assert "removed the volume killed-vda.qcow2 of the pool p, which a killed restore" in said
    domains, volumes, journals = bench.state()
    assert (domains - before[0], volumes, journals) == ({"next"}, {"next-vda.qcow2"}, [])
    bench.libvirt("undefine", "next")
    bench.libvirt("vol-delete", "next-vda.qcow2", "p")


def test_a_killed_restore_whose_domain_is_defined_is_complete(bench: Bench, small: Path) -> None:
    good(*bench.words(small, "--pool", "p", "--name", "done"))
    (uuid,) = attributes(bench, "done", r"<uuid>(.*)</uuid>")
    volume = bench.pool / "done-vda.qcow2"
    status = volume.stat()
    lines: list[dict[str, object]] = [
        {"version": 1, "uri": bench.libvirt.uri, "name": "done", "uuid": uuid, "archive": "x"},
        {
            "made": {
                "path": str(volume),
                "device": status.st_dev,
                "inode": status.st_ino,
                "pool": "p",
                "volume": volume.name,
            }
        },
    ]
    journals = bench.libvirt.folder / "state" / "vmapipe"
    # A restore that was killed before it could remove its journal, and half a line of another one.
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    (journals / f"done-{uuid}.libvirt-restore").write_text(whole)
    (journals / "half.libvirt-restore").write_text(whole.replace(uuid, UUID) + '{"made"')
    # Nobody's, which is in nobody's way.
    junk = journals / "junk.libvirt-restore"
    junk.write_text("junk\n")
    bad(*bench.words(small, "--pool", "p", "--name", "done"), code=2)
    assert volume.exists()
    assert bench.state()[2] == [junk.name]
    junk.unlink()
    bench.libvirt("undefine", "done")
    bench.libvirt("vol-delete", volume.name, "p")


# --- Refused before anything ---


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--libvirt", "DIR"], "DIR is not for --libvirt"),
        (["--libvirt", "--device", "x"], "--device is not for --libvirt"),
        (["--libvirt", "--salvage"], "--salvage is not for --libvirt"),
        (["--libvirt", "--live", "--workers", "2"], "--workers is not for --live"),
        (["--libvirt", "--live", "--", "qemu-system-x86_64"], "leave out what is behind --"),
        (["--libvirt", "--format", "vmdk"], "use raw or qcow2"),
        (["--libvirt", "--name", "../x"], "a name has up to 64 characters"),
        (["--libvirt", "--network", "a/b"], "bridge:NAME"),
        (["--libvirt", "--resume"], "--dir and --format raw"),
        (["--libvirt", "--pool", ""], "--pool is empty"),
        (["DIR", "--connect", "x"], "--connect is for --libvirt"),
        (["DIR", "--name", "x"], "--name is for --libvirt"),
        (["DIR", "--same"], "--same is for --libvirt"),
        (["DIR", "--start"], "--start is for --libvirt"),
    ],
)
def test_a_wrong_use_is_told_in_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["/nowhere/a.vma", *words], "vmapipe restore") == 2
    text = capsys.readouterr().err
    assert said in text
    assert len(text.strip().splitlines()) == 1


def test_the_manuals_commands_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line.split("#")[0] for line in MANUAL.read_text().splitlines() if " --libvirt" in line]
    commands = [shlex.split(line) for line in lines if line.startswith("    vmapipe restore ")]
    asked: list[argparse.Namespace] = []
    monkeypatch.setattr(
        "vmapipe.control.cli.restore.restore_domain", lambda options, *_: asked.append(options)
    )
    for words in commands:
        assert main(words[2:], "vmapipe restore") == 0, words
    assert len(asked) == len(commands) > 7


@pytest.mark.parametrize(
    ("uri", "said", "code"),
    [
        ("qemu+ssh://host/system", "another host's libvirt", 2),
        ("qemu:///session?socket=/nowhere", "cannot reach libvirt", 1),
    ],
)
def test_a_libvirt_that_is_not_here_is_told_in_one_line(
    uri: str, said: str, code: int, small: Path
) -> None:
    done = run("restore", small, "--libvirt", "--connect", uri)
    assert (done.returncode, said in done.stderr.decode()) == (code, True)
    assert b"Traceback" not in done.stderr
