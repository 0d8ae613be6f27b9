# SPDX-License-Identifier: Apache-2.0
"""What was verified when: a small file beside the archive, and the choice of what is verified next. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

SUFFIX = ".verified.json"
MAX_BYTES = 4096
_FORMAT = "vmapipe-verified"
# Of a name, a digest, an etag: far more than any has.
_MAX_TEXT_CHARS = 300


class Verified(NamedTuple):
    """`identity`: of the file that was verified (`StoredName`); `data_checked`: all its data was, too."""

    time_s: int
    ok: bool
    data_checked: bool
    identity: str


def encode_verified(verified: Verified) -> bytes:
    fields = {"format": _FORMAT, "version": 1, **verified._asdict()}
    return json.dumps(fields).encode() + b"\n"


def decode_verified(raw: bytes | None, identity: str, now_s: float) -> Verified | None:
    """None for anything that is not one of this very file, or is from a time to come."""
    try:
        if raw is None or len(raw) > MAX_BYTES:
            return None
        fields = json.loads(raw)
        if fields["format"] != _FORMAT or fields["version"] != 1:
            return None
        found = Verified(
            int(fields["time_s"]),
            fields["ok"] is True,
            fields["data_checked"] is True,
            str(fields["identity"])[:_MAX_TEXT_CHARS],
        )
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
        return None
    return found if found.identity == identity and 0 <= found.time_s <= now_s + 1 else None


class Candidate(NamedTuple):
    """An archive and when it was found whole last, in seconds since 1970; 0: never."""

    name: str
    verified_s: float


def choose_due(
    archives: Iterable[Candidate], older_s: float | None, sample: float | None, now_s: float
) -> list[str]:
    """Those that are verified now, the longest unverified first.

    `older_s`: only such as were not found whole for so long. `sample`: at most this share of all
    archives, from 0 to 1, and at least one: as many runs as make a whole see each of them.
    """
    everything: Sequence[Candidate] = sorted(
        archives, key=lambda each: (each.verified_s, each.name)
    )
    due = [each for each in everything if older_s is None or each.verified_s <= now_s - older_s]
    if sample is not None:
        due = due[: max(1, -int(-len(everything) * sample // 1))]
    return [each.name for each in due]
