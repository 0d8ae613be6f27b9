# SPDX-License-Identifier: Apache-2.0
"""What each field of a message may hold: types and limits, as docs/wire-protocol.md has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

from vmapipe.protocol import limits


def is_uint(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64


def is_uuid(value: object) -> bool:
    return isinstance(value, bytes) and len(value) == limits.UUID_BYTES


def is_uuid_or_empty(value: object) -> bool:
    return value == b"" or is_uuid(value)


def is_text(value: object) -> bool:
    return (
        isinstance(value, str)
        and len(value) <= limits.MAX_REASON_CHARS
        and _has_no_surrogates(value)
    )


def is_name(value: object) -> bool:
    return (
        isinstance(value, str)
        and bool(value)
        and value.isprintable()
        and len(value.encode()) <= limits.MAX_NAME_BYTES
    )


def is_dev_id(value: object) -> bool:
    return is_uint(value) and 1 <= value <= limits.MAX_DEV_ID


def is_heartbeat(value: object) -> bool:
    return is_uint(value) and 1 <= value <= limits.MAX_HEARTBEAT_S


def _is_reconnect(value: object) -> bool:
    return is_uint(value) and value <= limits.MAX_RECONNECT_S


def _has_no_surrogates(value: str) -> bool:
    # What comes out of msgpack always is; a file's name need not be.
    return not any("\ud800" <= char <= "\udfff" for char in value)


def is_flag(value: object) -> bool:
    return isinstance(value, bool)


def check_of(kind: str, name: str) -> Callable[[object], bool]:
    """What a field of this message must pass."""
    return _CHECKS.get(f"{kind}.{name}") or _CHECKS[name]


# By key, or where one key means two things, by message and key.
_CHECKS: dict[str, Callable[[object], bool]] = {
    "version": is_uint,
    "job": is_uuid,
    "device": is_name,
    "size": is_uint,
    "program": is_text,
    "HELLO.shared": is_text,
    "WELCOME.shared": is_flag,
    "scattered": is_flag,
    "HELLO.session": is_uuid_or_empty,
    "session": is_uuid,
    "reconnect_s": _is_reconnect,
    "attempt": is_uint,
    "received": is_uint,
    "ended": is_flag,
    "dev_id": is_dev_id,
    "credit": is_uint,
    "frame_bytes": is_uint,
    "heartbeat_s": is_heartbeat,
    "limit": is_uint,
    "acked": is_uint,
    "frames": is_uint,
    "clusters": is_uint,
    "uuid": is_uuid,
    "code": is_text,
    "reason": is_text,
}
