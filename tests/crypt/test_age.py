# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmapipe.crypt.age import (
    CHUNK_BYTES,
    MAX_HEADER_BYTES,
    NONCE_BYTES,
    SEALED_CHUNK_BYTES,
    AgeError,
    AgeIdentity,
    AgePayload,
    DamagedChunk,
    Encryptor,
    IncompleteHeader,
    NoKeyFits,
    Recipient,
    Stanza,
    chunk_count,
    decode_base64,
    encode_base64,
    encode_header,
    find_file_key,
    parse_header,
    plain_bytes,
)
from vmapipe.crypt.keys import SshEd25519Identity, X25519Identity
from vmapipe.crypt.magic import MAGIC
from vmapipe.crypt.primitives import openssh_file

IDENTITIES: list[X25519Identity | SshEd25519Identity] = [
    X25519Identity(bytes(range(32))),
    SshEd25519Identity(bytes(range(1, 33))),
]
RECIPIENTS: list[Recipient] = [identity.recipient for identity in IDENTITIES]
FILE_KEY = bytes(range(16))


def random_bytes_of(seed: int) -> Callable[[int], bytes]:
    return random.Random(seed).randbytes


def encrypted(plain: bytes, cuts: tuple[int, ...] = ()) -> bytes:
    encryptor = Encryptor(RECIPIENTS, random_bytes_of(1))
    edges = [0, *sorted(min(cut, len(plain)) for cut in cuts), len(plain)]
    pieces = [plain[a:b] for a, b in itertools.pairwise(edges)]
    return b"".join([encryptor.start, *encryptor.update(pieces), encryptor.finish()])


def decrypted(raw: bytes, identity: AgeIdentity) -> bytes:
    """All of it, as strictly as the format asks for. Raises AgeError."""
    header = parse_header(raw)
    file_key = find_file_key(header, [identity])
    nonce = raw[header.length : header.length + NONCE_BYTES]
    body = raw[header.length + NONCE_BYTES :]
    payload, count = AgePayload(file_key, nonce), chunk_count(len(body))
    chunks = (
        payload.open(
            number,
            body[number * SEALED_CHUNK_BYTES : (number + 1) * SEALED_CHUNK_BYTES],
            last=number == count - 1,
        )
        for number in range(count)
    )
    plain = b"".join(chunks)
    assert len(plain) == plain_bytes(len(body))
    return plain


SIZES = (0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, 200_000)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(SIZES), st.lists(st.integers(0, 200_000), max_size=5), st.integers(0, 1))
def test_what_is_encrypted_in_any_pieces_is_decrypted_by_each_recipient(
    size: int, cuts: list[int], who: int
) -> None:
    plain = random_bytes_of(size)(size)
    assert decrypted(encrypted(plain, tuple(cuts)), IDENTITIES[who]) == plain


@pytest.mark.parametrize("who", ["age", "ssh"])
def test_debians_age_reads_what_we_write_and_we_read_what_it_writes(
    who: str, tmp_path: Path, need: Callable[..., list[str]]
) -> None:
    age = need("age")
    identity = IDENTITIES[who == "ssh"]
    key = tmp_path / "key"
    if who == "ssh":
        key.write_bytes(openssh_file(bytes(range(1, 33))))
    else:
        from vmapipe.crypt.keys import encode_bech32

        key.write_text(encode_bech32("age-secret-key-", bytes(range(32))).upper() + "\n")
    key.chmod(0o600)
    stored, recipients = tmp_path / "file.age", tmp_path / "recipients"
    recipients.write_text("".join(f"{recipient.text}\n" for recipient in RECIPIENTS))
    for size in SIZES:
        plain = os.urandom(size)
        stored.write_bytes(encrypted(plain))
        done = subprocess.run([*age, "-d", "-i", key, stored], capture_output=True, check=True)
        assert done.stdout == plain
        made = subprocess.run(
            [*age, "-R", recipients], input=plain, capture_output=True, check=True
        ).stdout
        assert decrypted(made, identity) == plain


