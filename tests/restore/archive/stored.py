# SPDX-License-Identifier: Apache-2.0
"""An archive as it may be stored: plain, and in each kind of compression."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.archives import archive
from tests.restore.support import (
    CONFIGS,
    DISKS,
    a_cancel,
    frames_and_notes,
    frames_with_table,
    members,
    one_frame,
)
from vmapipe.restore.archive.compressed import ReadOptions
from vmapipe.restore.archive.errors import InputError
from vmapipe.restore.archive.source import PlainFile, Source, open_source

RAW = archive(DISKS, CONFIGS)

STORED = {
    "none": RAW,
    "zstd, one frame": one_frame(RAW),
    "zstd, frames and notes": frames_and_notes(RAW),
    "zstd, seek table": frames_with_table(RAW),
    "gzip": members(RAW),
    "gzip, padded": members(RAW) + bytes(1000),
}


def read_all(opened: Source) -> bytes:
    if isinstance(opened, PlainFile):
        return opened.pread(opened.size_bytes + 10, 0)
    pieces = []
    while piece := opened.read(50_001):
        pieces.append(piece)
    return b"".join(pieces)


def bytes_of(name: str | Path, options: ReadOptions | None = None) -> bytes:
    with a_cancel() as cancel:
        opened = open_source(str(name), cancel, options)
        try:
            return read_all(opened)
        finally:
            opened.close()


def failure_of(name: str | Path, kind: type[Exception] = InputError) -> str:
    with pytest.raises(kind) as caught:
        bytes_of(name)
    return str(caught.value)
