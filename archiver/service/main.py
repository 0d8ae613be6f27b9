# SPDX-License-Identifier: Apache-2.0
"""`vmapipe archiver --directory DIR`: the command line of the service."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vmapipe.archiver.job.spec import RECONNECT_S
from vmapipe.archiver.outputs.base import MAX_THREADS
from vmapipe.archiver.service.admission import ServiceLimits
from vmapipe.archiver.service.archivers import ArchiverProcesses
from vmapipe.archiver.service.front import Front
from vmapipe.archiver.service.jobs import Need
from vmapipe.archiver.service.server import ServiceLoop, ServiceSockets
from vmapipe.archiver.service.storage import (
    STORE_JOB_MEMORY_BYTES,
    ClientLimits,
    ClientRules,
    FolderStorage,
    ObjectStorage,
)
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.events import Event, encode_line
from vmapipe.runtime.keys import read_server_keys
from vmapipe.runtime.object_names import is_object
from vmapipe.runtime.process import notify
from vmapipe.runtime.syscalls import writable
from vmapipe.runtime.text import one_line

# Held for a reader that is slow; what comes then is counted only.
_MOST_HELD_BYTES = 256 << 10
# A descriptor that is writable takes so much at once without a wait (PIPE_BUF).
_PIECE_BYTES = 4096


class LogStream:
    """Writes lines to `fd` without waiting for its reader.

    `left_out`: the line that tells how many were dropped. Call `flush` from time to time.
    """

    def __init__(self, fd: int, left_out: Callable[[int], str]) -> None:
        self._fd = fd
        self._left_out = left_out
        self._held: deque[bytes] = deque()
        self._held_bytes = 0
        self._dropped = 0

    def write(self, line: str) -> None:
        data = line.encode(errors="backslashreplace")
        if self._held_bytes + len(data) > _MOST_HELD_BYTES:
            self.flush()
        if self._held_bytes + len(data) > _MOST_HELD_BYTES:
            self._dropped += 1
            return
        self._hold(data)
        self.flush()

    def flush(self) -> None:
        """Write what is held, as far as that needs no wait."""
        # A log whose reader is gone is no reason to give up backups.
        try:
            while self._held and writable(self._fd, 0.0):
                self._write_piece()
        except OSError:
            self._held.clear()
            self._held_bytes = 0
        if self._dropped and not self._held:
            count, self._dropped = self._dropped, 0
            self._hold(self._left_out(count).encode())
            self.flush()

    def close(self, timeout_s: float) -> None:
        """Write the last lines, if they are read in time."""
        deadline = time.monotonic() + timeout_s
        self.flush()
        with contextlib.suppress(OSError):
            while self._held and writable(self._fd, max(0.0, deadline - time.monotonic())):
                self.flush()

    def _hold(self, data: bytes) -> None:
        self._held.append(data)
        self._held_bytes += len(data)

    def _write_piece(self) -> None:
        data = self._held[0]
        written = os.write(self._fd, data[:_PIECE_BYTES])
        self._held_bytes -= written
        if written == len(data):
            self._held.popleft()
        else:
            self._held[0] = data[written:]


# What a file system is kept from being filled with, for its other users.
_MIN_FREE_BYTES = 1 << 30
# For a log's reader that is slow.
_LAST_WORDS_S = 2.0


def serve_jobs(options: argparse.Namespace, cancel: Cancel) -> None:
    """Raises Failure when it cannot begin; afterwards it ends when a stop is asked for."""
    _check(options)
    line_of = _json_line if options.json else _text_line

    def left_out(count: int) -> str:
        text = f"{count} lines of the log were left out, because nobody read it"
        return line_of({"event": "notice", "text": text})

    log = LogStream((sys.stdout if options.json else sys.stderr).fileno(), left_out)

    def emit(event: Event) -> None:
        log.write(line_of(event))

    keys = read_server_keys(options.keys) if options.keys else None
    usual = ClientLimits(quota_bytes=options.quota, max_jobs=options.client_jobs)
    rules = ClientRules(
        usual,
        Path(options.keys, "clients") if options.keys else None,
        per_client=options.per_client,
    )
    to_store = is_object(options.directory)
    ending = ".age" if options.encrypt_to else ""
    is_of_one_host = options.listen.startswith("ipc://")
    storage = ObjectStorage if to_store else FolderStorage
    places = storage(options.directory, rules, ending, is_of_one_host=is_of_one_host)
    bounds = ServiceLimits(
        options.max_jobs,
        _MIN_FREE_BYTES if options.min_free is None else options.min_free,
        options.min_memory,
        options.client_timeout,
        idle_s=options.idle_timeout,
    )
    if to_store:
        bounds = replace(bounds, job_memory_bytes=STORE_JOB_MEMORY_BYTES)
    link = ServiceSockets(options.listen, keys)
    try:
        if link.budget is not None:
            bounds = replace(
                bounds,
                most=Need(link.budget.jobs, link.budget.rest),
                most_unassigned=link.budget.unassigned,
            )
        argv = _archiver_options(options, link)
        argv += [f"--sign={options.sign}"] if options.sign else []
        argv += [f"--encrypt-to={recipient}" for recipient in options.encrypt_to]
        argv += options.lock_words
        archivers = ArchiverProcesses(argv, link.watch, link.unwatch, to_store=to_store)
        try:
            if isinstance(places, ObjectStorage):
                places.check(
                    archivers.left_uploads, lambda text: emit({"event": "notice", "text": text})
                )
            front = Front(bounds, places, time.monotonic())
            emit({"event": "ready", "listen": link.endpoint, "directory": options.directory})
            notify("READY=1", "STATUS=0 jobs are running")
            ServiceLoop(front, link, archivers, emit, log.flush).run(cancel, options.stop_timeout)
        finally:
            archivers.close()
    finally:
        link.close()
    emit({"event": "notice", "text": "stopped"})
    log.close(_LAST_WORDS_S)


def _check(options: argparse.Namespace) -> None:
    if options.output or options.device or options.expect or options.config or options.job:
        raise UsageError(
            "--directory makes a service, and its clients say what goes into an archive: without "
            "--output, --device, --expect, --config, --job"
        )
    if options.per_client and not options.keys:
        raise UsageError("--per-client needs --keys: clients are told apart by their keys")
    if options.quota and not options.per_client:
        raise UsageError("--quota needs --per-client: it counts what is in a client's folder")
    if is_object(options.directory):
        _check_for_store(options)
    _reconnect_limit_s(options)
    if not 1 <= options.threads <= MAX_THREADS:
        raise UsageError(f"--threads {options.threads}: use 1 to {MAX_THREADS}")
    if options.max_jobs < 0 or options.client_jobs < 0:
        raise UsageError("--max-jobs and --client-jobs are at least 0")


def _check_for_store(options: argparse.Namespace) -> None:
    """Refuse options that an object store cannot fulfil. Raises UsageError."""
    if options.quota:
        raise UsageError(
            "--quota: an object store is not counted for each client; set a limit at the store"
        )
    if options.min_free is not None:
        raise UsageError("--min-free: an object store does not say what is free")


def _archiver_options(options: argparse.Namespace, link: ServiceSockets) -> list[str]:
    """Return the options of every job's archiver."""
    argv = [f"--threads={options.threads}", f"--heartbeat={options.heartbeat}"]
    argv.append(f"--reconnect-limit={_reconnect_limit_s(options)}")
    argv.append(f"--start-timeout={options.start_timeout}")
    return argv if link.is_local else [*argv, "--from-afar"]


