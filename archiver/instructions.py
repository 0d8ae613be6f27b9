# SPDX-License-Identifier: Apache-2.0
"""What the core of a job tells the process around it to do."""

from __future__ import annotations

from typing import NamedTuple

from vmapipe.archiver.device import Mark
from vmapipe.protocol.packing import Part
from vmapipe.vma.header import Header
from vmapipe.vma.packer import PackedExtent


class Send(NamedTuple):
    peer: bytes
    parts: list[Part]


class Begin(NamedTuple):
    header: Header
    raw_header: bytes


class Put(NamedTuple):
    extent: PackedExtent[Mark]


class Finish(NamedTuple):
    """All extents are out: store the archive under its name."""


class Abandon(NamedTuple):
    """The job failed: leave nothing behind."""

    reason: str


class Notice(NamedTuple):
    """Something worth a line in the log."""

    text: str


Instruction = Send | Begin | Put | Finish | Abandon | Notice
