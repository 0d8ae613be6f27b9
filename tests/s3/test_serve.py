# SPDX-License-Identifier: Apache-2.0
"""Archives in a store, served by ranges of their objects."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

from tests.access.serving import serving
from tests.access.sessions import FSTAB, make_archives, run_session, sessions
from tests.machine import Need, bad, good, make_disk
from tests.protocol.nbd.client import Client
from tests.s3.proxy import FaultyProxy
from tests.s3.server import BUCKET, S3Server
from vmapipe.crypt.keys import X25519Identity, encode_bech32


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


@pytest.mark.parametrize("words", [(), ("--compress", "zstd")], ids=["plain", "zstd"])
def test_a_store_that_fails_for_a_while_is_no_damage_and_is_read_when_it_is_back(
    s3: S3Server,
    proxy: FaultyProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(random.Random(3).randbytes(8 << 20))
    archive = f"s3://{BUCKET}/away-{len(words)}.vma"
    good("backup", "--quiet", "--disk", f"a={disk}", *words, archive)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with serving(tmp_path / "s", archive) as served, Client(tmp_path / "s", "a") as client:
        proxy.plan(f"GET .*away-{len(words)}.vma ", "503", times=1000)
        with pytest.raises(OSError) as caught:  # noqa: PT011  its number is looked at
            client.read(5 << 20, 4096)
        assert caught.value.errno == errno.EIO
        proxy.faults[-1].times = 0
        assert client.read_all(1 << 20) == disk.read_bytes()
    assert "damaged" not in served.said
    assert "503" in served.said


def test_an_encrypted_and_signed_object_is_read_with_its_key_and_copied_with_all_that_proves_it(
    s3: S3Server, tmp_path: Path
) -> None:
    secret, key = bytes(range(32)), tmp_path / "key"
    key.write_text(encode_bech32("age-secret-key-", secret).upper())
    key.chmod(0o600)
    good("keygen", "--sign", tmp_path / "sign")
    disk = make_disk(tmp_path / "disk", "AAp0hhAp" * 4, 777)
    name = "vm-2026-01-01.vma.zst.age"
    archive = f"s3://{BUCKET}/{name}"
    good(
        *("backup", "--quiet", "--disk", f"a={disk}", "--compress", "zstd"),
        *("--encrypt-to", X25519Identity(secret).recipient.text),
        *("--sign", tmp_path / "sign", archive),
    )
    assert b"encrypted   yes" in good("list", "--identity", key, archive)
    assert "--identity FILE" in bad("restore", archive, tmp_path / "no")
    assert "--identity FILE" in bad("files", "ls", archive)
    content = disk.read_bytes()
    with (
        serving(tmp_path / "s", archive, "--identity", str(key)) as served,
        Client(tmp_path / "s", "a") as client,
    ):
        assert client.read(70000, 9000) == content[70000:79000]
        assert client.read_all(1 << 20) == content
    assert "no manifest" not in served.said
    (tmp_path / "folder").mkdir()
    good("copy", "--quiet", archive, tmp_path / "folder")
    asked = ("--signed-by", tmp_path / "sign.pub", "--identity", key)
    good("verify", "--quiet", "--require-manifest", *asked, tmp_path / "folder" / name)
    good("restore", "--quiet", *asked, archive, tmp_path / "out")
    assert (tmp_path / "out" / "disk-a.raw").read_bytes() == content
    raw = s3.data(f"{name}.manifest.json")
    s3.put(f"{name}.manifest.json", raw.replace(b'"sealed"', b'"Sealed"', 1))
    assert "is not the one that was signed" in bad("verify", *asked, archive, code=4)


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
