# SPDX-License-Identifier: Apache-2.0
"""What the compressor is asked to do. Apart from it, so that most jobs need not load zstd."""

from __future__ import annotations

import re
from typing import NamedTuple

from vmapipe.runtime.errors import UsageError

DEFAULT_LEVEL = 3
# zstd has 22; from 20 on a frame takes more than 100 MiB of memory to make,
# which is a poor trade for a few per cent.
MAX_LEVEL = 19
# More threads than this only take memory: 4 MiB in and 4 MiB out for each.
MAX_THREADS = 64
_WORD = re.compile(r"zstd(?::([0-9]{1,2}))?")


class Compression(NamedTuple):
    """`level` 1..19, `threads` >= 1."""

    level: int = DEFAULT_LEVEL
    threads: int = 1


def parse_compression(text: str, threads: int) -> Compression:
    """`zstd` or `zstd:LEVEL`. Raises UsageError."""
    match = _WORD.fullmatch(text)
    level = int(match[1] or DEFAULT_LEVEL) if match else 0
    if not 1 <= level <= MAX_LEVEL:
        raise UsageError(f"--compress {text}: use zstd or zstd:1 to zstd:{MAX_LEVEL}")
    if not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"--threads {threads}: use 1 to {MAX_THREADS}")
    return Compression(level=level, threads=threads)
