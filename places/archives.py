# SPDX-License-Identifier: Apache-2.0
"""The archives of a place, what belongs to each, and what is known of it without reading it."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from vmapipe.access.drill.result import MAX_RESULT_BYTES, DrillResult, decode_result
from vmapipe.archiver.base.choice import ARCHIVE_ENDING, ENDINGS, When, read_name
from vmapipe.archiver.outputs.cluster_digests import SUFFIX as DIGESTS_SUFFIX
from vmapipe.archiver.outputs.manifests import SIGNATURE_SUFFIX
from vmapipe.archiver.outputs.manifests import SUFFIX as MANIFEST_SUFFIX
from vmapipe.places.place import KeptPlace, StoredName
from vmapipe.places.verified import MAX_BYTES as _MAX_VERIFIED_BYTES
from vmapipe.places.verified import SUFFIX as VERIFIED_SUFFIX
from vmapipe.places.verified import Verified, decode_verified
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.immutable import SUFFIX as LOCK_SUFFIX
from vmapipe.runtime.side_files import DRILL_SUFFIX

PROTECTED_SUFFIX = ".protected"
NOTES_SUFFIX = ".notes"
# Of a store, which answers each after some tens of milliseconds.
_THREADS = 8


def companions(archive: str, *, has_log: bool = True) -> list[str]:
    """The files that belong to an archive, there or not; its manifest first.

    `has_log`: no other archive is called the same but for its ending, and has the same log.
    """
    stem = ARCHIVE_ENDING.sub("", archive)
    logs = [f"{stem}.log"] if stem != archive and has_log else []
    return [
        archive + MANIFEST_SUFFIX,
        archive + MANIFEST_SUFFIX + SIGNATURE_SUFFIX,
        archive + DIGESTS_SUFFIX,
        archive + DRILL_SUFFIX,
        archive + VERIFIED_SUFFIX,
        archive + LOCK_SUFFIX,
        archive + NOTES_SUFFIX,
        *logs,
    ]


def companions_anew(archive: KeptArchive, new_name: str) -> dict[str, str]:
    """Return what belongs to it, is there, and fits a copy that is stored anew under `new_name`, too.

    Each with its new name: the protected mark first, so that nothing prunes what has just come.
    """
    mark, notes = archive.name + PROTECTED_SUFFIX, archive.name + NOTES_SUFFIX
    new = {mark: new_name + PROTECTED_SUFFIX, notes: new_name + NOTES_SUFFIX}
    log = ARCHIVE_ENDING.sub("", archive.name) + ".log"
    new[log] = ARCHIVE_ENDING.sub("", new_name) + ".log"
    return {name: new[name] for name in new if name in archive.beside}


def has_log_of_its_own(place: KeptPlace, archive: str) -> bool:
    """Return whether there is a log, and no other archive of the place has the same. Raises Failure."""
    stem = ARCHIVE_ENDING.sub("", archive)
    return place.has(f"{stem}.log") and not any(
        each != archive and place.has(each) for each in (stem + ending for ending in ENDINGS)
    )


class KeptArchive(NamedTuple):
    """An archive of a place. `machine` and `when` are what its name says; without a date: None.

    `beside`: the names of what belongs to it and is there.
    """

    file: StoredName
    machine: str
    when: When | None
    beside: frozenset[str]

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def has_manifest(self) -> bool:
        return self.name + MANIFEST_SUFFIX in self.beside

    @property
    def is_protected(self) -> bool:
        return self.name + PROTECTED_SUFFIX in self.beside

    @property
    def made_s(self) -> float:
        """The time in its name, as if it were UTC; without one that of storing."""
        if self.when is None:
            return self.file.changed_s
        return datetime.datetime(*self.when, tzinfo=datetime.UTC).timestamp()


def find_archives(place: KeptPlace) -> list[KeptArchive]:
    """All archives of the place, by machine and time. Raises Failure.

    One listing, whatever is there: 10,000 archives are ten pages of a store.
    """
    files = {found.name: found for found in place.names()}
    # vm.vma and vm.vma.zst have the same log: it belongs to neither until one of them is gone.
    stems = Counter(ARCHIVE_ENDING.sub("", name) for name in files if ARCHIVE_ENDING.search(name))
    archives = []
    for name, file in files.items():
        if not ARCHIVE_ENDING.search(name):
            continue
        parsed = read_name(name)
        machine = parsed.machine if parsed else ARCHIVE_ENDING.sub("", name)
        shared = stems[ARCHIVE_ENDING.sub("", name)] > 1
        there = [*companions(name, has_log=not shared), name + PROTECTED_SUFFIX]
        beside = frozenset(each for each in there if each in files)
        archives.append(KeptArchive(file, machine, parsed.when if parsed else None, beside))
    return sorted(archives, key=lambda each: (each.machine, each.made_s, each.name))


class ArchiveCondition(NamedTuple):
    """What is known of an archive. `shared_bytes` None: not known; `locked_until_s` 0: it is not locked."""

    verified: Verified | None
    shared_bytes: int | None
    is_encrypted: bool
    locked_until_s: float
    drilled: str
    drill_date: str


def conditions(
    place: KeptPlace, archives: list[KeptArchive]
) -> Iterator[tuple[KeptArchive, ArchiveCondition]]:
    """Yield each archive with its condition. What cannot be read of it is as if it were not there."""
    with ThreadPoolExecutor(_THREADS, "condition") as pool:
        yield from zip(
            archives, pool.map(lambda each: condition(place, each), archives), strict=True
        )


def condition(place: KeptPlace, archive: KeptArchive) -> ArchiveCondition:
    """Raises nothing: of a stranger's files anything may be wrong."""
    name = archive.name
    verified = verified_of(place, archive)
    drill = drill_of(place, archive)
    locked_until_s, shared = 0.0, None
    with contextlib.suppress(Failure, OSError):
        locked_until_s = place.locked_until_s(name)
        shared = place.shared_bytes(name)
    return ArchiveCondition(
        verified,
        shared,
        place.is_encrypted(name),
        locked_until_s,
        drill.verdict if drill is not None else "",
        drill.date if drill is not None else "",
    )


def drill_of(place: KeptPlace, archive: KeptArchive) -> DrillResult | None:
    """Return its latest restore test; None: there was none, or its result is not valid. Raises nothing."""
    name = archive.name + DRILL_SUFFIX
    if name not in archive.beside:
        return None
    with contextlib.suppress(Failure, OSError, ValueError):
        raw = place.read_small(name, MAX_RESULT_BYTES)
        return decode_result(raw) if raw is not None else None
    return None


def verified_of(place: KeptPlace, archive: KeptArchive) -> Verified | None:
    """When it was verified last; None: never, or it has changed since. Raises nothing."""
    name = archive.name + VERIFIED_SUFFIX
    if name not in archive.beside:
        return None
    with contextlib.suppress(Failure, OSError):
        raw = place.read_small(name, _MAX_VERIFIED_BYTES)
        return decode_verified(raw, archive.file.identity, time.time())
    return None


def by_machine(archives: list[KeptArchive]) -> Mapping[str, list[KeptArchive]]:
    """Those whose names have a date."""
    groups: dict[str, list[KeptArchive]] = {}
    for archive in archives:
        if archive.when is not None:
            groups.setdefault(archive.machine, []).append(archive)
    return groups
