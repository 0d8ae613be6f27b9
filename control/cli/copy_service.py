# SPDX-License-Identifier: Apache-2.0
"""`vmapipe copy … tcp://HOST:PORT` and `vmapipe repack … tcp://HOST:PORT/NAME`: into an archiver service."""

from __future__ import annotations

import argparse

from vmapipe.archiver.outputs.cluster_digests import SUFFIX as DIGESTS_SUFFIX
from vmapipe.control.cli.copy import compression_of, new_name
from vmapipe.control.cli.errors import named, source_name
from vmapipe.control.cli.inspect import read_options
from vmapipe.control.coordinator.remote_archiver import RefusedJob
from vmapipe.control.coordinator.render import read_progress
from vmapipe.places.archives import KeptArchive
from vmapipe.places.place import KeptPlace
from vmapipe.places.reading import SoundArchive
from vmapipe.places.repack import Changes
from vmapipe.places.sending import (
    ArchiveRequest,
    ServiceLink,
    contents_of,
    repacked_contents,
    send_archive,
)
from vmapipe.protocol.service import archive_name_fault
from vmapipe.restore.archive.source import Source
from vmapipe.runtime.arguments import check_endpoint
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Damaged, Failure, UsageError
from vmapipe.runtime.event_types import StoredEvent
from vmapipe.runtime.events import Emit
from vmapipe.runtime.text import human_bytes, one_line
from vmapipe.vma.errors import ArchiveError

# What a service does by its own rules, and what is not known there.
_OF_THE_SERVICE = (
    (
        "encrypt_to",
        "--encrypt-to: a service encrypts what it stores, and its own --encrypt-to says to whom",
    ),
    ("lock", "--lock: a service locks what it stores, and its own --lock says for how long"),
    ("sign", "--sign: a service signs what it stores, and its own --sign says with which key"),
)


def service_link(options: argparse.Namespace, endpoint: str) -> ServiceLink:
    """Return how the service is reached. Raises UsageError, also for what is the service's to decide."""
    if getattr(options, "move", False):
        raise UsageError(
            "--move: what a service has stored cannot be read back from here, and without that nothing is removed: "
            "copy, verify it on its host, then remove the old one"
        )
    check_endpoint(endpoint, plain_tcp=options.insecure_plain_tcp, keys=options.keys)
    for name, text in _OF_THE_SERVICE:
        if getattr(options, name, None):
            raise UsageError(text)
    return ServiceLink(endpoint, options.keys, options.connect_timeout, options.speed)


def check_may_leave(name: str, source: Source, options: argparse.Namespace) -> None:
    """What was encrypted is not handed to a service because an option was forgotten. Raises UsageError."""
    if source.is_encrypted and not options.decrypt:
        raise UsageError(
            f"{name} is encrypted, and a service stores what is in it by its own rules, in the clear if it does not "
            "encrypt: --decrypt sends it all the same"
        )


class ServiceCopy:
    """One run of `vmapipe copy` into a service."""

    def __init__(
        self,
        options: argparse.Namespace,
        link: ServiceLink,
        emit: Emit,
        cancel: Cancel,
    ) -> None:
        self._options = options
        self._link = link
        self._emit = emit
        self._cancel = cancel
        self._copied = self._bytes = 0

    def summary(self, count: int) -> str:
        there = count - self._copied
        return f"sent {self._copied} archives, {human_bytes(self._bytes)}; {there} were there"

    def take(self, source: KeptPlace, archive: KeptArchive) -> None:
        """Raises Failure, Damaged, Cancelled."""
        path = source.full_name(archive.name)
        request = ArchiveRequest(
            new_name(self._options, archive.name),
            compression_of(self._options, archive.name) or "",
            digests=archive.name + DIGESTS_SUFFIX in archive.beside,
        )
        try:
            with SoundArchive(path, self._cancel, read_options(self._options)) as sound:
                check_may_leave(path, sound.source, self._options)
                tell = read_progress(self._emit, archive.file.size_bytes)
                stored = send_archive(
                    contents_of(sound), request, self._link, tell, self._emit, self._cancel
                )
                was_checked = sound.manifest is not None
        except ArchiveError as error:
            raise Damaged(named(path, error)) from error
        except RefusedJob as error:
            if error.code != "exists":
                raise
            if self._options.missing:
                return
            raise Failure(
                f"{error}; what is there cannot be compared: pass over it with --missing"
            ) from error
        self._copied += 1
        self._bytes += archive.file.size_bytes
        self._emit({"event": "notice", "text": stored_text(path, stored, was_checked=was_checked)})


def stored_text(path: str, stored: StoredEvent, *, was_checked: bool) -> str:
    text = f"sent {one_line(path)}: stored as {one_line(stored['archive'])}, {human_bytes(stored['stored_bytes'])}"
    return text if was_checked else f"{text}; it has no manifest, so nothing says that it is whole"


def parse_archive(word: str) -> tuple[str, str]:
    """Split tcp://HOST:PORT/NAME into the service and the archive's name there. Raises UsageError."""
    scheme, _, rest = word.partition("://")
    at, _, name = rest.rpartition("/") if scheme == "ipc" else rest.partition("/")
    fault = archive_name_fault(name)
    if fault:
        raise UsageError(
            f"{word}: behind the service's address goes the archive's name there, as in {scheme}://{at}/vm.vma: {fault}"
        )
    return f"{scheme}://{at}", name


def repack_into_service(
    options: argparse.Namespace, changes: Changes, emit: Emit, cancel: Cancel
) -> None:
    """Send what becomes of an archive to the service that the output names. Raises Damaged, Failure, Cancelled."""
    for option in ("manifest", "no_manifest", "reproducible"):
        if getattr(options, option):
            raise UsageError(
                f"--{option.replace('_', '-')}: a service stores by its own rules, in the order in which it is sent to"
            )
    endpoint, name = parse_archive(options.output)
    link = service_link(options, endpoint)
    path = source_name(options.archive)
    try:
        with SoundArchive(options.archive, cancel, read_options(options)) as sound:
            check_may_leave(path, sound.source, options)
            tell = read_progress(emit, getattr(sound.source, "size_bytes", 0))
            spool = (options.spool, options.spool_size)
            with repacked_contents(sound, changes, *spool, cancel) as contents:
                request = ArchiveRequest(name, options.compress or "")
                stored = send_archive(contents, request, link, tell, emit, cancel)
            was_checked = sound.manifest is not None
    except ArchiveError as error:
        raise Damaged(named(options.archive, error)) from error
    emit({"event": "notice", "text": stored_text(path, stored, was_checked=was_checked)})
