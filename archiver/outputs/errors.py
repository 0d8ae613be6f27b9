# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with an output, in words that say the way out."""

from __future__ import annotations

import errno

from vmapipe.runtime.errors import Failure, os_error_text

_WAY_OUT = {
    errno.ENOSPC: "free space or choose another folder",
    errno.EDQUOT: "free space, raise the quota or choose another folder",
    errno.EFBIG: "the file system or a limit (ulimit -f) allows no larger file",
    errno.EROFS: "choose another folder",
    errno.EACCES: "choose another folder or mend its permissions",
    errno.ENAMETOOLONG: "choose a shorter name: .partial is added while it is written",
    errno.EIO: "the device is failing: look at the kernel's log",
}
# Whoever takes a stream has gone. ECONNRESET is what a socket says.
_READER_GONE = (errno.EPIPE, errno.ECONNRESET)


class OutputFailure(Failure):
    """An output cannot take the archive.

    `target` is the output's description, `written_bytes` how much it had taken,
    `errno` the system's reason (0: it was not the system).
    """

    def __init__(
        self, text: str, *, target: str = "", written_bytes: int = 0, errno: int = 0
    ) -> None:
        super().__init__(text)
        self.target = target
        self.written_bytes = written_bytes
        self.errno = errno


def write_failure(target: str, written_bytes: int, error: OSError) -> OutputFailure:
    """For an error in the middle of the archive."""
    number = error.errno or 0
    after = f"after {size_text(written_bytes)}"
    if number in _READER_GONE:
        text = f"cannot write {target}: whoever read the archive has closed it, {after}"
    else:
        text = f"cannot write {target}: {os_error_text(error)} {after}{_way_out(number)}"
    return OutputFailure(text, target=target, written_bytes=written_bytes, errno=number)


def open_failure(verb: str, target: str, error: OSError) -> OutputFailure:
    """For an error before the first byte: "cannot `verb` `target`: ..."."""
    number = error.errno or 0
    text = f"cannot {verb} {target}: {os_error_text(error)}{_way_out(number)}"
    return OutputFailure(text, target=target, errno=number)


def _way_out(number: int) -> str:
    return f"; {_WAY_OUT[number]}" if number in _WAY_OUT else ""


def size_text(size_bytes: int) -> str:
    """For people: three digits and a decimal unit, as disks are sold in."""
    size = float(size_bytes)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 999.5:  # what is more would be rounded to 1e+03
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} PB"
