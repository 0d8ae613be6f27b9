# SPDX-License-Identifier: Apache-2.0
"""What of a backup's command line goes on to its archiver and producers."""

from __future__ import annotations

import argparse
import os
import stat

from vmapipe.control.priorities import buffer_of_each
from vmapipe.runtime.arguments import split_named
from vmapipe.runtime.errors import Failure, os_error_text


def buffer_options(options: argparse.Namespace, disks: int) -> list[str]:
    """Of each of so many live disks. Raises UsageError."""
    return [
        f"--buffer={buffer_of_each(options.buffer, options.buffer_total, disks)}",
        f"--spool={options.spool}",
        f"--spool-size={options.spool_size}",
        f"--guest-wait={options.guest_wait}",
    ]


def open_configs(options: argparse.Namespace) -> list[int]:
    """Descriptors of configs that are pipes (stdin, a shell's `<(…)`), which only we can read.

    Rewrites their words in `options.config` to name the descriptor.
    """
    fds = []
    for index, text in enumerate(options.config):
        name, path = split_named(text)
        try:
            if not stat.S_ISFIFO(os.stat(path).st_mode) and not path.startswith("/dev/"):
                continue
            # Its writer is waited for by whoever reads it, who can be stopped.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise Failure(f"unable to read file '{path}': {os_error_text(error)}") from error
        fds.append(fd)
        options.config[index] = f"{name}=/dev/fd/{fd}"
    return fds


def archiver_options(options: argparse.Namespace) -> list[str]:
    """The options that a backup hands on to its archiver."""
    # With "=", because a name may begin with a dash.
    words = [f"--config={config}" for config in options.config]
    if options.compress:
        words.append(f"--compress={options.compress}")
    if not options.archiver:
        words.append(f"--threads={options.threads}")
    if options.manifest:
        words.append(f"--manifest={options.manifest}")
    if options.no_manifest:
        words.append("--no-manifest")
    elif options.json and not options.archiver:
        words.append("--manifest-events")
    if options.reproducible:
        words.append("--reproducible")
    if options.uuid:
        words.append(f"--uuid={options.uuid.hex()}")
    return words
