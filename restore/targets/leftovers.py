# SPDX-License-Identifier: Apache-2.0
"""A process that removes what a killed restore leaves in a folder: named files that no process holds any more.

    python -m vmapipe.restore.targets.leftovers --parent-fd N --folder-fd N

It is needed only where a file cannot be without a name. It ends with the last process that
has the other end of its socket, the reader or one of its workers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence

from vmapipe.runtime.children import STOP_S, Child
from vmapipe.runtime.folders import HeldFolder

# What a new file is called where it has to have a name before it is complete.
PARTIAL = (".vmapipe-", ".partial")


class LeftoverRemover:
    """Its process, for one folder. Start it before the first file is made."""

    def __init__(self, folder: HeldFolder) -> None:
        """Raises OSError."""
        argv = ["--folder-fd", str(folder.fd)]
        self._child = Child("the remover of leftovers", __name__, argv, [folder.fd], fork=True)

    @property
    def fd(self) -> int:
        """The descriptor that a worker inherits, so that nothing is removed while it writes."""
        return self._child.socket.fileno()

    def close(self) -> None:
        """Our files have their names, or are gone: there is nothing left to do for it."""
        self._child.socket.close()
        self._child.reap(STOP_S)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vmapipe.restore.targets.leftovers")
    parser.add_argument("--parent-fd", type=int, required=True)
    parser.add_argument("--folder-fd", type=int, required=True)
    options = parser.parse_args(argv)
    # Who stops a restore stops the reader, which removes its files itself; we come last.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    while os.read(options.parent_fd, 1):
        pass
    with contextlib.suppress(OSError):
        HeldFolder.of_descriptor("", options.folder_fd).remove_leftovers(*PARTIAL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
