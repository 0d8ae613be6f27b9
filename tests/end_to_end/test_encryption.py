# SPDX-License-Identifier: Apache-2.0
"""Archives that only the holder of a key can read: made, read, damaged, and read without us."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.machine import (
    LIMIT_S,
    VMA,
    Need,
    bad,
    good,
    listens,
    make_disk,
    run,
    sha256,
    started,
)
from vmapipe.crypt.age import SEALED_CHUNK_BYTES
from vmapipe.crypt.keys import X25519Identity, encode_bech32
from vmapipe.crypt.primitives import openssh_file
from vmapipe.restore.archive.compressed import ReadOptions
from vmapipe.restore.archive.decrypt import read_identities
from vmapipe.restore.verify.report import Report
from vmapipe.restore.verify.verify import VerifyOptions, verify
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.events import ignore

SECRET_WORDS = (b"secret-disk", b"secret.conf", b"hostname-of-the-guest")


class Encrypted(NamedTuple):
    """A folder with a disk, keys, and its archives: `vm.vma.age`, `vm.vma.zst.age`."""

    folder: Path
    disk: Path
    age_key: Path
    ssh_key: Path
    other_key: Path

    @property
    def plain(self) -> Path:
        return self.folder / "vm.vma.age"

    @property
    def zstd(self) -> Path:
        return self.folder / "vm.vma.zst.age"


def _age_key(path: Path, seed: int) -> str:
    """Write an identity file; return its recipient."""
    identity = X25519Identity(bytes([seed]) * 32)
    secret = encode_bech32("age-secret-key-", bytes([seed]) * 32).upper()
    path.write_text(f"# public key: {identity.recipient.text}\n{secret}\n")
    path.chmod(0o600)
    return identity.recipient.text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, need: Need) -> Encrypted:
    need("ssh-keygen")
    folder = tmp_path_factory.mktemp("age")
    disk = make_disk(folder / "disk.raw", "A0hpAA" * 36 + "AAAhp", tail_bytes=4097)
    found = Encrypted(folder, disk, *(folder / name for name in ("key", "ssh", "other")))
    recipient = _age_key(found.age_key, 1)
    _age_key(found.other_key, 2)
    found.ssh_key.write_bytes(openssh_file(bytes([3]) * 32))
    found.ssh_key.chmod(0o600)
    public = subprocess.run(
        ["ssh-keygen", "-y", "-f", found.ssh_key], capture_output=True, text=True, check=True
    ).stdout.strip()
    recipients = folder / "recipients"
    recipients.write_text(f"# who may read\n{recipient}\n\n{public} me@here\n")
    config = folder / "secret.conf"
    config.write_text("name: hostname-of-the-guest\n")
    for archive, more in ((found.plain, ()), (found.zstd, ("--compress", "zstd"))):
        good(
            *("backup", "--disk", f"secret-disk={disk}", "--config", config, *more),
            *("--encrypt-to", f"@{recipients}", archive),
        )
    return found


def identities(*paths: Path) -> ReadOptions:
    return ReadOptions(identities=read_identities([str(path) for path in paths])[0])


def verified(archive: Path, *keys: Path) -> Report:
    with contextlib.closing(Cancel()) as cancel:
        return verify(str(archive), ignore, cancel, VerifyOptions(read=identities(*keys)))


def test_age_and_zstd_restore_what_was_stored_without_us(made: Encrypted, need: Need) -> None:
    age, zstd = need("age", "zstd")
    for key in (made.age_key, made.ssh_key):
        plain = subprocess.run([age, "-d", "-i", key, made.plain], capture_output=True, check=True)
        packed = subprocess.run([age, "-d", "-i", key, made.zstd], capture_output=True, check=True)
        unpacked = subprocess.run(
            [zstd, "-d"], input=packed.stdout, capture_output=True, check=True
        )
        for raw in (plain.stdout, unpacked.stdout):
            out = made.folder / "plain.vma"
            out.write_bytes(raw)
            assert b"secret-disk" in good("list", out)
    # The sealed part of the manifest, too.
    document = json.loads(Path(f"{made.zstd}.manifest.json").read_bytes())
    sealed = b"".join(map(base64.b64decode, document["sealed"]))
    inner = subprocess.run(
        [age, "-d", "-i", made.age_key], input=sealed, capture_output=True, check=True
    )
    assert json.loads(inner.stdout)["devices"][0]["name"] == "secret-disk"


def test_nothing_that_lies_beside_an_archive_tells_what_is_in_it(made: Encrypted) -> None:
    for archive in (made.plain, made.zstd):
        beside = sorted(path.name for path in made.folder.glob(f"{archive.name}*"))
        assert beside == [archive.name, f"{archive.name}.manifest.json"]
        for name in beside:
            raw = (made.folder / name).read_bytes()
            assert not [word for word in SECRET_WORDS if word in raw]
        seen = json.loads((made.folder / beside[1]).read_bytes())
        assert set(seen) == {
            *("format", "version", "encryption", "algorithm", "sealed", "sealed_bytes", "file")
        }


@pytest.mark.parametrize("kind", ["plain", "zstd"])
def test_with_either_key_all_of_it_is_listed_checked_and_restored(
    made: Encrypted, tmp_path: Path, kind: str
) -> None:
    archive = getattr(made, kind)
    listed = good("list", "--identity", made.ssh_key, archive)
    assert b"secret-disk" in listed
    assert b"encrypted   yes" in listed
    assert b"seekable    yes" in listed
    assert b"hostname-of-the-guest" in good("config", "--identity", made.age_key, archive)
    report = verified(archive, made.other_key, made.age_key)
    assert report.ok
    assert report.data_checked
    good("restore", "--identity", made.age_key, archive, tmp_path / "out")
    assert sha256(tmp_path / "out" / "disk-secret-disk.raw") == sha256(made.disk)
    with archive.open("rb") as pipe:
        good("restore", "--identity", made.age_key, "-", tmp_path / "piped", stdin=pipe)
    assert sha256(tmp_path / "piped" / "disk-secret-disk.raw") == sha256(made.disk)


@pytest.mark.parametrize("kind", ["plain", "zstd"])
def test_any_place_of_it_is_served(made: Encrypted, tmp_path: Path, kind: str, need: Need) -> None:
    (compare,) = need("qemu-img")
    socket = tmp_path / "s.sock"
    words: list[str | Path]
    words = ["serve", "--listen", socket, "--identity", made.age_key, "--index-cache", tmp_path]
    with started(*words, getattr(made, kind)):
        deadline = time.monotonic() + LIMIT_S
        while not listens(socket):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        done = subprocess.run(
            [
                compare,
                "compare",
                "-f",
                "raw",
                "-F",
                "raw",
                f"nbd+unix:///secret-disk?socket={socket}",
                made.disk,
            ],
            capture_output=True,
            timeout=LIMIT_S,
        )
    assert done.returncode == 0, done.stdout
    # An index would tell of it.
    assert [path.name for path in tmp_path.iterdir() if path != socket] == []


def test_the_drop_in_takes_a_key_too(made: Encrypted) -> None:
    listed = good("list", "--identity", made.age_key, made.zstd, tool=VMA)
    assert b"devname: secret-disk" in listed
    good("verify", made.zstd, "--identity", made.age_key, tool=VMA)
    done = run("verify", made.zstd, tool=VMA)
    assert done.returncode == 0
    assert b"only the stored file" in done.stderr


def test_without_a_key_the_stored_file_is_checked_and_that_this_is_all_is_said(
    made: Encrypted, tmp_path: Path
) -> None:
    said = good("verify", "--require-manifest", made.zstd).decode()
    assert "that is all that can be checked without a key" in said
    assert "encrypted" in good("list", made.zstd).decode()
    assert json.loads(good("list", "--json", made.zstd)) == {"encrypted": True}
    commands: list[list[str | Path]] = [
        ["restore", made.zstd, tmp_path / "out"],
        ["config", made.zstd],
        ["serve", made.zstd, "--listen", tmp_path / "s"],
    ]
    for words in commands:
        assert "name a file with a key" in bad(*words)
    copy = tmp_path / "vm.vma.zst.age"
    copy.write_bytes(made.zstd.read_bytes())
    assert "there is no manifest" in bad("verify", copy)
    manifest = Path(f"{copy}.manifest.json")
    manifest.write_bytes(Path(f"{made.zstd}.manifest.json").read_bytes())
    raw = bytearray(copy.read_bytes())
    raw[len(raw) // 2] ^= 1
    copy.write_bytes(raw)
    assert not verified(copy).ok
    manifest.write_bytes(manifest.read_bytes()[:-9])
    assert "manifest" in bad("verify", copy, code=4)


def test_a_wrong_key_and_files_that_hold_none_are_refused_before_anything_is_read(
    made: Encrypted, tmp_path: Path
) -> None:
    text = bad("restore", "--identity", made.other_key, made.zstd, tmp_path / "out")
    assert "none of the given keys opens it" in text
    assert not (tmp_path / "out").exists()
    assert "none of the given keys" in bad("verify", "--identity", made.other_key, made.zstd)
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")
    assert "no key" in bad("list", "--identity", empty, made.zstd, code=2)
    assert "No such file" in bad("list", "--identity", tmp_path / "absent", made.zstd, code=2)
    open_key = tmp_path / "open"
    open_key.write_text(made.age_key.read_text())
    open_key.chmod(0o644)
    done = run("list", "--identity", open_key, made.zstd)
    assert done.returncode == 0
    assert b"other users can read this secret key" in done.stderr


@pytest.mark.parametrize(
    ("recipient", "words"),
    [
        ("age1nobody", "--encrypt-to age1nobody"),
        ("@/nowhere/recipients", "cannot be read"),
        ("@/dev/null", "no recipient"),
        ("", "a recipient is age1"),
        ("AGE-SECRET-KEY-1" + "Q" * 40, "secret key"),
    ],
)
def test_a_recipient_that_cannot_be_used_ends_a_backup_before_it_begins(
    made: Encrypted, tmp_path: Path, recipient: str, words: str
) -> None:
    (tmp_path / "store").mkdir()
    text = bad(
        *("backup", "--qmp", tmp_path / "never.sock", "--encrypt-to", recipient),
        tmp_path / "store" / "x.vma.age",
        code=2,
    )
    assert words in text
    assert "QQQQ" not in text
    assert list((tmp_path / "store").iterdir()) == []


@pytest.mark.parametrize("option", ["--stable", "--reproducible"])
def test_what_cannot_be_had_together_with_encryption_is_refused(
    made: Encrypted, tmp_path: Path, option: str
) -> None:
    words: list[str | Path]
    words = ["backup", "--disk", made.disk, "--encrypt-to", f"@{made.folder}/recipients"]
    assert "exclude each other" in bad(*words, option, tmp_path / "x.age", code=2)


def test_what_is_encrypted_is_stored_in_the_clear_only_when_that_is_said(
    made: Encrypted, tmp_path: Path
) -> None:
    key, new = ("--identity", made.age_key), tmp_path / "new.vma"
    assert "--decrypt stores it in the clear" in bad("repack", *key, made.zstd, new, code=2)
    assert "would tell what it hides" in bad(
        "manifest", *key, "--manifest", tmp_path / "m", made.zstd, code=2
    )
    assert list(tmp_path.iterdir()) == []
    good("repack", "--quiet", "--decrypt", *key, made.zstd, new)
    good("verify", "--quiet", "--require-manifest", new)
    again = tmp_path / "again.vma.age"
    good("repack", "--quiet", *key, "--encrypt-to", f"@{made.folder}/recipients", made.zstd, again)
    good("verify", "--quiet", "--require-manifest", *key, again)
    assert b"secret-disk" not in again.read_bytes() + Path(f"{again}.manifest.json").read_bytes()


# --- Damage ---


def _flipped(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def _start(raw: bytes) -> int:
    """Where the payload's first chunk begins."""
    return raw.index(b"\n--- ") + len("\n--- ") + 43 + 1 + 16


