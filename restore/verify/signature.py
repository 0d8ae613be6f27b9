# SPDX-License-Identifier: Apache-2.0
"""Who made an archive, and is it still that one: its manifest's signature, and the stored file's SHA-256.

Loaded only where somebody asks for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from vmapipe.crypt.keys import ssh_public
from vmapipe.crypt.sshsig import (
    MAX_SIGNATURE_BYTES,
    SignatureFault,
    fingerprint,
    is_signed_by,
    parse_publics,
    parse_signature,
)
from vmapipe.restore.archive.errors import InputError
from vmapipe.restore.archive.manifest import manifest_beside, open_manifest_file, read_stored
from vmapipe.restore.archive.object import object_exists
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Damaged, UsageError, os_error_text
from vmapipe.runtime.object_names import is_object
from vmapipe.runtime.side_files import read_keys
from vmapipe.vma.manifest import MAX_LINE_BYTES, read_totals
from vmapipe.vma.sealed import StoredFile

SUFFIX = ".sig"
# Some thousand keys.
_MAX_KEYS_BYTES = 1 << 20
_PIECE_BYTES = 1 << 20


class SignatureError(Damaged):
    """The archive is not the one that was signed, or not signed by whom it should be; `is_absent`: not at all."""

    is_absent = False


class UnsignedError(SignatureError):
    """There is no signature."""

    is_absent = True


class Signed(NamedTuple):
    """`fingerprint`: of the key, as `ssh-keygen -l` has it; `stored`: what was signed of the file."""

    fingerprint: str
    stored: StoredFile


def read_publics(texts: Sequence[str]) -> list[bytes]:
    """Read what `--signed-by` says: `ssh-ed25519 …`, or a file with such lines. Raises UsageError."""
    found: list[bytes] = []
    for text in texts:
        try:
            if text.startswith("ssh-"):
                found.append(ssh_public(text))
                continue
            found += parse_publics(read_keys(text, _MAX_KEYS_BYTES, None))
        except OSError as error:
            raise UsageError(f"--signed-by {text}: {os_error_text(error)}") from error
        except ValueError as error:
            raise UsageError(f"--signed-by {text}: {error}") from error
    return found


def check_signature(
    name: str, manifest: str | None, publics: Sequence[bytes], cancel: Cancel
) -> Signed:
    """Check that one of `publics` signed the archive `name`, and that it is that one, byte for byte.

    `manifest`: where it is not beside the archive. Reads the stored file once. Raises SignatureError,
    InputError, UsageError for what can be read only once, Cancelled.
    """
    if name == "-" or name.startswith(("fd:", "exec:", "/dev/fdset/")):
        raise UsageError(
            f"--signed-by: {name} can be read only once: check the stored file, with vmapipe verify"
        )
    path = manifest or manifest_beside(name, cancel)
    if path is None:
        raise UnsignedError(f"{name} is not signed: there is no manifest beside it")
    text = _read_signature(path + SUFFIX, cancel)
    if text is None:
        raise UnsignedError(f"{name} is not signed: there is no {path}{SUFFIX}")
    sha512, end = _look_at(path, cancel)
    try:
        signature = parse_signature(text)
    except SignatureFault as error:
        raise SignatureError(f"the signature {path}{SUFFIX}: {error}") from error
    if signature.public not in publics:
        raise SignatureError(
            f"{name} is signed by another key ({fingerprint(signature.public)}) than was asked for"
        )
    if not is_signed_by(signature, sha512):
        raise SignatureError(
            f"the manifest {path} is not the one that was signed: it, or the signature, was changed or "
            "forged"
        )
    # From here on all that the manifest says is the signer's word.
    stored = read_stored(path, cancel) or _stored_in(end)
    if not stored.sha256:
        raise SignatureError(f"the manifest {path} was not made to be signed: it has no SHA-256")
    total_bytes, sha256 = _sha256_of(name, cancel)
    if (total_bytes, sha256) != (stored.total_bytes, stored.sha256):
        raise SignatureError(
            f"{name} is not the archive that was signed: it was exchanged or changed ({total_bytes} "
            f"bytes, {stored.total_bytes} were signed)"
        )
    return Signed(fingerprint(signature.public), stored)


def _stored_in(manifest_end: bytes) -> StoredFile:
    totals = read_totals(manifest_end)
    return StoredFile(totals.file_bytes, totals.file_digest, totals.file_sha256)


def _read_signature(path: str, cancel: Cancel) -> str | None:
    if is_object(path) and not object_exists(path, (cancel,)):
        return None
    try:
        with open_manifest_file(path, cancel) as file:
            return file.read(MAX_SIGNATURE_BYTES + 1).decode("ascii", "replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read the signature {path}: {os_error_text(error)}") from error


def _look_at(path: str, cancel: Cancel) -> tuple[bytes, bytes]:
    """Return the SHA-512 of the manifest and its end, with its last line. Raises InputError."""
    hasher, end = hashlib.sha512(), b""
    try:
        with open_manifest_file(path, cancel) as file:
            while piece := file.read(_PIECE_BYTES):
                cancel.check()
                hasher.update(piece)
                end = (end + piece)[-MAX_LINE_BYTES:]
    except OSError as error:
        raise InputError(f"cannot read the manifest {path}: {os_error_text(error)}") from error
    return hasher.digest(), end


def _sha256_of(name: str, cancel: Cancel) -> tuple[int, bytes]:
    hasher, total_bytes = hashlib.sha256(), 0
    view = memoryview(bytearray(_PIECE_BYTES))
    try:
        with open_manifest_file(name, cancel) as file:
            while got := file.readinto(view):
                cancel.check()
                hasher.update(view[:got])
                total_bytes += got
    except OSError as error:
        raise InputError(f"cannot read {name}: {os_error_text(error)}") from error
    return total_bytes, hasher.digest()
