# SPDX-License-Identifier: Apache-2.0
"""One stream of events; who listens decides how it looks.

An event is a flat dict with the key `event` (a word) and fields; sizes in
bytes, times in seconds. A child process writes its events as JSON lines to its
parent; a process run by hand gives them to a renderer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Event = dict[str, Any]
Emit = Callable[[Event], None]

# A line that a child writes; longer ones are a defect, and end the reader's patience.
MAX_LINE_BYTES = 1 << 20


def encode_line(event: Event) -> bytes:
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"


class LineSplitter:
    """Bytes in any pieces to events. Bounded by the longest line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Event]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            raise ValueError("an event line without an end")
        return [json.loads(line) for line in lines if line]


def ignore(event: Event) -> None:
    """For those who do not listen."""
