# SPDX-License-Identifier: Apache-2.0
"""Events of a job's core, and the instructions that it answers each with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vmapipe.archiver.device import Mark
from vmapipe.protocol.packing import Part
from vmapipe.vma.header import Header
from vmapipe.vma.packer import PackedExtent


class Started(NamedTuple):
    """The first event of a job: an archive of configs only needs no producer."""


class Received(NamedTuple):
    """A message from `peer`, whoever that is; from `client` if it has proved to be that."""

    peer: bytes
    parts: Sequence[Part]
    now: float
    client: str = ""


class Written(NamedTuple):
    """An extent that held data of `dev_ids` was written; `marks` are its notes."""

    marks: dict[int, Mark]
    dev_ids: set[int]


class Stored(NamedTuple):
    """The archive is complete, on disk, under its name."""


class GivenUp(NamedTuple):
    """The output failed, or the job was cancelled. The first reason counts."""

    reason: str


class Revoked(NamedTuple):
    """A client may no longer come: what it was sending is given up."""

    client: str


class Ticked(NamedTuple):
    """Time has passed: about once a second. `now`, as everywhere: a monotonic clock's seconds."""

    now: float


Event = Started | Received | Written | Stored | GivenUp | Revoked | Ticked


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
