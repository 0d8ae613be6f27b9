# SPDX-License-Identifier: Apache-2.0
"""Recipients and identities as people write them: age1…, AGE-SECRET-KEY-1…, ssh-ed25519. Pure."""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from typing import NamedTuple

from vmapipe.crypt.age import (
    FILE_KEY_BYTES,
    AgeError,
    AgeIdentity,
    RandomBytes,
    Recipient,
    Stanza,
    decode_base64,
    encode_base64,
)
from vmapipe.crypt.magic import ARMOR, MAGIC
from vmapipe.crypt.primitives import (
    KEY_BYTES,
    TAG_BYTES,
    ed25519_public,
    hkdf,
    open_key,
    read_openssh_seed,
    seal_key,
    x25519,
    x25519_public,
)

RECIPIENT_PREFIX, IDENTITY_PREFIX = "age", "age-secret-key-"
_X25519, _X25519_INFO = "X25519", b"age-encryption.org/v1/X25519"
_SSH, _SSH_INFO = "ssh-ed25519", b"age-encryption.org/v1/ssh-ed25519"
_SSH_TAG_BYTES = 4
_OPENSSH = "-----BEGIN OPENSSH PRIVATE KEY-----"
# The prime of Curve25519.
_P = (1 << 255) - 19

# --- Bech32 (BIP 173), without its limit of 90 characters, which age has not either ---

_CHARSET = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_GENERATOR = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)
_CHECK_CHARS = 6
# Far above any key; a line without end must not keep us busy.
_MAX_TEXT_CHARS = 1024


def _polymod(values: list[int]) -> int:
    check = 1
    for value in values:
        top = check >> 25
        check = (check & 0x1FFFFFF) << 5 ^ value
        for bit, generator in enumerate(_GENERATOR):
            if top >> bit & 1:
                check ^= generator
    return check


def _expanded(prefix: str) -> list[int]:
    return [*(ord(char) >> 5 for char in prefix), 0, *(ord(char) & 31 for char in prefix)]


def encode_bech32(prefix: str, raw: bytes) -> str:
    """Return it in lower case."""
    bits, count, values = 0, 0, []
    for byte in raw:
        bits, count = bits << 8 | byte, count + 8
        while count >= 5:
            count -= 5
            values.append(bits >> count & 31)
    if count:
        values.append(bits << (5 - count) & 31)
    check = _polymod([*_expanded(prefix), *values, *[0] * _CHECK_CHARS]) ^ 1
    values += [check >> 5 * (_CHECK_CHARS - 1 - at) & 31 for at in range(_CHECK_CHARS)]
    return f"{prefix}1" + "".join(_CHARSET[value] for value in values)


def decode_bech32(text: str) -> tuple[str, bytes]:
    """Return the prefix, in lower case, and the bytes. Raises AgeError."""
    if len(text) > _MAX_TEXT_CHARS or not text.isascii() or not text.isprintable():
        raise AgeError("it is too long, or has characters that no key has")
    if text not in (text.lower(), text.upper()):
        raise AgeError("it has both capital and small letters")
    prefix, mark, data = text.lower().rpartition("1")
    if not mark or not prefix or len(data) < _CHECK_CHARS:
        raise AgeError("it is cut off")
    values = [_CHARSET.find(char) for char in data]
    if min(values) < 0:
        raise AgeError("it has characters that no key has")
    if _polymod([*_expanded(prefix), *values]) != 1:
        raise AgeError("its checksum is wrong: a character is missing or mistyped")
    bits, count, raw = 0, 0, bytearray()
    for value in values[:-_CHECK_CHARS]:
        bits, count = (bits << 5 | value) & 0xFFF, count + 5
        if count >= 8:
            count -= 8
            raw.append(bits >> count & 0xFF)
    if count >= 5 or bits & (1 << count) - 1:
        raise AgeError("it is not padded as a key is")
    return prefix, bytes(raw)


# --- Recipients ---


