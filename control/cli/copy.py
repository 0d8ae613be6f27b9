# SPDX-License-Identifier: Apache-2.0
"""`vmapipe copy`: archives from folders and stores into a folder, a store or a service."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from vmapipe.archiver.arguments import (
    add_lock_options,
    add_storing_options,
    lock_arguments,
    recipients_of,
)
from vmapipe.archiver.job.writer import ArchiveWriter
from vmapipe.archiver.main import store_for
from vmapipe.archiver.outputs.manifests import SIGNATURE_SUFFIX
from vmapipe.archiver.outputs.open import check_lockable, object_lock
from vmapipe.control.cli.errors import named
from vmapipe.control.cli.identity import (
    add_decrypt_option,
    check_decrypt_option,
    check_stays_encrypted,
)
from vmapipe.control.cli.inspect import add_read_options, read_options
from vmapipe.control.coordinator.render import add_report_options, read_progress, renderer
from vmapipe.places.archives import (
    PROTECTED_SUFFIX,
    KeptArchive,
    companions_anew,
    find_archives,
)
from vmapipe.places.copying import (
    StoredDigest,
    copied_beside,
    copy_archive,
    is_there,
    read_back,
)
from vmapipe.places.place import ArchiveFolder, KeptPlace, is_place, open_place
from vmapipe.places.reading import SoundArchive, source_state
from vmapipe.places.removal import remove
from vmapipe.places.repack import Writing, as_packed
from vmapipe.places.verified import SUFFIX as VERIFIED_SUFFIX
from vmapipe.runtime.arguments import (
    add_service_link_options,
    age_s,
    check_no_service_options,
    check_readable,
    is_service,
    make_parser,
)
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Damaged, Failure, UsageError
from vmapipe.runtime.events import Emit
from vmapipe.runtime.immutable import SUFFIX as LOCK_SUFFIX
from vmapipe.runtime.immutable import lock_beside, lock_files
from vmapipe.runtime.process import failure_of, run
from vmapipe.runtime.rate_limit import RateLimiter
from vmapipe.runtime.syscalls import readable
from vmapipe.runtime.text import human_bytes, one_line
from vmapipe.vma.errors import ArchiveError, VmaError

DESCRIPTION = """\
Copy archives, with all that belongs to them (manifest, digests, notes, log, protected
mark), from folders and object stores into a folder, an object store or an archiver
service. Each is held against its manifest on the way: what arrives is what the manifest
says, or has no name there. What is there already is passed over; a copy that was cut
goes on where it was. Nobody reads archives from a service: its folder or bucket is the
source.
"""

EPILOG = """\
SRC is an archive, a folder or s3://BUCKET/PREFIX, DST a folder or s3://BUCKET/PREFIX; folders below are not
looked into. With --compress or --encrypt-to the archives are stored anew, and called so (.zst, .age).
Into tcp://HOST:PORT their contents are sent, and the service stores them by its own rules.

examples:
  vmapipe copy /backup s3://offsite/vms --newer-than 30d
  vmapipe copy s3://offsite/vms/vm-2026-01-31.vma.zst /restore
  vmapipe copy /backup tcp://backup:7777 --keys /etc/vmapipe/keys --missing
  vmapipe copy /backup/vm-2026-01-31.vma /archive --move --compress zstd --encrypt-to @keys.txt

