# SPDX-License-Identifier: Apache-2.0
"""Bases that are objects: read by ranges, held against their manifests, and what is made of them goes up whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.archiver.changing import change
from tests.archiver.job.world import read_images
from tests.archiver.service.serving import make_keys, serving
from tests.machine import good, make_disk
from tests.s3.server import BUCKET, S3Server
from vmapipe.archiver.base.check import check_base

FOLDER = f"s3://{BUCKET}/vm"


def backup(*words: str | Path) -> dict[str, dict[str, Any]]:
    """The last event of each name."""
    out = good("backup", "--json", "--base", "auto", *words)
    return {event["event"]: event for event in map(json.loads, out.splitlines())}


def reason(told: dict[str, dict[str, Any]]) -> str:
    return str(told["base"]["devices"][0]["reason"])


def test_what_has_not_changed_is_taken_from_an_object(s3: S3Server, tmp_path: Path) -> None:
    # More than a piece of what is read ahead.
    disk = make_disk(tmp_path / "disk", "A" * 300, tail_bytes=5000)
    words = ("--disk", f"a={disk}")
    assert "no earlier archive of vm" in reason(backup(*words, f"{FOLDER}/vm-2026-01-01.vma"))
    assert "vm/vm-2026-01-01.vma.digests" in s3.objects()
    change(disk, 3, 200)
    told = backup(*words, "--compress", "zstd:1", f"{FOLDER}/vm-2026-01-02.vma.zst")
    assert reason(told) == ""
    assert told["transfer"]["sent_bytes"] <= 1.1 * 2 * 65536
    change(disk, 4)
    told = backup(*words, "--compress", "zstd:1", f"{FOLDER}/vm-2026-01-03.vma.zst")
    assert told["base"]["archive"] == f"{FOLDER}/vm-2026-01-02.vma.zst"
    assert told["transfer"]["sent_bytes"] <= 1.1 * 65536
    # Into a file, of an object.
    told = backup(*words, "--base", f"{FOLDER}/vm-2026-01-03.vma.zst", tmp_path / "y.vma")
    assert reason(told) == ""
    assert told["transfer"]["sent_bytes"] == 0
    assert read_images((tmp_path / "y.vma").read_bytes()) == {"a": disk.read_bytes()}
    # Damage: a full backup by itself. Another object in its place: not what its manifest vouches for.
    raw = bytearray(s3.data("vm/vm-2026-01-03.vma.zst"))
    raw[len(raw) // 2] ^= 1
    s3.put("vm/vm-2026-01-03.vma.zst", bytes(raw))
    told = backup(*words, f"{FOLDER}/vm-2026-01-04.vma")
    assert "This is a full backup instead" in told["notice"]["text"]
    good("verify", "--require-manifest", f"{FOLDER}/vm-2026-01-04.vma")
    assert read_images(s3.data("vm/vm-2026-01-04.vma")) == {"a": disk.read_bytes()}
    s3.client.delete_object(Bucket=BUCKET, Key="vm/vm-2026-01-04.vma.manifest.json")
    assert "has no manifest" in str(check_base(f"{FOLDER}/vm-2026-01-04.vma"))
    assert s3.uploads() == []


def test_a_service_that_stores_in_a_store_has_a_base_there(s3: S3Server, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", "A" * 100)
    server, clients = make_keys(tmp_path, "alice")
    keys = (server, clients["alice"])
    with serving(tmp_path / "none", "--per-client", keys=keys, store=FOLDER) as served:
        words = (*served.words, "--disk", f"a={disk}")
        assert "no earlier archive" in reason(backup(*words, "vm-2026-01-01.vma"))
        change(disk, 3)
        told = backup(*words, "vm-2026-01-02.vma")
        assert reason(told) == ""
        assert told["transfer"]["sent_bytes"] <= 1.1 * 65536
        served.stop()
    assert read_images(s3.data("vm/alice/vm-2026-01-02.vma")) == {"a": disk.read_bytes()}
