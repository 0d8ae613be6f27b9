# SPDX-License-Identifier: Apache-2.0
"""A lock of an object (S3's Object Lock): what a request says of it, and an answer. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

# What a store says of an object without a lock.
UNLOCKED = ("NoSuchObjectLockConfiguration", "ObjectLockConfigurationNotFoundError")
#: Stores keep the time of a lock in whole seconds.
GRAIN_S = 2.0


class ObjectLock(NamedTuple):
    """Until when nobody may remove or change an object: seconds since 1970.

    `mode`: COMPLIANCE binds the owner of the bucket, too; GOVERNANCE lets whoever has a right of its own do it.
    """

    mode: str
    until_s: float

    def fields(self) -> dict[str, Any]:
        """Return what a request that makes an object says of it."""
        # Late: every archive's options load this module, and few archives are locked.
        from datetime import UTC, datetime

        until = datetime.fromtimestamp(self.until_s, UTC)
        return {"ObjectLockMode": self.mode, "ObjectLockRetainUntilDate": until}


# Whoever asks sees a hold without an end as one that lasts longer than anybody.
_FOR_EVER_S = 253_370_764_800.0


def locked_until_s(found: Mapping[str, Any]) -> float:
    """Return what an answer of the store says, in seconds since 1970; 0: nothing of a lock."""
    from datetime import datetime

    if found.get("ObjectLockLegalHoldStatus") == "ON":
        return _FOR_EVER_S
    until = found.get("ObjectLockRetainUntilDate") or found.get("Retention", {}).get(
        "RetainUntilDate"
    )
    return until.timestamp() if isinstance(until, datetime) else 0.0