class X25519Recipient(NamedTuple):
    """An age1… recipient."""

    public: bytes

    @property
    def text(self) -> str:
        return encode_bech32(RECIPIENT_PREFIX, self.public)

    def wrap(self, file_key: bytes, random_bytes: RandomBytes) -> Stanza:
        secret = random_bytes(KEY_BYTES)
        share = x25519_public(secret)
        key = hkdf(x25519(secret, self.public), share + self.public, _X25519_INFO)
        return Stanza(_X25519, (encode_base64(share),), seal_key(key, file_key))


class SshEd25519Recipient(NamedTuple):
    """An ssh-ed25519 public key; `public` is the Ed25519 point."""

    public: bytes

    @property
    def text(self) -> str:
        return f"{_SSH} {base64.b64encode(ssh_wire(self.public)).decode()}"

    def wrap(self, file_key: bytes, random_bytes: RandomBytes) -> Stanza:
        secret = random_bytes(KEY_BYTES)
        share, point = x25519_public(secret), _montgomery(self.public)
        key = _ssh_key(self.public, x25519(secret, point), share, point)
        return Stanza(_SSH, (_ssh_tag(self.public), encode_base64(share)), seal_key(key, file_key))


def ssh_wire(public: bytes) -> bytes:
    """Return the public key as SSH has it on the wire and in files."""
    return b"".join(struct.pack(">I", len(part)) + part for part in (_SSH.encode(), public))


def _montgomery(public: bytes) -> bytes:
    """Return the X25519 public key of an Ed25519 one (RFC 7748, 4.1). Raises AgeError."""
    y = int.from_bytes(public, "little") & (1 << 255) - 1
    if y >= _P or y == 1:
        raise AgeError("it is not a point of the curve")
    return ((1 + y) * pow(1 - y, -1, _P) % _P).to_bytes(KEY_BYTES, "little")


def _ssh_tag(public: bytes) -> str:
    return encode_base64(hashlib.sha256(ssh_wire(public)).digest()[:_SSH_TAG_BYTES])


def _ssh_key(public: bytes, shared: bytes, share: bytes, point: bytes) -> bytes:
    tweak = hkdf(b"", ssh_wire(public), _SSH_INFO)
    return hkdf(x25519(tweak, shared), share + point, _SSH_INFO)


def parse_recipient(text: str) -> Recipient:
    """Parse one recipient, without blanks around it. Raises AgeError, which does not repeat it."""
    if text.upper().startswith(IDENTITY_PREFIX.upper()):
        raise AgeError("it is a secret key, which belongs on no command line: name its age1… half")
    if text.startswith(f"{_SSH} "):
        return SshEd25519Recipient(ssh_public(text))
    if text.startswith("ssh-"):
        raise AgeError("of SSH's keys only ssh-ed25519 is known here")
    if not text.startswith("age1"):
        raise AgeError("a recipient is age1…, ssh-ed25519 …, or @FILE with a recipient a line")
    prefix, raw = decode_bech32(text)
    if prefix != RECIPIENT_PREFIX:
        raise AgeError("it is a plugin's, or of a kind that is not known here")
    if len(raw) != KEY_BYTES:
        raise AgeError("it has the wrong length")
    try:
        x25519(hashlib.sha256(raw).digest(), raw)
    except ValueError as error:
        raise AgeError("it is not a valid public key") from error
    return X25519Recipient(raw)


def ssh_public(text: str) -> bytes:
    """Return the Ed25519 point of a line `ssh-ed25519 BASE64 [COMMENT]`. Raises AgeError."""
    words = text.split()
    if len(words) < 2 or words[0] != _SSH:
        raise AgeError("it is not an ssh-ed25519 public key")
    try:
        wire = base64.b64decode(words[1], validate=True)
    except (binascii.Error, ValueError) as error:
        raise AgeError("it is not a valid ssh-ed25519 public key") from error
    public = wire[-KEY_BYTES:]
    if wire != ssh_wire(public):
        raise AgeError("it is not a valid ssh-ed25519 public key")
    try:
        x25519(hashlib.sha256(public).digest(), _montgomery(public))
    except ValueError as error:
        raise AgeError("it is not a valid ssh-ed25519 public key") from error
    return public


