# SPDX-License-Identifier: Apache-2.0
"""The folder of a service's sockets, and of services that were killed, which it removes.

The folder is locked as long as its service lives: the kernel gives the lock
back however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "vmapipe-service-"


class WorkFolder:
    """Only its owner can enter it."""

    def __init__(self) -> None:
        _remove_leftovers()
        while True:
            self.path = tempfile.mkdtemp(prefix=_PREFIX)
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            if os.path.exists(self.path):
                return
            # Another service took it for a leftover in the moment before the lock.
            os.close(self._fd)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._fd)


def _remove_leftovers() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        # Somebody else's, one in use, or gone just now: not ours to remove.
        with contextlib.suppress(OSError):
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(path, flags)
            try:
                if os.fstat(fd).st_uid == os.geteuid():
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)