# A chunk behind the first frame, which the archive's own header is in.
LATE = 80


def _exchanged(raw: bytes) -> bytes:
    at, step = _start(raw) + LATE * SEALED_CHUNK_BYTES, SEALED_CHUNK_BYTES
    return raw[:at] + raw[at + step : at + 2 * step] + raw[at : at + step] + raw[at + 2 * step :]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a flipped bit": (lambda raw: _flipped(raw, len(raw) * 2 // 3), "file offset"),
    "a bit at the end": (lambda raw: _flipped(raw, len(raw) - 1), ""),
    "chunks exchanged": (_exchanged, "file offset"),
    "cut in a chunk": (lambda raw: raw[: len(raw) - 5], ""),
    "cut between chunks": (
        lambda raw: raw[: _start(raw) + 10 * SEALED_CHUNK_BYTES],
        "it is cut off",
    ),
    "bytes behind it": (lambda raw: raw + b"x" * 100, ""),
    "a chunk behind it": (lambda raw: raw + raw[-SEALED_CHUNK_BYTES:], ""),
}


@pytest.mark.parametrize("kind", ["plain", "zstd"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_told_by_offset_and_nothing_is_published(
    made: Encrypted, tmp_path: Path, kind: str, damage: str
) -> None:
    change, words = DAMAGES[damage]
    archive = tmp_path / getattr(made, kind).name
    archive.write_bytes(change(getattr(made, kind).read_bytes()))
    for with_manifest in (False, True):
        if with_manifest:
            manifest = Path(f"{getattr(made, kind)}.manifest.json")
            Path(f"{archive}.manifest.json").write_bytes(manifest.read_bytes())
        report = verified(archive, made.age_key)
        texts = "\n".join(map(str, report.damage))
        assert not report.ok
        assert "the encrypted data is damaged" in texts
        assert words in texts
    if damage == "a flipped bit":
        bad("restore", "--identity", made.age_key, archive, tmp_path / "out")
        left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        assert left == []


@pytest.mark.parametrize("kind", ["plain", "zstd"])
def test_a_salvage_goes_on_behind_damaged_chunks_and_names_what_is_lost(
    made: Encrypted, tmp_path: Path, kind: str
) -> None:
    archive = tmp_path / getattr(made, kind).name
    raw = getattr(made, kind).read_bytes()
    archive.write_bytes(_flipped(raw, _start(raw) + LATE * SEALED_CHUNK_BYTES + 77))
    out = tmp_path / "out"
    run("restore", "--salvage", "--identity", made.age_key, archive, out)
    saved, disk = (out / "disk-secret-disk.raw").read_bytes(), made.disk.read_bytes()
    assert len(saved) == len(disk)
    told = json.loads((out / "vmapipe-salvage.json").read_bytes())
    lost = bytearray(len(disk))
    for one in told["devices"][0]["ranges"]:
        end = one["offset"] + one["length"] if one["length"] else len(disk)
        lost[one["offset"] : end] = b"\1" * (end - one["offset"])
    assert 0 < sum(lost) < len(disk)
    for at in range(0, len(disk), 4096):
        if not any(lost[at : at + 4096]):
            assert saved[at : at + 4096] == disk[at : at + 4096], at


def test_a_header_that_was_changed_is_told(made: Encrypted, tmp_path: Path) -> None:
    archive = tmp_path / "vm.vma.age"
    raw = made.plain.read_bytes()
    archive.write_bytes(_flipped(raw, raw.index(b"\n--- ") + 7))
    assert "damaged" in bad("verify", "--identity", made.age_key, archive, code=4)
    archive.write_bytes(raw[:100])
    told = bad("verify", "--identity", made.age_key, archive, code=4)
    assert "header" in told
    assert told.count(archive.name) == 1, told


def test_an_age_file_inside_an_age_file_is_told(
    made: Encrypted, tmp_path: Path, need: Need
) -> None:
    need("age")
    twice = tmp_path / "vm.vma.age"
    recipient = X25519Identity(bytes([1]) * 32).recipient.text
    subprocess.run(["age", "-r", recipient, "-o", twice, made.plain], check=True)
    for words in (("verify",), ("list",), ("restore", "--quiet")):
        more = (tmp_path / "out",) if words[0] == "restore" else ()
        told = bad(*words, "--identity", made.age_key, twice, *more)
        assert "an age file inside an age file: decrypt it once" in told


def test_no_secret_stands_on_a_command_line_and_no_core_is_dumped(
    made: Encrypted, tmp_path: Path
) -> None:
    socket = tmp_path / "s.sock"
    with started("serve", "--listen", socket, "--identity", made.age_key, made.zstd) as process:
        deadline = time.monotonic() + LIMIT_S
        while not listens(socket):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        line = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        limits = Path(f"/proc/{process.pid}/limits").read_text()
    assert b"AGE-SECRET" not in line
    core = next(text for text in limits.splitlines() if "core file" in text)
    assert core.split()[4] in ("0", "1")


def test_an_encrypted_archive_is_no_base_and_the_backup_is_full(
    made: Encrypted, tmp_path: Path
) -> None:
    said = run(*("backup", "--disk", f"d={made.disk}", "--base", made.plain, tmp_path / "n.vma"))
    assert said.returncode == 0, said.stderr
    assert b"is encrypted: a base is read" in said.stdout + said.stderr
    assert os.path.exists(tmp_path / "n.vma")


@pytest.mark.soak
def test_a_tebibyte_of_holes_is_encrypted_and_read_in_constant_memory(
    made: Encrypted, tmp_path: Path
) -> None:
    holes, archive = tmp_path / "holes.raw", tmp_path / "holes.vma.age"
    peaks = []
    for size in (64 << 30, 1 << 40):
        holes.touch()
        os.truncate(holes, size)
        said = good(
            *("backup", "--json", "--disk", f"d={holes}"),
            *("--encrypt-to", f"@{made.folder}/recipients", archive),
            timeout=300,
        )
        events = [json.loads(line) for line in said.splitlines()]
        peaks.append(events[-1]["peak_rss_bytes"])
        assert verified(archive, made.age_key).ok
        archive.unlink()
        Path(f"{archive}.manifest.json").unlink()
    assert peaks[1] < 1.2 * peaks[0]