def parse_recipients(text: str) -> list[Recipient]:
    """Parse a file of recipients: one a line, `#` begins a comment. Raises AgeError with the line."""
    found = []
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if line and not line.startswith("#"):
            try:
                found.append(parse_recipient(line))
            except AgeError as error:
                raise AgeError(f"line {number}: {error}") from error
    if not found:
        raise AgeError("there is no recipient in it")
    return found


# --- Identities ---


class X25519Identity:
    """An AGE-SECRET-KEY-1…"""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.recipient = X25519Recipient(x25519_public(secret))

    def unwrap(self, stanza: Stanza) -> bytes | None:
        if stanza.kind != _X25519:
            return None
        if len(stanza.arguments) != 1:
            raise AgeError("its header has a damaged X25519 stanza")
        shared = _shared(self._secret, _share(stanza.arguments[0]), stanza)
        salt = decode_base64(stanza.arguments[0]) + self.recipient.public
        return open_key(hkdf(shared, salt, _X25519_INFO), stanza.body)


class SshEd25519Identity:
    """An ed25519 key of OpenSSH's. `seed`: its secret half."""

    def __init__(self, seed: bytes) -> None:
        self._secret = hashlib.sha512(seed).digest()[:KEY_BYTES]
        self.recipient = SshEd25519Recipient(ed25519_public(seed))
        self._point = _montgomery(self.recipient.public)

    def unwrap(self, stanza: Stanza) -> bytes | None:
        if stanza.kind != _SSH:
            return None
        if len(stanza.arguments) != 2:
            raise AgeError("its header has a damaged ssh-ed25519 stanza")
        if stanza.arguments[0] != _ssh_tag(self.recipient.public):
            return None
        share = _share(stanza.arguments[1])
        shared = _shared(self._secret, share, stanza)
        return open_key(_ssh_key(self.recipient.public, shared, share, self._point), stanza.body)


def _share(text: str) -> bytes:
    share = decode_base64(text)
    if len(share) != KEY_BYTES:
        raise AgeError("its header has a damaged stanza: a share of the wrong length")
    return share


def _shared(secret: bytes, share: bytes, stanza: Stanza) -> bytes:
    # The length first: what is longer could be made to open with several keys.
    if len(stanza.body) != FILE_KEY_BYTES + TAG_BYTES:
        raise AgeError("its header has a damaged stanza: a body of the wrong length")
    try:
        return x25519(secret, share)
    except ValueError as error:
        raise AgeError("its header has a damaged stanza: a share of low order") from error


def parse_identities(text: str) -> list[AgeIdentity]:
    """Parse a file of secret keys: age's, one a line, `#` begins a comment; or one of OpenSSH's.

    Raises AgeError, which never holds what the file says.
    """
    if text.startswith((MAGIC.decode().rstrip("\n"), ARMOR.decode())):
        raise AgeError(
            "it is protected by a passphrase, which is not asked for here: decrypt it first "
            "(age -d FILE > KEY), where nobody else can read it"
        )
    if text.lstrip().startswith(_OPENSSH):
        try:
            return [SshEd25519Identity(read_openssh_seed(text.lstrip().encode()))]
        except ValueError as error:
            raise AgeError(str(error)) from error
    found: list[AgeIdentity] = []
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if line and not line.startswith("#"):
            found.append(_parse_identity(line, number))
    if not found:
        raise AgeError("there is no key in it")
    return found


def _parse_identity(line: str, number: int) -> AgeIdentity:
    if line.startswith(("age1", "ssh-")):
        raise AgeError(f"line {number}: it is a public key; reading needs the secret one")
    if line.upper().startswith("AGE-PLUGIN-"):
        raise AgeError(f"line {number}: it is a plugin's key, and plugins are not known here")
    try:
        prefix, raw = decode_bech32(line)
    except AgeError as error:
        raise AgeError(f"line {number}: not a valid key: {error}") from error
    if prefix != IDENTITY_PREFIX or len(raw) != KEY_BYTES:
        raise AgeError(f"line {number}: not a valid key: begin it with AGE-SECRET-KEY-1")
    return X25519Identity(raw)
