# SPDX-License-Identifier: Apache-2.0
"""X25519, Ed25519, ChaCha20-Poly1305 and HKDF: the only file of this room that imports cryptography.

Why that library: docs/decisions/0034-encryption.md. All values are raw bytes.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

#: Of each key here, secret or public.
KEY_BYTES = 32
TAG_BYTES = 16
#: What proves that a ChaCha20-Poly1305 message is not the one that was made.
WrongTag = InvalidTag
_ZERO_NONCE = bytes(12)


def x25519_public(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def x25519(secret: bytes, public: bytes) -> bytes:
    """Return the shared secret. Raises ValueError where that is zero: a public key of low order."""
    return X25519PrivateKey.from_private_bytes(secret).exchange(
        X25519PublicKey.from_public_bytes(public)
    )


def hkdf(key: bytes, salt: bytes, info: bytes) -> bytes:
    """Return 32 bytes by HKDF with SHA-256 (RFC 5869)."""
    return HKDF(SHA256(), KEY_BYTES, salt, info).derive(key)


def seal_key(key: bytes, content: bytes) -> bytes:
    """Encrypt the one message that `key` ever encrypts: with a nonce of zeroes."""
    return ChaCha20Poly1305(key).encrypt(_ZERO_NONCE, content, None)


def open_key(key: bytes, sealed: bytes) -> bytes | None:
    """Return what `seal_key` was given; None where that was with another key."""
    try:
        return ChaCha20Poly1305(key).decrypt(_ZERO_NONCE, sealed, None)
    except InvalidTag:
        return None


def chunk_cipher(key: bytes) -> ChaCha20Poly1305:
    return ChaCha20Poly1305(key)


def ed25519_public(seed: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


def ed25519_sign(seed: bytes, message: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(seed).sign(message)


def ed25519_verify(public: bytes, signature: bytes, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def read_openssh_seed(text: bytes) -> bytes:
    """Return the seed of an ed25519 key in an OpenSSH file. Raises ValueError, with words for the user."""
    # Late, here and below: it takes twice as long as all the rest, and who encrypts has no use for it.
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_ssh_private_key(text, password=None)
    except (TypeError, ValueError) as error:
        if "password" in str(error).lower():
            raise ValueError(
                "it is protected by a passphrase, which is not asked for here: make a copy without "
                "one (ssh-keygen -p -N '' -f COPY) where nobody else can read it"
            ) from error
        raise ValueError("it is damaged, or not an OpenSSH private key") from error
    except Exception as error:  # the library's own class for what it does not know
        raise ValueError("it is of a kind that is not known here: use ssh-ed25519") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("it is not an ssh-ed25519 key, and no other kind is read here")
    return key.private_bytes_raw()


def openssh_file(seed: bytes) -> bytes:
    """Return an ed25519 key as OpenSSH's private key file, without a passphrase."""
    from cryptography.hazmat.primitives import serialization

    return Ed25519PrivateKey.from_private_bytes(seed).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