def test_another_key_opens_nothing_and_a_changed_header_is_told() -> None:
    raw = encrypted(b"secret")
    with pytest.raises(NoKeyFits, match="none of the given keys"):
        decrypted(raw, X25519Identity(bytes([7]) * 32))
    # A stanza more, which is nobody's: the MAC covers it.
    changed = raw.replace(b"\n--- ", b"\n-> grease x\n\n--- ")
    with pytest.raises(AgeError, match="header was changed"):
        decrypted(changed, IDENTITIES[0])


def test_stanzas_that_nobody_here_knows_are_passed_over() -> None:
    stanzas = [
        Stanza("piv-p256", ("abc", "x+/~"), b"z" * 100),
        Stanza("joint-oil", (), b""),
        RECIPIENTS[0].wrap(FILE_KEY, random_bytes_of(3)),
    ]
    raw = encode_header(stanzas, FILE_KEY)
    header = parse_header(raw + b"payload")
    assert header.stanzas == tuple(stanzas)
    assert header.length == len(raw)
    assert find_file_key(header, IDENTITIES) == FILE_KEY


def test_a_passphrase_is_refused_in_words() -> None:
    raw = encode_header([Stanza("scrypt", ("c2FsdA", "18"), bytes(32))], FILE_KEY)
    with pytest.raises(NoKeyFits, match="passphrase"):
        find_file_key(parse_header(raw), IDENTITIES)


@pytest.mark.parametrize("size", [1, CHUNK_BYTES, 3 * CHUNK_BYTES + 5])
def test_each_byte_that_is_flipped_in_header_or_payload_is_found(size: int) -> None:
    plain = random_bytes_of(size)(size)
    raw = bytearray(encrypted(plain))
    header_bytes = parse_header(bytes(raw)).length
    places = [*range(0, header_bytes + NONCE_BYTES, 3), *range(header_bytes, len(raw), 9973)]
    for at in [*places, len(raw) - 1]:
        raw[at] ^= 1
        with pytest.raises(AgeError):
            decrypted(bytes(raw), IDENTITIES[0])
        raw[at] ^= 1
    assert decrypted(bytes(raw), IDENTITIES[0]) == plain


def _chunks(raw: bytes) -> tuple[bytes, list[bytes]]:
    start = parse_header(raw).length + NONCE_BYTES
    body = raw[start:]
    return raw[:start], [
        body[at : at + SEALED_CHUNK_BYTES] for at in range(0, len(body), SEALED_CHUNK_BYTES)
    ]


def test_chunks_exchanged_left_out_doubled_or_added_are_found() -> None:
    start, (a, b, c, last) = _chunks(encrypted(bytes(3 * CHUNK_BYTES + 9)))
    for wrong in (
        [b, a, c, last],
        [a, c, last],
        [a, b, c],
        [a, b],
        [a, b, c, last, last],
        [a, b, c, last[:-1]],
        [a, b, c, last + b"x"],
        [a, b, c, c, last],
        [],
    ):
        with pytest.raises(AgeError):
            decrypted(start + b"".join(wrong), IDENTITIES[0])


def test_a_last_chunk_that_is_empty_or_has_a_wrong_flag_is_refused() -> None:
    payload = AgePayload(FILE_KEY, bytes(16))
    full = payload.seal(0, bytes(CHUNK_BYTES), last=False)
    with pytest.raises(AgeError, match="last chunk is empty"):
        chunk_count(len(full) + 16)
    with pytest.raises(DamagedChunk, match="empty"):
        payload.open(1, payload.seal(1, b"", last=True), last=True)
    with pytest.raises(DamagedChunk):
        payload.open(0, full, last=True)
    assert payload.open(0, payload.seal(0, b"", last=True), last=True) == b""


