# SPDX-License-Identifier: Apache-2.0
"""Admission of jobs: the limits of the service, and whether a client's job fits into them. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from vmapipe.archiver.service.jobs import ArchivePlace, Need, ServiceJob, need_of
from vmapipe.protocol import service
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.runtime.text import one_line

# What an archiver's process may take: some 45 MiB, its producers' window, compression.
JOB_MEMORY_BYTES = 128 << 20
_UNLIMITED = Need(1 << 30, 1 << 30)
_USUAL_JOBS = 64
# What is kept for each listed client, however many others there are: a host with so many disks.
_KEPT_DEVICES = 8


class FreeSpace(NamedTuple):
    """Free disk space and memory of the host."""

    free_bytes: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """Limits of the whole service. `heartbeat_s`: a coordinator that is silent so long is dead."""

    #: 0: as many as are usual, and not less than clients are listed.
    max_jobs: int = 0
    min_free_bytes: int = 1 << 30
    min_memory_bytes: int = 256 << 20
    heartbeat_s: int = 90
    job_memory_bytes: int = JOB_MEMORY_BYTES
    #: Nothing may come from a job's producers for so long; 0: for ever.
    idle_s: int = 0
    #: For jobs together.
    most: Need = _UNLIMITED
    #: Connections that belong to no job.
    most_unassigned: int = 64


class ServiceStorage(Protocol):
    """What the core asks of the system: space, memory, quotas."""

    def place(self, client: str, request: service.Open) -> ArchivePlace:
        """Where its archive would go. Raises RemoteProtocolError."""

    def room(self) -> FreeSpace:
        """Free disk space and memory of the host."""

    def used_bytes(self, client: str) -> int:
        """Return the bytes that a client with a quota has stored, including archives being written."""


def admit(
    client: str,
    request: service.Open,
    running: Sequence[ServiceJob],
    bounds: ServiceLimits,
    facts: ServiceStorage,
) -> ArchivePlace:
    """Raises RemoteProtocolError with the reason for which there will be no such job."""
    fault = service.archive_name_fault(request.name)
    if fault:
        raise RemoteProtocolError(
            "bad-name", f"no archive can be called {one_line(request.name, 120)!r}: {fault}"
        )
    place = facts.place(client, request)
    if place.exists or any(job.place.path == place.path for job in running):
        raise RemoteProtocolError(
            "exists", f"{request.name} exists or is being made; choose another name"
        )
    _check_places(client, running, place, bounds.max_jobs)
    _check_need(client, len(request.devices), running, place, bounds.most)
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


def _check_places(
    client: str, running: Sequence[ServiceJob], place: ArchivePlace, max_jobs: int
) -> None:
    """A client may take half of what is left, and no place that a listed one without a job needs."""
    most = max_jobs or max(_USUAL_JOBS, 1 + len(place.others))
    # The process of a stored archive lives on for a moment, and its client, who knows that it is stored,
    # may come again: it takes no place, as long as there are not too many of them.
    busy = [job for job in running if job.stored is None]
    left = min(most - len(busy), 2 * most - len(running))
    mine = sum(job.client == client for job in busy)
    if left <= 0:
        raise RemoteProtocolError("too-many-jobs", f"{len(running)} jobs are running; try later")
    if place.max_jobs and mine >= place.max_jobs:
        raise RemoteProtocolError(
            "too-many-jobs", f"{mine} jobs of this client are running; try later"
        )
    if not mine or not place.others:
        return
    waiting = len(place.others - {job.client for job in running})
    # Where there are more clients than places, not all can have one at a time.
    kept = min(waiting, most // 2)
    if left <= kept or (not place.max_jobs and mine >= left):
        raise RemoteProtocolError(
            "too-many-jobs",
            f"{mine} jobs of this client are running, and the other places are kept for others; "
            "try later",
        )


def _check_need(
    client: str, devices: int, running: Sequence[ServiceJob], place: ArchivePlace, most: Need
) -> None:
    """A client may take half of what is left, and nothing of what is kept for others."""
    need = need_of(devices)
    if any(its > all_of_it for its, all_of_it in zip(need, most, strict=True)):
        raise RemoteProtocolError(
            "too-many-jobs",
            f"a job of {devices} devices needs {need.connections} connections and "
            f"{need.descriptors} open files, and the service has {most.connections} and "
            f"{most.descriptors} for all jobs: its limit of open files has to be raised",
        )
    for number, what in enumerate(("connections", "open files")):
        taken: Counter[str] = Counter()
        for job in running:
            taken[job.client] += job.need[number]
        own, left = taken[client], most[number] - taken.total()
        fair = left
        if place.others:
            share = kept_share(most[number], number, 1 + len(place.others))
            unkept = left - sum(max(0, share - taken[other]) for other in place.others)
            # The first job of a client may take more than half of what is free.
            fair = max(share - own, min(unkept, left - own) if own else unkept)
        if need[number] > min(left, fair):
            raise RemoteProtocolError(
                "too-many-jobs",
                f"the job needs {need[number]} {what} of the service's, and {max(0, fair)} are left "
                "for this client; try later",
            )


def kept_share(total: int, number: int, clients: int) -> int:
    """Return what of `total` is kept for each listed client: half of an equal part, or less.

    The other half is for whoever comes, so that a large job finds room where little is shared.
    """
    least, usual = need_of(1)[number], need_of(_KEPT_DEVICES)[number]
    share = max(least, min(usual, total // (2 * clients)))
    return share if share * clients <= total else 0
