# SPDX-License-Identifier: Apache-2.0
"""Archives whose disks have names that our writer refuses: each disk is within reach, under a name of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.access.mounting import mounting
from tests.access.serving import serving
from tests.archives import archive, manifest, renamed
from tests.machine import Need, bad, run
from vmapipe.access.archive import open_for_access
from vmapipe.access.mount.tree import ArchiveTree
from vmapipe.access.open_storage import Caches
from vmapipe.runtime.cancel import Cancel

DISKS = {name: name.encode() * 30_000 for name in ("same", "sama", "a_b", "xx", "n_l", "good")}
NAMES = {b"sama": b"same", b"a_b": b"a/b", b"xx": b"\xff\xfe", b"n_l": b"n\nl", b"c_d": b"c/d"}


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    raw = archive(DISKS, {"c_d": b"not shown", "conf": b"shown"})
    (tmp_path / "vm.vma").write_bytes(renamed(raw, NAMES))
    return tmp_path / "vm.vma"


def test_each_disk_is_an_export_whatever_another_one_is_called(
    odd: Path, tmp_path: Path, need: Need
) -> None:
    (copy,) = need("nbdcopy")
    with serving(tmp_path / "s", odd) as served:
        for export, name in {
            "same": "same",
            "device-2": "sama",
            "a%2Fb": "a_b",
            "device-4": "xx",
            "n%0Al": "n_l",
            "good": "good",
        }.items():
            subprocess.run([copy, served.uri(export), tmp_path / name], check=True)
            assert (tmp_path / name).read_bytes() == DISKS[name]
    told = [json.loads(line) for line in served.said.splitlines()]
    notices = [row["text"] for row in told if row["event"] == "notice"]
    assert sum("is shown as device-" in text for text in notices) == 2


def test_archives_of_one_name_in_two_folders_are_served_side_by_side(
    odd: Path, tmp_path: Path, need: Need
) -> None:
    (copy,) = need("nbdcopy")
    (tmp_path / "two").mkdir()
    other = archive({"good": b"other" * 5000})
    (tmp_path / "two/vm.vma").write_bytes(other)
    with serving(tmp_path / "s", odd, tmp_path / "two/vm.vma", "--device", "good") as served:
        for export, content in (("vm.vma/good", DISKS["good"]), ("vm.vma-2/good", b"other" * 5000)):
            subprocess.run([copy, served.uri(export), tmp_path / "copy"], check=True)
            assert (tmp_path / "copy").read_bytes() == content


def test_each_disk_is_a_file_of_a_mount_whatever_another_one_is_called(
    odd: Path, tmp_path: Path
) -> None:
    with mounting(tmp_path / "m", odd, "--engine", "parser") as mount:
        there = {path.name: path.read_bytes() for path in (mount.folder / "disks").iterdir()}
        assert {path.name for path in (mount.folder / "config").iterdir()} == {"conf"}
        assert len(os.listdir(mount.folder / "files")) == len(DISKS)
    assert there == {
        "same.raw": DISKS["same"],
        "device-2.raw": DISKS["sama"],
        "device-3.raw": DISKS["a_b"],
        os.fsdecode(b"\xff\xfe.raw"): DISKS["xx"],
        "device-5.raw": DISKS["n_l"],
        "good.raw": DISKS["good"],
    }


def test_a_configuration_that_can_be_no_file_is_told_of(odd: Path) -> None:
    cancel, told = Cancel(), list[str]()
    opened = open_for_access(str(odd), cancel, told.append, Caches(None, "/tmp", 0))
    try:
        tree = ArchiveTree(opened, [], {}, told.append)
        assert [name for name, _ in tree.names(b"/config")] == [b"conf"]
        assert [line for line in told if "the configuration 'c/d' is not shown" in line]
    finally:
        opened.close()
        cancel.close()


def test_each_disk_is_a_place_of_files_whatever_another_one_is_called(odd: Path) -> None:
    done = run("files", "ls", "--engine", "parser", "--json", odd)
    assert done.returncode == 0
    found = [json.loads(row)["disk"] for row in done.stdout.splitlines()]
    assert found == ["same", "device-2", "a/b", "\udcff\udcfe", "n\nl", "good"]


def test_an_archive_without_a_disk_has_no_files_and_that_is_said(tmp_path: Path) -> None:
    raw = archive({}, {"conf": b"memory: 1"})
    (tmp_path / "vm.vma").write_bytes(raw)
    (tmp_path / "vm.vma.manifest.json").write_bytes(manifest(raw))
    assert "has no disk: only configurations" in bad("files", "ls", tmp_path / "vm.vma")
    assert "has no disk: only configurations" in bad("files", "cat", tmp_path / "vm.vma", "/etc")


def test_which_of_two_disks_of_one_name_a_machine_had_is_not_guessed(odd: Path) -> None:
    done = run("drill", odd)
    assert done.returncode == 1
    assert b"two disks have the name 'same'" in done.stderr
    assert b"Traceback" not in done.stderr
    assert not odd.with_name("vm.vma.drill.json").exists()
