# SPDX-License-Identifier: Apache-2.0
"""How an archive is stored: the same options for the archiver and for a backup.

Apart from the rest of the archiver, because a backup's coordinator needs no
more of it, and starts sooner without.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmapipe.archiver.outputs.base import MAX_THREADS
from vmapipe.runtime.arguments import (
    job_id,
    lock_time_s,
    needing_cryptography,
    size,
    split_named,
    wait_time,
)
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, UsageError, os_error_text
from vmapipe.runtime.side_files import read_awaited
from vmapipe.vma.errors import LimitError
from vmapipe.vma.header import MAX_BLOB_BYTES, MAX_CONFIGS, Config

if TYPE_CHECKING:
    from vmapipe.crypt.age import Recipient


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add how an archive is stored: the same options for the archiver and for a backup."""
    group = parser.add_argument_group("what the archive holds, and how it is stored")
    group.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="store this file in the archive, by its name or as NAME; may be repeated",
    )
    add_storing_options(group)
    add_lock_options(group)
    group.add_argument(
        "--manifest",
        metavar="FILE",
        help="where the digests go, a file or any other place that an archive could go to "
        "(default: ARCHIVE.manifest.json beside a file)",
    )
    group.add_argument("--no-manifest", action="store_true", help="make no digests")
    group.add_argument(
        "--sign",
        metavar="KEYFILE",
        help="sign the manifest with this OpenSSH ed25519 key (vmapipe keygen --sign makes one), in "
        "MANIFEST.sig: a forged or exchanged archive is then told by verify --signed-by",
    )
    group.add_argument(
        "--reproducible",
        action="store_true",
        help="same disks, same bytes: one disk after the other, a uuid made from the names and "
        "sizes, the time from SOURCE_DATE_EPOCH",
    )
    group.add_argument(
        "--stable",
        action="store_true",
        help="for a store that keeps what is the same only once (restic, borg): extents in which the "
        "order of arrival does not show, also of a machine in use, and a uuid made from the disks' "
        "names and the configs",
    )
    group.add_argument(
        "--uuid", type=job_id, metavar="UUID", help="the archive's uuid (default: a random one)"
    )


def add_storing_options(group: argparse._ArgumentGroup) -> None:
    """Add how its bytes are stored, whatever they are."""
    group.add_argument(
        "--compress",
        metavar="zstd[:LEVEL]",
        help="compress, at level 1 to 19 (default level: 3)",
    )
    group.add_argument(
        "--threads",
        type=int,
        # More than we may use would only push each other out of the cache.
        default=min(len(os.sched_getaffinity(0)), MAX_THREADS),
        metavar="N",
        help="threads that compress (default: one a core that may be used)",
    )
    group.add_argument(
        "--encrypt-to",
        action="append",
        default=[],
        metavar="RECIPIENT",
        help="encrypt with age, so that only who has the secret key can read it: age1…, "
        "'ssh-ed25519 …', or @FILE with such a line for each; may be repeated "
        "(docs/operations/encryption.md)",
    )


def signing_key_of(path: str | None) -> bytes:
    """Read what `--sign` names; empty: nothing is signed. Raises UsageError."""
    if path is None:
        return b""
    with needing_cryptography("--sign"):
        from vmapipe.archiver.outputs.sign import read_signing_key
    return read_signing_key(path)


LOCK_MODES = ("compliance", "governance")


def add_lock_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--lock",
        type=lock_time_s,
        metavar="TIME",
        help="for so long (12h, 30d, 1y) nobody can remove or change what is stored: Object Lock of s3://, "
        "immutable files in a folder (which root can lift)",
    )
    group.add_argument(
        "--lock-mode",
        choices=LOCK_MODES,
        help="of s3://: compliance binds the owner of the bucket, too (default); governance lets those lift "
        "it who have the right",
    )


def lock_arguments(options: argparse.Namespace) -> list[str]:
    """What an archiver is told of `--lock`. Raises UsageError."""
    if options.lock is None:
        if options.lock_mode:
            raise UsageError("--lock-mode says how --lock works: give --lock, too")
        return []
    if getattr(options, "archiver", None):
        raise UsageError(
            "--lock: a service locks what it stores, and its own --lock says for how long"
        )
    mode = [f"--lock-mode={options.lock_mode}"] if options.lock_mode else []
    return [f"--lock={max(1, options.lock // 3600)}h", *mode]


