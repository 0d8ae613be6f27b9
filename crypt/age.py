# SPDX-License-Identifier: Apache-2.0
"""The file format age-encryption.org/v1: header, its MAC, and a payload of chunks. Bytes in, bytes out.

A file is a header (one stanza for each recipient, which holds the file key encrypted to it), 16
bytes of nonce, and chunks of 64 KiB, each encrypted and authenticated with its number and
whether it is the last one. So any chunk can be read alone, and none can be exchanged, left
out or added. The specification: https://age-encryption.org/v1
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from vmapipe.crypt.magic import MAGIC
from vmapipe.crypt.primitives import TAG_BYTES, WrongTag, chunk_cipher, hkdf

CHUNK_BYTES = 64 << 10
SEALED_CHUNK_BYTES = CHUNK_BYTES + TAG_BYTES
FILE_KEY_BYTES = NONCE_BYTES = 16
# As many stanzas are looked at; what we write has at most MAX_RECIPIENTS, of some 150 bytes each.
_MAX_STANZAS = 4096
MAX_RECIPIENTS = 1024
# Room for them. A header without end must not fill our memory.
MAX_HEADER_BYTES = 1 << 20
# Of a stanza's first line: type and arguments. A body's line has 64 by the format.
_MAX_LINE_BYTES = 4096
_BODY_COLUMNS = 64
_MAC_BYTES = 32
Buffers = Iterable[bytes | bytearray | memoryview]
#: Gives so many random bytes.
RandomBytes = Callable[[int], bytes]


class AgeError(ValueError):
    """The file is damaged, or not as the format has it; the text says what, for the user."""


class IncompleteHeader(AgeError):
    """The header goes on behind the bytes that were given."""


class NoKeyFits(AgeError):
    """None of the identities opens the file."""


class DamagedChunk(AgeError):
    """A chunk is not what was stored at its place."""


class Stanza(NamedTuple):
    """The file key for one recipient: `kind` is its type, `body` what only that one can open."""

    kind: str
    arguments: tuple[str, ...]
    body: bytes


class Recipient(Protocol):
    """Whom a file is encrypted to: a public key. `text`: as the user would write it."""

    @property
    def text(self) -> str: ...

    def wrap(self, file_key: bytes, random_bytes: RandomBytes) -> Stanza: ...


class AgeIdentity(Protocol):
    """A secret key."""

    def unwrap(self, stanza: Stanza) -> bytes | None:
        """Return the file key; None where the stanza is another's. Raises AgeError."""


class AgeHeader(NamedTuple):
    """`covered`: the bytes that the MAC is over; `length`: of the whole header."""

    stanzas: tuple[Stanza, ...]
    mac: bytes
    covered: bytes
    length: int


def encode_base64(raw: bytes) -> str:
    """Return standard base64 without padding, as the format has it."""
    return base64.b64encode(raw).rstrip(b"=").decode("ascii")


def decode_base64(text: str) -> bytes:
    """Raises AgeError for anything but the one way to write these bytes."""
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise AgeError("its base64 is damaged") from error
    if encode_base64(raw) != text:
        raise AgeError("its base64 is not canonical")
    return raw


def encode_header(stanzas: Sequence[Stanza], file_key: bytes) -> bytes:
    lines = [MAGIC.decode().rstrip("\n")]
    for stanza in stanzas:
        lines.append(" ".join(("->", stanza.kind, *stanza.arguments)))
        body = encode_base64(stanza.body)
        # A last line shorter than the others, and be it empty, ends the body.
        lines += [body[at : at + _BODY_COLUMNS] for at in range(0, len(body) + 1, _BODY_COLUMNS)]
    covered = ("\n".join(lines) + "\n---").encode("ascii")
    return covered + f" {encode_base64(_mac(file_key, covered))}\n".encode("ascii")


def _mac(file_key: bytes, covered: bytes) -> bytes:
    return hmac.new(hkdf(file_key, b"", b"header"), covered, hashlib.sha256).digest()


class _Lines:
    """Takes lines off the beginning of a file."""

    def __init__(self, data: bytes) -> None:
        self.at = 0
        self._data = data

    def next(self) -> str:
        """Raises IncompleteHeader where the line is not there to its end, AgeError."""
        end = self._data.find(b"\n", self.at, self.at + _MAX_LINE_BYTES)
        if end < 0:
            if len(self._data) - self.at >= _MAX_LINE_BYTES:
                raise AgeError("its header has a line without an end")
            if len(self._data) >= MAX_HEADER_BYTES:
                raise AgeError(f"its header has more than {MAX_HEADER_BYTES} bytes")
            raise IncompleteHeader("it ends inside its header")
        raw, self.at = self._data[self.at : end], end + 1
        if self.at > MAX_HEADER_BYTES:
            raise AgeError(f"its header has more than {MAX_HEADER_BYTES} bytes")
        if not all(32 <= byte <= 126 for byte in raw):
            raise AgeError("its header has bytes that are not text")
        return raw.decode("ascii")


def parse_header(start: bytes) -> AgeHeader:
    """Parse the header that a file begins with.

    Raises IncompleteHeader where more of the file is needed, and AgeError.
    """
    if not start.startswith(MAGIC):
        if MAGIC.startswith(start):
            raise IncompleteHeader("it ends inside its header")
        raise AgeError("it is not an age file of version 1")
    lines = _Lines(start)
    lines.next()
    stanzas: list[Stanza] = []
    while True:
        begin = lines.at
        line = lines.next()
        if line.startswith("---"):
            if not stanzas:
                raise AgeError("its header has no recipient")
            mac = decode_base64(line[4:]) if line[3:4] == " " else b""
            if len(mac) != _MAC_BYTES:
                raise AgeError("its header has a damaged last line")
            return AgeHeader(tuple(stanzas), mac, start[: begin + 3], lines.at)
        if len(stanzas) == _MAX_STANZAS:
            raise AgeError(f"its header has more than {_MAX_STANZAS} recipients")
        stanzas.append(_parse_stanza(line, lines))


