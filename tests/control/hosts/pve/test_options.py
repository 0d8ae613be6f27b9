# SPDX-License-Identifier: Apache-2.0
"""`vmapipe backup --pve`: what a node's defaults change, and what is refused before anything is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.control.hosts.pve.simulated import SimulatedNode, conf, stopped
from tests.machine import bad, good


def test_the_defaults_of_vzdump_conf_hold_where_the_command_line_says_nothing(
    node: SimulatedNode, tmp_path: Path
) -> None:
    stopped(node, 100)
    stopped(node, 101)
    old = [f"vzdump-qemu-100-2026_01_0{day}-00_00_00.vma.zst" for day in (1, 2, 3)]
    for name in (
        *old,
        "vzdump-qemu-101-2026_01_01-00_00_00.vma",
        "vzdump-qemu-1001-2026_01_01-00_00_00.vma",
        "mine.vma",
    ):
        (node.dump / name).write_bytes(b"")
    (node.dump / f"{old[0]}.protected").write_bytes(b"")
    (node.root / "etc/vzdump.conf").write_text(
        "storage: local\ncompress: gzip\nmode: stop\nbwlimit: 102400\nexclude: 101\nprune-backups: keep-last=2\n"
        "notes-template: {{vmid}}\nfrobnicate: 1\nmailto: root\n"
    )
    said = good(*node.words("--pve", "all")).decode()
    for text in (
        "etc/vzdump.conf: line 8 is not understood, and not used: frobnicate: 1",
        "etc/vzdump.conf: 'mailto' has no use here",
        "compress: gzip: archives are compressed with zstd",
        "VM 101 is left out: it is excluded",
        f"VM 100: pruned {old[1]}",
        "1 machine stored, 1 left out",
    ):
        assert text in said
    left = sorted(p.name for p in node.dump.glob("*.vma*") if p.suffix in (".vma", ".zst"))
    assert [n for n in left if n in old] == [old[0], old[2]]
    assert {
        "vzdump-qemu-101-2026_01_01-00_00_00.vma",
        "vzdump-qemu-1001-2026_01_01-00_00_00.vma",
        "mine.vma",
    } < set(left)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--pve", "100"], "say where the archives go"),
        (["--pve", "100", "--disk", "a", "local"], "--disk and --pve do not go together"),
        (["--pve", "100", "--state", "local"], "--state and --pve do not go together"),
        (["--pve", "web", "local"], "'web' is not a machine's number, a pool or a tag"),
        (["--pve", "100", "local-lvm"], "of type lvmthin: it cannot hold archives"),
        (["--pve", "100", "/no/such/folder"], "there is no such folder for the archives"),
        (["--pve", "100", "--bwlimit", "1M", "local"], "'1M' is not a number of KiB a second"),
        (["--pve", "100", "--bwlimit", "1", "--speed", "1M", "local"], "the same in two units"),
        (["--pve", "100", "--base", "a.vma", "local"], "--base with --pve is auto"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_touched(
    node: SimulatedNode, words: list[str], text: str
) -> None:
    stopped(node, 100)
    assert text in bad(*node.words(*words), code=2)
    assert node.config(100) == conf(100)


@pytest.mark.parametrize(
    "word", ["--exclude=100", "--mode=stop", "--protected", "--bwlimit=1", "--pve-root=/"]
)
def test_options_of_a_node_are_refused_without_one(tmp_path: Path, word: str) -> None:
    text = bad("backup", word, "--disk", "a", tmp_path / "a.vma", code=2)
    assert f"{word.partition('=')[0]} belongs to --pve" in text


def test_a_host_that_is_no_node_is_named(tmp_path: Path) -> None:
    text = bad("backup", "--pve", "all", "--pve-root", tmp_path, tmp_path)
    assert "no Proxmox VE is here" in text


def test_a_storage_that_is_not_mounted_is_refused(node: SimulatedNode) -> None:
    stopped(node, 100)
    (node.pve / "storage.cfg").write_text(
        "dir: usb\n\tpath /mnt/usb\n\tcontent backup\n\tis_mountpoint 1\n"
    )
    (node.root / "mnt/usb/dump").mkdir(parents=True)
    text = bad(*node.words("--pve", "100"), "usb", code=2)
    assert "is not mounted: the archives would fill the host's own disk" in text