def recipients_of(texts: Sequence[str], cancel: Cancel | None = None) -> tuple[Recipient, ...]:
    """Read what `--encrypt-to` says. Raises UsageError where any of it cannot be used."""
    if not texts:
        return ()
    # Late: a compiled library takes 30 ms, and most backups do not encrypt.
    with needing_cryptography("--encrypt-to"):
        from vmapipe.archiver.outputs.encrypt import read_recipients
    return read_recipients(texts, cancel)


def add_service_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "as a service",
        "Any number of jobs, each in a process of its own, opened by `vmapipe backup --archiver`.\n"
        "Clients can only write new archives: not read, list, change or remove any.",
    )
    group.add_argument(
        "--directory",
        metavar="DIR",
        help="be a service, and store the archives here: a folder, or s3://BUCKET/PREFIX",
    )
    _add_service_limits(group)
    _add_client_limits(group)
    _add_service_times(group)
    group.add_argument("--json", action="store_true", help="log JSON lines")


def _add_service_limits(group: argparse._ArgumentGroup) -> None:
    """Add the limits of the service as a whole."""
    group.add_argument(
        "--max-jobs",
        type=int,
        default=0,
        metavar="N",
        help="jobs at once (default: 64, or as many as clients are listed); further ones are refused",
    )
    group.add_argument(
        "--min-free",
        type=size,
        metavar="SIZE",
        help="no new job when less is free in DIR (default: 1G; not with s3://)",
    )
    group.add_argument(
        "--min-memory",
        type=size,
        default=256 << 20,
        metavar="SIZE",
        help="no new job when less memory would be left (default: 256M)",
    )


def _add_client_limits(group: argparse._ArgumentGroup) -> None:
    """Add the limits of each client."""
    group.add_argument(
        "--per-client",
        action="store_true",
        help="a folder for each client, called as its key is (with --keys)",
    )
    group.add_argument(
        "--quota",
        type=size,
        default=0,
        metavar="SIZE",
        help="what each client may have in its folder (default: no limit; not with s3://)",
    )
    group.add_argument(
        "--client-jobs",
        type=int,
        default=0,
        metavar="N",
        help="jobs at once of each client (default: half of those that are left, where there are "
        "other clients)",
    )


def _add_service_times(group: argparse._ArgumentGroup) -> None:
    """Add the times after which jobs are ended."""
    group.add_argument(
        "--client-timeout",
        type=wait_time,
        # Half as much again as a producer's lost connection is waited for: see main.py.
        default=90,
        metavar="SECONDS",
        help="a job whose `vmapipe backup` is silent for so long is ended (default: 90)",
    )
    group.add_argument(
        "--idle-timeout",
        type=_stop_time,
        # The slowest honest job, with --speed 1K, has a cluster in a minute.
        default=1800,
        metavar="SECONDS",
        help="a job from whose producers nothing comes for so long is ended (default: 1800; 0: never)",
    )
    group.add_argument(
        "--stop-timeout",
        type=_stop_time,
        # Below the 90 s after which systemd kills.
        default=60,
        metavar="SECONDS",
        help="after SIGTERM jobs may go on for so long (default: 60)",
    )


def _stop_time(text: str) -> int:
    """As any wait, and 0: at once."""
    return 0 if text == "0" else wait_time(text)


def read_configs(texts: Sequence[str], cancel: Cancel) -> tuple[Config, ...]:
    """`[NAME=]PATH` each. Raises Failure for what cannot be read or is too large."""
    if len(texts) > MAX_CONFIGS:
        raise UsageError(f"too many configs: {len(texts)}; the limit is {MAX_CONFIGS}")
    configs = []
    for text in texts:
        name, path = split_named(text)
        try:
            # One byte more than fits tells that it is too large, however large it is.
            data = read_awaited(path, MAX_BLOB_BYTES + 1, cancel)
        except OSError as error:
            raise Failure(f"unable to read file '{path}': {os_error_text(error)}") from error
        if len(data) > MAX_BLOB_BYTES:
            raise LimitError(
                f"config {name!r}: {path} has {os.path.getsize(path)} bytes; the limit is "
                f"{MAX_BLOB_BYTES}"
            )
        configs.append(Config(name, data))
    return tuple(configs)
