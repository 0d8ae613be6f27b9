# SPDX-License-Identifier: Apache-2.0
"""`vmapipe backup --pve` of machines, storages, pools, tags and notes with odd names, as far as Proxmox VE allows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.control.hosts.pve.simulated import (
    SimulatedNode,
    conf,
    content,
    restored,
)
from tests.machine import bad, good

STORAGE = "My.Store-1_x"
POOL = "prod/web_1.x-y"
# Description lines as Proxmox VE keeps them: percent-encoded, some by hand with more than that.
DESCRIPTION = "#B%C3%BCro 'a' \"b\"%0Alock%3A backup %f0%9f%96%a5 100%25 <b>\n#  lock: backup\n"


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_a_machine_with_odd_names_everywhere_is_found_stored_and_restored(
    node: SimulatedNode, tmp_path: Path, end: str
) -> None:
    place = "/srv/my disks, 100% 'ü' #1"
    folder = Path(f"{node.root}{place}")
    (folder / "images/100").mkdir(parents=True)
    (folder / "dump").mkdir()
    (folder / "images/100/vm-100-disk-0.raw").write_bytes(content())
    with (node.pve / "storage.cfg").open("a", encoding="utf-8") as file:
        file.write(
            f"dir: {STORAGE}\n\tpath {place}\n\tcontent images,backup\n\tunknown-key a b\n\n"
        )
    text = conf(100, "tags: a+b;c.d_e;-f", "unknown9: x=y,z").replace(
        "scsi0: local:", f"scsi0: {STORAGE}:"
    )
    text = DESCRIPTION + text.replace("name: vm100", "name: web-1.b.example.com")
    text += "\n[snap_1]\nlock: backup\nscsi0: gone:vm-100-disk-9\n"
    node.configure(100, "").write_bytes(text.replace("\n", end).encode())
    (node.pve / "user.cfg").write_text(f'pool:{POOL}:it\'s %3a "B%c3%bcro":100:{STORAGE}:\n')
    before = node.config(100)
    notes = '{{guestname}} "ü" 100% {{vmid}}\\n🖥 $(x) `y`'
    for choice in (POOL, "a+b", "100"):
        good(*node.words("--pve", choice, "--quiet", "--notes", notes, STORAGE))
        (archive,) = (folder / "dump").glob("vzdump-qemu-100-*.vma")
        assert Path(f"{archive}.notes").read_text(encoding="utf-8") == (
            'web-1.b.example.com "ü" 100% 100\n🖥 $(x) `y`\n'
        )
        assert restored(archive, tmp_path / f"out-{choice.replace('/', '-')}") == {
            "disk-drive-scsi0.raw": content()
        }
        told = json.loads(good("list", "--json", archive))
        assert told["devices"][0]["name"] == "drive-scsi0"
        for path in (folder / "dump").iterdir():
            path.unlink()
    assert node.config(100) == before


@pytest.mark.parametrize("word", ["no such", "-x", "a\nb", "é", "%", "100,", "../100", "9" * 40])
def test_a_word_that_names_no_machine_is_told_in_one_line(node: SimulatedNode, word: str) -> None:
    node.configure(100, conf(100))
    text = bad(*node.words(f"--pve={word}", "local"), code=2)
    assert "\n" not in text
    assert not node.archives()
