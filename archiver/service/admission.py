# SPDX-License-Identifier: Apache-2.0
"""Whether a client may open a job now: names, limits, quotas, and what the host has left. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vmapipe.archiver.service.jobs import Need, Place, Room, ServiceJob, need_of
from vmapipe.protocol import jobs
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.runtime.text import one_line

# What an archiver's process may take: some 45 MiB, its producers' window, compression.
JOB_MEMORY_BYTES = 128 << 20
_UNLIMITED = Need(1 << 30, 1 << 30)


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the whole service. `heartbeat_s`: a coordinator that is silent so long is dead."""

    max_jobs: int = 64
    min_free_bytes: int = 1 << 30
    min_memory_bytes: int = 256 << 20
    heartbeat_s: int = 90
    job_memory_bytes: int = JOB_MEMORY_BYTES
    #: Nothing may come from a job's producers for so long; 0: for ever.
    idle_s: int = 0
    #: For jobs together.
    most: Need = _UNLIMITED
    #: Connections that belong to no job.
    most_visitors: int = 64


class Facts(Protocol):
    """What the core asks the world."""

    def place(self, client: str, request: jobs.Open) -> Place:
        """Where its archive would go. Raises RemoteProtocolError."""

    def room(self) -> Room:
        """What the host has left."""

    def used_bytes(self, client: str) -> int:
        """What a client with a quota has stored, with what is being written."""


def admit(
    client: str, request: jobs.Open, running: Sequence[ServiceJob], bounds: Limits, facts: Facts
) -> Place:
    """Raises RemoteProtocolError with the reason for which there will be no such job."""
    fault = jobs.archive_name_fault(request.name)
    if fault:
        raise RemoteProtocolError(
            "bad-name", f"no archive can be called {one_line(request.name, 120)!r}: {fault}"
        )
    place = facts.place(client, request)
    if place.exists or any(job.place.path == place.path for job in running):
        raise RemoteProtocolError(
            "exists", f"{request.name} exists or is being made; choose another name"
        )
    if len(running) >= bounds.max_jobs:
        raise RemoteProtocolError("too-many-jobs", f"{len(running)} jobs are running; try later")
    mine = sum(job.client == client for job in running)
    if place.max_jobs and mine >= place.max_jobs:
        raise RemoteProtocolError(
            "too-many-jobs", f"{mine} jobs of this client are running; try later"
        )
    if place.shared and not place.max_jobs and mine >= bounds.max_jobs - len(running):
        raise RemoteProtocolError(
            "too-many-jobs",
            f"{mine} jobs of this client are running, and the other places are kept for others; "
            "try later",
        )
    _check_need(client, len(request.devices), running, bounds.most, shared=place.shared)
    if place.quota_bytes and place.used_bytes >= place.quota_bytes:
        raise RemoteProtocolError(
            "quota", f"{place.used_bytes} bytes are stored of a quota of {place.quota_bytes}"
        )
    room = facts.room()
    if room.free_bytes < bounds.min_free_bytes:
        raise RemoteProtocolError(
            "no-space",
            f"{room.free_bytes} bytes are free; {bounds.min_free_bytes} are kept free",
        )
    starting = 1 + sum(job.begun is None for job in running)
    if room.memory_bytes < bounds.min_memory_bytes + starting * bounds.job_memory_bytes:
        raise RemoteProtocolError(
            "no-memory", f"{room.memory_bytes} bytes of memory are available; try later"
        )
    return place


def _check_need(
    client: str, devices: int, running: Sequence[ServiceJob], most: Need, *, shared: bool
) -> None:
    """A client may take half of what is left; so there is always room for another one's first job."""
    need = need_of(devices)
    if any(its > all_of_it for its, all_of_it in zip(need, most, strict=True)):
        raise RemoteProtocolError(
            "too-many-jobs",
            f"a job of {devices} devices needs {need.connections} connections and "
            f"{need.descriptors} open files, and the service has {most.connections} and "
            f"{most.descriptors} for all jobs: its limit of open files has to be raised",
        )
    for number, what in enumerate(("connections", "open files")):
        taken = sum(job.need[number] for job in running)
        own = sum(job.need[number] for job in running if job.client == client)
        left = most[number] - taken
        # The first job of a client may take more than half.
        fair = left if not own or not shared else min(left, left - own)
        if need[number] > fair:
            raise RemoteProtocolError(
                "too-many-jobs",
                f"the job needs {need[number]} {what} of the service's, and {max(0, fair)} are left "
                "for this client; try later",
            )
