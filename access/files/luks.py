# SPDX-License-Identifier: Apache-2.0
"""LUKS version 1: the header, a key slot opened with a key, and the bytes behind it.

Layout: "LUKS On-Disk Format Specification" 1.2.3. The header is a stranger's: what it asks
of memory and time has bounds.
"""

from __future__ import annotations

import array
import hashlib
import hmac
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from vmapipe.access.files.sources import ByteSource

MAGIC = b"LUKS\xba\xbe\0\1"
HEADER_BYTES = 592
_SECTOR_BYTES = 512
_SLOT_ACTIVE = 0x00AC71F3
_HEADER = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")
# cryptsetup has always made 4000 stripes; a key of 64 bytes takes 250 KiB then.
_MAX_MATERIAL_BYTES = 1 << 20
# Times the blocks of the hash that a key has. cryptsetup measures how many take two
# seconds, some millions; these take a minute or two.
_MAX_ITERATIONS = 1 << 27

_Decrypt = Callable[[bytes, int], bytes]  # whole sectors, the number of the first


class LuksError(Exception):
    """Not a header that can be used here: damaged, made to deceive, or of a rare kind."""


class Slot(NamedTuple):
    """One place that holds the volume's key, encrypted with a user's."""

    iterations: int
    salt: bytes
    offset: int
    stripes: int


class LuksHeader(NamedTuple):
    """What it says, checked. Offsets in bytes."""

    cipher: str
    hash_name: str
    payload_offset: int
    key_bytes: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    slots: tuple[Slot, ...]


def parse_header(raw: bytes) -> LuksHeader:
    """Raises LuksError."""
    if len(raw) < HEADER_BYTES or raw[:8] != MAGIC:
        raise LuksError("its header is cut off")
    fields = _HEADER.unpack_from(raw)
    name, mode, hash_name = (_word(field) for field in fields[2:5])
    payload, key_bytes, digest, digest_salt, digest_iterations = fields[5:10]
    cipher = f"{name}-{mode}"
    if cipher not in _CIPHERS:
        raise LuksError(f"its cipher {cipher} is not supported")
    if key_bytes not in _CIPHERS[cipher][0]:
        raise LuksError(f"its key of {key_bytes} bytes does not fit its cipher {cipher}")
    if hash_name not in hashlib.algorithms_available or hash_name.startswith("shake"):
        raise LuksError(f"its hash {hash_name} is not supported")
    slots = []
    for index in range(8):
        active, iterations, salt, offset, stripes = _SLOT.unpack_from(raw, 208 + 48 * index)
        if active != _SLOT_ACTIVE:
            continue
        if not 0 < stripes <= _MAX_MATERIAL_BYTES // key_bytes:
            raise LuksError(f"key slot {index} has {stripes} stripes")
        _check_iterations(iterations, key_bytes, hash_name)
        slots.append(Slot(iterations, salt, offset * _SECTOR_BYTES, stripes))
    _check_iterations(digest_iterations, 20, hash_name)
    if not slots:
        raise LuksError("it has no key slot in use: nothing opens it")
    return LuksHeader(
        cipher,
        hash_name,
        payload * _SECTOR_BYTES,
        key_bytes,
        digest,
        digest_salt,
        digest_iterations,
        tuple(slots),
    )


def _word(raw: bytes) -> str:
    text = raw.partition(b"\0")[0].decode("ascii", "replace")
    if not text or not all(letter.isalnum() or letter in "-:" for letter in text):
        raise LuksError("its header names no cipher and hash")
    return text


