# SPDX-License-Identifier: Apache-2.0
"""What the core of the service tells the process around it to do."""

from __future__ import annotations

from typing import NamedTuple

from vmapipe.protocol.jobs import Open
from vmapipe.protocol.packing import Part
from vmapipe.runtime.events import Event


class Send(NamedTuple):
    peer: bytes
    parts: list[Part]


class Start(NamedTuple):
    """An archiver for this job, that makes the archive `path`."""

    job: bytes
    request: Open
    path: str


class Stop(NamedTuple):
    """Ask the job's archiver to give up."""

    job: bytes


class Kill(NamedTuple):
    """It was asked, and does not."""

    job: bytes


class Release(NamedTuple):
    """Nobody of this job is needed any more: what belongs to it may go."""

    job: bytes


class Attach(NamedTuple):
    """From now on what this peer sends is passed to the job's archiver, and its answers back."""

    peer: bytes
    job: bytes


class Forward(NamedTuple):
    """Pass on the message that has just come from this peer."""

    peer: bytes


class Detach(NamedTuple):
    peer: bytes


class Drop(NamedTuple):
    """End this peer's connection; it may come again."""

    peer: bytes


class Log(NamedTuple):
    event: Event


Instruction = Send | Start | Stop | Kill | Release | Attach | Forward | Detach | Drop | Log