def _parse_stanza(line: str, lines: _Lines) -> Stanza:
    words = line.split(" ")
    if words[0] != "->" or len(words) < 2 or not all(words):
        raise AgeError("its header has a damaged line")
    body = bytearray()
    while True:
        text = lines.next()
        if len(text) > _BODY_COLUMNS:
            raise AgeError("its header has a body's line of more than 64 characters")
        body += decode_base64(text)
        if len(text) < _BODY_COLUMNS:
            return Stanza(words[1], tuple(words[2:]), bytes(body))


def find_file_key(header: AgeHeader, identities: Iterable[AgeIdentity]) -> bytes:
    """Return the file key. Raises NoKeyFits, or AgeError for a header that was changed."""
    kinds = {stanza.kind for stanza in header.stanzas}
    if "scrypt" in kinds:
        raise NoKeyFits(
            "it is encrypted with a passphrase, which is not read here: age -d FILE | vmapipe … -"
        )
    for identity in identities:
        for stanza in header.stanzas:
            file_key = identity.unwrap(stanza)
            if file_key is None:
                continue
            if len(file_key) != FILE_KEY_BYTES or not hmac.compare_digest(
                _mac(file_key, header.covered), header.mac
            ):
                raise AgeError("its header was changed: its authentication is wrong")
            return file_key
    raise NoKeyFits("none of the given keys opens it: it is encrypted to others")


class AgePayload:
    """Seals and opens the chunks of one file. Any thread may use it."""

    def __init__(self, file_key: bytes, nonce: bytes) -> None:
        self._cipher = chunk_cipher(hkdf(file_key, nonce, b"payload"))

    def seal(self, number: int, plain: bytes | bytearray | memoryview, *, last: bool) -> bytes:
        return self._cipher.encrypt(_chunk_nonce(number, last), plain, None)

    def open(self, number: int, sealed: bytes | bytearray | memoryview, *, last: bool) -> bytes:
        """Raises DamagedChunk."""
        if len(sealed) < TAG_BYTES:
            raise DamagedChunk("it is cut off inside a chunk")
        try:
            plain = self._cipher.decrypt(_chunk_nonce(number, last), sealed, None)
        except WrongTag as error:
            raise DamagedChunk("a chunk of it is not the one that was stored there") from error
        if last and number and not plain:
            raise DamagedChunk("its last chunk is empty")
        return plain


def _chunk_nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + (b"\1" if last else b"\0")


def chunk_count(payload_bytes: int) -> int:
    """Return how many chunks so many bytes behind the nonce are. Raises AgeError where it cannot be any."""
    count = -(-payload_bytes // SEALED_CHUNK_BYTES)
    rest = payload_bytes - (count - 1) * SEALED_CHUNK_BYTES
    if payload_bytes < TAG_BYTES or rest < TAG_BYTES:
        raise AgeError("it is cut off")
    if rest == TAG_BYTES and count > 1:
        raise AgeError("its last chunk is empty")
    return count


def plain_bytes(payload_bytes: int) -> int:
    """Return how many bytes such a payload holds. Raises AgeError as `chunk_count`."""
    return payload_bytes - chunk_count(payload_bytes) * TAG_BYTES


class Encryptor:
    """Encrypts a stream: write `start`, then what each `update` returns, then what `finish` returns."""

    def __init__(self, recipients: Sequence[Recipient], random_bytes: RandomBytes) -> None:
        """Raises ValueError without recipients, or with too many."""
        if not 1 <= len(recipients) <= MAX_RECIPIENTS:
            raise ValueError(f"a file is encrypted to 1 to {MAX_RECIPIENTS} recipients")
        file_key, nonce = random_bytes(FILE_KEY_BYTES), random_bytes(NONCE_BYTES)
        stanzas = [recipient.wrap(file_key, random_bytes) for recipient in recipients]
        self.start = encode_header(stanzas, file_key) + nonce
        self._payload = AgePayload(file_key, nonce)
        self._number = 0
        # Of a chunk that is not sealed: it may be the last one.
        self._rest = bytearray()

    def update(self, buffers: Buffers) -> list[bytes]:
        """Return the chunks that are full, sealed. The buffers are not used afterwards."""
        sealed = []
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            if self._rest:
                missing = CHUNK_BYTES - len(self._rest)
                self._rest += view[:missing]
                view = view[missing:]
                if not view:
                    continue
                sealed.append(self._seal(self._rest))
                self._rest = bytearray()
            whole = (max(0, len(view) - 1)) // CHUNK_BYTES * CHUNK_BYTES
            sealed += [
                self._seal(view[at : at + CHUNK_BYTES]) for at in range(0, whole, CHUNK_BYTES)
            ]
            self._rest += view[whole:]
        return sealed

    def finish(self) -> bytes:
        return self._seal(self._rest, last=True)

    def _seal(self, plain: bytearray | memoryview, *, last: bool = False) -> bytes:
        sealed = self._payload.seal(self._number, plain, last=last)
        self._number += 1
        return sealed
