# SPDX-License-Identifier: Apache-2.0
"""Archives whose maker is known: a forged, exchanged or unsigned one is told."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.machine import Need, bad, good, make_disk, run
from vmapipe.crypt.sshsig import parse_publics
from vmapipe.restore.verify.signature import SignatureError, check_signature, read_publics
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError

MANIFEST, SIGNATURE = ".manifest.json", ".manifest.json.sig"


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: `key`, `key.pub`, `other.pub`; `vm.vma` and `vm.vma.age`, signed; `b.vma`, signed, too."""
    folder = tmp_path_factory.mktemp("signed")
    disk = make_disk(folder / "disk.raw", "A0hpA" * 3)
    other = make_disk(folder / "disk2.raw", "A0hpA" * 3, seed=2)
    good("keygen", "--sign", folder / "key")
    good("keygen", "--sign", folder / "other")
    recipient = (folder / "other.pub").read_text().strip()
    for archive, source, more in (
        ("vm.vma", disk, ()),
        ("b.vma", other, ()),
        ("vm.vma.age", disk, ("--encrypt-to", recipient)),
    ):
        words = ("backup", "--disk", f"d={source}", "--sign", folder / "key", *more)
        good(*words, folder / archive)
    return folder


def checked(archive: Path, key: Path) -> str:
    with contextlib.closing(Cancel()) as cancel:
        return check_signature(str(archive), None, read_publics([str(key)]), cancel).fingerprint


def test_openssh_checks_the_manifest_and_sha256sum_the_archive(signed: Path, need: Need) -> None:
    keygen, sha256sum = need("ssh-keygen", "sha256sum")
    (signed / "allowed").write_text(f"host1 {(signed / 'key.pub').read_text()}")
    for name in ("vm.vma", "vm.vma.age"):
        manifest = signed / f"{name}{MANIFEST}"
        words: list[str | Path] = [
            "-Y",
            "verify",
            "-f",
            signed / "allowed",
            "-I",
            "host1",
            "-n",
            "vmapipe-manifest",
        ]
        with manifest.open("rb") as file:
            done = subprocess.run(
                [keygen, *words, "-s", f"{manifest}.sig"], stdin=file, capture_output=True
            )
        assert done.returncode == 0, done.stderr
        digest = subprocess.run([sha256sum, signed / name], capture_output=True, check=True)
        told = json.loads(manifest.read_bytes())["file"]["sha256"]
        assert digest.stdout.decode().split()[0] == told


def test_what_was_signed_is_verified_restored_and_named(signed: Path, tmp_path: Path) -> None:
    said = good("verify", "--signed-by", signed / "key.pub", signed / "vm.vma").decode()
    assert "signed by ssh-ed25519 SHA256:" in said
    good("restore", "--signed-by", signed / "key.pub", signed / "vm.vma", tmp_path / "out")
    assert (tmp_path / "out" / "disk-d.raw").read_bytes() == (signed / "disk.raw").read_bytes()
    # Of an encrypted one without its key, too: only the stored file is looked at.
    assert checked(signed / "vm.vma.age", signed / "key.pub").startswith("SHA256:")
    place = tmp_path / "place"
    place.mkdir()
    for name in ("vm.vma", "b.vma"):
        for path in signed.glob(f"{name}*"):
            shutil.copy(path, place)
    listed = ("list", "--signed-by", signed / "key.pub", place)
    assert b"SIGNED" in good(*listed)
    (place / f"b.vma{SIGNATURE}").unlink()
    shutil.copy(signed / "b.vma", place / "vm.vma")
    done = run("list", "--json", *listed[1:])
    assert done.returncode == 4
    assert b"2 of 3 archives are not signed as --signed-by asks" in done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    words = {Path(row["archive"]).name: row["signed"] for row in rows}
    assert words == {"b.vma": "no", "vm.vma": "other", "vm.vma.age": "yes"}
    good("verify", signed / "vm.vma")  # a signature is no hindrance to who asks for none


