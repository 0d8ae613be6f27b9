# SPDX-License-Identifier: Apache-2.0
"""A service that encrypts and signs whatever it stores."""

from __future__ import annotations

import os
from pathlib import Path

from tests.archiver.service.serving import serving
from tests.machine import bad, good, make_disk, sha256
from vmapipe.crypt.keys import X25519Identity, encode_bech32


def test_what_a_service_stores_is_encrypted_and_signed_whatever_its_client_says(
    tmp_path: Path,
) -> None:
    secret = os.urandom(32)
    recipient, key = X25519Identity(secret).recipient.text, tmp_path / "key"
    key.write_text(encode_bech32("age-secret-key-", secret).upper())
    key.chmod(0o600)
    good("keygen", "--sign", tmp_path / "sign")
    disk = make_disk(tmp_path / "disk.raw", "A0hpA" * 4)
    store = tmp_path / "store"
    options = ("--encrypt-to", recipient, "--sign", str(tmp_path / "sign"))
    with serving(store, *options) as service:
        words = ("backup", "--disk", f"secret-disk={disk}", *service.words)
        told = good(*words, "--no-manifest", "--compress", "zstd", "vm.vma.zst").decode()
        assert "vm.vma.zst.age" in told
        assert "[exists]" in bad(*words, "vm.vma.zst")
        # The service is the one that writes: it says to whom, and signs.
        assert "a service encrypts" in bad(*words, "--encrypt-to", recipient, "x.vma", code=2)
        assert "a service signs" in bad(*words, "--sign", tmp_path / "sign", "x.vma", code=2)
        for word in (tmp_path / "nowhere", "age1x"):
            bad(
                "archiver",
                "--listen",
                "tcp://127.0.0.1:*",
                "--insecure-plain-tcp",
                "--directory",
                store,
                "--encrypt-to",
                f"@{word}",
                code=2,
            )
        service.stop()
    archive = store / "vm.vma.zst.age"
    names = {path.name for path in store.iterdir() if not path.name.startswith(".")}
    assert names == {
        archive.name,
        f"{archive.name}.manifest.json",
        f"{archive.name}.manifest.json.sig",
    }
    assert not [name for name in names if b"secret-disk" in (store / name).read_bytes()]
    good("verify", "--signed-by", tmp_path / "sign.pub", "--identity", key, archive)
    good("restore", "--identity", key, archive, tmp_path / "out")
    assert sha256(tmp_path / "out" / "disk-secret-disk.raw") == sha256(disk)
