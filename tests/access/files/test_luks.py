# SPDX-License-Identifier: Apache-2.0
"""LUKS1: what cryptsetup and QEMU encrypt is read, and no header brings more than our own error."""

from __future__ import annotations

import contextlib
import hashlib
import random
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.access.volumes import encrypted
from tests.machine import Need
from vmapipe.access.files.luks import (
    HEADER_BYTES,
    MAGIC,
    LuksError,
    LuksHeader,
    opened,
    parse_header,
    unlock,
)
from vmapipe.access.files.sources import ByteSource

CONTENT = random.Random(3).randbytes(300_000).ljust(1 << 20, b"\0")


def source(raw: bytes) -> ByteSource:
    return ByteSource(lambda offset, length: raw[offset : offset + length], len(raw))


def head(
    name: bytes = b"aes",
    mode: bytes = b"xts-plain64",
    hash_name: bytes = b"sha256",
    key_bytes: int = 64,
    iterations: int = 1,
    stripes: int = 4,
    offset: int = 8,
) -> bytes:
    slot = struct.pack(">II32sII", 0x00AC71F3, iterations, b"salt", offset, stripes)
    words = struct.pack(
        ">32s32s32sII20s32sI40s",
        *(name, mode, hash_name, 4096, key_bytes, b"digest", b"salt", 1, b"uuid"),
    )
    return (MAGIC + words + slot).ljust(HEADER_BYTES, b"\0")


@pytest.mark.parametrize(
    ("cipher", "bits", "hash_name"),
    [
        ("aes-xts-plain64", 512, "sha256"),
        ("aes-xts-plain64", 256, "sha512"),
        ("aes-cbc-essiv:sha256", 256, "sha1"),
        ("aes-cbc-plain64", 128, "sha256"),
    ],
)
def test_what_others_encrypted_is_read_at_every_offset(
    cipher: str, bits: int, hash_name: str, need: Need, tmp_path: Path
) -> None:
    image = tmp_path / "luks"
    key = encrypted(need, CONTENT, image, cipher=cipher, bits=bits, hash_name=hash_name)
    raw = source(image.read_bytes())
    header = parse_header(raw.read(0, HEADER_BYTES))
    assert unlock(header, raw, key + b"\n") is None
    volume_key = unlock(header, raw, key)
    assert volume_key is not None
    plain = opened(header, raw, volume_key)
    assert plain.size_bytes >= len(CONTENT)
    for offset, length in ((0, 1), (511, 2), (512, 512), (1000, 5000), (0, len(CONTENT))):
        assert plain.read(offset, length) == CONTENT[offset : offset + length]
    assert len(plain.read(plain.size_bytes - 100, 5000)) == 100


def test_any_key_slot_opens_it_with_a_key_of_any_bytes(need: Need, tmp_path: Path) -> None:
    (cryptsetup,) = need("cryptsetup")
    image, first, second = tmp_path / "luks", tmp_path / "first", tmp_path / "second"
    first.write_bytes(encrypted(need, CONTENT, image))
    second.write_bytes(bytes(range(256)))
    words = [cryptsetup, "luksAddKey", "--batch-mode", "--pbkdf-force-iterations", "1000"]
    subprocess.run([*words, "--key-file", str(first), image, second], check=True)
    raw = source(image.read_bytes())
    header = parse_header(raw.read(0, HEADER_BYTES))
    assert len(header.slots) == 2
    assert unlock(header, raw, bytes(range(256))) == unlock(header, raw, first.read_bytes())


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (head(name=b"serpent"), "cipher serpent-xts-plain64 is not supported"),
        (head(key_bytes=48), "key of 48 bytes"),
        (head(key_bytes=1 << 31), "key of"),
        (head(hash_name=b"whirl"), "hash whirl is not supported"),
        (head(hash_name=b"shake_128"), "names no cipher"),
        (head(iterations=1 << 31), "not credible"),
        (head(iterations=0), "not credible"),
        (head(stripes=1 << 31), "stripes"),
        (head(stripes=0), "stripes"),
        (head(name=b"\x1b[2J"), "names no cipher"),
        (head()[:-1], "cut off"),
        (head()[:208].ljust(HEADER_BYTES, b"\0"), "no key slot"),
    ],
)
def test_a_header_that_asks_too_much_or_is_not_known_is_refused(raw: bytes, words: str) -> None:
    with pytest.raises(LuksError, match=words):
        parse_header(raw)


def test_a_key_slot_behind_the_end_is_refused() -> None:
    raw = head(offset=1 << 20)
    with pytest.raises(LuksError, match="behind its end"):
        unlock(parse_header(raw), source(raw), b"key")


@given(st.binary(min_size=HEADER_BYTES - 8, max_size=HEADER_BYTES - 8), st.integers(0, 583))
def test_no_header_brings_more_than_our_own_error(noise: bytes, kept: int) -> None:
    raw = head()[: 8 + kept] + noise[kept:]
    with contextlib.suppress(LuksError):
        header = parse_header(raw)
        assert isinstance(header, LuksHeader)
        assert all(slot.stripes * header.key_bytes <= 1 << 20 for slot in header.slots)
        assert header.hash_name in hashlib.algorithms_available
