# SPDX-License-Identifier: Apache-2.0
"""The options for what is kept to open and read archives quickly, of all commands that do not restore them."""

from __future__ import annotations

import argparse
import os
import shutil
from typing import TYPE_CHECKING

from vmapipe.control.cli.identity import identities_of
from vmapipe.runtime.arguments import size
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.folders import temporary_folder

if TYPE_CHECKING:
    from vmapipe.access.open_storage import Caches


def _default_index_folder() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return os.path.join(os.path.expanduser(base), "vmapipe", "index")


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Add where what makes an archive quick to open and to read is kept."""
    group = parser.add_argument_group("caches")
    group.add_argument(
        "--index-cache",
        metavar="DIR",
        default=_default_index_folder(),
        help="where an archive's index is kept for the next time (default: %(default)s)",
    )
    group.add_argument(
        "--no-index-cache", action="store_true", help="look at all extent headers at each start"
    )
    group.add_argument(
        "--cache",
        metavar="DIR",
        help="where an archive that is compressed as one piece is kept, decompressed, while it "
        "is served (default: $TMPDIR)",
    )
    group.add_argument(
        "--cache-size",
        type=size,
        metavar="SIZE",
        help="how much of that there may be (default: what is free there, less a tenth)",
    )


def cache_words(options: argparse.Namespace) -> list[str]:
    """Return these options as another process's, which may stand in another folder."""
    words = ["--index-cache", os.path.abspath(options.index_cache)]
    if options.no_index_cache:
        words.append("--no-index-cache")
    if options.cache:
        words += ["--cache", os.path.abspath(options.cache)]
    if options.cache_size is not None:
        words += ["--cache-size", str(options.cache_size)]
    for path in options.identity:
        words += ["--identity", os.path.abspath(path)]
    return words


def caches_of(options: argparse.Namespace) -> Caches:
    """Return the caches that the options ask for. Raises Failure."""
    # Late: a restore has these options, too, and mostly no use for all that opens an archive for access.
    from vmapipe.access.open_storage import Caches

    folder = options.cache or temporary_folder()
    limit = options.cache_size
    if limit is None:
        try:
            limit = shutil.disk_usage(folder).free * 9 // 10
        except OSError as error:
            raise Failure(f"cannot use {folder}: {os_error_text(error)}") from error
    index_folder = None if options.no_index_cache else options.index_cache
    return Caches(index_folder, folder, limit, identities_of(options))
