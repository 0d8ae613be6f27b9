# SPDX-License-Identifier: Apache-2.0
"""An archiver that runs elsewhere, as a service: what a backup does differently then."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from vmapipe.runtime.arguments import check_endpoint
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.children import Child, Children
from vmapipe.runtime.errors import EXIT_USAGE, Cancelled, Failure, UsageError
from vmapipe.runtime.events import Emit


class Service(NamedTuple):
    """`link_options`: how all processes of the backup speak to it."""

    endpoint: str
    link_options: tuple[str, ...] = ()

    def name_of(self, archive: str) -> str:
        """For people: where it is, and what it is called there."""
        return f"{self.endpoint}/{archive}"


def service_of(options: argparse.Namespace) -> Service | None:
    """What `--archiver` and its keys say. Raises UsageError for what goes only with our own one."""
    if options.archiver is None:
        if options.keys or options.insecure_plain_tcp:
            raise UsageError("--keys and --insecure-plain-tcp belong to --archiver")
        return None
    check_endpoint(options.archiver, plain_tcp=options.insecure_plain_tcp, keys=options.keys)
    # Imported here: most archives are made on this host.
    from vmapipe.protocol.service import archive_name_fault

    fault = archive_name_fault(options.archive)
    if fault:
        raise UsageError(
            f"{options.archive!r}: with --archiver, ARCHIVE is a file's name at the service: {fault}"
        )
    if options.manifest:
        raise UsageError("--manifest FILE: a service stores the manifest beside the archive")
    if options.vmid is not None:
        raise UsageError(
            "--vmid writes a log beside the archive; with --archiver, name it yourself"
        )
    if options.reproducible:
        raise UsageError("--reproducible is for an archiver of this host")
    words = [f"--connect-timeout={options.connect_timeout}"]
    if options.keys:
        words.append(f"--keys={options.keys}")
    if options.insecure_plain_tcp:
        words.append("--insecure-plain-tcp")
    return Service(options.archiver, tuple(words))


def await_opened(children: Children, archiver: Child, emit: Emit, cancel: Cancel) -> None:
    """Until the service has taken the job: only then producers may come. Raises Failure.

    It ends: `archiver` (remote.py) waits for no answer without a limit.
    """
    while True:
        for child, event in children.wait(1.0):
            if child is not archiver:
                continue
            if event is None:
                raise (UsageError if child.exit_code == EXIT_USAGE else Failure)(child.verdict())
            if event["event"] == "listening":
                emit(event)
                return
        if cancel.asked:
            children.stop()
            raise Cancelled(cancel.reason, cancel.signum)
