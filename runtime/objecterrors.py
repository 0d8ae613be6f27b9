# SPDX-License-Identifier: Apache-2.0
"""What an object store refuses, in words that say the way out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vmapipe.runtime.errors import Failure

# A store's own words, of which there may be any number, in the one line that the user sees.
MAX_WORDS = 300
_CONFLICTS = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
_WAY_OUT = {
    "NoSuchBucket": "create the bucket, or mend its name",
    "AccessDenied": "these credentials may not do that",
    "403": "these credentials may not do that, or are wrong",
    "InvalidAccessKeyId": "mend AWS_ACCESS_KEY_ID or ~/.aws/credentials",
    "SignatureDoesNotMatch": "mend AWS_SECRET_ACCESS_KEY or ~/.aws/credentials",
    "RequestTimeTooSkewed": "set this machine's clock",
}


class StoreError(Failure):
    """The store cannot be reached or refuses; `code` is its own word for why, if it said one."""

    def __init__(self, text: str, code: str = "") -> None:
        super().__init__(text)
        self.code = code


class ConflictError(StoreError):
    """The object is not as the request asked for: it exists already, or was replaced."""


def refusal(what: str, reason: Mapping[str, Any], times: int) -> StoreError:
    """`reason`: the store's `Code` and `Message`; `what`: "cannot write s3://…"."""
    code = str(reason.get("Code") or "")[:MAX_WORDS]
    words = str(reason.get("Message") or "no reason given")[:MAX_WORDS]
    often = f", {times} times" if times > 1 else ""
    out = f"; {_WAY_OUT[code]}" if code in _WAY_OUT else ""
    kind = ConflictError if code in _CONFLICTS else StoreError
    return kind(f"{what}: {code}: {words}{often}{out}", code)
