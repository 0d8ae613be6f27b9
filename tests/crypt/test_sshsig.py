# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmapipe.crypt.keys import SshEd25519Recipient
from vmapipe.crypt.primitives import ed25519_public, openssh_file
from vmapipe.crypt.sshsig import (
    NAMESPACE,
    SignatureFault,
    fingerprint,
    is_signed_by,
    parse_publics,
    parse_signature,
    sign,
)

SEED = bytes(range(32))
PUBLIC = ed25519_public(SEED)


def sha512(data: bytes) -> bytes:
    return hashlib.sha512(data).digest()


def test_openssh_checks_our_signatures_and_we_check_its(
    tmp_path: Path, need: Callable[..., list[str]]
) -> None:
    (keygen,) = need("ssh-keygen")
    data, key = tmp_path / "data", tmp_path / "key"
    data.write_bytes(b"a manifest\n")
    key.write_bytes(openssh_file(SEED))
    key.chmod(0o600)
    allowed = tmp_path / "allowed"
    allowed.write_text(f"host1 {SshEd25519Recipient(PUBLIC).text}\n")
    ours = tmp_path / "ours.sig"
    ours.write_text(sign(SEED, sha512(data.read_bytes())))
    words: list[str | Path] = [
        "-Y",
        "verify",
        "-f",
        allowed,
        "-I",
        "host1",
        "-n",
        NAMESPACE,
        "-s",
        ours,
    ]
    with data.open("rb") as file:
        done = subprocess.run([keygen, *words], stdin=file, capture_output=True)
    assert done.returncode == 0, done.stderr
    subprocess.run([keygen, "-q", "-Y", "sign", "-f", key, "-n", NAMESPACE, data], check=True)
    theirs = parse_signature(Path(f"{data}.sig").read_text())
    assert theirs.public == PUBLIC
    assert is_signed_by(theirs, sha512(data.read_bytes()))
    listed = subprocess.run([keygen, "-l", "-f", key], capture_output=True, text=True, check=True)
    assert fingerprint(PUBLIC) in listed.stdout
    assert parse_publics(allowed.read_text()) == [PUBLIC]
    # One that was made for another purpose proves nothing here.
    Path(f"{data}.sig").unlink()
    subprocess.run([keygen, "-q", "-Y", "sign", "-f", key, "-n", "git", data], check=True)
    with pytest.raises(SignatureFault, match="another purpose"):
        parse_signature(Path(f"{data}.sig").read_text())


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_no_change_of_a_signature_makes_it_one_of_other_data(data: st.DataObject) -> None:
    text = sign(SEED, sha512(b"true"))
    at = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(at, min(len(text), at + 40)))
    changed = text[:at] + data.draw(st.text(max_size=40)) + text[end:]
    try:
        found = parse_signature(changed)
    except SignatureFault:
        return
    assert not is_signed_by(found, sha512(b"forged"))
    if is_signed_by(found, sha512(b"true")):
        assert found.public == PUBLIC


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "-----BEGIN SSH SIGNATURE-----\n",
        "-----BEGIN SSH SIGNATURE-----\nAAAA\n-----END SSH SIGNATURE-----\n",
    ],
)
def test_what_is_no_signature_is_refused(text: str) -> None:
    with pytest.raises(SignatureFault, match="damaged"):
        parse_signature(text)


def test_a_file_without_a_public_key_is_refused() -> None:
    with pytest.raises(SignatureFault, match="no ssh-ed25519"):
        parse_publics("# nothing\n")
