# SPDX-License-Identifier: Apache-2.0
"""The options of exports that are pulled, which the backup and the producer share."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from vmapipe.producer.pull.uri import NbdUri, NbdUriError, is_nbd_uri, parse_nbd_uri
from vmapipe.protocol.nbd.constants import DIRTY_BITMAP, string_fault
from vmapipe.runtime.arguments import wait_time
from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.text import name_text, without_user

_BITMAP = ",bitmap="
# A server that says nothing for so long hangs with its disk.
ANSWER_S = 120


def add_nbd_options(parser: argparse._ActionsContainer, *, several: bool) -> None:
    parser.add_argument(
        "--nbd",
        action="append",
        default=[],
        metavar="NAME=URI[,bitmap=B]",
        help="the disk of an NBD export, and its name in the archive: nbd://HOST[:PORT]/EXPORT, "
        "nbd+unix:///EXPORT?socket=PATH, or with TLS nbds:// and nbds+unix:// "
        "(?tls-certificates=DIR, ?tls-psk-file=FILE, &tls-hostname=NAME)"
        f"{'; may be repeated' if several else ''}. B: the dirty bitmap that the export offers, which has recorded since --base (without it: all is read)",
    )
    parser.add_argument(
        "--nbd-timeout",
        type=wait_time,
        default=ANSWER_S,
        metavar="SECONDS",
        help="how long an NBD server may answer nothing before the backup fails "
        f"(default: {ANSWER_S})",
    )
    parser.add_argument(
        "--trim",
        action="store_true",
        help="free on the NBD server what has been read: THE EXPORT'S DATA IS GONE AFTERWARDS; for "
        "scratch files that hold a snapshot and nothing else",
    )


class NbdDisk(NamedTuple):
    """The disk of an export: its name in the archive, the URI as it was said, and a dirty bitmap of it."""

    name: str
    uri: str
    bitmap: str = ""


def parse_nbd_disk(text: str) -> NbdDisk:
    """`NAME=URI[,bitmap=B]`, well-formed. Raises UsageError without a secret."""
    name, equals, uri = text.partition("=")
    if not equals or not name or is_nbd_uri(text):
        raise UsageError(
            f"--nbd {without_user(text)}: say NAME=URI, with the disk's name in the archive"
        )
    # In a URI a comma before such words is %2C.
    rest, comma, bitmap = uri.rpartition(_BITMAP)
    disk = NbdDisk(name, rest, bitmap) if comma else NbdDisk(name, uri)
    parse_uri(name, disk.uri)
    if comma and (not bitmap or string_fault(DIRTY_BITMAP + bitmap)):
        raise UsageError(f"disk {name_text(name)}: a bitmap's name has 1..1023 bytes, and no NUL")
    return disk


def parse_uri(name: str, text: str) -> NbdUri:
    """Raises UsageError, which does not quote the URI: it may hold a password."""
    try:
        return parse_nbd_uri(text)
    except NbdUriError as error:
        raise UsageError(f"disk {name_text(name)}: its NBD URI cannot be used: {error}") from None
