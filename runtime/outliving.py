# SPDX-License-Identifier: Apache-2.0
"""A process of ours that outlives the one that has started it, to clean up after that: both its ends.

All others end with their parent (children.py). It does not import those: it has to be ready soon.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)


def start_outliving(
    module: str,
    words: Sequence[str],
    fds: Sequence[int] = (),
    kind: socket.SocketKind = socket.SOCK_STREAM,
) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start a module with `words`, `--control-fd` and these descriptors; return our end of its socket, and it.

    The socket's end tells it that we are dead. Raises OSError.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with theirs:
        process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", module, *words),
                f"--control-fd={theirs.fileno()}",
            ],
            pass_fds=[theirs.fileno(), *fds],
            # Readers of our output must see its end, and no terminal's signal is meant for it.
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
    return ours, process


def ignore_ending_signals() -> None:
    """Ignore, in such a process, the signals that end the others. SIGKILL can end it."""
    for signum in _ENDING_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
