# SPDX-License-Identifier: Apache-2.0
"""Errors of an NBD connection: protocol errors, and a refusal to open an export.

`LocalProtocolError` (of the room) is this side's own fault. Errors of a single
request are no exceptions: they are numbers (NBD_EIO, …) in a reply.
"""

from __future__ import annotations

from vmapipe.protocol.errors import ProtocolError
from vmapipe.protocol.nbd.constants import (
    ERROR_NAMES,
    NBD_EINVAL,
    NBD_EIO,
    NBD_ENOSPC,
    NBD_ENOTSUP,
    NBD_EPERM,
    OPTION_NAMES,
    REPLY_ERROR_NAMES,
)


class NbdProtocolError(ProtocolError):
    """The peer broke the protocol, or asks for too much: send `unsent`, then close the connection.

    `unsent` are answers to what came before in the same call of `feed`.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.unsent = b""
        super().__init__(reason)


class NbdRefusedError(ProtocolError):
    """The server will not: send `unsent` (a polite NBD_OPT_ABORT), then close the connection.

    `option` is what was asked for, `reply_type` an NBD_REP_ERR_ number or None
    where the server just closed the connection, `message` its own words.
    """

    def __init__(
        self, option: int, reply_type: int | None, message: str = "", *, unsent: bytes = b""
    ) -> None:
        self.option = option
        self.reply_type = reply_type
        self.message = message
        self.unsent = unsent
        asked = OPTION_NAMES.get(option, f"option {option}")
        if reply_type is None:
            text = f"the NBD server closed the connection after {asked}"
        else:
            error = REPLY_ERROR_NAMES.get(reply_type, f"error {reply_type:#x}")
            text = f"the NBD server answers {error} to {asked}"
        super().__init__(f"{text}: {message}" if message else text)


# proto.md, Error values: "EDQUOT and EFBIG errors to NBD_ENOSPC". Linux's
# numbers; those that NBD has are the same.
_BY_ERRNO = {
    13: NBD_EPERM,  # EACCES
    27: NBD_ENOSPC,  # EFBIG
    30: NBD_EPERM,  # EROFS
    38: NBD_ENOTSUP,  # ENOSYS
    122: NBD_ENOSPC,  # EDQUOT
}


def error_of_errno(errno: int | None) -> int:
    """The NBD error number for a failed system call's; NBD_EIO for those without one of their own.

    NBD_ENOTSUP and NBD_EOVERFLOW come out of it as well: they are for
    FAST_ZERO and for DF only, and the caller has to see to that.
    """
    if errno is None:
        return NBD_EIO
    return errno if errno in ERROR_NAMES else _BY_ERRNO.get(errno, NBD_EIO)


def error_from_peer(number: int) -> int:
    """proto.md, Error values: "treat an unexpected error value as if it had been NBD_EINVAL"."""
    return number if number in ERROR_NAMES else NBD_EINVAL
