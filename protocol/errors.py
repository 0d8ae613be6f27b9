# SPDX-License-Identifier: Apache-2.0
"""Protocol errors: local (our bug) and remote (the peer's)."""

from __future__ import annotations


class ProtocolError(Exception):
    """Base of the errors of this room."""

    exit_code = 1


class LocalProtocolError(ProtocolError):
    """This side tried something the dialogue does not allow: a defect of the caller."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something it must not. `code` is a word of docs/wire-protocol.md."""

    def __init__(self, code: str, reason: str) -> None:
        self.code = code
        self.reason = reason
        super().__init__(f"{reason} [{code}]")


def connection_lost(device: str, limit_s: float) -> str:
    """Return the text that both sides report when a connection did not come back."""
    return f"device {device!r}: the connection was lost for {limit_s:.0f} s"
