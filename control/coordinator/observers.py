# SPDX-License-Identifier: Apache-2.0
"""The companions of every backup: its socket, its log, hooks, metrics, notes."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vmapipe.control.coordinator.hooks import HookOptions, Hooks
from vmapipe.control.coordinator.status import JobState, now_s
from vmapipe.control.coordinator.status_socket import JobServer
from vmapipe.runtime.arguments import wait_time
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.runtime.events import ChildCommands, Emit, Event
from vmapipe.runtime.object_names import is_object
from vmapipe.runtime.uuids import random_uuid

# Long enough to mount a share or to wake a host.
_HOOK_S = 300


class ParentContext(NamedTuple):
    """The ways in and out of a backup: its events, its cancellation, and commands for its speed."""

    emit: Emit
    cancel: Cancel
    commands: ChildCommands


class JobContext(NamedTuple):
    """A backup in its surroundings."""

    emit: Emit
    cancel: Cancel
    commands: ChildCommands
    server: JobServer
    job_id: bytes
    hooks: Hooks


class Surroundings(NamedTuple):
    """What one of several backups of a command has around it; its hooks of the whole job are theirs.

    `hold` is entered before the hook backup-start; `variables`: more of the hooks' environment.
    """

    hold: contextlib.AbstractContextManager[object]
    variables: Mapping[str, str]


def add_attending_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("logs, hooks, metrics")
    group.add_argument(
        "--log",
        metavar="FILE",
        help="append a log in the words of vzdump's (with --vmid: beside the archive by itself)",
    )
    group.add_argument(
        "--hook",
        default="",
        metavar="PROGRAM",
        help="run this at each phase, as vzdump runs its hook script: PROGRAM PHASE MODE VMID; one "
        "that fails at job-start or backup-start ends the backup (docs/operations/reports.md)",
    )
    group.add_argument(
        "--hook-timeout",
        type=wait_time,
        default=_HOOK_S,
        metavar="SECONDS",
        help=f"a hook that takes longer is ended, and has failed (default: {_HOOK_S})",
    )
    group.add_argument(
        "--metrics",
        metavar="FILE.prom",
        help="write how it went, well or not, for Prometheus' node_exporter (textfile collector)",
    )


@contextlib.contextmanager
def job_context(
    options: argparse.Namespace,
    place: str,
    around: ParentContext,
    surroundings: Surroundings | None = None,
) -> Iterator[JobContext]:
    """`place`: of the archive, for people everywhere. Raises Failure; also when a hook that must not fail has failed.

    `surroundings`: it is one of several backups of a command.
    """
    report, cancel, commands = around
    _check(options)
    job_id = random_uuid()
    log_path = options.log
    # Beside an encrypted archive nothing stands that tells of what is in it.
    if options.vmid is not None and not log_path and not options.encrypt_to:
        log_path = f"{options.archive.partition('.vma')[0]}.log"
    with (
        JobServer(job_id.hex(), place, cancel, commands) as server,
        _metrics(options.metrics, server, report),
        contextlib.ExitStack() as stack,
    ):
        listeners = [report, server.take]
        emit = _all(listeners)
        variables = dict(surroundings.variables) if surroundings else {}
        hooks = _hooks(options, server.state, cancel, log_path, emit, variables)
        stack.enter_context(hooks.log() if surroundings else hooks.job())
        if log_path:
            # Imported here: other backups start sooner without.
            from vmapipe.control.coordinator.log import JobLog

            named = options.vmid is not None
            what, kind = (f"VM {options.vmid}", "qemu") if named else (place, "")
            log = JobLog(
                log_path,
                what,
                kind,
                options.log_level or "info",
                append=bool(options.log),
                complain=report,
            )
            listeners.append(stack.enter_context(log))
        stack.enter_context(hooks.backup(surroundings.hold if surroundings else None))
        listeners.append(hooks.take)
        if server.notice:
            emit({"event": "notice", "text": server.notice})
        yield JobContext(emit, cancel, commands, server, job_id, hooks)
        if options.notes:
            # Imported here: only Proxmox VE's archives have them.
            from vmapipe.control.coordinator.proxmox import write_notes

            try:
                write_notes(options.archive, options.notes)
            except Failure as failure:
                # The archive is stored all the same: who hears of a failure takes it for absent.
                emit({"event": "notice", "text": str(failure)})
    if options.lock and not options.archiver:
        # A log that several backups are appended to is not this archive's.
        along = [f"{options.archive}.notes", *([log_path] if log_path and not options.log else [])]
        _lock_along(options.archive, along, report)


def _lock_along(archive: str, names: list[str], report: Emit) -> None:
    """Lock what this command has put beside the archive, where that is a file."""
    if is_object(archive) or not os.path.isfile(archive):
        return
    from vmapipe.runtime.immutable import lock_beside

    try:
        lock_beside(archive, names)
    except Failure as failure:
        report({"event": "notice", "text": str(failure)})


def _check(options: argparse.Namespace) -> None:
    if options.metrics and not options.metrics.endswith(".prom"):
        raise UsageError(f"--metrics {options.metrics}: node_exporter reads *.prom files only")


@contextlib.contextmanager
def _metrics(path: str | None, server: JobServer, report: Emit) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        server.state.fail(str(error), now_s())
        raise
    finally:
        if path:
            # Imported here: a backup without metrics starts sooner.
            from vmapipe.control.coordinator.metrics import write

            try:
                write(path, server.state)
            except Failure as failure:
                report({"event": "notice", "text": str(failure)})


def _all(listeners: list[Emit]) -> Emit:
    """Tell each event to all that are in the list by then."""

    def emit(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return emit


def _hooks(
    options: argparse.Namespace,
    state: JobState,
    cancel: Cancel,
    log_path: str | None,
    emit: Emit,
    variables: Mapping[str, str],
) -> Hooks:
    """Raises UsageError."""
    # As vzdump names them.
    places = {**variables}
    if log_path:
        places["LOGFILE"] = os.path.abspath(log_path)
    if os.path.isabs(state.archive):
        places["DUMPDIR"] = os.path.dirname(state.archive)
    runs = options.qmp or options.monitor or options.libvirt
    hook = HookOptions(
        os.path.abspath(options.hook) if "/" in options.hook else options.hook,
        options.hook_timeout,
        options.mode or "snapshot" if runs else "stop",
        "" if options.vmid is None else str(options.vmid),
        places,
    )
    hooks = Hooks(hook, state, cancel, emit)
    hooks.check()
    return hooks
