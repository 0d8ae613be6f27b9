# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.crypt.age import AgeError
from vmapipe.crypt.keys import (
    SshEd25519Identity,
    X25519Identity,
    X25519Recipient,
    decode_bech32,
    encode_bech32,
    parse_identities,
    parse_recipient,
    parse_recipients,
)
from vmapipe.crypt.primitives import ed25519_public, openssh_file

# Of age's own documentation.
RECIPIENT = "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj"
SEED = bytes(range(32))


@given(st.sampled_from(["age", "age-secret-key-"]), st.binary(min_size=1, max_size=80))
def test_bech32_comes_back_in_both_cases_and_no_single_mistake_is_missed(
    prefix: str, raw: bytes
) -> None:
    text = encode_bech32(prefix, raw)
    assert decode_bech32(text) == (prefix, raw)
    assert decode_bech32(text.upper()) == (prefix, raw)
    for at in range(0, len(text), 7):
        other = text[:at] + ("q" if text[at] != "q" else "p") + text[at + 1 :]
        with pytest.raises(AgeError):
            decode_bech32(other)


def test_the_recipient_of_ages_documentation_is_read_and_written_the_same() -> None:
    recipient = parse_recipient(RECIPIENT)
    assert isinstance(recipient, X25519Recipient)
    assert recipient.text == RECIPIENT


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a recipient is age1"),
        ("age", "a recipient is age1"),
        (RECIPIENT[:-1], "checksum"),
        (RECIPIENT.replace("z", "Z", 1), "capital and small"),
        ("age1" + "q" * 5000, "too long"),
        ("age1tag1qqqqqqqqqqq", "."),
        (encode_bech32("age1pq", bytes(32)), "plugin"),
        (encode_bech32("age", bytes(31)), "wrong length"),
        (encode_bech32("age", bytes(32)), "not a valid public key"),
        ("ssh-rsa AAAAB3NzaC1yc2E=", "only ssh-ed25519"),
        ("ssh-ed25519 AAAA", "not a valid ssh-ed25519"),
        ("ssh-ed25519 ", "not an ssh-ed25519"),
        ("github:somebody", "a recipient is age1"),
    ],
)
def test_a_recipient_that_cannot_be_used_is_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(AgeError, match=words):
        parse_recipient(text)


def test_a_secret_key_as_a_recipient_is_refused_and_not_repeated() -> None:
    secret = encode_bech32("age-secret-key-", SEED).upper()
    with pytest.raises(AgeError, match="secret key") as found:
        parse_recipient(secret)
    assert secret[20:] not in str(found.value)


def test_files_of_recipients_have_comments_and_name_the_line_that_is_wrong() -> None:
    text = f"# of the office\n\n{RECIPIENT}\n  {RECIPIENT} \r\n"
    assert [recipient.text for recipient in parse_recipients(text)] == [RECIPIENT] * 2
    with pytest.raises(AgeError, match="line 2"):
        parse_recipients(f"{RECIPIENT}\nage1x\n")
    for empty in ("", "\n\n", "# nobody\n"):
        with pytest.raises(AgeError, match="no recipient"):
            parse_recipients(empty)


def test_identities_are_read_with_comments_and_a_wrong_one_is_never_repeated() -> None:
    secret = encode_bech32("age-secret-key-", SEED).upper()
    (found,) = parse_identities(f"# created: today\n# public key: {RECIPIENT}\n{secret}\n")
    assert isinstance(found, X25519Identity)
    assert found.recipient == X25519Identity(SEED).recipient
    with pytest.raises(AgeError, match="line 2") as error:
        parse_identities(f"# x\n{secret[:-1]}Q\n")
    assert secret[20:40] not in str(error.value)
    for text, words in (
        ("", "no key"),
        (RECIPIENT, "public key"),
        ("AGE-PLUGIN-YUBIKEY-1QQQQ", "plugin"),
        ("age-encryption.org/v1\n-> scrypt", "passphrase"),
        ("-----BEGIN AGE ENCRYPTED FILE-----\n", "passphrase"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n", "damaged"),
    ):
        with pytest.raises(AgeError, match=words):
            parse_identities(text)


def test_openssh_keys_are_read_and_those_with_a_passphrase_refused(
    tmp_path: Path, need: Callable[..., list[str]]
) -> None:
    keygen = need("ssh-keygen")
    for name, kind, phrase in (
        ("plain", "ed25519", ""),
        ("locked", "ed25519", "secret"),
        ("ecdsa", "ecdsa", ""),
    ):
        subprocess.run([*keygen, "-q", "-t", kind, "-N", phrase, "-f", tmp_path / name], check=True)
    (identity,) = parse_identities((tmp_path / "plain").read_text())
    assert isinstance(identity, SshEd25519Identity)
    assert identity.recipient == parse_recipient((tmp_path / "plain.pub").read_text().strip())
    with pytest.raises(AgeError, match="passphrase"):
        parse_identities((tmp_path / "locked").read_text())
    with pytest.raises(AgeError, match="not an ssh-ed25519 key"):
        parse_identities((tmp_path / "ecdsa").read_text())
    ours = tmp_path / "ours"
    ours.write_bytes(openssh_file(SEED))
    ours.chmod(0o600)
    shown = subprocess.run([*keygen, "-y", "-f", ours], capture_output=True, text=True, check=True)
    assert parse_recipient(shown.stdout.strip()) == SshEd25519Identity(SEED).recipient
    assert SshEd25519Identity(SEED).recipient.public == ed25519_public(SEED)
