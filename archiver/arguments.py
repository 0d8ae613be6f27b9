# SPDX-License-Identifier: Apache-2.0
"""How an archive is stored: the same options for the archiver and for a backup.

Apart from the rest of the archiver, because a backup's coordinator needs no
more of it, and starts sooner without.
"""

from __future__ import annotations

import argparse
import os

from vmapipe.archiver.compression import MAX_THREADS
from vmapipe.runtime.arguments import job_id


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """How an archive is stored: the same words for the archiver and for a backup."""
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="store this file in the archive, by its name or as NAME; may be repeated",
    )
    parser.add_argument(
        "--compress",
        metavar="zstd[:LEVEL]",
        help="compress, at level 1 to 19 (default level: 3)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        # More than we may use would only push each other out of the cache.
        default=min(len(os.sched_getaffinity(0)), MAX_THREADS),
        metavar="N",
        help="threads that compress (default: one a core that may be used)",
    )
    parser.add_argument(
        "--manifest",
        metavar="FILE",
        help="where the digests go, a file or any other place that an archive could go to "
        "(default: ARCHIVE.manifest.json beside a file)",
    )
    parser.add_argument("--no-manifest", action="store_true", help="make no digests")
    parser.add_argument(
        "--reproducible",
        action="store_true",
        help="same disks, same bytes: one disk after the other, a uuid made from the names and "
        "sizes, the time from SOURCE_DATE_EPOCH",
    )
    parser.add_argument(
        "--uuid", type=job_id, metavar="UUID", help="the archive's uuid (default: a random one)"
    )
