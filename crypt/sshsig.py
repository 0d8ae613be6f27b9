# SPDX-License-Identifier: Apache-2.0
"""OpenSSH's signatures of files (SSHSIG), with ed25519 keys: `ssh-keygen -Y verify` checks them. Pure.

The format: PROTOCOL.sshsig of OpenSSH.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from typing import NamedTuple

from vmapipe.crypt.keys import ssh_public, ssh_wire
from vmapipe.crypt.primitives import KEY_BYTES, ed25519_public, ed25519_sign, ed25519_verify

#: What a signature is for, so that one of another purpose is not taken for it.
NAMESPACE = "vmapipe-manifest"
#: A signature takes some 300 bytes.
MAX_SIGNATURE_BYTES = 4096
_BEGIN, _END = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"
_MAGIC = b"SSHSIG"
_VERSION = 1
_KIND, _HASH = b"ssh-ed25519", b"sha512"
_COLUMNS = 70
_SIGNATURE_BYTES = 64


class SignatureFault(ValueError):
    """The signature does not prove what it should; the text says why, for the user."""


class SshSignature(NamedTuple):
    """`public`: the Ed25519 key that is said to have signed."""

    public: bytes
    signature: bytes


def _string(raw: bytes) -> bytes:
    return struct.pack(">I", len(raw)) + raw


def _signed_bytes(sha512: bytes) -> bytes:
    parts = (NAMESPACE.encode(), b"", _HASH, sha512)
    return _MAGIC + b"".join(_string(part) for part in parts)


def sign(seed: bytes, sha512: bytes) -> str:
    """Return the signature, in letters, of what has this SHA-512."""
    parts = (
        ssh_wire(ed25519_public(seed)),
        NAMESPACE.encode(),
        b"",
        _HASH,
        _string(_KIND) + _string(ed25519_sign(seed, _signed_bytes(sha512))),
    )
    raw = _MAGIC + struct.pack(">I", _VERSION) + b"".join(_string(part) for part in parts)
    text = base64.b64encode(raw).decode()
    lines = [text[at : at + _COLUMNS] for at in range(0, len(text), _COLUMNS)]
    return "\n".join((_BEGIN, *lines, _END, ""))


def parse_signature(text: str) -> SshSignature:
    """Raises SignatureFault."""
    lines = text.split("\n")
    if lines[0] != _BEGIN or _END not in lines or any(lines[lines.index(_END) + 1 :]):
        raise SignatureFault("it is damaged, or not a signature")
    try:
        raw = base64.b64decode("".join(lines[1 : lines.index(_END)]), validate=True)
    except (binascii.Error, ValueError) as error:
        raise SignatureFault("it is damaged, or not a signature") from error
    head = _MAGIC + struct.pack(">I", _VERSION)
    if not raw.startswith(head):
        raise SignatureFault("it is damaged, or not a signature")
    wire, namespace, _, hashed, signed = _strings(raw[len(head) :], 5)
    if namespace != NAMESPACE.encode():
        raise SignatureFault("it was made for another purpose")
    public = wire[-KEY_BYTES:]
    kind, signature = _strings(signed, 2)
    known = (wire, kind, hashed) == (ssh_wire(public), _KIND, _HASH)
    if not known or len(signature) != _SIGNATURE_BYTES:
        raise SignatureFault("it is of a kind that is not known here: ssh-ed25519 with sha512 is")
    return SshSignature(public, signature)


def _strings(raw: bytes, count: int) -> list[bytes]:
    """Read exactly so many. Raises SignatureFault."""
    found = []
    at = 0
    for _ in range(count):
        size = int.from_bytes(raw[at : at + 4], "big")
        if len(raw) < at + 4 + size:
            raise SignatureFault("it is damaged: it is cut off")
        found.append(raw[at + 4 : at + 4 + size])
        at += 4 + size
    if at != len(raw):
        raise SignatureFault("it is damaged: there is something behind its end")
    return found


def is_signed_by(signature: SshSignature, sha512: bytes) -> bool:
    """Return whether the key in it has signed what has this SHA-512."""
    return ed25519_verify(signature.public, signature.signature, _signed_bytes(sha512))


def fingerprint(public: bytes) -> str:
    """Return it as `ssh-keygen -l` prints it."""
    digest = base64.b64encode(hashlib.sha256(ssh_wire(public)).digest()).rstrip(b"=")
    return f"SHA256:{digest.decode()}"


def parse_publics(text: str) -> list[bytes]:
    """Parse public keys: a line `ssh-ed25519 …` each, or of an allowed_signers file. Raises AgeError, SignatureFault."""
    found = []
    for line in map(str.strip, text.splitlines()):
        if line and not line.startswith("#"):
            # allowed_signers has names, and perhaps options, in front.
            at = line.find("ssh-ed25519 ")
            found.append(ssh_public(line[at:] if at > 0 else line))
    if not found:
        raise SignatureFault("there is no ssh-ed25519 public key in it")
    return found
