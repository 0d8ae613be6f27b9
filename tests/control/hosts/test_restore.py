# SPDX-License-Identifier: Apache-2.0
"""Archives that become domains of libvirt's: defined, booted, never over anything, and undone where it fails."""

from __future__ import annotations

import argparse
import lzma
import os
import shlex
from pathlib import Path

import pytest

from tests.access.bootable import make_bootable
from tests.conftest import absent
from tests.control.hosts.bench import (
    BOOT_SECTOR,
    MAC,
    UUID,
    WEB,
    Bench,
    attributes,
    content,
    written,
)
from tests.control.qemu.test_tpm import DEFINE, KEY, READ, WRITE, asked
from tests.golden_archives import GOLDEN_DIR, read_digests
from tests.guest import find_kernel
from tests.machine import Need, bad, eventually, good, make_disk, run, sha256
from vmapipe.control.cli.restore import main
from vmapipe.control.qemu.tpm import VOLUME_BYTES, as_volume

MANUAL = Path(__file__).parents[3] / "docs/operations/hosts-libvirt.md"
TPM = "drive-tpmstate0-backup"


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
    bench.libvirt("define", written(bench, bench.libvirt("dumpxml", "web"), "web", "user"))
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
