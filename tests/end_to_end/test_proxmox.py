# SPDX-License-Identifier: Apache-2.0
"""`--vmid`: everything beside and inside the archive that Proxmox VE's tools look for."""

from __future__ import annotations

import re
from pathlib import Path

from tests.machine import bad, good, make_disk


def test_an_archive_with_a_vmid_has_all_that_qmrestore_looks_for(tmp_path: Path) -> None:
    disk, dump = make_disk(tmp_path / "d.raw", "A0A"), tmp_path / "dump"
    dump.mkdir()
    (tmp_path / "100.conf").write_text(
        "name: web\nscsi0: local-lvm:vm-100-disk-0,size=1G\nlock: x\n"
    )
    (tmp_path / "100.fw").write_text("[OPTIONS]\n")
    good(
        *("backup", "--vmid", "100", "--notes", "before the upgrade", "--compress", "zstd"),
        *("--config", tmp_path / "100.conf", "--config", tmp_path / "100.fw"),
        *("--disk", f"drive-scsi0={disk}", dump),
    )
    (archive,) = dump.glob("*.vma.zst")
    stem = re.fullmatch(r"(vzdump-qemu-100-[0-9_]{10}-[0-9_]{8})\.vma\.zst", archive.name)
    assert stem
    assert (dump / f"{archive.name}.notes").read_text() == "before the upgrade\n"
    log = (dump / f"{stem[1]}.log").read_text()
    assert "INFO: Starting Backup of VM 100 (qemu)" in log
    assert "INFO: include disk 'scsi0'" in log
    assert "INFO: Finished Backup of VM 100" in log
    stored = good("config", archive, "--name", "qemu-server.conf").decode()
    assert stored.endswith("#qmdump#map:scsi0:drive-scsi0:local-lvm:raw:\n")
    assert "lock:" not in stored
    assert good("config", archive, "--name", "qemu-server.fw") == b"[OPTIONS]\n"


def test_a_backup_that_fails_leaves_its_log_and_nothing_else(tmp_path: Path) -> None:
    dump = tmp_path / "dump"
    dump.mkdir()
    bad("backup", "--vmid", "100", "--disk", f"drive-scsi0={tmp_path / 'none'}", dump)
    (log,) = dump.iterdir()
    assert log.suffix == ".log"
    assert "ERROR: Backup of VM 100 failed - disk 'drive-scsi0': cannot open" in log.read_text()


def test_wrong_use_is_one_clear_line(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "d.raw", "A")
    words = ("backup", "--disk", f"d={disk}")
    assert "100 to 999999999" in bad(*words, "--vmid", "7", tmp_path, code=2)
    assert "--notes needs --vmid" in bad(*words, "--notes", "x", tmp_path / "vm.vma", code=2)
    assert "--freeze needs --agent" in bad(*words, "--freeze", tmp_path / "a", code=2)
    assert "--agent needs --qmp or --monitor" in bad(*words, "--agent", "x", tmp_path / "a", code=2)
