# SPDX-License-Identifier: Apache-2.0
"""Files that decide whom we trust: only root and we ourselves may be able to change them.

That is a matter of the file, of every folder above it, and of every link on the
way: whoever may rename things in one of these chooses what the path leads to.
"""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path

from vmapipe.runtime.errors import Failure

# As many links as the kernel follows in a path.
_MAX_LINKS = 40
# Never waits for a FIFO's writer, never becomes our terminal.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def check_trusted(path: Path) -> None:
    """Raises Failure when another user can change what `path` leads to, and OSError.

    A sticky folder (/tmp) is fine: there nobody renames what belongs to others.
    """
    place, left = Path("/"), [*reversed(Path(os.path.abspath(path)).parts[1:])]
    links = 0
    while left:
        name = left.pop()
        if name == "..":
            place = place.parent
            continue
        entry = place / name
        status = entry.lstat()
        if status.st_uid not in (0, os.geteuid()):
            raise _of_others(entry, status)
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if links > _MAX_LINKS:
                raise Failure(f"{path}: too many links")
            target = Path(os.readlink(entry))
            place = Path("/") if target.is_absolute() else place
            left += [part for part in reversed(target.parts) if part != "/"]
            continue
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if status.st_mode & 0o022 and not sticky:
            raise _of_others(entry, status)
        place = entry


def read_trusted(path: Path, most_bytes: int) -> bytes:
    """What is in a file that nobody else can change. Raises Failure, OSError; never waits."""
    check_trusted(path)
    return read_regular(path, most_bytes)[0]


def read_regular(path: Path, most_bytes: int) -> tuple[bytes, os.stat_result]:
    """What is in a regular file, and whose it is. Raises Failure, OSError; never waits."""
    fd = os.open(path, _FLAGS)
    try:
        # The open file is looked at: what has its name may change meanwhile.
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Failure(f"{path} is not a file (a folder, FIFO, socket or device is there)")
        return os.read(fd, most_bytes), status
    finally:
        os.close(fd)


def _of_others(path: Path, status: os.stat_result) -> Failure:
    quoted = shlex.quote(str(path))
    ways = []
    if status.st_uid not in (0, os.geteuid()):
        ways.append(f"chown -h {os.geteuid()} {quoted}")
    if status.st_mode & 0o022 and not stat.S_ISLNK(status.st_mode):
        ways.append(f"chmod go-w {quoted}")
    return Failure(
        f"{path}: other users can change it (mode {stat.S_IMODE(status.st_mode):04o}, owner "
        f"{status.st_uid}), and so decide who is trusted: {' && '.join(ways)}"
    )