def _exchange(folder: Path, *suffixes: str) -> None:
    for suffix in suffixes:
        shutil.copy(folder / f"b.vma{suffix}", folder / f"vm.vma{suffix}")


def _replace(folder: Path, suffix: str, old: bytes, new: bytes) -> None:
    path = folder / f"vm.vma{suffix}"
    raw = path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new, 1))


def _flip_data(folder: Path) -> None:
    path = folder / "vm.vma"
    raw = bytearray(path.read_bytes())
    raw[-600] ^= 1
    path.write_bytes(raw)


FORGERIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "the archive exchanged": (lambda f: _exchange(f, ""), "is not the archive that was signed"),
    "its manifest exchanged": (lambda f: _exchange(f, MANIFEST), "is not the one that was signed"),
    "its signature exchanged": (
        lambda f: _exchange(f, SIGNATURE),
        "is not the one that was signed",
    ),
    "archive and manifest exchanged": (
        lambda f: _exchange(f, "", MANIFEST),
        "is not the one that was signed",
    ),
    "manifest and signature exchanged": (
        lambda f: _exchange(f, MANIFEST, SIGNATURE),
        "is not the archive that was signed",
    ),
    "a byte of the data": (_flip_data, "is not the archive that was signed"),
    "a byte of the manifest": (
        lambda f: _replace(f, MANIFEST, b'"name": "d"', b'"name": "e"'),
        "is not the one that was signed",
    ),
    "no signature": (lambda f: (f / f"vm.vma{SIGNATURE}").unlink(), "is not signed"),
    "no manifest": (lambda f: (f / f"vm.vma{MANIFEST}").unlink(), "is not signed"),
    "junk for a signature": (
        lambda f: _replace(f, SIGNATURE, b"BEGIN SSH", b"BEGIN"),
        "not a signature",
    ),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_what_was_forged_exchanged_or_is_unsigned_is_told(
    signed: Path, tmp_path: Path, forgery: str
) -> None:
    for path in signed.iterdir():
        if path.name.startswith(("vm.vma", "b.vma")):
            shutil.copy(path, tmp_path / path.name)
    change, words = FORGERIES[forgery]
    assert checked(tmp_path / "vm.vma", signed / "key.pub")
    change(tmp_path)
    with pytest.raises(SignatureError, match=words):
        checked(tmp_path / "vm.vma", signed / "key.pub")
    if forgery == "the archive exchanged":
        out = tmp_path / "out"
        asked = ("--signed-by", signed / "key.pub", tmp_path / "vm.vma")
        assert words in bad("restore", *asked, out, code=4)
        assert words in bad("files", "ls", *asked, code=4)
        assert not out.exists()


def test_another_key_and_files_without_a_key_are_told(signed: Path, tmp_path: Path) -> None:
    with pytest.raises(SignatureError, match="signed by another key"):
        checked(signed / "vm.vma", signed / "other.pub")
    with pytest.raises(UsageError, match="no ssh-ed25519"):
        checked(signed / "vm.vma", Path("/dev/null"))
    assert parse_publics((signed / "key.pub").read_text())
    words = ("backup", "--disk", signed / "disk.raw", "--sign")
    no_key = tmp_path / "no-key"
    no_key.write_text("hello")
    no_key.chmod(0o600)
    assert "not an OpenSSH" in bad(*words, no_key, tmp_path / "x.vma", code=2)
    (tmp_path / "wide").write_bytes((signed / "key").read_bytes())
    (tmp_path / "wide").chmod(0o644)
    assert "other users" in bad(*words, tmp_path / "wide", tmp_path / "x.vma", code=2)
    assert "has to be a file" in bad(*words, signed / "key", "-", code=2)
    assert not (tmp_path / "x.vma").exists()
    assert "never overwritten" in bad("keygen", "--sign", signed / "key")
