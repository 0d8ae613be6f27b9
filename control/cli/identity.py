# SPDX-License-Identifier: Apache-2.0
"""`--identity FILE` and `--signed-by PUB`: the keys of the commands that read archives."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmapipe.runtime.arguments import needing_cryptography
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.events import Emit
from vmapipe.runtime.text import one_line

if TYPE_CHECKING:
    from vmapipe.crypt.age import AgeIdentity
    from vmapipe.restore.archive.source import Source


def add_identity_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--identity",
        action="append",
        default=[],
        metavar="FILE",
        help="a file with secret keys for encrypted archives: age's, or an OpenSSH ed25519 key without "
        "a passphrase; may be repeated",
    )


def add_signed_by_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--signed-by",
        action="append",
        default=[],
        metavar="PUB",
        help="first check that this key has signed the archive, and that it is that one: "
        "'ssh-ed25519 …', or a file with such lines; may be repeated; exit code 4 if it is not",
    )


def add_decrypt_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--decrypt",
        action="store_true",
        help="store an encrypted archive in the clear; else --encrypt-to has to name who may read the new one",
    )


def check_decrypt_option(options: argparse.Namespace) -> None:
    """Raises UsageError."""
    if options.decrypt and options.encrypt_to:
        raise UsageError("--decrypt and --encrypt-to exclude each other")


def check_stays_encrypted(name: str, source: Source, options: argparse.Namespace) -> None:
    """What was encrypted never becomes readable because an option was forgotten. Raises UsageError."""
    if source.is_encrypted and not options.encrypt_to and not options.decrypt:
        raise UsageError(
            f"{name} is encrypted, and the new archive would not be: --encrypt-to names who may read it, "
            "--decrypt stores it in the clear"
        )


def check_signed(name: str, options: argparse.Namespace, cancel: Cancel, emit: Emit) -> str | None:
    """Return the fingerprint of the key that has signed the archive; None: nobody has asked.

    Raises SignatureError where it is not signed by whom it should be, UsageError, InputError.
    """
    if not options.signed_by:
        return None
    # Late: a compiled library takes 30 ms.
    with needing_cryptography("--signed-by"):
        from vmapipe.restore.verify.signature import check_signature, read_publics
    publics = read_publics(options.signed_by)
    signed = check_signature(name, getattr(options, "manifest", None), publics, cancel)
    emit({"event": "notice", "text": f"{name}: signed by ssh-ed25519 {signed.fingerprint}"})
    return signed.fingerprint


def signed_word(name: str, options: argparse.Namespace, cancel: Cancel) -> str | None:
    """Return "yes", "no" (there is no signature) or "other" (another key's, or of another archive); None: nobody has asked.

    Raises UsageError, InputError.
    """
    if not options.signed_by:
        return None
    with needing_cryptography("--signed-by"):
        from vmapipe.restore.verify.signature import SignatureError
    try:
        check_signed(name, options, cancel, lambda event: None)
    except SignatureError as error:
        return "no" if error.is_absent else "other"
    return "yes"


def identities_of(options: argparse.Namespace) -> tuple[AgeIdentity, ...]:
    """Read the secret keys that `--identity` names, once. Raises UsageError."""
    if not hasattr(options, "identities"):
        options.identities = identities_in(options.identity)
    found: tuple[AgeIdentity, ...] = options.identities
    return found


def identities_in(paths: Sequence[str]) -> tuple[AgeIdentity, ...]:
    """Read secret keys; those that others can read are told on stderr. Raises UsageError."""
    if not paths:
        return ()
    # Late: a compiled library takes 30 ms, and most archives are not encrypted.
    with needing_cryptography("--identity"):
        from vmapipe.restore.archive.decrypt import read_identities
    found, warnings = read_identities(paths)
    for text in warnings:
        print(one_line(text), file=sys.stderr, flush=True)
    return found
