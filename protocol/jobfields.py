# SPDX-License-Identifier: Apache-2.0
"""What each field of a message about a job may hold (docs/wire-protocol.md, section 14)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmapipe.protocol.fields import (
    is_flag,
    is_heartbeat,
    is_name,
    is_text,
    is_uint,
    is_uuid,
    is_uuid_or_empty,
)

# Devices, configs, or numbers of devices; the archive format has at most 255 of each.
MAX_JOB_ITEMS = 256
# What one configuration may have in an archive.
MAX_CONFIG_BYTES = 65535


def _are_uints(item: object) -> bool:
    return isinstance(item, tuple) and len(item) <= MAX_JOB_ITEMS and all(map(is_uint, item))


def _are_names(item: object) -> bool:
    return isinstance(item, tuple) and len(item) <= MAX_JOB_ITEMS and all(map(is_name, item))


def _are_configs(item: object) -> bool:
    return (
        isinstance(item, tuple)
        and len(item) <= MAX_JOB_ITEMS
        and all(isinstance(part, tuple) and len(part) == 2 for part in item)
        and all(is_name(name) and "/" not in name for name, _ in item)
        and all(isinstance(data, bytes) and len(data) <= MAX_CONFIG_BYTES for _, data in item)
    )


CHECKS: dict[str, Callable[[Any], bool]] = {
    "version": is_uint,
    "job": is_uuid,
    # What a service thinks of the name, it says in words: `archive_name_fault`.
    "name": is_text,
    "devices": _are_names,
    "configs": _are_configs,
    "compress": is_text,
    "manifest": is_flag,
    "uuid": is_uuid_or_empty,
    "program": is_text,
    "reason": is_text,
    "heartbeat_s": is_heartbeat,
    "sizes": _are_uints,
    "stored": is_uint,
    "plain": is_uint,
    "done": _are_uints,
    "zero": _are_uints,
    "text": is_text,
    "archive": is_text,
    "code": is_text,
}