exit codes: 0 all are there, 1 something failed, 2 wrong use, 4 an archive is damaged and was not copied
"""
_UNLOCKED = (VERIFIED_SUFFIX, LOCK_SUFFIX)
_COMPRESSED = re.compile(r"\.(?:zst|gz|lzo)$")


def main(argv: Sequence[str], prog: str) -> int:
    parser = make_parser(prog, DESCRIPTION, EPILOG)
    group = parser.add_argument_group("which archives")
    group.add_argument(
        "--missing",
        action="store_true",
        help="pass over each whose name is there, without a look whether it is the same",
    )
    group.add_argument(
        "--newer-than",
        type=age_s,
        metavar="TIME",
        help="only archives whose names (or files, without a date in them) are not older: 12h, 30d, 8w",
    )
    group.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="only archives of this machine: the name up to the date; may be repeated",
    )
    group.add_argument(
        "--move",
        action="store_true",
        help="remove each from where it was, once its copy was read back and is the same",
    )
    group = parser.add_argument_group("stored anew on the way")
    add_storing_options(group)
    add_decrypt_option(group)
    add_lock_options(parser.add_argument_group("where it is stored"))
    add_service_link_options(parser)
    add_read_options(parser)
    add_report_options(parser)
    parser.add_argument("sources", metavar="SRC", nargs="+", help="an archive, a folder, s3://…")
    parser.add_argument(
        "target", metavar="DST", help="a folder, s3://BUCKET/PREFIX, or a service: tcp://HOST:PORT"
    )
    options = parser.parse_args(argv)
    return run(prog, lambda: _copy(prog, options))


def _copy(prog: str, options: argparse.Namespace) -> None:
    for name in options.sources:
        check_readable(name)
    # What is wrong with a key is told before anything is read, and not only when one is needed.
    check_decrypt_option(options)
    read_options(options)
    # Read once: the file may be a pipe, and each archive asks for them.
    options.encrypt_to = [each.text for each in recipients_of(options.encrypt_to)]
    cancel = Cancel()
    cancel.on_signals()
    with (
        _taker(options) as taker,
        renderer("copy", options, sys.stdout) as emit,
    ):
        job = taker(emit, cancel)
        codes: list[int] = []
        count = 0
        for source, archive in _chosen(options):
            count += 1
            try:
                job.take(source, archive)
            except (Cancelled, BrokenPipeError, UsageError):
                raise
            except (Failure, VmaError, OSError) as error:
                failure = failure_of(error)
                if failure is None:
                    raise
                print(f"{prog}: {one_line(failure[0])}", file=sys.stderr, flush=True)
                codes.append(failure[1])
        if not codes:
            emit({"event": "notice", "text": job.summary(count)})
    if codes:
        total = Failure(f"something is wrong with {len(codes)} of {count} archives")
        total.exit_code = max(codes)
        raise total


def new_name(options: argparse.Namespace, name: str) -> str:
    """Return what an archive is called that is stored anew."""
    plain = _COMPRESSED.sub("", name.removesuffix(".age"))
    zst = ".zst" if compression_of(options, name) else ""
    return f"{plain}{zst}{'.age' if options.encrypt_to else ''}"


def compression_of(options: argparse.Namespace, name: str) -> str | None:
    """As it was asked for; what was compressed does not become plain."""
    if options.compress or not _COMPRESSED.search(name.removesuffix(".age")):
        return str(options.compress) if options.compress else None
    return "zstd"


class _Taker(Protocol):
    """What is done with each archive."""

    def take(self, source: KeptPlace, archive: KeptArchive) -> None:
        """Raises Failure, ArchiveError, Cancelled."""

    def summary(self, count: int) -> str: ...


@contextlib.contextmanager
def _taker(options: argparse.Namespace) -> Iterator[Callable[[Emit, Cancel], _Taker]]:
    """Yield what makes the one for this target. Raises Failure, UsageError."""
    if is_service(options.target):
        # Late: it loads what sends.
        from vmapipe.control.cli.copy_service import ServiceCopy, service_link

        link = service_link(options, options.target)
        yield lambda emit, cancel: ServiceCopy(options, link, emit, cancel)
        return
    check_no_service_options(options)
    if not is_place(options.target):
        raise UsageError(
            f"{options.target} is neither a folder nor s3://BUCKET/PREFIX nor a service (tcp://HOST:PORT)"
        )
    if lock_arguments(options):
        check_lockable(options.target, options.lock_mode)
    with contextlib.closing(open_place(options.target)) as target:
        there = {archive.name: archive for archive in find_archives(target)}
        yield lambda emit, cancel: _Copy(options, target, there, emit, cancel)


def _chosen(options: argparse.Namespace) -> Iterator[tuple[KeptPlace, KeptArchive]]:
    """Raises Failure, UsageError."""
    oldest_s = time.time() - options.newer_than if options.newer_than is not None else None
    for name in options.sources:
        whole = is_place(name)
        folder, _, wanted = name.rpartition("/")
        with contextlib.closing(open_place(name if whole else folder or ".")) as place:
            found = [each for each in find_archives(place) if whole or each.name == wanted]
            if not whole and not found:
                raise Failure(f"{name}: there is no archive of that name")
            for archive in found:
                is_old = oldest_s is not None and archive.made_s < oldest_s
                if not is_old and (not options.only or archive.machine in options.only):
                    yield place, archive


class _Copy:
    """One run: what was done, and what is there."""

    def __init__(
        self,
        options: argparse.Namespace,
        target: KeptPlace,
        there: dict[str, KeptArchive],
        emit: Emit,
        cancel: Cancel,
    ) -> None:
        self._options = options
        self._target = target
        self._there = there
        self._emit = emit
        self._cancel = cancel
        self._copied = self._bytes = 0

    def summary(self, count: int) -> str:
        return f"copied {self._copied} archives, {human_bytes(self._bytes)}; {count - self._copied} were there"

    def take(self, source: KeptPlace, archive: KeptArchive) -> None:
        """Raises Failure, ArchiveError, Cancelled."""
        options = self._options
        opens = options.decrypt and source.is_encrypted(archive.name)
        anew = bool(options.compress or options.encrypt_to or opens)
        name = new_name(options, archive.name) if anew else archive.name
        state = source_state(source.full_name(archive.name)) if self._options.move else ()
        there = self._there.get(name)
        if there is not None:
            if not (
                self._options.missing or anew or is_there(source, archive, self._target, there)
            ):
                raise Failure(
                    f"{self._target.full_name(name)} exists, and is not the same archive as "
                    f"{source.full_name(archive.name)}: remove one of them, or pass over it with --missing"
                )
            if self._options.move and not anew and not self._options.missing:
                stored = read_back(source, archive.name, self._cancel, _nothing)
                self._verify_copy(source, archive, name, stored)
                _remove_unchanged(source, archive.name, state)
            return
        if anew:
            self._store_anew(source, archive, name)
            if self._options.move:
                self._verify(self._target.full_name(name))
                _remove_unchanged(source, archive.name, state)
        else:
            tell = self._tell(archive.file.size_bytes)
            lock = object_lock(self._options.lock, self._options.lock_mode)
            copied = copy_archive(
                source, archive, self._target, tell, self._cancel, lock, self._emit
            )
            note = (
                ""
                if copied.is_checked
                else "; it has no manifest, so nothing says that it is whole"
            )
            note += f"; {human_bytes(copied.kept_bytes)} were there" if copied.kept_bytes else ""
            self._say(f"copied {one_line(source.full_name(archive.name))}{note}")
            if self._options.move:
                self._verify_copy(source, archive, name, copied.stored)
            if lock is not None and isinstance(self._target, ArchiveFolder):
                path = self._target.full_name(name)
                lock_files(path, _locked_along(archive.beside), lock.until_s)
            if self._options.move:
                _remove_unchanged(source, archive.name, state)
        self._copied += 1
        self._bytes += archive.file.size_bytes

    def _say(self, text: str) -> None:
        self._emit({"event": "notice", "text": text})

    def _verify_copy(
        self, source: KeptPlace, archive: KeptArchive, name: str, stored: StoredDigest
    ) -> None:
        """Raises Damaged."""
        found = read_back(self._target, name, self._cancel, self._tell(stored.size_bytes))
        if found != stored:
            raise Damaged(
                f"{self._target.full_name(name)} is not what was copied: it was read back, and differs; "
                f"{source.full_name(archive.name)} stays"
            )

    def _verify(self, path: str) -> None:
        """Read the new archive whole. Raises ArchiveError, Failure."""
        options = self._options
        if options.encrypt_to and not options.identity:
            raise Failure(
                f"{path} is stored, and cannot be read back without its secret key (--identity): "
                "the archive stays where it was, too"
            )
        with SoundArchive(path, self._cancel, read_options(options)) as new:
            for found in new.extents():
                self._cancel.check()
                del found

    def _store_anew(self, source: KeptPlace, archive: KeptArchive, name: str) -> None:
        options = argparse.Namespace(**vars(self._options))
        options.output = self._target.full_name(name)
        options.compress = compression_of(options, archive.name)
        options.manifest, options.no_manifest = None, False
        options.digests, options.manifest_events, options.sign = False, False, None

        def store(wake: Callable[[], None]) -> ArchiveWriter[None]:
            writer: ArchiveWriter[None] = store_for(  # type: ignore[assignment]
                options, None, None, wake, self._cancel, self._emit
            )
            return writer

        path = source.full_name(archive.name)
        tell = self._tell(0)
        lock = object_lock(options.lock, options.lock_mode)
        try:
            with SoundArchive(path, self._cancel, read_options(options)) as sound:
                check_stays_encrypted(path, sound.source, options)
                was_clear = not sound.source.is_encrypted
                beside = self._beside_anew(source, archive, name, was_clear=was_clear)
                with (
                    copied_beside(source, beside, self._target, self._cancel, lock),
                    Writing(store, self._cancel) as writing,
                ):
                    writing.begin(sound.archive.header, sound.archive.raw_header)
                    for found in sound.extents():
                        writing.put(as_packed(found))
                        tell(found.extent.offset + found.extent.total_bytes)
                    writing.finish()
                if lock is not None and isinstance(self._target, ArchiveFolder):
                    lock_beside(options.output, _locked_along(beside.values()))
        except ArchiveError as error:
            raise Damaged(named(path, error)) from error
        unsigned = any(each.endswith(SIGNATURE_SUFFIX) for each in archive.beside)
        self._say(
            f"copied {one_line(path)} as {one_line(name)}, {human_bytes(writing.stored_bytes)}"
            + ("; it was signed, and is not any more" if unsigned else "")
        )

    def _beside_anew(
        self, source: KeptPlace, archive: KeptArchive, name: str, *, was_clear: bool
    ) -> dict[str, str]:
        """Return what goes along with a copy that is stored anew, and under which names. Raises Failure.

        Notes and log tell of the machine: they do not get beside an archive that hides it from now on.
        """
        beside = companions_anew(archive, name)
        if not (self._options.encrypt_to and was_clear):
            return beside
        told = [each for each in beside if not each.endswith(PROTECTED_SUFFIX)]
        for each in told:
            path = source.full_name(each)
            if self._options.move:
                raise Failure(
                    f"{path} would be in the clear beside an encrypted archive, and --move would lose it: "
                    "remove it, or copy without --move"
                )
            self._say(f"{one_line(path)} stays behind: it would be in the clear")
        return {each: beside[each] for each in beside if each not in told}

    def _tell(self, total_bytes: int) -> Callable[[int], None]:
        return paced(read_progress(self._emit, total_bytes), self._options.speed, self._cancel)


def paced(tell: Callable[[int], None], speed: int, cancel: Cancel) -> Callable[[int], None]:
    """Return what is told how many bytes are there, passes it on, and waits where `speed` bytes a second are exceeded."""
    limiter = RateLimiter(speed, time.monotonic())
    before = 0

    def told(at: int) -> None:
        nonlocal before
        limiter.took(max(0, at - before), time.monotonic())
        before = at
        tell(at)
        while (wait_s := limiter.wait_s(time.monotonic())) > 0:
            readable([cancel.fd], wait_s)
            cancel.check()

    return told


def _remove_unchanged(source: KeptPlace, name: str, state: tuple[object, ...]) -> None:
    """Remove what was copied, and nothing that has taken its name meanwhile. Raises Failure."""
    path = source.full_name(name)
    if source_state(path) != state:
        raise Failure(f"{path} was changed or replaced after it was copied: it stays where it is")
    remove(source, name)


def _locked_along(names: Iterable[str]) -> list[str]:
    """What is locked with its archive: not what changes meanwhile, or is taken away by hand later."""
    return [each for each in names if not each.endswith((PROTECTED_SUFFIX, *_UNLOCKED))]


def _nothing(count: int) -> None:
    """Nobody looks."""
