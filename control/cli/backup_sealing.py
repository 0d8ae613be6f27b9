# SPDX-License-Identifier: Apache-2.0
"""What a backup's command line says of encryption and signatures, checked before anything is touched."""

from __future__ import annotations

import argparse
import os

from vmapipe.archiver.arguments import recipients_of, signing_key_of
from vmapipe.runtime.errors import UsageError


def check_sealing(options: argparse.Namespace) -> None:
    """Read recipients and the key to sign with, before anything else is touched. Raises UsageError."""
    if options.sign is not None:
        _check_signing(options)
    if not options.encrypt_to:
        return
    if options.archiver:
        raise UsageError(
            "--encrypt-to: a service encrypts what it stores, and its own --encrypt-to says to whom"
        )
    for is_asked, name, why in (
        (options.notes, "--notes", "they stand beside the archive, where everybody can read them"),
        (options.drill, "--drill", "to boot from the archive this host would need the secret key"),
        (options.stable, "--stable", "what is encrypted is never the same twice"),
        (options.reproducible, "--reproducible", "what is encrypted is never the same twice"),
    ):
        if is_asked:
            raise UsageError(f"{name} and --encrypt-to exclude each other: {why}")
    options.encrypt_to = [recipient.text for recipient in recipients_of(options.encrypt_to)]


def _check_signing(options: argparse.Namespace) -> None:
    if options.archiver:
        raise UsageError("--sign: a service signs what it stores, and its own --sign names the key")
    if options.no_manifest:
        raise UsageError(
            "--sign and --no-manifest exclude each other: the manifest is what is signed"
        )
    signing_key_of(options.sign)
    options.sign = os.path.abspath(options.sign)


def sealing_options(options: argparse.Namespace) -> list[str]:
    """Return the options that a backup hands on to its archiver."""
    argv = [f"--encrypt-to={recipient}" for recipient in options.encrypt_to]
    return [*argv, f"--sign={options.sign}"] if options.sign else argv


def archive_ending(options: argparse.Namespace) -> str:
    """Return what follows `.vma` in the archive's name."""
    return (".zst" if options.compress else "") + (".age" if options.encrypt_to else "")
