# SPDX-License-Identifier: Apache-2.0
"""Archives in a store, served by ranges of their objects."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.access.serving import serving
from tests.access.sessions import FSTAB, make_archives, run_session, sessions
from tests.machine import Need, good, make_disk
from tests.protocol.nbd.client import Client
from tests.s3.server import BUCKET, S3Server


@pytest.mark.parametrize("words", [(), ("--compress", "zstd")], ids=["plain", "zstd"])
def test_an_object_is_served_by_ranges_and_checked(
    s3: S3Server, tmp_path: Path, words: tuple[str, ...]
) -> None:
    disk = make_disk(tmp_path / "disk", "AAp0hhAp" * 40, 777)
    archive = f"s3://{BUCKET}/serve-{len(words)}.vma"
    good("backup", "--quiet", "--disk", f"a={disk}", *words, archive)
    content = disk.read_bytes()
    chance = random.Random(8)
    with serving(tmp_path / "s", archive) as served, Client(tmp_path / "s", "a") as client:
        for _ in range(30):
            start = chance.randrange(len(content))
            length = min(len(content) - start, chance.choice([1, 5000, 300000]))
            assert client.read(start, length) == content[start : start + length]
        assert client.read_all(1 << 20) == content
    assert "no manifest" not in served.said


def test_the_session_of_the_page_runs_on_a_bucket_as_it_stands_there(
    s3: S3Server, tmp_path: Path, short_folder: Path, need: Need
) -> None:
    make_archives(tmp_path, need)
    for name in ("vm.vma.zst", "vm.vma.zst.manifest.json"):
        s3.client.put_object(Bucket=BUCKET, Key=name, Body=(tmp_path / name).read_bytes())
    (session,) = [session for session in sessions() if "s3://" in session.script]
    done = run_session(session.script, short_folder, tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().endswith(FSTAB)
    assert b"no manifest" not in done.stderr