def _check_iterations(iterations: int, wanted_bytes: int, hash_name: str) -> None:
    blocks = -(-wanted_bytes // hashlib.new(hash_name).digest_size)
    if not 0 < iterations * blocks <= _MAX_ITERATIONS:
        raise LuksError(f"its key has to be hashed {iterations} times, which is not credible")


def unlock(header: LuksHeader, source: ByteSource, key: bytes) -> bytes | None:
    """The volume's key; None: `key` opens no slot. Raises OSError, LuksError.

    A key that opens none gives other bytes, and their digest tells.
    """
    for slot in header.slots:
        size = header.key_bytes * slot.stripes
        padded = -(-size // _SECTOR_BYTES) * _SECTOR_BYTES
        derived = hashlib.pbkdf2_hmac(
            header.hash_name, key, slot.salt, slot.iterations, header.key_bytes
        )
        material = source.read(slot.offset, padded)
        if len(material) < padded:
            raise LuksError("a key slot lies behind its end")
        plain = _CIPHERS[header.cipher][1](derived)(material, 0)[:size]
        volume_key = _merged(plain, header.key_bytes, header.hash_name)
        digest = hashlib.pbkdf2_hmac(
            header.hash_name, volume_key, header.digest_salt, header.digest_iterations, 20
        )
        if hmac.compare_digest(digest, header.digest):
            return volume_key
    return None


def opened(header: LuksHeader, source: ByteSource, volume_key: bytes) -> ByteSource:
    """What is encrypted. A read takes whole sectors of `source`."""
    decrypt = _CIPHERS[header.cipher][1](volume_key)
    size_bytes = max(0, source.size_bytes - header.payload_offset)
    size_bytes -= size_bytes % _SECTOR_BYTES

    def read(offset: int, length: int) -> bytes:
        length = min(length, size_bytes - offset)
        if length <= 0:
            return b""
        first, skip = divmod(offset, _SECTOR_BYTES)
        wanted = -(-(skip + length) // _SECTOR_BYTES) * _SECTOR_BYTES
        raw = source.read(header.payload_offset + first * _SECTOR_BYTES, wanted)
        raw = raw[: len(raw) - len(raw) % _SECTOR_BYTES]
        return decrypt(raw, first)[skip : skip + length]

    return ByteSource(read, size_bytes)


# --- the anti-forensic splitter ---


def _merged(material: bytes, size: int, hash_name: str) -> bytes:
    """The key that was spread over many stripes, so that losing any of them loses it."""
    block = bytes(size)
    last = len(material) - size
    for at in range(0, last, size):
        block = _diffused(_xor(block, material[at : at + size]), hash_name)
    return _xor(block, material[last:])


def _diffused(block: bytes, hash_name: str) -> bytes:
    width = hashlib.new(hash_name).digest_size
    return b"".join(
        hashlib.new(hash_name, struct.pack(">I", number) + block[at : at + width]).digest()[
            : len(block) - at
        ]
        for number, at in enumerate(range(0, len(block), width))
    )


def _xor(left: bytes, right: bytes) -> bytes:
    whole = int.from_bytes(left, "little") ^ int.from_bytes(right, "little")
    return whole.to_bytes(len(left), "little")


# --- ciphers, by dm-crypt's names ---


def _xts(width: int) -> Callable[[bytes], _Decrypt]:
    """`width`: how many bytes of the sector's number count."""

    def with_key(key: bytes) -> _Decrypt:
        half = len(key) // 2
        data_key, tweak_key = algorithms.AES(key[:half]), algorithms.AES(key[half:])

        def decrypt(raw: bytes, first: int) -> bytes:
            """All blocks at once: a context for each sector takes ten times as long."""
            count = len(raw) // _SECTOR_BYTES
            ivs = b"".join(_iv(first, index, width) for index in range(count))
            tweaks = _tweaks(Cipher(tweak_key, modes.ECB()).encryptor().update(ivs))
            plain = Cipher(data_key, modes.ECB()).decryptor().update(_xor(raw, tweaks))
            return _xor(plain, tweaks)

        return decrypt

    return with_key


def _tweaks(firsts: bytes) -> bytes:
    """Of each sector's first tweak those of all its blocks: each is the double of the last.

    Doubled in GF(2^128), as IEEE 1619 has it, for all sectors in one number.
    """
    count = len(firsts) // 16
    ones = int.from_bytes((b"\1" + bytes(15)) * count, "little")
    not_ones = ones * ((1 << 128) - 2)
    current = int.from_bytes(firsts, "little")
    words = array.array("Q", bytes(_SECTOR_BYTES * count))
    for word in range(0, _SECTOR_BYTES // 8, 2):
        row = array.array("Q", current.to_bytes(16 * count, "little"))
        words[word::64], words[word + 1 :: 64] = row[::2], row[1::2]
        current = (current << 1) & not_ones ^ (current >> 127 & ones) * 0x87
    return words.tobytes()


def _iv(first: int, index: int, width: int) -> bytes:
    return ((first + index) % (1 << 8 * width)).to_bytes(16, "little")


def _cbc(width: int, *, essiv: bool = False) -> Callable[[bytes], _Decrypt]:
    def with_key(key: bytes) -> _Decrypt:
        aes = algorithms.AES(key)
        salted = algorithms.AES(hashlib.sha256(key).digest())

        def decrypt(raw: bytes, first: int) -> bytes:
            """All blocks at once, then each mixed with the one before it, as CBC has it."""
            count = len(raw) // _SECTOR_BYTES
            ivs = b"".join(_iv(first, index, width) for index in range(count))
            if essiv:
                ivs = Cipher(salted, modes.ECB()).encryptor().update(ivs)
            return _xor(
                Cipher(aes, modes.ECB()).decryptor().update(raw), b"".join(_before(raw, ivs))
            )

        return decrypt

    return with_key


def _before(raw: bytes, ivs: bytes) -> Iterator[bytes]:
    for index, at in enumerate(range(0, len(raw), _SECTOR_BYTES)):
        yield ivs[16 * index : 16 * index + 16]
        yield raw[at : at + _SECTOR_BYTES - 16]


# The sizes of a key, and what decrypts with it.
_CIPHERS: dict[str, tuple[tuple[int, ...], Callable[[bytes], _Decrypt]]] = {
    "aes-xts-plain64": ((32, 64), _xts(8)),
    "aes-xts-plain": ((32, 64), _xts(4)),
    "aes-cbc-essiv:sha256": ((16, 24, 32), _cbc(8, essiv=True)),
    "aes-cbc-plain64": ((16, 24, 32), _cbc(8)),
    "aes-cbc-plain": ((16, 24, 32), _cbc(4)),
}
