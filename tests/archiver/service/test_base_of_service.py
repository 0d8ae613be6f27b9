# SPDX-License-Identifier: Apache-2.0
"""Incremental backups to a service, which chooses the base: its clients cannot, and can read nothing by it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.archiver.changing import change, restored
from tests.archiver.job.world import read_images
from tests.archiver.service.serving import make_keys, serving
from tests.machine import Need, bad, good, make_disk


def backup(words: tuple[str, ...], *more: str | Path) -> dict[str, dict[str, Any]]:
    """The last event of each name."""
    out = good("backup", "--json", *words, *more)
    return {event["event"]: event for event in map(json.loads, out.splitlines())}


def reason(told: dict[str, dict[str, Any]]) -> str:
    (device,) = told["base"]["devices"]
    assert device["incremental"] == (not device["reason"])
    return str(device["reason"])


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def test_a_service_takes_what_has_not_changed_from_the_clients_own_last_archive(
    tmp_path: Path, need: Need
) -> None:
    (zstd,) = need("zstd")
    disk = make_disk(tmp_path / "disk", "A" * 150, tail_bytes=5000)
    other = make_disk(tmp_path / "other", "A" * 150, tail_bytes=5000, seed=9)
    server, clients = make_keys(tmp_path, "alice", "bob")
    store = tmp_path / "store"
    with serving(store, "--per-client", keys=(server, clients["alice"])) as served:
        words = (*served.words, "--base", "auto", "--disk", f"a={disk}")
        assert "no earlier archive of vm" in reason(backup(words, "vm-2026-01-01.vma"))
        change(disk, 3, 70)
        told = backup(words, "--compress", "zstd", "vm-2026-01-02.vma.zst")
        assert reason(told) == ""
        assert told["base"]["archive"].endswith("/vm-2026-01-01.vma")
        assert told["transfer"]["sent_bytes"] <= 1.1 * 2 * 65536
        assert told["stored"]["base_bytes"] > 140 * 65536
        assert told["progress"]["devices"][0]["unchanged_bytes"] > 140 * 65536
        # Another client's archive of that machine is none of its own; nor does it hear of it.
        bob = ("--archiver", served.endpoint, "--keys", str(clients["bob"]), "--base", "auto")
        told = backup((*bob, "--disk", f"a={other}"), "vm-2026-01-03.vma")
        assert "no earlier archive of vm" in reason(told)
        assert str(store) not in json.dumps(told)
        told = backup((*words, "--full-every", "1"), "vm-2026-01-03.vma.zst", "--compress", "zstd")
        assert "(--full-every 1)" in reason(told)
        # Damage is found where the data is used; a full backup follows by itself.
        flip(store / "alice" / "vm-2026-01-03.vma.zst", 3 << 20)
        told = backup(words, "vm-2026-01-04.vma")
        assert "This is a full backup instead" in told["notice"]["text"]
        assert str(store) not in json.dumps(told)
        served.stop()
    second = subprocess.run(
        [zstd, "-dc", store / "alice" / "vm-2026-01-02.vma.zst"], capture_output=True, check=True
    ).stdout
    assert read_images(second) == {"a": disk.read_bytes()}
    assert restored(store / "alice" / "vm-2026-01-04.vma", tmp_path / "out") == disk.read_bytes()
    of_bob = (store / "bob" / "vm-2026-01-03.vma").read_bytes()
    assert read_images(of_bob) == {"a": other.read_bytes()}


def test_clients_that_share_a_folder_have_no_base_and_cannot_name_one(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", "A" * 10)
    with serving(tmp_path / "store") as served:
        words = (*served.words, "--disk", f"a={disk}")
        backup(words, "vm-2026-01-01.vma")
        told = backup(words, "--base", "auto", "vm-2026-01-02.vma")
        assert "clients share a folder" in reason(told)
        said = bad("backup", *words, "--base", "vm-2026-01-01.vma", "vm-2026-01-03.vma", code=2)
        assert "auto or none" in said
        said = bad("backup", *words, "vm-2026-01-03.vma.digests", code=2)
        assert "digests" in said
        served.stop()