def _reconnect_limit_s(options: argparse.Namespace) -> int:
    """For producers. Raises UsageError.

    Their coordinator comes through the same network. It may have spoken last a
    third of its own limit before a cut, and must not be taken for dead earlier than they.
    """
    most_s: int = 2 * options.client_timeout // 3
    if options.reconnect_limit is None:
        return min(RECONNECT_S, most_s)
    limit_s = int(options.reconnect_limit)
    if not 0 <= limit_s <= most_s:
        raise UsageError(
            f"--reconnect-limit {limit_s}: from 0 to two thirds of --client-timeout "
            f"({options.client_timeout} s), because after that a job's coordinator is given up"
        )
    return limit_s


def _json_line(event: Event) -> str:
    return encode_line({"time": round(time.time(), 3), **event}).decode()


def _text_line(event: Event) -> str:
    client = event.get("client")
    of = f" of client {client}" if client else ""
    match event["event"]:
        case "ready" if "directory" in event:
            text = f"listening on {event['listen']}, archives go to {event['directory']}"
        case "job-opened":
            text = f"{event['archive']}: opened{of}, {len(event['devices'])} devices"
        case "job-stored":
            text = f"{event['archive']}: stored{of}, {event['stored_bytes']} bytes in {event['seconds']} s"
        case "job-failed":
            text = f"{event['archive']}: failed{of}: {event['text']}"
        case "job-refused":
            text = f"{event['archive']}: refused{of}: {event['text']} [{event['code']}]"
        case "job-notice":
            text = f"{event['archive']}: {event['text']}"
        case "notice":
            text = event["text"]
        case name:  # the service has no others
            text = name
    return one_line(text) + "\n"
