# SPDX-License-Identifier: Apache-2.0
"""The options of an archiver that runs as a service."""

from __future__ import annotations

import argparse

from vmapipe.runtime.arguments import size, wait_time


def add_service_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "as a service",
        "Any number of jobs, each in a process of its own, opened by `vmapipe backup --archiver`. "
        "Clients can only write new archives: not read, list, change or remove any.",
    )
    group.add_argument(
        "--directory",
        metavar="DIR",
        help="be a service, and store the archives here: a folder, or s3://BUCKET/PREFIX",
    )
    group.add_argument(
        "--max-jobs",
        type=int,
        default=64,
        metavar="N",
        help="jobs at once (default: 64); further ones are refused",
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
    group.add_argument("--json", action="store_true", help="log JSON lines")


def _stop_time(text: str) -> int:
    """As any wait, and 0: at once."""
    return 0 if text == "0" else wait_time(text)