HOSTILE = {
    "no newline": MAGIC + b"-> X25519 " + b"a" * 100_000,
    "stanzas without end": MAGIC + b"-> a\n\n" * MAX_HEADER_BYTES,
    "a body without end": MAGIC + b"-> a\n" + (b"A" * 64 + b"\n") * (MAX_HEADER_BYTES // 64),
    "no stanza": MAGIC + b"--- " + b"A" * 43 + b"\n",
    "binary": MAGIC + b"-> \xff\xfe\n\n--- " + b"A" * 43 + b"\n",
    "an empty argument": MAGIC + b"-> X25519  a\n\n--- " + b"A" * 43 + b"\n",
    "padded base64": MAGIC + b"-> a\nAA==\n--- " + b"A" * 43 + b"\n",
    "base64 that is not canonical": MAGIC + b"-> a\nAB\n--- " + b"A" * 43 + b"\n",
    "a long body line": MAGIC + b"-> a\n" + b"A" * 68 + b"\n--- " + b"A" * 43 + b"\n",
    "a short MAC": MAGIC + b"-> a\n\n--- AAAA\n",
    "no MAC": MAGIC + b"-> a\n\n---\n",
    "carriage returns": MAGIC + b"-> a\r\n\r\n--- " + b"A" * 43 + b"\n",
    "another version": b"age-encryption.org/v2\n-> a\n\n",
    "nothing known": b"hello",
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_headers_are_refused_and_never_ask_for_more_than_their_limit(raw: bytes) -> None:
    with pytest.raises(AgeError) as found:
        parse_header(raw)
    assert not isinstance(found.value, IncompleteHeader)


def test_a_header_that_is_cut_off_says_that_more_is_needed() -> None:
    raw = encrypted(b"")
    length = parse_header(raw).length
    for end in range(length):
        with pytest.raises(IncompleteHeader):
            parse_header(raw[:end])
    assert parse_header(raw[:length]).length == length


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_no_change_of_a_header_does_more_than_refuse_it(data: st.DataObject) -> None:
    raw = bytearray(encrypted(b"x"))
    length = parse_header(bytes(raw)).length
    at = data.draw(st.integers(0, length - 1))
    end = data.draw(st.integers(at, min(length, at + 100)))
    raw[at:end] = data.draw(st.binary(max_size=100))
    try:
        assert decrypted(bytes(raw), IDENTITIES[0]) == b"x"
    except AgeError:
        pass


@given(st.binary(max_size=200))
def test_base64_has_one_form(raw: bytes) -> None:
    text = encode_base64(raw)
    assert decode_base64(text) == raw
    assert re.fullmatch(r"[A-Za-z0-9+/]*", text)
    for wrong in (f"{text}=", f"{text}\n", f" {text}", f"{text}-"):
        with pytest.raises(AgeError):
            decode_base64(wrong)


def test_shares_of_low_order_and_wrong_lengths_are_refused() -> None:
    good = RECIPIENTS[0].wrap(FILE_KEY, random_bytes_of(1))
    zero = encode_base64(bytes(32))
    for stanza in (
        good._replace(arguments=(zero,)),
        good._replace(arguments=(encode_base64(bytes(31)),)),
        good._replace(arguments=()),
        good._replace(arguments=(*good.arguments, "x")),
        good._replace(body=good.body + b"x"),
    ):
        with pytest.raises(AgeError):
            IDENTITIES[0].unwrap(stanza)
    ssh = RECIPIENTS[1].wrap(FILE_KEY, random_bytes_of(1))
    for stanza in (
        ssh._replace(arguments=(ssh.arguments[0], zero)),
        ssh._replace(arguments=ssh.arguments[:1]),
        ssh._replace(body=b""),
    ):
        with pytest.raises(AgeError):
            IDENTITIES[1].unwrap(stanza)


def test_a_file_is_encrypted_to_somebody() -> None:
    with pytest.raises(ValueError, match="recipients"):
        Encryptor([], random_bytes_of(1))
