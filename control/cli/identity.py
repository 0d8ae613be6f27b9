# SPDX-License-Identifier: Apache-2.0
"""`--identity FILE`: the secret keys of every command that reads archives."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.text import one_line

if TYPE_CHECKING:
    from vmapipe.crypt.age import AgeIdentity


def add_identity_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--identity",
        action="append",
        default=[],
        metavar="FILE",
        help="a file with secret keys for encrypted archives: age's, or an OpenSSH ed25519 key without "
        "a passphrase; may be repeated",
    )


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
    try:
        from vmapipe.restore.archive.decrypt import read_identities
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "cryptography":
            raise
        raise UsageError(
            "--identity needs the library cryptography: pip install 'vmapipe[age]', or Debian's "
            "python3-cryptography"
        ) from error
    found, warnings = read_identities(paths)
    for text in warnings:
        print(one_line(text), file=sys.stderr, flush=True)
    return found
